"""The nerfstudio data set is loaded by its documented rules, without this project's code, and read back."""

import json

import numpy as np
import pytest
import torch
import trimesh
from PIL import Image

from lyra.errors import UserError
from lyra.export.frames import PosedFrames, coloured_points
from lyra.export.nerfstudio import read_nerfstudio, write_nerfstudio
from lyra.geometry.cameras import project
from tests.export.test_frames import HEIGHT, WIDTH, small_walk


def project_by_the_rules(about: dict, frame: dict, point: np.ndarray) -> np.ndarray:
    """Where a point of the file's world is seen, pixel corners at integers.

    docs.nerf.studio, data conventions: transform_matrix is camera-to-world, cameras look along -z with y up, the
    image's origin is its top left corner.
    """
    lens = {key: frame.get(key, about.get(key)) for key in ("fl_x", "fl_y", "cx", "cy")}
    x, y, z = (np.linalg.inv(np.array(frame["transform_matrix"])) @ [*point, 1])[:3]
    return np.array([lens["fl_x"] * x / -z + lens["cx"], lens["fl_y"] * -y / -z + lens["cy"]])


@pytest.mark.parametrize("same_lens", [False, True])
def test_known_points_are_seen_where_our_cameras_see_them(tmp_path, same_lens):
    walk = small_walk(same_lens=same_lens)
    write_nerfstudio(tmp_path / "set", walk, provenance="made in a test")
    about = json.loads((tmp_path / "set" / "transforms.json").read_text())
    assert (about["w"], about["h"], about["camera_model"]) == (WIDTH, HEIGHT, "OPENCV")
    assert ("fl_x" in about) == same_lens
    assert about["provenance"] == "made in a test"
    applied = np.array(about["applied_transform"])
    assert np.allclose(applied @ [0, -1, 0, 1], [0, 0, 1])  # Up becomes z.
    assert np.linalg.det(applied[:, :3]) == pytest.approx(1)
    for index, frame in enumerate(about["frames"]):
        c2w = walk.cameras.c2w[index]
        point = c2w[:3, :3] @ torch.tensor([0.4, -0.3, 2.0]) + c2w[:3, 3]
        theirs = project_by_the_rules(about, frame, applied @ [*point.tolist(), 1])
        ours, _ = project(point, walk.cameras.w2c[index], walk.cameras.intrinsics[index])
        assert np.allclose(theirs - 0.5, ours.numpy(), atol=1e-3)
        picture = np.asarray(Image.open(tmp_path / "set" / frame["file_path"]))
        assert np.array_equal(picture, walk.frames[index].movedim(0, -1).numpy())


def test_point_cloud_is_in_the_world_of_the_poses(tmp_path):
    walk = small_walk()
    write_nerfstudio(tmp_path / "set", walk, max_points=300)
    about = json.loads((tmp_path / "set" / "transforms.json").read_text())
    cloud = trimesh.load(tmp_path / "set" / about["ply_file_path"])
    points = coloured_points(walk, 300)
    assert len(cloud.vertices) == len(points.positions)
    assert np.array_equal(np.asarray(cloud.colors)[:, :3], points.colours.numpy())
    for vertex, frame, pixel in zip(cloud.vertices, points.frames.tolist(), points.pixels, strict=True):
        seen = project_by_the_rules(about, about["frames"][frame], vertex)
        assert np.allclose(seen - 0.5, pixel.numpy(), atol=2e-3)


@pytest.mark.parametrize("same_lens", [False, True])
def test_cameras_round_trip(tmp_path, same_lens):
    walk = small_walk(same_lens=same_lens)
    write_nerfstudio(tmp_path / "set", walk)
    again = read_nerfstudio(tmp_path / "set")
    assert torch.allclose(again.w2c, walk.cameras.w2c, atol=1e-6)
    assert torch.equal(again.intrinsics, walk.cameras.intrinsics)
    assert (again.image_height, again.image_width) == (HEIGHT, WIDTH)


def test_walk_without_depth_has_no_point_cloud(tmp_path):
    walk = small_walk()
    write_nerfstudio(tmp_path / "set", PosedFrames(walk.frames, walk.cameras, {}))
    assert "ply_file_path" not in json.loads((tmp_path / "set" / "transforms.json").read_text())
    assert sorted(path.name for path in (tmp_path / "set").iterdir()) == ["images", "transforms.json"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"k1": 0.1}, "no pinholes"),
        ({"camera_model": "OPENCV_FISHEYE"}, "no pinholes"),
        ({"frames": []}, "0 sizes"),
        ({"frames": [{"transform_matrix": [[1, 2], [3, 4]]}]}, "cannot be read|not a data set that can be read"),
        ({"frames": [{}]}, "not a data set that can be read"),
        ({"frames": 7}, "not a data set that can be read"),
    ],
)
def test_wrong_data_sets_are_refused_in_one_sentence(tmp_path, change, words):
    write_nerfstudio(tmp_path / "set", small_walk())
    path = tmp_path / "set" / "transforms.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=words):
        read_nerfstudio(tmp_path / "set")


def test_missing_data_set_is_refused(tmp_path):
    with pytest.raises(UserError, match="no data set"):
        read_nerfstudio(tmp_path)
