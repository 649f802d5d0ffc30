"""COLMAP models are read by pycolmap, pycolmap's are read here."""

import numpy as np
import pycolmap
import pytest
import torch
from PIL import Image

from lyra.errors import UserError
from lyra.export.colmap import read_colmap, write_colmap
from lyra.export.frames import PosedFrames, coloured_points
from lyra.geometry.cameras import project
from tests.export.test_frames import HEIGHT, WIDTH, small_walk


@pytest.mark.parametrize("text", [False, True])
def test_pycolmap_reads_cameras_points_and_images(tmp_path, text):
    walk = small_walk()
    write_colmap(tmp_path / "colmap", walk, text=text, max_points=400, provenance="made in\na test")
    model = pycolmap.Reconstruction(str(tmp_path / "colmap" / "sparse" / "0"))
    assert len(model.cameras) == 1
    camera = model.cameras[1]
    assert (camera.model, camera.width, camera.height) == (pycolmap.CameraModelId.PINHOLE, WIDTH, HEIGHT)
    assert camera.params.tolist() == [30, 31, 15.75, 12.5]
    assert len(model.images) == 5
    for number, image in model.images.items():
        assert np.allclose(image.cam_from_world().matrix(), walk.cameras.w2c[number - 1, :3].numpy(), atol=1e-6)
        picture = np.asarray(Image.open(tmp_path / "colmap" / "images" / image.name))
        assert np.array_equal(picture, walk.frames[number - 1].movedim(0, -1).numpy())
    points = coloured_points(walk, 400)
    assert len(model.points3D) == len(points.positions)
    for number, point in model.points3D.items():
        assert np.allclose(point.xyz, points.positions[number - 1].numpy(), atol=1e-5)
        assert np.array_equal(point.color, points.colours[number - 1].numpy())


@pytest.mark.parametrize("text", [False, True])
def test_pycolmap_projects_points_half_a_pixel_from_where_we_do(tmp_path, text):
    walk = small_walk(same_lens=False)
    write_colmap(tmp_path / "colmap", walk, text=text, max_points=400)
    model = pycolmap.Reconstruction(str(tmp_path / "colmap" / "sparse" / "0"))
    assert len(model.cameras) == 5
    seen = set()
    for point in model.points3D.values():
        (element,) = point.track.elements
        image = model.images[element.image_id]
        theirs = image.project_point(point.xyz)
        assert np.allclose(theirs, image.points2D[element.point2D_idx].xy, atol=1e-3)
        frame = element.image_id - 1
        xyz = torch.from_numpy(point.xyz).float()
        ours, _ = project(xyz, walk.cameras.w2c[frame], walk.cameras.intrinsics[frame])
        assert np.allclose(theirs - 0.5, ours.numpy(), atol=1e-3)
        seen.add(frame)
    assert seen == {0, 4}


@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize("same_lens", [False, True])
def test_model_round_trips(tmp_path, text, same_lens):
    walk = small_walk(same_lens=same_lens)
    write_colmap(tmp_path / "colmap", walk, text=text, max_points=400)
    again = read_colmap(tmp_path / "colmap")
    assert again.names == [f"frame_{i:06d}.png" for i in range(5)]
    assert torch.allclose(again.cameras.w2c, walk.cameras.w2c, atol=1e-6)
    assert torch.equal(again.cameras.intrinsics, walk.cameras.intrinsics)
    assert (again.cameras.image_height, again.cameras.image_width) == (HEIGHT, WIDTH)
    points = coloured_points(walk, 400)
    assert torch.allclose(again.points, points.positions, atol=1e-5)
    assert torch.equal(again.colours, points.colours)


def test_models_of_pycolmap_with_long_tracks_and_one_focal_length_are_read(tmp_path):
    scene = pycolmap.synthesize_dataset(
        pycolmap.SyntheticDatasetOptions(
            num_rigs=1,
            num_cameras_per_rig=1,
            num_frames_per_rig=4,
            num_points3D=30,
            camera_width=200,
            camera_height=100,
            camera_model_id=pycolmap.CameraModelId.SIMPLE_PINHOLE,
            camera_params=[150.0, 101.0, 49.0],
        )
    )
    for write, name in ((scene.write_binary, "bin"), (scene.write_text, "txt")):
        folder = tmp_path / name / "sparse" / "0"
        folder.mkdir(parents=True)
        write(str(folder))
        model = read_colmap(tmp_path / name)
        images = sorted(scene.images.values(), key=lambda image: image.name)
        assert model.names == [image.name for image in images]
        for w2c, k, image in zip(model.cameras.w2c, model.cameras.intrinsics, images, strict=True):
            assert np.allclose(w2c[:3].numpy(), image.cam_from_world().matrix(), atol=1e-5)
            focal, cx, cy = image.camera.params
            expected = [[focal, 0, cx - 0.5], [0, focal, cy - 0.5], [0, 0, 1]]
            assert np.allclose(k.numpy(), expected, atol=1e-3)
        theirs = np.array(sorted(point.xyz.tolist() for point in scene.points3D.values()))
        assert np.allclose(sorted(model.points.tolist()), theirs, atol=1e-4)


def test_walk_without_depth_has_cameras_and_no_points(tmp_path):
    walk = small_walk()
    for text in (False, True):
        write_colmap(tmp_path / "colmap", PosedFrames(walk.frames, walk.cameras, {}), text=text)
        model = pycolmap.Reconstruction(str(tmp_path / "colmap" / "sparse" / "0"))
        assert (len(model.images), len(model.points3D)) == (5, 0)
        assert len(read_colmap(tmp_path / "colmap").points) == 0


def test_text_files_say_where_they_come_from(tmp_path):
    write_colmap(tmp_path / "colmap", small_walk(), text=True, provenance="made in\na test")
    for name in ("cameras", "images", "points3D"):
        text = (tmp_path / "colmap" / "sparse" / "0" / f"{name}.txt").read_text()
        assert text.startswith("# made in a test\n"), name


def test_wrong_models_are_refused_in_one_sentence(tmp_path):
    with pytest.raises(UserError, match="no COLMAP model"):
        read_colmap(tmp_path)
    write_colmap(tmp_path / "colmap", small_walk(), max_points=50)
    model = tmp_path / "colmap" / "sparse" / "0"
    images = (model / "images.bin").read_bytes()
    (model / "images.bin").write_bytes(images[:300])
    with pytest.raises(UserError, match="cannot be read"):
        read_colmap(tmp_path / "colmap")
    write_colmap(tmp_path / "colmap", small_walk(), text=True, max_points=50)
    (model / "cameras.txt").write_text("1 OPENCV_FISHEYE 32 24 30 31 15.75 12.5 0 0 0 0\n")
    with pytest.raises(UserError, match="not a pinhole"):
        read_colmap(tmp_path / "colmap")
    (model / "cameras.txt").write_text("")
    with pytest.raises(UserError, match="cannot be read"):
        read_colmap(tmp_path / "colmap")
