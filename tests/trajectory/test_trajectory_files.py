"""trajectory.npz: what is written is read back, and every way a file can be wrong gets one clear sentence."""

from __future__ import annotations

import contextlib
import io
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lyra.errors import UserError
from lyra.geometry.rotations import axis_angle_to_matrix, world_to_camera
from lyra.trajectory.files import read_trajectory, relative_to_first, write_trajectory
from lyra.types import Cameras

Arrays = dict[str, Any]


def some_cameras(count: int = 5, seed: int = 0) -> Cameras:
    generator = torch.Generator().manual_seed(seed)
    rotation = axis_angle_to_matrix(torch.randn(count, 3, generator=generator))
    k = torch.tensor([[500.0, 0.0, 640.0], [0.0, 510.0, 360.0], [0.0, 0.0, 1.0]]).repeat(count, 1, 1)
    return Cameras(world_to_camera(rotation, torch.randn(count, 3, generator=generator)), k, 720, 1280)


def arrays() -> Arrays:
    cameras = some_cameras()
    return {
        "w2c": cameras.w2c.numpy(),
        "intrinsics": cameras.intrinsics.numpy(),
        "image_height": np.int64(720),
        "image_width": np.int64(1280),
    }


def test_cameras_survive_writing_and_reading(tmp_path: Path) -> None:
    cameras = some_cameras()
    write_trajectory(tmp_path / "path.npz", cameras)
    again = read_trajectory(tmp_path / "path.npz")
    assert torch.equal(again.w2c, cameras.w2c)
    assert torch.equal(again.intrinsics, cameras.intrinsics)
    assert (again.image_height, again.image_width) == (720, 1280)


def test_same_cameras_give_the_same_bytes_under_any_name(tmp_path: Path) -> None:
    write_trajectory(tmp_path / "a.npz", some_cameras())
    write_trajectory(tmp_path / "b.cameras", some_cameras())
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.cameras").read_bytes()
    with np.load(tmp_path / "a.npz", allow_pickle=False) as archive:
        assert sorted(archive) == ["image_height", "image_width", "intrinsics", "w2c"]
        assert archive["w2c"].dtype == np.float32
        assert archive["image_height"].shape == ()


def test_only_the_frames_asked_for_are_returned(tmp_path: Path) -> None:
    write_trajectory(tmp_path / "path.npz", some_cameras(5))
    assert len(read_trajectory(tmp_path / "path.npz", frames=3)) == 3


def test_sizes_as_floats_or_arrays_of_one_and_float64_poses_are_accepted(tmp_path: Path) -> None:
    content = arrays() | {"image_height": np.float32(720), "image_width": np.array([1280])}
    np.savez(tmp_path / "path.npz", **(content | {"w2c": content["w2c"].astype(np.float64)}))
    cameras = read_trajectory(tmp_path / "path.npz")
    assert cameras.w2c.dtype == torch.float32
    assert (cameras.image_height, cameras.image_width) == (720, 1280)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000))
def test_relative_to_first_keeps_the_motion_and_starts_at_the_photo(seed: int) -> None:
    cameras = some_cameras(seed=seed)
    relative = relative_to_first(cameras)
    assert torch.equal(relative.w2c[0], torch.eye(4))
    between = cameras.w2c[1:] @ torch.linalg.inv(cameras.w2c[:-1])
    torch.testing.assert_close(relative.w2c[1:] @ torch.linalg.inv(relative.w2c[:-1]), between, atol=1e-4, rtol=1e-4)


def changed(key: str, change: Callable[[np.ndarray], Any]) -> Callable[[], Arrays]:
    return lambda: arrays() | {key: change(np.array(arrays()[key]))}


def put(value: float, *index: int) -> Callable[[np.ndarray], np.ndarray]:
    def change(array: np.ndarray) -> np.ndarray:
        array[index] = value
        return array

    return change


