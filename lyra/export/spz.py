"""How are Gaussians kept in SPZ files (Niantic's packed format, version 3), and what if such a file is wrong?

About a seventh of a PLY's size: positions in 24-bit fixed point, everything else in bytes, rotations as the smallest
three components of a quaternion. Axes are the format's own, RUB (x right, y up, z towards the viewer), as its
documentation demands: files are turned by half a turn about x on the way out and in, so a viewer with y up shows them
upright without a turn of its own. Version 4 is not written, because browser viewers do not read it.
"""

from __future__ import annotations

import os
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from lyra.errors import UserError
from lyra.export.files import one_line, replacing, require_gaussians
from lyra.export.ply import NEAREST_TO_CERTAIN, SMALLEST_SCALE
from lyra.types import GaussianScene

MAGIC = 0x5053474E
VERSION = 3
FRACTIONAL_BITS = 12
"""Of a position's 24 bits: a step of 1/4096 scene unit and a range of 2048 (as Niantic's writer)."""
COLOUR_SCALE = 0.15
"""A colour byte is 255 (0.5 + 0.15 f_dc): a little more than the range of visible colours (Niantic's writer)."""
_DEGREE = {1: 0, 4: 1, 9: 2, 16: 3}
"""Degree of spherical harmonics by number of coefficients."""
_HEADER = struct.Struct("<IIIBBBB")
_LARGEST = 2**23 - 1
_COMPONENT = 511
"""A quaternion component is stored as a sign and 9 bits of its size, in units of 1/sqrt(2)."""
_MOST_PER_GAUSSIAN = 65
_MOST_PER_BYTE = 1032
"""Deflate cannot pack more bytes than this into one."""
_LEVEL = 4
"""Of zlib: files are 0.7 % smaller at 6, which takes a third more time."""
_PIECE = 1 << 18
_TURNED_SH = np.array([1, -1, -1, 1, -1, 1, 1, -1, 1, -1, 1, -1, -1, 1, -1, 1], np.float32)
"""Sign of each real spherical harmonic when y and z change theirs; order -l to l within a degree."""
_OTHERS = np.array([[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2]])


def turned_about_x(scene: GaussianScene) -> GaussianScene:
    """The scene after half a turn about x: OpenCV axes become those with y up and z backwards, and the other way round.

    Quaternions are conjugated by the turn rather than multiplied by it. A Gaussian's own axes are turned with it, which
    changes no Gaussian and makes this function its own inverse to the bit.
    """
    flip = torch.tensor([1.0, -1.0, -1.0], dtype=scene.means.dtype, device=scene.means.device)
    signs = torch.from_numpy(_TURNED_SH[: scene.sh.shape[1]]).to(scene.sh)
    quats = scene.quats * torch.cat([flip[:1], flip])
    return GaussianScene(scene.means * flip, quats, scene.scales, scene.opacities, scene.sh * signs[:, None])


def write_spz(path: Path, scene: GaussianScene, provenance: str = "") -> None:
    """Write a scene; the provenance becomes the comment of the gzip header, which `zcat` and viewers skip.

    Errors of one Gaussian: position 1/8192 of a scene unit (more beyond 2048 units), opacity 1/510, colour 0.4/255,
    scale 3.2 %, rotation 0.3 degrees, harmonics 1/256 within [-1, 1].

    Raises:
        UserError: the scene is empty, holds numbers that are not finite, or has another number of harmonics than those
            of degree 0 to 3.
    """
    scene = require_gaussians(path, scene)
    if scene.sh.shape[1] not in _DEGREE:
        raise UserError(
            f"{path.name} cannot hold {scene.sh.shape[1]} harmonics for each Gaussian; give it 1, 4, 9 or 16 of them."
        )
    turned = turned_about_x(scene)
    bits = _fractional_bits(turned.means)
    if bits < 1:
        raise UserError(f"The scene for {path.name} is over {2**22} units large, too large for SPZ; scale it down.")
    header = _HEADER.pack(MAGIC, VERSION, len(scene), _DEGREE[scene.sh.shape[1]], bits, 0, 0)
    with replacing(path) as file:
        file.write(_gzip(header + b"".join(_sections(turned, bits)), provenance))


