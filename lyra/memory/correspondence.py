"""Dense correspondences: canonical coordinates of remembered frames, warped into the new views (paper section 4.2).

Each remembered frame is a slot with an image of its own pixel coordinates; warped with the frame's depth they tell the
network where every target pixel was seen before. No colour passes through here. Knows no network.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from lyra.geometry.warp import forward_warp
from lyra.memory.spatial_cache import MemoryFrame

SLOTS = 5
"""Remembered frames shown to the network (released code)."""


def canonical_coordinates(
    slot: int, height: int, width: int, device: torch.device | None = None
) -> Float[Tensor, "3 h w"]:
    """x and y from -1 to 1 over the image, z from -1 to 1 over the slots (released code)."""
    x = torch.linspace(-1, 1, width, device=device).expand(height, width)
    y = torch.linspace(-1, 1, height, device=device)[:, None].expand(height, width)
    z = torch.linspace(-1, 1, SLOTS, device=device)[slot].expand(height, width)
    return torch.stack([x, y, z])


def fold_to_cells(
    maps: Float[Tensor, "*batch c h w"], stride: int, samples_per_cell: int
) -> Float[Tensor, "*batch d h2 w2"]:
    """Fold full-size maps to latent cells, channel index (c * s + row) * s + column for s samples a side.

    The released model keeps every pixel of its 8x8 cells; a smaller model samples each cell more coarsely.
    """
    step = stride // samples_per_cell
    return F.pixel_unshuffle(maps[..., step // 2 :: step, step // 2 :: step], samples_per_cell)


def target_correspondence(
    frames: Sequence[MemoryFrame],
    target_w2c: Float[Tensor, "n 4 4"],
    target_intrinsics: Float[Tensor, "n 3 3"],
    *,
    height: int,
    width: int,
    stride: int,
    samples_per_cell: int,
    frames_per_latent: int = 4,
    group: int = 16,
) -> Float[Tensor, "1 c t h2 w2"]:
    """Correspondence channels of the target latents.

    Args:
        frames: retrieved frames, worst first and best last; the best is written first and always has z = +1.
        target_w2c, target_intrinsics: the cameras of all new frames; each latent uses its last one.
        stride: pixels per latent cell. group: targets warped together.

    Missing slots hold coordinates -1 and depth +1. Warped depths are normalised together over slots, targets and
    pixels, holes (depth 0) included (released code).
    """
    last = slice(frames_per_latent - 1, None, frames_per_latent)
    blocks, depths = [], []
    for order, frame in enumerate(reversed(frames)):
        coordinates = canonical_coordinates(SLOTS - 1 - order, height, width, target_w2c.device)
        warped = forward_warp(
            coordinates, frame.depth, frame.w2c, frame.intrinsics, target_w2c, target_intrinsics, group=group
        )
        blocks.append(warped.values[last])
        depths.append(warped.depth)
    latents = -(-len(target_w2c) // frames_per_latent)
    if depths:
        stacked = torch.stack(depths)
        low, high = stacked.min(), stacked.max()
        normalised = 2 * (stacked - low) / (high - low).clamp(min=1e-6) - 1
        blocks = [torch.cat([b, normalised[i, last][:, None]], dim=1) for i, b in enumerate(blocks)]
    missing = torch.full((latents, 4, height, width), -1.0, device=target_w2c.device)
    missing[:, 3] = 1.0
    blocks += [missing] * (SLOTS - len(blocks))
    return torch.cat([fold_to_cells(b, stride, samples_per_cell) for b in blocks], dim=1).transpose(0, 1)[None]


def history_correspondence(
    slots: int,
    spatial_slots: Sequence[int],
    *,
    height: int,
    width: int,
    stride: int,
    samples_per_cell: int,
    device: torch.device | None = None,
) -> Float[Tensor, "1 c t h2 w2"]:
    """Correspondence channels of the history latents: spatial slots see their own coordinates, the others nothing.

    Block 0 of a spatial slot has depth -1, the other blocks repeat its coordinates with depth +1 (released code).
    """
    result = None
    for position, slot in enumerate(spatial_slots):
        coordinates = canonical_coordinates(position, height, width, device)
        depth = torch.ones(1, height, width, device=device)
        near, far = (torch.cat([coordinates, sign * depth]) for sign in (-1.0, 1.0))
        folded = [fold_to_cells(near, stride, samples_per_cell)]
        folded += [fold_to_cells(far, stride, samples_per_cell)] * (SLOTS - 1)
        block = torch.cat(folded)
        if result is None:
            result = torch.zeros(slots, *block.shape, device=device)
        result[slot] = block
    if result is None:
        raise ValueError("the layout has no spatial slots")
    return result.transpose(0, 1)[None]
