"""Which remembered frames see what the new cameras will see: greedy coverage with one z-buffer (paper section 4.1).

`greedy_coverage` is what the loop uses; `nearest_ownership` is the released code's simpler score. Knows no network.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lyra.geometry.cameras import project
from lyra.memory.spatial_cache import POINT_STRIDE, MemoryFrame, scaled_intrinsics

DEPTH_TOLERANCE = 0.1
"""A point this far behind the nearest one still covers its pixel, in scene units (released code)."""


@dataclass(frozen=True)
class View:
    """A camera to retrieve for."""

    w2c: Float[Tensor, "4 4"]
    intrinsics: Float[Tensor, "3 3"]
    height: int
    width: int


@dataclass(frozen=True)
class Landing:
    """Where the points of one frame fall in the views' joint pixel list."""

    pixels: Int[Tensor, "p"]
    depth: Float[Tensor, "p"]


def greedy_coverage(frames: Sequence[MemoryFrame], views: Sequence[View], slots: int = 5) -> list[int]:
    """Frame ids by greedy set cover, worst first and best last (released code).

    The newest frame, unless it is the photo, is left out and what it covers counts as covered, because the appearance
    warp shows it already. Stops when no frame adds a pixel.
    """
    if not frames:
        return []
    coverage = covered_pixels(frames, views)
    newest = max(range(len(frames)), key=lambda index: frames[index].frame_id)
    open_pixels = torch.ones_like(coverage[0])
    available = torch.ones(len(frames), dtype=torch.bool)
    if frames[newest].frame_id > 0:
        open_pixels = ~coverage[newest]
        available[newest] = False
    chosen: list[int] = []
    while len(chosen) < slots:
        gains = torch.where(available, (coverage & open_pixels).sum(1).cpu(), -1)
        best = int(torch.argmax(gains))
        if gains[best] <= 0:
            break
        chosen.append(best)
        available[best] = False
        open_pixels = open_pixels & ~coverage[best]
    return [frames[index].frame_id for index in reversed(chosen)]


def nearest_ownership(frames: Sequence[MemoryFrame], views: Sequence[View], slots: int = 5) -> list[int]:
    """Frame ids by how many pixels each owns (its point is the nearest), worst first and best last (released code)."""
    owned = owned_pixels(frames, views)
    order = sorted(range(len(frames)), key=lambda index: (-int(owned[index]), index))
    return [frames[index].frame_id for index in reversed(order[:slots])]


def owned_pixels(frames: Sequence[MemoryFrame], views: Sequence[View]) -> Int[Tensor, "n"]:
    """Number of pixels of which each frame has the nearest point; ties within 1e-6 go to the earlier frame."""
    landings = [landing(frame, views) for frame in frames]
    nearest = nearest_depth(landings, pixel_count(views))
    owner = torch.full_like(nearest, len(frames), dtype=torch.long)
    for index, item in enumerate(landings):
        winning = item.pixels[item.depth <= nearest[item.pixels] + 1e-6]
        owner[winning] = torch.minimum(owner[winning], torch.tensor(index, device=owner.device))
    return torch.bincount(owner, minlength=len(frames) + 1)[: len(frames)]


def covered_pixels(frames: Sequence[MemoryFrame], views: Sequence[View]) -> Bool[Tensor, "n pixels"]:
    """Which pixels of the views each frame covers, all frames sharing one z-buffer."""
    landings = [landing(frame, views) for frame in frames]
    nearest = nearest_depth(landings, pixel_count(views))
    coverage = torch.zeros(len(frames), len(nearest), dtype=torch.bool, device=nearest.device)
    for index, item in enumerate(landings):
        coverage[index, item.pixels[item.depth <= nearest[item.pixels] + DEPTH_TOLERANCE]] = True
    return coverage


def landing(frame: MemoryFrame, views: Sequence[View]) -> Landing:
    """Project a frame's points into every view's coarse grid."""
    pixels, depths, first = [], [], 0
    for view in views:
        rows, columns = -(-view.height // POINT_STRIDE), -(-view.width // POINT_STRIDE)
        uv, z = project(frame.points.reshape(-1, 3), view.w2c, scaled_intrinsics(view.intrinsics))
        rounded = uv.round()
        inside = (z > 0) & (rounded >= 0).all(1) & (rounded[:, 0] < columns) & (rounded[:, 1] < rows)
        cell = rounded[inside].long()
        pixels.append(first + cell[:, 1] * columns + cell[:, 0])
        depths.append(z[inside])
        first += rows * columns
    return Landing(torch.cat(pixels), torch.cat(depths))


def nearest_depth(landings: Sequence[Landing], pixels: int) -> Float[Tensor, "pixels"]:
    """The z-buffer over all frames together; infinite where nothing lands."""
    nearest = torch.full((pixels,), torch.inf, device=landings[0].depth.device)
    for item in landings:
        nearest.scatter_reduce_(0, item.pixels, item.depth, "amin")
    return nearest


def pixel_count(views: Sequence[View]) -> int:
    """Pixels of all coarse grids together."""
    return sum(-(-view.height // POINT_STRIDE) * -(-view.width // POINT_STRIDE) for view in views)


def chunk_views(views: Sequence[View], count: int = 1) -> list[View]:
    """The views of a chunk that coverage is scored on: the last, or `count` spread over the chunk (released code)."""
    if count == 1:
        return [views[-1]]
    offsets = torch.linspace(0, len(views) - 1, count + 1)[1:]
    return [views[int(offset)] for offset in offsets]
