"""The dense heads (DPT): patch tokens of four depths fused into maps at image size. All of it is float32, as released.

Three heads share one body: depth with confidence, depth with sky, and the raw channels of one Gaussian per grid cell.
Knows no backbone, and what the maps mean only as far as their activations.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from lyra.models.depth_anything.backbone import Features
from lyra.models.depth_anything.config import GAUSSIAN_CHANNELS, PATCH, DepthAnythingConfig

VIEWS_AT_ONCE = 8
"""Views whose maps are in memory together (released code); the result does not depend on it."""
OUTPUT_HIDDEN = 32
EMBEDDING_SCALE = 0.1
EMBEDDING_BASE = 100.0


def position_embedding(
    channels: int, height: int, width: int, aspect: float, device: torch.device
) -> Float[Tensor, "c h w"]:
    """Sines and cosines of image coordinates, first of x, then of y, times 0.1 (released code).

    Coordinates are of cell centres, normalised by the image's diagonal; `aspect` is the image's width over its height.
    """
    diagonal = (aspect**2 + 1) ** 0.5
    frequencies = EMBEDDING_BASE ** -(torch.arange(channels // 4, device=device) / (channels / 4))

    def waves(count: int, span: float) -> Float[Tensor, "c n"]:
        last = span * (count - 1) / count
        angles = frequencies[:, None] * torch.linspace(-last, last, count, device=device)
        return torch.cat([angles.sin(), angles.cos()])

    x = waves(width, aspect / diagonal)[:, None].expand(-1, height, -1)
    y = waves(height, 1 / diagonal)[:, :, None].expand(-1, -1, width)
    return EMBEDDING_SCALE * torch.cat([x, y])


def resize_corners(x: Float[Tensor, "b c h w"], size: Sequence[int]) -> Float[Tensor, "b c h2 w2"]:
    """Bilinear resize that maps corner centres to corner centres."""
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=True)


class ResidualConvUnit(nn.Module):
    """Two 3x3 convolutions, each behind a ReLU, added to the input."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(features, features, 3, padding=1)
        self.conv2 = nn.Conv2d(features, features, 3, padding=1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """The residual update."""
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))


class FeatureFusionBlock(nn.Module):
    """Adds a lateral map to the coarser one, refines the sum and enlarges it; the coarsest block has no lateral map."""

    def __init__(self, features: int, *, lateral: bool = True) -> None:
        super().__init__()
        if lateral:
            self.resConfUnit1 = ResidualConvUnit(features)
        self.resConfUnit2 = ResidualConvUnit(features)
        self.out_conv = nn.Conv2d(features, features, 1)

    def forward(
        self, top: Float[Tensor, "b c h w"], size: Sequence[int], lateral: Float[Tensor, "b c h w"] | None = None
    ) -> Float[Tensor, "b c h2 w2"]:
        """The fused map at `size`."""
        if lateral is not None:
            top = top + self.resConfUnit1(lateral)
        return self.out_conv(resize_corners(self.resConfUnit2(top), size))