WRONG: dict[str, tuple[Callable[[], Arrays], str]] = {
    "no w2c": (lambda: {k: v for k, v in arrays().items() if k != "w2c"}, "lacks w2c; save"),
    "no sizes": (lambda: {k: v for k, v in arrays().items() if "image" not in k}, "lacks image_height, image_width"),
    "w2c 3x4": (changed("w2c", lambda a: a[:, :3]), r"\(5, 3, 4\).*\(N, 4, 4\)"),
    "w2c of nothing": (changed("w2c", lambda a: a[:0]), r"\(0, 4, 4\)"),
    "w2c single": (changed("w2c", lambda a: a[0]), r"\(4, 4\)"),
    "K single": (changed("intrinsics", lambda a: a[0]), r"\(3, 3\).*\(5, 3, 3\)"),
    "K too few": (changed("intrinsics", lambda a: a[:4]), r"\(4, 3, 3\).*\(5, 3, 3\)"),
    "w2c NaN": (changed("w2c", put(np.nan, 2, 0, 3)), "pose 2 of path.npz .*not finite"),
    "w2c infinite": (changed("w2c", put(np.inf, 4, 1, 3)), "pose 4 of path.npz .*not finite"),
    "w2c beyond float32": (changed("w2c", lambda a: put(1e300, 1, 0, 3)(a.astype(np.float64))), "pose 1 .*not finite"),
    "K NaN": (changed("intrinsics", put(np.nan, 3, 0, 0)), "pose 3 .*not finite"),
    "scaled": (changed("w2c", lambda a: a * np.array([1.1, 1.1, 1.1, 1])[:, None]), "pose 0 .*not a rotation"),
    "mirrored": (changed("w2c", lambda a: a * np.array([-1, 1, 1, 1])[:, None]), "not a rotation; save unscaled right"),
    "slightly sheared": (changed("w2c", lambda a: a + put(0.01, 1, 0, 1)(a * 0)), "pose 1 .*not a rotation"),
    "transposed": (changed("w2c", lambda a: a.transpose(0, 2, 1)), "bottom row .*0 0 0 1"),
    "focal zero": (changed("intrinsics", put(0.0, 1, 1, 1)), "pose 1 .*focal length"),
    "focal negative": (changed("intrinsics", put(-5.0, 0, 0, 0)), "pose 0 .*focal length"),
    "K transposed": (changed("intrinsics", lambda a: a.transpose(0, 2, 1)), "bottom row .*0 0 1"),
    "height zero": (changed("image_height", lambda a: a * 0), '"image_height" in path.npz is 0; save'),
    "width negative": (changed("image_width", lambda a: -a), "is -1280"),
    "height fractional": (changed("image_height", lambda a: a + 0.5), "is 720.5"),
    "height NaN": (changed("image_height", lambda a: a * np.nan), "is nan"),
    "width per pose": (changed("image_width", lambda a: np.full(5, 1280)), r"array of shape \(5,\)"),
    "words": (changed("w2c", lambda a: a.astype(str)), "not numbers"),
    "complex": (changed("w2c", lambda a: a.astype(np.complex64)), "not numbers"),
    "pickled": (changed("w2c", lambda a: np.array([{"a": 1}], dtype=object)), "not a readable npz file"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_array_is_refused_with_what_is_wrong_and_what_to_do(tmp_path: Path, case: str) -> None:
    content, sentence = WRONG[case]
    np.savez(tmp_path / "path.npz", **content())
    with pytest.raises(UserError, match=sentence) as caught:
        read_trajectory(tmp_path / "path.npz")
    text = str(caught.value)
    assert text.endswith(".") and "; " in text and "\n" not in text


def test_too_few_poses_are_refused_with_both_numbers(tmp_path: Path) -> None:
    write_trajectory(tmp_path / "path.npz", some_cameras(5))
    with pytest.raises(UserError, match=r"has 5 poses but 81 are needed; .*fewer chunks"):
        read_trajectory(tmp_path / "path.npz", frames=81)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no camera path at .*nothing\.npz"):
        read_trajectory(tmp_path / "nothing.npz")


def _npy() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.eye(4))
    return buffer.getvalue()


def _zip(name: str, content: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for key in ("w2c", "intrinsics", "image_height", "image_width"):
            archive.writestr(key + name, content)
    return buffer.getvalue()


def _absurd_header() -> bytes:
    # Written over padding, so that the header keeps its length and only the shape is wrong.
    return _npy().replace(b"(4, 4), }" + b" " * 20, b"(" + b"9" * 22 + b",), }  ")


@pytest.mark.parametrize(
    "content",
    [b"", b"hello", _npy(), _zip(".npy", b""), _zip(".npy", b"\x93NUMPY"), _zip(".npy", _absurd_header())],
    ids=["empty", "text", "npy", "empty member", "cut header", "absurd shape"],
)
def test_a_file_that_is_no_npz_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "path.npz").write_bytes(content)
    with pytest.raises(UserError, match=r"path\.npz .*; save"):
        read_trajectory(tmp_path / "path.npz")


def test_a_folder_and_a_cut_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a readable npz"):
        read_trajectory(tmp_path)
    write_trajectory(tmp_path / "path.npz", some_cameras())
    content = (tmp_path / "path.npz").read_bytes()
    (tmp_path / "path.npz").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="not a readable npz"):
        read_trajectory(tmp_path / "path.npz")


def test_a_small_file_that_unpacks_to_gigabytes_is_refused_unread(tmp_path: Path) -> None:
    packed = zipfile.ZipFile(tmp_path / "path.npz", "w", zipfile.ZIP_DEFLATED)
    with packed as archive, archive.open("w2c.npy", "w", force_zip64=True) as member:
        for _ in range(260):
            member.write(bytes(2**20))
    with pytest.raises(UserError, match="unpacks to 260 MB"):
        read_trajectory(tmp_path / "path.npz")


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2500), st.integers(0, 255))
def test_any_flipped_byte_is_read_or_refused_but_never_crashes(
    tmp_path_factory: pytest.TempPathFactory, place: int, value: int
) -> None:
    path = tmp_path_factory.mktemp("flip") / "path.npz"
    write_trajectory(path, some_cameras())
    content = bytearray(path.read_bytes())
    content[place % len(content)] = value
    path.write_bytes(bytes(content))
    with contextlib.suppress(UserError):
        assert len(read_trajectory(path)) == 5
