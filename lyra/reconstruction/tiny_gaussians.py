"""Lifts a walkthrough with lyra-tiny's Gaussian head: the geometric lift's discs, changed as a network says.

The counterpart of Depth Anything 3's Gaussian head for the default model. Frames are chosen and fused as without a
network; the head sees each frame beside what its two neighbours in time show of it. Knows no file and no training.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from lyra.depth.tiny import TinyDepthModel
from lyra.geometry.cameras import pixel_grid
from lyra.geometry.resample import draw_surface
from lyra.geometry.rotations import axis_angle_to_quaternion, matrix_to_quaternion, multiply_quaternions
from lyra.models.gaussian_head import Changes, HeadInput, TinyGaussianHead
from lyra.reconstruction.base import Check, Reconstruction, Walkthrough
from lyra.reconstruction.gaussians import (
    BLOCK,
    LIFT_INTERVAL,
    OPACITY,
    SH_C0,
    FusedFrame,
    PixelBlocks,
    chosen_frames,
    frames_to_lift,
    fused_frames,
    join_scenes,
    pixel_blocks,
)
from lyra.types import GaussianScene

VIEWS_AT_ONCE = 8
"""Frames that the head sees in one pass, so that memory does not grow with the length of the video."""


@dataclass(frozen=True)
class TinyGaussianReconstructor:
    """lyra-tiny's head behind the protocol `Reconstructor`; it needs cameras and measured depth."""

    depth: TinyDepthModel
    head: TinyGaussianHead
    interval: int = LIFT_INTERVAL

    @torch.no_grad()
    def reconstruct(self, walkthrough: Walkthrough, check: Check) -> Reconstruction:
        """Lift the photo, every n-th measured frame and the last one; `check(done, all)` is called after each frame.

        Raises:
            UserError: the walkthrough has no cameras, or no depth of its photo.
        """
        chosen = chosen_frames(walkthrough, self.interval)
        frames, steps = frames_to_lift(walkthrough, chosen), 2 * len(chosen)
        fused = []
        for frame in fused_frames(frames):
            fused.append(frame)
            check(len(fused), steps)
        fused = in_time(fused)
        scale = median_depth(fused)
        parts = []
        for first in range(0, len(fused), VIEWS_AT_ONCE):
            views = range(first, min(first + VIEWS_AT_ONCE, len(fused)))
            seen = fused[max(first - 1, 0) : views.stop + 1]
            blocks = [pixel_blocks(frame) for frame in seen]
            changes = self.head(head_input(seen, blocks, self.depth, scale))
            offset = views.start - max(first - 1, 0)
            parts += [changed_gaussians(seen[i], blocks[i], changes, i) for i in range(offset, offset + len(views))]
            check(len(fused) + views.stop, steps)
        assert walkthrough.cameras is not None
        scene = join_scenes([parts[0], *reversed(parts[1:])])
        return Reconstruction(scene, walkthrough.cameras.to(torch.device("cpu"))[chosen], tuple(chosen))


def in_time(frames: Sequence[FusedFrame]) -> list[FusedFrame]:
    """Frames in time's order from that of trust, which is the first and then from the last back (`lifted_frames`)."""
    return [frames[0], *reversed(frames[1:])]


def median_depth(frames: Sequence[FusedFrame]) -> float:
    """Median of what is not sky, in scene units; the unit in which the head sees distances."""
    depth = torch.cat([frame.depth.flatten()[::97] for frame in frames])
    sky = depth.amax()
    ground = depth[depth < 0.999 * sky]
    return float(ground.median()) if len(ground) else float(sky)


def neighbour_ids(count: int) -> Int[Tensor, "v 3"]:
    """Each view itself, the one before and the one after; at the ends a view stands in for what is not there."""
    own = torch.arange(count)
    return torch.stack([own, (own - 1).clamp(min=0), (own + 1).clamp(max=count - 1)], dim=1)


def head_input(
    frames: Sequence[FusedFrame], blocks: Sequence[PixelBlocks], depth: TinyDepthModel, scale: float
) -> HeadInput:
    """What the head sees of frames in time's order; `scale` is the scene's median depth."""
    neighbours = neighbour_ids(len(frames))
    with torch.no_grad():
        quarter, sixteenth = depth.trunk(depth.resized(torch.stack([frame.image for frame in frames])))
        views = [view_channels(i, frames, blocks, neighbours[i].tolist(), scale) for i in range(len(frames))]
        grid = (sixteenth.shape[-2], sixteenth.shape[-1])
        places = torch.stack(
            [
                torch.stack([cell_places(frames[i], frames[j], blocks[j], grid, scale) for j in neighbours[i].tolist()])
                for i in range(len(frames))
            ]
        )
    return HeadInput(torch.stack(views), quarter, sixteenth, places, neighbours)


