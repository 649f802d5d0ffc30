"""Released presets: recorded outputs of the released code are reproduced, and its corrected defects stay corrected.

`tests/golden/presets.safetensors` holds what the released code gave for 17 frames, centre depth 2.5 and strength 0.5.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lyra.errors import UserError
from lyra.geometry.rotations import is_rotation, rotation_angle
from lyra.trajectory.released_presets import DIRECTIONS, RELEASED_PRESETS, released_cameras
from lyra.types import Cameras

GOLDEN = load_file(Path(__file__).parents[1] / "golden" / "presets.safetensors")
RECORDED = sorted({tuple(key.split(".")[1:3]) for key in GOLDEN})
NAMES = sorted(RELEASED_PRESETS)


def cameras(name: str, direction: str = "right", frames: int = 17, strength: float = 0.5) -> Cameras:
    return released_cameras(
        name,
        frames=frames,
        centre_depth=2.5,
        intrinsics=torch.tensor([[80.0, 0.0, 48.0], [0.0, 80.0, 32.0], [0.0, 0.0, 1.0]]),
        image_height=64,
        image_width=96,
        direction=direction,
        strength=strength,
    )


@pytest.mark.parametrize(("name", "direction"), RECORDED)
def test_recorded_poses_and_intrinsics_of_the_released_code_are_reproduced(name: str, direction: str) -> None:
    ours = cameras(name, direction)
    torch.testing.assert_close(ours.w2c, GOLDEN[f"traj.{name}.{direction}.w2c"], atol=1e-5, rtol=0)
    torch.testing.assert_close(ours.intrinsics, GOLDEN[f"traj.{name}.{direction}.K"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", sorted({name for name, _ in RECORDED}))
@pytest.mark.parametrize("direction", ["up", "down"])
def test_up_and_down_mean_left_to_the_recorded_presets(name: str, direction: str) -> None:
    assert torch.equal(cameras(name, direction).w2c, cameras(name, "left").w2c)


@pytest.mark.parametrize(
    ("name", "direction", "frame", "centre"),
    [
        ("horizontal_zoom", "right", 1, (0, 0, 0.07353)),
        ("horizontal_zoom", "right", 16, (0, 0, 1.17647)),
        ("horizontal", "right", 1, (0.07353, 0, 0)),
        ("horizontal", "right", 16, (1.17647, 0, 0)),
        ("orbit_horizontal", "right", 1, (0.07811, 0, 0.00122)),
        ("orbit_horizontal", "right", 16, (1.19856, 0, 0.30604)),
        ("orbit_vertical", "up", 1, (0, -0.07811, 0.00122)),
        ("orbit_vertical", "up", 16, (0, -1.19856, 0.30604)),
        ("horizontal_spiral", "right", 1, (-0.00686, 0.01105, 0.07812)),
        ("horizontal_spiral", "right", 16, (0, 0, 1.25)),
        ("dolly_zoom", "right", 1, (0, 0, 0.1875)),
        ("dolly_zoom", "right", 16, (0, 0, 3.0)),
        ("horizontal_zoom_bend", "left", 16, (0, -0.14118, -1.17647)),
        ("rotate_zoom_in", "right", 16, (-1.08253, 0, 0.625)),
    ],
)
def test_listed_camera_centres_of_the_released_code_are_reproduced(
    name: str, direction: str, frame: int, centre: tuple[float, float, float]
) -> None:
    # The list has five decimals.
    assert cameras(name, direction).centres[frame].tolist() == pytest.approx(centre, abs=1.1e-5)


def test_dolly_zoom_ends_with_the_listed_focal_length() -> None:
    assert cameras("dolly_zoom").intrinsics[-1, 0, 0].item() == pytest.approx(10.6859, abs=1e-4)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("frames", [1, 2, 3, 81])
def test_every_preset_gives_the_frames_asked_for_from_the_photo_on(name: str, direction: str, frames: int) -> None:
    path = cameras(name, direction, frames)
    assert path.w2c.shape == (frames, 4, 4)
    assert path.intrinsics.shape == (frames, 3, 3)
    assert torch.equal(path.w2c[0], torch.eye(4))
    assert is_rotation(path.w2c[:, :3, :3], 1e-5).all()
    assert path.w2c.isfinite().all()


@pytest.mark.parametrize("name", [name for name in NAMES if RELEASED_PRESETS[name].directions])
def test_every_offered_direction_gives_its_own_path(name: str) -> None:
    one, other = (cameras(name, way).w2c for way in RELEASED_PRESETS[name].directions)
    assert not torch.allclose(one, other, atol=1e-6)


@pytest.mark.parametrize("name", ["horizontal", "horizontal_lift", "horizontal_zoom", "horizontal_zoom_bend"])
def test_noise_is_a_trace_off_the_clean_path_and_the_same_every_time(name: str) -> None:
    noisy = name.replace("_bend", "_noise_bend") if "bend" in name else f"{name}_noise"
    clean, shaken = cameras(name).centres, cameras(noisy).centres
    assert 0 < (clean - shaken).abs().max() < 6 * 1e-4 * 0.5 * 2.5
    assert torch.equal(cameras(noisy).w2c, cameras(noisy).w2c)


@pytest.mark.parametrize("name", ["horizontal_still", "horizontal_zoom_still"])
def test_still_presets_hold_their_second_half(name: str) -> None:
    w2c = cameras(name, frames=81).w2c
    assert torch.equal(w2c[40:], w2c[39:40].expand(41, 4, 4))
    assert not torch.equal(w2c[38], w2c[39])


@pytest.mark.parametrize("name", ["back", "back_simple"])
def test_back_holds_circles_and_arrives_where_it_began(name: str) -> None:
    path = cameras(name, frames=81)
    assert torch.equal(path.w2c[:41], torch.eye(4).expand(41, 4, 4))
    assert path.centres[41:].norm(dim=-1).max() > 0.1
    torch.testing.assert_close(path.w2c[-1], torch.eye(4), atol=1e-6, rtol=0)


def test_spiral_outwards_stays_and_looks_around() -> None:
    path = cameras("spiral_outwards")
    assert path.centres.abs().max() < 1e-6
    assert rotation_angle(path.w2c[0, :3, :3], path.w2c[4, :3, :3]) > 0.05


def test_rotate_zoom_turns_twenty_degrees_and_then_keeps_its_view() -> None:
    path = cameras("rotate_zoom_out", frames=81)
    turned = rotation_angle(path.w2c[:1, :3, :3].expand(41, 3, 3), path.w2c[40:, :3, :3])
    assert torch.allclose(turned.rad2deg(), torch.full((41,), 20.0), atol=1e-2)


def test_unknown_direction_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"sideways.*right, left, up, down"):
        cameras("horizontal", "sideways")
