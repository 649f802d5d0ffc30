"""Everything the loop carries from chunk to chunk, and the record by which one finished chunk changes it.

A record is the only way in which the state changes, both right after generating and when a run is resumed, so that a
resumed run gives the same bytes. Knows tensors and names, no files.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from lyra.memory.spatial_cache import SpatialCache
from lyra.models.streaming import Cache, cache_from_tensors, cache_tensors
from lyra.types import Cameras


@dataclass(frozen=True)
class ChunkRecord:
    """What one chunk leaves behind, besides its video."""

    latents: Float[Tensor, "1 z g h w"]
    """Re-encoded latents of the new frames."""
    measured_ids: Int[Tensor, "m"]
    """Absolute numbers of the frames with measured depth, ascending; the last is the chunk's last frame."""
    depth: Float[Tensor, "m h w"]
    """Their depth at generation size, in the units of the photo's depth."""
    images: Float[Tensor, "m 3 h w"]
    """The same frames at generation size."""
    pixels: UInt8[Tensor, "m 3 h2 w2"]
    """The same frames at output size."""
    retrieved_ids: Int[Tensor, "r"]
    """Frames that were shown to the network, worst first."""
    encoder_cache: Cache
    decoder_cache: Cache

    def to_tensors(self) -> dict[str, Tensor]:
        """Named tensors, ready for safetensors."""
        named = {
            "latents": self.latents,
            "measured_ids": self.measured_ids,
            "depth": self.depth,
            "images": self.images,
            "pixels": self.pixels,
            "retrieved_ids": self.retrieved_ids,
        }
        for prefix, cache in (("encoder_cache", self.encoder_cache), ("decoder_cache", self.decoder_cache)):
            named |= {f"{prefix}/{name}": tensor for name, tensor in cache_tensors(cache).items()}
        return {name: tensor.contiguous() for name, tensor in named.items()}

    def to(self, device: torch.device) -> ChunkRecord:
        """The same record with its tensors on a device; frame numbers and caches stay where they are."""
        on_cpu = ("measured_ids", "retrieved_ids")
        return ChunkRecord.from_tensors(
            {
                name: value if name in on_cpu or "cache/" in name else value.to(device)
                for name, value in self.to_tensors().items()
            }
        )

    @classmethod
    def from_tensors(cls, named: dict[str, Tensor]) -> ChunkRecord:
        """The inverse of `to_tensors`."""
        caches: dict[str, Any] = {}
        for prefix in ("encoder_cache", "decoder_cache"):
            start = f"{prefix}/"
            caches[prefix] = cache_from_tensors({k[len(start) :]: v for k, v in named.items() if k.startswith(start)})
        fields: dict[str, Any] = {k: v for k, v in named.items() if "/" not in k}
        return cls(**fields, **caches)


@dataclass
class WalkState:
    """The history, the memory and the caches after some chunks."""

    cameras: Cameras
    """The whole path at generation size, frame 0 first."""
    history: Float[Tensor, "1 z n h w"]
    """All latents so far; the photo's repetitions come first."""
    encoder_cache: Cache
    decoder_cache: Cache
    memory: SpatialCache
    images: dict[int, Float[Tensor, "3 h w"]]
    """Remembered frames at generation size, by frame number."""
    pixels: dict[int, UInt8[Tensor, "3 h2 w2"]]
    """The same at output size."""
    buffer_depth: Float[Tensor, "h w"]
    """Depth of the newest frame."""
    memory_stride: int
    """Every n-th frame is remembered."""
    finished_frames: int = 0
    """Number of the newest frame; 0 when only the photo is there."""
    depths: dict[int, Float[Tensor, "h w"]] = field(default_factory=dict)
    """All measured depth by frame number."""

    def apply(self, record: ChunkRecord) -> None:
        """Take in a finished chunk."""
        self.history = torch.cat([self.history, record.latents], dim=2)
        self.encoder_cache, self.decoder_cache = record.encoder_cache, record.decoder_cache
        ids = record.measured_ids.tolist()
        for index, frame in enumerate(ids):
            self.depths[frame] = record.depth[index]
            remembered = frame % self.memory_stride == 0 and frame not in self.memory
            if remembered:
                w2c, intrinsics = self.cameras.w2c[frame], self.cameras.intrinsics[frame]
                self.memory.write(frame, record.depth[index], w2c, intrinsics)
            if remembered or frame == ids[-1]:
                self.images[frame], self.pixels[frame] = record.images[index], record.pixels[index]
        self.buffer_depth, self.finished_frames = record.depth[-1], ids[-1]
