"""In what order are frames aligned, and which alignments make one path of them?

Each frame is aligned to the last frame with depth that was itself placed; such keyframes form a graph that also holds
motions back in time and to older keyframes that show the same place, so that drift does not add up. The frames between
keyframes are then placed from both sides. Knows no tensor and no file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from lyra.reconstruction.base import Check
from lyra.reconstruction.odometry_alignment import Alignment, align
from lyra.reconstruction.odometry_graph import (
    Edge,
    connected,
    edge_error,
    exponential,
    fill_gaps,
    inverse,
    optimise_poses,
)
from lyra.reconstruction.odometry_images import FrameStore

REFINING_LEVELS = 3
"""Levels used where the motion is roughly known."""
FINE_LEVELS = 2
"""Levels used where a prediction may be as good as it can get."""
REVISIT_OVERLAP = 0.5
"""Least share of an older keyframe's points that must lie in a keyframe for the two to be aligned."""
REVISIT_DISTANCE = 0.35
"""Most distance to it, as a share of its typical depth."""
MOST_REVISITED = 24
"""The nearest keyframes, of which the one that shows the most of a place is found."""
DEPTH_ERROR = 0.01
"""Standard deviation of a measured translation as a share of itself, because depth maps are not exact."""
FLOOR_SHIFT = 5e-4
"""Least standard deviation of a measured translation, as a share of the typical depth."""
FLOOR_TURN = 2e-4
"""Least standard deviation of a measured rotation in radians."""
AGREEMENT = 0.03
"""A pose agrees with a measured motion when the two move the picture by less than this against each other, in radians;
it is 16 of 416 pixels at a field of view of 45 degrees."""
SEARCH_TURNS = (0.05, 0.12)
"""Turns in radians, to each side, that are tried where a prediction does not align."""
SKETCHED_POINTS = 300
"""About how many points of a keyframe judge its overlap with others."""


@dataclass(frozen=True)
class Sketch:
    """A keyframe in a few points, to find what shows the same place."""

    points: Float[np.ndarray, "p 3"]
    """In its camera, in scene units."""
    typical_depth: float


