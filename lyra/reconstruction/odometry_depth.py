"""Where were the cameras of a video, and how far is what it shows, when nothing is known but its frames?

A monocular network measures some frames and guesses the field of view; what neighbours show of each other puts them in
one unit, and visual odometry then finds the cameras. The network's errors stay: depth that is wrong alike in all frames
makes a path that is wrong with it. What was found comes into the world of what is known. Knows the network by its
protocol and no file.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from lyra.depth.base import SKY_DEPTH, DepthEstimator, intrinsics_from_fov
from lyra.depth.depth_anything import is_still
from lyra.depth.walk import FARTHEST
from lyra.export.video import Frames
from lyra.generation.walkthrough import from_uint8
from lyra.geometry.resample import draw_surface, make_surface
from lyra.models.depth_anything.alignment import camera_centres, mean_rotation
from lyra.reconstruction.base import Check, Reconstruction, Walkthrough
from lyra.reconstruction.odometry import MOST_KEYFRAMES, estimate_cameras
from lyra.reconstruction.odometry_graph import Edge
from lyra.reconstruction.odometry_images import LONGEST_SIDE, FrameStore
from lyra.reconstruction.odometry_tracking import Odometry
from lyra.reconstruction.rasterizer import choose_renderer
from lyra.reconstruction.sim3 import Sim3, align_cameras
from lyra.types import Cameras

MEASURED_INTERVAL = 4
"""Every n-th frame is measured; in videos of more than 1,600 frames every 2 n-th, and so on."""
FIELD_OF_VIEW_FRAMES = 9
"""Frames that the field of view is guessed from, where depth is known already."""
PREDICTED_AT_ONCE = 4
LEAST_SEEN = 0.05
"""Share of a frame that its neighbour must show for the two to be compared."""
RATIO_ERROR = 0.02
"""Standard deviation of the logarithm of a measured ratio of two frames' units."""
UNIT_ERROR = 0.25
"""Standard deviation of the logarithm of the network's own unit, which keeps measured ratios from adding up."""
SOLID_ALPHA = 0.5
"""Share of light that splats must stop for a pixel not to be sky."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EstimatedWalk:
    """What was found in a video."""

    cameras: Cameras
    """Of all frames, for their size."""
    depths: dict[int, Float[Tensor, "h w"]]
    """z depth by frame number, in the unit of the cameras, the frame's size or smaller; `SKY_DEPTH` in the sky."""
    trusted: Bool[Tensor, "n"]
    """Frames whose cameras were measured and not only predicted."""


@dataclass(frozen=True)
class MeasuredFrames:
    """What a network says of some frames, each for itself."""

    depths: dict[int, Float[Tensor, "h w"]]
    fov_x_deg: float
    """Median of the horizontal fields of view."""


def estimate_walk(
    frames: Frames, estimator: DepthEstimator, *, depths: Mapping[int, Float[Tensor, "h2 w2"]], check: Check
) -> EstimatedWalk:
    """Estimate the cameras of a video, and depth where none is known.

    Args:
        frames: at least one.
        estimator: of depth, and of the field of view.
        depths: z depth by frame number; where there is some, it gives the unit and nothing is measured.
        check: called with finished and all steps; may raise to stop.

    Returns:
        Cameras of which the first is the identity, in the unit of the given depth or about that of the network.
    """
    count = len(frames)
    ids = measured_frames(count)
    if depths:
        ids = [ids[round(place)] for place in np.linspace(0, len(ids) - 1, min(len(ids), FIELD_OF_VIEW_FRAMES))]
    tracked = 0 if depths else count - 1
    done_before = len(ids) + tracked
    steps = done_before + (2 * count - 1 if count > 1 else 0)
    measured = measure(frames, estimator, ids, lambda done, _: check(done, steps))
    height, width = frames.shape[-2:]
    intrinsics = intrinsics_from_fov(measured.fov_x_deg, height, width)
    known = dict(depths)
    if not depths:
        known = in_one_unit(frames, measured.depths, intrinsics, lambda done, _: check(len(ids) + done, steps))
    if count == 1:
        cameras = Cameras(torch.eye(4)[None], intrinsics[None], height, width)
        return EstimatedWalk(cameras, known, torch.ones(1, dtype=torch.bool))
    found = estimate_cameras(frames, known, intrinsics, check=lambda done, _: check(done_before + done, steps))
    return EstimatedWalk(found.cameras, known, found.trusted)


