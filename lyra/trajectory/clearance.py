"""Does a camera path stay clear of the scene in the photo, and how far can it go if it does not?

The scene is what the photo's depth map shows, seen from the photo's camera at the origin. A camera is blocked when it
is behind the visible surface, or nearer to it than a margin. Sky and pixels without a depth block nothing, and neither
does whatever the photo does not show. Knows no preset and no generated frame. The released code has no such test: its
distances only scale with the depth of the photo.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lyra.errors import UserError
from lyra.geometry.rotations import (
    matrix_to_quaternion,
    quaternion_to_matrix,
    rotation_angle,
    slerp,
    world_to_camera,
)
from lyra.trajectory.presets import centre_depth
from lyra.types import Cameras, DepthMap

MARGIN_SHARE = 0.05
"""Distance to keep from the scene, as a share of the centre depth d."""
NEAR = 0.01
"""Distance to keep at least, in scene units: nearer than this nothing is drawn."""
SAFETY_SHARE = 0.9
"""Share of the clear part of a blocked path that is used."""
MAX_POINTS = 20_000
_CHUNK = 64
"""Poses per distance computation: 64 x 20,000 distances are 5 MB."""


@dataclass(frozen=True)
class ClearanceReport:
    """How a path stands to the scene."""

    clearance: Float[Tensor, "n"]
    """Distance of each camera to the nearest scene point, in scene units; infinite if the scene has no points."""
    blocked: Bool[Tensor, "n"]
    first_blocked: int | None
    """Index of the first blocked camera."""
    reason: str | None
    """One sentence for the user if the path is blocked."""


def scene_points(depth: DepthMap, max_points: int = MAX_POINTS) -> Float[Tensor, "m 3"]:
    """The photo's visible surface in its camera's frame, on a regular grid of at most `max_points` pixels."""
    height, width = depth.depth.shape
    stride = max(1, math.ceil(math.sqrt(height * width / max_points)))
    # Rounding up of both sides may exceed the limit by a row and a column.
    while math.ceil(height / stride) * math.ceil(width / stride) > max_points:
        stride += 1
    # Half a stride in from the border, as long as the map is that large.
    rows = torch.arange(min(stride, height) // 2, height, stride)
    columns = torch.arange(min(stride, width) // 2, width, stride)
    v, u = torch.meshgrid(rows, columns, indexing="ij")
    solid = _solid(depth)[v, u]
    u, v = u[solid], v[solid]
    z = depth.depth[v, u].float().cpu()
    k = depth.intrinsics.float().cpu()
    return torch.stack([(u - k[0, 2]) / k[0, 0] * z, (v - k[1, 2]) / k[1, 1] * z, z], dim=-1)


def margin(depth: DepthMap) -> float:
    """Distance to keep from the scene: 5 % of the centre depth, at least `NEAR`.

    A photo of something very near already breaks that rule, so half of the photo's own clearance is the most that is
    asked for: the first frame is never blocked.
    """
    points = scene_points(depth)
    if len(points) == 0:
        return NEAR
    return min(max(MARGIN_SHARE * centre_depth(depth), NEAR), 0.5 * float(points.norm(dim=-1).min()))


def check_clearance(cameras: Cameras, depth: DepthMap) -> ClearanceReport:
    """Clearance of every camera of a path whose world is the photo's camera (pose 0 is the identity)."""
    centres = cameras.centres.float().cpu()
    clearance = _distance_to_nearest(centres, scene_points(depth))
    keep = margin(depth)
    blocked = (clearance < keep) | _behind_surface(centres, depth, keep)
    first = int(blocked.int().argmax()) if bool(blocked.any()) else None
    reason = None
    if first is not None:
        reason = (
            f"The path would pass through the scene after frame {first} of {len(cameras)}; lower the strength or "
            "choose another preset."
        )
    return ClearanceReport(clearance, blocked, first, reason)


def shorten_path(cameras: Cameras, depth: DepthMap) -> tuple[Cameras, ClearanceReport]:
    """A path of as many frames that stays clear, and the report on the path as it was asked for.

    A clear path comes back as it is. Of a blocked one, the clear part up to 0.9 of its length is run more slowly, over
    all frames. A closed path, which would no longer return to its beginning, is shrunk towards its first camera
    instead, by the largest factor that keeps it clear, again times 0.9.

    Raises:
        UserError: the first camera is already inside the scene, so that no part of the path is clear.
    """
    report = check_clearance(cameras, depth)
    if report.first_blocked is None:
        return cameras, report
    if report.first_blocked == 0:
        raise UserError("The path begins inside the scene; begin it at the photo's camera.")
    candidate = _shrunk(cameras, depth) if _is_closed(cameras) else _clear_part(cameras, report.first_blocked)
    shorter = _largest_clear(candidate, depth)
    share = _length(shorter) / _length(cameras)
    percent = "less than 1 %" if share < 0.01 else f"{100 * share:.0f} %"
    reason = (
        f"The path would pass through the scene after frame {report.first_blocked} of {len(cameras)}, so it was "
        f"shortened to {percent} of its length; lower the strength or choose another preset."
    )
    return shorter, ClearanceReport(report.clearance, report.blocked, report.first_blocked, reason)


