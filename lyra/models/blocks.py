"""The transformer's block: self-attention whose queries and keys see rays and correspondences, cross-attention, MLP.

Parameter names follow diffusers' WanTransformerBlock where it has a counterpart. Knows nothing of packing, heads of the
network or time embedding; what stays the same over the steps of a chunk is kept in the `BlockCache` that it is given.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from lyra.models.conditioning import Projection
from lyra.models.rope import apply_rotary
from lyra.models.token_group import TokenGroup

SLICE_TOKENS, FLOAT_TOKENS = 8192, 2048
"""Tokens that token-wise work is done on at once, where no gradient is kept: products with weights, and what has
float32 steps between large tensors (encoding of correspondences, norm and rotary embedding of queries and keys)."""


@dataclass
class BlockCache:
    """What one block computed in a chunk's first forward pass; it depends on neither the noise nor the time."""

    correspondence: Float[Tensor, "b m s"] | None = None
    """Squeezed correspondence features."""


@dataclass
class TextCache:
    """Keys and values of one block's cross-attention for one text and for the image."""

    text: tuple[Tensor, Tensor] | None = None
    image: tuple[Tensor, Tensor] | None = None


class SelfAttention(nn.Module):
    """Full attention over history and targets; queries and keys see one input, values another.

    Its steps are methods of their own, so that the block can let go of each input as soon as it is used.
    """

    def __init__(self, dim: int, heads: int, eps: float) -> None:
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])
        self.norm_q, self.norm_k = nn.RMSNorm(dim, eps=eps), nn.RMSNorm(dim, eps=eps)

    def queries_keys(
        self, x: Float[Tensor, "b n d"], angles: Float[Tensor, "n half"]
    ) -> tuple[Float[Tensor, "b n heads e"], Float[Tensor, "b n heads e"]]:
        """Queries and keys, normed and rotated by the tokens' rotary angles; the keys may take the place of x."""

        def turned(project: nn.Linear, norm: nn.RMSNorm) -> Callable[..., Tensor]:
            def finish(part: Tensor, its_angles: Tensor) -> Tensor:
                return apply_rotary(split_heads(norm(part), self.heads), its_angles[0])

            def of(part: Tensor, its_angles: Tensor) -> Tensor:
                flat = project(part)
                return in_slices(finish, flat, its_angles, out=split_heads(flat, self.heads), at_once=FLOAT_TOKENS)

            return of

        q = in_slices(turned(self.to_q, self.norm_q), x, angles[None])
        return q, in_slices(turned(self.to_k, self.norm_k), x, angles[None], out=split_heads(x, self.heads))

    def values(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n heads e"]:
        """Values."""
        return in_slices(lambda part: split_heads(self.to_v(part), self.heads), x)

    def output(self, heads: Float[Tensor, "b n heads e"]) -> Float[Tensor, "b n d"]:
        """The attention's output in the width of the tokens."""
        return self.to_out[0](heads.flatten(2))


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
        if cache.text is None:
            cache.text = self.norm_k(self.to_k(text)), self.to_v(text)
        if cache.image is None:
            cache.image = self.norm_added_k(self.add_k_proj(image)), self.add_v_proj(image)
        q = self.to_q(x)
        q = split_heads(in_slices(self.norm_q, q, out=q, at_once=FLOAT_TOKENS), self.heads)
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
        self,
        dim: int,
        heads: int,
        ffn_dim: int,
        camera_dim: int,
        correspondence_dim: int,
        frequencies: int,
        squeeze: int,
        eps: float,
    ) -> None:
        super().__init__()
        self.frequencies = frequencies
        self.scale_shift_table = nn.Parameter(torch.randn(1, 6, dim) / math.sqrt(dim))
        self.norm1, self.norm3 = (nn.LayerNorm(dim, eps, elementwise_affine=False) for _ in range(2))
        self.norm2 = nn.LayerNorm(dim, eps)
        self.attn1, self.attn2 = SelfAttention(dim, heads, eps), CrossAttention(dim, heads, eps)
        self.ffn = FeedForward(dim, ffn_dim)
        self.camera_encoder = nn.Linear(camera_dim, dim, bias=False)
        self.correspondence_encoder = nn.ModuleList(
            [
                nn.Linear(correspondence_dim * 2 * frequencies, squeeze, bias=False),
                nn.Linear(squeeze, dim, bias=False),
            ]
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
            cache.correspondence = in_slices(self.squeeze_correspondence, correspondence, at_once=FLOAT_TOKENS)
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.scale_shift_table.float() + modulation).chunk(6, dim=1)
        bias = (camera, cache.correspondence, correspondence_index)
        heads = self.attended(x, scale1, shift1, *bias, angles, group)
        x = in_slices(lambda part, its: part + self.attn1.output(its) * gate1.to(part.dtype), x, heads)
        del heads
        x = in_slices(lambda part: part + self.attn2(self.norm2(part), text, image, text_cache), x)
        return in_slices(
            lambda part: part + self.ffn(modulated(self.norm3(part), scale2, shift2)) * gate2.to(part.dtype), x
        )

    def attended(
        self,
        x: Float[Tensor, "b n d"],
        scale: Float[Tensor, "b 1 d"],
        shift: Float[Tensor, "b 1 d"],
        camera: Float[Tensor, "b n c"],
        correspondence: Float[Tensor, "b m s"],
        correspondence_index: Tensor,
        angles: Float[Tensor, "n half"],
        group: TokenGroup,
    ) -> Float[Tensor, "b n heads e"]:
        """What the self-attention's heads see; `group` knows who has the other tokens.

        Sums are made in place and nothing is kept longer than it is used, because a tensor of this size is a
        noticeable share of what a pass needs.
        """
        y = in_slices(lambda part: modulated(self.norm1(part), scale, shift), x)
        # In this order, because torch.compile (2.13) loses an index_add_ that another sum in place follows.
        query_key = in_slices(self.camera_encoder, camera).add_(y)
        query_key.index_add_(1, correspondence_index, in_slices(self.correspondence_encoder[1], correspondence))
        v = self.attn1.values(y)
        del y
        q, k = self.attn1.queries_keys(query_key, angles)
        del query_key
        return attend(q, group.gather(k, dim=1), group.gather(v, dim=1))

    def squeeze_correspondence(self, values: Float[Tensor, "b m e"]) -> Float[Tensor, "b m s"]:
        """Sine-cosine encoding of coordinates and the first, narrowing linear map."""
        encoded = sine_cosine(values, self.frequencies)
        return self.correspondence_encoder[0](encoded.to(self.scale_shift_table.dtype))


