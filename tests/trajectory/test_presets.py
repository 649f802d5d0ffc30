"""Project presets: start at the photo, move smoothly, scale with the scene, and extend or close as promised."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lyra.errors import UserError
from lyra.geometry.rotations import is_rotation, rotation_angle
from lyra.trajectory.presets import (
    MAX_STRENGTH,
    PRESETS,
    PROJECT_PRESETS,
    centre_depth,
    find_preset,
    preset_cameras,
)
from lyra.trajectory.released_presets import RELEASED_PRESETS, released_cameras
from lyra.types import Cameras, DepthMap

K = torch.tensor([[80.0, 0.0, 48.0], [0.0, 80.0, 32.0], [0.0, 0.0, 1.0]])
EXTENDING = [name for name, preset in PROJECT_PRESETS.items() if preset.extends]
CLOSED = [name for name, preset in PROJECT_PRESETS.items() if not preset.extends]


def cameras(name: str, frames: int = 81, depth: DepthMap | float = 2.0, strength: float = 1.0) -> Cameras:
    return preset_cameras(
        name, frames=frames, depth=depth, intrinsics=K, image_height=64, image_width=96, strength=strength
    )


def turn_degrees(path: Cameras) -> float:
    return float(rotation_angle(path.w2c[0, :3, :3], path.w2c[-1, :3, :3]).rad2deg())


def test_the_promised_presets_exist_and_say_what_they_do() -> None:
    promised = (
        "push-in pull-back pan-left pan-right orbit-left orbit-right rise truck-left truck-right spiral out-and-back"
    )
    assert list(PROJECT_PRESETS) == [*promised.split(), "loop"]
    assert set(RELEASED_PRESETS) - set(PRESETS) == set()
    assert all(preset.description.endswith(".") for preset in PRESETS.values())


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(sorted(PRESETS)),
    st.integers(1, 90),
    st.floats(0.01, 1000.0),
    st.floats(0.05, MAX_STRENGTH),
)
def test_every_path_is_rigid_and_begins_with_the_photo(name: str, frames: int, depth: float, strength: float) -> None:
    path = cameras(name, frames, depth, strength)
    assert len(path) == frames
    assert torch.equal(path.w2c[0], torch.eye(4))
    assert is_rotation(path.w2c[:, :3, :3], 1e-4).all()
    assert (path.intrinsics[0] == K).all()


@pytest.mark.parametrize("name", PROJECT_PRESETS)
@pytest.mark.parametrize("strength", [1.0, 0.37])
def test_positions_scale_with_the_centre_depth_and_turns_do_not(name: str, strength: float) -> None:
    near, far = cameras(name, depth=2.0, strength=strength), cameras(name, depth=20.0, strength=strength)
    torch.testing.assert_close(far.centres, near.centres * 10, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(far.w2c[:, :3, :3], near.w2c[:, :3, :3], atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", EXTENDING)
@pytest.mark.parametrize("chunks", [2, 3, 6])
def test_a_longer_job_begins_with_the_very_path_of_a_shorter_one(name: str, chunks: int) -> None:
    longer = cameras(name, 1 + 80 * chunks, depth=1.7, strength=0.9)
    for shorter_chunks in range(1, chunks):
        shorter = cameras(name, 1 + 80 * shorter_chunks, depth=1.7, strength=0.9)
        assert shorter.w2c.numpy().tobytes() == longer.w2c[: len(shorter)].numpy().tobytes()


@pytest.mark.parametrize("name", EXTENDING)
def test_an_extending_path_eases_in_and_goes_further_in_more_chunks(name: str) -> None:
    path = cameras(name, 161)
    steps = path.w2c.diff(dim=0).abs().amax(dim=(1, 2))
    assert steps[0] < 0.05 * steps.max()
    # A quarter of the top speed is the most that any frame gains on the one before.
    assert path.w2c.double().diff(dim=0).diff(dim=0).abs().max() < 0.25 * steps.max()
    if name != "spiral" and not name.startswith("pan"):
        assert path.centres[160].norm() > 1.7 * path.centres[80].norm()


@pytest.mark.parametrize(
    ("name", "centre", "degrees"),
    [
        ("push-in", (0, 0, 0.9), 0),
        ("pull-back", (0, 0, -0.9), 0),
        ("truck-right", (0.6, 0, 0), 0),
        ("truck-left", (-0.6, 0, 0), 0),
        ("pan-right", (0, 0, 0), 30),
        ("pan-left", (0, 0, 0), 30),
        ("orbit-right", (2 * math.sin(math.pi / 9), 0, 2 - 2 * math.cos(math.pi / 9)), 20),
        ("orbit-left", (-2 * math.sin(math.pi / 9), 0, 2 - 2 * math.cos(math.pi / 9)), 20),
        ("rise", (0, -0.4, 0), math.degrees(math.atan(0.2)) / 2),
        ("spiral", (0, 0, 0.3), 0),
    ],
)
def test_one_chunk_covers_the_comfortable_amount(name: str, centre: tuple[float, ...], degrees: float) -> None:
    path = cameras(name)
    assert path.centres[-1].tolist() == pytest.approx(centre, abs=1e-5)
    assert turn_degrees(path) == pytest.approx(degrees, abs=0.02)


@pytest.mark.parametrize(("name", "sign"), [("pan-right", 1), ("pan-left", -1), ("orbit-right", -1), ("orbit-left", 1)])
def test_left_and_right_turn_the_view_the_way_they_say(name: str, sign: int) -> None:
    view = cameras(name).c2w[-1, :3, 2]
    assert sign * view[0] > 0.1


def test_rise_looks_down_and_orbit_keeps_the_centre_in_the_middle() -> None:
    assert cameras("rise").c2w[-1, 1, 2] > 0.05
    path = cameras("orbit-left", 161)
    seen = path.w2c @ torch.tensor([0.0, 0.0, 2.0, 1.0])
    torch.testing.assert_close(seen[:, :3], torch.tensor([0.0, 0.0, 2.0]).expand(161, 3), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", CLOSED)
@pytest.mark.parametrize("frames", [81, 161, 401])
@pytest.mark.parametrize("strength", [1.0, MAX_STRENGTH])
def test_a_closed_path_leaves_and_returns_at_rest_to_exactly_the_photo(name: str, frames: int, strength: float) -> None:
    path = cameras(name, frames, strength=strength)
    assert torch.equal(path.w2c[-1], torch.eye(4))
    steps = path.w2c.diff(dim=0).abs().amax(dim=(1, 2))
    assert max(steps[0], steps[-1]) < 0.05 * steps.max()
    assert path.centres.norm(dim=-1).max() > 0.5 * strength * 0.3 * 2.0
    assert (path.c2w[:, 2, 2] > 0).all(), "the camera never faces backwards"


def test_out_and_back_comes_back_through_the_cameras_it_left_by() -> None:
    path = cameras("out-and-back", 161)
    torch.testing.assert_close(path.w2c, path.w2c.flip(0), atol=1e-6, rtol=0)
    assert path.centres[80].tolist() == pytest.approx((0.4, 0, 0.7), abs=1e-5)


def test_same_request_gives_the_same_bytes() -> None:
    for name in PRESETS:
        assert cameras(name).w2c.numpy().tobytes() == cameras(name).w2c.numpy().tobytes()


def test_strength_one_of_a_released_preset_is_its_usual_released_strength() -> None:
    ours = cameras("horizontal_zoom:left", 17, 2.5)
    released = released_cameras(
        "horizontal_zoom",
        frames=17,
        centre_depth=2.5,
        intrinsics=K,
        image_height=64,
        image_width=96,
        direction="left",
        strength=0.5,
    )
    assert torch.equal(ours.w2c, released.w2c)
    assert torch.equal(cameras("horizontal_zoom").w2c, cameras("horizontal_zoom:right").w2c)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("push_in", r'no preset "push_in" \(did you mean "push-in"\?\); choose one of push-in, '),
        ("xyzzy", r'no preset "xyzzy"; choose one of push-in, '),
        ("", r'no preset ""; choose one of push-in, '),
        ("push-in:left", r'no direction "left"; write "push-in" alone'),
        ("horizontal:up", r'no direction "up"; choose one of "horizontal:right", "horizontal:left"'),
        ("horizontal:", r'no direction ""; choose one of'),
    ],
)
def test_a_wrong_name_is_answered_with_what_to_write(name: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        find_preset(name)


@pytest.mark.parametrize("strength", [0.0, -1.0, MAX_STRENGTH + 0.01, math.nan, math.inf])
def test_a_strength_out_of_range_is_refused(strength: float) -> None:
    with pytest.raises(UserError, match="choose one over 0 and at most 3"):
        cameras("push-in", strength=strength)


@pytest.mark.parametrize(("frames", "depth"), [(0, 1.0), (81, 0.0), (81, math.nan)])
def test_impossible_numbers_are_a_bug_and_not_a_users_mistake(frames: int, depth: float) -> None:
    with pytest.raises(ValueError) as caught:
        cameras("push-in", frames, depth)
    assert not isinstance(caught.value, UserError)


def depth_map(values: list[float], valid: list[bool], sky: list[bool]) -> DepthMap:
    return DepthMap(torch.tensor([values]), torch.tensor([valid]), torch.tensor([sky]), K)


def test_centre_depth_is_the_lower_quartile_without_sky_and_invalid_pixels() -> None:
    values = [1.0, 2.0, 3.0, 4.0, 5.0, 1000.0, 0.001, math.nan]
    depth = depth_map(values, [True] * 6 + [False, True], [False] * 5 + [True, False, False])
    assert centre_depth(depth) == pytest.approx(2.0)
    assert torch.equal(cameras("push-in", depth=depth).w2c, cameras("push-in", depth=2.0).w2c)


def test_a_photo_of_sky_alone_counts_its_sky_and_one_without_depth_is_refused() -> None:
    assert centre_depth(depth_map([50.0, 50.0], [True, True], [True, True])) == 50.0
    with pytest.raises(UserError, match="No distance could be measured"):
        centre_depth(depth_map([1.0, 2.0], [False, False], [False, False]))