def in_unit_of(found: EstimatedWalk, path: Cameras) -> EstimatedWalk:
    """What was found in a video whose path is known, in the unit of this path and beginning with its first camera.

    The unit follows from the movement that was found; where there is none, it stays that of the network.
    """
    trusted, cameras = found.trusted.cpu(), found.cameras
    try:
        unit = aligned(cameras.w2c[trusted], path.w2c[trusted]).scale
    except ValueError as error:
        logger.warning("The depth of this video keeps the unit of the network, for its path gives none: %s.", error)
        unit = 1.0
    w2c = cameras.w2c @ torch.linalg.inv(cameras.w2c[0])
    w2c[:, :3, 3] *= unit
    moved = Cameras(w2c @ path.w2c[0], cameras.intrinsics, cameras.image_height, cameras.image_width)
    return EstimatedWalk(moved, {i: scaled_depth(depth, unit) for i, depth in found.depths.items()}, found.trusted)


def in_known_world(known: Walkthrough, lifted: Reconstruction) -> Reconstruction:
    """Splats of estimated cameras in the world of the known ones, or at least in the unit of the known depth."""
    ids = list(lifted.frame_ids)
    path = None if known.cameras is None else known.cameras.w2c[ids]
    try:
        if path is not None and not is_still(path):
            fit = aligned(lifted.cameras.w2c, path)
        else:
            seen = rendered_depth(lifted, [frame for frame in ids if frame in known.depths])
            fit = placed(lifted.cameras.w2c, path, depth_ratio(known.depths, seen))
    except ValueError as error:
        logger.warning("The splats keep the unit of the network, because nothing known gives another: %s.", error)
        fit = placed(lifted.cameras.w2c, path, 1.0)
    return Reconstruction(fit.apply_to_scene(lifted.scene), fit.apply_to_cameras(lifted.cameras), lifted.frame_ids)


def aligned(source: Float[Tensor, "n 4 4"], target: Float[Tensor, "n 4 4"]) -> Sim3:
    """The similarity between cameras that move.

    Raises:
        ValueError: they do not, or not alike.
    """
    if is_still(target):
        # Rounding alone would give a scale, of nearly nothing.
        raise ValueError("the cameras do not move")
    return align_cameras(source, target)


def placed(source: Float[Tensor, "n 4 4"], target: Float[Tensor, "n 4 4"] | None, scale: float) -> Sim3:
    """The similarity of a given scale; without a target it leaves the origin and the axes as they are."""
    rotation, offset = torch.eye(3).double(), torch.zeros(3).double()
    if target is not None:
        rotation = mean_rotation(source, target)
        offset = camera_centres(target).mean(0) - scale * rotation @ camera_centres(source).mean(0)
    return Sim3(scale, rotation, offset)


def scaled_depth(depth: Float[Tensor, "h w"], scale: float) -> Float[Tensor, "h w"]:
    """Depth in another unit, in which the sky is as far."""
    return torch.where(depth < FARTHEST, depth * scale, depth)


def measured_frames(count: int) -> list[int]:
    """Every fourth frame and the last one, or every eighth and so on where these are too many."""
    interval = MEASURED_INTERVAL
    while count > interval * MOST_KEYFRAMES:
        interval *= 2
    return sorted({*range(0, count, interval), count - 1})


def measure(frames: Frames, estimator: DepthEstimator, ids: Sequence[int], check: Check) -> MeasuredFrames:
    """Depth of some frames at no more than the size at which frames are aligned."""
    scale = min(1.0, LONGEST_SIDE / max(frames.shape[-2:]))
    size = [max(1, round(side * scale)) for side in frames.shape[-2:]]
    depths: dict[int, Tensor] = {}
    views = []
    for first in range(0, len(ids), PREDICTED_AT_ONCE):
        some = list(ids[first : first + PREDICTED_AT_ONCE])
        images = F.interpolate(from_uint8(frames[some]), size, mode="bilinear", antialias=True)
        prediction = estimator.predict(images)
        sky = torch.full_like(prediction.depth, SKY_DEPTH)
        depths.update(zip(some, torch.where(prediction.sky, sky, prediction.depth).float().cpu(), strict=True))
        views.append(prediction.fov_x_deg.float().cpu())
        check(first + len(some), len(ids))
    return MeasuredFrames(depths, float(torch.cat(views).median()))


