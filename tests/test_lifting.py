"""Stage two on a real world: splats, surface, collider and every format, from the command line and in Python."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import trimesh
from plyfile import PlyData
from pxr import Usd, UsdGeom, UsdPhysics
from torch.nn import functional as F

from lyra import lifting
from lyra.cli import main
from lyra.config import MeshJob, ReconstructJob
from lyra.errors import UserError
from lyra.export.video import VideoFrames, read_video, write_video
from lyra.exporting import FORMATS, export
from lyra.generation.walkthrough import from_uint8
from lyra.lifting import fused_frames, mesh, read_scene, read_surface, read_walkthrough, reconstruct
from lyra.metrics.image import psnr_db
from lyra.progress import Cancelled, Progress
from lyra.reconstruction.gaussians import GeometricLift
from lyra.reconstruction.rasterizer import choose_renderer
from lyra.trajectory.files import write_trajectory
from lyra.world import World
from tests.small_world import copied, small_world


@pytest.fixture(scope="module")
def lifted(world, tmp_path_factory) -> World:
    """A copy of the default job's world, lifted and meshed by the command line."""
    folder = tmp_path_factory.mktemp("lifted") / "temple"
    shutil.copytree(world.folder, folder)
    assert main(["reconstruct", str(folder)]) == 0
    assert main(["mesh", str(folder)]) == 0
    return World.open(folder)


@pytest.fixture(scope="module")
def small(world, tmp_path_factory) -> World:
    """Half of the frames at a fifth of the size, lifted and meshed."""
    return small_world(world, tmp_path_factory.mktemp("small") / "temple")


def test_the_splats_show_the_frames_that_they_were_made_of(lifted):
    scene, video, cameras = read_scene(lifted), lifted.video, lifted.cameras
    renderer = choose_renderer(scene)
    for frame, least_db in ((0, 24.0), (40, 20.0), (80, 20.0)):
        view = renderer.render(cameras.w2c[frame], cameras.intrinsics[frame], *video.shape[-2:])
        assert view.alpha.mean() > 0.9
        assert psnr_db(view.colours * 2 - 1, from_uint8(video[frame]), 2.0) > least_db, frame


def test_the_surface_lies_where_the_splats_are_and_faces_the_cameras(lifted):
    surface, collider, ground = read_surface(lifted)
    assert 1000 < len(surface.faces) <= MeshJob().triangles
    assert len(collider.faces) <= MeshJob().collider_triangles
    made = trimesh.Trimesh(surface.vertices.numpy(), surface.faces.numpy(), process=False)
    to_camera = lifted.cameras.centres[0].numpy() - made.triangles_center
    facing = (made.face_normals * to_camera).sum(-1) > 0
    assert np.average(facing, weights=made.area_faces) > 0.9
    assert abs(float(ground.up.norm()) - 1) < 1e-5 and ground.up[1] < -0.7


def hit_straight_down(mesh, points, up) -> torch.Tensor:
    """Whether a ray against `up` from each point meets a triangle."""
    # In float64, because triangles seen from the edge are nearly lines.
    vertices, points, up = mesh.vertices.double(), points.double(), up.double()
    axes = torch.linalg.svd(up[None])[2][1:]
    corners, heights = (vertices @ axes.T)[mesh.faces.long()], (vertices @ up)[mesh.faces.long()]
    a, edges = corners[:, 0], torch.stack([corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]], dim=-1)
    solid = edges.det().abs() > 1e-12
    inverse = torch.linalg.inv(edges[solid])
    shares = torch.einsum("fij,pfj->pfi", inverse, (points @ axes.T)[:, None] - a[solid])
    shares = torch.cat([1 - shares.sum(-1, keepdim=True), shares], dim=-1)
    inside = (shares >= -1e-5).all(-1)
    return (inside & ((shares * heights[solid]).sum(-1) < (points @ up)[:, None])).any(1)


def test_under_the_walk_the_collider_has_no_hole(lifted):
    _, collider, ground = read_surface(lifted)
    below = torch.cat([lifted.cameras.centres, ground.drop_points])
    assert len(ground.drop_points) >= 30
    assert hit_straight_down(collider, below, ground.up).all()


def test_the_splats_are_filmed_along_another_path(lifted, tmp_path):
    write_trajectory(tmp_path / "path.npz", lifted.cameras[[0, 20, 40]].resized(120, 208))
    arguments = [str(lifted.folder), "--trajectory", str(tmp_path / "path.npz"), "--out", str(tmp_path / "fly.mp4")]
    assert main(["fly-through", *arguments]) == 0
    film = read_video(tmp_path / "fly.mp4")
    assert film.shape == (3, 3, 120, 208) and (film.float().std(dim=(1, 2, 3)) > 20).all()


