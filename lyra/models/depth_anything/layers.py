"""Transformer layers of the backbone and of the camera encoder, with the released parameter names.

The residual stream and all norms are float32; only matrix products and attention run in the dtype of their weights,
which is what the released code's autocast does. Knows no image and no camera.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

ROTARY_BASE = 100.0


@dataclass(frozen=True)
class Rotation:
    """Cosine and sine of each token's rotary angles, for the row axis and the column axis."""

    cos: Float[Tensor, "n 2 quarter"]
    sin: Float[Tensor, "n 2 quarter"]

    @classmethod
    def at(cls, positions: Float[Tensor, "n 2"], head_dim: int) -> Rotation:
        """Angles of (row, column) positions with frequencies 100^(-2i / half the head width) (released code)."""
        quarter = head_dim // 4
        exponents = torch.arange(quarter, device=positions.device, dtype=torch.float32) / quarter
        angles = positions.float()[..., None] * ROTARY_BASE**-exponents
        return cls(angles.cos(), angles.sin())

    def apply(self, x: Float[Tensor, "b heads n d"]) -> Float[Tensor, "b heads n d"]:
        """Turn each half of the head (row, then column) in rotate-half layout; float32."""
        a, b = x.float().unflatten(-1, (2, 2, -1)).unbind(-2)
        return torch.stack([a * self.cos - b * self.sin, b * self.cos + a * self.sin], dim=-2).flatten(-3)


def apply_linear(layer: nn.Linear, x: Float[Tensor, "*batch c"]) -> Float[Tensor, "*batch d"]:
    """A linear layer in the dtype of its weights."""
    return layer(x.to(layer.weight.dtype))


class LayerScale(nn.Module):
    """A learned factor for each channel of a residual branch."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x: Float[Tensor, "*batch c"]) -> Float[Tensor, "*batch c"]:
        """Scale channels."""
        return x * self.gamma


class Attention(nn.Module):
    """Multi-head self-attention, optionally with layer norms on queries and keys and rotary positions."""

    def __init__(self, dim: int, heads: int, *, query_key_norm: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.query_key_norm = query_key_norm
        if query_key_norm:
            self.q_norm, self.k_norm = nn.LayerNorm(dim // heads), nn.LayerNorm(dim // heads)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Float[Tensor, "b n c"], rotation: Rotation | None = None) -> Float[Tensor, "b n c"]:
        """Attend over all n tokens."""
        q, k, v = apply_linear(self.qkv, x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if self.query_key_norm:
            q, k = self.q_norm(q.float()), self.k_norm(k.float())
        if rotation is not None:
            q, k = rotation.apply(q), rotation.apply(k)
        mixed = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v)
        return self.proj(mixed.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two linear layers with GELU between them."""

    def __init__(self, dim_in: int, hidden: int, dim_out: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim_in, hidden), nn.Linear(hidden, dim_out)

    def forward(self, x: Float[Tensor, "*batch c"]) -> Float[Tensor, "*batch d"]:
        """The feed-forward update."""
        return self.fc2(F.gelu(apply_linear(self.fc1, x)))


class SwiGlu(nn.Module):
    """Gated feed-forward layer: silu of the first half times the second half; hidden width rounded up to 8."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        hidden = -(-int(4 * dim * 2 / 3) // 8) * 8
        self.w12, self.w3 = nn.Linear(dim, 2 * hidden), nn.Linear(hidden, dim)

    def forward(self, x: Float[Tensor, "*batch c"]) -> Float[Tensor, "*batch c"]:
        """The feed-forward update."""
        gate, value = apply_linear(self.w12, x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


class Block(nn.Module):
    """Pre-norm transformer block with layer scale."""

    def __init__(
        self, dim: int, heads: int, *, norm_eps: float, query_key_norm: bool = False, swiglu: bool = False
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = Attention(dim, heads, query_key_norm=query_key_norm)
        self.ls1 = LayerScale(dim)
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = SwiGlu(dim) if swiglu else Mlp(dim, 4 * dim, dim)
        self.ls2 = LayerScale(dim)

    def forward(self, x: Float[Tensor, "b n c"], rotation: Rotation | None = None) -> Float[Tensor, "b n c"]:
        """The residual updates."""
        x = x + self.ls1(self.attn(self.norm1(x), rotation))
        return x + self.ls2(self.mlp(self.norm2(x)))
