"""Videos of which only the frames are known, against exact geometry: walks through procedural worlds."""

import functools
import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from lyra.depth.base import SKY_DEPTH, DepthPrediction
from lyra.lifting import shipped_depth
from lyra.progress import Cancelled, Progress
from lyra.reconstruction.base import Reconstruction, Walkthrough
from lyra.reconstruction.gaussians import GeometricLift
from lyra.reconstruction.odometry import MOST_KEYFRAMES, cameras_of_all
from lyra.reconstruction.odometry_depth import (
    agreed_scales,
    depth_ratio,
    estimate_walk,
    in_known_world,
    in_one_unit,
    in_unit_of,
    measured_frames,
    rendered_depth,
)
from lyra.reconstruction.pose_report import compare_cameras
from lyra.reconstruction.sim3 import Sim3
from lyra.types import Cameras
from tests.reconstruction.test_odometry import FRAMES, HEIGHT, WIDTH, generator, ignore, path_length, walk


@functools.cache
def network():
    return shipped_depth()


class ExactUpToScale:
    """Exact depth of a walk in which each frame has a unit of its own."""

    def __init__(self, truth, spread: float) -> None:
        self.depths = {i: depth for i, depth in enumerate(truth.depths.values())}
        self.by_picture = {truth.frames[i].float().mean().item(): i for i in self.depths}
        self.units = torch.exp(spread * torch.randn(len(self.depths), generator=generator(3)))
        self.fov = float(2 * torch.rad2deg(torch.atan(WIDTH / 2 / truth.intrinsics[0, 0])))

    def predict(self, images: torch.Tensor) -> DepthPrediction:
        means = [((image + 1) * 127.5).mean().item() for image in images]
        ids = [self.by_picture[min(self.by_picture, key=lambda known: abs(known - mean))] for mean in means]
        depth = torch.stack([self.depths[i] * self.units[i] for i in ids])
        sky = torch.stack([self.depths[i] > 500 for i in ids])
        features = torch.zeros(len(ids), 0, 1)
        return DepthPrediction(depth, sky, torch.ones_like(depth), torch.full((len(ids),), self.fov), features)


@pytest.mark.parametrize(
    ("family", "seed", "degrees", "percent"), [("street", 0, 6.0, 5.0), ("room", 0, 3.0, 15.0), ("ruins", 0, 3.0, 6.0)]
)
def test_a_walk_is_found_from_its_frames_alone(family, seed, degrees, percent):
    truth = walk(family, seed)
    found = estimate_walk(truth.frames, network(), depths={}, check=ignore)
    report = compare_cameras(truth.cameras, found.cameras)
    assert report.mean_degrees < degrees and report.mean_percent < percent
    assert found.trusted.float().mean() > 0.9
    assert sorted(found.depths) == measured_frames(FRAMES) == [0, 4, 8, 12, 16, 20]
    assert all(depth.shape == (HEIGHT, WIDTH) and bool((depth > 0).all()) for depth in found.depths.values())
    torch.testing.assert_close(found.cameras.w2c[0], torch.eye(4))


def test_frames_that_were_measured_in_units_of_their_own_get_one():
    truth = walk("street", 0)
    found = estimate_walk(truth.frames, ExactUpToScale(truth, 0.3), depths={}, check=ignore)
    ratios = [float((d / truth.depths[i])[truth.depths[i] < 200].median()) for i, d in found.depths.items()]
    assert max(ratios) < 1.05 * min(ratios)
    assert all(bool((d[truth.depths[i] > 500] == SKY_DEPTH).all()) for i, d in found.depths.items())
    report = compare_cameras(truth.cameras, found.cameras)
    assert report.mean_degrees < 0.5 and report.mean_percent < 3
    assert path_length(found.cameras) == pytest.approx(np.median(ratios) * path_length(truth.cameras), rel=0.08)


def test_frames_between_which_nothing_can_be_tracked_keep_their_units():
    truth = walk("street", 0)
    blank = torch.full_like(truth.frames, 90)
    depths = truth.every(4)
    kept = in_one_unit(blank, depths, truth.intrinsics, ignore)
    assert all(torch.allclose(kept[i], depths[i]) for i in depths)
    single = in_one_unit(truth.frames, {4: truth.depths[4]}, truth.intrinsics, ignore)
    assert torch.equal(single[4], truth.depths[4])


