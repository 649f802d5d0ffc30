"""Embeds what is the same for every token: the timestep, the text and the image.

Parameter names follow diffusers' WanTimeTextImageEmbedding. Knows neither encoder; it gets their outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Context:
    """Embedded conditions of one forward pass."""

    time: Float[Tensor, "b d"]
    """Timestep embedding, float32."""
    modulation: Float[Tensor, "b 6 d"]
    """Shift, scale and gate of attention and feed-forward, float32."""
    text: Float[Tensor, "b l d"]
    image: Float[Tensor, "b m d"]


class TwoLinears(nn.Module):
    """Two linear maps named as in diffusers' embedders; the activation is the caller's."""

    def __init__(self, inputs: int, dim: int) -> None:
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(inputs, dim), nn.Linear(dim, dim)


class Projection(nn.Module):
    """A linear map under the name that diffusers gives the first layer of a feed-forward network."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.proj = nn.Linear(inputs, outputs)

    def forward(self, x: Float[Tensor, "*batch i"]) -> Float[Tensor, "*batch o"]:
        """The linear map."""
        return self.proj(x)


class ImageFeedForward(nn.Module):
    """Linear, GELU, linear, under diffusers' parameter names."""

    def __init__(self, image_dim: int, dim: int) -> None:
        super().__init__()
        self.net = nn.ModuleList([Projection(image_dim, image_dim), nn.Identity(), nn.Linear(image_dim, dim)])

    def forward(self, x: Float[Tensor, "b m f"]) -> Float[Tensor, "b m d"]:
        """The two-layer map of each token."""
        return self.net[2](F.gelu(self.net[0](x)))


class ImageEmbedder(nn.Module):
    """LayerNorm, linear, GELU, linear, LayerNorm (Wan 2.1 I2V)."""

    def __init__(self, image_dim: int, dim: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(image_dim, 1e-5), nn.LayerNorm(dim, 1e-5)
        self.ff = ImageFeedForward(image_dim, dim)

    def forward(self, image: Float[Tensor, "b m f"]) -> Float[Tensor, "b m d"]:
        """Image tokens in the transformer's width."""
        return self.norm2(self.ff(self.norm1(image)))


class ConditionEmbedder(nn.Module):
    """Timestep, text and image to the transformer's width."""

    def __init__(self, dim: int, text_dim: int, freq_dim: int, image_dim: int) -> None:
        super().__init__()
        self.freq_dim = freq_dim
        self.time_embedder = TwoLinears(freq_dim, dim)
        self.time_proj = nn.Linear(dim, dim * 6)
        self.text_embedder = TwoLinears(text_dim, dim)
        self.image_embedder = ImageEmbedder(image_dim, dim)

    def forward(
        self, timestep: Float[Tensor, "b"], text: Float[Tensor, "b l e"], image: Float[Tensor, "b m f"]
    ) -> Context:
        """All conditions; the time path runs in float32 whatever the weights' dtype (released code)."""
        e = timestep_embedding(timestep, self.freq_dim)
        e = linear_fp32(self.time_embedder.linear_2, F.silu(linear_fp32(self.time_embedder.linear_1, e)))
        modulation = linear_fp32(self.time_proj, F.silu(e)).unflatten(-1, (6, -1))
        text = self.text_embedder.linear_2(F.gelu(self.text_embedder.linear_1(text), approximate="tanh"))
        return Context(e, modulation, text, self.image_embedder(image))


def timestep_embedding(timestep: Float[Tensor, "b"], dim: int) -> Float[Tensor, "b d"]:
    """[cos(t w_j), sin(t w_j)] with w_j = 10000^(-j / (dim / 2)), in float64, returned as float32 (released code)."""
    half = dim // 2
    exponents = torch.arange(half, dtype=torch.float64, device=timestep.device) / half
    angles = timestep.double()[:, None] * 10000.0**-exponents
    return torch.cat([angles.cos(), angles.sin()], dim=-1).float()


def linear_fp32(layer: nn.Linear, x: Float[Tensor, "*batch i"]) -> Float[Tensor, "*batch o"]:
    """Apply a linear layer in float32 whatever the dtype of its weights."""
    return F.linear(x.float(), layer.weight.float(), layer.bias.float())
