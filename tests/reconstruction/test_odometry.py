"""Visual odometry against exact geometry: walks through procedural worlds with known cameras and exact depth."""

import functools
import logging
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from lyra.errors import UserError
from lyra.geometry.rotations import axis_angle_to_matrix
from lyra.reconstruction import odometry_images
from lyra.reconstruction.odometry import estimate_cameras
from lyra.reconstruction.odometry_graph import (
    Edge,
    connected,
    exponential,
    fill_gaps,
    inverse,
    logarithm,
    optimise_poses,
)
from lyra.reconstruction.odometry_images import grown_inverse_depth, inverse_depth
from lyra.reconstruction.odometry_kernels import warp_residuals
from lyra.reconstruction.pose_report import compare_cameras
from lyra.training.worlds import build_world
from lyra.types import Cameras

HEIGHT, WIDTH, FRAMES = 90, 156, 21


@dataclass(frozen=True)
class Walk:
    """A rendered walk with its exact cameras and depth."""

    frames: torch.Tensor
    depths: dict[int, torch.Tensor]
    cameras: Cameras

    @property
    def intrinsics(self) -> torch.Tensor:
        return self.cameras.intrinsics[0]

    def every(self, step: int) -> dict[int, torch.Tensor]:
        return {i: self.depths[i] for i in range(0, len(self.frames), step)}


@functools.cache
def walk(family: str, seed: int) -> Walk:
    rng = np.random.default_rng(seed + 100)
    world = build_world(family, seed)
    k, poses = world.random_intrinsics(rng, HEIGHT, WIDTH), world.random_walk(rng, FRAMES)
    views = [world.render(pose, k, HEIGHT, WIDTH) for pose in poses]
    frames = torch.from_numpy(np.stack([view.rgb for view in views])).movedim(-1, 1).contiguous()
    w2c = torch.from_numpy(poses.astype(np.float32))
    intrinsics = torch.from_numpy(k.astype(np.float32)).expand(FRAMES, 3, 3)
    depths = {i: torch.from_numpy(view.depth) for i, view in enumerate(views)}
    return Walk(frames, depths, Cameras(w2c, intrinsics, HEIGHT, WIDTH))


def ignore(done: int, steps: int) -> None:
    """A listener that does not mind."""


def path_length(cameras: Cameras) -> float:
    return float(cameras.centres.diff(dim=0).norm(dim=1).sum())


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noisy(value: torch.Tensor, share: float, seed: int) -> torch.Tensor:
    return value * (1 + share * torch.randn(value.shape, generator=generator(seed)))


@pytest.mark.parametrize(
    ("family", "seed", "step"), [("street", 0, 4), ("street", 0, 8), ("room", 0, 4), ("village", 1, 8)]
)
def test_a_walk_is_found_without_a_guess(family, seed, step):
    truth = walk(family, seed)
    found = estimate_cameras(truth.frames, truth.every(step), truth.intrinsics, check=ignore)
    report = compare_cameras(truth.cameras, found.cameras)
    assert report.mean_degrees < 0.3 and report.mean_percent < 2
    assert report.max_degrees < 0.6 and report.max_percent < 4
    assert found.trusted.all()
    assert (found.inlier_share > 0.8).all() and (found.residual < 0.05).all()
    # The world is that of the first camera, and its unit that of the depth maps.
    torch.testing.assert_close(found.cameras.w2c[0], torch.eye(4))
    assert path_length(found.cameras) == pytest.approx(path_length(truth.cameras), rel=0.06)
    assert (found.cameras.image_height, found.cameras.image_width) == (HEIGHT, WIDTH)


@pytest.mark.parametrize("kind", ["pixels", "maps"])
def test_depth_that_is_three_per_cent_off_does_little_harm(kind):
    truth = walk("street", 0)
    depths = {
        i: noisy(depth, 0.03, i) if kind == "pixels" else depth * float(noisy(torch.ones(1), 0.03, i))
        for i, depth in truth.every(4).items()
    }
    found = estimate_cameras(truth.frames, depths, truth.intrinsics, check=ignore)
    report = compare_cameras(truth.cameras, found.cameras)
    assert report.mean_degrees < 1 and report.mean_percent < 5


