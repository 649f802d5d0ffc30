"""Which chunk may show a place that several chunks have seen? The one whose camera was nearest (frustum ownership).

A wall that is seen again is stored once by each chunk; where the copies are not equally good, the one seen from nearer
by is. `owned_reference` is the obvious twin of `owned`. Knows no network and does not align chunks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lyra.geometry.cameras import project
from lyra.reconstruction.chunks import take
from lyra.types import Cameras, GaussianScene

NEAR, FAR = 0.01, 1e6
"""Depths that a frustum spans, in scene units (released code)."""
RELEASED_MAX_DIFF = 1.0
"""Difference of distances, in scene units, up to which the second nearest chunk keeps its Gaussians (released code,
whose unit is a guess at a metre)."""
MAX_DIFF_SHARE = 0.2
"""The same as a share of the median distance: the released metre in a scene that is five metres away."""
POINTS_FOR_MEDIAN = 4096
BATCH = 10240
"""Gaussians at once (released code)."""


def prune_foreign(
    parts: Sequence[GaussianScene],
    cameras: Sequence[Cameras],
    *,
    max_diff: float | None = None,
    batch: int = BATCH,
    device: torch.device | None = None,
) -> list[GaussianScene]:
    """Each chunk's Gaussians without those that another chunk owns.

    Args:
        parts: Gaussians of each chunk, all in one world.
        cameras: views of each chunk in that world.
        max_diff: see `owned`; by default `MAX_DIFF_SHARE` of the median distance from a Gaussian to its nearest view.
        batch: Gaussians at once.
        device: where it is computed; that of the Gaussians by default.
    """
    if len(parts) < 2:
        return list(parts)
    if max_diff is None:
        max_diff = MAX_DIFF_SHARE * median_distance(parts, cameras)
    return [
        take(part, owned(part.means, index, cameras, max_diff=max_diff, batch=batch, device=device))
        for index, part in enumerate(parts)
    ]


def owned(
    means: Float[Tensor, "n 3"],
    chunk: int,
    cameras: Sequence[Cameras],
    *,
    max_diff: float,
    batch: int = BATCH,
    device: torch.device | None = None,
) -> Bool[Tensor, "n"]:
    """Which of a chunk's Gaussians it may keep (released rule).

    A chunk's distance to a Gaussian is that of its nearest camera whose frustum contains it, infinite where there is
    none. The chunk keeps what no other chunk is nearer to, and where one other is nearer by less than `max_diff`.

    Args:
        means: centres of the Gaussians of `chunk`.
        chunk: which of the chunks.
        cameras: views of all chunks.
        max_diff: in scene units.
        batch: Gaussians at once.
        device: where it is computed; that of `means` by default.
    """
    place = means.device if device is None else device
    views = [group.to(place) for group in cameras]
    kept = []
    for points in means.split(batch):
        distances = torch.stack([frustum_distance(points.to(place), group) for group in views])
        own = distances[chunk]
        nearer = distances < own
        close = own - distances.amin(dim=0) < max_diff
        count = nearer.sum(dim=0)
        kept.append(((count == 0) | ((count == 1) & close)).to(means.device))
    return torch.cat(kept) if kept else torch.zeros(0, dtype=torch.bool, device=means.device)


def frustum_distance(points: Float[Tensor, "n 3"], cameras: Cameras) -> Float[Tensor, "n"]:
    """Distance to the nearest camera whose frustum contains a point, infinite where there is none."""
    w2c = cameras.w2c.to(points)
    rotation, translation = w2c[:, :3, :3], w2c[:, :3, 3]
    projection = cameras.intrinsics.to(points) @ rotation
    offset = (cameras.intrinsics.to(points) @ translation[..., None])[..., 0]
    x, y, z = (points @ projection[:, row].T + offset[:, row] for row in range(3))
    inside = (z > NEAR) & (z < FAR) & (x >= 0) & (y >= 0)
    inside &= (x < cameras.image_width * z) & (y < cameras.image_height * z)
    centres = -(rotation.transpose(1, 2) @ translation[..., None])[..., 0]
    # The fast form of cdist subtracts squares, which loses the distances that are compared here.
    distance = torch.cdist(points, centres, compute_mode="donot_use_mm_for_euclid_dist")
    return torch.where(inside, distance, torch.inf).amin(dim=1)


def owned_reference(
    means: Float[Tensor, "n 3"], chunk: int, cameras: Sequence[Cameras], *, max_diff: float
) -> Bool[Tensor, "n"]:
    """The slow twin of `owned`: one Gaussian, one chunk and one camera at a time."""
    keep = []
    for point in means:
        distances = []
        for group in cameras:
            nearest = math.inf
            for index in range(len(group)):
                pixel, depth = project(point, group.w2c[index].to(point), group.intrinsics[index].to(point))
                x, y = pixel.tolist()
                inside = 0 <= x < group.image_width and 0 <= y < group.image_height
                if inside and NEAR < float(depth) < FAR:
                    nearest = min(nearest, float((group.centres[index].to(point) - point).norm()))
            distances.append(nearest)
        own = distances[chunk]
        nearer = [distance for distance in distances if distance < own]
        keep.append(not nearer or (len(nearer) == 1 and own - nearer[0] < max_diff))
    return torch.tensor(keep, dtype=torch.bool, device=means.device)


def median_distance(parts: Sequence[GaussianScene], cameras: Sequence[Cameras]) -> float:
    """Median distance from a chunk's Gaussians to its nearest view that contains them; 0 where there are none."""
    distances = []
    for part, group in zip(parts, cameras, strict=True):
        step = max(1, len(part) // POINTS_FOR_MEDIAN)
        distance = frustum_distance(part.means[::step], group.to(part.means.device))
        distances.append(distance[distance.isfinite()].cpu())
    together = torch.cat(distances)
    return float(together.median()) if len(together) else 0.0
