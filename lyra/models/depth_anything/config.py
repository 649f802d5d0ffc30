"""Which sizes does Depth Anything 3 come in? Frozen settings of every released layout.

Knows no tensor. The public weights of nested-giant-large, giant and large are CC BY-NC 4.0, those of base, small,
mono-large and metric-large are Apache-2.0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

PATCH = 14
"""Side of a patch in pixels; image sides are multiples of it."""
GAUSSIAN_CHANNELS = 38
"""Image offset 2, scale 3, quaternion 4, spherical harmonics 3 x 9 (degree 2), depth offset 1, opacity 1."""


@dataclass(frozen=True)
class BackboneConfig:
    """A DINOv2 vision transformer, with or without attention across views."""

    dim: int
    depth: int
    heads: int
    output_layers: tuple[int, int, int, int]
    """Blocks after which the heads take features; the last of them is the last block."""
    alternation_start: int | None
    """First block with rotary positions, query and key norms and camera tokens; from it on, every odd block attends
    over all views. None: each view is alone (mono and metric layouts)."""
    feed_forward: Literal["mlp", "swiglu"] = "mlp"
    table_side: int = 37
    """Side of the learned position table, in patches."""

    @property
    def output_dim(self) -> int:
        """Width of the features; any-view networks put the last local and the current tokens side by side."""
        return self.dim if self.alternation_start is None else 2 * self.dim


@dataclass(frozen=True)
class DepthAnythingConfig:
    """One network: an any-view one (depth, confidence, cameras) or a monocular one (depth, sky)."""

    backbone: BackboneConfig
    features: int
    """Channels of the dense heads' fusion pyramid."""
    channels: tuple[int, int, int, int]
    """Channels of the heads' four projections."""
    gaussian_head: bool = False

    @property
    def any_view(self) -> bool:
        """True where the network relates views and knows cameras."""
        return self.backbone.alternation_start is not None


@dataclass(frozen=True)
class NestedDepthAnythingConfig:
    """An any-view network, and a metric one that gives it its unit and its sky."""

    any_view: DepthAnythingConfig
    metric: DepthAnythingConfig


AnyDepthAnythingConfig = DepthAnythingConfig | NestedDepthAnythingConfig

SMALL = DepthAnythingConfig(BackboneConfig(384, 12, 6, (5, 7, 9, 11), 4), 64, (48, 96, 192, 384))
BASE = DepthAnythingConfig(BackboneConfig(768, 12, 12, (5, 7, 9, 11), 4), 128, (96, 192, 384, 768))
LARGE = DepthAnythingConfig(BackboneConfig(1024, 24, 16, (11, 15, 19, 23), 8), 256, (256, 512, 1024, 1024))
GIANT = DepthAnythingConfig(
    BackboneConfig(1536, 40, 24, (19, 27, 33, 39), 13, "swiglu"), 256, (256, 512, 1024, 1024), gaussian_head=True
)
MONO_LARGE = DepthAnythingConfig(BackboneConfig(1024, 24, 16, (4, 11, 17, 23), None), 256, (256, 512, 1024, 1024))
METRIC_LARGE = MONO_LARGE
"""The same layout; its depth times focal length / 300 is in metres."""
NESTED_GIANT_LARGE = NestedDepthAnythingConfig(GIANT, METRIC_LARGE)

CONFIGS: dict[str, AnyDepthAnythingConfig] = {
    "nested-giant-large": NESTED_GIANT_LARGE,
    "giant": GIANT,
    "large": LARGE,
    "base": BASE,
    "small": SMALL,
    "mono-large": MONO_LARGE,
    "metric-large": METRIC_LARGE,
}
"""Released layouts by name."""