def test_a_guess_that_is_off_is_improved_and_gives_the_world():
    truth = walk("village", 1)
    drift = torch.linspace(0, 1, FRAMES)[:, None]
    turn = axis_angle_to_matrix(drift * torch.tensor([0.3, 1.0, 0.2]) * math.radians(4))
    w2c = truth.cameras.w2c.clone()
    w2c[:, :3] = turn @ w2c[:, :3]
    w2c[:, :3, 3] += drift * torch.tensor([1.0, 0.0, -1.0]) * 0.15 * path_length(truth.cameras)
    guess = Cameras(w2c, truth.cameras.intrinsics, HEIGHT, WIDTH)
    found = estimate_cameras(truth.frames, truth.every(4), guess.intrinsics, guess=guess, check=ignore)
    before, after = (compare_cameras(truth.cameras, cameras) for cameras in (guess, found.cameras))
    assert before.max_degrees > 1 and before.max_percent > 5
    assert after.mean_degrees < 0.2 * before.mean_degrees and after.mean_percent < 0.2 * before.mean_percent
    torch.testing.assert_close(found.cameras.w2c[0], guess.w2c[0])


def test_a_walk_out_and_back_ends_where_it_began():
    truth = walk("room", 0)
    there, half = slice(0, 12), 12
    frames = torch.cat([truth.frames[there], truth.frames[there].flip(0)])
    depths = {i: truth.depths[i if i < half else 2 * half - 1 - i] for i in range(0, 2 * half, 4)}
    found = estimate_cameras(frames, depths, truth.intrinsics, check=ignore)
    gap = float((found.cameras.centres[-1] - found.cameras.centres[0]).norm())
    assert gap < 0.02 * path_length(found.cameras)
    assert path_length(found.cameras) == pytest.approx(2 * path_length(truth.cameras[there]), rel=0.1)


def test_brightness_that_changes_with_each_frame_does_no_harm():
    truth = walk("street", 0)
    gain = 1 + 0.1 * torch.randn(FRAMES, 1, 1, 1, generator=generator(0))
    bias = 12 * torch.randn(FRAMES, 1, 1, 1, generator=generator(1))
    frames = (truth.frames * gain + bias).clamp(0, 255).round().to(torch.uint8)
    found = estimate_cameras(frames, truth.every(4), truth.intrinsics, check=ignore)
    report = compare_cameras(truth.cameras, found.cameras)
    assert report.mean_degrees < 0.3 and report.mean_percent < 2 and found.trusted.all()


def test_the_same_video_gives_the_same_cameras_whatever_is_kept_in_memory(monkeypatch):
    truth = walk("village", 1)
    frames, depths = truth.frames[:13], {i: truth.depths[i] for i in (0, 4, 8, 12)}
    first, second = (estimate_cameras(frames, depths, truth.intrinsics, check=ignore) for _ in range(2))
    monkeypatch.setattr(odometry_images, "KEPT_FRAMES", 2)
    third = estimate_cameras(frames, depths, truth.intrinsics, check=ignore)
    assert torch.equal(first.cameras.w2c, second.cameras.w2c)
    assert torch.equal(first.cameras.w2c, third.cameras.w2c)


def test_a_blank_video_is_flagged_and_follows_the_guess(caplog):
    truth = walk("street", 0)
    blank = torch.full_like(truth.frames, 90)
    with caplog.at_level(logging.WARNING):
        guided = estimate_cameras(blank, truth.every(4), truth.intrinsics, guess=truth.cameras, check=ignore)
    assert not guided.trusted.any() and "21 of 21" in caplog.text
    torch.testing.assert_close(guided.cameras.w2c, truth.cameras.w2c, atol=1e-5, rtol=1e-5)
    alone = estimate_cameras(blank, truth.every(4), truth.intrinsics, check=ignore)
    assert not alone.trusted.any() and alone.cameras.w2c.isfinite().all()
    assert (alone.inlier_share == 0).all() and (alone.residual == 1).all()


@pytest.mark.parametrize("guided", [False, True])
def test_blank_frames_are_bridged_and_flagged(guided):
    truth = walk("village", 1)
    frames = truth.frames.clone()
    frames[8], frames[13], frames[20] = 0, 200, 0
    guess = truth.cameras if guided else None
    found = estimate_cameras(frames, truth.every(4), truth.intrinsics, guess=guess, check=ignore)
    assert (~found.trusted).nonzero().flatten().tolist() == [8, 13, 20]
    report = compare_cameras(truth.cameras[:20], found.cameras[:20])
    assert report.max_degrees < 0.6 and report.max_percent < 5


def test_what_follows_a_cut_is_not_trusted():
    truth, other = walk("street", 0), walk("room", 0)
    frames = torch.cat([truth.frames[:10], other.frames[:11]])
    depths = {i: truth.depths[i] if i < 10 else other.depths[i - 10] for i in range(0, FRAMES, 4)}
    found = estimate_cameras(frames, depths, truth.intrinsics, check=ignore)
    assert found.trusted.tolist() == [True] * 10 + [False] * 11
    # Frames after the cut still lie rightly to each other, from the first one with depth on.
    assert compare_cameras(other.cameras[2:11], found.cameras[12:]).mean_degrees < 0.3


