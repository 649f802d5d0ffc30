"""Clearance: agrees with a slow twin, sky never blocks, and a shortened path is clear, rigid and explained."""

from __future__ import annotations

import math
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lyra.errors import UserError
from lyra.geometry.rotations import is_rotation
from lyra.trajectory import clearance
from lyra.trajectory.clearance import check_clearance, resample, scale_motion, scene_points, shorten_path
from lyra.trajectory.presets import PROJECT_PRESETS, centre_depth, preset_cameras
from lyra.types import Cameras, DepthMap

HEIGHT, WIDTH = 24, 40
K = torch.tensor([[30.0, 0.0, 19.5], [0.0, 30.0, 11.5], [0.0, 0.0, 1.0]])


def depth_map(depth: Tensor, valid: Tensor | None = None, sky: Tensor | None = None) -> DepthMap:
    everywhere = torch.ones_like(depth, dtype=torch.bool)
    return DepthMap(depth, everywhere if valid is None else valid, ~everywhere if sky is None else sky, K)


def wall(distance: float = 2.0) -> DepthMap:
    return depth_map(torch.full((HEIGHT, WIDTH), distance))


def straight(centres: list[tuple[float, float, float]]) -> Cameras:
    w2c = torch.eye(4).repeat(len(centres), 1, 1)
    w2c[:, :3, 3] = -torch.tensor(centres)
    return Cameras(w2c, K.repeat(len(centres), 1, 1), HEIGHT, WIDTH)


def preset(name: str, depth: DepthMap, frames: int = 81, strength: float = 1.0) -> Cameras:
    return preset_cameras(
        name, frames=frames, depth=depth, intrinsics=K, image_height=HEIGHT, image_width=WIDTH, strength=strength
    )


def slow_report(cameras: Cameras, depth: DepthMap) -> tuple[list[float], list[bool]]:
    """Every pose against every pixel, one by one."""
    points = []
    for v in range(depth.depth.shape[0]):
        for u in range(depth.depth.shape[1]):
            if depth.valid[v, u] and not depth.sky[v, u]:
                z = float(depth.depth[v, u])
                points.append((float((u - K[0, 2]) / K[0, 0]) * z, float((v - K[1, 2]) / K[1, 1]) * z, z))
    d = centre_depth(depth)
    keep = min(max(0.05 * d, 0.01), 0.5 * min((math.dist(p, (0, 0, 0)) for p in points), default=math.inf))
    distances, blocked = [], []
    for pose in cameras.w2c:
        centre = (-pose[:3, :3].T @ pose[:3, 3]).tolist()
        distance = min((math.dist(p, centre) for p in points), default=math.inf)
        behind = False
        if centre[2] > 0:
            u = round(float(K[0, 0]) * centre[0] / centre[2] + float(K[0, 2]))
            v = round(float(K[1, 1]) * centre[1] / centre[2] + float(K[1, 2]))
            if 0 <= u < depth.depth.shape[1] and 0 <= v < depth.depth.shape[0]:
                solid = bool(depth.valid[v, u]) and not bool(depth.sky[v, u])
                behind = solid and centre[2] > float(depth.depth[v, u]) - keep
        distances.append(distance)
        blocked.append(behind or distance < keep)
    return distances, blocked


@pytest.mark.parametrize("seed", range(6))
def test_report_agrees_with_the_slow_twin(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    depth = depth_map(
        1.0 + 2.0 * torch.rand(HEIGHT, WIDTH, generator=generator),
        torch.rand(HEIGHT, WIDTH, generator=generator) > 0.2,
        torch.rand(HEIGHT, WIDTH, generator=generator) > 0.8,
    )
    centres = (torch.rand(30, 3, generator=generator) - 0.5) * torch.tensor([2.0, 2.0, 6.0])
    cameras = straight([tuple(c) for c in centres.tolist()])
    report = check_clearance(cameras, depth)
    distances, blocked = slow_report(cameras, depth)
    torch.testing.assert_close(report.clearance, torch.tensor(distances), atol=1e-5, rtol=1e-5)
    assert report.blocked.tolist() == blocked
    assert report.first_blocked == (blocked.index(True) if any(blocked) else None)


def test_a_subsampled_cloud_is_small_and_close_to_the_whole_one() -> None:
    height, width = 480, 832
    k = torch.tensor([[600.0, 0.0, 416.0], [0.0, 600.0, 240.0], [0.0, 0.0, 1.0]])
    slope = torch.linspace(2.0, 4.0, width).expand(height, width)
    nothing = torch.zeros(height, width, dtype=torch.bool)
    depth = DepthMap(slope, ~nothing, nothing, k)
    assert 10_000 < len(scene_points(depth)) <= clearance.MAX_POINTS
    centres = torch.tensor([[0.0, 0.0, 0.0], [0.3, -0.1, 1.5], [-0.6, 0.2, 1.0]])
    whole = scene_points(depth, max_points=height * width)
    assert len(whole) == height * width
    exact = torch.cdist(centres, whole).amin(dim=1)
    torch.testing.assert_close(check_clearance(straight(centres.tolist()), depth).clearance, exact, atol=0.02, rtol=0)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 50_001), (333, 77), (200, 101), (141, 143)])
def test_the_cloud_never_exceeds_its_limit_and_is_never_empty(height: int, width: int) -> None:
    points = scene_points(depth_map(torch.ones(height, width)))
    assert 1 <= len(points) <= clearance.MAX_POINTS


