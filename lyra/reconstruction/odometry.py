"""Where were the cameras of a video: visual odometry from brightness, with the depth of some of its frames.

Needs no network and no guess of the cameras, though a guess predicts them and replaces what cannot be measured. Knows
no Gaussians and no file; `lyra.reconstruction.odometry_tracking` does the work.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lyra.errors import UserError
from lyra.export.video import Frames
from lyra.reconstruction.base import Check
from lyra.reconstruction.odometry_graph import fill_gaps
from lyra.reconstruction.odometry_images import FrameStore, usable_depth
from lyra.reconstruction.odometry_tracking import Odometry
from lyra.types import Cameras

MOST_KEYFRAMES = 400
"""Frames whose depth is used; evenly spaced ones where there are more."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EstimatedCameras:
    """Cameras of all frames of a video, and how far to believe them."""

    cameras: Cameras
    """In the unit of the depth maps; of the frames' size, on their device."""
    residual: Float[Tensor, "n"]
    """Robust standard deviation of the brightness differences in a frame's best alignment, 0 to 1; 1 without any."""
    inlier_share: Float[Tensor, "n"]
    """Share of the seen points whose brightness agrees in it; 0 without any."""
    trusted: Bool[Tensor, "n"]
    """Whether alignments tie a frame to the first one; the pose of the others is a prediction."""


def estimate_cameras(
    frames: Frames,
    depths: Mapping[int, Float[Tensor, "h2 w2"]],
    intrinsics: Float[Tensor, "*t 3 3"],
    *,
    guess: Cameras | None = None,
    check: Check,
) -> EstimatedCameras:
    """Estimate the cameras of a video.

    Args:
        frames: RGB, (t, 3, h, w).
        depths: z depth by frame number, of any size; where it is NaN, infinite or not positive it says nothing.
        intrinsics: one pinhole matrix or one a frame, in pixels of the frames, pixel centres at integers.
        guess: roughly the cameras, for instance the commanded ones; they give the first pose and predict the others.
        check: called with finished and all steps; may raise to stop.

    Returns:
        Cameras of which the first is the guess's first, or the identity.

    Raises:
        UserError: there are fewer than two frames, or no usable depth.
        ValueError: intrinsics or guess are of another number of frames.
    """
    keyframes = usable_keyframes(frames, depths)
    count = len(frames)
    if guess is not None and len(guess) != count:
        raise ValueError(f"{count} frames cannot have {len(guess)} cameras")
    if intrinsics.ndim == 3 and len(intrinsics) != count:
        raise ValueError(f"{count} frames cannot have {len(intrinsics)} pinhole matrices")
    pinholes = intrinsics.expand(count, 3, 3)
    prior = None if guess is None else guess.w2c.detach().double().cpu().numpy()
    odometry = Odometry(FrameStore(frames, pinholes, depths), count, keyframes, prior, check)
    odometry.run()
    trusted = odometry.trusted()
    if not trusted.all():
        logger.warning(
            "The poses of %d of %d frames could not be measured and follow %s.",
            int((~trusted).sum()),
            count,
            "from their neighbours" if guess is None else "the given cameras",
        )
    w2c = torch.from_numpy(odometry.poses()).float().to(frames.device)
    best = [odometry.best.get(frame) for frame in range(count)]
    return EstimatedCameras(
        cameras=Cameras(w2c, pinholes.detach().float().to(frames.device).clone(), frames.shape[-2], frames.shape[-1]),
        residual=torch.tensor([1.0 if a is None else a.residual for a in best], device=frames.device),
        inlier_share=torch.tensor([0.0 if a is None else a.inlier_share for a in best], device=frames.device),
        trusted=torch.from_numpy(trusted).to(frames.device),
    )


def usable_keyframes(frames: Frames, depths: Mapping[int, Float[Tensor, "h2 w2"]]) -> list[int]:
    """Frames whose depth says something, thinned out evenly where there are very many.

    Raises:
        UserError: there are fewer than two frames, or no usable depth.
    """
    if len(frames) < 2:
        raise UserError("Camera poses follow from at least two frames, so give a longer video.")
    ids = sorted(i for i, depth in depths.items() if 0 <= i < len(frames) and bool(usable_depth(depth).any()))
    if not ids:
        raise UserError("Camera poses need the depth of at least one frame of the video, so measure depth first.")
    if len(ids) > MOST_KEYFRAMES:
        ids = [ids[round(place)] for place in np.linspace(0, len(ids) - 1, MOST_KEYFRAMES)]
    return ids


def cameras_of_all(cameras: Cameras, ids: Sequence[int], count: int) -> Cameras:
    """Cameras of all frames of a video from those of some: the missing ones lie between their neighbours."""
    order = np.argsort(ids)
    known = np.zeros(count, bool)
    known[np.asarray(ids)] = True
    w2c = np.tile(np.eye(4), (count, 1, 1))
    w2c[known] = cameras.w2c.detach().double().cpu().numpy()[order]
    filled = torch.from_numpy(fill_gaps(w2c, known, np.tile(np.eye(4), (count, 1, 1)))).float()
    nearest = np.abs(np.arange(count)[:, None] - np.asarray(ids)).argmin(axis=1)
    intrinsics = cameras.intrinsics.detach().cpu()[torch.from_numpy(nearest)]
    return Cameras(filled, intrinsics, cameras.image_height, cameras.image_width)
