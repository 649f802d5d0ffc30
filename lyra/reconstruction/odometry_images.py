"""What does the visual odometry compare: grey pyramids of frames, and the points of frames whose depth is known.

A reference keeps, at each level, the pixels with the strongest gradient of small cells whose depth is known and
smooth. Knows no pose.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from lyra.export.video import Frames
from lyra.geometry.cameras import pixel_grid

LONGEST_SIDE = 416
"""Frames are aligned at most this large."""
SMALLEST_SIDE = 12
"""The coarsest level is at least this high and wide."""
MOST_LEVELS = 5
MOST_POINTS = 9000
"""About how many points a level has at most; cells are as large as that asks for."""
WEAKEST_GRADIENT = 0.004
"""Change of brightness (0 to 1) per pixel below which a pixel says nothing about motion."""
BEND = 0.10
"""Depth belongs to an edge where inverse depth bends by more than this share of itself."""
FARTHEST = 1e4
"""Depth is clamped to this, in scene units."""
KEPT_FRAMES = 48
"""Pyramids that are kept in memory."""
LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in brightness (BT.601)."""


@dataclass(frozen=True)
class Level:
    """A frame at one size."""

    image: Float[np.ndarray, "h w"]
    """Brightness in 0 to 1."""
    gradient_x: Float[np.ndarray, "h w"]
    gradient_y: Float[np.ndarray, "h w"]
    """Its change per pixel."""
    pinhole: Float[np.ndarray, "4"]
    """fx, fy, cx, cy in pixels of this level, pixel centres at integers."""


@dataclass(frozen=True)
class ReferencePoints:
    """Points of a frame at one level."""

    points: Float[np.ndarray, "p 3"]
    """In the frame's camera, in scene units."""
    values: Float[np.ndarray, "p"]
    """Brightness in 0 to 1."""
    gradients: Float[np.ndarray, "p"]
    """Its largest change per pixel."""


@dataclass(frozen=True)
class Reference:
    """A frame with depth, finest level first."""

    levels: tuple[ReferencePoints, ...]
    typical_depth: float
    """Harmonic mean of the finest level's points, in scene units: parallax is that of this depth, and sky has none."""

    @property
    def is_blank(self) -> bool:
        """True where too few pixels have both depth and a gradient for a pose to follow from them."""
        return len(self.levels[0].points) < FEWEST_POINTS


FEWEST_POINTS = 40
"""Fewest points of the finest level that a pose may follow from."""


class FrameStore:
    """Pyramids and references of the frames of a video, made when asked for; the latest ones are kept."""

    def __init__(
        self,
        frames: Frames,
        intrinsics: Float[Tensor, "t 3 3"],
        depths: Mapping[int, Float[Tensor, "h2 w2"]],
    ) -> None:
        self._frames, self._depths = frames, depths
        self._intrinsics = intrinsics.detach().double().cpu().numpy()
        self._frame_size = (frames.shape[-2], frames.shape[-1])
        self._sizes = level_sizes(*self._frame_size)
        self._pyramids: dict[int, tuple[Level, ...]] = {}
        self._references: dict[int, Reference] = {}

    @property
    def level_count(self) -> int:
        """Levels of every frame."""
        return len(self._sizes)

    @property
    def finest_size(self) -> tuple[int, int]:
        """Height and width of every frame's finest level."""
        return self._sizes[0]

    def finest_pinhole(self, frame: int) -> Float[np.ndarray, "4"]:
        """fx, fy, cx, cy of a frame's finest level."""
        return scaled_pinhole(self._intrinsics[frame], self._frame_size, self._sizes[0])

    def pyramid(self, frame: int) -> tuple[Level, ...]:
        """Levels of a frame, finest first."""
        if frame not in self._pyramids:
            self._pyramids[frame] = self._make_pyramid(frame)
            while len(self._pyramids) > KEPT_FRAMES:
                del self._pyramids[next(iter(self._pyramids))]
        return self._pyramids[frame]

    def reference(self, frame: int) -> Reference:
        """Points of a frame with depth."""
        if frame not in self._references:
            self._references[frame] = self._make_reference(frame)
            while len(self._references) > KEPT_FRAMES:
                del self._references[next(iter(self._references))]
        return self._references[frame]

    def _make_pyramid(self, frame: int) -> tuple[Level, ...]:
        rgb = self._frames[frame].detach().cpu().float() / 255
        grey = (rgb * torch.tensor(LUMA)[:, None, None]).sum(0)[None, None]
        levels = []
        for size in self._sizes:
            grey = F.interpolate(grey, size, mode="area") if grey.shape[-2:] != size else grey
            image = blurred(grey)[0, 0]
            padded = F.pad(image[None, None], (1, 1, 1, 1), mode="replicate")[0, 0]
            gradient_x, gradient_y = (
                (ahead - behind) / 2
                for ahead, behind in ((padded[1:-1, 2:], padded[1:-1, :-2]), (padded[2:, 1:-1], padded[:-2, 1:-1]))
            )
            pinhole = scaled_pinhole(self._intrinsics[frame], self._frame_size, size)
            levels.append(Level(image.numpy(), gradient_x.numpy(), gradient_y.numpy(), pinhole))
        return tuple(levels)

    def _make_reference(self, frame: int) -> Reference:
        inverse, usable = inverse_depth(self._depths[frame])
        levels = [
            strongest_points(level, *grown_inverse_depth(inverse, usable, size))
            for level, size in zip(self.pyramid(frame), self._sizes, strict=True)
        ]
        depth = levels[0].points[:, 2].astype(np.float64)
        return Reference(tuple(levels), float(1 / (1 / depth).mean()) if len(depth) else 1.0)


