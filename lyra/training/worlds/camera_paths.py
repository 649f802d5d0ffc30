"""Where does a camera stand, and how does it walk?

Random poses and smooth paths through free space, checked with rays. It asks the world only for rays, probes and the
region in which one may walk.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from lyra.training.worlds.layout import GROUND_ID, NOTHING_ID

if TYPE_CHECKING:
    from lyra.training.worlds.world import World

CLEARANCE = 0.3
MOTIONS = ("push", "pull", "truck", "pan", "orbit", "spiral", "out_and_back", "look_back", "rise", "walk")


def _sphere(count: int) -> np.ndarray:
    i = np.arange(count) + 0.5
    y = 1 - 2 * i / count
    r, a = np.sqrt(1 - y * y), np.pi * (1 + 5**0.5) * i
    return np.stack([r * np.cos(a), y, r * np.sin(a)], 1)


SPHERE = _sphere(42)


def pose(eye: np.ndarray, yaw: float, pitch: float, roll: float) -> Float[np.ndarray, "4 4"]:
    """World-to-camera matrix; yaw 0 looks along +z, positive pitch looks up, angles in radians."""
    cy, sy, cp, sp, cr, sr = np.cos(yaw), np.sin(yaw), np.cos(pitch), np.sin(pitch), np.cos(roll), np.sin(roll)
    turn = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    tilt = np.array([[1, 0, 0], [0, cp, -sp], [0, sp, cp]])
    lean = np.array([[cr, -sr, 0], [sr, cr, 0], [0, 0, 1]])
    c2w = turn @ tilt @ lean
    out = np.eye(4)
    out[:3, :3], out[:3, 3] = c2w.T, -c2w.T @ eye
    return out


def _draw(world: World, rng: np.random.Generator) -> tuple[np.ndarray, float, float, float]:
    """Eye position, yaw, pitch and roll without any check."""
    x0, x1, z0, z1 = world.region
    x, z = rng.uniform(x0, x1), rng.uniform(z0, z1)
    above = float(np.clip(np.exp(rng.normal(np.log(1.5), 0.3)), 0.3, 3.0))
    if world.indoor:
        above = min(above, 2.2)
    pitch = float(np.clip(rng.normal(-2, 7) if rng.random() < 0.85 else rng.uniform(-25, 25), -25, 25))
    yaw = rng.uniform(0, 2 * np.pi)
    if world.axis is not None and rng.random() < 0.65:
        yaw = world.axis + np.pi * rng.integers(2) + rng.normal(0, 0.3)
    if world.family == "tabletop":
        x0, x1, z0, z1 = world.region
        cx, cz = (x0 + x1) / 2 + rng.normal(0, 0.25), (z0 + z1) / 2 + rng.normal(0, 0.25)
        above = rng.uniform(0.85, 1.7)
        yaw = np.arctan2(cx - x, cz - z)
        pitch = float(np.clip(-np.degrees(np.arctan2(above - 0.85, np.hypot(cx - x, cz - z) + 0.1)), -25, 10))
    eye = np.array([x, -(world.ground_height(x, z) + above), z])
    return eye, float(yaw), float(np.radians(pitch)), float(np.radians(np.clip(rng.normal(0, 1.2), -3, 3)))


def any_view(world: World, rng: np.random.Generator) -> tuple[np.ndarray, tuple[np.ndarray, float, float, float]]:
    """Pose drawn with the cheapest check only (not inside or against a solid)."""
    for _ in range(12):
        state = _draw(world, rng)
        if world.clearance(state[0][None], 0.5)[0] > CLEARANCE:
            break
    return pose(*state), state


def _looks_good(depth: np.ndarray, ids: np.ndarray) -> bool:
    """Reject walls in the face and views of almost nothing but sky or ground."""
    if (depth < 0.6).mean() > 0.15 or (depth < 1.1).mean() > 0.4:
        return False
    sky, ground = (ids == NOTHING_ID).mean(), (ids == GROUND_ID).mean()
    _, counts = np.unique(ids[ids >= 0], return_counts=True)
    biggest = counts.max() / ids.size if counts.size else 0.0
    busy = len(counts) >= 5 and (counts >= 3).sum() >= 4 and biggest < 0.6
    return bool(busy and sky < 0.65 and ground < 0.6 and sky + ground < 0.92 and np.log(depth).std() > 0.15)


def _state(world: World, rng: np.random.Generator) -> tuple[np.ndarray, float, float, float]:
    best, best_score = None, -1.0
    good = 0
    for _ in range(70):
        state = _draw(world, rng)
        if world.clearance(state[0][None], 0.6)[0] < 0.42:
            continue
        depth, ids = world.probe(pose(*state))
        # Of two good views the one that shows more things is kept; without any, the least bad one.
        passed = _looks_good(depth, ids)
        score = 1000.0 * passed + len(np.unique(ids)) + 3.0 * float(np.log(depth).std())
        score -= 40.0 * float((ids == NOTHING_ID).mean() > 0.7) + 40.0 * float((depth < 0.8).mean())
        if score > best_score or best is None:
            best, best_score = state, score
        good += passed
        if good == 2:
            break
    return best if best is not None else state


def random_view(world: World, rng: np.random.Generator) -> Float[np.ndarray, "4 4"]:
    """World-to-camera pose with eye height 0.3..3 m, pitch +-25 and roll +-3 degrees that shows something."""
    return pose(*_state(world, rng))


def _ease(t: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Speed profile of a hand: constant, or soft at both ends."""
    w = rng.uniform(0, 1)
    return (1 - w) * t + w * t * t * (3 - 2 * t)


