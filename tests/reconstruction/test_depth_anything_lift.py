"""The lift through Depth Anything 3: the released Gaussians, moved and joined with correct maths."""

import logging
from dataclasses import dataclass, replace

import pytest
import torch
from recipe import fill_depth_anything, views

from lyra.depth.depth_anything import is_still
from lyra.errors import UserError
from lyra.generation.walkthrough import from_uint8
from lyra.geometry.rotations import axis_angle_to_matrix, quaternion_to_matrix, rotation_angle
from lyra.models.depth_anything.camera import normalised_cameras
from lyra.models.depth_anything.config import BackboneConfig, DepthAnythingConfig, NestedDepthAnythingConfig
from lyra.models.depth_anything.gaussian_adapter import gaussian_cameras, to_gaussians
from lyra.models.depth_anything.model import build, load_depth_anything
from lyra.models.depth_anything.preprocess import prepare_pixels
from lyra.progress import Cancelled, Progress
from lyra.reconstruction import depth_anything
from lyra.reconstruction.base import Reconstruction, Reconstructor, Walkthrough
from lyra.reconstruction.chunks import LiftedChunk
from lyra.reconstruction.depth_anything import (
    DepthAnythingReconstructor,
    LiftSettings,
    exported,
    from_network,
    inside_border,
    to_network,
    unit_of_depth,
)
from lyra.reconstruction.gaussians import lift, lifted_frames
from lyra.reconstruction.sim3 import Sim3
from lyra.types import Cameras, GaussianScene

HEIGHT, WIDTH = 56, 84
TINY = DepthAnythingConfig(BackboneConfig(64, 5, 4, (1, 2, 3, 4), 1, "swiglu"), 32, (8, 8, 16, 16), True)
TINY_METRIC = DepthAnythingConfig(BackboneConfig(64, 4, 4, (0, 1, 2, 3), None), 32, (8, 8, 16, 16))
PLAIN = LiftSettings(rule="centres", own_frame=False, trim_border=False)
CPU = torch.device("cpu")


def network(config):
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in build(config).state_dict().items()}
    return load_depth_anything(config, fill_depth_anything(shapes))


@pytest.fixture(scope="module")
def model():
    return network(TINY)


def walkthrough(count=4, cameras=True):
    """Smooth pictures with the cameras of the golden recipe."""
    images, w2c, intrinsics = views(count, HEIGHT, WIDTH, 0)
    frames = ((images[0] * 0.25 + 0.5).clamp(0, 1) * 255).to(torch.uint8)
    # The recipe counts pixel centres from 0.5.
    intrinsics[..., :2, 2] -= 0.5
    return Walkthrough(frames, Cameras(w2c[0], intrinsics[0], HEIGHT, WIDTH) if cameras else None)


def in_world(walk, world):
    return replace(walk, cameras=world.apply_to_cameras(walk.cameras))


def nothing(done: int, of: int) -> None:
    """Ignore progress."""


def reconstruct(model, walk, settings=None):
    return DepthAnythingReconstructor(model, CPU, settings=settings or LiftSettings()).reconstruct(walk, nothing)


def fields(scene):
    return {name: getattr(scene, name) for name in GaussianScene.__dataclass_fields__}


def same_scene(a, b, tolerance=1e-3):
    assert len(a) == len(b)
    for name, value in fields(a).items():
        other = getattr(b, name)
        if name == "quats":
            assert float((value * other).sum(dim=-1).abs().min()) > 1 - tolerance
            continue
        assert float((value - other).abs().max()) < tolerance * float(other.abs().max()), name


@pytest.mark.parametrize("use_predicted", [True, False])
def test_with_the_released_settings_the_scene_is_what_the_adapter_makes(model, use_predicted):
    walk = walkthrough()
    result = reconstruct(model, walk, replace(PLAIN, use_aligned_pred_cam=use_predicted, harmonics=True))
    w2c, intrinsics = walk.cameras.w2c, walk.cameras.intrinsics.clone()
    intrinsics[:, :2, 2] += 0.5
    with torch.no_grad():
        output = model(
            prepare_pixels(walk.frames)[None], normalised_cameras(w2c[None]), intrinsics[None], gaussian_reduction=2
        )
    cameras = gaussian_cameras(w2c, output.w2c[0], use_predicted=use_predicted)
    expected = to_gaussians(output.raw_gaussians[0], output.depth[0], cameras, intrinsics)
    usable = (expected.scales > 0).all(dim=1)
    assert 0 < int(usable.sum()) == len(result.scene)
    same_scene(result.scene, GaussianScene(*(value[usable] for value in fields(expected).values())))
    torch.testing.assert_close(result.cameras.w2c, cameras.w2c.float(), rtol=1e-4, atol=1e-4)
    assert bool((result.scene.quats[:, 3] >= 0).all())
    if not use_predicted:
        torch.testing.assert_close(result.cameras.w2c, w2c)


