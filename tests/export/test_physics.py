"""Things that are dropped into an exported world come to rest on its ground, in two physics engines.

One ground is bumpy, was tilted in the world it comes from, and is loaded from the file. A hole shows that the tests can
fail. Another one was seen on a walk through a procedural world and went all the way from depth to the file. MuJoCo
needs no compiler and is quick; Newton compiles its kernels on the first run of a machine (half a minute).
"""

from __future__ import annotations

import importlib.util
import math
import sys

import numpy as np
import pytest
import torch

from lyra.config import MeshJob, ReconstructJob
from lyra.export.usd import OPENCV_TO_Z_UP, StageTransform, write_usd
from lyra.export.video import write_video
from lyra.exporting import export as export_world
from lyra.geometry.rotations import axis_angle_to_matrix
from lyra.lifting import mesh, reconstruct
from lyra.reconstruction.gaussians import GeometricLift
from lyra.training.worlds import build_world
from lyra.types import Cameras, TriangleMesh
from lyra.world import World
from tests.conftest import ROOT

pytest.importorskip("pxr", reason="usd-core needs Python 3.11")
wp = pytest.importorskip("warp")
# Kernels take these when they are imported; both halve the time that the first run of a machine compiles.
wp.config.enable_backward = False
wp.config.cpu_compiler_flags = "-march=native"
newton = pytest.importorskip("newton")
mujoco = pytest.importorskip("mujoco")
from pxr import Usd  # noqa: E402

from tests.export.test_usd import UP, random_scene, tilted_floor  # noqa: E402

CELLS = 22
"""Squares along a side of the ground."""
HALF = 2.5
"""Half the side in metres."""
PLACES = ((-1.5, -1.5), (0.0, -1.5), (1.5, -1.5), (-1.5, 0.0), (1.5, 0.0), (-1.5, 1.5), (0.0, 1.5), (1.5, 1.5))
HOLE = 3
"""The place under which there is no ground in the world with a hole."""


def height(x, y):
    """The ground, with slopes up to 13 degrees, in metres."""
    return 0.08 * np.sin(2.1 * x) * np.cos(1.7 * y) + 0.02 * np.sin(5 * x + 3 * y)


def export(path, hole: bool = False):
    """Write the ground as a world does: in the tilted OpenCV axes of a camera that looked down."""
    line = np.linspace(-HALF, HALF, CELLS + 1)
    x, y = np.meshgrid(line, line, indexing="ij")
    corner = np.arange((CELLS + 1) ** 2).reshape(CELLS + 1, CELLS + 1)
    a, b, c, d = corner[:-1, :-1], corner[1:, :-1], corner[1:, 1:], corner[:-1, 1:]
    faces = np.stack([a, b, c, a, c, d], -1).reshape(-1, 3)
    points = np.stack([x, y, height(x, y)], -1).reshape(-1, 3)
    if hole:
        middle = points[faces].mean(1)[:, :2] - PLACES[HOLE]
        faces = faces[np.abs(middle).max(1) > 0.4]
    places = np.array([[x, y, height(x, y)] for x, y in PLACES])
    to_opencv = torch.tensor(OPENCV_TO_Z_UP).T
    tilt = axis_angle_to_matrix(torch.tensor([0.4, 0.0, -0.2])) @ to_opencv
    vertices = torch.from_numpy(points).float() @ tilt.T
    ground = TriangleMesh(vertices, torch.from_numpy(faces), torch.full(vertices.shape, 128, dtype=torch.uint8))
    drops = torch.from_numpy(places).float() @ tilt.T
    write_usd(path, None, None, ground, up=tilt @ torch.tensor([0.0, 0.0, 1.0]), drop_points=drops)
    return path


