"""A robot in a world: is the ground that was made from one photo good enough to stand on?

Loads a USD stage from its file into Newton (`pip install newton newton-usd-schemas`), on the CPU, drops spheres and
boxes at 30 places on the walkable ground, lets a four-legged robot stand among them, and films it. Prints how many
things came to rest, how far their undersides are from the surface, and whether the robot stands. Run with
`python examples/04_robot_in_world.py WORLD_OR_USD [--out video.mp4] [--seconds 5]`. The first run compiles Newton's
kernels, which takes most of a minute and is remembered.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import warp as wp
from numpy.typing import NDArray
from pxr import Gf, Usd, UsdGeom, UsdPhysics

from lyra.errors import UserError
from lyra.export.usd_layers import open_stage
from lyra.export.video import FRAMES_PER_SECOND, write_video

# Nothing is differentiated here, and nothing gains by deep inlining: kernels compile in 40 % of the time.
wp.config.enable_backward = False
wp.config.cpu_compiler_flags = "-march=native"
wp.config.log_level = wp.LOG_WARNING

import newton  # noqa: E402
import newton.examples  # noqa: E402
from newton.sensors import SensorCamera  # noqa: E402

Array = NDArray[np.float64]
PLACES = 30
DROP_HEIGHT = 0.5
"""Metres between the ground and the lowest point of a thing when it is let go."""
SIZE = 0.1
"""Radius of spheres and half the side of boxes, in metres."""
SUBSTEPS = 15
"""Physics steps a frame: 240 a second, in which a thing that fell 1 m moves 2 cm."""
SOLVER_ITERATIONS = 8
ROLLING_FRICTION = 0.1
"""A ball of soft rubber; without any, a ball on level ground never stops."""
REST_MOTION, REST_SECONDS = 0.02, 0.5
"""At rest is what moved less than this many metres in the last half second ..."""
REST_GAP = 0.1
"""... and whose underside is at most this far above or below the surface, in metres."""
FLAT = 0.85
"""Cosine of the steepest slope that counts as walkable, about 32 degrees."""
HEADROOM = 1.0
ROBOT_ROOM = 0.7
"""Nothing is dropped closer to the robot than this, in metres."""
ROBOT_HEIGHT = 0.55
"""Height of the robot's trunk above the ground where it is let go."""
GROUND_COLOUR = (0.62, 0.6, 0.56)
SKY_COLOUR = 0xFFE8D8C8 - 2**32
"""Opaque light blue, alpha first and red last, in the signed number that Newton wants."""
STANCE = [0.2, 0.4, -0.6, -0.2, -0.4, 0.6, -0.2, 0.4, -0.6, 0.2, -0.4, 0.6]
"""Angles of hip, thigh and knee, leg by leg, in radians: feet apart, knees bent."""