def test_the_scene_turns_with_the_world_of_the_cameras(model):
    walk = walkthrough()
    world = Sim3(1.0, axis_angle_to_matrix(torch.tensor([0.5, 1.5, -0.7])), torch.tensor([3.0, -1.0, 2.0]))
    expected = world.apply_to_scene(reconstruct(model, walk).scene)
    same_scene(reconstruct(model, in_world(walk, world)).scene, expected)


def test_lifting_in_a_turned_world_as_released_spoils_the_gaussians_turns(model):
    # What the test above would not notice if quaternions did not depend on the frame they are made in.
    walk = walkthrough()
    world = Sim3(1.0, axis_angle_to_matrix(torch.tensor([0.0, 1.5, 0.0])), torch.zeros(3))
    settings = LiftSettings(own_frame=False)
    right = world.apply_to_scene(reconstruct(model, walk, settings).scene)
    released = reconstruct(model, in_world(walk, world), settings).scene
    angles = rotation_angle(quaternion_to_matrix(right.quats), quaternion_to_matrix(released.quats))
    assert float(torch.rad2deg(angles).mean()) > 45
    torch.testing.assert_close(released.means, right.means, rtol=1e-2, atol=1e-2)


def test_the_first_views_gaussians_are_turned_as_its_camera(model):
    walk = walkthrough()
    settings = LiftSettings(use_aligned_pred_cam=False, trim_border=False)
    chunk = DepthAnythingReconstructor(model, CPU, settings=settings).lift_chunk(
        in_world(walk, Sim3(1.0, axis_angle_to_matrix(torch.tensor([0.2, 2.0, 0.4])), torch.ones(3))), (0, 1, 2, 3)
    )
    with torch.no_grad():
        straight = DepthAnythingReconstructor(model, CPU, settings=settings).lift_chunk(walk, (0, 1, 2, 3))
    c2w = chunk.cameras.w2c[0, :3, :3].T
    own = quaternion_to_matrix(straight.views(0, 1).scene.quats)
    angles = rotation_angle(c2w @ own, quaternion_to_matrix(chunk.views(0, 1).scene.quats))
    assert float(angles.median()) < 1e-2


@pytest.mark.parametrize("nested", [False, True])
def test_a_video_without_cameras_is_lifted_in_the_frame_of_its_first_view(nested):
    model = network(NestedDepthAnythingConfig(TINY, TINY_METRIC) if nested else TINY)
    walk = walkthrough(cameras=False)
    result = reconstruct(model, walk, LiftSettings(use_aligned_pred_cam=False))
    torch.testing.assert_close(result.cameras.w2c[0], torch.eye(4), rtol=0, atol=1e-5)
    assert len(result.scene) > 100 and bool(result.scene.means.isfinite().all())
    with torch.no_grad():
        predicted = model(prepare_pixels(walk.frames)[None]).w2c[0].double()
    relative = (predicted @ torch.linalg.inv(predicted[:1])).float()
    torch.testing.assert_close(result.cameras.w2c, relative, rtol=1e-3, atol=1e-3)


def test_a_nested_network_lifts_given_cameras_without_its_metric_half():
    model = network(NestedDepthAnythingConfig(TINY, TINY_METRIC))
    model.da3_metric = None
    assert len(reconstruct(model, walkthrough()).scene) > 100


def test_long_videos_go_through_in_chunks_that_share_views(model):
    walk = walkthrough(9)
    settings = LiftSettings(chunks=2, chunk_size=6, chunk_overlap=3, max_diff=1e9, use_aligned_pred_cam=False)
    result = reconstruct(model, walk, settings)
    assert result.frame_ids == tuple(range(9)) and len(result.cameras) == 9
    assert (result.cameras.image_height, result.cameras.image_width) == (HEIGHT, WIDTH)
    torch.testing.assert_close(result.cameras.w2c[:6], walk.cameras.w2c[:6], rtol=0, atol=1e-5)
    torch.testing.assert_close(result.cameras.intrinsics, walk.cameras.intrinsics, rtol=1e-5, atol=1e-4)


