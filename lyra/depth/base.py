"""The protocol of depth estimators: an image in, depth, sky, confidence and focal length out.

Knows no network. `align_depth` puts a free-scale prediction into the units of depth that is already known.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Bool, Float
from torch import Tensor

SKY_DEPTH = 1000.0
"""Depth given to open sky, in scene units; far but finite, so that it can be warped."""


@dataclass(frozen=True)
class DepthPrediction:
    """What an estimator says of a batch of views; all maps have the images' size."""

    depth: Float[Tensor, "b h w"]
    """z depth in roughly metre-like units; `SKY_DEPTH` in the sky."""
    sky: Bool[Tensor, "b h w"]
    confidence: Float[Tensor, "b h w"]
    """In (0, 1]; the expected share of the true depth that the estimate is within."""
    fov_x_deg: Float[Tensor, "b"]
    """Horizontal field of view."""
    features: Float[Tensor, "b m f"]
    """Image tokens of the encoder, for networks that condition on them."""


class DepthEstimator(Protocol):
    """Any monocular depth network."""

    def predict(self, images: Float[Tensor, "b 3 h w"]) -> DepthPrediction:
        """Depth of images in [-1, 1]."""
        ...


def align_depth(
    predicted: Float[Tensor, "h w"], known: Float[Tensor, "h w"], where: Bool[Tensor, "h w"]
) -> Float[Tensor, "h w"]:
    """Scale a prediction to known depth by the median of their ratio over `where`.

    The released code scales by a least-squares fit of inverse depths; a median ignores the wrong minority of pixels.
    Returns the prediction unchanged where fewer than 11 pixels are known (released code's limit).
    """
    if int(where.sum()) < 11:
        return predicted
    return predicted * (known[where] / predicted[where].clamp(min=1e-6)).median()


def intrinsics_from_fov(fov_x_deg: float, height: int, width: int) -> Float[Tensor, "3 3"]:
    """Pinhole matrix with square pixels and a centred principal point (pixel centres at integers)."""
    focal = 0.5 * width / torch.tan(torch.deg2rad(torch.tensor(fov_x_deg / 2, dtype=torch.float64))).item()
    return torch.tensor([[focal, 0.0, (width - 1) / 2], [0.0, focal, (height - 1) / 2], [0.0, 0.0, 1.0]])