def test_every_format_is_written_and_found_by_its_own_reader(small):
    paths = {path.name: path for path in export(small, list(FORMATS))}
    assert set(paths) == {entry.file for entry in FORMATS.values()}
    scene = read_scene(small)
    assert len(PlyData.read(str(paths["scene.ply"]))["vertex"]) == len(scene)
    assert len(trimesh.load(paths["mesh.glb"]).geometry) == 1
    stage = Usd.Stage.Open(str(paths["scene.usdc"]))
    assert UsdGeom.GetStageUpAxis(stage) == "Z"
    assert any(prim.HasAPI(UsdPhysics.CollisionAPI) for prim in stage.Traverse())
    splats = [prim for prim in stage.Traverse() if prim.GetTypeName() == "ParticleField3DGaussianSplat"]
    assert len(splats[0].GetAttribute("positions").Get()) == len(scene)
    assert len(list((paths["colmap"] / "images").iterdir())) == 11
    assert len(json.loads((paths["nerfstudio"] / "transforms.json").read_text())["frames"]) == 11


def test_what_made_a_world_stands_in_its_files(small):
    export(small, ["ply", "glb"])
    said = f"lyra-tiny, weights under {small.run['model']['licence']}"
    assert said.encode() in (small.exports / "scene.ply").read_bytes()[:500]
    assert said.encode() in (small.exports / "mesh.glb").read_bytes()[:5000]


def test_hundreds_of_frames_are_never_all_in_memory(small, tmp_path, monkeypatch):
    order = [*range(41), *range(39, 0, -1)] * 4
    folder = tmp_path / "long"
    folder.mkdir()
    video, height, width = small.video, 48, 84
    write_video(folder / "walkthrough.mp4", F.interpolate(video[order].float(), (height, width)).to(torch.uint8))
    copy = World.open(folder)
    measured = {i: small.depth[f] for i, f in enumerate(order) if f in small.depth and i % 8 == 0}
    copy.write_path(small.cameras[order].resized(height, width), measured)
    frame_bytes, most = 3 * height * width, 0
    monkeypatch.setattr("lyra.export.video.KEPT_BYTES", 4 * frame_bytes)
    monkeypatch.setattr(lifting, "FUSED_PIXELS", 10 * height * width)
    walkthrough = read_walkthrough(copy)
    assert isinstance(walkthrough.frames, VideoFrames) and walkthrough.frames.shape == (320, 3, height, width)
    for frame in walkthrough.frames:
        held = sum(t.nbytes for t in walkthrough.frames.reader._kept.values())
        most = max(most, held)
        assert frame.shape == (3, height, width)
    assert most <= 4 * frame_bytes
    assert len(reconstruct(copy, ReconstructJob(), GeometricLift())) > 500
    assert len(mesh(copy, MeshJob(triangles=2_000, collider_triangles=1_000)).faces) > 100
    paths = export(copy, ["frames"])
    assert len(list((paths[0] / "images").iterdir())) == 320


def test_the_frames_that_are_fused_are_spread_over_the_video(monkeypatch):
    assert fused_frames(range(0, 40, 4), 100) == range(0, 40, 4)
    monkeypatch.setattr(lifting, "FUSED_PIXELS", 1000)
    chosen = fused_frames(range(0, 400, 4), 100)
    assert len(chosen) == 10 and chosen[0] == 0 and chosen[-1] == 396
    assert fused_frames([3, 5], 5000) == [3]


def test_cancelling_keeps_what_was_made_before(small, tmp_path):
    copy = copied(small, tmp_path / "cancelled")
    kept = copy.scene_path.read_bytes(), copy.mesh_path.read_bytes(), copy.run
    progress = Progress(should_stop=lambda: progress.stage in ("Lift to splats", "Fuse depth"))
    with pytest.raises(Cancelled):
        reconstruct(copy, ReconstructJob(), GeometricLift(), progress)
    with pytest.raises(Cancelled):
        mesh(copy, MeshJob(), progress)
    assert (copy.scene_path.read_bytes(), copy.mesh_path.read_bytes(), copy.run) == kept
    copy.cameras_path.unlink()
    progress = Progress(should_stop=lambda: progress.stage in ("Estimate cameras", "Lift to splats"))
    with pytest.raises(Cancelled):
        reconstruct(copy, ReconstructJob(), GeometricLift(), progress)
    assert (copy.scene_path.read_bytes(), copy.mesh_path.read_bytes(), copy.run) == kept
    assert not copy.cameras_path.exists()


def test_a_format_that_does_not_exist_is_refused_with_those_that_do(small):
    with pytest.raises(UserError, match="no format 'stl'; choose from ply, spz"):
        export(small, ["stl"])  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("change", "option"),
    [
        ({"triangles": 10}, "--triangles"),
        ({"collider_triangles": 10**9}, "--collider-triangles"),
        ({"voxel": 0.0}, "--voxel"),
    ],
)
def test_mesh_settings_out_of_range_are_refused(change, option):
    with pytest.raises(UserError, match=option):
        replace(MeshJob(), **change)
