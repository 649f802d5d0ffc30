"""lyra-tiny's monocular depth network: a small convolutional encoder with attention and a U-shaped decoder.

Predicts log depth up to scale, sky, confidence and horizontal field of view from one image of any size. It was trained
by this project on procedural worlds only. Knows no camera path and no memory.
"""

from __future__ import annotations

import math

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from lyra.depth.base import SKY_DEPTH, DepthPrediction


class ConvNeXtBlock(nn.Module):
    """Depthwise 7x7, layer norm over channels, two pointwise layers, residual (ConvNeXt)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.spatial = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.GroupNorm(1, channels)
        self.expand = nn.Conv2d(channels, channels * 3, 1)
        self.reduce = nn.Conv2d(channels * 3, channels, 1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """The residual update."""
        return x + self.reduce(F.gelu(self.expand(self.norm(self.spatial(x)))))


class AttentionBlock(nn.Module):
    """Pre-norm self-attention over all cells and a feed-forward layer."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.to_qkv, self.to_out = nn.Linear(channels, channels * 3), nn.Linear(channels, channels)
        self.ffn = nn.Sequential(nn.Linear(channels, channels * 3), nn.GELU(), nn.Linear(channels * 3, channels))

    def forward(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        """The residual updates."""
        q, k, v = self.to_qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.ffn(self.norm2(x))


class TinyDepthModel(ModelMixin, ConfigMixin):
    """Log depth, sky, confidence and field of view of one image.

    Args:
        channels: widths at 1/4, 1/8 and 1/16 of the image.
        blocks: ConvNeXt blocks at each of these.
        attention_blocks: attention blocks at 1/16.
        input_width: width in pixels to which `predict` resizes its input.
    """

    @register_to_config
    def __init__(
        self,
        channels: tuple[int, int, int] = (48, 96, 160),
        blocks: tuple[int, int, int] = (2, 2, 2),
        attention_blocks: int = 5,
        heads: int = 5,
        input_width: int = 224,
    ) -> None:
        super().__init__()
        c4, c8, c16 = channels
        self.stem = nn.Conv2d(3, c4, 4, stride=4)
        self.stage4 = nn.Sequential(*(ConvNeXtBlock(c4) for _ in range(blocks[0])))
        self.down8, self.down16 = nn.Conv2d(c4, c8, 2, stride=2), nn.Conv2d(c8, c16, 2, stride=2)
        self.stage8 = nn.Sequential(*(ConvNeXtBlock(c8) for _ in range(blocks[1])))
        self.stage16 = nn.Sequential(*(ConvNeXtBlock(c16) for _ in range(blocks[2])))
        self.position = nn.Linear(8, c16)
        self.attention = nn.ModuleList(AttentionBlock(c16, heads) for _ in range(attention_blocks))
        self.up8, self.up4 = nn.Conv2d(c16, c8, 1), nn.Conv2d(c8, c4, 1)
        self.fuse8 = nn.Sequential(ConvNeXtBlock(c8), ConvNeXtBlock(c8))
        self.fuse4 = nn.Sequential(ConvNeXtBlock(c4), ConvNeXtBlock(c4))
        self.head = nn.Sequential(nn.Conv2d(c4, 64, 3, padding=1), nn.GELU(), nn.Conv2d(64, 12, 1), nn.PixelShuffle(2))
        self.fov_head = nn.Sequential(nn.LayerNorm(c16), nn.Linear(c16, 64), nn.GELU(), nn.Linear(64, 1))

    def encode(self, images: Float[Tensor, "b 3 h w"]) -> tuple[Tensor, Tensor, Tensor]:
        """Features at 1/4, 1/8 and 1/16; height and width must divide by 16."""
        f4 = self.stage4(self.stem(images))
        f8 = self.stage8(self.down8(f4))
        f16 = self.stage16(self.down16(f8))
        h, w = f16.shape[-2:]
        tokens = f16.flatten(2).transpose(1, 2) + self.position(grid_encoding(h, w, f16.device))
        for block in self.attention:
            tokens = block(tokens)
        return f4, f8, tokens.transpose(1, 2).unflatten(2, (h, w))

    def trunk(self, images: Float[Tensor, "b 3 h w"]) -> tuple[Float[Tensor, "b c4 h4 w4"], Float[Tensor, "b c h w"]]:
        """What all heads share: decoded features at 1/4 and encoded ones at 1/16."""
        f4, f8, f16 = self.encode(images)
        x = self.fuse8(F.interpolate(self.up8(f16), scale_factor=2.0, mode="bilinear") + f8)
        return self.fuse4(F.interpolate(self.up4(x), scale_factor=2.0, mode="bilinear") + f4), f16

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Log depth, sky logit, log error (each (b, h/2, w/2)), log tan of half the horizontal fov, features."""
        x, f16 = self.trunk(images)
        log_depth, sky, log_error = self.head(x).unbind(1)
        features = f16.flatten(2).transpose(1, 2)
        return log_depth + 1.5, sky, log_error, self.fov_head(features.mean(1))[:, 0] - 0.45, features

    def resized(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h2 w2"]:
        """Images at the size that the network was trained for, sides divisible by 16."""
        height, width = images.shape[-2:]
        scale = self.config.input_width / max(height, width)
        size = (max(32, round(height * scale / 16) * 16), max(32, round(width * scale / 16) * 16))
        return F.interpolate(images.float(), size=size, mode="bilinear", antialias=True).to(self.dtype)

    @torch.no_grad()
    def predict(self, images: Float[Tensor, "b 3 h w"]) -> DepthPrediction:
        """Depth of images in [-1, 1] at their own size, averaged over the image and its mirror image."""
        height, width = images.shape[-2:]
        small = self.resized(images)
        log_depth, sky, log_error, log_tan, features = self(small)
        mirrored = self(small.flip(-1))
        log_depth = (log_depth + mirrored[0].flip(-1)) / 2
        sky = (sky + mirrored[1].flip(-1)) / 2
        log_error = (log_error + mirrored[2].flip(-1)) / 2
        log_tan = (log_tan + mirrored[3]) / 2
        maps = torch.stack([log_depth, sky, log_error], 1).float()
        log_depth, sky, log_error = F.interpolate(maps, size=(height, width), mode="bilinear").unbind(1)
        is_sky = sky > 0
        depth = torch.where(is_sky, torch.full_like(log_depth, SKY_DEPTH), log_depth.clamp(-3, 5.3).exp())
        fov_x_deg = torch.rad2deg(2 * torch.atan(log_tan.float().exp())).clamp(20, 120)
        return DepthPrediction(depth, is_sky, torch.exp(-log_error.exp()), fov_x_deg, features)


def grid_encoding(height: int, width: int, device: torch.device) -> Float[Tensor, "n 8"]:
    """Smooth positions of grid cells, relative to the image, so that the size of the image does not matter."""
    y = (torch.arange(height, device=device) + 0.5) / height * 2 - 1
    x = (torch.arange(width, device=device) + 0.5) / width * 2 - 1
    y, x = torch.meshgrid(y, x, indexing="ij")
    parts = [x, y, x * x, y * y, (x * math.pi).sin(), (y * math.pi).sin(), (x * math.pi).cos(), (y * math.pi).cos()]
    return torch.stack(parts, dim=-1).flatten(0, 1)