def test_chunks_of_a_video_without_cameras_become_one_world(model):
    settings = LiftSettings(chunks=2, chunk_size=6, chunk_overlap=3, max_diff=1e9)
    result = reconstruct(model, walkthrough(9, cameras=False), settings)
    assert result.frame_ids == tuple(range(9))
    assert all(bool(value.isfinite().all()) for value in fields(result.scene).values())


def test_progress_is_told_and_can_stop_the_work(model):
    calls = []
    settings = LiftSettings(chunks=2, chunk_size=6, chunk_overlap=3)
    reconstructor = DepthAnythingReconstructor(model, CPU, settings=settings)
    reconstructor.reconstruct(walkthrough(9), lambda done, of: calls.append((done, of)))
    assert calls == [(0, 3), (1, 3), (2, 3), (3, 3)]
    progress = Progress(should_stop=lambda: len(stopped) > 0)
    stopped: list[int] = []

    def check(done: int, of: int) -> None:
        progress.step(done, of)
        stopped.append(done)

    with pytest.raises(Cancelled):
        reconstructor.reconstruct(walkthrough(9), check)
    assert stopped == [0]


def test_views_are_not_told_apart_by_how_many_become_gaussians_at_once(model, monkeypatch):
    before = reconstruct(model, walkthrough(), PLAIN)
    monkeypatch.setattr(depth_anything, "VIEWS_AT_ONCE", 3)
    same_scene(reconstruct(model, walkthrough(), PLAIN).scene, before.scene, 1e-5)


# The unit of cameras that do not move.


def still(walk, unit=1.0):
    """The walkthrough from one spot, with depth known in a unit of its own."""
    w2c = walk.cameras.w2c.clone()
    w2c[:, :3, 3] = -(w2c[:, :3, :3] @ torch.tensor([1.0, 2.0, 3.0]))
    cameras = replace(walk.cameras, w2c=w2c)
    depth = torch.full((28, 42), 3.0 * unit)
    depth[:5] = torch.inf
    return replace(walk, cameras=cameras, depths={0: depth, 2: depth})


def test_cameras_that_stand_still_get_their_unit_from_known_depth(model):
    walk = still(walkthrough())
    assert is_still(walk.cameras.w2c)
    small, large = reconstruct(model, walk), reconstruct(model, still(walkthrough(), 10.0))
    torch.testing.assert_close(small.cameras.w2c, walk.cameras.w2c, rtol=1e-4, atol=1e-4)
    centre = torch.tensor([1.0, 2.0, 3.0])
    assert torch.allclose((large.scene.means - centre), 10 * (small.scene.means - centre), rtol=1e-2, atol=1e-2)


def test_without_known_depth_they_keep_the_networks_unit_and_the_log_says_so(model, caplog):
    with caplog.at_level(logging.WARNING):
        reconstruct(model, replace(still(walkthrough()), depths={}))
    assert "own unit" in caplog.text


def test_the_unit_is_the_median_ratio_over_what_is_known():
    predicted = torch.full((2, 8, 8), 6.0)
    predicted[0, :2] = torch.nan
    known = torch.full((8, 8), 2.0)
    known[4:6] = torch.inf
    known[6] = 1000.0
    assert unit_of_depth(predicted, {0: known}) == pytest.approx(3.0)
    assert unit_of_depth(predicted, {}) == 1.0


# What goes into the scene.


def grid_chunk(rows, columns, count=2):
    total = count * rows * columns
    scene = GaussianScene(
        means=torch.zeros(total, 3),
        quats=torch.tensor([1.0, 0, 0, 0]).repeat(total, 1),
        scales=torch.ones(total, 3),
        opacities=torch.linspace(0.0, 1.0, total),
        sh=torch.arange(total).float()[:, None, None].expand(total, 1, 3),
    )
    cameras = Cameras(torch.eye(4).expand(count, 4, 4), torch.eye(3).expand(count, 3, 3), rows, columns)
    return LiftedChunk(tuple(range(count)), cameras, scene, (rows, columns))


def test_the_border_of_the_released_grid_is_7_rows_and_12_columns():
    inside = inside_border(238, 413)
    assert int(inside.sum()) == 224 * 389
    assert not inside[:7].any() and not inside[:, -12:].any() and bool(inside[7, 12])


def test_small_grids_lose_no_more_than_their_border():
    assert inside_border(28, 42).sum() == 28 * 40
    assert inside_border(3, 4).all()
    chunk = grid_chunk(3, 4)
    assert len(exported(chunk, LiftSettings())) == 24
    assert len(exported(grid_chunk(40, 4), LiftSettings())) == 2 * 38 * 4


