"""Rotary positions of packed tokens: a token's angles are the mean over the base tokens that it covers.

Positions are (slot, row, column) of the base 2x2 patch grid, the slot being the index in the packed sequence and not
real time (released code). Knows no attention.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from lyra.models.framepack import FramePackLayout, Segment

THETA = 10000.0


def axis_frequencies(head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Angular frequencies of time, height and width, in radians per base token (released code)."""
    spatial_dim = 2 * (head_dim // 6)

    def frequencies(dim: int) -> Tensor:
        return 1.0 / THETA ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim)

    return frequencies(head_dim - 2 * spatial_dim), frequencies(spatial_dim), frequencies(spatial_dim)


def mean_positions(first: int, count: int, kernel: int) -> Float[Tensor, "n"]:
    """Mean position of each group of `kernel` consecutive positions, the last one repeated to fill its group."""
    groups = -(-count // kernel)
    positions = torch.arange(groups * kernel, dtype=torch.float64).clamp(max=count - 1) + first
    return positions.reshape(groups, kernel).mean(1)


def segment_angles(segment: Segment, rows: int, columns: int, head_dim: int) -> Float[Tensor, "n half"]:
    """Angles of one segment's tokens in raster order, (time, height, width) blocks; angles are linear in position."""
    f_time, f_height, f_width = axis_frequencies(head_dim)
    time = torch.outer(mean_positions(segment.start, segment.count, segment.kernel[0]), f_time)
    height = torch.outer(mean_positions(0, rows, segment.kernel[1]), f_height)
    width = torch.outer(mean_positions(0, columns, segment.kernel[2]), f_width)
    t, h, w = len(time), len(height), len(width)
    parts = [
        time[:, None, None].expand(t, h, w, -1),
        height[None, :, None].expand(t, h, w, -1),
        width[None, None].expand(t, h, w, -1),
    ]
    return torch.cat(parts, dim=-1).flatten(0, 2).float()


def packed_angles(layout: FramePackLayout, rows: int, columns: int, head_dim: int) -> Float[Tensor, "n half"]:
    """Angles of all tokens, history segments first, targets last; rows and columns count base tokens."""
    segments = [*layout.history, layout.targets]
    return torch.cat([segment_angles(segment, rows, columns, head_dim) for segment in segments])


def apply_rotary(x: Float[Tensor, "b n heads d"], angles: Float[Tensor, "n half"]) -> Float[Tensor, "b n heads d"]:
    """Rotate interleaved pairs (2i, 2i + 1) in float32 and return the input's dtype."""
    pairs = x.float().unflatten(-1, (-1, 2))
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    a, b = pairs.unbind(-1)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2).to(x.dtype)
