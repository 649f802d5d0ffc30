"""Depth Anything 3 as a depth backend: `predict` for the photo alone, `measure` for new frames with their cameras.

Both follow the released video loop. Licences of the public weights: nested-giant-large, giant and large are CC BY-NC
4.0; base, small, mono-large and metric-large are Apache-2.0. Knows no file; `load_depth_anything` makes the model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from lyra.depth.base import DepthPrediction, align_depth
from lyra.models.depth_anything.alignment import camera_centres, umeyama, umeyama_ransac
from lyra.models.depth_anything.camera import normalised_cameras
from lyra.models.depth_anything.config import AnyDepthAnythingConfig
from lyra.models.depth_anything.metric import SKY_SCORE
from lyra.models.depth_anything.model import (
    AnyDepthAnything,
    AnyViewOutput,
    MonocularDepthAnything,
    MonocularOutput,
    NestedOutput,
    place,
)
from lyra.models.depth_anything.preprocess import prepare_pixels, to_bytes
from lyra.types import Cameras

FARTHEST = 1e4
"""Depth given to pixels without a number, and the largest depth, in scene units (released code)."""
SMALLEST_CONFIDENCE = 1e-4
SMALLEST_UNIT = 1e-6
FALLBACK_FOCAL = 1.5
"""Focal length, in longest sides, of networks that predict no camera (released code)."""
RANSAC_VIEWS = 10
"""Views from which on outliers are looked for when cameras are aligned (released code)."""
STILL_VARIANCE = 1e-10
"""Summed variance of camera centres below which a camera does not move, in squared scene units (released code)."""
STILL_OFFSET = 1e-6
STILL_FREQUENCIES = (1e-5, 1.3e-5, 0.7e-5)
"""Cycles per view of the offsets along x, y and z that keep still cameras apart (released code)."""


@dataclass(frozen=True)
class DepthAnythingDepth:
    """A Depth Anything 3 network behind the protocols `DepthEstimator` and `WalkDepth`.

    Making one puts the model on the device: matrix products of the backbone in `dtype`, everything else in float32.
    """

    model: AnyDepthAnything
    config: AnyDepthAnythingConfig
    device: torch.device
    dtype: torch.dtype = torch.float32
    resolution: int | None = None
    """Pixels of the longest side at which the network works, however large an image is; None keeps the image's size,
    as the released loop does."""

    def __post_init__(self) -> None:
        place(self.model, self.device, self.dtype)

    @torch.no_grad()
    def predict(self, images: Float[Tensor, "b 3 h w"]) -> DepthPrediction:
        """Depth of images in [-1, 1], each of them alone and without a camera.

        Depth is in metres of the nested network, else in the network's own unit. The sky keeps the depth that the
        network gives it (the 99th percentile of the rest, at most 200 m), as in the released loop. `features` is empty,
        (b, 0, 1): the networks that condition on image tokens have an encoder of their own.
        """
        parts = [self.predict_one(image[None]) for image in images]
        return DepthPrediction(
            depth=torch.cat([part.depth for part in parts]),
            sky=torch.cat([part.sky for part in parts]),
            confidence=torch.cat([part.confidence for part in parts]),
            fov_x_deg=torch.cat([part.fov_x_deg for part in parts]),
            features=torch.cat([part.features for part in parts]),
        )

    def predict_one(self, image: Float[Tensor, "1 3 h w"]) -> DepthPrediction:
        """`predict` of one image."""
        height, width = image.shape[-2:]
        output = self.model(prepare_pixels(to_bytes(image.to(self.device)), self.resolution)[None])
        depth = depth_at_size(output.depth[0], height, width)
        return DepthPrediction(
            depth=depth.to(image.device),
            sky=sky_at_size(output, height, width).to(image.device),
            confidence=confidence_at_size(output, height, width).to(image.device),
            fov_x_deg=field_of_view(output, height, width).to(image.device),
            features=torch.zeros(1, 0, 1, device=image.device),
        )

    @torch.no_grad()
    def measure(
        self, images: Float[Tensor, "n 3 h w"], cameras: Cameras, seen_depth: Float[Tensor, "n h w"]
    ) -> Float[Tensor, "n h w"]:
        """z depth of frames with known cameras, in the units of these cameras (the released depth update).

        All frames go through the network together with their cameras; predicted depth is divided by the scale of the
        similarity from the given camera centres to the predicted ones. `seen_depth` plays no part, unless the cameras
        do not move: then the centres say nothing of the scale (the released code divides by noise), so depth is scaled
        to what is seen, or left in the network's unit where nothing is seen.

        Raises:
            ValueError: the network is a monocular one, which knows no cameras.
        """
        if isinstance(self.model, MonocularDepthAnything):
            raise ValueError("a monocular network cannot use cameras; wrap it in SeenDepth or use an any-view network")
        height, width = images.shape[-2:]
        pictures = prepare_pixels(to_bytes(images.to(self.device)), self.resolution)
        given = cameras.resized(*pictures.shape[-2:])
        w2c = given.w2c.to(self.device).float()
        still = is_still(w2c)
        told = normalised_cameras((keep_apart(w2c) if still else w2c)[None])
        output = self.model(pictures[None], told, given.intrinsics.to(self.device).float()[None])
        if still:
            depth = depth_at_size(output.depth[0], height, width).to(images.device)
            known = seen_depth.to(images.device).flatten(0, 1)
            return align_depth(depth.flatten(0, 1), known, known.isfinite()).unflatten(0, (len(images), height))
        scale = max(predicted_scale(w2c, output.w2c[0]), SMALLEST_UNIT)
        return depth_at_size(output.depth[0] / scale, height, width).to(images.device)


def depth_at_size(depth: Float[Tensor, "n h w"], height: int, width: int) -> Float[Tensor, "n h2 w2"]:
    """Depth resized bilinearly, with a number everywhere."""
    resized = F.interpolate(depth[:, None], size=(height, width), mode="bilinear", align_corners=False)[:, 0]
    return torch.nan_to_num(resized, nan=FARTHEST).clamp(0, FARTHEST)


def sky_at_size(output: AnyViewOutput | MonocularOutput, height: int, width: int) -> Bool[Tensor, "1 h w"]:
    """Where the metric or monocular network sees sky; nowhere for networks that do not tell."""
    if not isinstance(output, NestedOutput | MonocularOutput):
        return torch.zeros(1, height, width, dtype=torch.bool, device=output.depth.device)
    sky = (output.sky[0] >= SKY_SCORE).float()
    return F.interpolate(sky[:, None], size=(height, width), mode="nearest")[:, 0] > 0.5


def confidence_at_size(output: AnyViewOutput | MonocularOutput, height: int, width: int) -> Float[Tensor, "1 h w"]:
    """Confidence in (0, 1]: the network's is 1 + exp(x), which becomes sigmoid(x); 1 of networks that do not tell."""
    if isinstance(output, MonocularOutput):
        return torch.ones(1, height, width, device=output.depth.device)
    share = 1 - 1 / output.confidence[0]
    resized = F.interpolate(share[:, None], size=(height, width), mode="bilinear", align_corners=False)[:, 0]
    return resized.clamp(SMALLEST_CONFIDENCE, 1)


