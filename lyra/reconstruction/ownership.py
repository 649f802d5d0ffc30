"""Which chunk may show a place that several chunks have seen? The one whose camera was nearest (frustum ownership).

A wall that is seen again is stored once by each chunk; where the copies are not equally good, the one seen from nearer
by is. The released rule lets a camera own all that its frustum contains, also what it cannot see: a chunk behind a wall
then owns what is before it, and nobody shows it. Depths of the views prevent that. `owned_reference` is the obvious
twin of `owned`. Knows no network and does not align chunks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from lyra.geometry.cameras import project
from lyra.reconstruction.chunks import LiftedChunk, take
from lyra.types import Cameras, GaussianScene

NEAR, FAR = 0.01, 1e6
"""Depths that a frustum spans, in scene units (released code)."""
RELEASED_MAX_DIFF = 1.0
"""Difference of distances, in scene units, up to which the second nearest chunk keeps its Gaussians (released code,
whose unit is a guess at a metre). By default there is none here: second copies cost as many Gaussians again, and views
of four procedural worlds were up to 0.9 dB worse with them."""
CELL = 2
"""Gaussians a side of the cells in which a view knows how far it sees."""
SAME_SURFACE = 0.05
"""What lies behind a cell's Gaussians by more than this share of their depth is hidden."""
BATCH = 10240
"""Gaussians at once (released code)."""


def prune_foreign(
    parts: Sequence[GaussianScene],
    cameras: Sequence[Cameras],
    *,
    depths: Sequence[Float[Tensor, "v r c"]] | None = None,
    max_diff: float | None = None,
    batch: int = BATCH,
    device: torch.device | None = None,
) -> list[GaussianScene]:
    """Each chunk's Gaussians without those that another chunk owns.

    Args:
        parts: Gaussians of each chunk, all in one world.
        cameras: views of each chunk in that world.
        depths: how far each chunk's views see, by `seen_depth`; without, through everything (released).
        max_diff: see `owned`; 0 by default.
        batch: Gaussians at once.
        device: where it is computed; that of the Gaussians by default.
    """
    if len(parts) < 2:
        return list(parts)
    most = 0.0 if max_diff is None else max_diff
    return [
        take(part, owned(part.means, index, cameras, depths=depths, max_diff=most, batch=batch, device=device))
        for index, part in enumerate(parts)
    ]


def seen_depth(chunk: LiftedChunk) -> Float[Tensor, "v r c"]:
    """How far each view of a chunk sees at each of its own Gaussians; 0 where none can be shown.

    It is the median z depth of `CELL` x `CELL` of them, so that a stray one does not count.
    """
    rows, columns = chunk.grid
    means = chunk.scene.means.unflatten(0, (len(chunk.cameras), -1))
    axis = chunk.cameras.w2c[:, 2].to(means)
    depth = torch.einsum("vnj,vj->vn", means, axis[:, :3]) + axis[:, 3:]
    depth = torch.where(chunk.usable.view_as(depth), depth, torch.nan).unflatten(1, (rows, columns))
    padded = F.pad(depth, (0, -columns % CELL, 0, -rows % CELL), value=torch.nan)
    cells = padded.unfold(1, CELL, CELL).unfold(2, CELL, CELL).flatten(3)
    seen = cells.nanmedian(dim=3).values.nan_to_num(nan=0.0)
    return seen.repeat_interleave(CELL, 1).repeat_interleave(CELL, 2)[:, :rows, :columns]


