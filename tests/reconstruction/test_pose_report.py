"""What the report of commanded and estimated cameras says."""

import math

import pytest
import torch

from lyra.geometry.rotations import axis_angle_to_matrix
from lyra.reconstruction.pose_report import PoseReport, compare_cameras
from lyra.reconstruction.sim3 import Sim3
from lyra.types import Cameras

K = torch.tensor([[50.0, 0, 31.5], [0, 50.0, 23.5], [0, 0, 1]])
WORLD = Sim3(3.0, axis_angle_to_matrix(torch.tensor([0.4, -1.0, 0.7])), torch.tensor([5.0, -2.0, 1.0]))


def cameras(w2c):
    return Cameras(w2c, K.expand(len(w2c), 3, 3), 48, 64)


def straight(count=11):
    """Ten steps of a unit along z."""
    w2c = torch.eye(4).repeat(count, 1, 1)
    w2c[:, 2, 3] = -torch.arange(float(count))
    return cameras(w2c)


def test_the_same_path_in_another_world_does_not_differ():
    report = compare_cameras(straight(), WORLD.apply_to_cameras(straight()))
    assert report.max_degrees < 0.05 and report.max_percent < 0.01


def test_turns_and_distances_are_measured_in_degrees_and_shares_of_the_path():
    w2c = straight().w2c.clone()
    # Half of the cameras are turned one way and half the other, so the mean turn stays; likewise their places.
    for index, sign in [(1, 1), (3, -1), (7, -1), (9, 1)]:
        turn = axis_angle_to_matrix(torch.tensor([0.0, sign * math.radians(4), 0.0]))
        w2c[index] = torch.cat([torch.cat([turn, torch.zeros(3, 1)], 1), torch.eye(4)[3:]]) @ w2c[index]
    for index, sign in [(2, 1), (4, -1), (6, -1), (8, 1)]:
        w2c[index, 0, 3] += sign * 0.2
    report = compare_cameras(straight(), WORLD.apply_to_cameras(cameras(w2c)))
    assert report.max_degrees == pytest.approx(4, abs=0.1)
    assert report.mean_degrees == pytest.approx(16 / 11, abs=0.1)
    assert report.max_percent == pytest.approx(2, abs=0.1)
    assert report.mean_percent == pytest.approx(8 / 11, abs=0.1)


def test_roll_about_a_straight_path_is_found_and_not_aligned_away():
    w2c = straight().w2c.clone()
    for index in range(11):
        w2c[index, :3] = axis_angle_to_matrix(torch.tensor([0.0, 0.0, 0.02 * (index - 5)])) @ w2c[index, :3]
    report = compare_cameras(straight(), cameras(w2c))
    assert report.max_degrees == pytest.approx(math.degrees(0.1), abs=0.05)


def test_one_sentence():
    text = PoseReport(0.84, 2.1, 1.23, 3.4).describe()
    assert all(part in text for part in ("0.8°", "2.1°", "1.2 %", "3.4 %"))
    assert text.endswith(".") and "\n" not in text


def test_cameras_that_do_not_move_are_compared_by_their_turns():
    turns = axis_angle_to_matrix(torch.linspace(-0.5, 0.5, 5)[:, None] * torch.tensor([0.0, 1.0, 0.0]))
    w2c = torch.eye(4).repeat(5, 1, 1)
    w2c[:, :3, :3] = turns
    # Rounding leaves centres that are not quite the same.
    w2c[:, :3, 3] = -(turns @ torch.tensor([3.0, 1.0, 2.0]))
    report = compare_cameras(cameras(w2c), straight(5))
    assert report.mean_percent is None and report.max_percent is None
    assert report.max_degrees == pytest.approx(math.degrees(0.5), abs=0.2)
    assert "cannot be compared" in report.describe()


def test_paths_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match="11 commanded"):
        compare_cameras(straight(), straight(5))