def level_sizes(height: int, width: int) -> list[tuple[int, int]]:
    """Heights and widths of the levels, finest first."""
    scale = min(1.0, LONGEST_SIDE / max(height, width))
    sizes = [(max(1, round(height * scale)), max(1, round(width * scale)))]
    while len(sizes) < MOST_LEVELS and min(sizes[-1]) // 2 >= SMALLEST_SIDE:
        sizes.append((round(sizes[-1][0] / 2), round(sizes[-1][1] / 2)))
    return sizes


def blurred(image: Float[Tensor, "1 1 h w"]) -> Float[Tensor, "1 1 h w"]:
    """The image under a binomial filter of three pixels, so that gradients hold for as far as a step may reach."""
    row = torch.tensor([0.25, 0.5, 0.25])
    kernel = (row[:, None] * row)[None, None]
    return F.conv2d(F.pad(image, (1, 1, 1, 1), mode="replicate"), kernel)


def scaled_pinhole(
    intrinsics: Float[np.ndarray, "3 3"], size: tuple[int, int], new_size: tuple[int, int]
) -> Float[np.ndarray, "4"]:
    """fx, fy, cx, cy of an image that is stretched to a new (height, width); pixel centres stay at integers."""
    sy, sx = new_size[0] / size[0], new_size[1] / size[1]
    cx, cy = (intrinsics[0, 2] + 0.5) * sx - 0.5, (intrinsics[1, 2] + 0.5) * sy - 0.5
    return np.array([intrinsics[0, 0] * sx, intrinsics[1, 1] * sy, cx, cy])


def usable_depth(depth: Float[Tensor, "*batch"]) -> Bool[Tensor, "*batch"]:
    """True where depth is a positive number."""
    return depth.isfinite() & (depth > 0)


def inverse_depth(depth: Float[Tensor, "h w"]) -> tuple[Float[Tensor, "1 1 h w"], Float[Tensor, "1 1 h w"]]:
    """Inverse depth with 0 where there is none, and 1 where there is."""
    depth = depth.detach().cpu().float()[None, None]
    usable = usable_depth(depth)
    return torch.where(usable, 1 / depth.clamp(min=1e-6, max=FARTHEST), torch.zeros_like(depth)), usable.float()


def grown_inverse_depth(
    inverse: Float[Tensor, "1 1 h w"], usable: Float[Tensor, "1 1 h w"], size: tuple[int, int]
) -> tuple[Float[Tensor, "h2 w2"], Bool[Tensor, "h2 w2"]]:
    """Inverse depth at a size in which what is near has grown over its edges, and where it is known.

    An outline moves with the surface in front, while its gradient reaches a little over the surface behind.
    """
    smaller = (min(inverse.shape[-2], size[0]), min(inverse.shape[-1], size[1]))
    if smaller != inverse.shape[-2:]:
        usable = F.interpolate(usable, smaller, mode="area")
        inverse = F.interpolate(inverse, smaller, mode="area") / usable.clamp(min=1e-6)
    edge = F.max_pool2d(bent(inverse).float(), 3, stride=1, padding=1) > 0
    inverse = torch.where(edge, F.max_pool2d(inverse, 5, stride=1, padding=2), inverse)
    known = ((usable > 0.99) | edge) & (inverse > 0) & ~bent(inverse)
    weight = F.interpolate(known.float(), size, mode="bilinear")
    return F.interpolate(inverse, size, mode="bilinear")[0, 0], weight[0, 0] > 0.99


def bent(inverse: Float[Tensor, "1 1 h w"]) -> Bool[Tensor, "1 1 h w"]:
    """True where inverse depth is not locally linear, as on both sides of a depth edge."""
    bend = torch.zeros_like(inverse)
    bend[..., 1:-1] = (inverse[..., 2:] - 2 * inverse[..., 1:-1] + inverse[..., :-2]).abs()
    bend[..., 1:-1, :] = torch.maximum(
        bend[..., 1:-1, :], (inverse[..., 2:, :] - 2 * inverse[..., 1:-1, :] + inverse[..., :-2, :]).abs()
    )
    return bend > BEND * inverse


def strongest_points(level: Level, inverse: Float[Tensor, "h w"], known: Bool[Tensor, "h w"]) -> ReferencePoints:
    """The pixel with the strongest gradient of each cell, among those whose depth is known."""
    height, width = inverse.shape
    strength = torch.from_numpy(np.hypot(level.gradient_x, level.gradient_y))
    strength = torch.where(known, strength, torch.zeros_like(strength))
    cell = max(1, min(round((height * width / MOST_POINTS) ** 0.5), height, width))
    best, index = F.max_pool2d(strength[None, None], cell, return_indices=True)
    chosen = index[best > WEAKEST_GRADIENT]
    pixels = pixel_grid(height, width).reshape(-1, 3)[chosen].double().numpy()
    fx, fy, cx, cy = level.pinhole
    rays = (pixels - np.array([cx, cy, 0.0])) / np.array([fx, fy, 1.0])
    depth = 1 / inverse.flatten()[chosen].double().numpy()
    values = level.image.reshape(-1)[chosen.numpy()]
    gradients = strength.flatten()[chosen].numpy()
    return ReferencePoints(np.ascontiguousarray(rays * depth[:, None], dtype=np.float32), values, gradients)
