"""Raw Gaussian channels to Gaussians in the world, with every quirk of the released adapter that its weights rely on.

Quirks, all needed because the head was trained through them: z depth is used as length along the ray; the depth of a
cell is that of its top left pixel while its ray leaves from its centre; quaternions are multiplied with their parts in
the wrong slots, which only equals the right product where the camera is not turned. So work in a world whose first
camera is near the identity, and turn the finished scene with correct maths. Knows no network.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lyra.geometry.cameras import pixel_grid
from lyra.geometry.rotations import matrix_to_quaternion, multiply_quaternions
from lyra.models.depth_anything.alignment import align_orientations, camera_centres, umeyama
from lyra.models.depth_anything.camera import rigid_inverse
from lyra.types import GaussianScene

SMALLEST_SCALE, LARGEST_SCALE = 1e-5, 30.0
"""Range of scales, in tenths of the mean size of a grid cell at the Gaussian's depth."""
SH_DAMPING = (1.0, 0.025, 0.00625)
"""Factor of each spherical-harmonic band: 0.1 x 0.25^band above the first."""
SMALLEST_UNIT = 1e-6


@dataclass(frozen=True)
class GaussianCameras:
    """The cameras that Gaussians are unprojected with."""

    w2c: Float[Tensor, "s 4 4"]
    unit: float
    """Length of the world's unit in the network's: predicted depth is divided by it."""


def gaussian_cameras(
    given: Float[Tensor, "s 4 4"],
    predicted: Float[Tensor, "s 4 4"],
    *,
    use_predicted: bool = True,
    orientations: bool = False,
) -> GaussianCameras:
    """Cameras in the world of the given ones, and the predicted unit there.

    Args:
        given: w2c that the network was told, before normalisation.
        predicted: w2c that it predicted, in its own unit.
        use_predicted: unproject with the predicted cameras mapped into the given world (Lyra's default); otherwise with
            the given ones.
        orientations: align the cameras' turns and not only their centres, which keeps up upright on straight paths;
            the released code aligns centres only.

    Raises:
        ValueError: the given cameras do not move, so that no scale can be found.
    """
    if orientations:
        fit = align_orientations(given, predicted)
    else:
        fit = umeyama(camera_centres(given), camera_centres(predicted))
    unit = max(fit.scale, SMALLEST_UNIT)
    return GaussianCameras(fit.undo(predicted) if use_predicted else given, unit)


