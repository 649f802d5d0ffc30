"""How is a long video cut into chunks, and how do their Gaussians come back into one world?

Neighbouring chunks share frames. A network gives each chunk a world that is a little off in scale, turn and place; the
shared cameras and the shared pixels' Gaussians say by how much. Released rules, except that rotations are averaged by
default and that a Gaussian without a number leaves its pair out and no other. Knows no network.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lyra.errors import UserError
from lyra.models.depth_anything.alignment import camera_centres
from lyra.reconstruction.sim3 import AlignmentRule, Sim3, align_cameras, mean_rotation, weighted_umeyama
from lyra.types import Cameras, GaussianScene

CHUNK_SIZE = 128
CHUNK_OVERLAP = 10
"""Views of a chunk, and how many of them it shares with the chunk before (released code)."""
FEWEST_SHARED = 3
"""Fewest views that neighbouring chunks must share (released code)."""
FRAMES_PER_CHUNK = 500
"""Frames of the video that one chunk may stand for; the released weights were trained on no longer spans."""
SMALLEST_WEIGHT = 1e-8
"""Floor of a pair's weight where its error is judged (released code)."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ChunkPlan:
    """Which frames go through the network together."""

    chunks: tuple[tuple[int, ...], ...]
    """Frame numbers of each chunk; its first `overlap` are the last ones of the chunk before."""
    overlap: int

    @property
    def frames(self) -> tuple[int, ...]:
        """All frames, each once, in order."""
        return tuple(sorted({frame for chunk in self.chunks for frame in chunk}))


def plan_chunks(
    frame_count: int,
    *,
    chunks: int | None = None,
    size: int = CHUNK_SIZE,
    overlap: int = CHUNK_OVERLAP,
    split_frames: tuple[int, ...] = (),
) -> ChunkPlan:
    """Spread chunks over a video (released code's sampling).

    Args:
        frame_count: frames of the video.
        chunks: how many; by default one for each `split_frames` and one more, else one for each started
            `FRAMES_PER_CHUNK`. A single chunk takes all frames of a video with fewer than `size`.
        size: views of a chunk.
        overlap: views that neighbouring chunks share.
        split_frames: frames at which all chunks but the last end; each chunk then samples its own segment evenly.

    Raises:
        UserError: the numbers do not go together, or the video has too few frames.
    """
    if frame_count < 1 or size < 1:
        raise UserError("A reconstruction needs at least one frame and one view in a chunk; check the video and size.")
    if split_frames:
        if chunks not in (None, len(split_frames) + 1):
            raise UserError(
                f"{len(split_frames)} split frames make {len(split_frames) + 1} chunks and not {chunks}; give one of "
                "the two."
            )
        check_overlap(size, overlap)
        return ChunkPlan(split_chunks(frame_count, split_frames, size, overlap), overlap)
    if chunks is None:
        chunks = math.ceil(frame_count / FRAMES_PER_CHUNK)
        while chunks > 1 and unique_frames(chunks, size, overlap) > frame_count:
            chunks -= 1
    if chunks < 1:
        raise UserError(f"A video cannot be cut into {chunks} chunks; ask for at least 1.")
    if chunks == 1:
        return ChunkPlan((sample_evenly(0, frame_count, min(frame_count, size)),), 0)
    check_overlap(size, overlap)
    needed = unique_frames(chunks, size, overlap)
    if frame_count < needed:
        raise UserError(
            f"{chunks} chunks of {size} views that share {overlap} need {needed} frames, but the video has only "
            f"{frame_count}; ask for fewer or smaller chunks."
        )
    sampled = sample_evenly(0, frame_count, needed)
    starts = (index * (size - overlap) for index in range(chunks))
    return ChunkPlan(tuple(sampled[start : start + size] for start in starts), overlap)


def check_overlap(size: int, overlap: int) -> None:
    """Refuse an overlap that several chunks cannot have.

    Raises:
        UserError: the overlap is too small or as large as a chunk.
    """
    if not FEWEST_SHARED <= overlap < size:
        raise UserError(
            f"Chunks of {size} views cannot share {overlap}; the overlap must be at least {FEWEST_SHARED} and smaller "
            "than a chunk."
        )


def unique_frames(chunks: int, size: int, overlap: int) -> int:
    """Frames of all chunks together, shared ones counted once."""
    return chunks * size - (chunks - 1) * overlap


def sample_evenly(start: int, stop: int, count: int) -> tuple[int, ...]:
    """`count` frames from `start` to `stop` (excluded), ends included: floor(linspace) as in the released code."""
    # numpy's rounding decides which frames are taken where the step is a fraction, so it must be numpy's.
    offsets = np.floor(np.linspace(0, stop - start - 1, num=count)).astype(int)
    return tuple(start + int(offset) for offset in offsets)


