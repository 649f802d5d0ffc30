"""The networks as a whole: an any-view one, a monocular one, and the nested pair of both.

Attribute names are the released ones, so that a released file fits key for key (`names.py` unwraps it). The public
weights of nested-giant-large, giant and large are CC BY-NC 4.0; those of base, small, mono-large and metric-large are
Apache-2.0. Knows no file and no resizing of images.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lyra.models.checkpoint import load_strictly
from lyra.models.depth_anything.backbone import Backbone
from lyra.models.depth_anything.camera import CameraDecoder, CameraEncoder, decode_cameras
from lyra.models.depth_anything.config import (
    PATCH,
    AnyDepthAnythingConfig,
    DepthAnythingConfig,
    NestedDepthAnythingConfig,
)
from lyra.models.depth_anything.heads import DualDepthHead, GaussianHead, SkyDepthHead
from lyra.models.depth_anything.metric import (
    FARTHEST_SKY,
    FEWEST_PIXELS,
    SKY_SCORE,
    metric_depth,
    metric_scale,
    sky_at_the_back,
)
from lyra.models.depth_anything.names import with_shared_norms


@dataclass(frozen=True)
class AnyViewOutput:
    """What an any-view network says of its views; maps have the processed size."""

    depth: Float[Tensor, "b s h w"]
    """z depth in a unit of the network's own, one for all views of a batch item."""
    confidence: Float[Tensor, "b s h w"]
    """At least 1."""
    w2c: Float[Tensor, "b s 4 4"]
    """Predicted cameras in the depth's unit, also where cameras were given."""
    intrinsics: Float[Tensor, "b s 3 3"]
    """Predicted K in pixels of the processed image."""
    raw_gaussians: Float[Tensor, "b s hg wg 38"] | None
    """Channels of `GaussianHead`, where they were asked for."""


@dataclass(frozen=True)
class MonocularOutput:
    """What a monocular network says of each view."""

    depth: Float[Tensor, "b s h w"]
    """z depth; of metric-large in metres once multiplied by the focal length / 300."""
    sky: Float[Tensor, "b s h w"]
    """Score of at least 0; sky from `SKY_SCORE` on."""


@dataclass(frozen=True)
class NestedOutput(AnyViewOutput):
    """As `AnyViewOutput`, with depth and cameras in metres and the sky at the back."""

    sky: Float[Tensor, "b s h w"]
    """Score of at least 0; sky from `SKY_SCORE` on."""
    own: AnyViewOutput
    """What the any-view network said in its own unit, which is what Gaussians are made from."""


