"""lyra-tiny's causal video autoencoder: 4 frames x 16 x 16 pixels to one latent cell, streaming with kept caches.

Every block sees the current and the previous frame, so a video can be encoded or decoded piece by piece with one frame
of memory per block; the first latent stands for one frame, each later one for four (as Wan 2.1's autoencoder). Knows
no diffusion; `lyra.models.streaming` gives it and Wan's autoencoder one interface.
"""

from __future__ import annotations

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

Cache = dict[str, Tensor]
"""The previous frame's features at each block, by the block's name; empty at the start of a video."""


class CausalBlock(nn.Module):
    """Residual 2D convolutions over a frame concatenated with the frame before it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels * 2, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Float[Tensor, "b t c h w"], cache: Cache, name: str) -> Float[Tensor, "b t c h w"]:
        """Update all frames of a piece; `cache[name]` holds the frame before the piece and is replaced."""
        previous = cache.get(name)
        if previous is None:
            previous = x[:, 0]
        shifted = torch.cat([previous[:, None], x[:, :-1]], dim=1)
        cache[name] = x[:, -1].detach()
        frames = x.flatten(0, 1)
        hidden = F.silu(self.conv1(torch.cat([frames, shifted.flatten(0, 1)], dim=1)))
        return (frames + self.conv2(hidden)).unflatten(0, x.shape[:2])


class Encoder(nn.Module):
    """Pixels to latents; two levels halve space and time after a 4x pixel-unshuffle."""

    def __init__(self, channels: tuple[int, int, int], latent_channels: int) -> None:
        super().__init__()
        c0, c1, c2 = channels
        self.conv_in = nn.Conv2d(48, c0, 3, padding=1)
        self.block0, self.block1, self.block2 = CausalBlock(c0), CausalBlock(c1), CausalBlock(c2)
        self.down0 = nn.Conv2d(c0 * 2, c1, 4, stride=2, padding=1)
        self.down1 = nn.Conv2d(c1 * 2, c2, 4, stride=2, padding=1)
        self.conv_out = nn.Conv2d(c2, latent_channels, 3, padding=1)

    def forward(self, x: Float[Tensor, "b t 3 h w"], cache: Cache) -> Float[Tensor, "b t4 z h16 w16"]:
        """Encode a piece whose number of frames divides by 4."""
        b = x.shape[0]
        x = self.conv_in(F.pixel_unshuffle(x.flatten(0, 1), 4)).unflatten(0, (b, -1))
        x = self.block0(x, cache, "encoder.0")
        x = self.down0(pair_frames(x)).unflatten(0, (b, -1))
        x = self.block1(x, cache, "encoder.1")
        x = self.down1(pair_frames(x)).unflatten(0, (b, -1))
        x = self.block2(x, cache, "encoder.2")
        return self.conv_out(x.flatten(0, 1)).unflatten(0, (b, -1))


class Decoder(nn.Module):
    """Latents to pixels; two levels double space and time before a 4x pixel-shuffle."""

    def __init__(self, channels: tuple[int, int, int], latent_channels: int, blocks: tuple[int, int, int]) -> None:
        super().__init__()
        c2, c1, c0 = channels
        self.conv_in = nn.Conv2d(latent_channels, c2, 3, padding=1)
        self.level2 = nn.ModuleList(CausalBlock(c2) for _ in range(blocks[0]))
        self.up1 = nn.Conv2d(c2, c1 * 2 * 4, 1)
        self.level1 = nn.ModuleList(CausalBlock(c1) for _ in range(blocks[1]))
        self.up0 = nn.Conv2d(c1, c0 * 2 * 4, 1)
        self.level0 = nn.ModuleList(CausalBlock(c0) for _ in range(blocks[2]))
        self.conv_out = nn.Conv2d(c0, 48, 3, padding=1)

    def forward(self, z: Float[Tensor, "b t z h w"], cache: Cache) -> Float[Tensor, "b t4 3 h16 w16"]:
        """Decode a piece of latents to four frames each."""
        b = z.shape[0]
        x = self.conv_in(z.flatten(0, 1)).unflatten(0, (b, -1))
        x = run_level(self.level2, x, cache, "decoder.2")
        x = split_frames(self.up1(x.flatten(0, 1)), b)
        x = run_level(self.level1, x, cache, "decoder.1")
        x = split_frames(self.up0(x.flatten(0, 1)), b)
        x = run_level(self.level0, x, cache, "decoder.0")
        return F.pixel_shuffle(self.conv_out(F.silu(x.flatten(0, 1))), 4).unflatten(0, (b, -1))


class TinyCausalAutoencoder(ModelMixin, ConfigMixin):
    """The encoder, the decoder and the statistics that normalise latents.

    Args:
        encoder_channels: widths at 1/4, 1/8, 1/16 of the image. decoder_channels: widths at 1/16, 1/8, 1/4.
        latents_mean, latents_std: one value a latent channel; normalised latents have zero mean and unit deviation.
    """

    spatial_stride = 16
    temporal_stride = 4

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 32,
        encoder_channels: tuple[int, int, int] = (64, 112, 160),
        decoder_channels: tuple[int, int, int] = (160, 112, 64),
        decoder_blocks: tuple[int, int, int] = (2, 3, 2),
        latents_mean: tuple[float, ...] | None = None,
        latents_std: tuple[float, ...] | None = None,
    ) -> None:
        super().__init__()
        self.encoder = Encoder(encoder_channels, latent_channels)
        self.decoder = Decoder(decoder_channels, latent_channels, decoder_blocks)
        mean = torch.zeros(latent_channels) if latents_mean is None else torch.tensor(latents_mean)
        std = torch.ones(latent_channels) if latents_std is None else torch.tensor(latents_std)
        self.register_buffer("mean", mean.view(1, -1, 1, 1, 1), persistent=False)
        self.register_buffer("std", std.view(1, -1, 1, 1, 1), persistent=False)

    def encode_piece(self, frames: Float[Tensor, "b 3 t h w"], cache: Cache) -> Float[Tensor, "b z t4 h w"]:
        """Normalised latents of the next frames of a video; one frame (the first) or a multiple of four."""
        x = frames.transpose(1, 2).to(self.dtype)
        if not cache:
            # The first latent stands for one frame: that frame, held for the four frames of a latent.
            x = torch.cat([x[:, :1].expand(-1, 4, -1, -1, -1), x[:, 1:]], dim=1)
        return (self.encoder(x, cache).transpose(1, 2) - self.mean) / self.std

    def decode_piece(self, latents: Float[Tensor, "b z t h w"], cache: Cache) -> Float[Tensor, "b 3 t4 h w"]:
        """Frames of the next latents of a video, not clamped; the first latent gives one frame, the others four."""
        first = not cache
        x = self.decoder((latents.to(self.dtype) * self.std + self.mean).transpose(1, 2), cache).transpose(1, 2)
        return x[:, :, 3:] if first else x


def pair_frames(x: Float[Tensor, "b t c h w"]) -> Float[Tensor, "n c2 h w"]:
    """Concatenate consecutive frames on channels: half as many frames, batch and time flattened."""
    b, t, c, h, w = x.shape
    return x.reshape(b * t // 2, c * 2, h, w)


def split_frames(x: Float[Tensor, "n c h w"], batch: int) -> Float[Tensor, "b t c h w"]:
    """Channels to twice as many frames at twice the size."""
    n, c, h, w = x.shape
    return F.pixel_shuffle(x.reshape(n * 2, c // 2, h, w), 2).unflatten(0, (batch, -1))


def run_level(blocks: nn.ModuleList, x: Tensor, cache: Cache, name: str) -> Tensor:
    """Apply blocks that share a resolution."""
    for index, block in enumerate(blocks):
        x = block(x, cache, f"{name}.{index}")
    return x