def to_gaussians(
    raw: Float[Tensor, "s hg wg 38"],
    depth: Float[Tensor, "s h w"],
    cameras: GaussianCameras,
    intrinsics: Float[Tensor, "s 3 3"],
    *,
    scale_multiplier: float = 1.0,
) -> GaussianScene:
    """One Gaussian for each grid cell, in the order (view, row, column).

    Args:
        raw: channels of the Gaussian head.
        depth: z depth in the network's own unit (before metric scaling).
        cameras: of the views, in the world that Gaussians are wanted in.
        intrinsics: K in pixels of `depth`.
        scale_multiplier: multiplies the largest scale.

    A depth offset can put a Gaussian behind its camera, with negative scales; drop those on export.
    """
    rows, columns = raw.shape[1:3]
    height, width = depth.shape[-2:]
    c2w = rigid_inverse(cameras.w2c.to(raw))
    offset, scale, quaternion, sh, depth_offset, opacity = raw.split((2, 3, 4, 27, 1, 1), dim=-1)
    z = depth[:, :: height // rows, :: width // columns, None] / cameras.unit + depth_offset / cameras.unit

    to_grid = torch.tensor([columns / width, rows / height, 1.0], device=raw.device)
    grid_intrinsics = intrinsics.to(raw) * to_grid[:, None]
    centres = pixel_grid(rows, columns, raw.device) + torch.tensor([0.5, 0.5, 0.0], device=raw.device)
    pixels = torch.cat([centres[..., :2] + offset, torch.ones_like(offset[..., :1])], dim=-1)
    rays = torch.einsum("sij,srcj->srci", torch.linalg.inv(grid_intrinsics), pixels)
    rays = torch.einsum("sij,srcj->srci", c2w[:, :3, :3], rays / rays.norm(dim=-1, keepdim=True))

    cell = 0.1 * (1 / grid_intrinsics[:, 0, 0] + 1 / grid_intrinsics[:, 1, 1])[:, None, None, None]
    largest = LARGEST_SCALE * scale_multiplier
    return GaussianScene(
        means=(c2w[:, None, None, :3, 3] + rays * z).flatten(0, 2),
        quats=released_quaternions(quaternion, c2w[:, :3, :3]).flatten(0, 2),
        scales=((SMALLEST_SCALE + (largest - SMALLEST_SCALE) * scale.sigmoid()) * z * cell).flatten(0, 2),
        opacities=opacity.sigmoid().flatten(),
        sh=world_harmonics(sh, c2w[:, :3, :3]).flatten(0, 2),
    )


def released_quaternions(raw: Float[Tensor, "s r c 4"], rotation: Float[Tensor, "s 3 3"]) -> Float[Tensor, "s r c 4"]:
    """Quaternions for the wxyz slots of a splat file, as the released code makes them (its parts in wrong slots).

    With the camera's turn q and the normalised channels f it is q (f3, f0, f1, f2) with both factors read as xyzw,
    signed so that the last part is not negative.
    """
    unit = raw / (raw.norm(dim=-1, keepdim=True) + 1e-8)
    own_wxyz = unit[..., [2, 3, 0, 1]]
    product = multiply_quaternions(matrix_to_quaternion(rotation)[:, None, None].expand_as(own_wxyz), own_wxyz)
    product = product.roll(-1, dims=-1)
    return torch.where(product[..., 3:] < 0, -product, product)


def world_harmonics(sh: Float[Tensor, "s r c 27"], rotation: Float[Tensor, "s 3 3"]) -> Float[Tensor, "s r c 9 3"]:
    """Damped coefficients (colour-major channels) of degree 2, turned from each camera's axes to the world's."""
    coefficients = sh.unflatten(-1, (3, 9))
    bands = [band * factor for band, factor in zip(coefficients.split((1, 3, 5), dim=-1), SH_DAMPING, strict=True)]
    turns = zip(bands[1:], (first_band_turn(rotation), second_band_turn(rotation)), strict=True)
    turned = [torch.einsum("sij,srckj->srcki", turn, band) for band, turn in turns]
    return torch.cat([bands[0], *turned], dim=-1).transpose(-1, -2)


def first_band_turn(rotation: Float[Tensor, "s 3 3"]) -> Float[Tensor, "s 3 3"]:
    """How a rotation turns coefficients of the basis (-y, z, -x)."""
    basis = rotation.new_tensor([[0.0, -1.0, 0.0], [0.0, 0.0, 1.0], [-1.0, 0.0, 0.0]])
    return basis @ rotation @ basis.T


def second_band_turn(rotation: Float[Tensor, "s 3 3"]) -> Float[Tensor, "s 5 5"]:
    """How a rotation turns coefficients of the basis (xy, -yz, (2zz - xx - yy) / sqrt 12, -xz, (xx - yy) / 2).

    Each basis function is d^T Q d with a symmetric matrix Q of trace 0, and all Q here have the same length, so the
    entries of the turn are inner products of Q_i with R Q_j R^T.
    """
    basis = rotation.new_zeros(5, 3, 3)
    for index, (i, j, sign) in zip((0, 1, 3), ((0, 1, 1.0), (1, 2, -1.0), (0, 2, -1.0)), strict=True):
        basis[index, i, j] = basis[index, j, i] = sign / 2
    basis[2] = torch.diag(rotation.new_tensor([-1.0, -1.0, 2.0])) / 12**0.5
    basis[4] = torch.diag(rotation.new_tensor([1.0, -1.0, 0.0])) / 2
    turned = torch.einsum("sab,jbc,sdc->sjad", rotation, basis, rotation)
    return torch.einsum("iad,sjad->sij", 2 * basis, turned)
