"""Stage two where something is missing or wrong: what can be estimated is, everything else is one sentence."""

import logging
import shutil
from pathlib import Path

import pytest
import torch
from recipe import fill_depth_anything
from torch.nn import functional as F

from lyra.cli import main
from lyra.config import MeshJob, ReconstructJob
from lyra.errors import UserError
from lyra.export.video import write_video
from lyra.exporting import export
from lyra.generation.walkthrough import from_uint8
from lyra.lifting import mesh, read_scene, read_surface, reconstruct
from lyra.metrics.image import psnr_db
from lyra.models.depth_anything.model import build, load_depth_anything
from lyra.progress import Progress
from lyra.reconstruction.depth_anything import DepthAnythingReconstructor
from lyra.reconstruction.gaussians import GeometricLift
from lyra.reconstruction.pose_report import compare_cameras
from lyra.reconstruction.rasterizer import choose_renderer
from lyra.types import Cameras
from lyra.world import World
from tests.released_checkpoint import DEPTH
from tests.small_world import FRAMES, SMALL, copied, small_world


@pytest.fixture(scope="module")
def small(world, tmp_path_factory) -> World:
    """A part of the default job, lifted and meshed."""
    return small_world(world, tmp_path_factory.mktemp("small") / "temple")


def test_estimated_poses_are_near_the_commanded_ones_and_the_difference_is_told(small, tmp_path):
    copy = copied(small, tmp_path / "estimated")
    cameras, depth = copy.cameras_path.read_bytes(), copy.depth_path.read_bytes()
    reconstruct(copy, ReconstructJob(poses="estimated"), GeometricLift())
    about = copy.run["reconstruct"]
    assert "turn away from the commanded ones by" in about["pose_note"]
    assert about["poses"] == "estimated" and about["trusted_poses"] > 0.9
    assert small.mesh_path.exists() and not copy.mesh_path.exists(), "the mesh of other splats must not stay"
    assert (copy.cameras_path.read_bytes(), copy.depth_path.read_bytes()) == (cameras, depth)


def test_a_video_alone_becomes_a_world(small, tmp_path):
    (tmp_path / "bare").mkdir()
    shutil.copy(small.video_path, tmp_path / "bare")
    copy = World.open(tmp_path / "bare")
    for request in (lambda: mesh(copy, MeshJob()), lambda: export(copy, ["frames"])):
        with pytest.raises(UserError, match="run `python -m lyra reconstruct"):
            request()
    assert main(["reconstruct", str(copy.folder), "--reconstructor", "geometric"]) == 0
    about = copy.run["reconstruct"]
    assert about["poses"] == "estimated" and about["trusted_poses"] == 1.0
    assert about["pose_note"] == "The cameras were estimated from the video."
    assert sorted(copy.depth) == list(range(0, FRAMES, 4)) and len(copy.cameras) == FRAMES
    # The walk was made with this network's depth of the photo, so its unit is the same.
    told, found = small.cameras, copy.cameras
    report = compare_cameras(told, found)
    assert report.mean_degrees < 3 and report.mean_percent < 8
    assert 0.6 < (found.centres[-1] - found.centres[0]).norm() / (told.centres[-1] - told.centres[0]).norm() < 1.6
    renderer, video = choose_renderer(read_scene(copy)), copy.video
    for frame in (0, 15, 38):
        view = renderer.render(found.w2c[frame], found.intrinsics[frame], *SMALL)
        assert psnr_db(view.colours * 2 - 1, from_uint8(video[frame]), 2.0) > 17, frame
    surface = mesh(copy, MeshJob(triangles=5_000, collider_triangles=2_000))
    assert 500 < len(surface.faces) <= 5_000
    assert [path.name for path in export(copy, ["frames", "colmap", "usd"])] == ["frames", "colmap", "scene.usdc"]
    # What was estimated once is known, but still not what the video was asked for.
    cameras = copy.cameras_path.read_bytes()
    reconstruct(copy, ReconstructJob(), GeometricLift())
    assert copy.cameras_path.read_bytes() == cameras and copy.run["reconstruct"]["poses"] == "estimated"
    assert copy.run["estimated_cameras"] == {"frames": FRAMES, "trusted_poses": 1.0}


