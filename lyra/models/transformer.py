"""The video transformer of Lyra 2.0: Wan 2.1's image-to-video blocks, packed history, rays and correspondences.

Rays and warped canonical coordinates are added to the input of the self-attention's queries and keys only, never to
values or to the residual stream (paper section 4; released code). One timestep serves history and targets. Parameter
names follow diffusers' WanTransformer3DModel where it has a counterpart. Knows no sampler, no camera and no file.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from lyra.models.blocks import BlockCache, Lyra2Block, TextCache, in_slices
from lyra.models.conditioning import ConditionEmbedder, Float32Linear
from lyra.models.framepack import (
    RELEASED_LAYOUT,
    FramePackLayout,
    Segment,
    fold_base_tokens,
    pad_to_multiple,
    patchify,
    pool_tokens,
)
from lyra.models.rope import packed_angles
from lyra.models.token_group import ALONE, TokenGroup


@dataclass
class ChunkCache:
    """What the transformer computes once per chunk and uses again in every step and guidance branch.

    Exact: none of it depends on the noise or the time. The first forward pass that gets an empty cache fills it; a
    cache must not outlive its conditions, a change of weights (LoRA), or a pass that failed.
    """

    history: Float[Tensor, "b h d"] | None = None
    """Embedded history tokens."""
    camera: Float[Tensor, "b n c"] | None = None
    """This process's share of the ray features."""
    index: Int[Tensor, "m"] | None = None
    """Which of this process's tokens have correspondences."""
    blocks: list[BlockCache] = field(default_factory=list)
    texts: dict[int, tuple[Tensor, list[TextCache]]] = field(default_factory=dict)
    """Cross-attention's keys and values by the identity of the text tensor, which is kept so that it stays unique."""


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
    _repeated_blocks = ("Lyra2Block",)
    KEPT_PRECISE = ("patch_embedding", "history_patch_embeddings", "condition_embedder", "norm", "proj_out")
    """Parts of module names that stay out of float8 storage and 4-bit weights: small, and they decide a lot."""
    _skip_layerwise_casting_patterns = KEPT_PRECISE

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
        sizes = (camera_channels * 4, correspondence_channels * 4, correspondence_frequencies, correspondence_squeeze)
        self.blocks = nn.ModuleList(Lyra2Block(dim, num_heads, ffn_dim, *sizes, eps) for _ in range(num_layers))
        self.norm_out = nn.LayerNorm(dim, eps, elementwise_affine=False)
        self.scale_shift_table = nn.Parameter(torch.randn(1, 2, dim) / math.sqrt(dim))
        self.proj_out = Float32Linear(dim, out_channels * 4)
        self._angles: dict[tuple[int, int], Tensor] = {}
        self.token_group = ALONE

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
        cache: ChunkCache | None = None,
    ) -> Float[Tensor, "b c g h w"]:
        """Velocity of the target latents, float32.

        Args:
            hidden_states: clean history latents, then noisy targets.
            mask: four mask channels for each latent, one a frame.
            conditioning: history latents, then the encoded appearance warp.
            rays: camera rays folded to latent cells.
            correspondence: warped canonical coordinates and depth folded to latent cells; values of the temporal
                history are ignored.
            text: text embedding. image: image embedding.
            timestep: in 0..1000, one for history and targets.
            cache: kept by the caller over the steps of one chunk, in which only targets, text and time change.
        """
        cache = ChunkCache() if cache is None else cache
        height, width = hidden_states.shape[-2:]
        x = torch.cat([hidden_states, mask, conditioning], dim=1).to(self.patch_embedding.weight.dtype)
        if cache.history is None:
            cache.history = self.embed_history(x)
        tokens = torch.cat([cache.history, self.embed_targets(x)], dim=1)
        group = self.token_group.sharing(tokens.shape[1])
        coordinates = self.fill(cache, rays, correspondence, group)
        time, modulation = self.condition_embedder.embed_time(timestep)
        text_caches = self.text_caches(cache, text)
        text_tokens, image_tokens = self.embed_context(text, image, text_caches[0])
        angles = self.rotary_angles(height, width, tokens.device)[group.share]
        tokens = tokens[:, group.share]
        for block, block_cache, text_cache in zip(self.blocks, cache.blocks, text_caches, strict=True):
            features = (cache.camera, coordinates, cache.index, text_tokens, image_tokens, angles)
            tokens = block(tokens, modulation, *features, block_cache, text_cache, group)
        target_tokens = self.layout.targets.count * math.ceil(height / 2) * math.ceil(width / 2)
        if group.size == 1:
            tokens = tokens[:, -target_tokens:]
        out = group.gather(self.head(tokens, time), dim=1)[:, -target_tokens:]
        out = self.unpatchify(out, height, width)
        if self.config.prediction == "residual":
            sigma = (timestep.float() / 1000).view(-1, 1, 1, 1, 1)
            targets = self.layout.targets
            sample = conditioning[:, :, targets.start : targets.stop].float() + out
            out = (hidden_states[:, :, targets.start : targets.stop].float() - sample) / sigma
        return out

    def fill(
        self,
        cache: ChunkCache,
        rays: Float[Tensor, "b r t h w"],
        correspondence: Float[Tensor, "b s t h w"],
        group: TokenGroup,
    ) -> Float[Tensor, "b m e"] | None:
        """Fill an empty cache; returns the coordinates that each block encodes and squeezes in the first pass."""
        if cache.index is not None:
            return None
        folded, index = self.correspondence_tokens(correspondence)
        cache.camera = self.camera_tokens(rays)[:, group.share].to(self.patch_embedding.weight.dtype)
        cache.index, part = group.own_index(index)
        cache.blocks = [BlockCache() for _ in self.blocks]
        return folded[:, part]

    def text_caches(self, cache: ChunkCache, text: Float[Tensor, "b l e"]) -> list[TextCache]:
        """The blocks' caches for a text; those of a new one have what the others know of the image."""
        if id(text) not in cache.texts:
            _, others = next(iter(cache.texts.values()), (None, [TextCache()] * len(self.blocks)))
            cache.texts[id(text)] = text, [TextCache(image=other.image) for other in others]
        return cache.texts[id(text)][1]

    def embed_context(
        self, text: Float[Tensor, "b l e"], image: Float[Tensor, "b m f"], known: TextCache
    ) -> tuple[Tensor | None, Tensor | None]:
        """Text and image tokens in the transformer's width; None once all blocks have their keys and values."""
        dtype, embedder = self.patch_embedding.weight.dtype, self.condition_embedder
        return (
            embedder.embed_text(text.to(dtype)) if known.text is None else None,
            embedder.image_embedder(image.to(dtype)) if known.image is None else None,
        )

    def embed_history(self, x: Float[Tensor, "b c t h w"]) -> Float[Tensor, "b h d"]:
        """Patch-embed each history segment with its own linear map."""
        parts = [
            embed(patchify(x[:, :, segment.start : segment.stop], base_patch(segment)))
            for embed, segment in zip(self.history_patch_embeddings, self.layout.history, strict=True)
        ]
        return torch.cat(parts, dim=1)

    def embed_targets(self, x: Float[Tensor, "b c t h w"]) -> Float[Tensor, "b g d"]:
        """Patch-embed the latents to generate."""
        targets = self.layout.targets
        return self.patch_embedding(patchify(x[:, :, targets.start : targets.stop], (1, 2, 2)))

    def camera_tokens(self, rays: Float[Tensor, "b r t h w"]) -> Float[Tensor, "b n c"]:
        """Ray features of every token; packed tokens get the mean over what they cover."""
        base = fold_base_tokens(rays)
        segments = [*self.layout.history, self.layout.targets]
        return torch.cat([pool_tokens(base[:, :, s.start : s.stop], s.kernel) for s in segments], dim=1)

    def correspondence_tokens(
        self, correspondence: Float[Tensor, "b s t h w"]
    ) -> tuple[Float[Tensor, "b m e"], Int[Tensor, "m"]]:
        """Coordinates of the spatial-history and target tokens, folded to tokens, and those tokens' indices."""
        folded, indices, first = [], [], 0
        height, width = (math.ceil(size / 2) for size in correspondence.shape[-2:])
        for segment in [*self.layout.history, self.layout.targets]:
            count = math.prod(
                -(-size // k) for size, k in zip((segment.count, height, width), segment.kernel, strict=True)
            )
            if segment.spatial or segment is self.layout.targets:
                part = correspondence[:, :, segment.start : segment.stop]
                k = segment.kernel[1]
                if k > 1:  # Averaged over latent cells before folding, so that one folded token remains per group.
                    part = F.avg_pool3d(pad_to_multiple(part, (1, k, k)).float(), (1, k, k))
                values = fold_base_tokens(part).flatten(2).transpose(1, 2)
                folded.append(values.to(correspondence.dtype))
                indices.append(torch.arange(first, first + count, device=correspondence.device))
            first += count
        return torch.cat(folded, dim=1), torch.cat(indices)

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
        return in_slices(lambda part: self.proj_out(self.norm_out(part.float()) * (1 + scale) + shift), tokens)

    def unpatchify(self, x: Float[Tensor, "b m p"], height: int, width: int) -> Float[Tensor, "b c g h w"]:
        """Tokens to latents; inside a token the order is (row, column, channel), channel fastest (released code)."""
        b, frames = x.shape[0], self.layout.targets.count
        rows, columns = math.ceil(height / 2), math.ceil(width / 2)
        x = x.reshape(b, frames, rows, columns, 2, 2, -1).permute(0, 6, 1, 2, 4, 3, 5)
        return x.reshape(b, -1, frames, rows * 2, columns * 2)[..., :height, :width]


def base_patch(segment: Segment) -> tuple[int, int, int]:
    """Latent cells of one token: the packing kernel times the base patch (1, 2, 2)."""
    return segment.kernel[0], segment.kernel[1] * 2, segment.kernel[2] * 2