def split_chunks(
    frame_count: int, split_frames: tuple[int, ...], size: int, overlap: int
) -> tuple[tuple[int, ...], ...]:
    """Chunks that end at given frames; each begins with the last views of the one before.

    Raises:
        UserError: the split frames are not in order or outside of the video, or a segment has too few frames.
    """
    edges = [-1, *split_frames, frame_count - 1]
    if any(first >= second for first, second in pairwise(edges)):
        raise UserError(
            f"The split frames {', '.join(map(str, split_frames))} must grow and lie between 0 and {frame_count - 2}."
        )
    chunks: list[tuple[int, ...]] = []
    for last, end in pairwise(edges):
        shared = chunks[-1][-overlap:] if chunks else ()
        fresh = size - len(shared)
        if end - last < fresh:
            raise UserError(
                f"The segment of frames {last + 1} to {end} has {end - last} frames but its chunk needs {fresh}; move "
                "the split frames or use smaller chunks."
            )
        chunks.append((*shared, *sample_evenly(last + 1, end + 1, fresh)))
    return tuple(chunks)


@dataclass(frozen=True)
class ChunkAlignment:
    """How chunks are brought into one world; the values are the released ones, except for the rule."""

    rule: AlignmentRule = "orientations"
    """Averages the rotations of the shared cameras, or fits the rotation to centres and points (released)."""
    camera_weight: float = 10.0
    point_weight: float = 1.0
    """Total weight of all camera centres and of all points."""
    max_points_per_frame: int = 4096
    trim_percentile: float = 0.8
    """Share of the pairs that a refit keeps."""
    max_iters: int = 3
    min_points: int = 1000
    """With fewer pairs the cameras alone are aligned."""
    inv_depth_power: float = 1.0
    inv_depth_weight_clip_percentile: float = 0.98
    inv_depth_min_depth: float = 1e-3
    """In scene units; nearer points are left out."""


@dataclass(frozen=True)
class LiftedChunk:
    """Gaussians of a chunk's views."""

    frame_ids: tuple[int, ...]
    cameras: Cameras
    """Of the views, in the world of the Gaussians."""
    scene: GaussianScene
    """In the order (view, row, column), with those that cannot be shown still in place."""
    grid: tuple[int, int]
    """Rows and columns of Gaussians of each view."""

    @property
    def usable(self) -> Bool[Tensor, "n"]:
        """Gaussians with numbers everywhere that lie before their camera (behind it, scales are negative)."""
        scene = self.scene
        usable = (scene.scales > 0).all(dim=1) & scene.opacities.isfinite()
        for values in (scene.means, scene.quats, scene.scales, scene.sh.flatten(1)):
            usable = usable & values.isfinite().all(dim=1)
        return usable

    def views(self, first: int, stop: int) -> LiftedChunk:
        """Some consecutive views of it."""
        size = self.grid[0] * self.grid[1]
        scene = take(self.scene, slice(first * size, stop * size))
        return LiftedChunk(self.frame_ids[first:stop], self.cameras[first:stop], scene, self.grid)

    def moved(self, sim3: Sim3) -> LiftedChunk:
        """The same chunk in another world."""
        return replace(self, cameras=sim3.apply_to_cameras(self.cameras), scene=sim3.apply_to_scene(self.scene))

    def points(self) -> Float[Tensor, "v p 3"]:
        """Centres by view and pixel, NaN where a Gaussian is not usable."""
        means = torch.where(self.usable[:, None], self.scene.means, torch.nan)
        return means.unflatten(0, (len(self.cameras), -1))


def take(scene: GaussianScene, which: slice | Tensor) -> GaussianScene:
    """Some of the Gaussians."""
    return GaussianScene(
        scene.means[which], scene.quats[which], scene.scales[which], scene.opacities[which], scene.sh[which]
    )


@dataclass(frozen=True)
class PointPairs:
    """Centres of the same pixels in two worlds."""

    source: Float[Tensor, "n 3"]
    target: Float[Tensor, "n 3"]
    weights: Float[Tensor, "n"]
    """Of mean 1."""


def point_pairs(source: LiftedChunk, target: LiftedChunk, settings: ChunkAlignment) -> PointPairs:
    """Pairs of the views' Gaussians, evenly strided; near ones count more, in each view for itself.

    A weight is 1 / z^power in the target camera, clipped at a percentile. A pair is valid or not as a whole; the
    released code filters both sides on their own, so that one NaN makes false pairs of all that follow.
    """
    from_points, to_points = (chunk.points().double().cpu() for chunk in (source, target))
    count = from_points.shape[1]
    if count > settings.max_points_per_frame:
        strided = torch.from_numpy(np.linspace(0, count - 1, num=settings.max_points_per_frame, dtype=np.int64))
        from_points, to_points = from_points[:, strided], to_points[:, strided]
    # The third row of w2c gives the depth.
    axis = target.cameras.w2c[:, 2].double().cpu()
    depth = torch.einsum("vpj,vj->vp", to_points, axis[:, :3]) + axis[:, 3:]
    valid = from_points.isfinite().all(dim=-1) & to_points.isfinite().all(dim=-1)
    valid &= depth > settings.inv_depth_min_depth
    weights = [inverse_depth_weights(z[ok], settings) for z, ok in zip(depth, valid, strict=True)]
    return PointPairs(from_points[valid], to_points[valid], torch.cat(weights))