def _offsets(
    motion: str, rng: np.random.Generator, t: np.ndarray, length: float, depth: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Path in the frame of the first view (right, up, forward; metres) and yaw, pitch offsets in radians."""
    zero = np.zeros_like(t)
    side = float(rng.choice([-1, 1]))
    turn = side * np.radians(rng.uniform(4, 20)) * t
    if motion == "push":
        return np.stack([zero, zero, length * t], 1), turn * 0.6, zero
    if motion == "pull":
        return np.stack([zero, 0.15 * length * t, -length * t], 1), turn * 0.5, -0.05 * t
    if motion == "truck":
        return np.stack([side * length * t, zero, 0.25 * length * t], 1), -turn * 0.4, zero
    if motion == "pan":
        return np.stack([zero, zero, 0.1 * length * t], 1), side * np.radians(rng.uniform(20, 80)) * t, zero
    if motion == "orbit":
        radius = np.clip(depth, 0.8, 8.0)
        a = side * min(length / radius, 1.2) * t
        return np.stack([radius * np.sin(a), zero, radius * (1 - np.cos(a))], 1), -a, zero
    if motion == "spiral":
        a, radius = 2 * np.pi * rng.uniform(0.7, 1.5) * t, 0.18 * length
        xy = np.stack([side * radius * np.sin(a), 0.5 * radius * (1 - np.cos(a)), 0.6 * length * t], 1)
        return xy, 0.15 * np.sin(a), zero
    if motion == "out_and_back":
        s = np.sin(np.pi * t)
        direction = np.array([side * rng.uniform(0, 1), 0.05, 1.0])
        direction /= np.linalg.norm(direction)
        return 0.5 * length * s[:, None] * direction, side * np.radians(rng.uniform(5, 35)) * s, zero
    if motion == "look_back":
        swing = np.radians(rng.uniform(60, 180)) * np.clip((t - 0.25) / 0.5, 0, 1)
        swing = swing * swing / max(swing.max(), 1e-6) * (3 - 2 * swing / max(swing.max(), 1e-6))
        return np.stack([zero, zero, 0.7 * length * t], 1), side * swing, zero
    if motion == "rise":
        up = min(length * 0.5, 2.0) * t
        return np.stack([zero, up, 0.5 * length * t], 1), turn * 0.5, -0.25 * up / max(depth, 1.0)
    bend = np.cumsum(np.cumsum(rng.normal(0, 1, len(t)))) if len(t) > 2 else zero
    bend = side * np.radians(rng.uniform(10, 50)) * bend / max(np.abs(bend).max(), 1e-6)
    heading = np.stack([np.sin(bend), zero, np.cos(bend)], 1)
    step = np.diff(t, prepend=t[:1])[:, None] * length
    return np.cumsum(heading * step, 0), bend, zero


def is_clear(world: World, points: Float[np.ndarray, "n 3"]) -> bool:
    """Say whether a polyline keeps ``CLEARANCE`` metres from all geometry and crosses none."""
    step = max(1, len(points) // 40)
    coarse = np.concatenate([points[::step], points[-1:]])
    if world.clearance(coarse, 0.5).min() < CLEARANCE:
        return False
    move = np.diff(coarse, axis=0)
    far = np.linalg.norm(move, axis=1) > 1e-4
    if not far.any():
        return True
    # The swept balls around the samples must overlap, so long steps are checked in between as well.
    parts = int(np.ceil(np.linalg.norm(move, axis=1).max() / 0.25))
    if parts > 1:
        between = np.concatenate([coarse[:-1][far] + move[far] * (k / parts) for k in range(1, parts)])
        if world.clearance(between, 0.5).min() < CLEARANCE:
            return False
    t, _ = world.cast_rays(coarse[:-1][far], move[far], 1.2)
    return bool((t >= 1.05).all())


def random_walk(world: World, rng: np.random.Generator, frames: int) -> Float[np.ndarray, "frames 4 4"]:
    """World-to-camera poses of a smooth walk; 0.2..1.5 median scene depths long per 80 frames, clear of geometry."""
    t = np.linspace(0, 1, frames)
    for attempt in range(24):
        if attempt % 6 == 0:
            eye, yaw, pitch, roll = _state(world, rng)
            depth, ids = world.probe(pose(eye, yaw, pitch, roll))
            seen = depth[ids != NOTHING_ID]
            median = float(np.clip(np.median(seen) if seen.size else 5.0, 0.8, 14.0))
        shrink = 0.85 ** (attempt % 6)
        length = median * rng.uniform(0.2, 1.5) * shrink * min(frames / 80.0, 4.0)
        motion = str(rng.choice(MOTIONS))
        local, dyaw, dpitch = _offsets(motion, rng, _ease(t, rng), length, median)
        c, s = np.cos(yaw), np.sin(yaw)
        points = eye + np.stack(
            [c * local[:, 0] + s * local[:, 2], -local[:, 1], -s * local[:, 0] + c * local[:, 2]], 1
        )
        ground = np.array([world.ground_height(p[0], p[2]) for p in points])
        points[:, 1] -= ground - ground[0]
        if not is_clear(world, points):
            continue
        sway = 0.004 * np.sin(2 * np.pi * t * frames / 24 + rng.uniform(0, 6)) * min(1.0, length)
        points[:, 1] += sway
        yaws, pitches = yaw + dyaw, np.clip(pitch + dpitch, -0.43, 0.43)
        poses = np.stack([pose(p, a, q, roll) for p, a, q in zip(points, yaws, pitches, strict=True)])
        ends = [world.probe(poses[i])[0] for i in (frames // 2, frames - 1)]
        if all((d < 0.6).mean() < 0.25 for d in ends):
            return poses
    swing = np.radians(rng.uniform(-40, 40)) * _ease(t, rng)
    return np.stack([pose(eye, yaw + a, pitch, roll) for a in swing])
