"""Recipes: the released zoom, the order in which its frames are shown, and the ground that it can follow."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from lyra.errors import UserError
from lyra.geometry.rotations import axis_angle_to_matrix, world_to_camera
from lyra.trajectory.recipes import (
    RECIPES,
    Leg,
    Recipe,
    find_recipe,
    ground_normal,
    joined_cameras,
    parallel_to_ground,
    rising_backwards,
    scaled_path,
    shown_order,
    zoom_in_zoom_out,
)
from lyra.trajectory.released_presets import released_cameras
from lyra.types import Cameras, DepthMap

K = torch.tensor([[80.0, 0.0, 48.0], [0.0, 80.0, 32.0], [0.0, 0.0, 1.0]])


def zoom(depth: DepthMap | float = 2.0, **options: Any) -> Recipe:
    return zoom_in_zoom_out(depth=depth, intrinsics=K, image_height=64, image_width=96, **options)


def ramp(slope: float = 0.0) -> DepthMap:
    """Level or rising ground 0.4 below the camera under a wall 4 away, with a strip of sky."""
    rows, columns = torch.meshgrid(torch.arange(64.0), torch.arange(96.0), indexing="ij")
    # On the plane y = 0.4 - slope * z with y = (row - 32) / 80 * z.
    ground = 0.4 / ((rows - 32) / 80 + slope)
    depth = torch.where((ground > 0) & (ground < 4), ground, torch.full_like(columns, 4.0))
    sky = rows < 8
    return DepthMap(torch.where(sky, torch.full_like(depth, 1000.0), depth), ~sky, sky, K)


def some_path(count: int = 7) -> Cameras:
    generator = torch.Generator().manual_seed(0)
    rotation = axis_angle_to_matrix(torch.randn(count, 3, generator=generator))
    rotation[0] = torch.eye(3)
    centres = torch.randn(count, 3, generator=generator)
    return Cameras(world_to_camera(rotation, centres - centres[:1]), K.expand(count, 3, 3), 64, 96)


def test_the_zoom_out_goes_back_and_up_without_turning_and_is_shown_backwards() -> None:
    out = zoom().legs[0]
    assert (out.name, out.chunks, out.reversed) == ("zoom-out", 3, True)
    frame = torch.arange(241.0)
    back = frame * 1.5 * 2.0 / 241
    expected = torch.stack([torch.zeros(241), -0.15 * back, -back], dim=-1)
    torch.testing.assert_close(out.cameras.centres, expected, atol=1e-6, rtol=0)
    assert torch.equal(out.cameras.w2c[:, :3, :3], torch.eye(3).expand(241, 3, 3))
    assert torch.equal(out.cameras.w2c[0], torch.eye(4))


def test_the_zoom_in_is_the_released_preset() -> None:
    ahead = zoom().legs[1]
    released = released_cameras(
        "horizontal_zoom",
        frames=81,
        centre_depth=2.0,
        intrinsics=K,
        image_height=64,
        image_width=96,
        direction="right",
        strength=0.5,
    )
    assert (ahead.name, ahead.chunks, ahead.reversed) == ("zoom-in", 1, False)
    assert torch.equal(ahead.cameras.w2c, released.w2c)
    assert torch.equal(ahead.cameras.intrinsics, released.intrinsics)


def test_the_photo_is_shown_once_between_the_legs() -> None:
    recipe = zoom()
    order = shown_order(recipe)
    assert recipe.chunks == 4
    assert len(order) == 321 == 1 + 4 * 80
    assert order[:2] == [(0, 240), (0, 239)]
    assert order[239:243] == [(0, 1), (0, 0), (1, 1), (1, 2)]
    assert order[-1] == (1, 80)
    assert len(set(order)) == 321


def test_legs_that_do_not_meet_in_the_photo_keep_all_their_frames() -> None:
    out, ahead = zoom().legs
    assert len(shown_order(Recipe((ahead, out)))) == 81 + 241
    assert len(shown_order(Recipe((ahead,)))) == 81


def test_the_joined_path_moves_ahead_all_the_way() -> None:
    recipe = zoom()
    cameras = joined_cameras(recipe)
    assert len(cameras) == 321
    assert torch.equal(cameras.w2c[240], torch.eye(4))
    assert (cameras.centres[:, 2].diff() > 0).all()
    order = shown_order(recipe)
    for number in (0, 100, 241, 320):
        leg, frame = order[number]
        assert torch.equal(cameras.w2c[number], recipe.legs[leg].cameras.w2c[frame])
    # The two legs have nearly the same speed, so that the joint is not seen as a jerk.
    steps = cameras.centres.diff(dim=0).norm(dim=-1)
    assert 1.0 < float(steps[239] / steps[240]) < 1.03


def test_strength_scales_both_legs_alike() -> None:
    for leg, doubled in zip(zoom().legs, zoom(strength=2.0).legs, strict=True):
        torch.testing.assert_close(doubled.cameras.centres, 2 * leg.cameras.centres, atol=1e-5, rtol=0)
        assert doubled.chunks == leg.chunks


def test_distances_scale_with_the_centre_depth_of_the_photo() -> None:
    ways = [leg.cameras.centres[-1].norm() for leg in zoom(ramp()).legs]
    unit = [leg.cameras.centres[-1].norm() for leg in zoom(1.0).legs]
    assert 1.5 < float(ways[0] / unit[0]) <= 4.0
    assert float(ways[0] / unit[0]) == pytest.approx(float(ways[1] / unit[1]), rel=1e-4)


@pytest.mark.parametrize("strength", [0.0, -1.0, 3.1, math.nan, math.inf])
def test_a_strength_out_of_range_is_refused(strength: float) -> None:
    with pytest.raises(UserError, match="out of range"):
        zoom(strength=strength)


def test_a_photo_of_unknown_depth_is_refused() -> None:
    level = ramp()
    with pytest.raises(UserError, match="No distance"):
        zoom(DepthMap(level.depth, torch.zeros_like(level.valid), level.sky, K))
    with pytest.raises(ValueError, match="positive"):
        zoom(0.0)


def test_a_leg_has_whole_chunks() -> None:
    with pytest.raises(ValueError, match="1 \\+ 80 k"):
        Leg("short", some_path(), reversed=False)


def test_only_cameras_behind_the_first_are_raised() -> None:
    path = some_path()
    raised = rising_backwards(path, 0.5)
    behind = (-path.centres[:, 2]).clamp(min=0)
    assert 0 < int((behind > 0).sum()) < len(path)
    change = raised.centres - path.centres
    torch.testing.assert_close(change[:, 1], -0.5 * behind, atol=1e-5, rtol=0)
    torch.testing.assert_close(change[:, [0, 2]], torch.zeros(len(path), 2), atol=1e-5, rtol=0)
    assert torch.equal(raised.w2c[:, :3, :3], path.w2c[:, :3, :3])


@pytest.mark.parametrize("slope", [0.0, 0.1])
def test_the_ground_is_found_and_points_up(slope: float) -> None:
    normal = ground_normal(ramp(slope))
    assert normal is not None
    expected = torch.tensor([0.0, -1.0, -slope]) / math.hypot(1.0, slope)
    torch.testing.assert_close(normal, expected, atol=1e-3, rtol=0)
    again = ground_normal(ramp(slope), generator=torch.Generator().manual_seed(0))
    assert torch.equal(normal, again)


def test_no_ground_is_found_where_nothing_is_known() -> None:
    level = ramp()
    assert ground_normal(DepthMap(level.depth, torch.zeros_like(level.valid), level.sky, K)) is None
    assert ground_normal(DepthMap(torch.full_like(level.depth, 600.0), level.valid, level.sky, K)) is None


def test_a_path_along_the_ground_stays_in_its_plane_and_keeps_its_distances() -> None:
    path, normal = some_path(), torch.tensor([0.0, -0.6, -0.8])
    level = parallel_to_ground(path, normal)
    assert (level.w2c[:, :3, 3] @ normal).abs().max() < 1e-5
    torch.testing.assert_close(level.w2c[:, :3, 3].norm(dim=-1), path.w2c[:, :3, 3].norm(dim=-1))
    assert torch.equal(level.w2c[:, :3, :3], path.w2c[:, :3, :3])


def test_with_a_ground_both_legs_follow_it_and_the_zoom_out_rises_a_little() -> None:
    normal = torch.tensor([0.0, -1.0, -0.1]) / math.hypot(1.0, 0.1)
    out, ahead = zoom(ground=normal).legs
    plain_out, plain_ahead = zoom().legs
    height = out.cameras.centres @ normal
    torch.testing.assert_close(height, torch.linspace(0, 0.05, 241), atol=1e-5, rtol=0)
    assert (ahead.cameras.centres @ normal).abs().max() < 1e-6
    assert ahead.cameras.centres[-1].norm().item() == pytest.approx(plain_ahead.cameras.centres[-1].norm().item())
    assert out.cameras.centres[-1].norm().item() == pytest.approx(plain_out.cameras.centres[-1].norm().item(), abs=1e-3)
    assert torch.equal(out.cameras.w2c[0], torch.eye(4))


def test_a_scaled_path_goes_further_and_looks_the_same_way() -> None:
    path = some_path()
    scaled = scaled_path(path, 1.1)
    torch.testing.assert_close(scaled.centres, 1.1 * path.centres)
    assert torch.equal(scaled.w2c[:, :3, :3], path.w2c[:, :3, :3])
    assert torch.equal(scaled_path(path, 1.0).w2c, path.w2c)
    for wrong in (0.0, -1.1, math.nan, math.inf):
        with pytest.raises(UserError, match="pose scale"):
            scaled_path(path, wrong)


def test_recipes_are_found_by_name() -> None:
    recipe = find_recipe("zoom-in-zoom-out").make(depth=2.0, intrinsics=K, image_height=64, image_width=96)
    assert torch.equal(joined_cameras(recipe).w2c, joined_cameras(zoom()).w2c)
    assert all(preset.description.endswith(".") for preset in RECIPES.values())
    with pytest.raises(UserError, match="choose one of zoom-in-zoom-out"):
        find_recipe("zoom")
