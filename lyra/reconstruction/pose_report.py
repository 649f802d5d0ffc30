"""How far do the cameras of a video, as a network estimates them, lie from those that it was told to have?

A generated video does not obey its commanded path exactly. The estimate has a world of its own, so it is first brought
onto the commanded path by a similarity. Knows no network and changes no camera.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lyra.depth.depth_anything import is_still
from lyra.geometry.rotations import rotation_angle
from lyra.models.depth_anything.alignment import camera_centres
from lyra.reconstruction.sim3 import AlignmentRule, align_cameras, mean_rotation
from lyra.types import Cameras


@dataclass(frozen=True)
class PoseReport:
    """Differences between commanded and estimated cameras."""

    mean_degrees: float
    max_degrees: float
    """Angle between the two turns of a camera."""
    mean_percent: float | None
    max_percent: float | None
    """Distance between the two centres of a camera, in per cent of the commanded path's length; None where the cameras
    do not move, or not alike, so that the two worlds have no common unit."""

    def describe(self) -> str:
        """The report in one sentence."""
        turns = f"{self.mean_degrees:.1f}° on average and {self.max_degrees:.1f}° at most"
        if self.mean_percent is None or self.max_percent is None:
            return f"The video's cameras turn away from the commanded ones by {turns}; their places cannot be compared."
        return (
            f"The video's cameras turn away from the commanded ones by {turns}, and stand {self.mean_percent:.1f} % of "
            f"the path's length from them on average and {self.max_percent:.1f} % at most."
        )


def compare_cameras(commanded: Cameras, estimated: Cameras, rule: AlignmentRule = "orientations") -> PoseReport:
    """Compare the cameras of the same frames.

    Args:
        commanded: the path that the video was told to follow.
        estimated: in a world of any place, turn and unit.
        rule: of the alignment; see `align_cameras`.

    Raises:
        ValueError: the numbers of cameras differ, or there are none.
    """
    if len(commanded) != len(estimated) or not len(commanded):
        raise ValueError(f"{len(commanded)} commanded cameras cannot be compared with {len(estimated)} estimated ones")
    told, seen = commanded.w2c.double().cpu(), estimated.w2c.double().cpu()
    centres = camera_centres(told)
    length = float(centres.diff(dim=0).norm(dim=1).sum())
    try:
        fit = align_cameras(seen, told, rule)
        rotation = fit.rotation
        distance = (fit.apply_to_points(camera_centres(seen)) - centres).norm(dim=1)
    except ValueError:
        rotation, distance = mean_rotation(seen, told), torch.zeros(0, dtype=torch.float64)
    angles = torch.rad2deg(rotation_angle(seen[:, :3, :3] @ rotation.T, told[:, :3, :3]))
    share = 100 * distance / length if len(distance) and not is_still(told) else None
    return PoseReport(
        mean_degrees=float(angles.mean()),
        max_degrees=float(angles.max()),
        mean_percent=None if share is None else float(share.mean()),
        max_percent=None if share is None else float(share.max()),
    )