@dataclass(frozen=True)
class Surface:
    """The triangles of a stage that have collision, asked for heights. Independent of the physics engine."""

    triangles: Array
    """Corners, (faces, 3, 3)."""

    @classmethod
    def of(cls, stage: Usd.Stage) -> Surface:
        """All collision meshes of a stage, where their prims are."""
        transforms, parts = UsdGeom.XformCache(), []
        for prim in stage.Traverse():
            if not (prim.IsA(UsdGeom.Mesh) and prim.HasAPI(UsdPhysics.CollisionAPI)):
                continue
            mesh, matrix = UsdGeom.Mesh(prim), np.array(transforms.GetLocalToWorldTransform(prim))
            points = np.array(mesh.GetPointsAttr().Get(), np.float64) @ matrix[:3, :3] + matrix[3, :3]
            if set(mesh.GetFaceVertexCountsAttr().Get()) != {3}:
                raise UserError(f"The collider {prim.GetPath()} is not made of triangles; triangulate it first.")
            parts.append(points[np.array(mesh.GetFaceVertexIndicesAttr().Get()).reshape(-1, 3)])
        if not parts:
            raise UserError("The stage has no mesh to collide with; export the world with a collider.")
        return cls(np.concatenate(parts))

    @cached_property
    def bounds(self) -> tuple[Array, Array]:
        """Each triangle's rectangle in the ground plane."""
        return self.triangles[:, :, :2].min(1), self.triangles[:, :, :2].max(1)

    def near(self, low: Array, high: Array) -> Surface:
        """The triangles that reach into a rectangle of the ground plane."""
        first, last = self.bounds
        return Surface(self.triangles[((first <= high[:2]) & (last >= low[:2])).all(1)])

    def heights(self, x: float, y: float) -> Array:
        """Heights of all crossings with the vertical line through a point."""
        here = np.array([x, y])
        a, b, c = np.moveaxis(self.near(here, here).triangles, 1, 0)
        u, v, to = b[:, :2] - a[:, :2], c[:, :2] - a[:, :2], here - a[:, :2]
        area = u[:, 0] * v[:, 1] - u[:, 1] * v[:, 0]
        steep = np.abs(area) < 1e-12
        area = np.where(steep, 1.0, area)
        s = (to[:, 0] * v[:, 1] - to[:, 1] * v[:, 0]) / area
        t = (u[:, 0] * to[:, 1] - u[:, 1] * to[:, 0]) / area
        inside = ~steep & (s >= -1e-9) & (t >= -1e-9) & (s + t <= 1 + 1e-9)
        return (a[:, 2] + s * (b[:, 2] - a[:, 2]) + t * (c[:, 2] - a[:, 2]))[inside]

    def height(self, point: Array) -> float:
        """Height of the crossing that is nearest to a point; NaN over nothing."""
        crossings = self.heights(point[0], point[1])
        return float(crossings[np.argmin(np.abs(crossings - point[2]))]) if len(crossings) else math.nan

    def gap(self, points: Array) -> float:
        """Smallest height of some points over the surface, negative below it; infinite over nothing."""
        part = self.near(points.min(0), points.max(0))
        gaps = [point[2] - part.height(point) for point in points]
        return float(np.nanmin(gaps)) if np.isfinite(gaps).any() else math.inf


@dataclass(frozen=True)
class Places:
    """Where things go, all on the ground."""

    things: Array
    robot: Array | None


@dataclass(frozen=True)
class Run:
    """What the physics engine did."""

    model: newton.Model
    things: list[str]
    """"sphere" or "box", by body."""
    robot: int | None
    """Body of the robot's trunk."""
    poses: Array
    """Position and quaternion (xyzw) of each body at each frame, (frames, bodies, 7)."""


@dataclass(frozen=True)
class Report:
    """How it ended."""

    gaps: list[float]
    """Distance from each thing's underside to the surface in metres, infinite when it left the ground."""
    resting: list[bool]
    robot_height: float | None
    """Height of the trunk over the ground; None without a robot."""
    robot_stands: bool


def find_stage(path: Path) -> Path:
    """A USD file, or the one among a world's exports.

    Raises:
        UserError: there is none.
    """
    if path.is_file():
        return path
    found = [p for suffix in ("usdc", "usdz", "usda", "usd") for p in sorted((path / "exports").glob(f"*.{suffix}"))]
    if not found:
        raise UserError(f"There is no USD file at {path}; run `python -m lyra export {path} --formats usd` first.")
    return found[0]


def walkable(stage: Usd.Stage, surface: Surface, count: int) -> Array:
    """Places that the stage names, then others on level ground with headroom, well apart from one another."""
    named = stage.GetDefaultPrim().GetCustomDataByKey("lyra:dropPoints") if stage.HasDefaultPrim() else None
    chosen: list[Array] = []
    for point in np.array(named or [], np.float64).reshape(-1, 3):
        point[2] = np.nan_to_num(surface.height(point), nan=point[2])
        if is_apart(point, chosen):
            chosen.append(point)
    edges = surface.triangles[:, 1:] - surface.triangles[:, :1]
    normals = np.cross(edges[:, 0], edges[:, 1])
    areas = np.linalg.norm(normals, axis=1) / 2
    level = np.where(normals[:, 2] > FLAT * 2 * areas, areas, 0.0)
    if level.sum() > 0:
        picks = np.random.default_rng(0).choice(len(level), 40 * count, p=level / level.sum())
        for point in surface.triangles[picks].mean(1):
            if len(chosen) >= count:
                break
            if not is_apart(point, chosen):
                continue
            above = surface.heights(point[0], point[1]) - point[2]
            covered = ((above > 0.05) & (above < HEADROOM)).any()
            if not covered and roughness(surface, point, 3 * SIZE) < 4 * SIZE:
                chosen.append(point)
    if not chosen:
        raise UserError("There is no level ground in the stage; level the world with its up direction.")
    return np.array(chosen)