def test_going_through_a_wall_is_blocked_from_the_margin_on_and_stays_blocked_behind_it() -> None:
    report = check_clearance(straight([(0, 0, z) for z in (0.0, 1.0, 1.85, 1.95, 2.5, 50.0)]), wall(2.0))
    assert report.blocked.tolist() == [False, False, False, True, True, True]
    assert report.reason is not None and "after frame 3 of 6; lower the strength" in report.reason


def test_outside_of_the_view_only_nearness_blocks() -> None:
    report = check_clearance(straight([(9.0, 0, 5.0), (0, 0, -5.0), (0, 5.0, 0.0)]), wall(2.0))
    assert not report.blocked.any()
    assert report.reason is None


def test_sky_and_invalid_pixels_never_block() -> None:
    everywhere = torch.ones(HEIGHT, WIDTH, dtype=torch.bool)
    far = straight([(0, 0, z) for z in (0.0, 2.0, 100.0)])
    depth = torch.full((HEIGHT, WIDTH), 2.0)
    sky = check_clearance(far, depth_map(depth, sky=everywhere))
    unknown = check_clearance(far, depth_map(depth, valid=~everywhere))
    for report in (sky, unknown):
        assert not report.blocked.any()
        assert report.clearance.isinf().all()


def test_a_photo_of_something_very_near_does_not_block_its_own_camera() -> None:
    depth = torch.full((HEIGHT, WIDTH), 10.0)
    depth[0, 0] = 0.1
    assert check_clearance(straight([(0, 0, 0)]), depth_map(depth)).first_blocked is None


def test_a_clear_path_comes_back_untouched() -> None:
    path = preset("push-in", wall())
    same, report = shorten_path(path, wall())
    assert same is path
    assert report.reason is None


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(list(PROJECT_PRESETS)), st.integers(0, 1000), st.floats(0.5, 3.0), st.integers(1, 3))
def test_a_shortened_path_is_clear_rigid_and_of_as_many_frames(
    name: str, seed: int, strength: float, chunks: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    depth = depth_map(0.5 + 3.0 * torch.rand(HEIGHT, WIDTH, generator=generator))
    path = preset(name, depth, 1 + 80 * chunks, strength)
    shorter, report = shorten_path(path, depth)
    assert len(shorter) == len(path)
    assert torch.equal(shorter.w2c[0], torch.eye(4))
    assert is_rotation(shorter.w2c[:, :3, :3], 1e-4).all()
    assert check_clearance(shorter, depth).first_blocked is None
    assert (report.reason is None) == (report.first_blocked is None)
    if name in ("loop", "out-and-back"):
        assert torch.equal(shorter.w2c[-1], shorter.w2c[0])


def test_the_shortened_path_follows_the_clear_part_of_the_asked_one() -> None:
    path = straight([(0.0, 0.0, 0.1 * i) for i in range(31)])
    shorter, report = shorten_path(path, wall(2.0))
    assert report.first_blocked == 20
    torch.testing.assert_close(shorter.centres[:, 2], torch.linspace(0.0, 1.8, 31), atol=1e-5, rtol=0)
    assert report.reason == (
        "The path would pass through the scene after frame 20 of 31, so it was shortened to 60 % of its length; "
        "lower the strength or choose another preset."
    )


def test_a_path_blocked_at_its_first_step_hardly_moves_and_says_so() -> None:
    path = straight([(0.0, 0.0, 0.0), *((0.0, 0.0, 5.0 + i) for i in range(20))])
    shorter, report = shorten_path(path, wall(2.0))
    assert torch.equal(shorter.w2c, torch.eye(4).expand(21, 4, 4))
    assert report.reason is not None and "shortened to less than 1 % of its length" in report.reason


def test_a_path_that_begins_inside_the_scene_is_refused() -> None:
    with pytest.raises(UserError, match="begins inside the scene; begin it at the photo's camera"):
        shorten_path(straight([(0.0, 0.0, 3.0), (0.0, 0.0, 4.0)]), wall(2.0))


def test_resampling_at_whole_indices_gives_the_path_itself_and_halfway_the_middle() -> None:
    path = preset("orbit-left", wall(), frames=9)
    assert torch.equal(resample(path, torch.arange(9.0)).w2c, path.w2c)
    middle = resample(path, torch.tensor([3.5]))
    torch.testing.assert_close(middle.centres[0], path.centres[3:5].mean(dim=0))


def test_scaling_a_motion_by_one_keeps_it_and_by_zero_stops_it() -> None:
    path = preset("loop", wall())
    torch.testing.assert_close(scale_motion(path, 1.0).w2c, path.w2c, atol=1e-5, rtol=0)
    torch.testing.assert_close(scale_motion(path, 0.0).w2c, torch.eye(4).expand(81, 4, 4), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["push-in", "loop"])
def test_shortening_481_poses_before_a_full_photo_takes_a_fraction_of_a_second(name: str) -> None:
    height, width = 480, 832
    k = torch.tensor([[600.0, 0.0, 416.0], [0.0, 600.0, 240.0], [0.0, 0.0, 1.0]])
    nothing = torch.zeros(height, width, dtype=torch.bool)
    depth = DepthMap(2 + torch.rand(height, width, generator=torch.Generator().manual_seed(0)), ~nothing, nothing, k)
    path = preset_cameras(
        name, frames=481, depth=depth, intrinsics=k, image_height=height, image_width=width, strength=3.0
    )
    begin = time.process_time()
    _, report = shorten_path(path, depth)
    # Processor time of all threads on a machine that others use too; it takes about 0.1 s on one core.
    assert time.process_time() - begin < 1.5
    assert report.first_blocked is not None