def test_depth_that_is_missing_is_estimated_in_the_unit_of_the_cameras(small, tmp_path):
    copy = copied(small, tmp_path / "shallow", "depth.safetensors")
    scene = reconstruct(copy, ReconstructJob(), GeometricLift())
    ratios = [(F.interpolate(copy.depth[i][None, None], d.shape)[0, 0] / d)[d < 200] for i, d in small.depth.items()]
    assert 0.7 < float(torch.cat(ratios).median()) < 1.4
    assert copy.cameras_path.read_bytes() == small.cameras_path.read_bytes()
    assert len(scene) > 1000 and copy.run["reconstruct"]["poses"] == "commanded"
    assert "trusted_poses" not in copy.run["reconstruct"] and "estimated_cameras" not in copy.run


def test_cameras_that_are_missing_are_estimated_in_the_unit_of_the_depth(small, tmp_path):
    copy = copied(small, tmp_path / "lost", "cameras.npz")
    depth = copy.depth_path.read_bytes()
    reconstruct(copy, ReconstructJob(), GeometricLift())
    assert copy.depth_path.read_bytes() == depth and copy.run["reconstruct"]["poses"] == "estimated"
    told, found = small.cameras, copy.cameras
    assert compare_cameras(told, found).mean_degrees < 3
    assert 0.8 < (found.centres[-1] - found.centres[0]).norm() / (told.centres[-1] - told.centres[0]).norm() < 1.25


def test_poses_that_cannot_be_measured_are_a_warning(small, tmp_path, caplog):
    folder = tmp_path / "cut"
    folder.mkdir()
    frames = torch.cat([small.video[:12], torch.full((4, 3, *SMALL), 90, dtype=torch.uint8)])
    write_video(folder / "walkthrough.mp4", frames)
    with caplog.at_level(logging.WARNING):
        reconstruct(World.open(folder), ReconstructJob(), GeometricLift())
    about = World(folder).run["reconstruct"]
    assert about["trusted_poses"] == 0.75 and "could not be measured" in caplog.text
    assert "The poses of 4 of 16 frames could not be measured, so they are not to be trusted." in about["pose_note"]


@pytest.mark.parametrize("kept", ["nothing", "depth", "cameras"])
def test_a_network_that_needs_no_cameras_gives_what_is_missing(small, tmp_path, kept):
    with torch.device("meta"):
        shapes = {name: tuple(t.shape) for name, t in build(DEPTH).state_dict().items()}
    network = load_depth_anything(DEPTH, fill_depth_anything(shapes))
    copy = World(tmp_path / "network")
    copy.folder.mkdir()
    write_video(copy.video_path, F.interpolate(small.video[:12].float(), (56, 84)).to(torch.uint8))
    known = Cameras(small.cameras.w2c[:12], small.cameras.intrinsics[:12], *SMALL).resized(56, 84)
    depth = {i: small.depth[i] for i in (0, 8)}
    if kept == "cameras":
        copy.write_cameras(known)
    if kept == "depth":
        copy.write_depth(depth)
    lifter = DepthAnythingReconstructor(network, torch.device("cpu"))
    scene = reconstruct(copy, ReconstructJob("depth-anything", poses="estimated"), lifter)
    about = copy.run["reconstruct"]
    assert len(scene) > 100 and about["poses"] == "estimated" and "pose_note" in about
    assert len(copy.cameras) == 12 and copy.depth
    if kept == "cameras":
        assert torch.equal(copy.cameras.w2c, known.w2c) and "estimated_cameras" not in copy.run
    if kept == "depth":
        assert sorted(copy.depth) == [0, 8] and torch.equal(copy.depth[8], depth[8])
    if kept != "depth":
        assert sorted(copy.depth) == list(range(12))


@pytest.mark.parametrize("known", [True, False])
def test_a_single_frame_is_lifted_and_meshed(small, tmp_path, known):
    folder = tmp_path / "one"
    folder.mkdir()
    write_video(folder / "walkthrough.mp4", small.video[:1])
    copy = World.open(folder)
    if known:
        copy.write_path(small.cameras[:1], {0: small.depth[0]})
    assert len(reconstruct(copy, ReconstructJob(), GeometricLift())) > 1000
    assert len(mesh(copy, MeshJob(triangles=2_000, collider_triangles=1_000)).faces) > 200
    assert len(copy.cameras) == 1 and list(copy.depth) == [0]