def in_one_unit(
    frames: Frames, depths: Mapping[int, Float[Tensor, "h w"]], intrinsics: Float[Tensor, "3 3"], check: Check
) -> dict[int, Float[Tensor, "h w"]]:
    """Depth of frames that were measured each for itself, scaled so that they agree on what they both show.

    A frame is tracked from the last one with depth, so their motion is in that one's unit, and the ratio of what it
    shows there to the new frame's own depth is that of the two units.
    """
    ids = sorted(depths)
    if len(ids) < 2:
        return dict(depths)
    count, (height, width) = len(frames), frames.shape[-2:]
    odometry = Odometry(FrameStore(frames, intrinsics.expand(count, 3, 3), depths), count, ids, None, check)
    odometry.track()
    ratios = {}
    for edge in odometry.edges:
        if edge.source in depths and edge.target in depths:
            pair = depths[edge.source], depths[edge.target]
            ratio = unit_ratio(edge, *pair, Cameras(torch.eye(4)[None], intrinsics[None], height, width))
            if ratio is not None:
                ratios[edge.source, edge.target] = ratio
    scales = agreed_scales(ids, ratios)
    return {i: scaled_depth(depth, scales[i]) for i, depth in depths.items()}


def unit_ratio(edge: Edge, source: Float[Tensor, "h w"], target: Float[Tensor, "h w"], lens: Cameras) -> float | None:
    """How many of the target's units are one of the source's; None where the source shows too little of the target."""
    height, width = target.shape
    intrinsics = lens.resized(height, width).intrinsics[0]
    surface = make_surface(source, torch.eye(4), lens.resized(*source.shape).intrinsics[0])
    seen = draw_surface(surface, torch.from_numpy(edge.pose).float(), intrinsics, height, width).depth
    both = (seen < FARTHEST) & (target < FARTHEST) & (target > 0)
    if float(both.float().mean()) < LEAST_SEEN:
        return None
    return float((seen[both] / target[both]).median())


def agreed_scales(ids: Sequence[int], ratios: Mapping[tuple[int, int], float]) -> dict[int, float]:
    """What each frame's depth is to be multiplied with: least squares of the logarithms.

    Neighbours follow their ratio, while the whole path follows the units of all frames.
    """
    place = {frame: row for row, frame in enumerate(ids)}
    hessian, gradient = np.eye(len(ids)) / UNIT_ERROR**2, np.zeros(len(ids))
    weight = 1 / RATIO_ERROR**2
    for (source, target), ratio in ratios.items():
        a, b, step = place[source], place[target], np.log(ratio)
        hessian[a, a] += weight
        hessian[b, b] += weight
        hessian[a, b] -= weight
        hessian[b, a] -= weight
        gradient[a] -= weight * step
        gradient[b] += weight * step
    return dict(zip(ids, np.exp(np.linalg.solve(hessian, gradient)).tolist(), strict=True))


def rendered_depth(lifted: Reconstruction, ids: Collection[int]) -> dict[int, Float[Tensor, "h w"]]:
    """The splats' depth in some of the frames that they were made of, sky where they are not solid."""
    scale = min(1.0, LONGEST_SIDE / max(lifted.cameras.image_height, lifted.cameras.image_width))
    height, width = (round(side * scale) for side in (lifted.cameras.image_height, lifted.cameras.image_width))
    cameras, renderer, depths = lifted.cameras.resized(height, width), choose_renderer(lifted.scene, "median"), {}
    for place, frame in enumerate(lifted.frame_ids):
        if frame in ids:
            view = renderer.render(cameras.w2c[place], cameras.intrinsics[place], height, width)
            depths[frame] = torch.where(view.alpha > SOLID_ALPHA, view.depth, SKY_DEPTH).cpu()
    return depths


def depth_ratio(known: Mapping[int, Float[Tensor, "h w"]], seen: Mapping[int, Float[Tensor, "h2 w2"]]) -> float:
    """Median ratio of two sources' depth.

    Raises:
        ValueError: they share no pixel.
    """
    pairs = [(known[i].flatten(), F.interpolate(seen[i][None, None], known[i].shape).flatten()) for i in seen]
    ratios = torch.cat([(a / b)[(a > 0) & (a < FARTHEST) & (b < FARTHEST)] for a, b in pairs] or [torch.zeros(0)])
    if not len(ratios):
        raise ValueError("no pixel has both depths")
    return float(ratios.median())