def test_depth_may_have_holes_and_another_size_and_start_late():
    truth = walk("street", 0)
    depths = {}
    for i in (3, 7, 12, 20):
        depth = F.interpolate(truth.depths[i][None, None], (2 * HEIGHT, 2 * WIDTH), mode="nearest")[0, 0]
        holes = torch.rand(depth.shape, generator=generator(i)) < 0.005
        depths[i] = torch.where(holes | (depth > 500), torch.nan, depth)
    found = estimate_cameras(truth.frames, depths, truth.intrinsics, check=ignore)
    report = compare_cameras(truth.cameras, found.cameras)
    assert report.mean_degrees < 0.3 and report.mean_percent < 2 and found.trusted.all()
    torch.testing.assert_close(found.cameras.w2c[0], torch.eye(4))


def test_every_step_is_reported_and_may_stop_the_work():
    truth = walk("street", 0)
    steps: list[tuple[int, int]] = []
    estimate_cameras(
        truth.frames[:5], {0: truth.depths[0]}, truth.intrinsics, check=lambda done, every: steps.append((done, every))
    )
    assert steps == [(done, 9) for done in range(1, 10)]

    def stop(done: int, every: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        estimate_cameras(truth.frames, truth.every(4), truth.intrinsics, check=stop)


def test_what_cannot_be_estimated_is_refused_in_a_sentence():
    truth = walk("street", 0)
    with pytest.raises(UserError, match="at least two frames"):
        estimate_cameras(truth.frames[:1], truth.every(4), truth.intrinsics, check=ignore)
    nothing = {0: torch.full((HEIGHT, WIDTH), torch.nan), 4: torch.zeros(HEIGHT, WIDTH), 99: truth.depths[0]}
    for depths in ({}, nothing):
        with pytest.raises(UserError, match="depth of at least one frame"):
            estimate_cameras(truth.frames, depths, truth.intrinsics, check=ignore)
    with pytest.raises(ValueError, match="21 frames cannot have 3 cameras"):
        estimate_cameras(truth.frames, truth.every(4), truth.intrinsics, guess=truth.cameras[:3], check=ignore)


def test_the_kernel_agrees_with_plain_sampling_and_its_jacobian_with_differences():
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:40, 0:60].astype(np.float64)
    image = np.sin(x / 5) + np.cos(y / 4)
    gradients = [g.astype(np.float32) for g in (np.cos(x / 5) / 5, -np.sin(y / 4) / 4)]
    pinhole = np.array([50.0, 45.0, 29.5, 19.5])
    points = (rng.uniform([-3, -2, 2], [3, 2, 6], (200, 3))).astype(np.float32)
    values = rng.random(200).astype(np.float32)
    pose = exponential(np.array([0.1, -0.05, 0.2, 0.03, -0.02, 0.05]))

    def run(pose: np.ndarray, gain: float, bias: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        seen, residuals = np.zeros(200, np.int64), np.zeros(200, np.float32)
        jacobian = np.zeros((200, 8), np.float32)
        args = (points, values, pose, pinhole, image.astype(np.float32), *gradients, gain, bias)
        count = warp_residuals(*args, seen, residuals, jacobian)
        return seen[:count], residuals[:count], jacobian[:count]

    seen, residuals, jacobian = run(pose, 0.9, 0.1)
    camera = points @ pose[:3, :3].T + pose[:3, 3]
    uv = camera[:, :2] / camera[:, 2:] * pinhole[:2] + pinhole[2:]
    inside = (uv >= 1).all(1) & (uv < [58, 38]).all(1) & (camera[:, 2] > 0)
    assert 20 < inside.sum() < 180 and np.array_equal(seen, np.flatnonzero(inside))
    grid = torch.from_numpy((uv[inside] + 0.5) / [60, 40] * 2 - 1)[None, None]
    sampled = F.grid_sample(torch.from_numpy(image)[None, None], grid, align_corners=False)[0, 0, 0].numpy()
    np.testing.assert_allclose(residuals, sampled - 0.9 * values[inside] - 0.1, atol=1e-4)

    def smooth(pose: np.ndarray) -> np.ndarray:
        camera = points[seen].astype(np.float64) @ pose[:3, :3].T + pose[:3, 3]
        u, v = (camera[:, :2] / camera[:, 2:] * pinhole[:2] + pinhole[2:]).T
        return np.sin(u / 5) + np.cos(v / 4)

    for column in range(6):
        twist = np.zeros(6)
        twist[column] = 1e-5
        slope = (smooth(exponential(twist) @ pose) - smooth(exponential(-twist) @ pose)) / 2e-5
        np.testing.assert_allclose(jacobian[:, column], slope, atol=0.06 * np.abs(slope).max())
    np.testing.assert_allclose(jacobian[:, 6:], np.stack([-values[seen], -np.ones(len(seen))], 1))


def test_twists_and_motions_are_inverse_to_each_other():
    rng = np.random.default_rng(1)
    for length in (0.0, 1e-7, 1e-3, 0.5, 3.0):
        turn = rng.normal(size=3)
        twist = np.concatenate([rng.normal(size=3), turn / np.linalg.norm(turn) * length])
        np.testing.assert_allclose(logarithm(exponential(twist)), twist, atol=1e-7)


def ring(count: int) -> np.ndarray:
    """Cameras on a circle that look ahead."""
    steps = np.array([exponential(np.array([0.1, 0.0, 0.5, 0.0, 2 * np.pi / count, 0.0]))] * count)
    poses = [np.eye(4)]
    for step in steps[1:]:
        poses.append(step @ poses[-1])
    return np.array(poses)


def test_a_loop_takes_the_drift_out_and_a_wrong_motion_is_outvoted():
    truth, rng, count = ring(12), np.random.default_rng(2), 12

    def edge(source: int, target: int, noise: float) -> Edge:
        pose = exponential(noise * rng.normal(size=6)) @ truth[target] @ inverse(truth[source])
        return Edge(source, target, pose, np.eye(6) / noise**2)

    chain = [edge(i, i + 1, 0.02) for i in range(count - 1)]
    loops = [edge(0, i, 0.001) for i in (4, 8, 11)]
    wrong = Edge(3, 9, exponential(np.array([2.0, 0, 0, 0, 1.0, 0])), np.eye(6) * 1e4)
    drifted = [np.eye(4)]
    for item in chain:
        drifted.append(item.pose @ drifted[-1])
    fixed = np.arange(count) == 0
    clean = optimise_poses(np.array(drifted), [*chain, *loops], fixed)
    settled = optimise_poses(np.array(drifted), [*chain, *loops, wrong], fixed)

    def error(poses: np.ndarray) -> float:
        return max(float(np.linalg.norm(logarithm(a @ inverse(b)))) for a, b in zip(poses, truth, strict=True))

    assert error(clean) < 0.4 * error(np.array(drifted))
    assert error(settled) == pytest.approx(error(clean), abs=0.005)
    assert np.array_equal(settled[0], np.eye(4))
    assert connected(0, chain[:5], count).tolist() == [True] * 6 + [False] * 6
    assert not connected(0, chain[3:], count).any()


def test_gaps_follow_the_prior_as_their_neighbours_do():
    prior = ring(9)
    world = exponential(np.array([1.0, 2.0, 3.0, 0.3, -0.2, 0.1]))
    truth = prior @ world
    known = np.array([1, 1, 0, 0, 0, 1, 1, 0, 0], bool)
    given = np.where(known[:, None, None], truth, np.eye(4))
    np.testing.assert_allclose(fill_gaps(given, known, prior), truth, atol=1e-9)
    # Without a prior the pose is blended between neighbours and held beyond the last.
    still = np.tile(np.eye(4), (9, 1, 1))
    filled = fill_gaps(given, known, still)
    centres = np.linalg.inv(filled)[:, :3, 3]
    np.testing.assert_allclose(centres[3], (centres[1] + centres[5]) / 2, atol=1e-9)
    np.testing.assert_allclose(filled[8], truth[6], atol=1e-9)


def test_an_outline_has_the_depth_of_what_is_in_front():
    depth = torch.full((24, 40), 8.0)
    depth[:, 20:] = 2.0
    grown, known = grown_inverse_depth(*inverse_depth(depth), (24, 40))
    # Two columns of the wall behind move with the post; the next ones are left out, the others stay.
    torch.testing.assert_close(grown[12, 18:22], torch.full((4,), 0.5))
    assert known[12, 19:].all() and not known[12, 17] and known[12, :16].all()
    torch.testing.assert_close(grown[12, :17], torch.full((17,), 0.125))
    ramp = torch.linspace(0.1, 0.5, 40).expand(24, 40)
    plane, plain = grown_inverse_depth(*inverse_depth(1 / ramp), (48, 80))
    assert plain[4:-4, 4:-4].all()
    larger = F.interpolate(ramp[None, None], (48, 80), mode="bilinear")[0, 0]
    torch.testing.assert_close(plane[20, 10:70], larger[20, 10:70])