def field_of_view(output: AnyViewOutput | MonocularOutput, height: int, width: int) -> Float[Tensor, "1"]:
    """Horizontal field of view in degrees, of the predicted camera or the released fallback."""
    if isinstance(output, MonocularOutput):
        half_tangent = torch.full((1,), width / 2 / (FALLBACK_FOCAL * max(height, width)), device=output.depth.device)
    else:
        half_tangent = output.depth.shape[-1] / 2 / output.intrinsics[0, :, 0, 0]
    return torch.rad2deg(2 * torch.atan(half_tangent))


def is_still(w2c: Float[Tensor, "n 4 4"]) -> bool:
    """Whether the cameras share one centre, however they turn (released threshold)."""
    return bool(camera_centres(w2c).var(dim=0, correction=0).sum() < STILL_VARIANCE)


def keep_apart(w2c: Float[Tensor, "n 4 4"]) -> Float[Tensor, "n 4 4"]:
    """Cameras whose centres are moved by slow sinusoids of a millionth of a scene unit (released code)."""
    view = torch.arange(len(w2c), device=w2c.device, dtype=w2c.dtype)
    x, y, z = (2 * math.pi * frequency * view for frequency in STILL_FREQUENCIES)
    offset = STILL_OFFSET * torch.stack([x.sin(), y.cos(), z.sin()], dim=-1)
    moved = w2c.clone()
    moved[:, :3, 3] -= (w2c[:, :3, :3] @ offset[..., None])[..., 0]
    return moved


def predicted_scale(given: Float[Tensor, "n 4 4"], predicted: Float[Tensor, "n 4 4"]) -> float:
    """Length of the given world's unit in the predicted one, from camera centres."""
    align = umeyama_ransac if len(given) >= RANSAC_VIEWS else umeyama
    return align(camera_centres(given), camera_centres(predicted)).scale
