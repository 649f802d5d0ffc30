"""How are Gaussians kept in .splat files, the 32 bytes a Gaussian of the first browser viewer?

Position and deviations as float32, colour and opacity in four bytes, the quaternion in four more; no header, no
harmonics beyond degree 0 and no place for a word about where the file comes from. The most important Gaussians come
first, so that a viewer that streams the file, or shows only its beginning, shows most of the scene. World axes are the
scene's own (OpenCV: y down), as these files have no convention but that of the PLY they are made from.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from lyra.errors import UserError
from lyra.export.files import replacing, require_gaussians
from lyra.export.ply import NEAREST_TO_CERTAIN
from lyra.types import GaussianScene

SH_C0 = 0.28209479177387814
"""Spherical harmonic of degree 0."""
_RECORD = np.dtype([("means", "<f4", 3), ("scales", "<f4", 3), ("rgba", "u1", 4), ("quats", "u1", 4)])


def write_splat(path: Path, scene: GaussianScene) -> None:
    """Write a scene, the largest product of volume and opacity first.

    Errors of one Gaussian: colour and opacity 1/510, a quaternion's components 1/256; positions and deviations none.
    Colours outside [0, 1] and harmonics beyond degree 0 are lost.

    Raises:
        UserError: the scene is empty or holds numbers that are not finite.
    """
    scene = require_gaussians(path, scene)
    means, sh, scales = scene.means.numpy(), scene.sh.numpy(), scene.scales.numpy()
    opacities, quats = scene.opacities.numpy(), scene.quats.numpy()
    order = np.argsort(-scales.prod(axis=1) * opacities, kind="stable")
    lengths = np.maximum(np.linalg.norm(quats, axis=1, keepdims=True), np.float32(1e-12))
    table = np.empty(len(scene), _RECORD)
    table["means"], table["scales"] = means, scales
    table["rgba"][:, :3] = _to_bytes((0.5 + np.float32(SH_C0) * sh[:, 0]) * 255)
    table["rgba"][:, 3] = _to_bytes(opacities * 255)
    table["quats"] = _to_bytes(quats / lengths * 128 + 128)
    # Records are put in order as rows of eight numbers, five times as fast as numpy does it with records.
    rows = table.view("<u4").reshape(len(scene), 8)[order]
    with replacing(path) as file:
        file.write(rows.data)


def read_splat(path: Path) -> GaussianScene:
    """Read a scene in the order of the file.

    Raises:
        UserError: the file is not there, is empty or not a whole number of Gaussians long; also a ValueError.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); check the name of the file.") from error
    if not data or len(data) % _RECORD.itemsize:
        raise UserError(
            f"{path} is not a whole .splat file: {len(data)} bytes are no multiple of 32; copy or write it again."
        )
    table = np.frombuffer(data, _RECORD)
    rgba = torch.from_numpy(table["rgba"] / np.float32(255))
    quats = torch.from_numpy((table["quats"] - np.float32(128)) / 128)
    return GaussianScene(
        means=torch.from_numpy(table["means"].copy()),
        quats=torch.nn.functional.normalize(quats, dim=1),
        scales=torch.from_numpy(table["scales"].copy()),
        opacities=rgba[:, 3].clamp(NEAREST_TO_CERTAIN, 1 - NEAREST_TO_CERTAIN),
        sh=((rgba[:, :3] - 0.5) / SH_C0)[:, None],
    )


def _to_bytes(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Rounded and limited to a byte each."""
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)
