"""The data set is read with nothing but PIL, numpy and json, and read back."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from lyra.errors import UserError
from lyra.export.files import replacing_folder
from lyra.export.frames import PosedFrames, coloured_points, read_frames, write_frames
from lyra.geometry.rotations import axis_angle_to_matrix, world_to_camera
from lyra.types import Cameras

HEIGHT, WIDTH = 24, 32


def small_walk(count: int = 5, *, same_lens: bool = True) -> PosedFrames:
    """Random pictures from random cameras; depth of the first frame at full size and of the last at half size."""
    generator = torch.Generator().manual_seed(0)
    rotations = axis_angle_to_matrix(0.5 * torch.randn(count, 3, generator=generator))
    w2c = world_to_camera(rotations, torch.randn(count, 3, generator=generator))
    intrinsics = torch.tensor([[30.0, 0.0, 15.25], [0.0, 31.0, 12.0], [0.0, 0.0, 1.0]]).repeat(count, 1, 1)
    if not same_lens:
        intrinsics[:, 0, 0] += torch.arange(count)
    frames = torch.randint(0, 256, (count, 3, HEIGHT, WIDTH), generator=generator, dtype=torch.uint8)
    depths = {
        0: 1 + 4 * torch.rand(HEIGHT, WIDTH, generator=generator),
        count - 1: 1 + 4 * torch.rand(HEIGHT // 2, WIDTH // 2, generator=generator),
    }
    return PosedFrames(frames, Cameras(w2c, intrinsics, HEIGHT, WIDTH), depths)


def test_pictures_cameras_and_depth_mean_what_the_json_says(tmp_path):
    walk = small_walk()
    walk.depths[0][0], walk.depths[0][1] = 1000.0, float("inf")
    walk.depths[0][2:4] = float("nan")
    folder = tmp_path / "set"
    write_frames(folder, walk, "made in a test")
    about = json.loads((folder / "dataset.json").read_text())
    assert (about["provenance"], about["frames"]) == ("made in a test", 5)
    assert (about["image_height"], about["image_width"]) == (HEIGHT, WIDTH)
    picture = np.asarray(Image.open(folder / "images" / "frame_000003.png"))
    assert np.array_equal(picture, walk.frames[3].movedim(0, -1).numpy())
    with np.load(folder / "cameras.npz") as cameras:
        assert np.array_equal(cameras["w2c"], walk.cameras.w2c.numpy())
        assert np.array_equal(cameras["intrinsics"], walk.cameras.intrinsics.numpy())
    assert about["depth"]["frames"] == [0, 4]
    depth = Image.open(folder / "depth" / "frame_000000.png")
    assert depth.mode in ("I;16", "I")
    counts = np.asarray(depth).astype(np.int64)
    assert (counts[:2] == 65535).all()
    assert (counts[2:4] == 0).all()
    assert about["depth"]["picture_step"] == 0.001
    assert np.abs(counts[4:] * about["depth"]["picture_step"] - walk.depths[0][4:].numpy()).max() <= 0.00051
    with np.load(folder / "depth.npz") as exact:
        assert np.array_equal(exact["frame_000000"], walk.depths[0].numpy(), equal_nan=True)
        assert np.array_equal(exact["frame_000004"], walk.depths[4].numpy())


def test_depth_of_a_landscape_still_fits_in_16_bits(tmp_path):
    walk = small_walk()
    walk.depths[0][5, 5] = 180.0
    write_frames(tmp_path / "set", walk)
    step = json.loads((tmp_path / "set" / "dataset.json").read_text())["depth"]["picture_step"]
    counts = np.asarray(Image.open(tmp_path / "set" / "depth" / "frame_000000.png")).astype(np.int64)
    assert step == pytest.approx(0.003)
    assert np.abs(counts * step - walk.depths[0].numpy()).max() <= step / 2 + 1e-5


def test_data_set_round_trips(tmp_path):
    walk = small_walk()
    write_frames(tmp_path / "set", walk)
    again = read_frames(tmp_path / "set")
    assert torch.equal(again.frames, walk.frames)
    assert torch.equal(again.cameras.w2c, walk.cameras.w2c)
    assert torch.equal(again.cameras.intrinsics, walk.cameras.intrinsics)
    assert sorted(again.depths) == [0, 4]
    assert all(torch.equal(again.depths[i], walk.depths[i]) for i in (0, 4))


def test_every_second_frame_keeps_its_camera_and_depth():
    walk = small_walk()
    some = walk.every(2)
    assert torch.equal(some.frames, walk.frames[[0, 2, 4]])
    assert torch.equal(some.cameras.w2c, walk.cameras.w2c[[0, 2, 4]])
    assert sorted(some.depths) == [0, 2]
    assert torch.equal(some.depths[2], walk.depths[4])


def test_points_lie_on_the_depth_and_have_the_colour_of_their_pixel():
    walk = small_walk()
    walk.depths[0][:, 20:] = 1000.0
    points = coloured_points(walk, max_points=300)
    assert 100 < len(points.positions) <= 300
    for position, colour, frame, pixel in zip(
        points.positions, points.colours, points.frames.tolist(), points.pixels, strict=True
    ):
        w2c, intrinsics = walk.cameras.w2c[frame], walk.cameras.intrinsics[frame]
        camera = w2c[:3, :3] @ position + w2c[:3, 3]
        seen = intrinsics @ camera
        assert torch.allclose(seen[:2] / seen[2], pixel, atol=1e-3)
        x, y = pixel.round().long().tolist()
        assert torch.equal(colour, walk.frames[frame, :, y, x])
        assert float(camera[2]) < 5.1
        assert not (frame == 0 and x >= 20)


def test_points_without_depth_are_none():
    walk = small_walk()
    assert len(coloured_points(PosedFrames(walk.frames, walk.cameras, {})).positions) == 0


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    folder = tmp_path / "set"
    write_frames(folder, small_walk())
    write_frames(folder, small_walk(3))
    assert len(list((folder / "images").iterdir())) == 3
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds notes\.txt"):
        write_frames(folder, small_walk())
    assert (folder / "notes.txt").exists()
    with pytest.raises(UserError, match="is a file"):
        write_frames(folder / "notes.txt", small_walk())


def test_a_failed_export_leaves_what_was_there(tmp_path):
    folder = tmp_path / "set"
    write_frames(folder, small_walk(3))
    before = sorted(path.name for path in tmp_path.rglob("*"))
    with pytest.raises(OSError, match="full"), replacing_folder(folder, {"images"} | set(before)) as temporary:
        (temporary / "half").write_text("x")
        raise OSError("the disk is full")
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


def test_frames_that_do_not_match_their_cameras_are_refused(tmp_path):
    walk = small_walk()
    with pytest.raises(UserError, match="no frames"):
        write_frames(tmp_path / "set", PosedFrames(walk.frames[:0], walk.cameras[:0], {}))
    with pytest.raises(UserError, match="5 frames of 24x32 but 4 cameras"):
        write_frames(tmp_path / "set", PosedFrames(walk.frames, walk.cameras[:4], {}))
    with pytest.raises(UserError, match="cameras for 12x16"):
        write_frames(tmp_path / "set", PosedFrames(walk.frames, walk.cameras.resized(12, 16), {}))
    assert list(tmp_path.iterdir()) == []


def test_incomplete_data_sets_are_refused_in_one_sentence(tmp_path):
    folder = tmp_path / "set"
    with pytest.raises(UserError, match="not a whole data set"):
        read_frames(folder)
    write_frames(folder, small_walk())
    (folder / "images" / "frame_000001.png").unlink()
    with pytest.raises(UserError, match="not a whole data set"):
        read_frames(folder)
    write_frames(folder, small_walk())
    (folder / "depth.npz").write_bytes(b"not an archive")
    with pytest.raises(UserError, match="cannot be read"):
        read_frames(folder)
    (folder / "dataset.json").write_text("{}")
    with pytest.raises(UserError, match="cannot be read"):
        read_frames(folder)