class Odometry:
    """One estimation: poses so far (world-to-camera) and the motions that were measured."""

    def __init__(
        self,
        store: FrameStore,
        count: int,
        keyframes: Sequence[int],
        prior: Float[np.ndarray, "n 4 4"] | None,
        check: Check,
    ) -> None:
        self.store, self.count, self.keyframes = store, count, list(keyframes)
        self._has_depth = frozenset(keyframes)
        self.is_guided = prior is not None
        self.prior = np.tile(np.eye(4), (count, 1, 1)) if prior is None else prior
        self.w2c = self.prior.copy()
        self.placed = np.zeros(count, bool)
        self.edges: list[Edge] = []
        self.best: dict[int, Alignment] = {}
        """The alignment of most inliers that each frame took part in."""
        self._sketches: dict[int, Sketch] = {}
        self._check, self._done = check, 0
        self._steps = 2 * count - 1

    def run(self) -> None:
        """Measure and place everything."""
        self.track()
        self.join_keyframes()
        self.place_between()

    def trusted(self) -> Bool[np.ndarray, "n"]:
        """Which frames are tied to the first one by motions that their poses agree with."""
        return connected(0, [edge for edge in self.edges if self.disagreement(edge) < AGREEMENT], self.count)

    def disagreement(self, edge: Edge) -> float:
        """About how far, in radians, the poses' motion moves the picture against the measured one."""
        error = edge_error(self.w2c, edge)
        return float(np.linalg.norm(error[:3]) / self.sketch(edge.source).typical_depth + np.linalg.norm(error[3:]))

    def poses(self) -> Float[np.ndarray, "n 4 4"]:
        """All poses, gaps filled, in the world of the prior's first camera."""
        known = np.zeros(self.count, bool)
        known[[node for edge in self.edges for node in (edge.source, edge.target)]] = True
        w2c = fill_gaps(self.w2c, known, self.prior)
        return w2c @ inverse(w2c[0]) @ self.prior[0]

    def track(self) -> None:
        """Follow the video from the first keyframe to both ends, each frame against the last keyframe that aligned."""
        start = self.keyframes[0]
        self.placed[start] = True
        for order in (range(start + 1, self.count), range(start - 1, -1, -1)):
            current, pending = start, start
            for frame in order:
                starts = self.predictions(frame, order.step)
                self.w2c[frame] = starts[0]
                placed = self.follow(current, frame, starts)
                if not placed and pending != current:
                    # The picture may have jumped: go on from a keyframe whose own place is only predicted.
                    placed = self.follow(pending, frame, starts)
                    current = pending if placed else current
                self.placed[frame] = placed
                if self.can_refer(frame):
                    current, pending = (frame, frame) if placed else (current, frame)
                self.step_done()

    def predictions(self, frame: int, direction: int) -> list[Float[np.ndarray, "4 4"]]:
        """Poses that a frame may have, likeliest first: as the prior moves, at constant velocity, and still."""
        previous, before = frame - direction, frame - 2 * direction
        poses = []
        if self.is_guided:
            poses.append(self.prior[frame] @ inverse(self.prior[previous]) @ self.w2c[previous])
        if 0 <= before < self.count and self.placed[previous] and self.placed[before]:
            poses.append(self.w2c[previous] @ inverse(self.w2c[before]) @ self.w2c[previous])
        return [*poses, self.w2c[previous]]

    def follow(self, source: int, frame: int, starts: Sequence[Float[np.ndarray, "4 4"]]) -> bool:
        """Place a frame by its motion from a keyframe; a few turns are tried where the predictions do not align."""
        if self.store.reference(source).is_blank:
            return False
        turns = [
            exponential(np.array([0.0, 0.0, 0.0, pitch, yaw, 0.0])) @ starts[-1]
            for size in SEARCH_TURNS
            for pitch, yaw in ((0.0, size), (0.0, -size), (size, 0.0), (-size, 0.0))
        ]
        # Something near that fills much of the picture misleads the coarse levels most.
        for poses, levels in ((starts, self.store.level_count), (starts, FINE_LEVELS), (turns, self.store.level_count)):
            alignment = self.measure(source, frame, poses, levels)
            if alignment is not None:
                self.w2c[frame] = alignment.pose @ self.w2c[source]
                return True
        return False

    def measure(
        self, source: int, target: int, poses: Sequence[Float[np.ndarray, "4 4"]], levels: int
    ) -> Alignment | None:
        """Align a frame, in one of some poses, to a keyframe and remember the motion if it is to be believed."""
        reference = self.store.reference(source)
        starts = [pose @ inverse(self.w2c[source]) for pose in poses]
        alignment = align(reference, self.store.pyramid(target), starts, levels=levels)
        if alignment is None or not alignment.accepted:
            return None
        self.edges.append(weighted_edge(source, target, alignment, reference.typical_depth))
        for frame in (source, target):
            if frame not in self.best or self.best[frame].inlier_share < alignment.inlier_share:
                self.best[frame] = alignment
        return alignment

    def can_refer(self, frame: int) -> bool:
        """Whether frames can be aligned to this one."""
        return frame in self._has_depth and not self.store.reference(frame).is_blank

    def join_keyframes(self) -> None:
        """Align keyframes to their neighbours and to places seen before, and settle their poses together."""
        tied = {node for edge in self.edges for node in (edge.source, edge.target)}
        ids = [frame for frame in self.keyframes if frame in tied and self.can_refer(frame)]
        for place, frame in enumerate(ids):
            if place >= 1:
                self.measure(frame, ids[place - 1], [self.w2c[ids[place - 1]]], REFINING_LEVELS)
            if place >= 2:
                self.measure(ids[place - 2], frame, [self.w2c[frame]], REFINING_LEVELS)
        self.settle(ids)
        for place, frame in enumerate(ids):
            for older in self.revisited(frame, ids[: max(place - 2, 0)]):
                self.measure(older, frame, [self.w2c[frame]], REFINING_LEVELS)
        self.settle(ids)

    def settle(self, keyframes: Sequence[int]) -> None:
        """Least squares of the keyframes' poses over the motions between them; other frames follow their keyframe."""
        among = set(keyframes)
        edges = [edge for edge in self.edges if edge.source in among and edge.target in among]
        fixed = np.zeros(self.count, bool)
        fixed[self.keyframes[0]] = True
        self.w2c = optimise_poses(self.w2c, edges, fixed)
        for edge in self.edges:
            if edge.target not in among:
                self.w2c[edge.target] = edge.pose @ self.w2c[edge.source]

    def revisited(self, frame: int, older: Sequence[int]) -> list[int]:
        """The oldest keyframe that shows much of the same place from nearby, and the one that shows the most of it."""
        centre = centres_of(self.w2c[[frame]])[0]
        distances = np.linalg.norm(centres_of(self.w2c[list(older)]) - centre, axis=1)
        near = [
            (float(distance), other)
            for distance, other in zip(distances, older, strict=True)
            if distance < REVISIT_DISTANCE * self.sketch(other).typical_depth
        ]
        oldest = next((other for _, other in near if self.overlap(other, frame) >= REVISIT_OVERLAP), None)
        if oldest is None:
            return []
        shares = {other: self.overlap(other, frame) for _, other in sorted(near)[:MOST_REVISITED]}
        best = max(sorted(shares), key=lambda other: shares[other])
        return sorted({oldest, best if shares[best] >= REVISIT_OVERLAP else oldest})

    def sketch(self, frame: int) -> Sketch:
        """What is kept of a keyframe for good."""
        if frame not in self._sketches:
            reference = self.store.reference(frame)
            points = reference.levels[0].points
            self._sketches[frame] = Sketch(points[:: max(1, len(points) // SKETCHED_POINTS)], reference.typical_depth)
        return self._sketches[frame]

    def overlap(self, source: int, target: int) -> float:
        """Share of a keyframe's points that fall into another frame, whatever hides them."""
        motion = self.w2c[target] @ inverse(self.w2c[source])
        points = self.sketch(source).points @ motion[:3, :3].T + motion[:3, 3]
        (height, width), (fx, fy, cx, cy) = self.store.finest_size, self.store.finest_pinhole(target)
        depth = np.maximum(points[:, 2], 1e-6)
        u, v = fx * points[:, 0] / depth + cx, fy * points[:, 1] / depth + cy
        inside = (points[:, 2] > 0) & (u >= 0) & (v >= 0) & (u <= width - 1) & (v <= height - 1)
        return float(inside.mean())

    def place_between(self) -> None:
        """Align the frames that are no keyframes to the next keyframe too, and settle each between its keyframes."""
        joined = {edge.source for edge in self.edges}
        keys = [key for key in self.keyframes if key in joined]
        for frame in range(self.count):
            if frame not in joined:
                after = [key for key in keys if key > frame][:1]
                away = [key for key in keys if key < frame][:-1] + [key for key in keys if key > frame][1:]
                for key in [*after, *self.revisited(frame, away)[-1:]]:
                    self.measure(key, frame, [self.w2c[frame]], REFINING_LEVELS)
                edges = [edge for edge in self.edges if edge.target == frame]
                fixed = np.ones(self.count, bool)
                fixed[frame] = False
                self.w2c = optimise_poses(self.w2c, edges, fixed)
            self.step_done()

    def step_done(self) -> None:
        """Report one more finished step."""
        self._done += 1
        self._check(self._done, self._steps)


def weighted_edge(source: int, target: int, alignment: Alignment, typical_depth: float) -> Edge:
    """A motion with its covariance, to which what the picture's noise does not explain is added."""
    shift = FLOOR_SHIFT * typical_depth + DEPTH_ERROR * float(np.linalg.norm(alignment.pose[:3, 3]))
    floor = np.diag([shift**2] * 3 + [FLOOR_TURN**2] * 3)
    covariance = np.linalg.inv(alignment.information) + floor
    return Edge(source, target, alignment.pose, np.linalg.inv(covariance))


def centres_of(w2c: Float[np.ndarray, "n 4 4"]) -> Float[np.ndarray, "n 3"]:
    """Camera centres."""
    return -np.einsum("nji,nj->ni", w2c[:, :3, :3], w2c[:, :3, 3])