def resample(cameras: Cameras, at: Float[Tensor, "m"]) -> Cameras:
    """Cameras between those of a path, at fractional frame indices from 0 to n - 1.

    Centres and intrinsics are interpolated linearly, rotations by slerp. At whole indices the cameras are the path's.
    """
    before = at.floor().long().clamp(0, max(len(cameras) - 2, 0))
    after = (before + 1).clamp(max=len(cameras) - 1)
    t = (at - before).to(cameras.w2c)
    quaternions = matrix_to_quaternion(cameras.w2c[:, :3, :3])
    rotation = quaternion_to_matrix(slerp(quaternions[before], quaternions[after], t))
    centres = torch.lerp(cameras.centres[before], cameras.centres[after], t[:, None])
    w2c = world_to_camera(rotation, centres)
    for whole, index in ((t == 0, before), (t == 1, after)):
        w2c[whole] = cameras.w2c[index[whole]]
    intrinsics = torch.lerp(cameras.intrinsics[before], cameras.intrinsics[after], t[:, None, None])
    return Cameras(w2c, intrinsics, cameras.image_height, cameras.image_width)


def scale_motion(cameras: Cameras, factor: float) -> Cameras:
    """The path with every motion and turn relative to its first camera scaled by a factor from 0 to 1."""
    quaternions = matrix_to_quaternion(cameras.w2c[:, :3, :3])
    t = torch.full((len(cameras),), factor, dtype=cameras.w2c.dtype, device=cameras.w2c.device)
    rotation = quaternion_to_matrix(slerp(quaternions[:1].expand_as(quaternions), quaternions, t))
    centres = torch.lerp(cameras.centres[:1].expand(len(cameras), 3), cameras.centres, t[:, None])
    w2c = world_to_camera(rotation, centres)
    w2c[0] = cameras.w2c[0]
    if torch.equal(cameras.w2c[-1], cameras.w2c[0]):
        w2c[-1] = cameras.w2c[0]
    return Cameras(w2c, cameras.intrinsics, cameras.image_height, cameras.image_width)


def _solid(depth: DepthMap) -> Bool[Tensor, "h w"]:
    """Pixels that show something a camera can hit."""
    return (depth.valid & ~depth.sky & torch.isfinite(depth.depth) & (depth.depth > 0)).cpu()


def _distance_to_nearest(centres: Float[Tensor, "n 3"], points: Float[Tensor, "m 3"]) -> Float[Tensor, "n"]:
    if len(points) == 0:
        return torch.full((len(centres),), math.inf)
    # |c - p|^2 = |c|^2 + |p|^2 - 2 c p finds the nearest point with one matrix product; its cancellation would spoil
    # small distances, so only the choice of the point is taken from it and the distance is computed afresh.
    squares = points.square().sum(dim=-1)
    nearest = torch.cat([(squares - 2 * part @ points.T).argmin(dim=1) for part in centres.split(_CHUNK)])
    return (centres - points[nearest]).norm(dim=-1)


def _behind_surface(centres: Float[Tensor, "n 3"], depth: DepthMap, keep: float) -> Bool[Tensor, "n"]:
    """True where the straight way from the photo's camera to a centre passes the visible surface, less `keep`.

    That way lies in one pixel of the photo, so the depth of that pixel tells. It tells nothing about centres outside
    of the view.
    """
    height, width = depth.depth.shape
    k = depth.intrinsics.float().cpu()
    x, y, z = centres.unbind(-1)
    ahead = z > 0
    z_safe = torch.where(ahead, z, torch.ones_like(z))
    u = (k[0, 0] * x / z_safe + k[0, 2]).round()
    v = (k[1, 1] * y / z_safe + k[1, 2]).round()
    seen = ahead & (u >= 0) & (u < width) & (v >= 0) & (v < height)
    row, column = torch.where(seen, v, 0).long(), torch.where(seen, u, 0).long()
    surface = depth.depth.float().cpu()[row, column]
    return seen & _solid(depth)[row, column] & (z > surface - keep)


def _is_closed(cameras: Cameras) -> bool:
    """Whether the last camera is the first one again."""
    gap = float((cameras.centres[-1] - cameras.centres[0]).norm())
    turn = float(rotation_angle(cameras.w2c[0, :3, :3], cameras.w2c[-1, :3, :3]))
    return gap <= 1e-3 * _length(cameras) and turn <= 1e-2


def _length(cameras: Cameras) -> float:
    """Length of the way of the camera centres, in scene units."""
    return float(cameras.centres.diff(dim=0).norm(dim=-1).sum())


def _clear_part(cameras: Cameras, first_blocked: int) -> Callable[[float], Cameras]:
    """Shares of the clear part of a path, each run over as many frames as the whole path had."""

    def share_of_it(share: float) -> Cameras:
        at = torch.linspace(0.0, share * first_blocked, len(cameras), dtype=torch.float64)
        # Between its last clear camera and the first blocked one nothing is known to be clear.
        return resample(cameras, at.clamp(max=first_blocked - 1))

    return share_of_it


def _shrunk(cameras: Cameras, depth: DepthMap) -> Callable[[float], Cameras]:
    """Shares of the largest clear shrunk copy of a path, found to 1/64 by bisection at about 120 of its cameras."""
    sample = cameras[:: max(1, len(cameras) // 120)]
    clear, blocked = 0.0, 1.0
    for _ in range(6):
        middle = (clear + blocked) / 2
        if check_clearance(scale_motion(sample, middle), depth).first_blocked is None:
            clear = middle
        else:
            blocked = middle
    return lambda share: scale_motion(cameras, share * clear)


def _largest_clear(candidate: Callable[[float], Cameras], depth: DepthMap) -> Cameras:
    """The candidate of the largest share, from 0.9 downwards, all of whose cameras are clear.

    Nearly always the first. Among thin things a camera between two clear ones can be blocked, though.
    """
    share = SAFETY_SHARE
    while share > 0.01:
        cameras = candidate(share)
        if check_clearance(cameras, depth).first_blocked is None:
            return cameras
        share *= 0.7
    # Standing still at the photo's camera is always clear.
    return candidate(0.0)
