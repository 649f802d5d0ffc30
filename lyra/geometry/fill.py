"""Continues values into areas where nothing is known, smoothly and without a network (push-pull)."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F


def fill_unseen(images: Float[Tensor, "n c h w"], seen: Bool[Tensor, "n h w"]) -> Float[Tensor, "n c h w"]:
    """Continue colours into unseen areas, coarse to fine (push-pull: Gortler et al. 1996).

    Each level halves the image, averaging what is seen; going back up, unseen pixels take the coarser level's colour.
    """
    weight = seen[:, None].float()
    levels = [(images * weight, weight)]
    while max(levels[-1][0].shape[-2:]) > 1:
        colour, mass = levels[-1]
        levels.append((average_halves(colour), average_halves(mass)))
    colour, mass = levels[-1]
    filled = colour / mass.clamp(min=1e-6)
    for colour, mass in reversed(levels[:-1]):
        coarse = F.interpolate(filled, colour.shape[-2:], mode="bilinear", align_corners=False)
        own = colour / mass.clamp(min=1e-6)
        trust = (mass * 4).clamp(max=1.0)
        filled = own * trust + coarse * (1 - trust)
    return torch.where(weight > 0, images, filled)


def average_halves(x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h2 w2"]:
    """Average 2x2 blocks; an odd last row or column counts what is there."""
    return F.avg_pool2d(x, 2, ceil_mode=True, count_include_pad=False)
