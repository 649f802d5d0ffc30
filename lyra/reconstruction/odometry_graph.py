"""How do many measured motions between cameras become one path: rigid motions, their graph and its least squares.

Poses are 4x4 world-to-camera matrices in float64, twists are (translation, rotation vector) applied on the left. Knows
no image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

ROUNDS = 12
"""Most Gauss-Newton steps."""
STILL = 1e-9
"""Steps end when no twist is longer than this."""
OUTLIER = 9.0
"""Squared error, in units of the median one, at which a measured motion counts half (Cauchy's weight)."""


@dataclass(frozen=True)
class Edge:
    """A measured motion between two cameras."""

    source: int
    target: int
    pose: Float[np.ndarray, "4 4"]
    """From the source camera's space to the target's."""
    information: Float[np.ndarray, "6 6"]
    """Inverse covariance of the twist applied after `pose`."""


def cross_matrix(v: Float[np.ndarray, "3"]) -> Float[np.ndarray, "3 3"]:
    """The matrix of the cross product with v from the left."""
    return np.array([[0.0, -v[2], v[1]], [v[2], 0.0, -v[0]], [-v[1], v[0], 0.0]])


def exponential(twist: Float[np.ndarray, "6"]) -> Float[np.ndarray, "4 4"]:
    """The rigid motion of a twist."""
    w = cross_matrix(twist[3:])
    angle = float(np.linalg.norm(twist[3:]))
    if angle < 1e-5:
        a, b, c = 1.0, 0.5, 1 / 6
    else:
        a, b, c = np.sin(angle) / angle, (1 - np.cos(angle)) / angle**2, (angle - np.sin(angle)) / angle**3
    pose = np.eye(4)
    pose[:3, :3] = np.eye(3) + a * w + b * (w @ w)
    pose[:3, 3] = (np.eye(3) + b * w + c * (w @ w)) @ twist[:3]
    return pose


def logarithm(pose: Float[np.ndarray, "4 4"]) -> Float[np.ndarray, "6"]:
    """The twist of a rigid motion that turns by less than pi."""
    rotation = pose[:3, :3]
    axis = np.array([rotation[2, 1] - rotation[1, 2], rotation[0, 2] - rotation[2, 0], rotation[1, 0] - rotation[0, 1]])
    sine, cosine = float(np.linalg.norm(axis)) / 2, (float(np.trace(rotation)) - 1) / 2
    angle = float(np.arctan2(sine, cosine))
    turn = axis / 2 if sine < 1e-8 else axis * (angle / (2 * sine))
    w = cross_matrix(turn)
    d = 1 / 12 if angle < 1e-3 else (1 - angle / 2 / np.tan(angle / 2)) / angle**2
    return np.concatenate([(np.eye(3) - 0.5 * w + d * (w @ w)) @ pose[:3, 3], turn])


def adjoint(pose: Float[np.ndarray, "4 4"]) -> Float[np.ndarray, "6 6"]:
    """What moves a twist from before `pose` to after it."""
    rotation = pose[:3, :3]
    out = np.zeros((6, 6))
    out[:3, :3] = out[3:, 3:] = rotation
    out[:3, 3:] = cross_matrix(pose[:3, 3]) @ rotation
    return out


def inverse(pose: Float[np.ndarray, "4 4"]) -> Float[np.ndarray, "4 4"]:
    """The motion back."""
    out = np.eye(4)
    out[:3, :3] = pose[:3, :3].T
    out[:3, 3] = -pose[:3, :3].T @ pose[:3, 3]
    return out


def orthonormal(pose: Float[np.ndarray, "4 4"]) -> Float[np.ndarray, "4 4"]:
    """The same motion with rounding taken out of its rotation."""
    u, _, v = np.linalg.svd(pose[:3, :3])
    out = pose.copy()
    out[:3, :3] = u @ v
    return out


def optimise_poses(
    w2c: Float[np.ndarray, "n 4 4"], edges: Sequence[Edge], fixed: Bool[np.ndarray, "n"]
) -> Float[np.ndarray, "n 4 4"]:
    """Poses that agree best with all edges (Gauss-Newton, Cauchy's weights); fixed and unmeasured ones stay."""
    poses = w2c.copy()
    measured = {node for edge in edges for node in (edge.source, edge.target)}
    free = [node for node in sorted(measured) if not fixed[node]]
    if not free:
        return poses
    place = {node: 6 * index for index, node in enumerate(free)}
    for _ in range(ROUNDS):
        errors = [edge_error(poses, edge) for edge in edges]
        squares = np.array([e @ edge.information @ e for e, edge in zip(errors, edges, strict=True)])
        # The weights follow the median error, because covariances of images are right only up to a common factor.
        weights = 1 / (1 + squares / (OUTLIER * max(float(np.median(squares)), 1.0)))
        step = graph_step(poses, edges, errors, weights, place)
        for node in free:
            twist = step[place[node] : place[node] + 6]
            poses[node] = orthonormal(exponential(twist) @ poses[node])
        if np.abs(step).max() < STILL:
            break
    return poses


def edge_error(poses: Float[np.ndarray, "n 4 4"], edge: Edge) -> Float[np.ndarray, "6"]:
    """Twist from the measured motion to that of the poses."""
    return logarithm(poses[edge.target] @ inverse(poses[edge.source]) @ inverse(edge.pose))


def graph_step(
    poses: Float[np.ndarray, "n 4 4"],
    edges: Sequence[Edge],
    errors: Sequence[Float[np.ndarray, "6"]],
    weights: Float[np.ndarray, "e"],
    place: dict[int, int],
) -> Float[np.ndarray, "m"]:
    """Twists of the free poses that solve the normal equations."""
    size = 6 * len(place)
    hessian, gradient = np.zeros((size, size)), np.zeros(size)
    for edge, error, weight in zip(edges, errors, weights, strict=True):
        information = weight * edge.information
        blocks = {edge.target: np.eye(6), edge.source: -adjoint(poses[edge.target] @ inverse(poses[edge.source]))}
        for node, jacobian in blocks.items():
            if node not in place:
                continue
            row = slice(place[node], place[node] + 6)
            gradient[row] += jacobian.T @ information @ error
            for other, other_jacobian in blocks.items():
                if other in place:
                    column = slice(place[other], place[other] + 6)
                    hessian[row, column] += jacobian.T @ information @ other_jacobian
    # A group of poses that no edge ties to a fixed one keeps its place.
    hessian[np.diag_indices(size)] *= 1 + 1e-9
    hessian[np.diag_indices(size)] += 1e-9
    return -np.linalg.solve(hessian, gradient)


def connected(first: int, edges: Sequence[Edge], count: int) -> Bool[np.ndarray, "n"]:
    """Which of `count` cameras a chain of edges ties to the first; nothing is tied to a camera without an edge."""
    neighbours: dict[int, set[int]] = {}
    for edge in edges:
        neighbours.setdefault(edge.source, set()).add(edge.target)
        neighbours.setdefault(edge.target, set()).add(edge.source)
    reached, waiting = np.zeros(count, bool), [first] if first in neighbours else []
    while waiting:
        node = waiting.pop()
        if not reached[node]:
            reached[node] = True
            waiting.extend(neighbours[node])
    return reached


def fill_gaps(
    w2c: Float[np.ndarray, "n 4 4"], known: Bool[np.ndarray, "n"], prior: Float[np.ndarray, "n 4 4"]
) -> Float[np.ndarray, "n 4 4"]:
    """Poses of unknown cameras from a prior path, corrected as the known cameras around them are.

    The correction is a motion of the world; between two known cameras it is blended, beyond the last it stays.
    """
    poses, ids = w2c.copy(), np.flatnonzero(known)
    if not len(ids):
        return poses
    for node in np.flatnonzero(~known):
        before, after = ids[ids < node], ids[ids > node]
        ends = [int(part[position]) for part, position in ((before, -1), (after, 0)) if len(part)]
        correction = inverse(w2c[ends[0]]) @ prior[ends[0]]
        if len(ends) == 2:
            other = inverse(w2c[ends[1]]) @ prior[ends[1]]
            share = (node - ends[0]) / (ends[1] - ends[0])
            turn = logarithm(inverse(correction) @ other)[3:]
            place = (1 - share) * correction[:3, 3] + share * other[:3, 3]
            correction = correction @ exponential(np.concatenate([np.zeros(3), share * turn]))
            correction[:3, 3] = place
        poses[node] = orthonormal(prior[node] @ inverse(correction))
    return poses
