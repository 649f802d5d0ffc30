"""Where is the surface that depth maps with cameras agree on? A sparse truncated signed distance field with colour.

Blocks of 8^3 voxels exist only near measured surface (voxel hashing: Niessner et al. 2013) and average the distance to
it (Curless and Levoy 1996). Knows no triangle. Runs on the CPU; frames may lie on any device.

Far surfaces would need most voxels of a uniform grid, and depth is only known to a share of itself. So space is
uniform around the path and logarithmic outside: a point at distance r > R from the path's centre is put at
R (1 + ln(r / R)), which makes voxels grow with r as pixels' footprints and depth errors do. One grid in that space
replaces levels of grids, whose borders would have to be sewn, and a largest depth, beyond which the world would end.
Measured with 21 procedural views of 480x832 and voxels of 1.5 pixels: a street takes 48,000 blocks where a uniform grid
takes 218,000, a room with a window 96,000 and not 1,356,000; uniform grids that end at 4 R still take 1.6 to 1.8 times
as many as the whole.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numba
import numpy as np
import torch
from jaxtyping import Float, Float32, Int32, Int64, UInt8
from torch import Tensor

from lyra.errors import UserError
from lyra.reconstruction import tsdf_kernels as kernels
from lyra.reconstruction.tsdf_kernels import BLOCK

MAX_DEPTH = 200.0
"""Depth in scene units from which on a pixel shows the sky."""
MAX_BLOCKS = 16_384
"""Blocks of a field at most: 24 bytes for each of their 8.4 million voxels are 200 MB while fusing."""
TRUNCATION_VOXELS = 4.0
FOOTPRINT_VOXEL = 1.0
"""Side of the finest voxel, in pixels of a surface at the radius of the uniform space; finer ones repeat pixels."""
NEAR_QUANTILE = 0.25
"""The uniform space reaches this quantile of depth beyond the path."""
JUMP_SHARE = 0.05
"""Neighbouring pixels whose depths differ by more than this share are on one surface only if it is a steep plane."""
MIN_COSINE = 0.05
"""A surface turned further than this (87 degrees) from the viewing ray is not measured by its pixel."""

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DepthFrame:
    """A view with its depth, to be fused."""

    depth: Float[Tensor, "h w"]
    """z depth in scene units; NaN, infinite, not positive and 200 or more are left out."""
    colour: Float[Tensor, "3 h w"]
    """In [-1, 1]."""
    w2c: Float[Tensor, "4 4"]
    intrinsics: Float[Tensor, "3 3"]
    """In pixels, pixel centres at integers."""
    weight: Float[Tensor, "h w"] | None = None
    """Trust in each pixel; those of 0 are left out. All are trusted alike when there is none."""

    def __post_init__(self) -> None:
        shapes = {
            self.depth.shape,
            self.colour.shape[1:],
            self.depth.shape if self.weight is None else self.weight.shape,
        }
        if len(shapes) > 1:
            raise ValueError(
                f"depth, colour and weight of a frame must have one size, not {sorted(map(tuple, shapes))}"
            )


@dataclass(frozen=True)
class Contraction:
    """A bounded picture of space: true around a centre, logarithmic in the distance outside a radius."""

    centre: Float[np.ndarray, "3"]
    radius: float
    """In scene units."""

    def contract(self, points: Float[np.ndarray, "n 3"]) -> Float[np.ndarray, "n 3"]:
        """World points in the contracted space, whose origin is the centre."""
        offsets = np.ascontiguousarray(points, np.float64) - self.centre
        return kernels.scale_points(offsets, self.radius, False)

    def expand(self, points: Float[np.ndarray, "n 3"]) -> Float[np.ndarray, "n 3"]:
        """The world points of contracted ones."""
        return kernels.scale_points(np.ascontiguousarray(points, np.float64), self.radius, True) + self.centre


@dataclass(frozen=True)
class SparseTsdf:
    """A truncated signed distance field: voxel (i, j, k) of a block lies at (8 block + (i, j, k)) voxel, contracted."""

    blocks: Int32[np.ndarray, "b 3"]
    distance: Float32[np.ndarray, "b 8 8 8"]
    """To the surface in voxels, positive on the side of the cameras."""
    weight: Float32[np.ndarray, "b 8 8 8"]
    """0 where nothing was measured, and the distance means nothing."""
    colour: UInt8[np.ndarray, "b 8 8 8 3"]
    voxel: float
    """Side of a voxel in the uniform part of space, in scene units."""
    truncation: float
    """Largest distance kept, in voxels."""
    space: Contraction

    def __len__(self) -> int:
        return len(self.blocks)

    def neighbours(self) -> Int64[np.ndarray, "b 8"]:
        """Numbers of the blocks at (c & 1, c >> 1 & 1, c >> 2 & 1) from each, c = 0 to 7; -1 where there is none."""
        shifts = np.array([[c & 1, c >> 1 & 1, c >> 2 & 1] for c in range(8)])
        wanted = self.blocks[:, None].astype(np.int64) + shifts
        low = wanted.min((0, 1))
        place = np.cumprod([1, *(wanted.max((0, 1)) - low + 1)[:2]])
        keys, wanted_keys = (self.blocks - low) @ place, (wanted - low) @ place
        order = np.argsort(keys)
        found = order[np.searchsorted(keys, wanted_keys, sorter=order).clip(max=len(keys) - 1)]
        return np.where(keys[found] == wanted_keys, found, -1)


@dataclass(frozen=True)
class _Measured:
    """A frame as the kernels read it: about the centre of space, its pixels as `_measure_pixels` leaves them."""

    pixels: Float32[np.ndarray, "h w 3"]
    w2c: Float[np.ndarray, "5 4"]
    c2w: Float[np.ndarray, "5 4"]


def fuse(
    frames: Sequence[DepthFrame],
    *,
    voxel: float | None = None,
    truncation: float | None = None,
    max_depth: float = MAX_DEPTH,
    max_blocks: int = MAX_BLOCKS,
    check: Callable[[int, int], None] = lambda done, all_frames: None,
) -> SparseTsdf:
    """The distance field of frames; `check(done, all)` is called after each.

    A pixel counts with its weight times the cosine of its grazing angle over its squared depth, and only within the
    truncation on both sides of its surface: what a view looks through is not carved. Distance is measured across the
    surface and not along the ray, or a floor seen at a grazing angle would be thinner than a voxel. Pixels at depth
    jumps are left out. Frames are read several times but one at a time, so the sequence may load them when asked.

    Args:
        frames: views of one world, of any sizes.
        voxel: side of a voxel near the path in scene units; `choose_voxel` chooses when there is none.
        truncation: largest distance kept, in scene units near the path; 4 voxels when there is none.
        max_depth: depth in scene units from which on nothing is fused.
        max_blocks: bound of the memory.
        check: told of progress; may raise to stop.

    Raises:
        UserError: no pixel can be used, or `voxel` needs more blocks than allowed.
    """
    space = choose_space(frames, max_depth)
    chosen = voxel is None
    size = choose_voxel(frames, max_blocks, space=space, max_depth=max_depth) if voxel is None else voxel
    if not (math.isfinite(size) and size > 0):
        raise UserError(f"A voxel of {size} cannot be used; choose a positive size in scene units.")
    while True:
        reach = TRUNCATION_VOXELS if truncation is None else max(truncation / size, 1.5)
        blocks = _allocate(frames, space, size, reach, max_depth, max_blocks)
        if blocks is not None:
            break
        if not chosen or size > space.radius:
            raise UserError(
                f"A voxel of {size:.3g} needs more than {max_blocks} blocks of memory; choose a larger voxel."
            )
        size *= 1.1
    if len(blocks) == 0:
        raise UserError(_NOTHING_USABLE)
    return _integrate(frames, space, size, reach, max_depth, blocks, check)


def choose_space(frames: Sequence[DepthFrame], max_depth: float = MAX_DEPTH) -> Contraction:
    """The space of a path: uniform as far as the path reaches from its middle, plus the first quartile of depth.

    Raises:
        UserError: there are no frames, a camera is not finite, or no pixel has a depth.
    """
    if not frames:
        raise UserError("There are no depth maps to make a surface from; reconstruct a world with at least one frame.")
    for frame in frames:
        if not (torch.isfinite(frame.w2c).all() and torch.isfinite(frame.intrinsics).all()):
            raise UserError("A camera of the path is not finite; check the trajectory file.")
    centres = np.stack([np.linalg.inv(_double(frame.w2c))[:3, 3] for frame in frames])
    middle = centres.mean(0)
    samples = []
    for frame in frames:
        depth = _depth(frame)[::4, ::4]
        samples.append(depth[(depth > 0) & (depth < max_depth)])
    depths = np.concatenate(samples)
    if len(depths) == 0:
        raise UserError(_NOTHING_USABLE)
    path = float(np.linalg.norm(centres - middle, axis=1).max())
    return Contraction(middle, path + float(np.quantile(depths, NEAR_QUANTILE)))


def choose_voxel(
    frames: Sequence[DepthFrame],
    max_blocks: int = MAX_BLOCKS,
    *,
    space: Contraction | None = None,
    max_depth: float = MAX_DEPTH,
) -> float:
    """Side of a voxel near the path, in scene units: the finest that pixels support and the blocks allow.

    Blocks are counted on every fourth frame and grow with the inverse square of the voxel; as the other frames add
    some, only 80 % of them are planned for.

    Raises:
        UserError: no pixel can be used.
    """
    space = space or choose_space(frames, max_depth)
    focal = float(np.median([frame.intrinsics[0, 0].item() for frame in frames]))
    finest = FOOTPRINT_VOXEL * space.radius / focal
    sample = [frames[i] for i in sorted({*range(0, len(frames), 4), len(frames) - 1})]
    planned = max(int(0.8 * max_blocks), 1)
    voxel = finest
    for _ in range(12):
        # A table of four times the plan tells by how much it is exceeded, unless by even more.
        blocks = _allocate(sample, space, voxel, TRUNCATION_VOXELS, max_depth, 4 * planned)
        if blocks is not None and len(blocks) <= planned:
            break
        voxel *= 2.0 if blocks is None else 1.03 * math.sqrt(len(blocks) / planned)
    return voxel


_NOTHING_USABLE = (
    "The depth maps show no surface (all is sky, missing or at the edge of something else); choose a photo with "
    "something nearer than the sky."
)


def _double(matrix: Tensor) -> Float[np.ndarray, "..."]:
    return matrix.detach().cpu().double().numpy()


def _depth(frame: DepthFrame) -> Float32[np.ndarray, "h w"]:
    return np.ascontiguousarray(frame.depth.detach().cpu().float().numpy())


@numba.njit(cache=True, nogil=True, inline="always")
def _gradient(before: float, here: float, after: float, inner: bool) -> float:
    """Central difference of inverse depth where both neighbours are known (not 0), else the one-sided one.

    At the border of the image the pixel itself stands for the missing neighbour.
    """
    if before > 0.0 and after > 0.0:
        return 0.5 * (after - before) if inner else after - before
    if after > 0.0:
        return after - here
    if before > 0.0:
        return here - before
    return 0.0


@numba.njit(cache=True, nogil=True)
def _measure_pixels(inverse: np.ndarray, weight: np.ndarray, view: np.ndarray, radius: float) -> np.ndarray:
    """Inverse depth (0: nothing measured), contracted distance per unit of z, and weight of each pixel, (h, w, 3).

    On the plane n X = d the inverse depth is n ray / d, so its image gradient gives the normal; the distance of a point
    from the plane is the difference in z times n ray, divided by the local stretch of space along n. Calls no compiled
    function of another file: their changes would not reach this one's cache.
    """
    height, width = inverse.shape
    fx, fy, cx, cy = view[4]
    out = np.zeros((height, width, 3), np.float32)
    for v in range(height):
        for u in range(width):
            here = inverse[v, u]
            if here == 0.0:
                continue
            du = _gradient(inverse[v, max(u - 1, 0)], here, inverse[v, min(u + 1, width - 1)], 0 < u < width - 1)
            dv = _gradient(inverse[max(v - 1, 0), u], here, inverse[min(v + 1, height - 1), u], 0 < v < height - 1)
            mx, my, mz = fx * du, fy * dv, here - (u - cx) * du - (v - cy) * dv
            length = math.sqrt(mx * mx + my * my + mz * mz)
            ray_x, ray_y = (u - cx) / fx, (v - cy) / fy
            slope = here / length
            cosine = slope / math.sqrt(ray_x * ray_x + ray_y * ray_y + 1.0)
            if cosine < MIN_COSINE:
                continue
            z = 1.0 / here
            px, py, pz = ray_x * z - view[0, 3], ray_y * z - view[1, 3], z - view[2, 3]
            r = math.sqrt(px * px + py * py + pz * pz)
            stretch = 1.0
            if r > radius:
                along = (px * mx + py * my + pz * mz) / (r * length)
                radial = r / radius
                tangential = radial / (1.0 + math.log(radial))
                stretch = math.sqrt(tangential**2 + (radial**2 - tangential**2) * along * along)
            out[v, u, 0] = here
            out[v, u, 1] = slope / stretch
            out[v, u, 2] = weight[v, u] * cosine * here * here
    return out


def _measure(frame: DepthFrame, space: Contraction, max_depth: float) -> _Measured:
    """What each pixel of a frame says, about the centre of space."""
    depth = _depth(frame)
    weight = np.ones_like(depth) if frame.weight is None else frame.weight.detach().cpu().float().numpy()
    k, w2c = _double(frame.intrinsics), _double(frame.w2c).copy()
    w2c[:3, 3] += w2c[:3, :3] @ space.centre
    lens = np.array([[k[0, 0], k[1, 1], k[0, 2], k[1, 2]]])
    view = np.concatenate([w2c, lens])
    inverse = kernels.inverse_depth(depth, np.ascontiguousarray(weight), max_depth, JUMP_SHARE)
    pixels = _measure_pixels(inverse, np.ascontiguousarray(weight), view, space.radius)
    return _Measured(pixels, view, np.concatenate([np.linalg.inv(w2c), lens]))


def _allocate(
    frames: Sequence[DepthFrame], space: Contraction, voxel: float, reach: float, max_depth: float, max_blocks: int
) -> Int32[np.ndarray, "b 3"] | None:
    """Blocks near the surface of any frame, or None when they are too many."""
    table = np.full(1 << (4 * max_blocks).bit_length(), -1, np.int32)
    blocks, count = np.empty((max_blocks, 3), np.int32), 0
    for frame in frames:
        seen = _measure(frame, space, max_depth)
        # One voxel more than the truncation: triangles need both ends of each edge.
        near = (reach + 1) * voxel
        count = kernels.allocate_blocks(seen.pixels, seen.c2w, space.radius, voxel, near, table, blocks, count)
        if count < 0:
            return None
    return blocks[:count].copy()


def _integrate(
    frames: Sequence[DepthFrame],
    space: Contraction,
    voxel: float,
    reach: float,
    max_depth: float,
    blocks: Int32[np.ndarray, "b 3"],
    check: Callable[[int, int], None],
) -> SparseTsdf:
    """Average all frames into the blocks."""
    factors = kernels.expansion_factors(blocks, voxel, space.radius)
    field = np.zeros((*factors.shape, 5), np.float32)
    for index, frame in enumerate(frames):
        seen = _measure(frame, space, max_depth)
        pixels = (frame.colour.detach().float().nan_to_num().movedim(0, -1) + 1) * 127.5
        image = np.ascontiguousarray(pixels.clamp(0, 255).cpu().numpy())
        kernels.integrate_frame(blocks, factors, voxel, reach, seen.w2c, seen.pixels, image, field)
        check(index + 1, len(frames))
    field = field.reshape(len(blocks), BLOCK, BLOCK, BLOCK, 5)
    _logger.info("fused %d frames into %d blocks, voxel %.4g", len(frames), len(blocks), voxel)
    return SparseTsdf(
        blocks=blocks,
        distance=field[..., 0].copy(),
        weight=field[..., 1].copy(),
        colour=np.rint(field[..., 2:]).astype(np.uint8),
        voxel=voxel,
        truncation=reach,
        space=space,
    )
