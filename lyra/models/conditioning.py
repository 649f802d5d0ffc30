"""Embeds what is the same for every token: the timestep, the text and the image.

Parameter names follow diffusers' WanTimeTextImageEmbedding. Knows neither encoder; it gets their outputs.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


class Float32Linear(nn.Linear):
    """A linear map that computes in float32 whatever the dtype of its weights (released code: autocast to float32)."""

    def forward(self, x: Float[Tensor, "*batch i"]) -> Float[Tensor, "*batch o"]:
        """The linear map, in float32."""
        return F.linear(x.float(), self.weight.float(), self.bias.float())


class TwoLinears(nn.Module):
    """Two linear maps named as in diffusers' embedders; the activation is the caller's."""

    def __init__(self, inputs: int, dim: int, linear: type[nn.Linear] = nn.Linear) -> None:
        super().__init__()
        self.linear_1, self.linear_2 = linear(inputs, dim), linear(dim, dim)


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
        self.time_embedder = TwoLinears(freq_dim, dim, Float32Linear)
        self.time_proj = Float32Linear(dim, dim * 6)
        self.text_embedder = TwoLinears(text_dim, dim)
        self.image_embedder = ImageEmbedder(image_dim, dim)

    def embed_time(self, timestep: Float[Tensor, "b"]) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b 6 d"]]:
        """Timestep embedding and the modulation of the blocks, both float32 (released code)."""
        e = timestep_embedding(timestep, self.freq_dim)
        e = self.time_embedder.linear_2(F.silu(self.time_embedder.linear_1(e)))
        return e, self.time_proj(F.silu(e)).unflatten(-1, (6, -1))

    def embed_text(self, text: Float[Tensor, "b l e"]) -> Float[Tensor, "b l d"]:
        """Text tokens in the transformer's width."""
        return self.text_embedder.linear_2(F.gelu(self.text_embedder.linear_1(text), approximate="tanh"))


def timestep_embedding(timestep: Float[Tensor, "b"], dim: int) -> Float[Tensor, "b d"]:
    """[cos(t w_j), sin(t w_j)] with w_j = 10000^(-j / (dim / 2)), in float64, returned as float32 (released code)."""
    half = dim // 2
    exponents = torch.arange(half, dtype=torch.float64, device=timestep.device) / half
    angles = timestep.double()[:, None] * 10000.0**-exponents
    return torch.cat([angles.cos(), angles.sin()], dim=-1).float()
