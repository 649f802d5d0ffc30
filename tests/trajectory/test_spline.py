"""Splines: pass through the keyframes, smoothly, without detours, and at the times given."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lyra.geometry.rotations import axis_angle_to_matrix, is_rotation, rotation_angle, world_to_camera
from lyra.trajectory.spline import centripetal_times, spline_cameras
from lyra.types import Cameras


def keyframes(count: int, seed: int = 0, spread: float = 1.0) -> Cameras:
    generator = torch.Generator().manual_seed(seed)
    rotation = axis_angle_to_matrix(0.8 * torch.randn(count, 3, generator=generator))
    centres = spread * torch.randn(count, 3, generator=generator)
    k = torch.tensor([[80.0, 0.0, 48.0], [0.0, 80.0, 32.0], [0.0, 0.0, 1.0]]).repeat(count, 1, 1)
    k[:, 0, 0] += torch.arange(count)
    return Cameras(world_to_camera(rotation, centres), k, 64, 96)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 6), st.integers(0, 1000))
def test_the_path_passes_through_every_keyframe_at_its_time(count: int, seed: int) -> None:
    keys = keyframes(count, seed)
    path = spline_cameras(keys, 20 * (count - 1) + 1, times=[float(i) for i in range(count)])
    torch.testing.assert_close(path.w2c[::20], keys.w2c, atol=1e-5, rtol=0)
    torch.testing.assert_close(path.intrinsics[::20], keys.intrinsics, atol=1e-4, rtol=0)
    assert is_rotation(path.w2c[:, :3, :3], 1e-5).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 6), st.integers(0, 1000))
def test_speed_and_turning_change_little_from_frame_to_frame(count: int, seed: int) -> None:
    path = spline_cameras(keyframes(count, seed), 801)
    steps = path.w2c.double().diff(dim=0)
    assert steps.diff(dim=0).abs().max() < 0.35 * steps.abs().max()


def test_two_keyframes_are_joined_by_a_straight_line_and_one_even_turn() -> None:
    keys = keyframes(2)
    path = spline_cameras(keys, 11)
    torch.testing.assert_close(path.centres[5], keys.centres.mean(dim=0), atol=1e-5, rtol=0)
    whole = rotation_angle(keys.w2c[0, :3, :3], keys.w2c[1, :3, :3])
    torch.testing.assert_close(rotation_angle(path.w2c[0, :3, :3], path.w2c[5, :3, :3]), whole / 2, atol=1e-3, rtol=0)


@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_equal_keyframes_and_turns_on_the_spot_are_paths_too(spread: float) -> None:
    keys = keyframes(3, spread=spread)
    path = spline_cameras(keys[[0, 0, 1, 2, 2]], 50)
    assert path.w2c.isfinite().all()
    torch.testing.assert_close(path.w2c[-1], keys.w2c[2], atol=1e-5, rtol=0)


def test_times_of_far_keyframes_are_further_apart() -> None:
    keys = keyframes(3)
    w2c = torch.eye(4).repeat(3, 1, 1)
    w2c[:, 2, 3] = torch.tensor([0.0, -1.0, -5.0])
    times = centripetal_times(Cameras(w2c, keys.intrinsics, 64, 96))
    assert times.tolist() == pytest.approx([0, 1 / 3, 1])


@pytest.mark.parametrize(
    ("count", "frames", "times"),
    [(1, 10, None), (3, 1, None), (3, 10, [0.0, 1.0]), (3, 10, [0.0, 1.0, 1.0]), (2, 5, [1.0, 0.0])],
)
def test_what_is_no_path_is_refused(count: int, frames: int, times: list[float] | None) -> None:
    with pytest.raises(ValueError):
        spline_cameras(keyframes(count), frames, times)