def test_neighbours_follow_their_ratio_and_the_whole_path_the_network():
    units = np.exp(np.random.default_rng(0).normal(0, 0.2, 300))
    ids = [4 * i for i in range(300)]
    # Each ratio is 1 % too large, which alone would add up to a factor of 20.
    ratios = {(ids[i], ids[i + 1]): 1.01 * units[i] / units[i + 1] for i in range(299)}
    scales = agreed_scales(ids, ratios)
    agreed = np.array([scales[i] for i in ids]) * units
    assert np.abs(np.diff(np.log(agreed))).max() < 0.02
    assert agreed.max() / agreed.min() < 1.6
    alone = agreed_scales([0, 4, 8], {(0, 4): 2.0})
    assert alone[8] == pytest.approx(1) and alone[4] / alone[0] == pytest.approx(2, rel=0.02)


def test_depth_that_is_known_gives_the_unit_and_stays():
    truth = walk("street", 0)
    known = {i: depth / 2 for i, depth in truth.every(4).items()}
    found = estimate_walk(truth.frames, network(), depths=known, check=ignore)
    assert all(found.depths[i] is depth for i, depth in known.items())
    assert 0.8 < 2 * path_length(found.cameras) / path_length(truth.cameras) < 1.4
    assert compare_cameras(truth.cameras, found.cameras).mean_degrees < 5


def test_what_was_found_comes_into_the_unit_and_the_world_of_a_path():
    truth = walk("street", 0)
    exact = ExactUpToScale(truth, 0.0)
    exact.units = torch.full_like(exact.units, 0.4)
    found = estimate_walk(truth.frames, exact, depths={}, check=ignore)
    moved = in_unit_of(found, truth.cameras)
    torch.testing.assert_close(moved.cameras.w2c[0], truth.cameras.w2c[0])
    assert (moved.cameras.centres - truth.cameras.centres).norm(dim=1).max() < 0.1 * path_length(truth.cameras)
    for i, depth in moved.depths.items():
        ground = truth.depths[i] < 70
        assert float((depth / truth.depths[i])[ground].median()) == pytest.approx(1, abs=0.06)
        assert bool((depth[truth.depths[i] > 500] == SKY_DEPTH).all())
    pan = truth.cameras.w2c.clone()
    pan[:, :3, 3] = 1e-7 * torch.randn(FRAMES, 3, generator=generator(1))
    kept = in_unit_of(found, Cameras(pan, truth.cameras.intrinsics, HEIGHT, WIDTH))
    assert torch.equal(kept.depths[4], found.depths[4])


def test_one_frame_needs_no_path():
    found = estimate_walk(walk("room", 0).frames[:1], network(), depths={}, check=ignore)
    assert torch.equal(found.cameras.w2c, torch.eye(4)[None]) and found.trusted.all() and list(found.depths) == [0]


def test_what_cannot_be_measured_is_not_trusted():
    truth = walk("village", 1)
    frames = torch.cat([truth.frames[:9], torch.full_like(truth.frames[:3], 90)])
    found = estimate_walk(frames, network(), depths={}, check=ignore)
    assert found.trusted.tolist() == [True] * 9 + [False] * 3
    assert found.cameras.w2c.isfinite().all() and all(d.isfinite().all() for d in found.depths.values())


def test_long_videos_are_measured_at_intervals_that_lifting_knows():
    assert measured_frames(1) == [0] and measured_frames(6) == [0, 4, 5]
    for count in (481, 1600, 1601, 3000, 9000):
        ids = measured_frames(count)
        steps = set(np.diff(ids[:-1]))
        assert len(ids) <= MOST_KEYFRAMES + 1 and ids[-1] == count - 1
        assert len(steps) == 1 and steps <= {4, 8, 16, 32}


