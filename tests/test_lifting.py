"""Stage two on a real world: splats, surface, collider and every format, from the command line and in Python."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
from plyfile import PlyData
from pxr import Usd, UsdGeom, UsdPhysics

from lyra.cli import main
from lyra.config import MeshJob, ReconstructJob
from lyra.errors import UserError
from lyra.export.video import read_video
from lyra.exporting import FORMATS, export
from lyra.generation.walkthrough import from_uint8
from lyra.lifting import mesh, read_scene, read_surface, reconstruct
from lyra.metrics.image import psnr_db
from lyra.progress import Cancelled, Progress
from lyra.reconstruction.gaussians import GeometricLift
from lyra.reconstruction.rasterizer import choose_renderer
from lyra.trajectory.files import write_trajectory
from lyra.world import World
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def lifted(world, tmp_path_factory) -> World:
    """A copy of the default job's world, lifted and meshed by the command line."""
    folder = tmp_path_factory.mktemp("lifted") / "temple"
    shutil.copytree(world.folder, folder)
    for command in ("reconstruct", "mesh"):
        result = subprocess.run(
            [sys.executable, "-m", "lyra", command, str(folder)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        assert "splats" in result.stdout or "triangles" in result.stdout
    return World.open(folder)


def test_the_splats_show_the_frames_that_they_were_made_of(lifted):
    scene, video, cameras = read_scene(lifted), lifted.video, lifted.cameras
    renderer = choose_renderer(scene)
    for frame, least_db in ((0, 24.0), (40, 20.0), (80, 20.0)):
        view = renderer.render(cameras.w2c[frame], cameras.intrinsics[frame], *video.shape[-2:])
        assert view.alpha.mean() > 0.95
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
    axes = torch.linalg.svd(up[None])[2][1:]
    corners, heights = (mesh.vertices @ axes.T)[mesh.faces.long()], (mesh.vertices @ up)[mesh.faces.long()]
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


def test_every_format_is_written_and_found_by_its_own_reader(lifted):
    paths = {path.name: path for path in export(lifted, list(FORMATS))}
    assert set(paths) == {entry.file for entry in FORMATS.values()}
    scene = read_scene(lifted)
    assert len(PlyData.read(str(paths["scene.ply"]))["vertex"]) == len(scene)
    assert len(trimesh.load(paths["mesh.glb"]).geometry) == 1
    stage = Usd.Stage.Open(str(paths["scene.usdc"]))
    assert UsdGeom.GetStageUpAxis(stage) == "Z"
    assert any(prim.HasAPI(UsdPhysics.CollisionAPI) for prim in stage.Traverse())
    splats = [prim for prim in stage.Traverse() if prim.GetTypeName() == "ParticleField3DGaussianSplat"]
    assert len(splats[0].GetAttribute("positions").Get()) == len(scene)
    assert len(list((paths["colmap"] / "images").iterdir())) == 21
    assert len(json.loads((paths["nerfstudio"] / "transforms.json").read_text())["frames"]) == 21


def test_what_made_a_world_stands_in_its_files(lifted):
    export(lifted, ["ply", "glb"])
    said = f"lyra-tiny, weights under {lifted.run['model']['licence']}"
    assert said.encode() in (lifted.exports / "scene.ply").read_bytes()[:500]
    assert said.encode() in (lifted.exports / "mesh.glb").read_bytes()[:5000]


def test_estimated_poses_are_near_the_commanded_ones_and_the_difference_is_told(lifted, tmp_path):
    folder = tmp_path / "estimated"
    shutil.copytree(lifted.folder, folder)
    copy = World.open(folder)
    before = copy.mesh_path.exists()
    reconstruct(copy, ReconstructJob(poses="estimated"), GeometricLift(), Progress())
    note = copy.run["reconstruct"]["pose_note"]
    assert "degrees" in note or "°" in note
    assert copy.run["reconstruct"]["trusted_poses"] > 0.9
    assert before and not copy.mesh_path.exists(), "the mesh of other splats must not stay"


def test_cancelling_keeps_what_was_made_before(lifted, tmp_path):
    folder = tmp_path / "cancelled"
    shutil.copytree(lifted.folder, folder)
    copy = World.open(folder)
    kept = copy.scene_path.read_bytes(), copy.mesh_path.read_bytes(), copy.run
    progress = Progress(should_stop=lambda: progress.stage in ("Lift to splats", "Fuse depth"))
    with pytest.raises(Cancelled):
        reconstruct(copy, ReconstructJob(), GeometricLift(), progress)
    with pytest.raises(Cancelled):
        mesh(copy, MeshJob(), progress)
    assert (copy.scene_path.read_bytes(), copy.mesh_path.read_bytes(), copy.run) == kept


def changed(world: World, folder: Path, **depth: torch.Tensor) -> World:
    """A copy of a world whose measured depth is other."""
    shutil.copytree(world.folder, folder)
    copy = World.open(folder)
    first = depth.get("every")
    depths = {i: (d if first is None else first.expand_as(d)) for i, d in copy.depth.items()}
    if "holes" in depth:
        depths = {i: torch.where(torch.rand(d.shape) < 0.2, depth["holes"], d) for i, d in depths.items()}
    copy.write_path(copy.cameras, depths)
    return copy


def test_depth_with_holes_is_lifted_without_them(lifted, tmp_path):
    copy = changed(lifted, tmp_path / "holes", holes=torch.tensor(torch.nan))
    scene = reconstruct(copy, ReconstructJob(), GeometricLift(), Progress())
    assert len(scene) > 1000
    assert all(getattr(scene, name).isfinite().all() for name in ("means", "quats", "scales", "sh"))


def test_a_world_of_nothing_but_sky_has_no_surface_and_says_so(lifted, tmp_path):
    copy = changed(lifted, tmp_path / "sky", every=torch.tensor(1000.0))
    reconstruct(copy, ReconstructJob(), GeometricLift(), Progress())
    with pytest.raises(UserError, match=r"[^.]+\."):
        mesh(copy, MeshJob(), Progress())
    assert copy.scene_path.exists()


def test_worlds_that_are_incomplete_get_a_sentence(lifted, tmp_path):
    folder = tmp_path / "broken"
    shutil.copytree(lifted.folder, folder)
    copy = World.open(folder)
    copy.write_path(copy.cameras[:50], copy.depth)
    with pytest.raises(UserError, match=r"81 frames.*50 cameras"):
        reconstruct(copy, ReconstructJob(), GeometricLift(), Progress())
    (folder / "scene.ply").write_bytes(b"ply\nformat ascii 1.0\nend_header\n")
    with pytest.raises(UserError, match=r"reconstruct .* again"):
        mesh(copy, MeshJob(), Progress())
    (folder / "scene.ply").unlink()
    for request in (lambda: mesh(copy, MeshJob()), lambda: export(copy, ["spz"])):
        with pytest.raises(UserError, match=r"run `python -m lyra reconstruct"):
            request()
    (folder / "mesh.glb").write_text("no mesh")
    with pytest.raises(UserError, match=r"run `python -m lyra mesh .*` again"):
        export(copy, ["glb"])


def test_a_format_that_does_not_exist_is_refused_with_those_that_do(lifted):
    with pytest.raises(UserError, match="no format 'stl'; choose from ply, spz"):
        export(lifted, ["stl"])  # type: ignore[list-item]


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
