"""lyra-tiny's Gaussian head: what must change in the discs on a measured surface so that they show the scene.

The counterpart of Depth Anything 3's Gaussian head at tiny size: features of the depth network's trunk, attention
across neighbouring views, one Gaussian for each block of 2x2 pixels. It starts as the identity, so an untrained head
is the geometric lift. Knows no file, no walkthrough and no renderer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from lyra.depth.tiny import AttentionBlock

VIEW_CHANNELS = 33
"""What a view's blocks are described by; `lyra.reconstruction.tiny_gaussians` makes it."""
TOKEN_CHANNELS = 9
"""Where a cell of the trunk's features is: its ray's origin and direction, and its point, in its own view's axes."""
NEIGHBOURS = 2
"""Other views that a view is compared with."""
OFFSET, DEPTH, SCALE, ROTATION, OPACITY, COLOUR = 2, 1, 3, 3, 1, 3


@dataclass(frozen=True)
class HeadInput:
    """Views and what the depth network's trunk found in them; the views are in time's order."""

    views: Float[Tensor, "v c hg wg"]
    """On the grid of pixel blocks."""
    quarter: Float[Tensor, "v c4 h4 w4"]
    """The trunk's decoded features."""
    sixteenth: Float[Tensor, "v c16 h16 w16"]
    """The trunk's encoded features."""
    places: Float[Tensor, "v k h16 w16 9"]
    """Where the cells of a view itself and of its neighbours are, in the view's axes."""
    neighbours: Int[Tensor, "v k"]
    """Indices of each view itself and its neighbours; a view without one stands in for it."""


@dataclass(frozen=True)
class Changes:
    """What the head changes of each block's disc."""

    offset: Float[Tensor, "v hg wg 2"]
    """Along the image, in blocks."""
    log_depth: Float[Tensor, "v hg wg"]
    log_scale: Float[Tensor, "v hg wg 3"]
    rotation: Float[Tensor, "v hg wg 3"]
    """Rotation vectors in radians, in the disc's own axes."""
    opacity: Float[Tensor, "v hg wg"]
    """Added to the logit."""
    colour: Float[Tensor, "v hg wg 3"]
    """Added in [-1, 1] units."""


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions around an activation."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, channels)
        self.first, self.second = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """The residual update."""
        return x + self.second(F.silu(self.first(F.silu(self.norm(x)))))


class TinyGaussianHead(ModelMixin, ConfigMixin):
    """A U-shaped network on the grid of pixel blocks, with cross-view attention at the trunk's coarsest level.

    Args:
        channels: widths at 1/2, 1/4 and 1/8 of the image.
        blocks: residual blocks at each of these.
        trunk_channels: widths of the trunk's features at 1/4 and 1/16.
        token_channels: width of the attention across views.
    """

    @register_to_config
    def __init__(
        self,
        channels: tuple[int, int, int] = (32, 64, 96),
        blocks: tuple[int, int, int] = (1, 2, 2),
        trunk_channels: tuple[int, int] = (48, 160),
        token_channels: int = 96,
        attention_blocks: int = 2,
        heads: int = 4,
    ) -> None:
        super().__init__()
        full, half, quarter = channels
        self.stem = nn.Conv2d(VIEW_CHANNELS, full, 3, padding=1)
        self.level2 = nn.Sequential(*(ResidualBlock(full) for _ in range(blocks[0])))
        self.down4, self.down8 = nn.Conv2d(full, half, 2, stride=2), nn.Conv2d(half, quarter, 2, stride=2)
        self.from_trunk = nn.Conv2d(trunk_channels[0], half, 1)
        self.level4 = nn.Sequential(*(ResidualBlock(half) for _ in range(blocks[1])))
        self.to_tokens = nn.Linear(trunk_channels[1], token_channels)
        self.place = nn.Sequential(
            nn.Linear(TOKEN_CHANNELS, token_channels), nn.SiLU(), nn.Linear(token_channels, token_channels)
        )
        self.attention = nn.ModuleList(AttentionBlock(token_channels, heads) for _ in range(attention_blocks))
        self.from_tokens = nn.Conv2d(token_channels, quarter, 1)
        self.level8 = nn.Sequential(*(ResidualBlock(quarter) for _ in range(blocks[2])))
        self.up4, self.up2 = nn.Conv2d(quarter, half, 1), nn.Conv2d(half, full, 1)
        self.fuse4 = nn.Sequential(*(ResidualBlock(half) for _ in range(blocks[1])))
        self.fuse2 = nn.Sequential(*(ResidualBlock(full) for _ in range(blocks[0])))
        self.last = nn.Conv2d(full, OFFSET + DEPTH + SCALE + ROTATION + OPACITY + COLOUR, 3, padding=1)
        for parameter in self.last.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: HeadInput) -> Changes:
        """What to change of each block's disc."""
        full = self.level2(self.stem(x.views.contiguous(memory_format=torch.channels_last)))
        half = self.down4(pad_even(full))
        half = self.level4(half + F.interpolate(self.from_trunk(x.quarter), half.shape[-2:], mode="bilinear"))
        quarter = self.down8(pad_even(half))
        tokens = self.from_tokens(self.across_views(x))
        quarter = self.level8(quarter + F.interpolate(tokens, quarter.shape[-2:], mode="bilinear"))
        half = self.fuse4(half + enlarged(self.up4(quarter), half))
        full = self.fuse2(full + enlarged(self.up2(half), full))
        return bounded_changes(self.last(full))

    def across_views(self, x: HeadInput) -> Float[Tensor, "v c h16 w16"]:
        """Trunk features after attention over a view's own cells and those of its neighbours."""
        height, width = x.sixteenth.shape[-2:]
        tokens = self.to_tokens(x.sixteenth.flatten(2).transpose(1, 2))
        group = tokens[x.neighbours] + self.place(x.places.flatten(2, 3))
        group = group.flatten(1, 2)
        for block in self.attention:
            group = block(group)
        return group[:, : height * width].transpose(1, 2).unflatten(2, (height, width))


def pad_even(x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h2 w2"]:
    """Sides made even by repeating the last row and column."""
    return F.pad(x, (0, x.shape[-1] % 2, 0, x.shape[-2] % 2), mode="replicate")


def enlarged(x: Float[Tensor, "b c h w"], like: Float[Tensor, "b c2 h2 w2"]) -> Float[Tensor, "b c h2 w2"]:
    """Twice the size, cut to another map's."""
    x = F.interpolate(x, scale_factor=2.0, mode="bilinear")
    return x[..., : like.shape[-2], : like.shape[-1]]


def bounded_changes(raw: Float[Tensor, "v 13 hg wg"]) -> Changes:
    """Changes within what a disc on a roughly right surface can need."""
    raw = raw.movedim(1, -1)
    offset, depth, scale, rotation, opacity, colour = raw.split((OFFSET, DEPTH, SCALE, ROTATION, OPACITY, COLOUR), -1)
    return Changes(
        offset=0.5 * offset.tanh(),
        log_depth=0.3 * depth[..., 0].tanh(),
        log_scale=1.5 * (scale / 1.5).tanh(),
        rotation=0.8 * rotation.tanh(),
        opacity=8 * (opacity[..., 0] / 4).tanh(),
        colour=colour,
    )