def is_apart(point: Array, others: Sequence[Array]) -> bool:
    """Whether things at a point and at other points are two widths from each other, so that none falls on one."""
    return all(np.linalg.norm(point[:2] - other[:2]) > 4 * SIZE for other in others)


def roughness(surface: Surface, place: Array, radius: float) -> float:
    """Difference of heights around a place; infinite at an edge."""
    ring = [place + radius * np.array([math.cos(a), math.sin(a), 0]) for a in np.arange(8) * math.pi / 4]
    heights = [surface.height(point) for point in [place, *ring]]
    return math.inf if np.isnan(heights).any() else max(heights) - min(heights)


def choose_places(stage: Usd.Stage, surface: Surface, *, with_robot: bool = True, count: int = PLACES) -> Places:
    """The robot goes to the smoothest of the first places, rather in their middle; things go to the others."""
    if not with_robot:
        return Places(walkable(stage, surface, count)[:count], None)
    places = walkable(stage, surface, 2 * count)
    aside = 0.02 * np.linalg.norm(places[:count] - np.median(places[:count], axis=0), axis=1)
    robot = places[int(np.argmin([roughness(surface, place, ROBOT_ROOM) for place in places[:count]] + aside))]
    clear = np.linalg.norm(places[:, :2] - robot[:2], axis=1) > ROBOT_ROOM
    return Places(places[clear][:count], robot)


def build(stage_path: Path, surface: Surface, places: Places) -> tuple[newton.Model, list[str], int | None]:
    """The stage from its file, things over their places, the robot on its feet: model, things, trunk."""
    builder = newton.ModelBuilder(up_axis=newton.Axis.Z)
    builder.default_shape_cfg.mu_rolling = ROLLING_FRICTION  # USD has no word for it.
    builder.add_usd(str(stage_path))
    # Newton paints a mesh with one colour, and that of its first vertex would mean nothing.
    builder.shape_color[:] = [GROUND_COLOUR] * builder.shape_count
    config = newton.ModelBuilder.ShapeConfig(density=1000.0, mu=0.8, mu_rolling=ROLLING_FRICTION)
    things = []
    for index, place in enumerate(places.things):
        start = wp.transform((place[0], place[1], place[2] + DROP_HEIGHT + SIZE), wp.quat_identity())
        body = builder.add_body(xform=start)
        things.append("sphere" if index % 2 == 0 else "box")
        if things[-1] == "sphere":
            builder.add_shape_sphere(body, radius=SIZE, cfg=config, color=(0.9, 0.35, 0.2))
        else:
            builder.add_shape_box(body, hx=SIZE, hy=SIZE, hz=SIZE, cfg=config, color=(0.2, 0.5, 0.9))
    if places.robot is None:
        return builder.finalize("cpu"), things, None
    trunk = builder.body_count
    feet = [surface.height(places.robot + 0.3 * np.array([x, y, 0])) for x in (-1, 0, 1) for y in (-1, 0, 1)]
    height = float(np.nanmax(feet)) + ROBOT_HEIGHT
    builder.add_builder(quadruped(), xform=wp.transform((*places.robot[:2], height), wp.quat_identity()))
    return builder.finalize("cpu"), things, trunk


