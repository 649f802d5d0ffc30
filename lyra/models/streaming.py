"""One interface for both causal autoencoders: videos are encoded and decoded in pieces with a kept cache.

`TinyCausalAutoencoder` has the interface itself; `StreamingWanAutoencoder` gives it to diffusers' AutoencoderKLWan.
Decoded pixels are not clamped, because the history is re-encoded from them (released code).
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

Cache = dict[str, Any]
"""What a causal autoencoder remembers between pieces; empty at the start of a video."""

LISTS = "features"
"""How names of cache entries begin that are lists, one element for each causal convolution."""

PIECE_LATENTS = 4
"""Latents per piece of a long encode or decode, which bounds memory."""


class StreamingAutoencoder(Protocol):
    """A causal video autoencoder with normalised latents; inputs of any number format are cast to its own."""

    spatial_stride: int
    temporal_stride: int

    def encode_piece(self, frames: Float[Tensor, "b 3 t h w"], cache: Cache) -> Float[Tensor, "b z t4 h2 w2"]:
        """Latents of the next frames; the first frame of a video stands alone, later ones come in fours."""
        ...

    def decode_piece(self, latents: Float[Tensor, "b z t h w"], cache: Cache) -> Float[Tensor, "b 3 t4 h2 w2"]:
        """Frames of the next latents, not clamped."""
        ...


class StreamingWanAutoencoder:
    """Drives the encoder and decoder inside AutoencoderKLWan latent by latent with persistent caches.

    The posterior mean is used and normalised with the model's own statistics (released code).
    """

    spatial_stride = 8
    temporal_stride = 4
    caches_on_host = False
    """Whether caches stay in host memory while a video is encoded or decoded."""

    def __init__(self, vae: Any) -> None:
        self.vae = vae
        self.mean = torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1, 1)
        self.std = torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1)

    @torch.no_grad()
    def encode_piece(self, frames: Float[Tensor, "b 3 t h w"], cache: Cache) -> Float[Tensor, "b z t4 h2 w2"]:
        """Latents of the next frames."""
        start, latents, frames = 0, [], frames.to(self.vae.dtype)
        while start < frames.shape[2]:
            size = 1 if not cache else self.temporal_stride
            features = cache.setdefault("features", [None] * causal_convolutions(self.vae.encoder))
            piece = self.vae.encoder(frames[:, :, start : start + size], feat_cache=features, feat_idx=[0])
            latents.append(self.vae.quant_conv(piece).chunk(2, dim=1)[0])
            start += size
        z = torch.cat(latents, dim=2)
        return (z - self.mean.to(z)) / self.std.to(z)

    @torch.no_grad()
    def decode_piece(self, latents: Float[Tensor, "b z t h w"], cache: Cache) -> Float[Tensor, "b 3 t4 h2 w2"]:
        """Frames of the next latents, one latent at a time."""
        latents = latents.to(self.vae.dtype)
        z = self.vae.post_quant_conv(latents * self.std.to(latents) + self.mean.to(latents))
        frames = []
        for index in range(z.shape[2]):
            first = not cache
            features = cache.setdefault("features", [None] * causal_convolutions(self.vae.decoder))
            frames.append(
                self.vae.decoder(z[:, :, index : index + 1], feat_cache=features, feat_idx=[0], first_chunk=first)
            )
        return torch.cat(frames, dim=2)


def causal_convolutions(module: torch.nn.Module) -> int:
    """How many causal convolutions a Wan encoder or decoder has, each with one cache entry."""
    return sum(type(m).__name__ == "WanCausalConv3d" for m in module.modules())


def encode_video(
    autoencoder: StreamingAutoencoder, frames: Float[Tensor, "b 3 t h w"], cache: Cache
) -> Float[Tensor, "b z t4 h2 w2"]:
    """Encode frames piece by piece, going on from a cache."""
    stride = autoencoder.temporal_stride
    first = 1 if not cache else 0
    parts = [autoencoder.encode_piece(frames[:, :, :1], cache)] if first else []
    for start in range(first, frames.shape[2], stride * PIECE_LATENTS):
        parts.append(autoencoder.encode_piece(frames[:, :, start : start + stride * PIECE_LATENTS], cache))
    return torch.cat(parts, dim=2)


def decode_video(
    autoencoder: StreamingAutoencoder, latents: Float[Tensor, "b z t h w"], cache: Cache
) -> Float[Tensor, "b 3 t4 h2 w2"]:
    """Decode latents piece by piece, going on from a cache."""
    pieces = latents.split(PIECE_LATENTS, dim=2)
    return torch.cat([autoencoder.decode_piece(piece, cache) for piece in pieces], dim=2)


def encode_repeated(
    autoencoder: StreamingAutoencoder, image: Float[Tensor, "b 3 h w"], frames: int, cache: Cache
) -> Float[Tensor, "b z n h2 w2"]:
    """Encode a video that repeats one image, from an empty cache.

    A causal encoder's cache stops changing after a few repetitions, and from then on every latent is the same, so the
    rest is copied: the result is that of encoding every frame.
    """
    stride = autoencoder.temporal_stride
    latents = [autoencoder.encode_piece(image[:, :, None], cache)]
    clip = image[:, :, None].expand(-1, -1, stride, -1, -1)
    while len(latents) < 1 + (frames - 1) // stride:
        before = copy_cache(cache)
        latents.append(autoencoder.encode_piece(clip, cache))
        if same_cache(before, cache):
            latents += [latents[-1]] * (1 + (frames - 1) // stride - len(latents))
    return torch.cat(latents, dim=2)


def prime_decoder(autoencoder: StreamingAutoencoder, latents: Float[Tensor, "b z n h w"], cache: Cache) -> None:
    """Decode a repeated image's latents for their effect on the cache, up to where it stops changing."""
    for index in range(latents.shape[2]):
        before = copy_cache(cache)
        autoencoder.decode_piece(latents[:, :, index : index + 1], cache)
        settled = index > 0 and torch.equal(latents[:, :, index], latents[:, :, -1])
        if settled and same_cache(before, cache):
            return