def owned(
    means: Float[Tensor, "n 3"],
    chunk: int,
    cameras: Sequence[Cameras],
    *,
    depths: Sequence[Float[Tensor, "v r c"]] | None = None,
    max_diff: float,
    batch: int = BATCH,
    device: torch.device | None = None,
) -> Bool[Tensor, "n"]:
    """Which of a chunk's Gaussians it may keep (released rule, but for the depths).

    A chunk's distance to a Gaussian is that of its nearest camera whose frustum contains it and to which it is not
    hidden, infinite where there is none. The chunk keeps what no other chunk is nearer to, and where one other is
    nearer by less than `max_diff`.

    Args:
        means: centres of the Gaussians of `chunk`.
        chunk: which of the chunks.
        cameras: views of all chunks.
        depths: how far they see, by `seen_depth`; without, nothing is hidden.
        max_diff: in scene units.
        batch: Gaussians at once.
        device: where it is computed; that of `means` by default.
    """
    place = means.device if device is None else device
    views = [group.to(place) for group in cameras]
    far = [None] * len(views) if depths is None else [depth.to(place) for depth in depths]
    kept = []
    for points in means.split(batch):
        near = points.to(place)
        distances = torch.stack([frustum_distance(near, *view) for view in zip(views, far, strict=True)])
        own = distances[chunk]
        nearer = distances < own
        close = own - distances.amin(dim=0) < max_diff
        count = nearer.sum(dim=0)
        kept.append(((count == 0) | ((count == 1) & close)).to(means.device))
    return torch.cat(kept) if kept else torch.zeros(0, dtype=torch.bool, device=means.device)


def frustum_distance(
    points: Float[Tensor, "n 3"], cameras: Cameras, depths: Float[Tensor, "v r c"] | None = None
) -> Float[Tensor, "n"]:
    """Distance to the nearest camera whose frustum contains a point that `depths` do not hide, infinite without one."""
    w2c = cameras.w2c.to(points)
    rotation, translation = w2c[:, :3, :3], w2c[:, :3, 3]
    projection = cameras.intrinsics.to(points) @ rotation
    offset = (cameras.intrinsics.to(points) @ translation[..., None])[..., 0]
    x, y, z = (points @ projection[:, row].T + offset[:, row] for row in range(3))
    inside = (z > NEAR) & (z < FAR) & (x >= 0) & (y >= 0)
    inside &= (x < cameras.image_width * z) & (y < cameras.image_height * z)
    if depths is not None:
        row, column = (
            (value / torch.where(inside, z, 1.0) * share).clamp(0, most - 1).long()
            for value, share, most in (
                (y, depths.shape[1] / cameras.image_height, depths.shape[1]),
                (x, depths.shape[2] / cameras.image_width, depths.shape[2]),
            )
        )
        limit = depths.to(z)[torch.arange(len(depths), device=z.device), row, column]
        inside &= z <= (1 + SAME_SURFACE) * limit
    centres = -(rotation.transpose(1, 2) @ translation[..., None])[..., 0]
    # The fast form of cdist subtracts squares, which loses the distances that are compared here.
    distance = torch.cdist(points, centres, compute_mode="donot_use_mm_for_euclid_dist")
    return torch.where(inside, distance, torch.inf).amin(dim=1)


def owned_reference(
    means: Float[Tensor, "n 3"],
    chunk: int,
    cameras: Sequence[Cameras],
    *,
    depths: Sequence[Float[Tensor, "v r c"]] | None = None,
    max_diff: float,
) -> Bool[Tensor, "n"]:
    """The slow twin of `owned`: one Gaussian, one chunk and one camera at a time."""
    keep = []
    for point in means:
        distances = []
        for number, group in enumerate(cameras):
            nearest = math.inf
            for index in range(len(group)):
                pixel, depth = project(point, group.w2c[index].to(point), group.intrinsics[index].to(point))
                x, y = pixel.tolist()
                inside = 0 <= x < group.image_width and 0 <= y < group.image_height and NEAR < float(depth) < FAR
                if inside and depths is not None:
                    seen = depths[number][index]
                    row, column = int(y * len(seen) / group.image_height), int(x * len(seen[0]) / group.image_width)
                    inside = float(depth) <= (1 + SAME_SURFACE) * float(seen[row, column])
                if inside:
                    nearest = min(nearest, float((group.centres[index].to(point) - point).norm()))
            distances.append(nearest)
        own = distances[chunk]
        nearer = [distance for distance in distances if distance < own]
        keep.append(not nearer or (len(nearer) == 1 and own - nearer[0] < max_diff))
    return torch.tensor(keep, dtype=torch.bool, device=means.device)