def quadruped() -> newton.ModelBuilder:
    """The robot that Newton ships, held in its stance by springs in the joints."""
    robot = newton.ModelBuilder(up_axis=newton.Axis.Z)
    robot.default_joint_cfg.armature = 0.01
    robot.default_joint_cfg.target_ke, robot.default_joint_cfg.target_kd = 2000.0, 1.0
    robot.default_shape_cfg.mu = 1.0
    robot.add_urdf(
        newton.examples.get_asset("quadruped.urdf"),
        floating=True,
        enable_self_collisions=False,
        ignore_inertial_definitions=True,
        joint_damping_mode="drive",
    )
    # Thin links have so little inertia that position-based joints shake them.
    for body in range(robot.body_count):
        inertia = np.array(robot.body_inertia[body]).reshape(3, 3) + 0.01 * np.eye(3)
        robot.body_inertia[body] = wp.mat33(inertia.astype(np.float32))
    robot.joint_q[-len(STANCE) :] = STANCE
    robot.joint_target_q[-len(STANCE) :] = STANCE
    return robot


def simulate(stage_path: Path, surface: Surface, places: Places, seconds: float) -> Run:
    """Let go and wait."""
    model, things, trunk = build(stage_path, surface, places)
    solver = newton.solvers.SolverXPBD(model, iterations=SOLVER_ITERATIONS)
    pipeline = newton.CollisionPipeline(model)
    state, after, control, contacts = model.state(), model.state(), model.control(), pipeline.contacts()
    if trunk is not None:
        newton.eval_fk(model, model.joint_q, model.joint_qd, state)
    poses = [state.body_q.numpy().copy()]
    for _ in range(round(seconds * FRAMES_PER_SECOND)):
        for _ in range(SUBSTEPS):
            state.clear_forces()
            pipeline.collide(state, contacts)
            solver.step(state, after, control, contacts, 1 / (FRAMES_PER_SECOND * SUBSTEPS))
            state, after = after, state
        poses.append(state.body_q.numpy().copy())
    return Run(model, things, trunk, np.array(poses, np.float64))


def underside(kind: str, pose: Array) -> Array:
    """Points on the lower half of a thing."""
    if kind == "sphere":
        index = np.arange(200) + 0.5
        z, turn = 1 - index / 100, index * math.pi * (3 - math.sqrt(5))
        radius = np.sqrt(1 - z * z)
        points = SIZE * np.stack([radius * np.cos(turn), radius * np.sin(turn), z], -1)
    else:
        grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, 5)] * 3), -1).reshape(-1, 3)
        points = SIZE * grid[np.abs(grid).max(1) == 1]
    points = points @ np.array(Gf.Matrix3d(Gf.Quatd(pose[6], *pose[3:6]))).reshape(3, 3)
    return points[points[:, 2] <= 0] + pose[:3]


def judge(run: Run, surface: Surface) -> Report:
    """Who is at rest on the surface, and does the robot stand?"""
    last = run.poses[-1 - round(REST_SECONDS * FRAMES_PER_SECOND) :, :, :3]
    moved = np.linalg.norm(last - last[-1], axis=-1).max(0)
    gaps = [surface.gap(underside(kind, run.poses[-1, body])) for body, kind in enumerate(run.things)]
    resting = [bool(moved[body] < REST_MOTION and abs(gap) <= REST_GAP) for body, gap in enumerate(gaps)]
    if run.robot is None:
        return Report(gaps, resting, None, False)
    pose = run.poses[-1, run.robot]
    height = float(pose[2] - surface.height(pose[:3]))
    upright = 1 - 2 * (pose[3] ** 2 + pose[4] ** 2)  # z of the trunk's z axis.
    return Report(gaps, resting, height, bool(height > ROBOT_HEIGHT / 2 and upright > 0.9))


