"""Cameras in and out of the network: given cameras as tokens for the backbone, camera features as predicted cameras.

Everything here is float32, as released. Cameras are `w2c` and K in pixels of the processed image; between the two lies
an encoding of nine numbers: translation and xyzw quaternion of the c2w, and the vertical and horizontal field of view
in radians. Knows no dense head.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lyra.geometry.rotations import matrix_to_quaternion, quaternion_to_matrix
from lyra.models.depth_anything.layers import Block, Mlp

SHORTEST_UNIT = 0.1
"""Least unit by which given translations are divided (released code)."""
SMALLEST_TANGENT = 1e-6
"""Floor of the tangent of half a field of view, so that a predicted field of view of 0 stays finite (released code)."""
ENCODER_HEADS = 16
ENCODER_DEPTH = 4


def rigid_inverse(pose: Float[Tensor, "*batch 4 4"]) -> Float[Tensor, "*batch 4 4"]:
    """Inverse of a rotation and a translation."""
    turned = pose[..., :3, :3].transpose(-1, -2)
    top = torch.cat([turned, -turned @ pose[..., :3, 3:]], dim=-1)
    return torch.cat([top, pose[..., 3:, :]], dim=-2)


def normalised_cameras(w2c: Float[Tensor, "b s 4 4"]) -> Float[Tensor, "b s 4 4"]:
    """Cameras in the frame of the first one, in units of the median distance from it (released code).

    The lower median over all views counts the first view's own zero; the unit is at least 0.1.
    """
    relative = w2c @ rigid_inverse(w2c[:, :1])
    distance = relative[..., :3, 3].norm(dim=-1)
    unit = distance.median(dim=-1).values.clamp(min=SHORTEST_UNIT)
    scaled = relative.clone()
    scaled[..., :3, 3] = relative[..., :3, 3] / unit[:, None, None]
    return scaled


def encode_cameras(
    w2c: Float[Tensor, "b s 4 4"], intrinsics: Float[Tensor, "b s 3 3"], height: int, width: int
) -> Float[Tensor, "b s 9"]:
    """The nine numbers of each camera; the quaternion has w >= 0."""
    c2w = rigid_inverse(w2c)
    quaternion = matrix_to_quaternion(c2w[..., :3, :3]).roll(-1, dims=-1)
    vertical = 2 * torch.atan(height / 2 / intrinsics[..., 1, 1])
    horizontal = 2 * torch.atan(width / 2 / intrinsics[..., 0, 0])
    return torch.cat([c2w[..., :3, 3], quaternion, vertical[..., None], horizontal[..., None]], dim=-1)


def decode_cameras(
    encoding: Float[Tensor, "b s 9"], height: int, width: int
) -> tuple[Float[Tensor, "b s 4 4"], Float[Tensor, "b s 3 3"]]:
    """`w2c` and K of encoded cameras; the principal point is exactly the centre of the image."""
    rotation = quaternion_to_matrix(encoding[..., 3:7].roll(1, dims=-1)).transpose(-1, -2)
    w2c = torch.zeros(*encoding.shape[:-1], 4, 4, device=encoding.device)
    w2c[..., :3, :3] = rotation
    w2c[..., :3, 3] = -(rotation @ encoding[..., :3, None])[..., 0]
    w2c[..., 3, 3] = 1
    tangent = torch.tan(encoding[..., 7:] / 2).clamp(min=SMALLEST_TANGENT)
    intrinsics = torch.zeros(*encoding.shape[:-1], 3, 3, device=encoding.device)
    intrinsics[..., 0, 0] = width / 2 / tangent[..., 1]
    intrinsics[..., 1, 1] = height / 2 / tangent[..., 0]
    intrinsics[..., 0, 2], intrinsics[..., 1, 2], intrinsics[..., 2, 2] = width / 2, height / 2, 1
    return w2c, intrinsics


class CameraEncoder(nn.Module):
    """Given cameras to the tokens that replace the backbone's special tokens; cameras attend to each other."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.pose_branch = Mlp(9, dim // 2, dim)
        self.token_norm = nn.LayerNorm(dim)
        self.trunk = nn.Sequential(*(Block(dim, ENCODER_HEADS, norm_eps=1e-5) for _ in range(ENCODER_DEPTH)))
        self.trunk_norm = nn.LayerNorm(dim)

    def forward(
        self, w2c: Float[Tensor, "b s 4 4"], intrinsics: Float[Tensor, "b s 3 3"], height: int, width: int
    ) -> Float[Tensor, "b s c"]:
        """Tokens of cameras, which `normalised_cameras` has put into the frame and unit that the weights know."""
        encoding = encode_cameras(w2c, intrinsics, height, width)
        return self.trunk_norm(self.trunk(self.token_norm(self.pose_branch(encoding))))


class CameraDecoder(nn.Module):
    """Camera features of the backbone to encoded cameras."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim), nn.ReLU())
        self.fc_t, self.fc_qvec = nn.Linear(dim, 3), nn.Linear(dim, 4)
        self.fc_fov = nn.Sequential(nn.Linear(dim, 2), nn.ReLU())

    def forward(self, features: Float[Tensor, "b s c"]) -> Float[Tensor, "b s 9"]:
        """The nine numbers of each view; the quaternion may have any length."""
        hidden = self.backbone(features)
        return torch.cat([self.fc_t(hidden), self.fc_qvec(hidden), self.fc_fov(hidden)], dim=-1)