def read_spz(path: Path) -> GaussianScene:
    """Read version 2 or 3 into the project's OpenCV axes.

    Raises:
        UserError: the file is not there, not such an SPZ file, or cut short; also a ValueError.
    """
    data = _gunzip(path)
    if len(data) < _HEADER.size or _HEADER.unpack_from(data)[0] != MAGIC:
        raise UserError(f"{path} is not an SPZ file; choose one that ends in .spz.")
    _, version, count, degree, bits, _, _ = _HEADER.unpack_from(data)
    if version not in (2, 3) or degree > 3:
        raise UserError(
            f"{path} is of SPZ version {version} with harmonics of degree {degree}; save it as version 3 and degree 3."
        )
    rest = (degree + 1) ** 2 - 1
    sizes = np.array([9, 1, 3, 3, 4 if version == 3 else 3, 3 * rest])
    if len(data) < _HEADER.size + count * int(sizes.sum()):
        raise UserError(f"{path} is cut short: {count} Gaussians do not fit in it; copy or write it again.")
    body = np.frombuffer(data, np.uint8, count * int(sizes.sum()), _HEADER.size)
    position, opacity, colour, scale, rotation, harmonics = np.split(body, np.cumsum(sizes * count)[:-1])
    sh = np.empty((count, 1 + rest, 3), np.float32)
    sh[:, 0] = (colour.reshape(count, 3) / np.float32(255) - 0.5) / COLOUR_SCALE
    sh[:, 1:] = (harmonics.reshape(count, rest, 3) - np.float32(128)) / 128
    quats = _unpack_smallest_three(rotation) if version == 3 else _unpack_first_three(rotation)
    scene = GaussianScene(
        means=torch.from_numpy(_unpack_positions(position, bits)),
        quats=torch.from_numpy(quats),
        scales=torch.from_numpy(np.exp(scale.reshape(count, 3) / np.float32(16) - 10)),
        opacities=torch.from_numpy(np.clip(opacity / np.float32(255), NEAREST_TO_CERTAIN, 1 - NEAREST_TO_CERTAIN)),
        sh=torch.from_numpy(sh),
    )
    return turned_about_x(scene)


def _fractional_bits(means: Float[Tensor, "n 3"]) -> int:
    """Bits after the point with which the farthest coordinate still fits in 24; 12 for all but huge scenes."""
    farthest = float(means.abs().max())
    bits = FRACTIONAL_BITS
    while bits > 0 and farthest * 2**bits > _LARGEST:
        bits -= 1
    return bits


def _sections(scene: GaussianScene, bits: int) -> list[bytes]:
    """The packed attributes in the file's order: positions, opacities, colours, scales, rotations, harmonics."""
    fixed = np.rint(scene.means.numpy() * np.float32(2**bits)).astype("<i4")
    logarithms = np.log(np.maximum(scene.scales.numpy(), SMALLEST_SCALE))
    sh = scene.sh.numpy()
    return [
        fixed.view(np.uint8).reshape(len(scene), 3, 4)[..., :3].tobytes(),
        _to_bytes(scene.opacities.numpy() * 255),
        _to_bytes(sh[:, 0] * np.float32(255 * COLOUR_SCALE) + np.float32(127.5)),
        _to_bytes((logarithms + 10) * 16),
        _pack_smallest_three(scene.quats.numpy()).tobytes(),
        _to_bytes(sh[:, 1:] * 128 + 128),
    ]


def _to_bytes(values: NDArray[np.float32]) -> bytes:
    """Rounded and limited to a byte each."""
    return np.clip(np.rint(values), 0, 255).astype(np.uint8).tobytes()


def _pack_smallest_three(quats: NDArray[np.float32]) -> NDArray[np.uint32]:
    """Unit quaternions (wxyz) in 32 bits: 2 for which of xyzw is largest and left out, 10 for each of the others.

    The largest is made positive first (q and -q rotate alike), so its size follows from the other three.
    """
    xyzw = quats[:, [1, 2, 3, 0]]
    xyzw = xyzw / np.maximum(np.linalg.norm(xyzw, axis=1, keepdims=True), 1e-12)
    largest = np.abs(xyzw).argmax(axis=1)
    rows = np.arange(len(xyzw))
    negative = (xyzw < 0) != (xyzw[rows, largest] < 0)[:, None]
    size = np.minimum(np.rint(np.abs(xyzw) * np.float32(_COMPONENT * 2**0.5)), _COMPONENT)
    codes = size.astype(np.uint32) | negative.astype(np.uint32) << 9
    first, second, third = (codes[rows, _OTHERS[largest, k]] for k in range(3))
    return (largest.astype(np.uint32) << 30 | first << 20 | second << 10 | third).astype("<u4")


