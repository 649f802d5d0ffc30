"""Which similarity maps given cameras onto predicted ones? Umeyama's solution on centres, with the released RANSAC.

Predicted cameras have a unit and a frame of their own; the scale found here turns predicted depth into the unit of the
given cameras. Knows no network and no depth.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

RANSAC_ROUNDS = 10
RANSAC_SEED = 42
"""Of the released code, so that the same views are drawn."""
FEWEST_VIEWS = 3
"""Fewest views in a RANSAC sample and in its final fit (released code)."""


@dataclass(frozen=True)
class Similarity:
    """x -> scale R x + t."""

    rotation: Float[Tensor, "3 3"]
    translation: Float[Tensor, "3"]
    scale: float

    def apply(self, points: Float[Tensor, "n 3"]) -> Float[Tensor, "n 3"]:
        """Map points."""
        return self.scale * points @ self.rotation.T + self.translation

    def undo(self, w2c: Float[Tensor, "n 4 4"]) -> Float[Tensor, "n 4 4"]:
        """World-to-camera matrices of the target world as ones of the source world; depth there is 1/scale as large."""
        out = w2c.clone()
        out[:, :3, :3] = w2c[:, :3, :3] @ self.rotation.to(w2c)
        moved = w2c[:, :3, :3] @ self.translation.to(w2c) + w2c[:, :3, 3]
        out[:, :3, 3] = moved / self.scale
        return out


def camera_centres(w2c: Float[Tensor, "n 4 4"]) -> Float[Tensor, "n 3"]:
    """Centres of cameras in float64 on the CPU, where the alignments are computed."""
    w2c = w2c.detach().double().cpu()
    return -(w2c[:, :3, :3].transpose(1, 2) @ w2c[:, :3, 3:])[..., 0]


def nearest_rotation(matrix: Float[Tensor, "3 3"]) -> Float[Tensor, "3 3"]:
    """The rotation R with the largest trace of R^T M, from the singular value decomposition of M."""
    u, _, v = torch.linalg.svd(matrix)
    sign = torch.ones_like(matrix[0])
    sign[2] = torch.sign(torch.linalg.det(u) * torch.linalg.det(v))
    return u @ torch.diag(sign) @ v


def mean_rotation(source: Float[Tensor, "n 4 4"], target: Float[Tensor, "n 4 4"]) -> Float[Tensor, "3 3"]:
    """The rotation of the world that turns source cameras into target cameras (w2c) best (chordal mean), float64.

    Needs one camera only and no movement.
    """
    own, wanted = (w2c[:, :3, :3].detach().double().cpu().transpose(1, 2) for w2c in (source, target))
    return nearest_rotation((wanted @ own.transpose(1, 2)).sum(dim=0))


def umeyama(
    source: Float[Tensor, "n 3"],
    target: Float[Tensor, "n 3"],
    weights: Float[Tensor, "n"] | None = None,
    rotation: Float[Tensor, "3 3"] | None = None,
) -> Similarity:
    """The similarity with the least weighted squared error from source points to target points (Umeyama 1991).

    On a straight line the roll about the line is arbitrary while scale and centres are exact; the released code shakes
    such points by 1e-6 instead, which makes the roll no better.

    Args:
        source, target: pairs of points.
        weights: of the pairs, not negative; their sum does not matter. All weigh alike when there are none.
        rotation: where it is known already; only scale and translation are fitted then, and the scale of points that
            move against each other is not positive.

    Raises:
        ValueError: the source points coincide, so that any scale would do.
    """
    weights = torch.ones_like(source[:, 0]) if weights is None else weights
    share = (weights / weights.sum())[:, None]
    source_mean, target_mean = (share * source).sum(dim=0), (share * target).sum(dim=0)
    moved, aim = source - source_mean, target - target_mean
    variance = (share * moved.square()).sum()
    if not bool(variance > 0):
        raise ValueError("points that coincide, as those of cameras that do not move, have no scale")
    covariance = (share * aim).T @ moved
    rotation = nearest_rotation(covariance) if rotation is None else rotation
    scale = (covariance * rotation).sum() / variance
    return Similarity(rotation, target_mean - scale * rotation @ source_mean, float(scale))


def umeyama_ransac(source: Float[Tensor, "n 3"], target: Float[Tensor, "n 3"]) -> Similarity:
    """Umeyama's solution without the views that do not fit (released code, used from 10 views on).

    Ten samples of half the views are fitted; the inliers of the best are fitted again. An inlier's error is at most the
    median distance from a centre to the nearest target centre after a first fit over all views.

    Raises:
        ValueError: the source points coincide.
    """
    count, chosen = len(source), umeyama(source, target)
    limit = torch.cdist(chosen.apply(source), target).amin(dim=1).quantile(0.5)
    draws = np.random.default_rng(RANSAC_SEED)
    best, inliers = (-1, 0.0), torch.zeros(count, dtype=torch.bool)
    for _ in range(RANSAC_ROUNDS):
        sample = torch.from_numpy(draws.choice(count, size=max(FEWEST_VIEWS, (count + 1) // 2), replace=False))
        try:
            fit = umeyama(source[sample], target[sample])
        except ValueError:
            continue
        error = (fit.apply(source) - target).norm(dim=1)
        inside = error <= limit
        number = int(inside.sum())
        score = (number, -float(error[inside].mean()) if number else -math.inf)
        if score > best:
            best, inliers, chosen = score, inside, fit
    if int(inliers.sum()) < FEWEST_VIEWS:
        return chosen
    return umeyama(source[inliers], target[inliers])


def align_orientations(source: Float[Tensor, "n 4 4"], target: Float[Tensor, "n 4 4"]) -> Similarity:
    """The similarity between two sets of w2c whose rotation is the mean of the cameras' own turns.

    Unlike the centres alone this fixes the roll about a straight path, and so which way is up; scale and translation
    are then the least squares of the centres.

    Raises:
        ValueError: the source centres coincide.
    """
    return umeyama(camera_centres(source), camera_centres(target), rotation=mean_rotation(source, target))