def test_opacities_are_clamped_and_can_choose():
    chunk = grid_chunk(5, 10)
    opacities = exported(chunk, LiftSettings()).opacities
    assert float(opacities.min()) == pytest.approx(1e-6) and float(opacities.max()) < 1
    assert bool(torch.logit(opacities).isfinite().all())
    fewer = exported(chunk, LiftSettings(opacity_percentile=0.3))
    assert len(fewer) == 70 and fewer.opacities.min() > 0.29
    trimmed = exported(grid_chunk(40, 40), LiftSettings(opacity_percentile=0.5))
    assert len(trimmed) == 2 * 38 * 38 // 2


def test_gaussians_behind_a_camera_or_without_a_number_are_dropped():
    chunk = grid_chunk(3, 4)
    spoiled = {name: value.clone() for name, value in fields(chunk.scene).items()}
    spoiled["scales"][0] = -1
    spoiled["scales"][1] = 0
    spoiled["means"][2, 1] = torch.nan
    spoiled["quats"][3, 0] = torch.inf
    spoiled["opacities"][4] = torch.nan
    spoiled["sh"][5] = torch.nan
    kept = exported(replace(chunk, scene=GaussianScene(**spoiled)), LiftSettings())
    assert kept.sh[:, 0, 0].tolist() == list(range(6, 24))


def test_only_degree_0_is_kept_unless_asked(model):
    assert reconstruct(model, walkthrough()).scene.sh.shape[1] == 1
    full = reconstruct(model, walkthrough(), LiftSettings(harmonics=True)).scene
    assert full.sh.shape[1] == 9
    assert torch.equal(full.sh[:, :1], reconstruct(model, walkthrough()).scene.sh)


def test_cameras_come_back_from_the_networks_size():
    cameras = walkthrough().cameras
    there = to_network(cameras, 112, 84)
    assert float(there.intrinsics[0, 1, 1]) == pytest.approx(2 * float(cameras.intrinsics[0, 1, 1]))
    # The middle of the picture is at half of its size where centres count from 0.5.
    assert there.intrinsics[0, :2, 2].tolist() == pytest.approx([42.0, 56.0])
    back = from_network(there, HEIGHT, WIDTH)
    torch.testing.assert_close(back.intrinsics, cameras.intrinsics)


def test_the_processed_size_can_be_smaller(model):
    full, small = (reconstruct(model, walkthrough(), LiftSettings(resolution=size)) for size in (None, 42))
    assert 0.15 < len(small.scene) / len(full.scene) < 0.4
    assert (small.cameras.image_height, small.cameras.image_width) == (HEIGHT, WIDTH)


# Refusals and the protocol.


def test_networks_that_make_no_gaussians_are_refused():
    for config in (replace(TINY, gaussian_head=False), TINY_METRIC):
        with pytest.raises(UserError, match="no Gaussian head"):
            DepthAnythingReconstructor(network(config), CPU)


def test_settings_that_cannot_be_are_refused(model):
    with pytest.raises(UserError, match="left out"):
        LiftSettings(opacity_percentile=1.0)
    with pytest.raises(UserError, match="1 or more"):
        LiftSettings(gaussian_reduction=0)
    with pytest.raises(UserError, match="need 253 frames"):
        reconstruct(model, walkthrough(), LiftSettings(chunks=2, chunk_overlap=3))
    with pytest.raises(ValueError, match="4 frames"):
        replace(walkthrough(), cameras=walkthrough(3).cameras)


@dataclass(frozen=True)
class GeometricLift:
    """The lift without a network behind the protocol."""

    def reconstruct(self, walkthrough, check):
        images = {i: from_uint8(walkthrough.frames[i]) for i in walkthrough.depths}
        scene = lift(lifted_frames(images, dict(walkthrough.depths), walkthrough.cameras), check)
        ids = tuple(sorted(walkthrough.depths))
        return Reconstruction(scene, walkthrough.cameras[list(ids)], ids)


def test_the_lift_without_a_network_fits_the_protocol_too(model):
    walk = replace(walkthrough(), depths={i: torch.full((28, 42), 4.0) for i in (0, 2)})
    reconstructors: list[Reconstructor] = [GeometricLift(), DepthAnythingReconstructor(model, CPU)]
    for reconstructor in reconstructors:
        result = reconstructor.reconstruct(walk, nothing)
        assert len(result.scene) > 100 and len(result.cameras) == len(result.frame_ids)
