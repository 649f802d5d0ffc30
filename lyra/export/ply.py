"""Splat PLY files in the INRIA layout, which splat viewers and editors read.

Values are stored as that layout wants them: logit opacity, logarithmic scales, spherical harmonics channel by channel.
World axes are the scene's own (OpenCV: y down).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from plyfile import PlyData

from lyra.types import GaussianScene


def property_names(rest: int) -> list[str]:
    """Names of a vertex's floats for `rest` coefficients beyond degree 0."""
    return [
        *("x", "y", "z", "nx", "ny", "nz"),
        *(f"f_dc_{i}" for i in range(3)),
        *(f"f_rest_{i}" for i in range(3 * rest)),
        "opacity",
        *(f"scale_{i}" for i in range(3)),
        *(f"rot_{i}" for i in range(4)),
    ]


def write_splat_ply(path: Path, scene: GaussianScene, comment: str = "") -> None:
    """Write a scene; the comment, one line, goes into the header."""
    rest = scene.sh.shape[1] - 1
    columns = [
        scene.means,
        torch.zeros_like(scene.means),
        scene.sh[:, 0],
        scene.sh[:, 1:].transpose(1, 2).flatten(1),
        torch.logit(scene.opacities.clamp(1e-6, 1 - 1e-6))[:, None],
        scene.scales.clamp(min=1e-12).log(),
        scene.quats,
    ]
    table = torch.cat([column.float() for column in columns], dim=1).numpy().astype("<f4")
    lines = ["ply", "format binary_little_endian 1.0"]
    lines += [f"comment {' '.join(comment.split())}"] if comment else []
    lines += [
        f"element vertex {len(table)}",
        *(f"property float {name}" for name in property_names(rest)),
        "end_header",
    ]
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(("\n".join(lines) + "\n").encode("ascii", "replace"))
        file.write(table.tobytes())
    temporary.replace(path)


def read_splat_ply(path: Path) -> GaussianScene:
    """Read a scene written by `write_splat_ply` or by another program that uses the layout.

    Raises:
        ValueError: the file is not a splat PLY.
    """
    vertex = PlyData.read(str(path))["vertex"]
    names = {item.name for item in vertex.properties}
    rest = sum(name.startswith("f_rest_") for name in names) // 3
    missing = set(property_names(0)) - {"nx", "ny", "nz"} - names
    if missing:
        raise ValueError(f"{path} is not a splat PLY: it lacks {', '.join(sorted(missing))}")

    def columns(*wanted: str) -> torch.Tensor:
        return torch.from_numpy(np.stack([np.asarray(vertex[name], np.float32) for name in wanted], axis=1))

    sh = columns("f_dc_0", "f_dc_1", "f_dc_2")[:, None]
    if rest:
        others = columns(*(f"f_rest_{i}" for i in range(3 * rest))).unflatten(1, (3, rest)).transpose(1, 2)
        sh = torch.cat([sh, others], dim=1)
    return GaussianScene(
        means=columns("x", "y", "z"),
        quats=columns("rot_0", "rot_1", "rot_2", "rot_3"),
        scales=columns("scale_0", "scale_1", "scale_2").exp(),
        opacities=torch.sigmoid(columns("opacity"))[:, 0],
        sh=sh,
    )


def write_point_ply(path: Path, points: torch.Tensor, colours: torch.Tensor) -> None:
    """Write a coloured point cloud: positions (n, 3) and uint8 colours (n, 3)."""
    record = np.dtype([("xyz", "<f4", 3), ("rgb", "u1", 3)])
    table = np.empty(len(points), record)
    table["xyz"], table["rgb"] = points.float().numpy(), colours.numpy()
    header = ["ply", "format binary_little_endian 1.0", f"element vertex {len(table)}"]
    header += [f"property float {axis}" for axis in "xyz"]
    header += [f"property uchar {channel}" for channel in ("red", "green", "blue")]
    path.write_bytes(("\n".join([*header, "end_header"]) + "\n").encode() + table.tobytes())