def same_cache(a: Cache, b: Cache) -> bool:
    """Whether two caches hold the same values."""
    first, second = cache_tensors(a), cache_tensors(b)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def cache_tensors(cache: Cache) -> dict[str, Tensor]:
    """A cache as named tensors, for saving; entries that are not tensors are kept under a marker name."""
    named: dict[str, Tensor] = {}
    for name, value in cache.items():
        if isinstance(value, Tensor):
            named[name] = value
            continue
        for index, entry in enumerate(value):
            # Wan's temporal upsampling marks its first use by a word instead of a tensor.
            place = f"{name}.{index}" if isinstance(entry, Tensor) else f"{name}.{index}.{entry}"
            named[place] = entry if isinstance(entry, Tensor) else torch.zeros(1)
    return named


def cache_from_tensors(named: dict[str, Tensor]) -> Cache:
    """The inverse of `cache_tensors`."""
    cache: Cache = {}
    lists: dict[str, dict[int, Any]] = {}
    for name, tensor in named.items():
        if not name.startswith(LISTS):
            cache[name] = tensor
            continue
        prefix, index, *word = name.split(".")
        lists.setdefault(prefix, {})[int(index)] = tensor if not word else (None if word[0] == "None" else word[0])
    return cache | {name: [entries[i] for i in range(len(entries))] for name, entries in lists.items()}


def copy_cache(cache: Cache) -> Cache:
    """A cache that can be carried on without changing the original; tensors are shared, never written in place."""
    return {name: list(value) if isinstance(value, list) else value for name, value in cache.items()}


def cache_to(cache: Cache, device: torch.device) -> Cache:
    """A cache with its tensors on a device."""

    def moved(value: Any) -> Any:
        if isinstance(value, list):
            return [moved(entry) for entry in value]
        return value.to(device) if isinstance(value, Tensor) else value

    return {name: moved(value) for name, value in cache.items()}