def in_slices(
    function: Callable[..., Tensor],
    *tensors: Tensor | None,
    out: Tensor | None = None,
    at_once: int | None = None,
) -> Tensor:
    """A function of each token applied to a few tokens at a time, which bounds its working memory.

    The values are those of one application to all tokens. With gradients, or inside torch.compile, which fuses the
    steps, it is one application.

    Args:
        tensors: with the tokens along dimension 1.
        out: memory that slices may be written to, also that of one of `tensors` which nobody needs any more.
        at_once: tokens of a slice; `SLICE_TOKENS` when None.
    """
    given = [tensor for tensor in tensors if tensor is not None]
    tokens, size = given[0].shape[1], at_once or SLICE_TOKENS
    if tokens <= size or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return function(*given)
    for start in range(0, tokens, size):
        part = function(*(tensor[:, start : start + size] for tensor in given))
        if out is None:
            out = part.new_empty(part.shape[0], tokens, *part.shape[2:])
        out[:, start : start + size] = part
    assert out is not None
    return out


def modulated(
    x: Float[Tensor, "b n d"], scale: Float[Tensor, "b 1 d"], shift: Float[Tensor, "b 1 d"]
) -> Float[Tensor, "b n d"]:
    """x (1 + scale) + shift in float32, in the dtype of x (released code)."""
    return (x.float() * (1 + scale) + shift).to(x.dtype)


def sine_cosine(values: Float[Tensor, "b n d"], frequencies: int) -> Float[Tensor, "b n e"]:
    """[sin(pi v), cos(pi v), sin(2 pi v), cos(2 pi v), ...], one block of d values each, float32 (released code)."""
    values = values.float()
    parts = []
    for octave in range(frequencies):
        angle = values * (math.pi * 2**octave)
        parts += [angle.sin(), angle.cos()]
    return torch.cat(parts, dim=-1)


def fastest_attention() -> AbstractContextManager[None]:
    """While active, torch prefers cuDNN's attention, and takes the next one where that cannot be used.

    On Hopper it is about 1.6 times as fast as the one that torch takes by itself (published figures).
    """
    order = [
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.MATH,
    ]
    return sdpa_kernel(order, set_priority=True)


def split_heads(x: Float[Tensor, "b n d"], heads: int) -> Float[Tensor, "b n heads e"]:
    """Separate the heads, in the order that diffusers' attention backends take."""
    return x.unflatten(-1, (heads, -1))


def attend(
    q: Float[Tensor, "b n heads e"], k: Float[Tensor, "b m heads e"], v: Float[Tensor, "b m heads e"]
) -> Float[Tensor, "b n heads e"]:
    """Scaled dot-product attention through diffusers' dispatch, so that any of its backends can be chosen."""
    return dispatch_attention_fn(q, k, v)
