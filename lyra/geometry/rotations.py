"""How is a rotation written: matrices, wxyz quaternions, rotation vectors, and world-to-camera poses made from them.

Every function takes any batch dimensions and keeps the dtype and device of what it is given. Knows no camera path, no
intrinsics and no image. Conventions: matrices act on column vectors, quaternions are wxyz with w >= 0 when returned,
rotation vectors are axis times angle in radians, cameras are OpenCV (x right, y down, z forward).
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import normalize

_PARALLEL = 1.0 - 1e-6
"""Above this cosine between two unit quaternions sin(angle) is lost in float32, so slerp becomes a linear blend."""


def quaternion_to_matrix(quaternion: Float[Tensor, "*batch 4"]) -> Float[Tensor, "*batch 3 3"]:
    """Rotation matrix of a wxyz quaternion of any non-zero length.

    >>> quaternion_to_matrix(torch.tensor([0.0, 1.0, 0.0, 0.0])).diagonal().tolist()
    [1.0, -1.0, -1.0]
    """
    w, x, y, z = normalize(quaternion, dim=-1).unbind(-1)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)


def matrix_to_quaternion(matrix: Float[Tensor, "*batch 3 3"]) -> Float[Tensor, "*batch 4"]:
    """Unit wxyz quaternion with w >= 0 of a rotation matrix.

    Each row of the symmetric matrix 4 q q^T can be read off the rotation matrix and is q times one of its own
    components; the row of the largest component is used, which is never near zero (Shepperd 1978).
    """
    m00, m01, m02, m10, m11, m12, m20, m21, m22 = matrix.flatten(-2).unbind(-1)
    rows = [
        [1 + m00 + m11 + m22, m21 - m12, m02 - m20, m10 - m01],
        [m21 - m12, 1 + m00 - m11 - m22, m01 + m10, m02 + m20],
        [m02 - m20, m01 + m10, 1 - m00 + m11 - m22, m12 + m21],
        [m10 - m01, m02 + m20, m12 + m21, 1 - m00 - m11 + m22],
    ]
    outer = torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)
    best = outer.diagonal(dim1=-2, dim2=-1).argmax(dim=-1)
    row = outer.gather(-2, best[..., None, None].expand(*best.shape, 1, 4)).squeeze(-2)
    return canonical_quaternion(normalize(row, dim=-1))


def canonical_quaternion(quaternion: Float[Tensor, "*batch 4"]) -> Float[Tensor, "*batch 4"]:
    """The same rotation with w >= 0 (q and -q rotate alike)."""
    return torch.where(quaternion[..., :1] < 0, -quaternion, quaternion)


def multiply_quaternions(a: Float[Tensor, "*batch 4"], b: Float[Tensor, "*batch 4"]) -> Float[Tensor, "*batch 4"]:
    """Hamilton product: the rotation that applies `b` first and `a` second."""
    aw, ax, ay, az = a.unbind(-1)
    bw, bx, by, bz = b.unbind(-1)
    w = aw * bw - ax * bx - ay * by - az * bz
    x = aw * bx + ax * bw + ay * bz - az * by
    y = aw * by - ax * bz + ay * bw + az * bx
    z = aw * bz + ax * by - ay * bx + az * bw
    return torch.stack([w, x, y, z], dim=-1)


def axis_angle_to_quaternion(rotation_vector: Float[Tensor, "*batch 3"]) -> Float[Tensor, "*batch 4"]:
    """Unit wxyz quaternion of a rotation vector (axis times angle in radians, angle at most pi for w >= 0)."""
    half = rotation_vector.norm(dim=-1, keepdim=True) / 2
    # torch.sinc is sin(pi x) / (pi x), smooth at zero, so that no rotation needs no special case.
    return torch.cat([half.cos(), rotation_vector * torch.sinc(half / torch.pi) / 2], dim=-1)


def quaternion_to_axis_angle(quaternion: Float[Tensor, "*batch 4"]) -> Float[Tensor, "*batch 3"]:
    """Rotation vector of at most pi radians of a wxyz quaternion of any non-zero length."""
    unit = canonical_quaternion(normalize(quaternion, dim=-1))
    w, xyz = unit[..., :1], unit[..., 1:]
    sine = xyz.norm(dim=-1, keepdim=True)
    # atan2 keeps its precision near 0 and near pi, where acos(w) loses half of the digits.
    angle = 2 * torch.atan2(sine, w)
    factor = torch.where(sine > 0, angle / sine.clamp_min(torch.finfo(sine.dtype).tiny), torch.full_like(sine, 2.0))
    return xyz * factor


def axis_angle_to_matrix(rotation_vector: Float[Tensor, "*batch 3"]) -> Float[Tensor, "*batch 3 3"]:
    """Rotation matrix of a rotation vector (axis times angle in radians)."""
    return quaternion_to_matrix(axis_angle_to_quaternion(rotation_vector))


def matrix_to_axis_angle(matrix: Float[Tensor, "*batch 3 3"]) -> Float[Tensor, "*batch 3"]:
    """Rotation vector of at most pi radians of a rotation matrix."""
    return quaternion_to_axis_angle(matrix_to_quaternion(matrix))


def rotation_angle(a: Float[Tensor, "*batch 3 3"], b: Float[Tensor, "*batch 3 3"]) -> Float[Tensor, "*batch"]:
    """Angle in radians, 0 to pi, of the rotation that turns `a` into `b`."""
    return matrix_to_axis_angle(a.transpose(-1, -2) @ b).norm(dim=-1)


def slerp(
    start: Float[Tensor, "*batch 4"], end: Float[Tensor, "*batch 4"], fraction: Float[Tensor, "*batch"]
) -> Float[Tensor, "*batch 4"]:
    """Rotation a fraction of the shorter way from `start` to `end` at constant angular speed (Shoemake 1985).

    Quaternions are unit wxyz; the result has w >= 0.
    """
    cosine = (start * end).sum(dim=-1, keepdim=True)
    end = torch.where(cosine < 0, -end, end)
    return canonical_quaternion(slerp_as_given(start, end, fraction))


def slerp_as_given(
    start: Float[Tensor, "*batch 4"], end: Float[Tensor, "*batch 4"], fraction: Float[Tensor, "*batch"]
) -> Float[Tensor, "*batch 4"]:
    """Great-circle blend of two unit quaternions with the signs they have, as a quaternion spline (squad) needs."""
    cosine = (start * end).sum(dim=-1, keepdim=True).clamp(-1, 1)
    t = fraction[..., None]
    angle = torch.acos(cosine.clamp(-_PARALLEL, _PARALLEL))
    curved = (torch.sin((1 - t) * angle) * start + torch.sin(t * angle) * end) / torch.sin(angle)
    straight = (1 - t) * start + t * end
    return normalize(torch.where(cosine > _PARALLEL, straight, curved), dim=-1)


def is_rotation(matrix: Float[Tensor, "*batch 3 3"], tolerance: float = 1e-3) -> Bool[Tensor, "*batch"]:
    """True where a matrix is orthonormal (largest entry of |R R^T - I|) and not a reflection, within `tolerance`.

    NaN and infinity are never a rotation.
    """
    identity = torch.eye(3, dtype=matrix.dtype, device=matrix.device)
    orthonormal = (matrix @ matrix.transpose(-1, -2) - identity).abs().amax(dim=(-2, -1)) <= tolerance
    # |det| of an orthonormal matrix follows from the test above, so only its sign carries news.
    return orthonormal & (torch.linalg.det(matrix) > 0)


def world_to_camera(
    rotation: Float[Tensor, "*batch 3 3"], centre: Float[Tensor, "*batch 3"]
) -> Float[Tensor, "*batch 4 4"]:
    """4x4 world-to-camera matrix of a camera with world-to-camera `rotation` R and centre C: t = -R C."""
    top = torch.cat([rotation, -rotation @ centre[..., None]], dim=-1)
    bottom = torch.tensor([0.0, 0.0, 0.0, 1.0], dtype=top.dtype, device=top.device)
    return torch.cat([top, bottom.expand(*top.shape[:-2], 1, 4)], dim=-2)


def look_at(centre: Float[Tensor, "*batch 3"], target: Float[Tensor, "*batch 3"]) -> Float[Tensor, "*batch 4 4"]:
    """World-to-camera matrix of a camera at `centre` that looks at `target` with the world's y axis pointing down.

    Released code: z = target - centre normalised, x = (0, 1, 0) x z, y = z x x. Looking straight along the y axis,
    where that x vanishes (the released code divides by zero), x is the world's x axis instead.

    Raises:
        ValueError: `target` equals `centre`, so there is no direction to look in.
    """
    forward = target - centre
    if bool((forward.norm(dim=-1) == 0).any()):
        raise ValueError("a camera cannot look at its own centre")
    forward = normalize(forward, dim=-1)
    down = torch.tensor([0.0, 1.0, 0.0], dtype=forward.dtype, device=forward.device).expand_as(forward)
    right = torch.linalg.cross(down, forward)
    vertical = right.norm(dim=-1, keepdim=True) < 1e-6
    fallback = torch.tensor([1.0, 0.0, 0.0], dtype=forward.dtype, device=forward.device).expand_as(forward)
    right = normalize(torch.where(vertical, fallback, right), dim=-1)
    rotation = torch.stack([right, torch.linalg.cross(forward, right), forward], dim=-2)
    return world_to_camera(rotation, centre)
