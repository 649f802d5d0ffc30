"""The video transformer of Lyra 2.0: Wan 2.1's image-to-video blocks, packed history, rays and correspondences.

Rays and warped canonical coordinates are added to the input of the self-attention's queries and keys only, never to
values or to the residual stream (paper section 4; released code). One timestep serves history and targets. Parameter
names follow diffusers' WanTransformer3DModel where it has a counterpart. Knows no sampler, no camera and no file.
"""

from __future__ import annotations

import math

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from lyra.models.conditioning import ConditionEmbedder, Projection
from lyra.models.framepack import (
    RELEASED_LAYOUT,
    FramePackLayout,
    Segment,
    fold_base_tokens,
    pad_to_multiple,
    patchify,
    pool_tokens,
)
from lyra.models.rope import apply_rotary, packed_angles


class SelfAttention(nn.Module):
    """Full attention over history and targets; queries and keys see one input, values another."""

    def __init__(self, dim: int, heads: int, eps: float) -> None:
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])
        self.norm_q, self.norm_k = nn.RMSNorm(dim, eps=eps), nn.RMSNorm(dim, eps=eps)

    def forward(
        self, query_key: Float[Tensor, "b n d"], value: Float[Tensor, "b n d"], angles: Float[Tensor, "n half"]
    ) -> Float[Tensor, "b n d"]:
        """Attention output; `angles` are the rotary angles of the tokens."""
        q = split_heads(self.norm_q(self.to_q(query_key)), self.heads)
        k = split_heads(self.norm_k(self.to_k(query_key)), self.heads)
        v = split_heads(self.to_v(value), self.heads)
        out = F.scaled_dot_product_attention(apply_rotary(q, angles), apply_rotary(k, angles), v)
        return self.to_out[0](out.transpose(1, 2).flatten(2))


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
        self, x: Float[Tensor, "b n d"], text: Float[Tensor, "b l d"], image: Float[Tensor, "b m d"]
    ) -> Float[Tensor, "b n d"]:
        """Attention output for tokens x."""
        q = split_heads(self.norm_q(self.to_q(x)), self.heads)
        text_k = split_heads(self.norm_k(self.to_k(text)), self.heads)
        image_k = split_heads(self.norm_added_k(self.add_k_proj(image)), self.heads)
        out = F.scaled_dot_product_attention(q, text_k, split_heads(self.to_v(text), self.heads))
        out = out + F.scaled_dot_product_attention(q, image_k, split_heads(self.add_v_proj(image), self.heads))
        return self.to_out[0](out.transpose(1, 2).flatten(2))


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
        correspondence: Float[Tensor, "b m e"],
        correspondence_index: Tensor,
        text: Float[Tensor, "b l d"],
        image: Float[Tensor, "b k d"],
        angles: Float[Tensor, "n half"],
    ) -> Float[Tensor, "b n d"]:
        """The block's output; `correspondence` holds only the tokens at `correspondence_index`, the others get none."""
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.scale_shift_table.float() + modulation).chunk(6, dim=1)
        y = (self.norm1(x).float() * (1 + scale1) + shift1).to(x.dtype)
        squeezed = self.correspondence_encoder[1](self.correspondence_encoder[0](correspondence))
        bias = self.camera_encoder(camera).index_add(1, correspondence_index, squeezed)
        x = x + self.attn1(y + bias, y, angles) * gate1.to(x.dtype)
        x = x + self.attn2(self.norm2(x), text, image)
        y = (self.norm3(x).float() * (1 + scale2) + shift2).to(x.dtype)
        return x + self.ffn(y) * gate2.to(x.dtype)


