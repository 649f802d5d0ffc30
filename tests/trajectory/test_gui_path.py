"""Paths of the released viewer: its recorded samples are reproduced, and every wrong file gets one clear sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lyra.errors import UserError
from lyra.geometry.rotations import is_rotation, rotation_angle
from lyra.trajectory.files import relative_to_first, write_trajectory
from lyra.trajectory.gui_path import read_gui_path, read_path, write_gui_path
from lyra.trajectory.presets import preset_cameras
from lyra.types import Cameras

KEYFRAMES = [
    {"R": [0.0, 0.0, 0.0, 1.0], "T": [0, 0, 0], "fov": 50.0, "timestamp": 1.0, "up_dir": [0, -1, 0]},
    {"R": [0.0, 0.2588190451, 0.0, 0.9659258263], "T": [1, 0, 1], "fov": 50.0, "timestamp": 2.0},
    {"R": [-0.1, -0.5, 0.2, -0.8], "T": [1, -0.5, 3], "fov": 70.0, "timestamp": 3.0},
    {"R": [0.3, 0.1, -0.2, 0.7], "T": [-1, 0.25, 4], "fov": 40.0, "timestamp": 5.0},
]
CONTENT: dict[str, Any] = {"loop": False, "time": 0.5, "path": KEYFRAMES, "duration_seconds": 5.0, "spline_order": 3}

RECORDED = {  # What the released viewer samples for CONTENT: five camera centres, view directions and fields of view.
    0: [
        ((0.00000, 0.00000, 0.00000), (0.00000, 0.00000, 1.00000), 50.0000),
        ((1.00000, 0.00000, 1.00000), (0.50000, 0.00000, 0.86603), 50.0000),
        ((1.00000, -0.50000, 3.00000), (0.80851, -0.38298, 0.44681), 70.0000),
        ((-1.00000, 0.25000, 4.00000), (0.03175, -0.73016, 0.68254), 40.0000),
        ((-1.00000, 0.25000, 4.00000), (0.03175, -0.73016, 0.68254), 40.0000),
    ],
    1: [
        ((0.00000, 0.00000, 0.00000), (0.00000, 0.00000, 1.00000), 50.0000),
        ((1.00000, -0.00772, 1.03088), (0.50758, -0.00475, 0.86159), 50.3088),
        ((1.00000, -0.36152, 2.44606), (0.76743, -0.26899, 0.58197), 64.4606),
        ((0.22570, -0.20964, 3.38715), (0.55489, -0.54873, 0.62529), 58.3855),
        ((-1.00000, 0.25000, 4.00000), (0.03175, -0.73016, 0.68254), 40.0000),
    ],
    2: [
        ((0.00000, 0.00000, 0.00000), (0.00000, 0.00000, 1.00000), 50.0000),
        ((0.84970, -0.05101, 1.05375), (0.48187, -0.03123, 0.87568), 52.0406),
        ((0.96077, -0.32451, 2.37650), (0.74566, -0.26004, 0.61350), 62.9805),
        ((0.16072, -0.18351, 3.41260), (0.52886, -0.56034, 0.63744), 57.3405),
        ((-1.00000, 0.25000, 4.00000), (0.03175, -0.73016, 0.68254), 40.0000),
    ],
    3: [
        ((0.00000, 0.00000, 0.00000), (0.00000, 0.00000, 1.00000), 50.0000),
        ((0.79234, -0.06565, 1.05492), (0.46968, -0.04003, 0.88193), 52.6258),
        ((0.88116, -0.28080, 2.34737), (0.71305, -0.26542, 0.64893), 61.2318),
        ((0.10958, -0.15040, 3.38242), (0.50349, -0.56060, 0.65744), 56.0159),
        ((-1.00000, 0.25000, 4.00000), (0.03175, -0.73016, 0.68254), 40.0000),
    ],
}


def save(folder: Path, content: Any) -> Path:
    path = folder / "path.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def read(path: Path, frames: int = 5) -> Cameras:
    return read_gui_path(path, frames=frames, image_height=448, image_width=768)


@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_recorded_samples_of_the_released_viewer_are_reproduced(tmp_path: Path, order: int) -> None:
    cameras = read(save(tmp_path, CONTENT | {"spline_order": order}))
    centres, views, fov_deg = (torch.tensor(column) for column in zip(*RECORDED[order], strict=True))
    torch.testing.assert_close(cameras.centres, centres, atol=3e-5, rtol=0)
    torch.testing.assert_close(cameras.c2w[:, :3, 2], views, atol=3e-5, rtol=0)
    focal = 224 / torch.tan(torch.deg2rad(fov_deg) / 2)
    torch.testing.assert_close(cameras.intrinsics[:, 0, 0], focal, atol=0, rtol=1e-5)
    torch.testing.assert_close(cameras.intrinsics[:, 1, 1], focal, atol=0, rtol=1e-5)


def test_a_keyframe_saved_by_the_viewer_is_its_camera_to_world_matrix(tmp_path: Path) -> None:
    quaternion = [0.10314211249351501, -0.5157105326652527, 0.20628422498703003, 0.8251370191574097]
    cameras = read(save(tmp_path, {"path": [{"R": quaternion, "T": [1.0, 2.0, 3.0], "fov": 60.0}]}), frames=2)
    camera_to_world = [[0.382979, -0.446808, -0.808511, 1], [0.234043, 0.893617, -0.382979, 2]]
    camera_to_world += [[0.893617, -0.0425532, 0.446809, 3], [0, 0, 0, 1]]
    for pose in cameras.c2w:
        torch.testing.assert_close(pose, torch.tensor(camera_to_world), atol=1e-5, rtol=0)


def test_the_middle_of_the_image_is_the_principal_point_and_every_pose_is_a_rotation(tmp_path: Path) -> None:
    cameras = read(save(tmp_path, CONTENT), frames=81)
    assert len(cameras) == 81
    assert (cameras.image_height, cameras.image_width) == (448, 768)
    assert torch.equal(cameras.w2c[0], torch.eye(4))
    assert is_rotation(cameras.w2c[:, :3, :3], 1e-5).all()
    rest = cameras.intrinsics.clone()
    rest[:, 0, 0] = rest[:, 1, 1] = 0.0
    assert torch.equal(rest, torch.tensor([[0.0, 0.0, 384.0], [0.0, 0.0, 224.0], [0.0, 0.0, 1.0]]).expand(81, 3, 3))


@pytest.mark.parametrize("order", [1, 2, 3])
def test_the_camera_moves_evenly_between_frames(tmp_path: Path, order: int) -> None:
    steps = read(save(tmp_path, CONTENT | {"spline_order": order}), frames=161).centres.diff(dim=0).norm(dim=-1)
    # A step over a corner of the path is shorter than the way along it; the curves have none.
    assert steps.max() / steps.min() < (1.5 if order == 1 else 1.03)


def test_a_cubic_path_passes_its_inner_keyframes_at_the_spline_value_and_a_straight_one_through_them(
    tmp_path: Path,
) -> None:
    first, corner, last = (torch.tensor(keyframe["T"], dtype=torch.float32) for keyframe in KEYFRAMES[:3])
    expected = {1: corner, 3: (first + 4 * corner + last) / 6}
    for order, point in expected.items():
        cameras = read(save(tmp_path, CONTENT | {"path": KEYFRAMES[:3], "spline_order": order}), frames=2001)
        assert (cameras.centres - point).norm(dim=-1).min() < 2e-3


def test_order_and_loop_have_the_viewers_defaults(tmp_path: Path) -> None:
    short = {"path": [{key: keyframe[key] for key in ("R", "T", "fov")} for keyframe in KEYFRAMES]}
    assert torch.equal(read(save(tmp_path, short)).w2c, read(save(tmp_path, CONTENT)).w2c)


def test_length_and_sign_of_a_quaternion_do_not_matter(tmp_path: Path) -> None:
    other = json.loads(json.dumps(CONTENT))
    for number, keyframe in enumerate(other["path"]):
        keyframe["R"] = [component * (-3.0) ** number for component in keyframe["R"]]
    torch.testing.assert_close(read(save(tmp_path, other)).w2c, read(save(tmp_path, CONTENT)).w2c)


def test_a_loop_begins_and_ends_at_its_first_keyframe(tmp_path: Path) -> None:
    cameras = read(save(tmp_path, CONTENT | {"loop": True}), frames=2001)
    assert torch.equal(cameras.w2c[0], torch.eye(4))
    torch.testing.assert_close(cameras.w2c[-1], torch.eye(4))
    # The last keyframe is an inner one of the loop.
    before, last, first = (torch.tensor(KEYFRAMES[number]["T"]) for number in (2, 3, 0))
    assert (cameras.centres - (before + 4 * last + first) / 6).norm(dim=-1).min() < 5e-3


def test_a_turn_on_the_spot_turns_all_the_way(tmp_path: Path) -> None:
    turn = [dict(KEYFRAMES[0]), dict(KEYFRAMES[1], T=[0, 0, 0])]
    cameras = read(save(tmp_path, {"path": turn}), frames=81)
    angles = rotation_angle(cameras.w2c[:1, :3, :3].expand(81, 3, 3), cameras.w2c[:, :3, :3]).rad2deg()
    assert angles[-1].item() == pytest.approx(30.0, abs=1e-3)
    assert (angles.diff() >= -1e-3).all()
    assert angles[40].item() == pytest.approx(15.0, abs=0.5)


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("frames", [1, 2, 81])
def test_any_number_of_keyframes_gives_the_frames_asked_for(tmp_path: Path, count: int, frames: int) -> None:
    cameras = read(save(tmp_path, CONTENT | {"path": KEYFRAMES[:count]}), frames=frames)
    assert cameras.w2c.shape == (frames, 4, 4)
    assert torch.equal(cameras.w2c[0], torch.eye(4))
    assert cameras.w2c.isfinite().all()


@pytest.mark.parametrize("every", [1, 16])
def test_a_path_of_even_speed_survives_writing_and_reading(tmp_path: Path, every: int) -> None:
    k = torch.tensor([[500.0, 0.0, 384.0], [0.0, 500.0, 224.0], [0.0, 0.0, 1.0]])
    inputs = {"depth": 3.0, "intrinsics": k, "image_height": 448, "image_width": 768}
    cameras = preset_cameras("orbit_horizontal", frames=81, **inputs)
    write_gui_path(tmp_path / "path.json", cameras, every=every)
    content = json.loads((tmp_path / "path.json").read_text())
    assert len(content["path"]) == (81 if every == 1 else 6)
    assert content["duration_seconds"] == pytest.approx(81 / 16)
    times = [keyframe["timestamp"] for keyframe in content["path"]]
    assert times[0] > 0
    assert times == sorted(set(times))
    again = read(tmp_path / "path.json", frames=81)
    # Straight pieces between every 16th camera cut the corners of the arc.
    torch.testing.assert_close(again.w2c, cameras.w2c, atol=1e-4 if every == 1 else 5e-3, rtol=0)
    torch.testing.assert_close(again.intrinsics, cameras.intrinsics, atol=1e-3, rtol=0)


def test_a_first_pose_elsewhere_becomes_the_photos(tmp_path: Path) -> None:
    cameras = relative_to_first(read(save(tmp_path, CONTENT | {"path": KEYFRAMES[1:]})))
    assert torch.equal(cameras.w2c[0], torch.eye(4))
    assert cameras.centres[-1].norm().item() == pytest.approx((2**2 + 0.25**2 + 3**2) ** 0.5, abs=1e-4)


def test_content_and_not_the_name_says_which_format_a_file_has(tmp_path: Path) -> None:
    k = torch.tensor([[500.0, 0.0, 192.0], [0.0, 500.0, 112.0], [0.0, 0.0, 1.0]])
    inputs = {"depth": 3.0, "intrinsics": k, "image_height": 224, "image_width": 384}
    written = preset_cameras("push-in", frames=9, **inputs)
    write_trajectory(tmp_path / "a.json", written)
    (tmp_path / "b.npz").write_text(json.dumps(CONTENT))
    asked = {"frames": 5, "image_height": 448, "image_width": 768}
    arrays, viewer = read_path(tmp_path / "a.json", **asked), read_path(str(tmp_path / "b.npz"), **asked)
    assert torch.equal(arrays.w2c, written.w2c[:5])
    assert torch.equal(arrays.intrinsics, written.resized(448, 768).intrinsics[:5])
    assert torch.equal(viewer.w2c, read(tmp_path / "b.npz").w2c)
    assert {(arrays.image_height, arrays.image_width), (viewer.image_height, viewer.image_width)} == {(448, 768)}


def with_keyframe(**changes: Any) -> dict[str, Any]:
    return CONTENT | {"path": [KEYFRAMES[0], KEYFRAMES[1] | changes]}


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ([], 'without a list "path"'),
        ({"loop": False}, 'without a list "path"'),
        (CONTENT | {"path": {}}, 'without a list "path"'),
        (CONTENT | {"path": []}, "no keyframes"),
        (CONTENT | {"path": [1]}, "keyframe 0.*no object"),
        (with_keyframe(R=None), 'keyframe 1.*"R" is missing'),
        (with_keyframe(R=[0, 0, 1]), '"R" is missing or wrong; save it as a list of 4 numbers'),
        (with_keyframe(R=[0, 0, 0, 0]), "keyframe 1.*length zero"),
        (with_keyframe(R=[0, 0, 0, float("nan")]), "not finite"),
        (with_keyframe(R=[0, 0, 0, "1"]), '"R" is missing or wrong'),
        (with_keyframe(R=[0, 0, 0, True]), '"R" is missing or wrong'),
        (with_keyframe(T=[0, 0]), '"T" is missing or wrong; save it as a list of 3 numbers'),
        (with_keyframe(T=[0, 0, float("inf")]), "not finite"),
        (with_keyframe(T=[0, 0, 10**400]), "not finite or over 1e9"),
        (with_keyframe(fov=None), '"fov" is missing or wrong; save it as one number'),
        (with_keyframe(fov=0), "field of view is 0 degrees"),
        (with_keyframe(fov=180.0), "field of view is 180 degrees"),
        (with_keyframe(fov=float("nan")), "not finite"),
        (CONTENT | {"spline_order": 4}, "not 0, 1, 2 or 3"),
        (CONTENT | {"spline_order": None}, "not 0, 1, 2 or 3"),
        (CONTENT | {"spline_order": [3]}, "not 0, 1, 2 or 3"),
        (CONTENT | {"loop": "no"}, "neither true nor false"),
    ],
)
def test_every_malformed_path_is_one_sentence_with_a_way_out(tmp_path: Path, content: Any, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence) as caught:
        read(save(tmp_path, content))
    text = str(caught.value)
    assert text.endswith(".")
    assert "\n" not in text
    assert ";" in text


@pytest.mark.parametrize("data", [b"", b"not json", b'{"path": [', b"\xff\xfe\x00", b"\x89PNG", b"[" * 100_000])
def test_a_file_that_is_not_json_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "path.json").write_bytes(data)
    with pytest.raises(UserError, match="neither JSON nor an npz file"):
        read_path(tmp_path / "path.json", frames=5, image_height=448, image_width=768)


def test_a_damaged_npz_a_missing_file_a_folder_and_a_huge_file_are_refused(tmp_path: Path) -> None:
    asked = {"frames": 5, "image_height": 448, "image_width": 768}
    (tmp_path / "damaged.npz").write_bytes(b"PK\x03\x04 and nothing more")
    with pytest.raises(UserError, match="not a readable npz file"):
        read_path(tmp_path / "damaged.npz", **asked)
    with pytest.raises(UserError, match="no camera path at"):
        read_path(tmp_path / "missing.json", **asked)
    with pytest.raises(UserError, match="neither JSON nor"):
        read_path(tmp_path, **asked)
    with (tmp_path / "huge.json").open("wb") as file:
        file.truncate(17 * 2**20)
    with pytest.raises(UserError, match="at most 16 MB"):
        read_path(tmp_path / "huge.json", **asked)
    np.savez(tmp_path / "few.npz", w2c=np.eye(4)[None])
    with pytest.raises(UserError, match="lacks intrinsics"):
        read_path(tmp_path / "few.npz", **asked)


def test_impossible_requests_of_the_program_are_bugs(tmp_path: Path) -> None:
    cameras = read(save(tmp_path, CONTENT))
    with pytest.raises(ValueError, match="at least one frame"):
        read(tmp_path / "path.json", frames=0)
    with pytest.raises(ValueError, match="positive distance"):
        write_gui_path(tmp_path / "other.json", cameras, every=0)
