"""The collider: no hole under the walked area, gravity, objects above a floor, and samples that can be stood on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import trimesh
from jaxtyping import Float

from lyra.errors import UserError
from lyra.reconstruction.collider import Collider, estimate_up, make_collider, walkable
from lyra.reconstruction.surface import extract_surface
from lyra.reconstruction.tsdf import DepthFrame, fuse
from lyra.training.worlds import build_world
from lyra.types import Cameras, TriangleMesh
from tests.reconstruction.test_tsdf import H, W, inside_room, intrinsics, look_at

EMPTY = TriangleMesh(torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.long), torch.zeros(0, 3, dtype=torch.uint8))


def cameras_at(poses: list[np.ndarray]) -> Cameras:
    k = torch.from_numpy(intrinsics()).float().expand(len(poses), 3, 3)
    return Cameras(torch.from_numpy(np.stack(poses)).float(), k, H, W)


def walk(height: float = 1.6, frames: int = 9, length: float = 2.0, pitch: float = 0.2) -> Cameras:
    """A straight path over y = 0 (y points down), looking ahead and a little down."""
    eyes = [np.array([0.0, -height, z]) for z in np.linspace(0, length, frames)]
    return cameras_at([look_at(eye, eye + np.array([0, pitch, 1.0])) for eye in eyes])


def as_mesh(shape: trimesh.Trimesh) -> TriangleMesh:
    return TriangleMesh(
        torch.from_numpy(np.array(shape.vertices)).float(),
        torch.from_numpy(np.array(shape.faces)).long(),
        torch.full((len(shape.vertices), 3), 200, dtype=torch.uint8),
    )


def floor(x: tuple[float, float], z: tuple[float, float], step: float = 0.25, rise: float = 0.0) -> trimesh.Trimesh:
    """A floor at y = -rise * z whose triangles face up."""
    i, j = (round((b - a) / step) + 1 for a, b in (x, z))
    u, v = np.meshgrid(np.linspace(*x, i), np.linspace(*z, j), indexing="ij")
    vertices = np.stack([u, -rise * v, v], -1).reshape(-1, 3)
    corner = (np.arange(i - 1)[:, None] * j + np.arange(j - 1)).reshape(-1)
    quads = np.stack([corner, corner + 1, corner + j + 1, corner + j], 1)
    faces = np.concatenate([quads[:, [0, 1, 2]], quads[:, [0, 2, 3]]])
    shape = trimesh.Trimesh(vertices, faces, process=False)
    if shape.face_normals[0, 1] > 0:
        shape.invert()
    return shape


def box(low: tuple[float, float, float], high: tuple[float, float, float]) -> trimesh.Trimesh:
    shape = trimesh.creation.box(bounds=[low, high])
    return shape.subdivide().subdivide().subdivide()


def rays_down(mesh: TriangleMesh, origins: Float[np.ndarray, "n 3"], down: Float[np.ndarray, "3"]) -> np.ndarray:
    """Distance to the first triangle that a ray hits, by Moeller and Trumbore; infinite if there is none."""
    corners = mesh.vertices.double().numpy()[mesh.faces.numpy()]
    edge, other = corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]
    cross = np.cross(down, other)
    determinant = (edge * cross).sum(1)
    with np.errstate(divide="ignore", invalid="ignore"):
        inverse = 1 / determinant
        out = []
        for origin in origins:
            away = origin - corners[:, 0]
            s = (away * cross).sum(1) * inverse
            turned = np.cross(away, edge)
            t = turned @ down * inverse
            distance = (other * turned).sum(1) * inverse
            hit = (s >= -1e-9) & (t >= -1e-9) & (s + t <= 1 + 1e-9) & (distance > 0)
            out.append(distance[hit].min() if hit.any() else np.inf)
    return np.array(out)


def over_the_walk(collider: Collider, cameras: Cameras, reach: float, count: int = 400) -> np.ndarray:
    """Points at the height of the cameras, spread over what is within `reach` of the path."""
    ground = collider.ground
    axes = ground.axes.double().numpy()
    path = cameras.centres.double().numpy() @ axes.T
    side = np.linspace(-reach, reach, 60)
    around = np.stack(np.meshgrid(side, side, indexing="ij"), -1).reshape(-1, 2)
    around = around[np.linalg.norm(around, axis=1) < reach]
    points = (path[:, None, :2] + around).reshape(-1, 2)
    heights = np.repeat(path[:, 2], len(around))
    chosen = np.random.default_rng(0).choice(len(points), count, replace=False)
    return np.column_stack([points[chosen], heights[chosen]]) @ axes


def check_no_hole(collider: Collider, cameras: Cameras) -> np.ndarray:
    """Every ray straight down over the walked area hits; gives the distances."""
    down = -collider.up.double().numpy()
    reach = 2.0 * collider.eye_height
    distance = rays_down(collider.mesh, over_the_walk(collider, cameras, reach), down)
    assert np.isfinite(distance).all()
    return distance


def test_a_floor_with_a_hole_under_the_path_has_none_in_the_collider() -> None:
    # Only what lies far ahead was seen, and that with a gap.
    shape = trimesh.util.concatenate([floor((-4, 4), (2.5, 3.5)), floor((-4, 4), (4.5, 9))])
    cameras = walk()
    collider = make_collider(as_mesh(shape), cameras)
    assert float(collider.up @ torch.tensor([0.0, -1.0, 0.0])) > 1 - 1e-6
    assert collider.floor_height == pytest.approx(0.0, abs=1e-3)
    assert collider.eye_height == pytest.approx(1.6, abs=1e-2)
    np.testing.assert_allclose(check_no_hole(collider, cameras), 1.6, atol=1e-3)


def test_the_sheet_is_one_surface_turned_up_without_inner_border() -> None:
    collider = make_collider(EMPTY, walk(pitch=0))
    shape = trimesh.Trimesh(collider.mesh.vertices.numpy(), collider.mesh.faces.numpy(), process=False)
    assert shape.body_count == 1 and shape.euler_number == 1
    assert (shape.face_normals @ collider.up.numpy()).min() > 0.999


def test_nothing_seen_still_gives_a_floor_below_the_cameras() -> None:
    cameras = walk(height=3.0, pitch=0)
    collider = make_collider(EMPTY, cameras)
    np.testing.assert_allclose(check_no_hole(collider, cameras), 1.6, atol=1e-3)
    assert not collider.ground.seen.any()
    # The images' vertical is all that is known of gravity.
    torch.testing.assert_close(collider.up, torch.tensor([0.0, -1.0, 0.0]))
    torch.testing.assert_close(estimate_up(EMPTY, walk(pitch=0.2)).float(), -walk(pitch=0.2).w2c[0, 1, :3])


def test_up_is_read_from_the_floor_though_all_cameras_look_down() -> None:
    shape, cameras = floor((-5, 5), (-2, 8)), walk(pitch=0.6)
    turn = trimesh.transformations.rotation_matrix(0.7, [1, 2, 0.5])
    turned = Cameras(cameras.w2c @ torch.from_numpy(np.linalg.inv(turn)).float(), cameras.intrinsics, H, W)
    expected = turn[:3, :3] @ np.array([0, -1.0, 0])
    guess = -turned.w2c[:, 1, :3].mean(0).numpy()
    assert guess @ expected < 0.9
    up = estimate_up(as_mesh(shape.copy().apply_transform(turn)), turned)
    assert up.numpy() @ expected > 1 - 1e-6
    given = make_collider(as_mesh(shape), walk(), up=torch.tensor([0.0, -2.0, 0.0]))
    torch.testing.assert_close(given.up, torch.tensor([0.0, -1.0, 0.0]))


def test_walls_tell_up_where_the_ground_slopes() -> None:
    slope = floor((-2, 2), (-2, 8))
    slope.apply_transform(trimesh.transformations.rotation_matrix(0.25, [0, 0, 1]))
    bounds = [((-3, -4, -2), (-2, 3, 9)), ((2, -4, -2), (3, 3, 9)), ((-3, -4, 8), (3, 3, 9))]
    walls = trimesh.util.concatenate([box(*bound) for bound in bounds])
    up = estimate_up(as_mesh(trimesh.util.concatenate([slope, walls])), walk())
    assert float(up[1]) < -np.cos(np.radians(1))
    level = estimate_up(as_mesh(slope), walk())
    np.testing.assert_allclose(level, [np.sin(0.25), -np.cos(0.25), 0], atol=1e-6)


def test_things_stay_on_the_ground_and_the_ground_goes_on_below_them() -> None:
    # A table whose top was seen but not the floor below it, and a low step.
    top = floor((-0.6, 0.6), (1.0, 2.0), 0.1)
    top.apply_translation([0, -0.8, 0])
    parts = [floor((-4, -0.6), (-2, 8), 0.1), floor((0.6, 4), (-2, 8), 0.1), floor((-0.6, 0.6), (2, 8), 0.1)]
    step = box((-3, -0.1, -1), (-2, 0.0, 4))
    cameras = walk(length=0.5)
    collider = make_collider(as_mesh(trimesh.util.concatenate([*parts, top, step])), cameras)
    assert collider.eye_height == pytest.approx(1.6, abs=0.03)
    height = collider.ground.height_at(torch.tensor([[0.0, 0, 1.5], [1.5, 0, 1.0], [0.0, 0, 0.0], [9.0, 0, 0]]))
    torch.testing.assert_close(height[:3], torch.zeros(3), atol=0.02, rtol=0)
    assert torch.isnan(height[3])
    down = np.array([0, 1.0, 0])
    on = rays_down(collider.mesh, np.array([[0.0, -3, 1.5], [-2.5, -3, 1.0], [0.0, -3, 0.5]]), down)
    np.testing.assert_allclose(on, [2.2, 2.9, 3.0], atol=0.02)
    # Nobody walks under or through the table.
    points = walkable(collider, 200)
    near_table = (points[:, 0].abs() < 0.6) & (points[:, 2] > 1.0) & (points[:, 2] < 2.0)
    assert not near_table.any()


def test_nobody_walks_behind_a_wall() -> None:
    parts = [floor((-4, 4), (-3, 8)), box((-4, -2.5, 1.2), (4, 0, 1.3))]
    collider = make_collider(as_mesh(trimesh.util.concatenate(parts)), walk(length=0.3))
    points = walkable(collider, 300)
    assert points[:, 2].max() < 1.2 and points[:, 2].min() < -1.0
    check_no_hole(collider, walk(length=0.3))


def test_a_path_up_a_slope_has_the_ground_below_it_everywhere() -> None:
    slope = floor((-4, 4), (-3, 9), rise=0.3)
    eyes = [np.array([0.0, -1.5 - 0.3 * z, z]) for z in np.linspace(0, 5, 11)]
    cameras = cameras_at([look_at(eye, eye + np.array([0, 0.1, 1.0])) for eye in eyes])
    collider = make_collider(as_mesh(slope), cameras, up=torch.tensor([0.0, -1.0, 0.0]))
    points = over_the_walk(collider, cameras, 1.0)
    distance = rays_down(collider.mesh, points, np.array([0, 1.0, 0]))
    np.testing.assert_allclose(points[:, 1] + distance, -0.3 * points[:, 2], atol=0.02)
    # Too steep to stay where one was dropped, so only the path itself is left.
    assert collider.ground.walkable.sum() < 0.2 * collider.ground.inside.sum()


def test_a_camera_that_rises_over_flat_ground_does_not_lift_it() -> None:
    eyes = [np.array([0.0, -1.0 - z, 0.5 * z]) for z in np.linspace(0, 2, 9)]
    cameras = cameras_at([look_at(eye, eye + np.array([0, 0.3, 1.0])) for eye in eyes])
    collider = make_collider(as_mesh(floor((-5, 5), (3, 12))), cameras)
    np.testing.assert_allclose(collider.floor_height, 0.0, atol=0.01)


def test_ground_that_was_seen_far_ahead_is_where_things_are_dropped() -> None:
    # The last camera is at z = 2 and the margin ends at z = 6.
    cameras, seen = walk(), floor((-4, 4), (6.5, 12), 0.1)
    collider = make_collider(as_mesh(seen), cameras)
    assert collider.ground.seen.any()
    points = walkable(collider, 30, above=0.5)
    assert (points[:, 0].abs() < 4).all() and (points[:, 2] > 6.5).all() and (points[:, 2] < 10.5).all()
    # What lies between the path and there was looked over, so it is ground as well.
    between = torch.stack([torch.zeros(20), torch.zeros(20), torch.linspace(2, 9, 20)], 1)
    torch.testing.assert_close(collider.ground.height_at(between), torch.zeros(20), atol=0.01, rtol=0)


def test_what_rolls_off_lands_on_the_rim() -> None:
    cameras = walk()
    collider = make_collider(as_mesh(floor((-4, 4), (-3, 8))), cameras)
    points = over_the_walk(collider, cameras, 10 * collider.eye_height)
    np.testing.assert_allclose(rays_down(collider.mesh, points, -collider.up.double().numpy()), 1.6, atol=0.01)


def test_the_rim_goes_down_to_lower_ground_that_was_seen_and_covers_none() -> None:
    # A balcony of eight metres above a yard.
    balcony, yard = floor((-4, 4), (-3, 6)), floor((-20, 20), (7, 25))
    yard.apply_translation([0, 8.0, 0])
    cameras = walk()
    up = torch.tensor([0.0, -1.0, 0.0])
    collider = make_collider(as_mesh(trimesh.util.concatenate([balcony, yard])), cameras, up=up)
    assert collider.eye_height == pytest.approx(1.6, abs=0.02)
    x, z = (axis.reshape(-1) for axis in np.meshgrid(np.linspace(-8, 8, 9), np.linspace(11, 17, 7)))
    distance = rays_down(collider.mesh, np.stack([x, np.full_like(x, -1.6), z], 1), np.array([0, 1.0, 0]))
    np.testing.assert_allclose(distance, 9.6, atol=0.05)


def test_errors_of_depth_are_evened_and_stairs_are_not() -> None:
    draw = np.random.default_rng(0)
    low, high = floor((-4, 4), (-3, 3), 0.1), floor((-4, 4), (3, 8), 0.1)
    high.apply_translation([0, -0.16, 0])
    riser = box((-4, -0.16, 3.0), (4, 0.0, 3.05))
    shape = trimesh.util.concatenate([low, high, riser])
    shape.vertices[:, 1] += draw.normal(0, 0.015, len(shape.vertices))
    collider = make_collider(as_mesh(shape), walk(), up=torch.tensor([0.0, -1.0, 0.0]))
    x, z = (torch.from_numpy(draw.uniform(*ends, 300)).float() for ends in ((-2, 2), (-1.5, 5.5)))
    z = z[(z - 3).abs() > 0.4]
    truth = torch.where(z < 3, 0.0, 0.16)
    error = collider.ground.height_at(torch.stack([x[: len(z)], torch.zeros(len(z)), z], 1)) - truth
    assert float(error.std()) < 0.005 and float(error.abs().max()) < 0.02
    # Nobody is put on the edge of the step.
    assert (walkable(collider, 100)[:, 2] - 3).abs().min() > 0.1


def test_samples_are_seeded_apart_and_above_the_ground() -> None:
    collider = make_collider(as_mesh(floor((-4, 4), (-3, 8))), walk())
    points = walkable(collider)
    assert points.shape == (32, 3)
    torch.testing.assert_close(points, walkable(collider), rtol=0, atol=0)
    assert not torch.equal(points, walkable(collider, generator=torch.Generator().manual_seed(1)))
    heights = points @ collider.up - collider.ground.height_at(points)
    torch.testing.assert_close(heights, torch.full((32,), 0.4), atol=0.01, rtol=0)
    gaps = torch.cdist(points, points) + 10 * torch.eye(32)
    assert float(gaps.min()) > 0.2
    down = rays_down(collider.mesh, points.double().numpy(), -collider.up.double().numpy())
    np.testing.assert_allclose(down, heights.numpy(), atol=1e-3)
    low = walkable(collider, 5, above=0.1)
    torch.testing.assert_close(
        low @ collider.up - collider.ground.height_at(low), torch.full((5,), 0.1), atol=1e-3, rtol=0
    )


@pytest.mark.parametrize("budget", [2000, 6000])
def test_the_budget_holds(budget: int) -> None:
    shape = trimesh.util.concatenate([floor((-6, 6), (-3, 9), 0.1), trimesh.creation.icosphere(5, 1.0)])
    collider = make_collider(as_mesh(shape), walk(), max_faces=budget)
    assert 0.5 * budget < len(collider.mesh.faces) <= budget
    check_no_hole(collider, walk())


def test_the_whole_way_from_depth_maps_to_a_collider() -> None:
    frames = inside_room()
    mesh = extract_surface(fuse(frames))
    cameras = cameras_at([frame.w2c.double().numpy() for frame in frames])
    collider = make_collider(mesh, cameras)
    # The floor of the room is at y = 1.5, the cameras are at y = 0.1.
    assert float(collider.up[1]) < -0.9999
    assert collider.floor_height == pytest.approx(-1.5, abs=0.02)
    distance = check_no_hole(collider, cameras)
    assert np.median(np.abs(distance - 1.4)) < 0.02 and distance.max() < 1.45
    points = walkable(collider, 40)
    assert (points[:, 0].abs() < 2).all() and (points[:, 2].abs() < 3).all()


@pytest.mark.parametrize("family", ["garage", "park"])
def test_procedural_worlds_have_no_hole_and_the_right_ground(family: str) -> None:
    world, rng, size = build_world(family, 12), np.random.default_rng(12), (72, 128)
    k = world.random_intrinsics(rng, *size)
    poses = world.random_walk(rng, 41)[::5]
    frames = []
    for pose in poses:
        view = world.render(pose, k, *size, shading=False)
        frames.append(
            DepthFrame(
                torch.from_numpy(view.depth), torch.zeros(3, *size), *(torch.tensor(a).float() for a in (pose, k))
            )
        )
    cameras = Cameras(torch.stack([f.w2c for f in frames]), torch.stack([f.intrinsics for f in frames]), *size)
    collider = make_collider(extract_surface(fuse(frames)), cameras)
    assert float(collider.up[1]) < -np.cos(np.radians(2))
    check_no_hole(collider, cameras)
    eyes = np.linalg.inv(poses)[:, :3, 3]
    truth = np.array([world.ground_height(x, z) for x, _, z in eyes])
    found = collider.ground.height_at(torch.from_numpy(eyes).float()).numpy()
    assert np.abs(found - truth).max() < 0.15 * collider.eye_height


def test_mistakes_are_refused_in_a_sentence() -> None:
    lost = walk()
    broken = Cameras(torch.full_like(lost.w2c, float("nan")), lost.intrinsics, H, W)
    for cameras in (broken, lost[:0]):
        with pytest.raises(UserError, match=r"^A collider needs a camera path .*\.$"):
            make_collider(EMPTY, cameras)
    for up in (torch.zeros(3), torch.tensor([0.0, float("nan"), 0.0])):
        with pytest.raises(UserError, match="up direction"):
            make_collider(EMPTY, lost, up=up)