class Scratch(nn.Module):
    """Fusion pyramid and output convolutions, under the released name `scratch`."""

    def __init__(self, features: int, channels: Sequence[int], outputs: int) -> None:
        super().__init__()
        self.layer1_rn, self.layer2_rn, self.layer3_rn, self.layer4_rn = (
            nn.Conv2d(c, features, 3, padding=1, bias=False) for c in channels
        )
        self.refinenet1, self.refinenet2, self.refinenet3 = (FeatureFusionBlock(features) for _ in range(3))
        self.refinenet4 = FeatureFusionBlock(features, lateral=False)
        self.output_conv1 = nn.Conv2d(features, features // 2, 3, padding=1)
        self.output_conv2 = output_convolutions(features, outputs)

    def forward(self, levels: Sequence[Float[Tensor, "b c h w"]]) -> Float[Tensor, "b c2 h2 w2"]:
        """Fuse maps from fine to coarse into one at twice the finest size, and halve its channels."""
        layers = (self.layer1_rn, self.layer2_rn, self.layer3_rn, self.layer4_rn)
        one, two, three, four = (layer(level) for layer, level in zip(layers, levels, strict=True))
        x = self.refinenet4(four, three.shape[-2:])
        x = self.refinenet3(x, two.shape[-2:], three)
        x = self.refinenet2(x, one.shape[-2:], two)
        x = self.refinenet1(x, [2 * side for side in one.shape[-2:]], one)
        return self.output_conv1(x)


def output_convolutions(features: int, outputs: int) -> nn.Sequential:
    """The last layers of a head."""
    return nn.Sequential(
        nn.Conv2d(features // 2, OUTPUT_HIDDEN, 3, padding=1), nn.ReLU(), nn.Conv2d(OUTPUT_HIDDEN, outputs, 1)
    )


class DensePredictionHead(nn.Module):
    """The body that all heads share."""

    scratch: Scratch

    def __init__(
        self, config: DepthAnythingConfig, scratch: Scratch, *, embed_positions: bool, norm: bool = False
    ) -> None:
        super().__init__()
        width, c = config.backbone.output_dim, config.channels
        self.embed_positions = embed_positions
        self.norm = nn.LayerNorm(width) if norm else nn.Identity()
        self.projects = nn.ModuleList(nn.Conv2d(width, channels, 1) for channels in c)
        self.resize_layers = nn.ModuleList(
            [
                nn.ConvTranspose2d(c[0], c[0], 4, stride=4),
                nn.ConvTranspose2d(c[1], c[1], 2, stride=2),
                nn.Identity(),
                nn.Conv2d(c[3], c[3], 3, stride=2, padding=1),
            ]
        )
        self.scratch = scratch

    def maps(
        self, levels: Sequence[Float[Tensor, "b n c"]], rows: int, columns: int, size: tuple[int, int]
    ) -> Float[Tensor, "b c2 h w"]:
        """The fused map of a few views, resized to `size`, without its position embedding."""
        resized = []
        for tokens, project, resize in zip(levels, self.projects, self.resize_layers, strict=True):
            level = project(self.norm(tokens.float()).transpose(1, 2).unflatten(2, (rows, columns)))
            resized.append(resize(self.with_positions(level, columns / rows)))
        return resize_corners(self.scratch(resized), size)

    def with_positions(self, x: Float[Tensor, "b c h w"], aspect: float) -> Float[Tensor, "b c h w"]:
        """Add the position embedding where the head has one."""
        if not self.embed_positions:
            return x
        return x + position_embedding(x.shape[1], x.shape[2], x.shape[3], aspect, x.device)


def in_parts(features: Features) -> list[list[Float[Tensor, "b n c"]]]:
    """The levels of a few views at a time, batch and views flattened."""
    flat = [level.flatten(0, 1) for level in features.levels]
    return [list(part) for part in zip(*(level.split(VIEWS_AT_ONCE) for level in flat), strict=True)]


def image_size(features: Features) -> tuple[int, int]:
    """Height and width in pixels of the image behind the features."""
    return features.rows * PATCH, features.columns * PATCH


class RayScratch(Scratch):
    """Also holds the ray pyramid of the released file, whose result the released code throws away.

    It is never computed here: rays are only needed where cameras are read from them and not from the camera decoder.
    """

    def __init__(self, features: int, channels: Sequence[int], outputs: int) -> None:
        super().__init__(features, channels, outputs)
        half = features // 2
        self.refinenet1_aux, self.refinenet2_aux, self.refinenet3_aux = (FeatureFusionBlock(features) for _ in range(3))
        self.refinenet4_aux = FeatureFusionBlock(features, lateral=False)
        widths = [features, half, features, half, features, half]
        self.output_conv1_aux = nn.ModuleList(
            nn.Sequential(*(nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(widths))) for _ in range(4)
        )
        # The released code has one norm in all four levels, so a file may hold it once or four times.
        norm = nn.LayerNorm(OUTPUT_HIDDEN)
        self.output_conv2_aux = nn.ModuleList(
            nn.ModuleDict(
                {"0": nn.Conv2d(half, OUTPUT_HIDDEN, 3, padding=1), "2": norm, "5": nn.Conv2d(OUTPUT_HIDDEN, 7, 1)}
            )
            for _ in range(4)
        )


class DualDepthHead(DensePredictionHead):
    """Depth and confidence of the any-view network (released name DualDPT)."""

    def __init__(self, config: DepthAnythingConfig) -> None:
        super().__init__(config, RayScratch(config.features, config.channels, 2), embed_positions=True, norm=True)

    def forward(self, features: Features) -> tuple[Float[Tensor, "b s h w"], Float[Tensor, "b s h w"]]:
        """Depth in the network's unit, and confidence of at least 1."""
        size, outputs = image_size(features), []
        for levels in in_parts(features):
            x = self.maps(levels, features.rows, features.columns, size)
            x = self.with_positions(x, features.columns / features.rows)
            outputs.append(self.scratch.output_conv2(x).exp())
        depth, excess = torch.cat(outputs).unflatten(0, features.camera.shape[:2]).unbind(2)
        return depth, excess + 1


class SkyScratch(Scratch):
    """Also holds the output convolutions of the sky."""

    def __init__(self, features: int, channels: Sequence[int], outputs: int) -> None:
        super().__init__(features, channels, outputs)
        self.sky_output_conv2 = output_convolutions(features, 1)


class SkyDepthHead(DensePredictionHead):
    """Depth and sky of the monocular networks (released name DPT)."""

    scratch: SkyScratch

    def __init__(self, config: DepthAnythingConfig) -> None:
        super().__init__(config, SkyScratch(config.features, config.channels, 1), embed_positions=False)

    def forward(self, features: Features) -> tuple[Float[Tensor, "b s h w"], Float[Tensor, "b s h w"]]:
        """Depth, and a sky score of at least 0; from 0.3 on a pixel counts as sky."""
        size, outputs = image_size(features), []
        for levels in in_parts(features):
            x = self.maps(levels, features.rows, features.columns, size)
            pair = [self.scratch.output_conv2(x).exp(), self.scratch.sky_output_conv2(x).relu()]
            outputs.append(torch.cat(pair, dim=1))
        depth, sky = torch.cat(outputs).unflatten(0, features.camera.shape[:2]).unbind(2)
        return depth, sky


class GaussianHead(DensePredictionHead):
    """Raw channels of one Gaussian per grid cell (released name GSDPT)."""

    def __init__(self, config: DepthAnythingConfig) -> None:
        super().__init__(config, Scratch(config.features, config.channels, GAUSSIAN_CHANNELS), embed_positions=True)
        half = config.features // 2
        self.images_merger = nn.Sequential(
            nn.Conv2d(3, half // 4, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(half // 4, half // 2, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(half // 2, half, 3, padding=1),
            nn.GELU(),
        )

    def forward(
        self, features: Features, images: Float[Tensor, "b s 3 h w"], reduction: int, *, pool_features: bool = True
    ) -> Float[Tensor, "b s hg wg 38"]:
        """Raw channels on a grid of 1/reduction of the image's sides; the last channel is the opacity's logit.

        Args:
            features: of the backbone.
            images: normalised, at processed size.
            reduction: 1 for a Gaussian per pixel, 2 for a quarter of them (Lyra's fork of the released code).
            pool_features: run the image branch at full size and average its features over each cell; otherwise the
                image is resized first.
        """
        height, width = image_size(features)
        size = (height // reduction, width // reduction)
        pictures, outputs = images.flatten(0, 1).float().split(VIEWS_AT_ONCE), []
        for levels, picture in zip(in_parts(features), pictures, strict=True):
            x = self.maps(levels, features.rows, features.columns, size)
            if pool_features:
                x = x + F.adaptive_avg_pool2d(self.images_merger(picture), size)
            else:
                x = x + self.images_merger(resize_corners(picture, size))
            x = self.with_positions(x, features.columns / features.rows)
            outputs.append(self.scratch.output_conv2(x).permute(0, 2, 3, 1))
        return torch.cat(outputs).unflatten(0, images.shape[:2])