def film(run: Run, stage: Usd.Stage, path: Path, width: int = 640) -> None:
    """Every second frame from the place on the walk that sees most, or from above: Newton takes a second for each."""
    sensor = SensorCamera(run.model)
    sensor.default_clear_data = SensorCamera.ClearData(clear_color=SKY_COLOUR)
    sensor.create_default_light(enable_shadows=True)
    sensor.set_ambient_light((0.5, 0.5, 0.5))
    sensor.default_render_config.enable_shadows = True
    starts = run.poses[0, :, :3]
    camera, time, seen = walked_view(stage, starts)
    if camera is not None and seen >= 0.5:
        ratio = camera.GetVerticalApertureAttr().Get(time) / camera.GetHorizontalApertureAttr().Get(time)
        height = 2 * round(width * ratio / 2)
        rays = SensorCamera.compute_camera_rays_pinhole_usd(width, height, camera, time=time, device="cpu")
        place = sensor.compute_camera_transforms_usd(camera, time=time)
    else:
        height = 2 * round(width * 9 / 32)
        rays = SensorCamera.compute_camera_rays_pinhole(width, height, camera_fov=0.9, device="cpu")
        place = overview(starts)
        # From there one sees what no camera saw, and the ground that goes on there is only in the collider.
        shown = newton.ShapeFlags.VISIBLE | newton.ShapeFlags.COLLIDE_SHAPES
        run.model.bvh_build_shapes(run.model.state(), shape_flags=shown)
    image = sensor.allocate_image_color(1, width, height)
    state, frames = run.model.state(), []
    for poses in run.poses[::2]:
        state.body_q.assign(poses.astype(np.float32))
        run.model.bvh_refit_shapes(state)
        sensor.update(state, place, rays, color_image=image)
        rgba = SensorCamera.Utils.to_rgba_from_color(image).numpy().reshape(height, width, 4)
        frames.append(torch.from_numpy(rgba[..., :3].copy()).movedim(-1, 0))
    write_video(path, frames, fps=FRAMES_PER_SECOND // 2)


def walked_view(stage: Usd.Stage, points: Array) -> tuple[UsdGeom.Camera | None, Usd.TimeCode, float]:
    """The stage's camera, the time at which it sees most of some points, and their share."""
    cameras = [UsdGeom.Camera(prim) for prim in stage.Traverse() if prim.IsA(UsdGeom.Camera)]
    if not cameras:
        return None, Usd.TimeCode.Default(), 0.0
    shares = {}
    for frame in np.arange(stage.GetStartTimeCode(), stage.GetEndTimeCode() + 1, 4):
        frustum = cameras[0].GetCamera(float(frame)).frustum
        shares[float(frame)] = float(np.mean([frustum.Intersects(Gf.Vec3d(*point)) for point in points]))
    best = max(shares, key=lambda frame: shares[frame])
    return cameras[0], Usd.TimeCode(best), shares[best]


def overview(points: Array) -> wp.array:
    """A camera that looks down at some points from the south."""
    middle, spread = points.mean(0), max(1.0, float(np.ptp(points[:, :2], axis=0).max()))
    eye = middle + spread * np.array([0.0, -1.1, 0.8])
    tilt = wp.quat_from_axis_angle(wp.vec3(1.0, 0.0, 0.0), math.atan2(1.1, 0.8))
    return wp.array([wp.transform(tuple(eye), tilt)], dtype=wp.transformf, device="cpu")


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description="Drop things and a robot into a world.")
    parser.add_argument("world", type=Path, help="a world folder with a USD export, or a USD file")
    parser.add_argument("--out", type=Path, default=Path("robot.mp4"))
    parser.add_argument("--seconds", type=float, default=5.0)
    options = parser.parse_args()
    stage_path = find_stage(options.world)
    stage = open_stage(stage_path)
    surface = Surface.of(stage)
    run = simulate(stage_path, surface, choose_places(stage, surface), options.seconds)
    report = judge(run, surface)
    print(f"{sum(report.resting)} of {len(report.resting)} things came to rest on the surface.")
    gaps = [abs(gap) for gap in report.gaps if math.isfinite(gap)]
    print(f"The largest distance from an underside to the surface is {max(gaps, default=math.inf):.3f} m.")
    if len(gaps) < len(report.gaps):
        print(f"{len(report.gaps) - len(gaps)} fell off the edge.")
    if report.robot_height is not None:
        verb = "stands" if report.robot_stands else "does not stand"
        print(f"The robot {verb}: its trunk is {report.robot_height:.2f} m above the ground.")
    film(run, stage, options.out)
    print(f"{options.out} shows it.")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(str(error))