class AnyViewDepthAnything(nn.Module):
    """Depth, cameras and raw Gaussians of views that see each other."""

    def __init__(self, config: DepthAnythingConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = Backbone(config.backbone)
        self.head = DualDepthHead(config)
        self.cam_enc = CameraEncoder(config.backbone.dim)
        self.cam_dec = CameraDecoder(config.backbone.output_dim)
        if config.gaussian_head:
            self.gs_head = GaussianHead(config)

    def forward(
        self,
        images: Float[Tensor, "b s 3 h w"],
        w2c: Float[Tensor, "b s 4 4"] | None = None,
        intrinsics: Float[Tensor, "b s 3 3"] | None = None,
        *,
        gaussian_reduction: int | None = None,
    ) -> AnyViewOutput:
        """Depth and more of ImageNet-normalised views.

        Args:
            images: sides are multiples of 14.
            w2c: given cameras as `camera.normalised_cameras` makes them, with `intrinsics`.
            intrinsics: K in pixels of these images.
            gaussian_reduction: also compute raw Gaussians, one per so many pixels in each direction.

        Raises:
            ValueError: a side is no multiple of 14, one of the two camera arguments is missing, or Gaussians are asked
                of a network without a Gaussian head.
        """
        height, width = checked_size(images)
        if gaussian_reduction is not None and not self.config.gaussian_head:
            raise ValueError("this network has no Gaussian head")
        # A caller's autocast must not reach the float32 parts; the backbone's dtype is that of its weights.
        with torch.autocast(images.device.type, enabled=False):
            tokens = None
            if w2c is not None and intrinsics is not None:
                tokens = self.cam_enc(w2c.float(), intrinsics.float(), height, width)
            elif w2c is not None or intrinsics is not None:
                raise ValueError("given cameras need both w2c and intrinsics")
            features = self.backbone(images, tokens)
            depth, confidence = self.head(features)
            predicted_w2c, predicted_intrinsics = decode_cameras(self.cam_dec(features.camera), height, width)
            raw = None if gaussian_reduction is None else self.gs_head(features, images, gaussian_reduction)
        return AnyViewOutput(depth, confidence, predicted_w2c, predicted_intrinsics, raw)


class MonocularDepthAnything(nn.Module):
    """Depth and sky of single views."""

    def __init__(self, config: DepthAnythingConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = Backbone(config.backbone)
        self.head = SkyDepthHead(config)

    def forward(self, images: Float[Tensor, "b s 3 h w"]) -> MonocularOutput:
        """Depth and sky of ImageNet-normalised views; where there is enough of both, the sky goes to the back.

        Raises:
            ValueError: a side is no multiple of 14.
        """
        checked_size(images)
        with torch.autocast(images.device.type, enabled=False):
            depth, sky = self.head(self.backbone(images))
        is_sky = sky >= SKY_SCORE
        if int(is_sky.sum()) > FEWEST_PIXELS:
            depth = sky_at_the_back(depth, is_sky)
        return MonocularOutput(depth, sky)


class NestedDepthAnything(nn.Module):
    """An any-view network, with a metric one beside it that gives it its unit and its sky."""

    def __init__(self, config: NestedDepthAnythingConfig) -> None:
        super().__init__()
        self.config = config
        self.da3 = AnyViewDepthAnything(config.any_view)
        self.da3_metric = MonocularDepthAnything(config.metric)

    def forward(
        self,
        images: Float[Tensor, "b s 3 h w"],
        w2c: Float[Tensor, "b s 4 4"] | None = None,
        intrinsics: Float[Tensor, "b s 3 3"] | None = None,
        *,
        gaussian_reduction: int | None = None,
    ) -> NestedOutput:
        """As `AnyViewDepthAnything.forward`, in metres.

        Gaussians of given cameras do not need the metric network; call `da3` alone for them.

        Raises:
            ValueError: as there.
        """
        own = self.da3(images, w2c, intrinsics, gaussian_reduction=gaussian_reduction)
        mono = self.da3_metric(images)
        sky = mono.sky >= SKY_SCORE
        scale = metric_scale(own.depth, own.confidence, metric_depth(mono.depth, own.intrinsics), sky)
        w2c_metres = own.w2c.clone()
        w2c_metres[..., :3, 3] *= scale
        return NestedOutput(
            depth=sky_at_the_back(own.depth * scale, sky, FARTHEST_SKY),
            confidence=torch.where(sky, torch.ones_like(own.confidence), own.confidence),
            w2c=w2c_metres,
            intrinsics=own.intrinsics,
            raw_gaussians=own.raw_gaussians,
            sky=mono.sky,
            own=own,
        )


AnyDepthAnything = AnyViewDepthAnything | MonocularDepthAnything | NestedDepthAnything


def checked_size(images: Float[Tensor, "b s 3 h w"]) -> tuple[int, int]:
    """Height and width of images that can be cut into patches.

    Raises:
        ValueError: a side is no multiple of 14.
    """
    height, width = images.shape[-2:]
    if height % PATCH or width % PATCH:
        raise ValueError(f"image sides must be multiples of {PATCH}, not {height} x {width}")
    return height, width


def build(config: AnyDepthAnythingConfig) -> AnyDepthAnything:
    """The network of a configuration, with torch's random initialisation; also under `torch.device("meta")`."""
    if isinstance(config, NestedDepthAnythingConfig):
        return NestedDepthAnything(config)
    return AnyViewDepthAnything(config) if config.any_view else MonocularDepthAnything(config)


def load_depth_anything(config: AnyDepthAnythingConfig, weights: Mapping[str, Tensor]) -> AnyDepthAnything:
    """The network with these weights, in float32 and ready to run.

    float32 tensors are used as they are, without a copy, so weights mapped from a file are read when they are needed.

    Args:
        config: of the layout that the weights have.
        weights: names without the file's `model.` prefix (see `names.unwrap_checkpoint`).

    Raises:
        ValueError: names are missing, unexpected or misshapen; the message lists them.
    """
    with torch.device("meta"):
        model = build(config)
    load_strictly(model, with_shared_norms(weights))
    return place(model, next(model.parameters()).device, torch.float32)


def place(model: AnyDepthAnything, device: torch.device, dtype: torch.dtype) -> AnyDepthAnything:
    """Put a model on a device, ready to run: matrix products of the backbone in `dtype`, all else float32 (released).

    The released code reaches the same by autocast around the backbone. The model itself is changed and returned.
    """
    model.to(device=device, dtype=torch.float32)
    for module in model.modules():
        if isinstance(module, Backbone):
            for layer in module.modules():
                if isinstance(layer, nn.Linear | nn.Conv2d):
                    layer.to(dtype)
    return model.eval().requires_grad_(False)
