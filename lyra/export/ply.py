"""How are Gaussians, points and meshes kept in PLY files, and what if such a file is wrong?

Gaussians are in the INRIA layout, which splat viewers and editors read: logit opacity, logarithmic scales, spherical
harmonics channel by channel. World axes are the scene's own (OpenCV: y down), as that layout has them. Knows no other
format.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from numpy.typing import NDArray
from plyfile import PlyData, PlyHeaderParseError, PlyParseError
from torch import Tensor

from lyra.errors import UserError
from lyra.export.files import one_line, replacing, require_faces, require_gaussians
from lyra.types import GaussianScene, TriangleMesh

NEAREST_TO_CERTAIN = 1e-6
"""Opacities are kept this far from 0 and 1, where the logit is infinite (released code, chunked exporter)."""
SMALLEST_SCALE = 1e-12
"""Standard deviations below this, of which there is no logarithm, are written as this."""
_BLOCK = 1 << 16
"""Gaussians converted at a time, so that a scene of ten million needs no second copy in memory."""
_LONGEST_HEADER = 1 << 20
_TYPES = {
    **{"char": "i1", "uchar": "u1", "short": "<i2", "ushort": "<u2", "int": "<i4", "uint": "<u4"},
    **{"int8": "i1", "uint8": "u1", "int16": "<i2", "uint16": "<u2", "int32": "<i4", "uint32": "<u4"},
    **{"float": "<f4", "float32": "<f4", "double": "<f8", "float64": "<f8"},
}
_AXES = ("x", "y", "z")
_DC = ("f_dc_0", "f_dc_1", "f_dc_2")
_SCALES = ("scale_0", "scale_1", "scale_2")
_QUATERNION = ("rot_0", "rot_1", "rot_2", "rot_3")


def property_names(rest: int) -> list[str]:
    """Names of a vertex's floats for `rest` coefficients beyond degree 0."""
    return [
        *(*_AXES, "nx", "ny", "nz"),
        *_DC,
        *(f"f_rest_{i}" for i in range(3 * rest)),
        "opacity",
        *_SCALES,
        *_QUATERNION,
    ]


def write_splat_ply(path: Path, scene: GaussianScene, comment: str = "") -> None:
    """Write a scene; the comment, such as its provenance, goes into the header as one line.

    Raises:
        UserError: the scene is empty or holds numbers that are not finite.
    """
    scene = require_gaussians(path, scene)
    rest = scene.sh.shape[1] - 1
    names = property_names(rest)
    means, sh = scene.means.numpy(), scene.sh.numpy()
    opacities, scales, quats = scene.opacities.numpy(), scene.scales.numpy(), scene.quats.numpy()
    with replacing(path) as file:
        file.write(_header(comment, [f"element vertex {len(scene)}", *(f"property float {name}" for name in names)]))
        table = np.zeros((min(_BLOCK, len(scene)), len(names)), "<f4")
        for first in range(0, len(scene), _BLOCK):
            span = slice(first, first + _BLOCK)
            rows = table[: len(means[span])]
            rows[:, 0:3] = means[span]  # Normals, the next three, stay zero.
            rows[:, 6:9] = sh[span, 0]
            rows[:, 9:-8] = sh[span, 1:].transpose(0, 2, 1).reshape(len(rows), -1)
            p = np.clip(opacities[span], NEAREST_TO_CERTAIN, 1 - NEAREST_TO_CERTAIN)
            rows[:, -8] = np.log(p / (1 - p))
            rows[:, -7:-4] = np.log(np.maximum(scales[span], SMALLEST_SCALE))
            rows[:, -4:] = quats[span]
            file.write(rows.data)


def read_splat_ply(path: Path) -> GaussianScene:
    """Read a scene written by `write_splat_ply` or by another program that uses the layout.

    Raises:
        UserError: the file is not there, not a PLY, cut short, or not one of Gaussians; also a ValueError.
    """
    vertices = _read_vertices(path)
    names = set(vertices.dtype.names or ())
    rest = sum(name.startswith("f_rest_") for name in names) // 3
    missing = (set(property_names(rest)) - {"nx", "ny", "nz"}) - names
    if missing:
        raise UserError(
            f"{path} is not a splat PLY: it lacks {', '.join(sorted(missing))}; choose a file with Gaussians in it."
        )
    sh = _columns(vertices, _DC)[:, None]
    if rest:
        others = _columns(vertices, [f"f_rest_{i}" for i in range(3 * rest)]).unflatten(1, (3, rest)).transpose(1, 2)
        sh = torch.cat([sh, others], dim=1)
    return GaussianScene(
        means=_columns(vertices, _AXES),
        quats=_columns(vertices, _QUATERNION),
        scales=_columns(vertices, _SCALES).exp_(),
        opacities=_columns(vertices, ("opacity",))[:, 0].sigmoid(),
        sh=sh,
    )


