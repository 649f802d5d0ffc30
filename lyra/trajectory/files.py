"""How is a camera path kept in a file (`trajectory.npz`, the released format), and what if the file is wrong?

The file holds `w2c` (N, 4, 4), `intrinsics` (N, 3, 3) in pixels, and the scalars `image_height` and `image_width`; the
world folder's `cameras.npz` is the same. Reading needs no pickle. Knows no photo: making the first pose the photo's
camera is a step of its own (`relative_to_first`), and resizing is `Cameras.resized`.
"""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from lyra.errors import UserError
from lyra.geometry.rotations import is_rotation
from lyra.types import Cameras

_KEYS = ("w2c", "intrinsics", "image_height", "image_width")
_MAX_BYTES = 256 * 2**20
"""Unpacked size up to which a file is read: over a million poses, far below what would hurt a server."""
_UNREADABLE = (
    OSError,  # Not there, not a file, not allowed, cut short.
    ValueError,  # Not an array, or one that would need pickle.
    EOFError,
    OverflowError,  # A shape with absurd numbers.
    MemoryError,
    NotImplementedError,  # A compression this Python cannot undo.
    RuntimeError,  # An encrypted zip.
    zipfile.BadZipFile,
    zlib.error,
)


def write_trajectory(path: str | Path, cameras: Cameras) -> None:
    """Write cameras in the released format; the same cameras always give the same bytes."""
    # An open file, because numpy appends ".npz" to names that lack it.
    with Path(path).open("wb") as file:
        np.savez(
            file,
            w2c=cameras.w2c.detach().cpu().numpy().astype(np.float32),
            intrinsics=cameras.intrinsics.detach().cpu().numpy().astype(np.float32),
            image_height=np.int64(cameras.image_height),
            image_width=np.int64(cameras.image_width),
        )


def read_trajectory(path: str | Path, *, frames: int | None = None) -> Cameras:
    """Read and check a camera path; with `frames`, exactly its first `frames` cameras.

    Args:
        path: the npz file.
        frames: number of cameras needed; all of the file when None.

    Raises:
        UserError: the file is missing or not such an npz, a key is missing or has a wrong shape, a number is not
            finite, a pose is not a rotation and a translation, a focal length or the image size is not positive, or
            there are fewer than `frames` cameras.
    """
    path = Path(path)
    arrays = _read_arrays(path)
    w2c, intrinsics = arrays["w2c"], arrays["intrinsics"]
    if w2c.ndim != 3 or w2c.shape[1:] != (4, 4) or len(w2c) == 0:
        raise UserError(
            f'The array "w2c" in {path.name} has the shape {w2c.shape}; save world-to-camera matrices as (N, 4, 4).'
        )
    if intrinsics.shape != (len(w2c), 3, 3):
        raise UserError(
            f'The array "intrinsics" in {path.name} has the shape {intrinsics.shape}; save one 3x3 matrix per pose, '
            f"which makes ({len(w2c)}, 3, 3)."
        )
    height, width = _side(path, "image_height", arrays), _side(path, "image_width", arrays)
    _check_numbers(path, w2c, intrinsics)
    if frames is not None and len(w2c) < frames:
        raise UserError(
            f"{path.name} has {len(w2c)} poses but {frames} are needed; save a longer path or ask for fewer chunks."
        )
    return Cameras(torch.from_numpy(w2c), torch.from_numpy(intrinsics), height, width)[:frames]


def relative_to_first(cameras: Cameras) -> Cameras:
    """The same path in the world of its first camera: w2c_i inv(w2c_0), so that pose 0 is the photo's (identity)."""
    w2c = cameras.w2c.double()
    relative = w2c @ torch.linalg.inv(w2c[0])
    # The inverse is inexact, and frame 0 is the photo itself.
    relative[0] = torch.eye(4, dtype=relative.dtype, device=relative.device)
    return Cameras(relative.to(cameras.w2c.dtype), cameras.intrinsics, cameras.image_height, cameras.image_width)