class Lyra2Transformer3DModel(ModelMixin, ConfigMixin):
    """Predicts the velocity (noise - data) of the target latents.

    Args:
        in_channels: state, mask and conditioning channels together (released: 16 + 4 + 16).
        camera_channels: ray channels per latent cell (released: 6 x 8 x 8).
        correspondence_channels: warped-coordinate channels per latent cell, all slots (released: 5 x 4 x 8 x 8).
        correspondence_frequencies: octaves of the sine-cosine encoding.
        prediction: `velocity` (released) or `residual`: the network's output is added to the conditioning latent to
            give the clean sample, from which the velocity follows; an untrained network then copies its conditioning.
    """

    _supports_gradient_checkpointing = False
    _no_split_modules = ("Lyra2Block",)

    @register_to_config
    def __init__(
        self,
        dim: int = 5120,
        num_heads: int = 40,
        num_layers: int = 40,
        ffn_dim: int = 13824,
        in_channels: int = 36,
        out_channels: int = 16,
        text_dim: int = 4096,
        text_len: int = 512,
        freq_dim: int = 256,
        image_dim: int = 1280,
        camera_channels: int = 384,
        correspondence_channels: int = 1280,
        correspondence_frequencies: int = 2,
        correspondence_squeeze: int = 256,
        layout: str = RELEASED_LAYOUT,
        prediction: str = "velocity",
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.layout = FramePackLayout.parse(layout)
        self.patch_embedding = nn.Linear(in_channels * 4, dim)
        self.history_patch_embeddings = nn.ModuleList(
            nn.Linear(in_channels * math.prod(base_patch(segment)), dim) for segment in self.layout.history
        )
        self.condition_embedder = ConditionEmbedder(dim, text_dim, freq_dim, image_dim)
        encoded = correspondence_channels * 4 * 2 * correspondence_frequencies
        self.blocks = nn.ModuleList(
            Lyra2Block(dim, num_heads, ffn_dim, camera_channels * 4, encoded, correspondence_squeeze, eps)
            for _ in range(num_layers)
        )
        self.norm_out = nn.LayerNorm(dim, eps, elementwise_affine=False)
        self.scale_shift_table = nn.Parameter(torch.randn(1, 2, dim) / math.sqrt(dim))
        self.proj_out = nn.Linear(dim, out_channels * 4)
        self._angles: dict[tuple[int, int], Tensor] = {}

    def forward(
        self,
        hidden_states: Float[Tensor, "b c t h w"],
        mask: Float[Tensor, "b 4 t h w"],
        conditioning: Float[Tensor, "b c t h w"],
        rays: Float[Tensor, "b r t h w"],
        correspondence: Float[Tensor, "b s t h w"],
        text: Float[Tensor, "b l e"],
        image: Float[Tensor, "b m f"],
        timestep: Float[Tensor, "b"],
    ) -> Float[Tensor, "b c g h w"]:
        """Velocity of the target latents.

        Args:
            hidden_states: clean history latents, then noisy targets.
            mask: four mask channels for each latent, one a frame.
            conditioning: history latents, then the encoded appearance warp.
            rays: camera rays folded to latent cells.
            correspondence: warped canonical coordinates and depth folded to latent cells; values of the temporal
                history are ignored.
            text: text embedding. image: image embedding.
            timestep: in 0..1000, one for history and targets.
        """
        height, width = hidden_states.shape[-2:]
        tokens = self.embed_tokens(torch.cat([hidden_states, mask, conditioning], dim=1))
        camera = self.camera_tokens(rays)
        encoded, index = self.correspondence_tokens(correspondence)
        context = self.condition_embedder(timestep, text, image)
        angles = self.rotary_angles(height, width, tokens.device)
        for block in self.blocks:
            tokens = block(tokens, context.modulation, camera, encoded, index, context.text, context.image, angles)
        target_tokens = self.layout.targets.count * math.ceil(height / 2) * math.ceil(width / 2)
        out = self.unpatchify(self.head(tokens[:, -target_tokens:], context.time), height, width)
        if self.config.prediction == "residual":
            sigma = (timestep.float() / 1000).view(-1, 1, 1, 1, 1)
            targets = self.layout.targets
            sample = conditioning[:, :, targets.start : targets.stop].float() + out
            out = (hidden_states[:, :, targets.start : targets.stop].float() - sample) / sigma
        return out

    def embed_tokens(self, x: Float[Tensor, "b c t h w"]) -> Float[Tensor, "b n d"]:
        """Patch-embed each segment with its own linear map; history first, targets last."""
        parts = [
            embed(patchify(x[:, :, segment.start : segment.stop], base_patch(segment)))
            for embed, segment in zip(self.history_patch_embeddings, self.layout.history, strict=True)
        ]
        targets = self.layout.targets
        return torch.cat([*parts, self.patch_embedding(patchify(x[:, :, targets.start : targets.stop], (1, 2, 2)))], 1)

    def camera_tokens(self, rays: Float[Tensor, "b r t h w"]) -> Float[Tensor, "b n c"]:
        """Ray features of every token; packed tokens get the mean over what they cover."""
        base = fold_base_tokens(rays)
        segments = [*self.layout.history, self.layout.targets]
        return torch.cat([pool_tokens(base[:, :, s.start : s.stop], s.kernel) for s in segments], dim=1)

    def correspondence_tokens(
        self, correspondence: Float[Tensor, "b s t h w"]
    ) -> tuple[Float[Tensor, "b m e"], Tensor]:
        """Sine-cosine encoded coordinates of the spatial-history and target tokens, and those tokens' indices."""
        encoded, indices, first = [], [], 0
        height, width = (math.ceil(size / 2) for size in correspondence.shape[-2:])
        for segment in [*self.layout.history, self.layout.targets]:
            count = math.prod(
                -(-size // k) for size, k in zip((segment.count, height, width), segment.kernel, strict=True)
            )
            if segment.spatial or segment is self.layout.targets:
                part = correspondence[:, :, segment.start : segment.stop]
                k = segment.kernel[1]
                if k > 1:  # Averaged over latent cells before folding, so that one folded token remains per group.
                    part = F.avg_pool3d(pad_to_multiple(part, (1, 2 * k, 2 * k)).float(), (1, k, k))
                values = fold_base_tokens(part).flatten(2).transpose(1, 2)
                encoded.append(sine_cosine(values, self.config.correspondence_frequencies))
                indices.append(torch.arange(first, first + count, device=correspondence.device))
            first += count
        return torch.cat(encoded, dim=1).to(self.dtype), torch.cat(indices)

    def rotary_angles(self, height: int, width: int, device: torch.device) -> Float[Tensor, "n half"]:
        """Rotary angles of all tokens for a latent size, remembered between calls."""
        key = (height, width)
        if key not in self._angles:
            rows, columns = math.ceil(height / 2), math.ceil(width / 2)
            self._angles[key] = packed_angles(self.layout, rows, columns, self.config.dim // self.config.num_heads)
        if self._angles[key].device != device:
            self._angles[key] = self._angles[key].to(device)
        return self._angles[key]

    def head(self, tokens: Float[Tensor, "b n d"], time: Float[Tensor, "b d"]) -> Float[Tensor, "b m p"]:
        """Modulated output projection of the target tokens, in float32 (released code)."""
        shift, scale = (self.scale_shift_table.float() + time[:, None]).chunk(2, dim=1)
        normed = self.norm_out(tokens.float()) * (1 + scale) + shift
        return F.linear(normed, self.proj_out.weight.float(), self.proj_out.bias.float())

    def unpatchify(self, x: Float[Tensor, "b m p"], height: int, width: int) -> Float[Tensor, "b c g h w"]:
        """Tokens to latents; inside a token the order is (row, column, channel), channel fastest (released code)."""
        b, frames = x.shape[0], self.layout.targets.count
        rows, columns = math.ceil(height / 2), math.ceil(width / 2)
        x = x.reshape(b, frames, rows, columns, 2, 2, -1).permute(0, 6, 1, 2, 4, 3, 5)
        return x.reshape(b, -1, frames, rows * 2, columns * 2)[..., :height, :width]


def base_patch(segment: Segment) -> tuple[int, int, int]:
    """Latent cells of one token: the packing kernel times the base patch (1, 2, 2)."""
    return segment.kernel[0], segment.kernel[1] * 2, segment.kernel[2] * 2


def split_heads(x: Float[Tensor, "b n d"], heads: int) -> Float[Tensor, "b heads n e"]:
    """Separate the heads and put them before the tokens."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def sine_cosine(values: Float[Tensor, "b n d"], frequencies: int) -> Float[Tensor, "b n e"]:
    """[sin(pi v), cos(pi v), sin(2 pi v), cos(2 pi v), ...], one block of d values each (released code)."""
    values = values.float()
    parts = []
    for octave in range(frequencies):
        angle = values * (math.pi * 2**octave)
        parts += [angle.sin(), angle.cos()]
    return torch.cat(parts, dim=-1)