def view_channels(
    index: int, frames: Sequence[FusedFrame], blocks: Sequence[PixelBlocks], neighbours: Sequence[int], scale: float
) -> Float[Tensor, "c hg wg"]:
    """A frame's blocks: pixels, depth, its detail, orientation, what is fresh, sky, and what the neighbours show."""
    frame, own = frames[index], blocks[index]
    height, width = (size * BLOCK for size in own.depth.shape)
    pixels = F.pixel_unshuffle(frame.image[:, :height, :width], BLOCK)
    detail = F.pixel_unshuffle((frame.depth[None, :height, :width].clamp(min=1e-6)).log(), BLOCK)
    normal = own.rotation[..., 2] @ frame.w2c[:3, :3].T
    rays = F.normalize(pixel_grid(*own.depth.shape) @ torch.linalg.inv(own.intrinsics).T, dim=-1)
    sky = own.depth >= 0.999 * frame.depth.amax()
    maps = [
        ((own.depth / scale).log().clamp(-3, 3))[None],
        (5 * (detail - own.depth.log())).clamp(-2, 2),
        normal.movedim(-1, 0),
        (normal * rays).sum(-1)[None],
        own.keep[None].float(),
        sky.float()[None],
    ]
    others = [seen_of_neighbour(frame, own, frames[j], blocks[j], j != index) for j in neighbours[1:]]
    return torch.cat([pixels, *maps, *others])


def seen_of_neighbour(
    frame: FusedFrame, own: PixelBlocks, other: FusedFrame, blocks: PixelBlocks, present: bool
) -> Float[Tensor, "5 hg wg"]:
    """A neighbour's colours minus a frame's own, the logarithm of its depth over the own, and where it shows."""
    height, width = own.depth.shape
    if not present:
        return torch.zeros(5, height, width)
    view = draw_surface(other.surface, frame.w2c, own.intrinsics, height, width)
    seen = view.depth.isfinite()
    rows, columns = blocks.depth.shape
    size = torch.tensor([columns, rows])
    # From pixels to the grid of blocks, and to grid_sample's -1..1 between the outer edges.
    place = (torch.where(seen[..., None], view.coordinates, 0.0) + 0.5) / BLOCK / size * 2 - 1
    colours = F.grid_sample(
        blocks.colours.movedim(-1, 0)[None], place[None], mode="bilinear", padding_mode="border", align_corners=False
    )[0]
    difference = torch.where(seen, colours - own.colours.movedim(-1, 0), 0.0)
    ratio = torch.where(seen, (view.depth / own.depth).log().clamp(-1, 1), 0.0)
    return torch.cat([difference, 4 * ratio[None], seen[None].float()])


def cell_places(
    frame: FusedFrame, other: FusedFrame, blocks: PixelBlocks, grid: tuple[int, int], scale: float
) -> Float[Tensor, "h16 w16 9"]:
    """Where the cells of another view are, in a frame's axes and units of the median depth."""
    height, width = grid
    rows, columns = blocks.depth.shape
    shrink = torch.tensor([width / columns, height / rows, 1.0])
    intrinsics = blocks.intrinsics * shrink[:, None]
    intrinsics[:2, 2] += (shrink[:2] - 1) / 2
    depth = 1 / F.adaptive_avg_pool2d(1 / blocks.depth[None], grid)[0]
    rays = pixel_grid(height, width) @ torch.linalg.inv(intrinsics).T
    between = frame.w2c @ torch.linalg.inv(other.w2c)
    rays = rays @ between[:3, :3].T
    origin = (between[:3, 3] / scale).expand_as(rays)
    points = origin + rays * (depth / scale)[..., None]
    return torch.cat([origin.asinh(), F.normalize(rays, dim=-1), points.asinh()], dim=-1)


def changed_gaussians(frame: FusedFrame, blocks: PixelBlocks, changes: Changes, index: int) -> GaussianScene:
    """The Gaussians of a frame's blocks that are kept, with view `index` of the head's changes."""
    keep: Bool[Tensor, "hg wg"] = blocks.keep
    log_depth = changes.log_depth[index][keep]
    pixels = pixel_grid(*blocks.depth.shape)[keep]
    pixels = torch.cat([pixels[:, :2] + changes.offset[index][keep], pixels[:, 2:]], dim=-1)
    rays = pixels @ torch.linalg.inv(blocks.intrinsics).T
    c2w = torch.linalg.inv(frame.w2c)
    points = rays * (blocks.depth[keep] * log_depth.exp())[:, None]
    turn = axis_angle_to_quaternion(changes.rotation[index][keep])
    colours = blocks.colours[keep] + changes.colour[index][keep]
    return GaussianScene(
        means=points @ c2w[:3, :3].T + c2w[:3, 3],
        quats=multiply_quaternions(matrix_to_quaternion(blocks.rotation[keep]), turn),
        scales=blocks.scales[keep] * (changes.log_scale[index][keep] + log_depth[:, None]).exp(),
        opacities=torch.sigmoid(math.log(OPACITY / (1 - OPACITY)) + changes.opacity[index][keep]),
        sh=(colours * (0.5 / SH_C0))[:, None],
    )