def _read_arrays(path: Path) -> dict[str, NDArray[np.float32]]:
    """The four arrays as float32; every way a file can be unreadable becomes one sentence."""
    if not path.exists():
        raise UserError(f"There is no camera path at {path}; check the name or choose a preset.")
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(member.file_size for member in archive.infolist())
        if unpacked > _MAX_BYTES:
            raise UserError(f"{path.name} unpacks to {unpacked >> 20} MB; save a camera path of at most 256 MB.")
        with np.load(path, allow_pickle=False) as archive_arrays:
            missing = [key for key in _KEYS if key not in archive_arrays]
            loaded = {} if missing else {key: np.asarray(archive_arrays[key]) for key in _KEYS}
    except UserError:
        raise
    except _UNREADABLE as error:
        raise UserError(
            f"{path.name} is not a readable npz file of plain arrays; save the path again with numpy.savez."
        ) from error
    if missing:
        raise UserError(
            f"{path.name} lacks {', '.join(missing)}; save w2c, intrinsics, image_height and image_width in it."
        )
    for key, array in loaded.items():
        if array.dtype.kind not in "fiu":
            raise UserError(f'The array "{key}" in {path.name} holds {array.dtype}, not numbers; save it as float32.')
    # A float64 too large for float32 becomes infinite here and is refused with the other infinities.
    with np.errstate(over="ignore"):
        return {key: array.astype(np.float32) for key, array in loaded.items()}


def _side(path: Path, key: str, arrays: dict[str, NDArray[np.float32]]) -> int:
    """An image side in pixels: one whole positive number, as a scalar or an array of one."""
    array = arrays[key]
    value = float(array.reshape(-1)[0]) if array.size == 1 else float("nan")
    if not (np.isfinite(value) and value >= 1 and value == int(value)):
        shown = f"{value:g}" if array.size == 1 else f"an array of shape {array.shape}"
        raise UserError(
            f'The value "{key}" in {path.name} is {shown}; save the image side as a whole number of pixels.'
        )
    return int(value)


def _check_numbers(path: Path, w2c: NDArray[np.float32], intrinsics: NDArray[np.float32]) -> None:
    """Every pose is a rotation and a translation, and every K a pinhole; names the first frame that is not."""
    for key, array in (("w2c", w2c), ("intrinsics", intrinsics)):
        _refuse(
            path,
            ~np.isfinite(array).all(axis=(1, 2)),
            f'"{key}" holds a number that is not finite',
            "save it without NaN and infinity",
        )
    _refuse(
        path,
        np.abs(w2c[:, 3] - np.array([0.0, 0.0, 0.0, 1.0])).max(axis=1) > 1e-3,
        'the bottom row of "w2c" is not 0 0 0 1',
        "save matrices that act on column vectors, with the translation in the last column",
    )
    _refuse(
        path,
        ~is_rotation(torch.from_numpy(w2c[:, :3, :3])).numpy(),
        'the upper left 3x3 of "w2c" is not a rotation',
        "save unscaled right-handed world-to-camera matrices",
    )
    _refuse(
        path,
        (intrinsics[:, [0, 1], [0, 1]] <= 0).any(axis=1),
        'a focal length in "intrinsics" is not positive',
        "save focal lengths in pixels",
    )
    _refuse(
        path,
        np.abs(intrinsics[:, 2] - np.array([0.0, 0.0, 1.0])).max(axis=1) > 1e-3,
        'the bottom row of "intrinsics" is not 0 0 1',
        "save pinhole matrices in pixels",
    )


def _refuse(path: Path, bad: ArrayLike, what: str, remedy: str) -> None:
    """Raise about the first pose that is marked bad, if any is."""
    marked = np.flatnonzero(bad)
    if len(marked):
        raise UserError(f"In pose {marked[0]} of {path.name} {what}; {remedy}.")
