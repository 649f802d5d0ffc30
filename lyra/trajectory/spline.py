"""Which smooth path leads through a few cameras that a user has placed?

Centres run along a Catmull-Rom curve (Barry and Goldman 1988, with the centripetal knots of Yuksel et al. 2011, which
never form loops or cusps), rotations along a spherical quadrangle (squad, Shoemake 1987), intrinsics linearly. The path
passes through every keyframe. Knows no preset, no scene and no file.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from lyra.geometry.rotations import (
    axis_angle_to_quaternion,
    matrix_to_quaternion,
    multiply_quaternions,
    quaternion_to_axis_angle,
    quaternion_to_matrix,
    rotation_angle,
    slerp_as_given,
    world_to_camera,
)
from lyra.types import Cameras

_MIN_STEP = 1e-3
"""Knot distance of two equal keyframes: a short stop instead of a division by zero."""


def centripetal_times(keyframes: Cameras) -> Float[Tensor, "k"]:
    """Times of keyframes from 0 to 1, spaced by the square root of how far each is from the one before.

    How far is the distance in units of the mean distance, plus the turn in radians, so that a turn on the spot takes
    time too.
    """
    chords = keyframes.centres.double().diff(dim=0).norm(dim=-1)
    rotations = keyframes.w2c[:, :3, :3].double()
    turns = rotation_angle(rotations[:-1], rotations[1:])
    scale = chords.mean().clamp_min(torch.finfo(torch.float64).tiny)
    steps = (chords / scale + turns).sqrt().clamp_min(_MIN_STEP)
    times = torch.cat([steps.new_zeros(1), steps.cumsum(0)])
    return times / times[-1]


def spline_cameras(keyframes: Cameras, frames: int, times: Sequence[float] | None = None) -> Cameras:
    """A smooth path of `frames` cameras through all keyframes.

    Args:
        keyframes: at least two cameras to pass through, in order.
        frames: number of cameras of the path, at least 2; the first and the last are the outer keyframes.
        times: strictly increasing time of each keyframe in any unit; `centripetal_times` when None.

    Raises:
        ValueError: fewer than two keyframes or frames, or times that do not fit.
    """
    count = len(keyframes)
    if count < 2 or frames < 2:
        raise ValueError(f"a path needs at least two keyframes and two frames, not {count} and {frames}")
    knots = centripetal_times(keyframes) if times is None else torch.tensor(list(times), dtype=torch.float64)
    if len(knots) != count or not bool((knots.diff() > 0).all()):
        raise ValueError("times must be one strictly increasing number per keyframe")
    at = torch.linspace(float(knots[0]), float(knots[-1]), frames, dtype=torch.float64)
    segment = (torch.searchsorted(knots, at, right=True) - 1).clamp(0, count - 2)
    local = (at - knots[segment]) / (knots[segment + 1] - knots[segment])
    centres = _catmull_rom(keyframes.centres.double(), knots, segment, at)
    quaternions = _squad(matrix_to_quaternion(keyframes.w2c[:, :3, :3].double()), segment, local)
    w2c = world_to_camera(quaternion_to_matrix(quaternions), centres).to(keyframes.w2c.dtype)
    t = local.to(keyframes.intrinsics.dtype)[:, None, None]
    intrinsics = torch.lerp(keyframes.intrinsics[segment], keyframes.intrinsics[segment + 1], t)
    return Cameras(w2c, intrinsics, keyframes.image_height, keyframes.image_width)


def _catmull_rom(
    points: Float[Tensor, "k 3"], knots: Float[Tensor, "k"], segment: Tensor, at: Float[Tensor, "n"]
) -> Float[Tensor, "n 3"]:
    """The curve through points at their knots, by the pyramid of linear blends of Barry and Goldman."""
    # The ends continue straight: one mirrored point and knot before the first and after the last.
    points = torch.cat([2 * points[:1] - points[1:2], points, 2 * points[-1:] - points[-2:-1]])
    knots = torch.cat([2 * knots[:1] - knots[1:2], knots, 2 * knots[-1:] - knots[-2:-1]])
    p = [points[segment + offset] for offset in range(4)]
    t = [knots[segment + offset] for offset in range(4)]

    def blend(a: Tensor, b: Tensor, start: Tensor, end: Tensor) -> Tensor:
        share = ((at - start) / (end - start))[:, None]
        return (1 - share) * a + share * b

    a1, a2, a3 = (blend(p[i], p[i + 1], t[i], t[i + 1]) for i in range(3))
    b1, b2 = blend(a1, a2, t[0], t[2]), blend(a2, a3, t[1], t[3])
    return blend(b1, b2, t[1], t[2])


def _squad(quaternions: Float[Tensor, "k 4"], segment: Tensor, local: Float[Tensor, "n"]) -> Float[Tensor, "n 4"]:
    """slerp(slerp(q_i, q_i+1, t), slerp(s_i, s_i+1, t), 2 t (1 - t)) with the inner points s of Shoemake."""
    keys = [quaternions[0]]
    for quaternion in quaternions[1:]:
        # Neighbours of opposite sign would send the path the long way round.
        keys.append(quaternion if torch.dot(keys[-1], quaternion) >= 0 else -quaternion)
    q = torch.stack(keys)
    inner = q.clone()
    if len(q) > 2:
        inverse = q[1:-1] * torch.tensor([1.0, -1.0, -1.0, -1.0], dtype=q.dtype)
        to_next = quaternion_to_axis_angle(multiply_quaternions(inverse, q[2:]))
        to_previous = quaternion_to_axis_angle(multiply_quaternions(inverse, q[:-2]))
        inner[1:-1] = multiply_quaternions(q[1:-1], axis_angle_to_quaternion(-(to_next + to_previous) / 4))
    outer_path = slerp_as_given(q[segment], q[segment + 1], local)
    inner_path = slerp_as_given(inner[segment], inner[segment + 1], local)
    return slerp_as_given(outer_path, inner_path, 2 * local * (1 - local))
