"""The transformer's block: self-attention whose queries and keys see rays and correspondences, cross-attention, MLP.

Parameter names follow diffusers' WanTransformerBlock where it has a counterpart. Knows nothing of packing, heads of the
network or time embedding; what stays the same over the steps of a chunk is kept in the `BlockCache` that it is given.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from lyra.models.conditioning import Projection
from lyra.models.rope import apply_rotary
from lyra.models.token_group import TokenGroup


@dataclass
class BlockCache:
    """What one block computed in a chunk's first forward pass; it depends on neither the noise nor the time."""

    correspondence: Float[Tensor, "b m s"] | None = None
    """Squeezed correspondence features."""


@dataclass
class TextCache:
    """Keys and values of one block's cross-attention for one text."""

    text: tuple[Tensor, Tensor] | None = None
    image: tuple[Tensor, Tensor] | None = None


class SelfAttention(nn.Module):
    """Full attention over history and targets; queries and keys see one input, values another."""

    def __init__(self, dim: int, heads: int, eps: float) -> None:
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])
        self.norm_q, self.norm_k = nn.RMSNorm(dim, eps=eps), nn.RMSNorm(dim, eps=eps)

    def forward(
        self,
        query_key: Float[Tensor, "b n d"],
        value: Float[Tensor, "b n d"],
        angles: Float[Tensor, "n half"],
        group: TokenGroup,
    ) -> Float[Tensor, "b n d"]:
        """Attention output; `angles` are the rotary angles of the tokens, `group` knows who has the other tokens."""
        q = apply_rotary(split_heads(self.norm_q(self.to_q(query_key)), self.heads), angles)
        k = apply_rotary(split_heads(self.norm_k(self.to_k(query_key)), self.heads), angles)
        v = split_heads(self.to_v(value), self.heads)
        return self.to_out[0](attend(q, group.gather(k, dim=1), group.gather(v, dim=1)).flatten(2))


class CrossAttention(nn.Module):
    """Two separate attentions with the same queries, to text and to the image embedding, summed (Wan 2.1 I2V)."""

    def __init__(self, dim: int, heads: int, eps: float) -> None:
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim) for _ in range(3))
        self.add_k_proj, self.add_v_proj = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])
        self.norm_q, self.norm_k = nn.RMSNorm(dim, eps=eps), nn.RMSNorm(dim, eps=eps)
        self.norm_added_k = nn.RMSNorm(dim, eps=eps)

    def forward(
        self,
        x: Float[Tensor, "b n d"],
        text: Float[Tensor, "b l d"] | None,
        image: Float[Tensor, "b m d"] | None,
        cache: TextCache,
    ) -> Float[Tensor, "b n d"]:
        """Attention output for tokens x; text and image are needed only until the cache has their keys and values."""
        if cache.text is None or cache.image is None:
            cache.text = self.norm_k(self.to_k(text)), self.to_v(text)
            cache.image = self.norm_added_k(self.add_k_proj(image)), self.add_v_proj(image)
        q = split_heads(self.norm_q(self.to_q(x)), self.heads)
        to_text, to_image = (
            attend(q, split_heads(k, self.heads), split_heads(v, self.heads)) for k, v in (cache.text, cache.image)
        )
        return self.to_out[0]((to_text + to_image).flatten(2))


class FeedForward(nn.Module):
    """Linear, tanh-GELU, linear, under diffusers' parameter names."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.net = nn.ModuleList([Projection(dim, hidden), nn.Identity(), nn.Linear(hidden, dim)])

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        """The two-layer map of each token."""
        return self.net[2](F.gelu(self.net[0](x), approximate="tanh"))


class Lyra2Block(nn.Module):
    """One transformer block (released code); ray and correspondence features bias queries and keys only."""

    def __init__(
        self, dim: int, heads: int, ffn_dim: int, camera_dim: int, correspondence_dim: int, squeeze: int, eps: float
    ) -> None:
        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.randn(1, 6, dim) / math.sqrt(dim))
        self.norm1, self.norm3 = (nn.LayerNorm(dim, eps, elementwise_affine=False) for _ in range(2))
        self.norm2 = nn.LayerNorm(dim, eps)
        self.attn1, self.attn2 = SelfAttention(dim, heads, eps), CrossAttention(dim, heads, eps)
        self.ffn = FeedForward(dim, ffn_dim)
        self.camera_encoder = nn.Linear(camera_dim, dim, bias=False)
        self.correspondence_encoder = nn.ModuleList(
            [nn.Linear(correspondence_dim, squeeze, bias=False), nn.Linear(squeeze, dim, bias=False)]
        )

    def forward(
        self,
        x: Float[Tensor, "b n d"],
        modulation: Float[Tensor, "b 6 d"],
        camera: Float[Tensor, "b n c"],
        correspondence: Float[Tensor, "b m e"] | None,
        correspondence_index: Tensor,
        text: Float[Tensor, "b l d"] | None,
        image: Float[Tensor, "b k d"] | None,
        angles: Float[Tensor, "n half"],
        cache: BlockCache,
        text_cache: TextCache,
        group: TokenGroup,
    ) -> Float[Tensor, "b n d"]:
        """The block's output; `correspondence` holds only the tokens at `correspondence_index`, the others get none.

        What fills the caches (`correspondence`, `text`, `image`) is None once they are full.
        """
        if cache.correspondence is None:
            cache.correspondence = self.correspondence_encoder[0](correspondence)
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.scale_shift_table.float() + modulation).chunk(6, dim=1)
        y = (self.norm1(x).float() * (1 + scale1) + shift1).to(x.dtype)
        squeezed = self.correspondence_encoder[1](cache.correspondence)
        bias = self.camera_encoder(camera).index_add(1, correspondence_index, squeezed)
        x = x + self.attn1(y + bias, y, angles, group) * gate1.to(x.dtype)
        x = x + self.attn2(self.norm2(x), text, image, text_cache)
        y = (self.norm3(x).float() * (1 + scale2) + shift2).to(x.dtype)
        return x + self.ffn(y) * gate2.to(x.dtype)


def split_heads(x: Float[Tensor, "b n d"], heads: int) -> Float[Tensor, "b n heads e"]:
    """Separate the heads, in the order that diffusers' attention backends take."""
    return x.unflatten(-1, (heads, -1))


def attend(
    q: Float[Tensor, "b n heads e"], k: Float[Tensor, "b m heads e"], v: Float[Tensor, "b m heads e"]
) -> Float[Tensor, "b n heads e"]:
    """Scaled dot-product attention through diffusers' dispatch, so that any of its backends can be chosen."""
    return dispatch_attention_fn(q, k, v)