def with_depth(world: World, folder: Path, change) -> World:
    """A copy of a world whose measured depth is other."""
    copy = copied(world, folder)
    copy.write_depth({i: change(depth) for i, depth in copy.depth.items()})
    return copy


def test_depth_with_holes_is_lifted_and_meshed_without_them(small, tmp_path):
    generator = torch.Generator().manual_seed(0)

    def torn(depth: torch.Tensor) -> torch.Tensor:
        depth = torch.where(torch.rand(depth.shape, generator=generator) < 0.2, torch.nan, depth)
        depth[:10] = torch.inf
        depth[10:20] = -1.0
        return depth

    copy = with_depth(small, tmp_path / "holes", torn)
    scene = reconstruct(copy, ReconstructJob(), GeometricLift())
    assert len(scene) > 1000
    assert all(getattr(scene, name).isfinite().all() for name in ("means", "quats", "scales", "sh"))
    surface = mesh(copy, MeshJob(triangles=20_000, collider_triangles=2_000))
    assert surface.vertices.isfinite().all() and len(surface.faces) > 0.3 * len(read_surface(small)[0].faces)


def test_a_world_of_nothing_but_sky_has_no_surface_and_says_so_at_once(small, tmp_path):
    copy = with_depth(small, tmp_path / "sky", lambda depth: torch.full_like(depth, 1000.0))
    reconstruct(copy, ReconstructJob(), GeometricLift())
    progress = Progress()
    with pytest.raises(UserError, match="is sky"):
        mesh(copy, MeshJob(), progress)
    assert copy.scene_path.exists() and progress.stage == "Render depth" and "mesh" not in copy.run


def test_depth_that_says_nothing_is_one_sentence(small, tmp_path):
    copy = with_depth(small, tmp_path / "nothing", lambda depth: torch.full_like(depth, torch.nan))
    with pytest.raises(UserError, match="no Gaussians"):
        reconstruct(copy, ReconstructJob(), GeometricLift())
    copy.cameras_path.unlink()
    with pytest.raises(UserError, match="depth of at least one frame"):
        reconstruct(copy, ReconstructJob(), GeometricLift())
    assert not copy.cameras_path.exists()


def test_worlds_that_are_incomplete_get_a_sentence(small, tmp_path):
    copy = copied(small, tmp_path / "broken")
    folder = copy.folder
    copy.write_path(copy.cameras[:30], copy.depth)
    with pytest.raises(UserError, match=r"41 frames.*30 cameras"):
        reconstruct(copy, ReconstructJob(), GeometricLift())
    copy.write_path(small.cameras, copy.depth | {90: copy.depth[0]})
    with pytest.raises(UserError, match=r"41 frames.*depth of frame 90"):
        reconstruct(copy, ReconstructJob(), GeometricLift())
    (folder / "scene.ply").write_bytes(b"ply\nformat ascii 1.0\nend_header\n")
    with pytest.raises(UserError, match=r"reconstruct .* again"):
        mesh(copy, MeshJob())
    (folder / "scene.ply").unlink()
    for request in (lambda: mesh(copy, MeshJob()), lambda: export(copy, ["spz"])):
        with pytest.raises(UserError, match=r"run `python -m lyra reconstruct"):
            request()
    (folder / "mesh.glb").write_text("no mesh")
    with pytest.raises(UserError, match=r"run `python -m lyra mesh .*` again"):
        export(copy, ["glb"])
    copy.video_path.unlink()
    with pytest.raises(UserError, match=r"walkthrough\.mp4 missing"):
        World.open(folder)


@pytest.mark.parametrize("name", ["walkthrough.mp4", "cameras.npz", "depth.safetensors", "scene.ply"])
@pytest.mark.parametrize("content", [b"", b"not what the ending says\n" * 50])
def test_files_that_are_not_what_their_ending_says_are_named(small, tmp_path, name, content):
    copy = copied(small, tmp_path / "wrong")
    (copy.folder / name).write_bytes(content)
    with pytest.raises(UserError, match=name.replace(".", r"\.")) as error:
        if name == "scene.ply":
            mesh(copy, MeshJob())
        else:
            reconstruct(copy, ReconstructJob(), GeometricLift())
    assert "\n" not in str(error.value) and str(error.value).endswith(".")
    assert (copy.folder / name).read_bytes() == content