def write_point_ply(path: Path, points: Float[Tensor, "n 3"], colours: UInt8[Tensor, "n 3"], comment: str = "") -> None:
    """Write a coloured point cloud, world axes as given."""
    table = np.empty(len(points), np.dtype([("xyz", "<f4", 3), ("rgb", "u1", 3)]))
    table["xyz"], table["rgb"] = points.detach().cpu().float().numpy(), colours.cpu().numpy()
    with replacing(path) as file:
        file.write(_header(comment, _coloured_vertices(len(table))))
        file.write(table.data)


def write_mesh_ply(path: Path, mesh: TriangleMesh, provenance: str = "") -> None:
    """Write a coloured mesh in the world's own axes (OpenCV: y down).

    Raises:
        UserError: the mesh has no faces.
    """
    require_faces(path, mesh)
    vertices = np.empty(len(mesh.vertices), np.dtype([("xyz", "<f4", 3), ("rgb", "u1", 3)]))
    vertices["xyz"], vertices["rgb"] = mesh.vertices.detach().cpu().float().numpy(), mesh.colours.cpu().numpy()
    faces = np.empty(len(mesh.faces), np.dtype([("count", "u1"), ("corners", "<i4", 3)]))
    faces["count"], faces["corners"] = 3, mesh.faces.cpu().numpy()
    elements = [*_coloured_vertices(len(vertices)), f"element face {len(faces)}"]
    with replacing(path) as file:
        file.write(_header(provenance, [*elements, "property list uchar int vertex_indices"]))
        file.write(vertices.data)
        file.write(faces.data)


def _header(comment: str, elements: Sequence[str]) -> bytes:
    """A header, with the comment in one line."""
    lines = ["ply", "format binary_little_endian 1.0"]
    lines += [f"comment {one_line(comment)}"] if comment else []
    return ("\n".join([*lines, *elements, "end_header"]) + "\n").encode("ascii", "replace")


def _coloured_vertices(count: int) -> list[str]:
    """Header lines of vertices with a position and a colour."""
    return [
        f"element vertex {count}",
        *(f"property float {axis}" for axis in _AXES),
        *(f"property uchar {channel}" for channel in ("red", "green", "blue")),
    ]


@dataclass(frozen=True)
class _Layout:
    """Where the vertices of a little-endian file without lists before them are."""

    offset: int
    count: int
    record: np.dtype


def _read_vertices(path: Path) -> NDArray[Any]:
    """The vertex records; files of other layouts than the usual one are left to plyfile.

    Raises:
        UserError: the file is not there, not a PLY, or cut short.
    """
    try:
        with path.open("rb") as file:
            layout = _vertex_layout(file.read(_LONGEST_HEADER))
        if layout is None:
            return PlyData.read(str(path))["vertex"].data
        if path.stat().st_size < layout.offset + layout.count * layout.record.itemsize:
            raise UserError(f"{path} is cut short: {layout.count} vertices do not fit in it; copy or write it again.")
        if layout.count == 0:
            return np.empty(0, layout.record)
        return np.memmap(path, layout.record, "r", layout.offset, (layout.count,))
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); check the name of the file.") from error
    except (PlyHeaderParseError, PlyParseError, KeyError, ValueError, EOFError, MemoryError, OverflowError) as error:
        raise UserError(f"{path} is not a readable PLY file ({error}); copy or write it again.") from error


def _vertex_layout(start: bytes) -> _Layout | None:
    """The vertices' place from the beginning of a file; None if only plyfile can tell, or say what is wrong."""
    header, found, _ = start.partition(b"end_header\n")
    lines = [line.split() for line in header.decode("ascii", "replace").split("\n")]
    if not found or lines[:2] != [["ply"], ["format", "binary_little_endian", "1.0"]]:
        return None
    offset, count, fields, name = len(header) + len(found), 0, list[tuple[str, str]](), ""
    for words in [*lines[2:], ["element", "", "0"]]:
        if not words or words[0] in ("comment", "obj_info"):
            continue
        if words[0] == "element" and len(words) == 3 and words[2].isdecimal():
            if name == "vertex":
                return _Layout(offset, count, np.dtype(fields))
            offset += count * np.dtype(fields).itemsize
            name, count, fields = words[1], int(words[2]), []
        elif words[0] == "property" and len(words) == 3 and words[1] in _TYPES:
            fields.append((words[2], _TYPES[words[1]]))
        else:
            return None
    return None


def _columns(vertices: NDArray[Any], names: Sequence[str]) -> Float[Tensor, "n k"]:
    """Some properties as float32; neighbours in a record of floats are copied together."""
    offsets = [vertices.dtype.fields[name][1] for name in names] if vertices.dtype.fields else []
    floats = all(vertices.dtype[name] == np.dtype("<f4") for name in names)
    if floats and np.dtype("<f4").isnative and offsets == [offsets[0] + 4 * i for i in range(len(names))]:
        together = np.ndarray(
            (len(vertices), len(names)), "<f4", vertices, offsets[0], (vertices.strides[0], 4)
        )  # A view into the records.
        return torch.from_numpy(together.copy())
    return torch.from_numpy(np.stack([np.asarray(vertices[name], np.float32) for name in names], axis=1))