def test_every_step_is_told_in_order_and_may_stop_the_work():
    frames = walk("street", 0).frames[:9]
    told: list[tuple[int, int]] = []
    estimate_walk(frames, network(), depths={}, check=lambda done, steps: told.append((done, steps)))
    assert len({steps for _, steps in told}) == 1
    assert all(a[0] <= b[0] for a, b in itertools.pairwise(told)) and told[-1][0] == told[-1][1]
    with pytest.raises(Cancelled):
        estimate_walk(frames, network(), depths={}, check=Progress(should_stop=lambda: True).step)


def test_cameras_of_some_frames_become_those_of_all():
    truth = walk("street", 0).cameras
    ids = [0, 5, 10, 20]
    every = cameras_of_all(truth[ids], ids, FRAMES + 2)
    assert len(every) == FRAMES + 2 and (every.image_height, every.image_width) == (HEIGHT, WIDTH)
    torch.testing.assert_close(every.w2c[ids], truth.w2c[ids], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(every.centres[15], (truth.centres[10] + truth.centres[20]) / 2, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(every.w2c[-1], truth.w2c[20], atol=1e-5, rtol=1e-5)
    shuffled = cameras_of_all(truth[[10, 0, 20, 5]], [10, 0, 20, 5], FRAMES + 2)
    torch.testing.assert_close(shuffled.w2c, every.w2c)


@functools.cache
def lifted_elsewhere() -> tuple[Walkthrough, Reconstruction, Reconstruction]:
    """A walk, its splats, and the same in a world of another unit, place and turn."""
    truth = walk("room", 0)
    known = Walkthrough(truth.frames, truth.cameras, truth.every(4))
    lifted = GeometricLift(4).reconstruct(known, ignore)
    away = Sim3(3.0, truth.cameras.w2c[5, :3, :3].double(), torch.tensor([1.0, -2.0, 0.5]).double())
    moved = Reconstruction(away.apply_to_scene(lifted.scene), away.apply_to_cameras(lifted.cameras), lifted.frame_ids)
    return known, lifted, moved


def test_splats_of_estimated_cameras_come_into_the_known_world():
    known, lifted, moved = lifted_elsewhere()
    back = in_known_world(known, moved)
    torch.testing.assert_close(back.scene.means, lifted.scene.means, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(back.cameras.w2c, lifted.cameras.w2c, atol=1e-3, rtol=1e-3)
    only_depth = in_known_world(replace(known, cameras=None), moved)
    torch.testing.assert_close(only_depth.scene.scales, lifted.scene.scales, atol=1e-4, rtol=0.05)
    unknown = replace(known, cameras=None, depths={0: torch.full((HEIGHT, WIDTH), torch.nan)})
    torch.testing.assert_close(in_known_world(unknown, moved).scene.means, moved.scene.means)


def test_cameras_that_only_turn_give_no_unit_but_their_place():
    known, lifted, moved = lifted_elsewhere()
    # Centres that differ by rounding alone must not shrink the world.
    pan = known.cameras.w2c.clone()
    pan[:, :3, 3] = 1e-7 * torch.randn(FRAMES, 3, generator=generator(1))
    still = replace(known, cameras=Cameras(pan, known.cameras.intrinsics, HEIGHT, WIDTH))
    back = in_known_world(still, moved)
    torch.testing.assert_close(back.scene.scales, lifted.scene.scales, atol=1e-4, rtol=0.05)
    assert back.cameras.centres.mean(0).norm() < 0.05 * path_length(lifted.cameras)
    unmeasured = in_known_world(replace(still, depths={}), moved)
    torch.testing.assert_close(unmeasured.scene.scales, moved.scene.scales)


def test_depth_rendered_from_splats_is_that_of_the_frames():
    known, lifted, _ = lifted_elsewhere()
    seen = rendered_depth(lifted, [4, 20])
    assert sorted(seen) == [4, 20] and seen[4].shape == (HEIGHT, WIDTH)
    assert depth_ratio({4: known.depths[4]}, {4: seen[4]}) == pytest.approx(1, abs=0.03)
    smaller = F.interpolate(known.depths[4][None, None], (30, 52))[0, 0]
    assert depth_ratio({4: smaller * 2}, {4: seen[4]}) == pytest.approx(2, abs=0.1)
    with pytest.raises(ValueError, match="no pixel"):
        depth_ratio({}, {})
