"""Files are written and read back, by this project and by somebody else's reader."""

import numpy as np
import pytest
import torch
import trimesh
from plyfile import PlyData

from lyra.export.ply import read_splat_ply, write_point_ply, write_splat_ply
from lyra.export.video import join_videos, read_video, write_video
from lyra.metrics.image import psnr_db
from lyra.types import GaussianScene


def random_scene(count: int, coefficients: int = 1) -> GaussianScene:
    g = torch.Generator().manual_seed(0)
    quats = torch.nn.functional.normalize(torch.randn(count, 4, generator=g), dim=-1)
    return GaussianScene(
        means=torch.randn(count, 3, generator=g),
        quats=quats,
        scales=torch.rand(count, 3, generator=g) + 0.01,
        opacities=torch.rand(count, generator=g) * 0.9 + 0.05,
        sh=torch.randn(count, coefficients, 3, generator=g),
    )


@pytest.mark.parametrize("coefficients", [1, 9])
def test_splat_ply_round_trips(tmp_path, coefficients):
    scene = random_scene(50, coefficients)
    write_splat_ply(tmp_path / "scene.ply", scene, "two\nlines")
    again = read_splat_ply(tmp_path / "scene.ply")
    for name in ("means", "quats", "scales", "opacities", "sh"):
        assert torch.allclose(getattr(scene, name), getattr(again, name), atol=1e-5), name


def test_splat_ply_has_the_inria_layout_for_plyfile(tmp_path):
    scene = random_scene(7)
    write_splat_ply(tmp_path / "scene.ply", scene, "made in a test")
    ply = PlyData.read(str(tmp_path / "scene.ply"))
    names = [item.name for item in ply["vertex"].properties]
    assert names[:6] == ["x", "y", "z", "nx", "ny", "nz"]
    assert names[6:] == [
        "f_dc_0", "f_dc_1", "f_dc_2", "opacity", "scale_0", "scale_1", "scale_2", "rot_0", "rot_1", "rot_2", "rot_3",
    ]  # fmt: skip
    assert ply.comments == ["made in a test"]
    assert np.allclose(1 / (1 + np.exp(-ply["vertex"]["opacity"])), scene.opacities.numpy(), atol=1e-5)
    assert np.allclose(np.exp(ply["vertex"]["scale_1"]), scene.scales[:, 1].numpy(), atol=1e-5)


def test_another_ply_is_refused_with_what_it_lacks(tmp_path):
    write_point_ply(tmp_path / "points.ply", torch.zeros(3, 3), torch.zeros(3, 3, dtype=torch.uint8))
    with pytest.raises(ValueError, match="not a splat PLY: it lacks f_dc_0"):
        read_splat_ply(tmp_path / "points.ply")


def test_point_cloud_is_read_by_trimesh(tmp_path):
    points = torch.rand(20, 3)
    colours = torch.randint(0, 256, (20, 3), dtype=torch.uint8)
    write_point_ply(tmp_path / "points.ply", points, colours)
    cloud = trimesh.load(tmp_path / "points.ply")
    assert np.allclose(cloud.vertices, points.numpy(), atol=1e-6)
    assert np.array_equal(np.asarray(cloud.colors)[:, :3], colours.numpy())


def moving_picture(frames: int, height: int = 96, width: int = 160) -> torch.Tensor:
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    pictures = [torch.stack([(x + 2 * t) % 256, (y * 2 + t) % 256, (x + y) % 256]) for t in range(frames)]
    return torch.stack(pictures).to(torch.uint8)


def test_video_keeps_frames_above_38_db(tmp_path):
    frames = moving_picture(20)
    write_video(tmp_path / "a.mp4", frames, "a comment")
    again = read_video(tmp_path / "a.mp4")
    assert again.shape == frames.shape
    assert psnr_db(frames[0].float(), again[0].float(), 255) > 38


def test_joined_videos_have_all_frames_in_order_and_bytes_do_not_change(tmp_path):
    frames = moving_picture(30)
    write_video(tmp_path / "a.mp4", frames[:17])
    write_video(tmp_path / "b.mp4", frames[17:])
    for name in ("one.mp4", "two.mp4"):
        join_videos(tmp_path / name, [tmp_path / "a.mp4", tmp_path / "b.mp4"], "joined")
    joined = read_video(tmp_path / "one.mp4")
    parts = torch.cat([read_video(tmp_path / "a.mp4"), read_video(tmp_path / "b.mp4")])
    assert torch.equal(joined, parts)
    assert (tmp_path / "one.mp4").read_bytes() == (tmp_path / "two.mp4").read_bytes()


def test_odd_sizes_are_refused(tmp_path):
    with pytest.raises(ValueError, match="must be even"):
        write_video(tmp_path / "a.mp4", torch.zeros(1, 3, 95, 160, dtype=torch.uint8))
