"""The Wan autoencoder on overlapping tiles: less memory on the device, streamed latent by latent all the same.

Each tile is a video of its own with a cache of its own, which waits in host memory; overlaps are blended linearly, as
diffusers' tiled decoding does for whole videos. The network's attention sees one tile at a time, so results differ
slightly from whole frames. Knows nothing of the loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lyra.models.streaming import Cache, StreamingWanAutoencoder, cache_to

TILE, STEP = 256, 192
"""Side of a tile and distance between tiles in pixels (diffusers' AutoencoderKLWan)."""


@dataclass(frozen=True)
class Tile:
    """Where a tile lies, in latent cells."""

    top: int
    left: int
    bottom: int
    right: int

    def of(self, x: Float[Tensor, "b c t h w"], scale: int) -> Float[Tensor, "b c t h2 w2"]:
        """The tile's part of a tensor with `scale` elements a cell."""
        return x[..., self.top * scale : self.bottom * scale, self.left * scale : self.right * scale]


class TiledWanAutoencoder(StreamingWanAutoencoder):
    """A `StreamingWanAutoencoder` that works tile by tile."""

    caches_on_host = True

    def encode_piece(self, frames: Float[Tensor, "b 3 t h w"], cache: Cache) -> Float[Tensor, "b z t4 h2 w2"]:
        """Latents of the next frames."""
        height, width = (side // self.spatial_stride for side in frames.shape[-2:])
        return self._blend(frames, cache, super().encode_piece, (height, width), self.spatial_stride, 1)

    def decode_piece(self, latents: Float[Tensor, "b z t h w"], cache: Cache) -> Float[Tensor, "b 3 t4 h2 w2"]:
        """Frames of the next latents, not clamped."""
        height, width = latents.shape[-2:]
        return self._blend(latents, cache, super().decode_piece, (height, width), 1, self.spatial_stride)

    def _blend(
        self,
        x: Float[Tensor, "b c t h w"],
        cache: Cache,
        run: Callable[[Tensor, Cache], Tensor],
        cells: tuple[int, int],
        scale_in: int,
        scale_out: int,
    ) -> Float[Tensor, "b d t2 h2 w2"]:
        """Run every tile with its own cache and average where tiles overlap, each weighing less towards its edge."""
        total: Tensor | None = None
        weight = torch.zeros(cells[0] * scale_out, cells[1] * scale_out, device=x.device)
        known = {name: cache.pop(name) for name in list(cache)}
        for number, tile in enumerate(tiles(*cells)):
            own: Cache = {"features": known[f"features:{number}"]} if known else {}
            own = cache_to(own, x.device)
            part = run(tile.of(x, scale_in), own).float()
            cache[f"features:{number}"] = cache_to(own, torch.device("cpu"))["features"]
            if total is None:
                total = torch.zeros(*part.shape[:-2], *weight.shape, device=x.device)
            ramp = torch.outer(edge_ramp(part.shape[-2], x.device), edge_ramp(part.shape[-1], x.device))
            tile.of(total, scale_out).add_(part * ramp)
            weight[tile.top * scale_out : tile.bottom * scale_out, tile.left * scale_out : tile.right * scale_out] += (
                ramp
            )
        assert total is not None
        return (total / weight).to(self.vae.dtype)


def tiles(height: int, width: int, stride: int = 8) -> Iterator[Tile]:
    """Tiles of `TILE` pixels every `STEP` pixels that cover a frame, in latent cells; the last ones end at its edge."""
    size = TILE // stride

    def starts(length: int) -> list[int]:
        last = max(length - size, 0)
        return [*range(0, last, STEP // stride), last]

    for top in starts(height):
        for left in starts(width):
            yield Tile(top, left, min(top + size, height), min(left + size, width))


def edge_ramp(length: int, device: torch.device) -> Float[Tensor, "n"]:
    """Weights along one side of a tile: growing from the edges inwards, never zero."""
    position = torch.arange(length, device=device, dtype=torch.float32)
    return torch.minimum(position + 1, length - position)
