"""Depth of new frames whose cameras are known: an estimate bent to agree with what memory shows.

Where memory shows the new view its depth is exact by construction and is kept; elsewhere the estimate is scaled, by a
factor that continues smoothly from the seen area, so that no step appears at its border. Knows no network.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lyra.depth.base import SKY_DEPTH, DepthEstimator
from lyra.geometry.fill import fill_unseen
from lyra.types import Cameras

FARTHEST = 200.0
"""Depth beyond which an estimate is treated as sky and not scaled, in scene units."""


SMALLEST = 1e-6
"""Floor of an estimate, so that its ratio to what is seen is finite."""
PREDICTED_AT_ONCE = 4


@dataclass(frozen=True)
class SeenDepth:
    """Any monocular estimator, anchored in seen depth."""

    estimator: DepthEstimator

    @torch.no_grad()
    def measure(
        self, images: Float[Tensor, "n 3 h w"], cameras: Cameras, seen_depth: Float[Tensor, "n h w"]
    ) -> Float[Tensor, "n h w"]:
        """z depth of each image; `seen_depth` is infinite where memory shows nothing."""
        parts = [self.estimator.predict(piece) for piece in images.split(PREDICTED_AT_ONCE)]
        predicted, sky = torch.cat([p.depth for p in parts]), torch.cat([p.sky for p in parts])
        return anchored(predicted, sky, seen_depth)


@dataclass(frozen=True)
class SeenViewsDepth:
    """A network that measures views together with their cameras, anchored in seen depth; another one finds the sky."""

    measured: Callable[[Tensor, Cameras, Tensor], Tensor]
    """`measure` of the network."""
    sky: DepthEstimator

    @torch.no_grad()
    def measure(
        self, images: Float[Tensor, "n 3 h w"], cameras: Cameras, seen_depth: Float[Tensor, "n h w"]
    ) -> Float[Tensor, "n h w"]:
        """z depth of each image; `seen_depth` is infinite where memory shows nothing."""
        sky = torch.cat([self.sky.predict(piece).sky for piece in images.split(PREDICTED_AT_ONCE)])
        return anchored(self.measured(images, cameras, seen_depth), sky, seen_depth)


def anchored(
    predicted: Float[Tensor, "n h w"], sky: Bool[Tensor, "n h w"], seen_depth: Float[Tensor, "n h w"]
) -> Float[Tensor, "n h w"]:
    """Seen depth where there is some; elsewhere the prediction, scaled so that no step appears at the border."""
    known = seen_depth.isfinite()
    usable = known & (seen_depth < FARTHEST) & ~sky
    ratio = torch.where(usable, seen_depth / predicted.clamp(min=SMALLEST), torch.ones_like(predicted)).log()
    smooth = fill_unseen(ratio[:, None], usable)[:, 0]
    # A frame without a usable pixel keeps the estimate's own scale.
    smooth = torch.where(usable.flatten(1).any(1)[:, None, None], smooth, torch.zeros_like(smooth))
    estimate = torch.where(sky, torch.full_like(predicted, SKY_DEPTH), predicted * smooth.exp())
    return torch.where(known, seen_depth, estimate)
