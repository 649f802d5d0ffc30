"""How does a frame lie to a frame with depth: direct alignment of brightness, coarse to fine.

Levenberg's method on SE(3) with a gain and a bias of brightness; robust weights (Tukey's) leave out what is hidden,
moves or has wrong depth. Poses are 4x4 matrices from the reference camera's space to the target's, in float64. Knows
neither the path nor its other frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from lyra.reconstruction.odometry_graph import exponential, orthonormal
from lyra.reconstruction.odometry_images import FEWEST_POINTS, Level, Reference, ReferencePoints
from lyra.reconstruction.odometry_kernels import warp_residuals

STEPS_PER_LEVEL = 12
CUT = 4.685
"""Residuals beyond this many standard deviations count nothing (Tukey's constant for 95 % efficiency)."""
NOISE_FLOOR = 1.5 / 255
"""Standard deviation of brightness below which nothing is measured."""
CONVERGED = 1e-3
"""A level ends when a step lowers the cost by less than this share."""
LEAST_OVERLAP = 0.2
"""Least share of the reference's points that must fall into the target."""
LEAST_INLIERS = 0.7
"""Least share of these points whose brightness must agree."""
LEAST_CORRELATION = 0.8
"""Least correlation of brightness over them."""
INLIER_CONTRAST = 0.2
"""A point agrees when its residual is below this share of the contrast and a displacement of one pixel together."""
CORRELATED_POINTS = 10.0
"""Variances are this much larger than those of independent points would be."""
WIDEST_TURN = 0.02
"""Standard deviation of the rotation, in radians, above which the image does not fix it."""
WIDEST_SHIFT = 0.05
"""Standard deviation of the translation, as a share of the typical depth, above which the image does not fix it."""
UNSEEN_COST = 0.2
"""Cost of an unseen point where starting poses are compared; a residual as large as the contrast costs 1."""


@dataclass(frozen=True)
class Alignment:
    """A measured motion."""

    pose: Float[np.ndarray, "4 4"]
    information: Float[np.ndarray, "6 6"]
    """Inverse covariance of the twist applied after `pose`."""
    residual: float
    """Robust standard deviation of brightness differences, 0 to 1."""
    inlier_share: float
    """Share of the seen points whose brightness agrees."""
    overlap: float
    """Share of the reference's points that are seen."""
    correlation: float
    """Of brightness over the points that the alignment was not robust against."""
    is_sharp: bool
    """Whether the image fixes all six numbers of the motion."""

    @property
    def accepted(self) -> bool:
        """Whether the motion is to be believed."""
        agrees = self.inlier_share >= LEAST_INLIERS and self.correlation >= LEAST_CORRELATION
        return agrees and self.overlap >= LEAST_OVERLAP and self.is_sharp


@dataclass(frozen=True)
class Estimate:
    """A motion with the brightness change that goes with it."""

    pose: Float[np.ndarray, "4 4"]
    gain: float
    bias: float


@dataclass(frozen=True)
class Linearised:
    """Residuals of the seen points and what they answer to."""

    seen: Int[np.ndarray, "s"]
    """Which points."""
    residuals: Float[np.ndarray, "s"]
    jacobian: Float[np.ndarray, "s 8"]
    overlap: float
    """Share of the points that are seen."""


def align(
    reference: Reference, target: Sequence[Level], starts: Sequence[Float[np.ndarray, "4 4"]], *, levels: int
) -> Alignment | None:
    """Align a frame with a reference.

    Args:
        reference, target: levels, finest first, of the same number.
        starts: motions to start from; each is refined on the coarsest level and the best goes on.
        levels: how many levels to use, counted from the finest.

    Returns:
        The motion, or None where too few points are seen to say anything.
    """
    coarsest = min(levels, len(target)) - 1
    while coarsest > 0 and len(reference.levels[coarsest].points) < FEWEST_POINTS:
        coarsest -= 1
    points, level = reference.levels[coarsest], target[coarsest]
    candidates = [refine(points, level, estimate) for pose in starts for estimate in estimates_at(points, level, pose)]
    costs = [start_cost(points, level, candidate) for candidate in candidates]
    estimate = candidates[int(np.argmin(costs))]
    for index in range(coarsest - 1, -1, -1):
        estimate = refine(reference.levels[index], target[index], estimate)
    return judge(reference, target[0], estimate)


def estimates_at(points: ReferencePoints, level: Level, pose: Float[np.ndarray, "4 4"]) -> list[Estimate]:
    """A pose with two guesses of the brightness change: none, and what gives the seen points the same mean and spread.

    The first holds where something large and near has come into view, the second where the exposure has changed.
    Unlike a least-squares fit both hold before the frames are aligned.
    """
    unchanged = Estimate(pose, 1.0, 0.0)
    state = linearise(points, level, unchanged)
    if len(state.residuals) < FEWEST_POINTS:
        return [unchanged]
    own = points.values[state.seen]
    other = state.residuals + own
    spread = float(own.std())
    gain = float(np.clip(other.std() / spread, 0.5, 2.0)) if spread > 1e-4 else 1.0
    return [unchanged, Estimate(pose, gain, float(other.mean() - gain * own.mean()))]


def refine(points: ReferencePoints, level: Level, estimate: Estimate) -> Estimate:
    """Levenberg's method on one level."""
    state = linearise(points, level, estimate)
    damping = 1e-4
    for _ in range(STEPS_PER_LEVEL):
        if len(state.residuals) < FEWEST_POINTS:
            return estimate
        sigma = spread_of(state.residuals)
        weights = tukey_weights(state.residuals, sigma)
        hessian, gradient = normal_equations(state, weights)
        cost = tukey_cost(state.residuals, sigma)
        moved, new_state, new_cost = estimate, state, np.inf
        while damping < 1e4:
            moved = step(estimate, hessian, gradient, damping)
            new_state = linearise(points, level, moved)
            new_cost = tukey_cost(new_state.residuals, sigma)
            if new_cost < cost and new_state.overlap > 0.5 * state.overlap:
                break
            damping *= 10
        else:
            return estimate
        estimate, state, damping = moved, new_state, max(damping / 10, 1e-7)
        if cost - new_cost < CONVERGED * cost:
            break
    return estimate


def linearise(points: ReferencePoints, level: Level, estimate: Estimate) -> Linearised:
    """Residuals and Jacobian of the points that fall into the target."""
    seen = np.empty(len(points.points), np.int64)
    residuals = np.empty(len(points.points), np.float32)
    jacobian = np.empty((len(points.points), 8), np.float32)
    count = warp_residuals(
        points.points,
        points.values,
        estimate.pose,
        level.pinhole,
        level.image,
        level.gradient_x,
        level.gradient_y,
        estimate.gain,
        estimate.bias,
        seen,
        residuals,
        jacobian,
    )
    return Linearised(seen[:count], residuals[:count], jacobian[:count], count / max(len(points.points), 1))


def spread_of(residuals: Float[np.ndarray, "s"]) -> float:
    """Robust standard deviation (median of absolute values), not below the noise floor."""
    return max(1.4826 * float(np.median(np.abs(residuals))), NOISE_FLOOR)


def tukey_weights(residuals: Float[np.ndarray, "s"], sigma: float) -> Float[np.ndarray, "s"]:
    """Tukey's biweight."""
    inside = np.maximum(1 - np.square(residuals / (CUT * sigma)), 0)
    return inside * inside


def tukey_cost(residuals: Float[np.ndarray, "s"], sigma: float) -> float:
    """Mean of Tukey's loss, 0 to 1; infinite where too little is seen."""
    if len(residuals) < FEWEST_POINTS:
        return np.inf
    inside = np.maximum(1 - np.square(residuals / (CUT * sigma)), 0)
    return float(1 - (inside * inside * inside).mean())


def normal_equations(
    state: Linearised, weights: Float[np.ndarray, "s"]
) -> tuple[Float[np.ndarray, "8 8"], Float[np.ndarray, "8"]]:
    """Hessian and gradient of half the weighted squared residuals."""
    weighted = state.jacobian * weights[:, None]
    return (weighted.T @ state.jacobian).astype(np.float64), (weighted.T @ state.residuals).astype(np.float64)


def step(
    estimate: Estimate, hessian: Float[np.ndarray, "8 8"], gradient: Float[np.ndarray, "8"], damping: float
) -> Estimate:
    """The estimate after one damped Gauss-Newton step."""
    damped = hessian.copy()
    damped[np.diag_indices(8)] += damping * np.diag(hessian) + 1e-9
    change = -np.linalg.solve(damped, gradient)
    pose = orthonormal(exponential(change[:6]) @ estimate.pose)
    return Estimate(pose, estimate.gain + change[6], estimate.bias + change[7])


def start_cost(points: ReferencePoints, level: Level, estimate: Estimate) -> float:
    """How badly an estimate explains the target, comparable between estimates."""
    state = linearise(points, level, estimate)
    if len(state.residuals) < FEWEST_POINTS:
        return np.inf
    seen = np.minimum(np.square(state.residuals / contrast(points)), 1)
    return float(seen.sum()) + UNSEEN_COST * (len(points.points) - len(seen))


def contrast(points: ReferencePoints) -> float:
    """Standard deviation of the points' brightness, not below the noise floor."""
    return max(float(points.values.std()), NOISE_FLOOR)


def judge(reference: Reference, target: Level, estimate: Estimate) -> Alignment | None:
    """The motion with its covariance and the signs by which it is believed or not."""
    points = reference.levels[0]
    state = linearise(points, target, estimate)
    if len(state.residuals) < FEWEST_POINTS or not np.isfinite(estimate.pose).all():
        return None
    sigma = spread_of(state.residuals)
    hessian, _ = normal_equations(state, tukey_weights(state.residuals, sigma))
    brightness = hessian[6:, 6:] + 1e-9 * np.eye(2)
    poses = hessian[:6, :6] - hessian[:6, 6:] @ np.linalg.solve(brightness, hessian[6:, :6])
    # The smallest eigenvalues of what is scaled alike tell whether any motion is free.
    information = poses / (CORRELATED_POINTS * sigma * sigma)
    scale = np.diag([reference.typical_depth * WIDEST_SHIFT] * 3 + [WIDEST_TURN] * 3)
    smallest = float(np.linalg.eigvalsh(scale @ information @ scale)[0])
    own = points.values[state.seen]
    kept = np.abs(state.residuals) < CUT * sigma
    agrees = np.abs(state.residuals) < INLIER_CONTRAST * contrast(points) + points.gradients[state.seen]
    return Alignment(
        pose=estimate.pose,
        information=information,
        residual=sigma,
        inlier_share=float(agrees.mean()),
        overlap=state.overlap,
        correlation=correlation(own[kept], (state.residuals + estimate.gain * own)[kept]),
        is_sharp=bool(smallest >= 1),
    )


def correlation(a: Float[np.ndarray, "s"], b: Float[np.ndarray, "s"]) -> float:
    """Pearson's correlation; 0 where one of them does not vary."""
    a, b = a - a.mean(), b - b.mean()
    scale = float(np.sqrt((a * a).sum() * (b * b).sum()))
    return float((a * b).sum()) / scale if scale > 1e-6 else 0.0
