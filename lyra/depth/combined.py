"""Distances of one network, with the sky, the unit and the image tokens of another.

lyra-tiny's transformer was trained with the tokens of its own depth network, which also sees the sky and knows roughly
how long a metre is; a public Depth Anything 3 knows none of these, but distances better. Knows neither network.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lyra.depth.base import SKY_DEPTH, DepthEstimator, DepthPrediction, align_depth


@dataclass(frozen=True)
class CombinedDepth:
    """Two estimators as one."""

    distances: DepthEstimator
    """Gives depth up to its unit, and the confidence."""
    own: DepthEstimator
    """Gives the sky, the unit and the tokens."""
    own_fov: bool = False
    """Take the field of view of `own` too, because the other network predicts no camera."""

    @torch.no_grad()
    def predict(self, images: Float[Tensor, "b 3 h w"]) -> DepthPrediction:
        """Depth of images in [-1, 1], in the unit of `own`: each image is scaled by the median ratio off the sky."""
        better, own = self.distances.predict(images), self.own.predict(images)
        sky = better.sky | own.sky
        scaled = [align_depth(*maps) for maps in zip(better.depth, own.depth, ~sky, strict=True)]
        return DepthPrediction(
            depth=torch.where(sky, torch.full_like(own.depth, SKY_DEPTH), torch.stack(scaled).to(own.depth.dtype)),
            sky=sky,
            confidence=better.confidence,
            fov_x_deg=own.fov_x_deg if self.own_fov else better.fov_x_deg,
            features=own.features,
        )
