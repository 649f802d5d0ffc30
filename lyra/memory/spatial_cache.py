"""The spatial memory's store: per frame its depth, camera and a sparse world point cloud; frames are never fused.

Knows nothing about which frames are useful; `lyra.memory.retrieval` decides that.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from lyra.geometry.cameras import unproject

POINT_STRIDE = 4
"""Depth is thinned by this before it becomes points (released code; the paper says 8)."""


@dataclass(frozen=True)
class MemoryFrame:
    """One remembered frame."""

    frame_id: int
    """Absolute frame number; 0 is the photo."""
    depth: Float[Tensor, "h w"]
    w2c: Float[Tensor, "4 4"]
    intrinsics: Float[Tensor, "3 3"]
    points: Float[Tensor, "h4 w4 3"]
    """World points of every fourth pixel; where depth is 0 they sit at the world's origin (released code)."""


@dataclass
class SpatialCache:
    """Remembered frames in the order in which they were written."""

    frames: list[MemoryFrame] = field(default_factory=list)

    def __contains__(self, frame_id: int) -> bool:
        return any(frame.frame_id == frame_id for frame in self.frames)

    def write(
        self, frame_id: int, depth: Float[Tensor, "h w"], w2c: Float[Tensor, "4 4"], intrinsics: Float[Tensor, "3 3"]
    ) -> None:
        """Remember a frame."""
        self.frames.append(MemoryFrame(frame_id, depth, w2c, intrinsics, sparse_points(depth, w2c, intrinsics)))

    def read(self, frame_id: int) -> MemoryFrame:
        """The remembered frame of that number.

        Raises:
            KeyError: it was never written.
        """
        for frame in self.frames:
            if frame.frame_id == frame_id:
                return frame
        raise KeyError(f"frame {frame_id} is not in memory")

    @property
    def newest_id(self) -> int:
        """Largest frame number in memory."""
        return max(frame.frame_id for frame in self.frames)


def sparse_points(
    depth: Float[Tensor, "h w"], w2c: Float[Tensor, "4 4"], intrinsics: Float[Tensor, "3 3"]
) -> Float[Tensor, "h4 w4 3"]:
    """World points of the strided depth; K is scaled by 1/4 without a half-pixel shift (released code)."""
    small = depth[::POINT_STRIDE, ::POINT_STRIDE]
    points = unproject(small, w2c, scaled_intrinsics(intrinsics))
    return torch.where((small > 0)[..., None], points, torch.zeros_like(points))


def scaled_intrinsics(intrinsics: Float[Tensor, "3 3"]) -> Float[Tensor, "3 3"]:
    """K of the strided grid: focal lengths and principal point divided by the stride (released code)."""
    scale = torch.tensor([1 / POINT_STRIDE, 1 / POINT_STRIDE, 1.0], device=intrinsics.device)
    return intrinsics * scale[:, None]
