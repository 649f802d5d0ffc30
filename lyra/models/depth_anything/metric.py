"""What the metric network says of an any-view prediction: its unit in metres, and where the sky is.

Works on maps only; knows no network. Percentiles are taken over all pixels, where the released code draws 100,000 of
them at random.
"""

from __future__ import annotations

import logging
import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

SKY_SCORE = 0.3
"""Sky score from which on a pixel is sky (released code)."""
METRIC_FOCAL = 300.0
"""Focal length in pixels at which the metric network's depth is in metres (released code)."""
FARTHEST_SKY = 200.0
"""Largest depth given to the sky, in metres (released code)."""
FEWEST_PIXELS = 10
"""What is not sky must be more pixels than this to say anything about the views (released code)."""

logger = logging.getLogger(__name__)


def quantile(values: Float[Tensor, "n"], share: float) -> Float[Tensor, ""]:
    """Linearly interpolated quantile of any number of values (torch.quantile takes at most 16 million)."""
    position = share * (values.numel() - 1)
    low, high = math.floor(position), math.ceil(position)
    below, above = values.kthvalue(low + 1).values, values.kthvalue(high + 1).values
    return torch.lerp(below, above, position - low)


def metric_depth(depth: Float[Tensor, "b s h w"], intrinsics: Float[Tensor, "b s 3 3"]) -> Float[Tensor, "b s h w"]:
    """The metric network's raw depth in metres: times the mean focal length / 300."""
    focal = (intrinsics[..., 0, 0] + intrinsics[..., 1, 1]) / 2
    return depth * (focal / METRIC_FOCAL)[..., None, None]


def metric_scale(
    depth: Float[Tensor, "b s h w"],
    confidence: Float[Tensor, "b s h w"],
    metres: Float[Tensor, "b s h w"],
    sky: Bool[Tensor, "b s h w"],
) -> Float[Tensor, ""]:
    """Factor from the any-view network's unit to metres, by least squares over confident pixels that are not sky.

    One factor for the whole batch, as released. Where nothing can be compared the factor is 1, and the log says so;
    the released code stops there.
    """
    usable = ~sky & (metres > 1e-2) & (depth > 1e-3)
    if int((~sky).sum()) > FEWEST_PIXELS:
        usable &= confidence >= quantile(confidence[~sky], 0.5)
        own, true = depth[usable], metres[usable]
        if len(own):
            return (true @ own) / (own @ own).clamp(min=1e-12)
    logger.warning("The views show little but sky, so their depth keeps the network's own unit.")
    return torch.ones((), device=depth.device)


def sky_at_the_back(
    depth: Float[Tensor, "b s h w"], sky: Bool[Tensor, "b s h w"], farthest: float = math.inf
) -> Float[Tensor, "b s h w"]:
    """Depth with the sky at the 99th percentile of all the rest, at most `farthest` (released code)."""
    if int((~sky).sum()) <= FEWEST_PIXELS:
        return depth
    return torch.where(sky, quantile(depth[~sky], 0.99).clamp(max=farthest), depth)