def _unpack_smallest_three(packed: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Unit quaternions (wxyz) of `_pack_smallest_three`."""
    code = np.frombuffer(packed.tobytes(), "<u4")
    largest = (code >> 30).astype(np.int64)
    xyzw = np.zeros((len(code), 4), np.float32)
    rows = np.arange(len(code))
    for k in range(3):
        part = code >> (20 - 10 * k)
        size = (part & _COMPONENT).astype(np.float32) * np.float32(2**-0.5 / _COMPONENT)
        xyzw[rows, _OTHERS[largest, k]] = np.where(part >> 9 & 1, -size, size)
    xyzw[rows, largest] = np.sqrt(np.maximum(0, 1 - (xyzw**2).sum(axis=1)))
    return np.ascontiguousarray(xyzw[:, [3, 0, 1, 2]])


def _unpack_first_three(packed: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Unit quaternions (wxyz) of version 2, which keeps x, y and z in a byte each and w positive."""
    xyz = packed.reshape(-1, 3) / np.float32(127.5) - 1
    w = np.sqrt(np.maximum(0, 1 - (xyz**2).sum(axis=1, keepdims=True)))
    return np.concatenate([w, xyz], axis=1)


def _unpack_positions(packed: NDArray[np.uint8], bits: int) -> NDArray[np.float32]:
    """Positions of 24-bit integers; the three bytes go to the upper end of four, so that a shift keeps the sign."""
    wide = np.zeros((len(packed) // 9, 3, 4), np.uint8)
    wide[..., 1:] = packed.reshape(-1, 3, 3)
    return (wide.reshape(-1, 12).view("<i4") >> 8).astype(np.float32) * np.float32(2.0**-bits)


def _deflate(data: memoryview, last: bool) -> bytes:
    """A part of the data on its own, ending at a whole byte."""
    compressor = zlib.compressobj(_LEVEL, zlib.DEFLATED, -zlib.MAX_WBITS)
    return compressor.compress(data) + compressor.flush(zlib.Z_FINISH if last else zlib.Z_SYNC_FLUSH)


def _gzip(data: bytes, comment: str) -> bytes:
    """One gzip member without a date; pieces are deflated side by side, as pigz does, because zlib takes most time."""
    view = memoryview(data)
    pieces = [view[first : first + _PIECE] for first in range(0, len(data), _PIECE)]
    last = [False] * (len(pieces) - 1) + [True]
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        deflated = list(pool.map(_deflate, pieces, last))
    text = one_line(comment).encode("latin-1", "replace").replace(b"\0", b"")
    flags = 16 if text else 0
    header = bytes([0x1F, 0x8B, 8, flags, 0, 0, 0, 0, 0, 255]) + (text + b"\0" if text else b"")
    return b"".join([header, *deflated, struct.pack("<II", zlib.crc32(data), len(data) & 0xFFFFFFFF)])


def _gunzip(path: Path) -> bytes:
    """The unpacked file, but no more of it than its own header promises.

    Raises:
        UserError: the file is not there or not gzip.
    """
    try:
        packed = path.read_bytes()
        inflater = zlib.decompressobj(16 + zlib.MAX_WBITS)
        start = inflater.decompress(packed, _HEADER.size)
        if len(start) < _HEADER.size:
            return start
        # The most that any degree can need; a count that lies cannot make the result larger than the file allows. The
        # rest is for the check sum behind the data, which zlib compares when it comes to it.
        wanted = min(_HEADER.unpack(start)[2] * _MOST_PER_GAUSSIAN, len(packed) * _MOST_PER_BYTE) + 2**16
        return start + inflater.decompress(inflater.unconsumed_tail, wanted)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); check the name of the file.") from error
    except zlib.error as error:
        raise UserError(
            f"{path} is not an SPZ file up to version 3 ({error}); choose one, or save it as version 3."
        ) from error
