"""Similarities of space, Sim(3): how they move points, cameras and Gaussians, and which one maps one set onto another.

Between two sets of cameras the rotation is by default the mean of the cameras' own turns: centres alone leave the roll
about a straight path free, and so which way is up. Fits are computed in float64 on the CPU. Knows no network.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from lyra.geometry.rotations import matrix_to_quaternion, multiply_quaternions
from lyra.models.depth_anything.alignment import Similarity, align_orientations, camera_centres, umeyama
from lyra.models.depth_anything.alignment import mean_rotation as mean_rotation  # Callers find all fits here.
from lyra.models.depth_anything.gaussian_adapter import first_band_turn, second_band_turn
from lyra.types import Cameras, GaussianScene

AlignmentRule = Literal["orientations", "centres"]
"""What fixes the rotation between two sets of cameras: the mean of their turns, or their centres alone (released)."""


@dataclass(frozen=True)
class Sim3:
    """x -> scale R x + translation, with scale > 0."""

    scale: float
    rotation: Float[Tensor, "3 3"]
    translation: Float[Tensor, "3"]

    @staticmethod
    def identity() -> Sim3:
        """What moves nothing."""
        return Sim3(1.0, torch.eye(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64))

    @staticmethod
    def from_similarity(fit: Similarity) -> Sim3:
        """The same map as a network's alignment gives it."""
        return Sim3(fit.scale, fit.rotation, fit.translation)

    @staticmethod
    def from_pose(pose: Float[Tensor, "4 4"]) -> Sim3:
        """The map of a rotation and a translation in one matrix, such as a w2c."""
        pose = pose.detach().double().cpu()
        return Sim3(1.0, pose[:3, :3], pose[:3, 3])

    def inverse(self) -> Sim3:
        """The map back."""
        back = self.rotation.T / self.scale
        return Sim3(1 / self.scale, self.rotation.T, -back @ self.translation)

    def after(self, first: Sim3) -> Sim3:
        """The composition that applies `first` first and this map second."""
        return Sim3(
            self.scale * first.scale,
            self.rotation @ first.rotation,
            self.scale * self.rotation @ first.translation + self.translation,
        )

    def apply_to_points(self, points: Float[Tensor, "*batch 3"]) -> Float[Tensor, "*batch 3"]:
        """Moved points, in the dtype and on the device of `points`."""
        return points @ (self.scale * self.rotation.T).to(points) + self.translation.to(points)

    def apply_to_w2c(self, w2c: Float[Tensor, "n 4 4"]) -> Float[Tensor, "n 4 4"]:
        """World-to-camera matrices of the moved cameras: they see the moved points at the same pixels, `scale` as far.

        The matrices stay rigid, because the scale goes into the translations.
        """
        turned = w2c[:, :3, :3] @ self.rotation.T.to(w2c)
        moved = w2c.clone()
        moved[:, :3, :3] = turned
        moved[:, :3, 3] = self.scale * w2c[:, :3, 3] - turned @ self.translation.to(w2c)
        return moved

    def apply_to_cameras(self, cameras: Cameras) -> Cameras:
        """Moved cameras with the same intrinsics."""
        moved = self.apply_to_w2c(cameras.w2c)
        return Cameras(moved, cameras.intrinsics, cameras.image_height, cameras.image_width)

    def apply_to_scene(self, scene: GaussianScene) -> GaussianScene:
        """Moved Gaussians: rotated by R on the left of their own rotation, harmonics included.

        Raises:
            ValueError: the spherical harmonics are of a degree above 2.
        """
        turn = matrix_to_quaternion(self.rotation).to(scene.quats)
        return GaussianScene(
            means=self.apply_to_points(scene.means),
            quats=multiply_quaternions(turn.expand_as(scene.quats), scene.quats),
            scales=scene.scales * self.scale,
            opacities=scene.opacities,
            sh=turned_harmonics(scene.sh, self.rotation),
        )


def turned_harmonics(sh: Float[Tensor, "n k 3"], rotation: Float[Tensor, "3 3"]) -> Float[Tensor, "n k 3"]:
    """Coefficients of the same colours seen from turned directions.

    Raises:
        ValueError: the degree is above 2.
    """
    if sh.shape[1] == 1:
        return sh
    if sh.shape[1] not in (4, 9):
        raise ValueError(f"{sh.shape[1]} spherical harmonics cannot be turned; 1, 4 and 9 can")
    turn = rotation.to(sh)[None]
    bands = [sh[:, :1], torch.einsum("ij,njc->nic", first_band_turn(turn)[0], sh[:, 1:4])]
    if sh.shape[1] == 9:
        bands.append(torch.einsum("ij,njc->nic", second_band_turn(turn)[0], sh[:, 4:]))
    return torch.cat(bands, dim=1)


def weighted_umeyama(
    source: Float[Tensor, "n 3"],
    target: Float[Tensor, "n 3"],
    weights: Float[Tensor, "n"],
    rotation: Float[Tensor, "3 3"] | None = None,
) -> Sim3:
    """The similarity with the least weighted squared error from source to target points (Umeyama 1991, weighted).

    Args:
        source, target: pairs of points.
        weights: of the pairs, not negative; their sum does not matter.
        rotation: where it is known already; only scale and translation are fitted then.

    Raises:
        ValueError: the source points coincide or move against the target points, so that no scale fits.
    """
    source, target, weights = (values.detach().double().cpu() for values in (source, target, weights))
    fit = umeyama(source, target, weights, None if rotation is None else rotation.double().cpu())
    return growing(fit, "the points move against each other, so no scale fits")


def align_cameras(
    source: Float[Tensor, "n 4 4"], target: Float[Tensor, "n 4 4"], rule: AlignmentRule = "orientations"
) -> Sim3:
    """The similarity of the world that brings source cameras (w2c) onto target cameras.

    Args:
        source, target: the same cameras in two worlds.
        rule: "orientations" averages the cameras' turns and fits scale and translation to their centres by least
            squares; "centres" is the released code's rule, which leaves the roll about a straight path free.

    Raises:
        ValueError: the source cameras do not move, or against the target ones, so that no scale fits.
    """
    if rule == "orientations":
        fit = align_orientations(source, target)
    else:
        fit = umeyama(camera_centres(source), camera_centres(target))
    return growing(fit, "the cameras move against each other, so no scale fits")


def growing(fit: Similarity, otherwise: str) -> Sim3:
    """A fit whose scale is positive.

    Raises:
        ValueError: it is not; says what is wrong `otherwise`.
    """
    if not fit.scale > 0:
        raise ValueError(otherwise)
    return Sim3.from_similarity(fit)