def inverse_depth_weights(depth: Float[Tensor, "n"], settings: ChunkAlignment) -> Float[Tensor, "n"]:
    """Weights of mean 1 of the points of one view."""
    if not len(depth):
        return depth
    weights = depth ** (-settings.inv_depth_power)
    weights = weights.clamp(max=float(weights.quantile(settings.inv_depth_weight_clip_percentile)))
    return weights / weights.mean()


@dataclass(frozen=True)
class ChunkFit:
    """How a chunk was brought into the world of those before it."""

    sim3: Sim3
    method: Literal["first", "cameras and points", "cameras", "orientations"]
    """From what it was fitted; "orientations" keeps the scale, because the cameras do not move."""
    pairs: int
    """Valid pairs of points."""


def align_chunk(source: LiftedChunk, target: LiftedChunk, settings: ChunkAlignment | None = None) -> ChunkFit:
    """The similarity that brings a chunk's shared views onto the same views of the chunk before.

    One weighted fit over camera centres and points. Points that fit worst, by error / sqrt(weight), are left out and
    the fit is repeated, until the set is stable (released code). With too few pairs or cameras the cameras alone are
    aligned, and cameras that do not move keep their scale.
    """
    settings = settings or ChunkAlignment()
    from_w2c, to_w2c = source.cameras.w2c, target.cameras.w2c
    pairs = point_pairs(source, target, settings)
    count = len(pairs.weights)
    if count < settings.min_points or len(from_w2c) < FEWEST_SHARED:
        return align_by_cameras(from_w2c, to_w2c, settings.rule, count)
    try:
        return ChunkFit(trimmed_fit(pairs, from_w2c, to_w2c, settings), "cameras and points", count)
    except ValueError as error:
        logger.warning("The points of two chunks do not fit (%s), so their cameras alone are aligned.", error)
        return align_by_cameras(from_w2c, to_w2c, settings.rule, count)


def trimmed_fit(
    pairs: PointPairs, source: Float[Tensor, "v 4 4"], target: Float[Tensor, "v 4 4"], settings: ChunkAlignment
) -> Sim3:
    """The weighted fit over camera centres and the pairs that agree.

    Raises:
        ValueError: no scale fits.
    """
    from_centres, to_centres = camera_centres(source), camera_centres(target)
    camera_weights = torch.full((len(from_centres),), settings.camera_weight / len(from_centres)).double()
    rotation = mean_rotation(source, target) if settings.rule == "orientations" else None

    def fit_over(inliers: Bool[Tensor, "n"]) -> Sim3:
        weights = pairs.weights[inliers]
        return weighted_umeyama(
            torch.cat([from_centres, pairs.source[inliers]]),
            torch.cat([to_centres, pairs.target[inliers]]),
            torch.cat([camera_weights, settings.point_weight * weights / weights.sum()]),
            rotation,
        )

    inliers = torch.ones(len(pairs.weights), dtype=torch.bool)
    fit = fit_over(inliers)
    for _ in range(settings.max_iters):
        error = (fit.apply_to_points(pairs.source) - pairs.target).norm(dim=1)
        score = error / pairs.weights.clamp(min=SMALLEST_WEIGHT).sqrt()
        now = score <= score.quantile(settings.trim_percentile)
        if int(now.sum()) < settings.min_points or torch.equal(now, inliers):
            break
        inliers = now
        fit = fit_over(inliers)
    return fit


def align_by_cameras(
    source: Float[Tensor, "v 4 4"], target: Float[Tensor, "v 4 4"], rule: AlignmentRule, pairs: int
) -> ChunkFit:
    """The fit without points; cameras that do not move keep their scale."""
    try:
        return ChunkFit(align_cameras(source, target, rule), "cameras", pairs)
    except ValueError as error:
        logger.warning("Two chunks keep their scales: %s.", error)
    rotation = mean_rotation(source, target)
    translation = camera_centres(target).mean(dim=0) - rotation @ camera_centres(source).mean(dim=0)
    return ChunkFit(Sim3(1.0, rotation, translation), "orientations", pairs)


@dataclass(frozen=True)
class AlignedChunk:
    """A chunk in the world of the first one, without the views that it shares with the chunk before."""

    chunk: LiftedChunk
    fit: ChunkFit


def align_chunks(
    chunks: Iterable[LiftedChunk], overlap: int, settings: ChunkAlignment | None = None
) -> Iterator[AlignedChunk]:
    """Bring chunks into the world of the first, one after another; only the shared views of one are kept.

    Args:
        chunks: in order; each begins with the `overlap` last views of the one before.
        overlap: of the plan.
    """
    target: LiftedChunk | None = None
    for index, chunk in enumerate(chunks):
        fit = ChunkFit(Sim3.identity(), "first", 0)
        if target is not None:
            fit = align_chunk(chunk.views(0, overlap), target, settings)
            chunk = chunk.moved(fit.sim3)
            logger.info(
                "Chunk %d is aligned by %s (%d pairs), scale %.4f.", index, fit.method, fit.pairs, fit.sim3.scale
            )
        count = len(chunk.frame_ids)
        target = chunk.views(count - overlap, count)
        yield AlignedChunk(chunk if index == 0 else chunk.views(overlap, count), fit)
