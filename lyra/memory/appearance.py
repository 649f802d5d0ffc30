"""Pixels that were seen before, drawn into new views at full resolution, and how unseen ones are filled smoothly.

The photo comes first: a pixel that it shows is always taken from it; later frames only fill what it does not show.
Used where the model's settings ask to keep seen pixels, and to condition the network. Knows no network.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from lyra.geometry.resample import Surface, draw_surface, enlarge_depth, make_surface, resample
from lyra.types import Cameras

DEPTH_SLACK = 0.08
"""A later frame replaces an earlier one only where it is nearer by this share of the depth."""
NEAREST_SHARE = 0.02
"""Surfaces nearer than this share of the photo's median depth are not drawn: they would cover the view."""


@dataclass(frozen=True)
class SeenFrame:
    """A frame whose pixels may be shown again."""

    image: Float[Tensor, "3 h w"]
    """At output resolution, in [-1, 1]."""
    surface: Surface


@dataclass(frozen=True)
class SeenView:
    """What the remembered frames show of one new view."""

    image: Float[Tensor, "3 h w"]
    """0 where nothing is seen."""
    seen: Bool[Tensor, "h w"]
    depth: Float[Tensor, "h w"]
    """z depth of the seen surface; infinite elsewhere."""


def remember_pixels(
    image: Float[Tensor, "3 h w"],
    depth: Float[Tensor, "h w"],
    w2c: Float[Tensor, "4 4"],
    intrinsics: Float[Tensor, "3 3"],
) -> SeenFrame:
    """A frame with depth, ready to be drawn; the depth map may be smaller than the image."""
    height, width = image.shape[-2:]
    if depth.shape != (height, width):
        depth = enlarge_depth(depth, (height, width))
    return SeenFrame(image, make_surface(depth, w2c, intrinsics))


def draw_seen(frames: Sequence[SeenFrame], cameras: Cameras, threads: int = 2) -> list[SeenView]:
    """Draw remembered frames, most trusted first, into each camera."""
    images = torch.stack([frame.image for frame in frames])

    def draw(index: int) -> SeenView:
        return draw_view(frames, images, cameras[index])

    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(draw, range(len(cameras))))


def draw_view(frames: Sequence[SeenFrame], images: Float[Tensor, "k 3 h w"], camera: Cameras) -> SeenView:
    """One camera's view: nearest surface wins, earlier frames win ties."""
    height, width = camera.image_height, camera.image_width
    depth = torch.full((height, width), torch.inf)
    coordinates = torch.zeros(height, width, 2)
    source = torch.full((height, width), -1, dtype=torch.int32)
    for index, frame in enumerate(frames):
        view = draw_surface(frame.surface, camera.w2c[0], camera.intrinsics[0], height, width)
        nearer = view.depth < depth * (1 - DEPTH_SLACK)
        depth = torch.where(nearer, view.depth, depth)
        coordinates = torch.where(nearer[..., None], view.coordinates, coordinates)
        source = torch.where(nearer, index, source)
    seen = source >= 0
    return SeenView(resample(images, coordinates, source).clamp(-1, 1), seen, depth)


def visibility_channels(
    seen: Bool[Tensor, "n h w"], latent_height: int, latent_width: int, frames_per_latent: int = 4
) -> Float[Tensor, "1 f t h2 w2"]:
    """Share of seen pixels in each latent cell, one channel for each frame of a latent (Wan's mask order)."""
    share = F.adaptive_avg_pool2d(seen[:, None].float(), (latent_height, latent_width))[:, 0]
    return share.unflatten(0, (-1, frames_per_latent)).transpose(0, 1)[None]