@pytest.fixture(scope="module")
def example():
    """The example, whose name is none that can be imported."""
    spec = importlib.util.spec_from_file_location("robot_in_world", ROOT / "examples" / "04_robot_in_world.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["robot_in_world"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    return export(tmp_path_factory.mktemp("intact") / "ground.usdc")


@pytest.fixture(scope="module")
def holed(tmp_path_factory):
    return export(tmp_path_factory.mktemp("holed") / "ground.usdc", hole=True)


def mujoco_drop(surface, starts, seconds: float = 3.0):
    """Where spheres and boxes are in the end. MuJoCo makes meshes convex, so each triangle becomes a prism."""
    spec = mujoco.MjSpec()
    for corners in surface.triangles:
        normal = np.cross(corners[1] - corners[0], corners[2] - corners[0])
        below = corners - 0.1 * normal / np.linalg.norm(normal)
        mesh = spec.add_mesh()
        mesh.name = f"prism{len(spec.meshes)}"
        mesh.uservert = np.concatenate([corners, below]).ravel()
        geom = spec.worldbody.add_geom()
        geom.type, geom.meshname, geom.condim = mujoco.mjtGeom.mjGEOM_MESH, mesh.name, 6
    for index, start in enumerate(starts):
        body = spec.worldbody.add_body(pos=start)
        body.add_freejoint()
        geom = body.add_geom(condim=6, friction=[0.8, 0.05, 0.05], density=1000)
        geom.type = mujoco.mjtGeom.mjGEOM_SPHERE if index % 2 == 0 else mujoco.mjtGeom.mjGEOM_BOX
        geom.size = [0.1, 0.1, 0.1]
    model = spec.compile()
    data = mujoco.MjData(model)
    model.opt.timestep = 0.004
    for _ in range(round(seconds / model.opt.timestep)):
        mujoco.mj_step(model, data)
    poses = data.qpos.reshape(-1, 7)[:, [0, 1, 2, 4, 5, 6, 3]]
    return poses, np.linalg.norm(data.qvel.reshape(-1, 6)[:, :3], axis=1)


def loaded(example, path):
    stage = Usd.Stage.Open(str(path))
    surface = example.Surface.of(stage)
    return surface, example.choose_places(stage, surface, with_robot=False, count=len(PLACES))


def test_the_file_holds_the_ground_level_and_the_places_on_it(example, intact):
    surface, places = loaded(example, intact)
    assert np.allclose(
        surface.triangles[..., 2], height(surface.triangles[..., 0], surface.triangles[..., 1]), atol=1e-5
    )
    # Things start on the facets, which cut the corners of the ground.
    assert np.allclose(places.things[:, 2], height(places.things[:, 0], places.things[:, 1]), atol=0.03)
    for x, y in ((0.3, -0.7), (1.9, 2.2), (-2.4, 0.1)):
        assert surface.height(np.array([x, y, 5.0])) == pytest.approx(height(x, y), abs=0.01)
    assert math.isnan(surface.height(np.array([3.0, 0.0, 0.0])))


def test_places_are_found_where_the_stage_names_none(example, intact):
    stage = Usd.Stage.Open(str(intact))
    stage.GetDefaultPrim().ClearCustomData()
    places = example.choose_places(stage, example.Surface.of(stage), count=12)
    assert places.things.shape == (12, 3)
    assert np.abs(places.things[:, :2]).max() < HALF
    assert np.linalg.norm(places.things[:, :2] - places.robot[:2], axis=1).min() > 0.6


def test_newton_imports_collider_friction_and_splats(tmp_path):
    scene, floor = random_scene(), tilted_floor()
    write_usd(tmp_path / "w.usdc", scene, floor, floor, up=UP)
    builder = newton.ModelBuilder(up_axis=newton.Axis.Z)
    builder.add_usd(str(tmp_path / "w.usdc"))
    assert builder.body_count == 0
    shapes = {label.rsplit("/", 1)[-1]: index for index, label in enumerate(builder.shape_label)}
    collides, visible = int(newton.ShapeFlags.COLLIDE_SHAPES), int(newton.ShapeFlags.VISIBLE)
    flags = {name: builder.shape_flags[index] for name, index in shapes.items()}
    assert {name for name, flag in flags.items() if flag & collides} == {"Collider"}
    assert {name for name, flag in flags.items() if flag & visible} == {"Splats"}
    assert builder.shape_type[shapes["Collider"]] == newton.GeoType.MESH
    assert np.allclose(builder.shape_source[shapes["Collider"]].vertices[:, 2], -2, atol=1e-5)
    assert builder.shape_material_mu[shapes["Collider"]] == pytest.approx(0.7)
    gaussian = builder.shape_source[shapes["Splats"]]
    world = StageTransform.levelled(UP).scene(scene)
    assert np.allclose(gaussian.rotations, world.quats[:, [1, 2, 3, 0]].numpy(), atol=1e-6)
    assert np.allclose(gaussian.scales, world.scales.numpy(), atol=1e-6)
    assert gaussian.sh_degree == 0
    assert gaussian.sh_color_space.name == "SRGB"


def test_in_mujoco_all_come_to_rest_on_the_ground_and_one_falls_into_a_hole(example, intact, holed):
    for path, falls in ((intact, False), (holed, True)):
        surface, places = loaded(example, path)
        poses, speeds = mujoco_drop(surface, places.things + np.array([0, 0, 0.6]))
        gaps = [surface.gap(example.underside("sphere" if i % 2 == 0 else "box", pose)) for i, pose in enumerate(poses)]
        stay = [i for i in range(len(PLACES)) if not (falls and i == HOLE)]
        assert max(abs(gaps[i]) for i in stay) < 0.1
        assert max(speeds[i] for i in stay) < 0.05
        if falls:
            assert poses[HOLE, 2] < -5


def test_in_newton_all_but_the_one_over_the_hole_come_to_rest_and_the_robot_stands(example, holed):
    stage = Usd.Stage.Open(str(holed))
    surface = example.Surface.of(stage)
    places = example.choose_places(stage, surface, count=len(PLACES) - 1)
    run = example.simulate(holed, surface, places, 2.0)
    report = example.judge(run, surface)
    over_hole = np.linalg.norm(places.things[:, :2] - PLACES[HOLE], axis=1) < 1e-3
    assert over_hole.sum() == 1
    assert [not rests for rests in report.resting] == over_hole.tolist()
    assert max(abs(gap) for gap, rests in zip(report.gaps, report.resting, strict=True) if rests) < 0.1
    assert run.poses[-1, np.flatnonzero(over_hole)[0], 2] < -5
    assert report.robot_stands
    assert 0.3 < report.robot_height < 0.6
    assert np.abs(run.poses[-8:, run.robot, :3] - run.poses[-1, run.robot, :3]).max() < 0.05


@pytest.fixture(scope="module")
def walked(tmp_path_factory):
    """A walk through a procedural village with exact depth, as splats, surface, collider and a stage in a file."""
    place, rng, (height, width), frames = build_world("village", 3), np.random.default_rng(3), (72, 128), 17
    k, poses = place.random_intrinsics(rng, height, width), place.random_walk(rng, frames)
    views = [place.render(pose, k, height, width) for pose in poses]
    world = World(tmp_path_factory.mktemp("walked"))
    write_video(world.video_path, [torch.from_numpy(view.rgb).movedim(-1, 0) for view in views])
    w2c, k = torch.from_numpy(poses).float(), torch.from_numpy(k).float().expand(frames, 3, 3)
    depth = {i: torch.from_numpy(views[i].depth) for i in range(0, frames, 4)}
    world.write_path(Cameras(w2c, k, height, width), depth)
    reconstruct(world, ReconstructJob(), GeometricLift(interval=4))
    mesh(world, MeshJob(triangles=20_000, collider_triangles=3_000))
    return export_world(world, ["usd"])[0]


def test_in_newton_things_and_the_robot_stand_in_a_world_that_was_seen_on_a_walk(example, walked):
    stage = Usd.Stage.Open(str(walked))
    surface = example.Surface.of(stage)
    assert len(surface.triangles) <= 3_000
    places = example.choose_places(stage, surface, count=8)
    run = example.simulate(walked, surface, places, 2.0)
    report = example.judge(run, surface)
    assert len(report.resting) == 8 and all(report.resting)
    assert max(abs(gap) for gap in report.gaps) < 0.02
    assert report.robot_stands
    assert 0.3 < report.robot_height < 0.6
