"""Continues values into areas where nothing is known, smoothly and without a network (push-pull)."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

ISOTROPIC_LEVELS = 2
"""Halvings of both sides before only the width is halved."""


def fill_unseen(images: Float[Tensor, "n c h w"], seen: Bool[Tensor, "n h w"]) -> Float[Tensor, "n c h w"]:
    """Continue values into unseen areas, coarse to fine (push-pull: Gortler et al. 1996).

    Each level averages what is seen over fewer cells; going back up, unseen cells take the coarser level's value. After
    a few levels only the width is halved, and the height last: scenes are layered, so an unseen cell takes what is seen
    at its own height (sky beside sky, ground beside ground) where there is any.
    """
    weight = seen[:, None].float()
    levels = [(images * weight, weight)]
    kernels: list[tuple[int, int]] = []
    while max(levels[-1][0].shape[-2:]) > 1:
        colour, mass = levels[-1]
        kernels.append(next_kernel(colour.shape[-2], colour.shape[-1], len(kernels)))
        levels.append((average_cells(colour, kernels[-1]), average_cells(mass, kernels[-1])))
    colour, mass = levels[-1]
    filled = colour / mass.clamp(min=1e-6)
    for colour, mass in reversed(levels[:-1]):
        coarse = F.interpolate(filled, colour.shape[-2:], mode="bilinear", align_corners=False)
        own = colour / mass.clamp(min=1e-6)
        trust = (mass * 4).clamp(max=1.0)
        filled = own * trust + coarse * (1 - trust)
    return torch.where(weight > 0, images, filled)


def next_kernel(height: int, width: int, level: int) -> tuple[int, int]:
    """How many cells the next level averages: both sides at first, then the width, then the height."""
    if level < ISOTROPIC_LEVELS and min(height, width) > 1:
        return 2, 2
    return (1, 2) if width > 1 else (2, 1)


def average_cells(x: Float[Tensor, "n c h w"], kernel: tuple[int, int]) -> Float[Tensor, "n c h2 w2"]:
    """Average blocks of cells; an odd last row or column counts what is there."""
    return F.avg_pool2d(x, kernel, ceil_mode=True, count_include_pad=False)
