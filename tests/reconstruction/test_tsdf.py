"""The distance field: equality with a dense twin, accuracy on exact geometry, bounds, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from lyra.errors import UserError
from lyra.reconstruction.tsdf import (
    MAX_BLOCKS,
    Contraction,
    DepthFrame,
    SparseTsdf,
    choose_space,
    choose_voxel,
    fuse,
)

H, W, FOCAL = 60, 80, 55.0
Rays = Callable[[np.ndarray, np.ndarray], np.ndarray]


def intrinsics(height: int = H, width: int = W, focal: float = FOCAL) -> np.ndarray:
    return np.array([[focal, 0, (width - 1) / 2], [0, focal, (height - 1) / 2], [0, 0, 1.0]])


def look_at(eye: np.ndarray, target: np.ndarray) -> np.ndarray:
    """World-to-camera, image y towards world +y as far as possible."""
    z = (target - eye) / np.linalg.norm(target - eye)
    x = np.cross([0.0, 1.0, 0.0], z)
    x /= np.linalg.norm(x)
    w2c = np.eye(4)
    w2c[:3, :3] = np.stack([x, np.cross(z, x), z])
    w2c[:3, 3] = -w2c[:3, :3] @ eye
    return w2c


def shoot(rays: Rays, w2c: np.ndarray, height: int = H, width: int = W, focal: float = FOCAL) -> DepthFrame:
    """A frame of a scene given by a function of origin and directions; colour says where in the world a pixel is."""
    k = intrinsics(height, width, focal)
    v, u = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    c2w = np.linalg.inv(w2c)
    directions = np.stack([u, v, np.ones_like(u)], -1) @ np.linalg.inv(k).T @ c2w[:3, :3].T
    # Directions have z depth 1, so that the ray parameter is the z depth.
    depth = rays(c2w[:3, 3], directions)
    point = c2w[:3, 3] + np.where(np.isfinite(depth), depth, 0)[..., None] * directions
    colour = np.cos(point).transpose(2, 0, 1)
    return DepthFrame(*(torch.from_numpy(np.ascontiguousarray(a)).float() for a in (depth, colour, w2c, k)))


def sphere_rays(radius: float = 1.0, centre: tuple[float, float, float] = (0.0, 0.0, 0.0)) -> Rays:
    def rays(origin: np.ndarray, directions: np.ndarray) -> np.ndarray:
        o = origin - np.array(centre)
        a, b, c = (directions**2).sum(-1), directions @ o, o @ o - radius**2
        root = b * b - a * c
        return np.where(root > 0, (-b - np.sqrt(np.maximum(root, 0))) / a, np.inf)

    return rays


def room_rays(half: tuple[float, float, float] = (2.0, 1.5, 3.0)) -> Rays:
    """The inside of a box about the origin."""

    def rays(origin: np.ndarray, directions: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore"):
            walls = (np.sign(directions) * np.array(half) - origin) / directions
        return np.where(np.isfinite(walls), walls, np.inf).min(-1)

    return rays


def plane_rays(height: float = 1.5) -> Rays:
    """A floor without end, `height` below y = 0 (y points down)."""

    def rays(origin: np.ndarray, directions: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore"):
            t = (height - origin[1]) / directions[..., 1]
        return np.where(t > 0, t, np.inf)

    return rays


def around_sphere(count: int = 10, distance: float = 3.0) -> list[DepthFrame]:
    """Views of the unit sphere from all sides."""
    i = np.arange(count) + 0.5
    y = 1 - 2 * i / count
    r, a = np.sqrt(1 - y * y), np.pi * (1 + 5**0.5) * i
    eyes = distance * np.stack([r * np.cos(a), y, r * np.sin(a)], 1)
    return [shoot(sphere_rays(), look_at(eye, np.zeros(3))) for eye in eyes]


def inside_room(count: int = 12) -> list[DepthFrame]:
    frames = []
    for turn in np.arange(count) * 2 * np.pi / count:
        eye = np.array([0.3 * np.sin(turn), 0.1, 0.4 * np.cos(turn)])
        target = eye + np.array([np.sin(turn), 0.5 * np.sin(3 * turn), np.cos(turn)])
        frames.append(shoot(room_rays(), look_at(eye, target)))
    return frames


# ---- the twin ----------------------------------------------------------------------------------------------------


def dense_twin(
    frames: list[DepthFrame], space: Contraction, voxel: float, truncation: float, low: np.ndarray, high: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Distance, weight and colour on the lattice low..high (inclusive), by the definition and in plain numpy.

    For smooth depth without jumps only. The stretch of space along the normal is measured with a small step, and the
    normal with the points of neighbouring pixels.
    """
    index = np.stack(np.meshgrid(*[np.arange(a, b + 1) for a, b in zip(low, high, strict=True)], indexing="ij"), -1)
    world = space.expand(index.reshape(-1, 3) * voxel)
    total, distance = np.zeros(len(world)), np.zeros(len(world))
    colour = np.zeros((len(world), 3))
    for frame in frames:
        depth, w2c, k = (x.double().numpy() for x in (frame.depth, frame.w2c, frame.intrinsics))
        h, w = depth.shape
        v, u = np.meshgrid(np.arange(h), np.arange(w), indexing="ij")
        rays = np.stack([u, v, np.ones_like(u)], -1) @ np.linalg.inv(k).T
        points = rays * depth[..., None]
        normal = np.cross(np.gradient(points, axis=1), np.gradient(points, axis=0))
        normal /= np.linalg.norm(normal, axis=-1, keepdims=True)
        c2w = np.linalg.inv(w2c)
        there = (points @ c2w[:3, :3].T + c2w[:3, 3]).reshape(-1, 3)
        step = 1e-5 * np.linalg.norm(points, axis=-1).reshape(-1, 1)
        # How far the tangent plane moves in contracted space when it moves by a step in the world: the gradient of its
        # distance in contracted space is the transposed Jacobian of the expansion times the normal.
        flat = space.contract(there)
        jacobian = np.stack(
            [(space.expand(flat + step * axis) - space.expand(flat - step * axis)) / (2 * step) for axis in np.eye(3)],
            -1,
        )
        turned = (normal @ c2w[:3, :3].T).reshape(-1, 3)
        stretch = np.linalg.norm(np.einsum("nij,ni->nj", jacobian, turned), axis=1).reshape(h, w)
        across = np.abs((rays * normal).sum(-1))
        weight = across / np.linalg.norm(rays, axis=-1) / depth**2
        camera = world @ w2c[:3, :3].T + w2c[:3, 3]
        pixel = camera @ k.T
        with np.errstate(divide="ignore", invalid="ignore"):
            x, y = pixel[:, 0] / pixel[:, 2], pixel[:, 1] / pixel[:, 2]
        # Away from the border of the image, where bilinear inverse depth is defined and gradients are central.
        usable = (camera[:, 2] > 0) & (x > 1.5) & (x < w - 2.5) & (y > 1.5) & (y < h - 2.5)
        x, y = np.where(usable, x, 2), np.where(usable, y, 2)
        x0, y0 = np.floor(x).astype(int), np.floor(y).astype(int)
        s, t = x - x0, y - y0
        inverse = (1 / depth[y0, x0] * (1 - s) + 1 / depth[y0, x0 + 1] * s) * (1 - t)
        inverse += (1 / depth[y0 + 1, x0] * (1 - s) + 1 / depth[y0 + 1, x0 + 1] * s) * t
        xn, yn = np.floor(x + 0.5).astype(int), np.floor(y + 0.5).astype(int)
        signed = (1 / inverse - camera[:, 2]) * (across / stretch)[yn, xn] / voxel
        now = np.where(signed < 0, weight[yn, xn] * (1 + signed / truncation), weight[yn, xn])
        now = np.where(usable & (np.abs(signed) <= truncation), now, 0)
        total += now
        share = np.divide(now, total, out=np.zeros_like(now), where=total > 0)
        distance += share * (signed - distance)
        seen = (frame.colour.numpy().transpose(1, 2, 0)[yn, xn] + 1) * 127.5
        colour += share[:, None] * (seen - colour)
    shape = index.shape[:3]
    return distance.reshape(shape), total.reshape(shape), colour.reshape(*shape, 3)


@pytest.mark.parametrize("radius_share", [10.0, 0.3])
def test_the_field_equals_a_dense_one(radius_share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    # A wavy wall that fills all of the view, once in uniform and once in logarithmic space.
    def wall(origin: np.ndarray, directions: np.ndarray) -> np.ndarray:
        flat = (4 - origin[2]) / directions[..., 2]
        x = origin[0] + flat * directions[..., 0]
        return flat * (1 + 0.02 * np.sin(x))

    frames = [shoot(wall, look_at(np.array([x, 0.1 * x, 0.0]), np.array([0.2, 0, 4.0]))) for x in (-0.5, 0.0, 0.6)]
    space = Contraction(choose_space(frames).centre, 4 * radius_share)
    monkeypatch.setattr("lyra.reconstruction.tsdf.choose_space", lambda frames, max_depth: space)
    field = fuse(frames, voxel=0.05 if radius_share > 1 else 0.02)
    offsets = np.stack(np.meshgrid(*[np.arange(8)] * 3, indexing="ij"), -1)
    lattice = field.blocks[:, None, None, None] * 8 + offsets
    # A part of the wall, with all that is before and behind it.
    low, high = np.array([-12, -8, lattice[..., 2].min() - 4]), np.array([11, 7, lattice[..., 2].max() + 4])
    distance, weight, colour = dense_twin(frames, space, field.voxel, field.truncation, low, high)
    inside = ((lattice >= low) & (lattice <= high)).all(-1)
    at = tuple((lattice[inside] - low).T)
    both = (field.weight[inside] > 0) & (weight[at] > 0)
    assert both.sum() > 1500
    # Who counts at the very end of the truncation depends on rounding, nothing else does.
    edge = np.abs(np.abs(distance[at]) - field.truncation) < 0.15
    assert (((field.weight[inside] > 0) == (weight[at] > 0)) | edge).mean() > 0.999
    clear = both & (np.abs(distance[at]) < field.truncation - 1)
    assert np.abs(field.distance[inside] - distance[at])[clear].max() < 0.05
    assert np.median(np.abs(field.distance[inside] - distance[at])[clear]) < 2e-3
    assert np.median(np.abs(field.weight[inside] / np.maximum(weight[at], 1e-9) - 1)[clear]) < 5e-3
    assert np.abs(field.colour[inside] - colour[at])[clear].max() < 4
    # Blocks are where the surface is: no voxel near it is missing.
    known = np.zeros(distance.shape, bool)
    known[at] = True
    assert known[(weight > 0) & (np.abs(distance) < 2)].all()


# ---- accuracy ----------------------------------------------------------------------------------------------------


def near_zero(field: SparseTsdf, uniform: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """World positions and distances (in scene units near the path) of the voxels within one voxel of the surface."""
    offsets = np.stack(np.meshgrid(*[np.arange(8)] * 3, indexing="ij"), -1)
    lattice = (field.blocks[:, None, None, None] * 8 + offsets) * field.voxel
    near = (field.weight > 0) & (np.abs(field.distance) < 1)
    # Where space is uniform: elsewhere distances are longer in the world than in the field.
    near &= np.linalg.norm(lattice, axis=-1) < (field.space.radius if uniform else np.inf)
    return field.space.expand(lattice[near]), field.distance[near] * field.voxel


def test_distances_are_those_of_the_sphere() -> None:
    field = fuse(around_sphere(), voxel=0.05)
    points, distance = near_zero(field)
    error = np.abs(np.linalg.norm(points, axis=1) - 1 - distance)
    assert np.median(error) < 0.1 * field.voxel
    assert np.quantile(error, 0.95) < 0.5 * field.voxel


def test_distances_are_positive_on_the_side_of_the_cameras() -> None:
    field = fuse(inside_room(), voxel=0.06)
    points, distance = near_zero(field)
    outside = (np.array([2.0, 1.5, 3.0]) - np.abs(points)).min(1)
    assert np.median(np.abs(outside - distance)) < 0.05 * field.voxel
    assert ((outside > 0) == (distance > 0))[np.abs(outside) > 0.2 * field.voxel].mean() > 0.99


def test_a_floor_is_kept_far_beyond_the_uniform_space() -> None:
    frames = [shoot(plane_rays(), look_at(np.array([0, 0, z]), np.array([0, 0.4, z + 2]))) for z in (0.0, 0.5)]
    field = fuse(frames)
    points, _ = near_zero(field, uniform=False)
    distance = np.linalg.norm(points - field.space.centre, axis=1)
    assert distance.max() > 5 * field.space.radius
    far = distance > 3 * field.space.radius
    assert far.sum() > 100
    # One voxel out there is as many times larger as the distance is.
    assert np.quantile(np.abs(points[far, 1] - 1.5) / distance[far], 0.95) < 2 * field.voxel / field.space.radius


def test_contraction_is_undone_by_expansion() -> None:
    space = Contraction(np.array([1.0, -2.0, 0.5]), 3.0)
    points = np.random.default_rng(0).normal(0, 20, (500, 3))
    flat = space.contract(points)
    np.testing.assert_allclose(space.expand(flat), points, atol=1e-9)
    inside = np.linalg.norm(points - space.centre, axis=1) < 3
    np.testing.assert_allclose(flat[inside] + space.centre, points[inside], atol=1e-12)
    edge = space.centre + np.array([[3.0 - 1e-7, 0, 0], [3.0 + 1e-7, 0, 0]])
    np.testing.assert_allclose(np.diff(space.contract(edge)[:, 0]), 2e-7, rtol=1e-3)


def test_pixels_at_depth_jumps_are_left_out() -> None:
    # A sphere before a wall; a network would blur the edge between them over some pixels.
    def scene(origin: np.ndarray, directions: np.ndarray) -> np.ndarray:
        wall = (5 - origin[2]) / directions[..., 2]
        return np.minimum(sphere_rays(0.6, (0.0, 0.0, 3.0))(origin, directions), wall)

    frame = shoot(scene, np.eye(4))
    blurred = torch.nn.functional.avg_pool2d(frame.depth[None, None], 3, 1, 1, count_include_pad=False)[0, 0]
    frames = [DepthFrame(blurred, frame.colour, frame.w2c, frame.intrinsics)]
    points, _ = near_zero(fuse(frames, voxel=0.04), uniform=False)
    to_sphere = np.linalg.norm(points - [0, 0, 3], axis=1) - 0.6
    between = (np.abs(to_sphere) > 0.15) & (points[:, 2] < 4.8)
    assert (to_sphere < 0.1).sum() > 300 and between.sum() == 0


def test_a_steep_floor_is_no_jump() -> None:
    frame = shoot(plane_rays(), np.eye(4))
    depth = frame.depth
    step = (depth[:-1] - depth[1:]).abs() / depth[1:]
    steep = (depth[1:] < 20) & (step > 0.05)
    assert steep.any()
    points, _ = near_zero(fuse([frame], voxel=0.05, max_depth=25), uniform=False)
    assert points[:, 2].max() > 14


def test_holes_and_untrusted_pixels_leave_the_rest_alone() -> None:
    frames = inside_room()
    rng = np.random.default_rng(3)
    holed = []
    for frame in frames:
        depth, weight = frame.depth.clone(), torch.ones_like(frame.depth)
        for value in (float("nan"), 0.0, -1.0, float("-inf")):
            depth[torch.from_numpy(rng.random((H, W)) < 0.02)] = value
        untrusted = torch.from_numpy(rng.random((H, W)) < 0.05)
        depth[untrusted & (depth > 0)] *= 1.02
        weight[untrusted] = 0
        holed.append(DepthFrame(depth, frame.colour, frame.w2c, frame.intrinsics, weight))
    points, distance = near_zero(fuse(holed, voxel=0.06))
    outside = (np.array([2.0, 1.5, 3.0]) - np.abs(points)).min(1)
    assert np.median(np.abs(outside - distance)) < 0.05 * 0.06
    assert len(points) > 0.9 * len(near_zero(fuse(frames, voxel=0.06))[0])


def test_near_views_count_more_than_far_ones() -> None:
    def wall(z: float) -> Rays:
        return lambda origin, directions: (z - origin[2]) / directions[..., 2]

    # The far view is wrong by two voxels.
    near, far = shoot(wall(3.0), np.eye(4)), shoot(wall(3.1), look_at(np.array([0, 0, -6.0]), np.array([0, 0, 3.0])))
    points, distance = near_zero(fuse([near, far], voxel=0.05), uniform=False)
    twice_seen = (np.abs(points[:, :2]) < 0.8).all(1)
    surface = np.median((points[:, 2] + distance)[twice_seen])
    # Weights are 1/9 and 1/81.
    assert surface == pytest.approx(3.0 + 0.1 * 0.1, abs=0.003)


# ---- bounds and refusals -----------------------------------------------------------------------------------------


def test_memory_is_bounded_whatever_the_scene() -> None:
    frames = inside_room()
    finest = choose_space(frames).radius / FOCAL
    assert choose_voxel(frames) == pytest.approx(finest)
    for blocks in (60, 400):
        field = fuse(frames, max_blocks=blocks)
        assert 0.4 * blocks < len(field) <= blocks
        assert field.voxel > finest
    with pytest.raises(UserError, match="blocks of memory"):
        fuse(frames, voxel=0.002, max_blocks=400)


def test_the_same_frames_give_the_same_bytes_and_are_told_of() -> None:
    frames, told = inside_room(4), []
    first = fuse(frames, check=lambda done, steps: told.append((done, steps)))
    second = fuse(frames)
    assert first.distance.tobytes() == second.distance.tobytes()
    assert first.colour.tobytes() == second.colour.tobytes()
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -2.0, 1000.0, 200.0])
def test_a_view_of_nothing_is_refused_in_a_sentence(value: float) -> None:
    frame = shoot(room_rays(), np.eye(4))
    empty = DepthFrame(torch.full_like(frame.depth, value), frame.colour, frame.w2c, frame.intrinsics)
    with pytest.raises(UserError, match=r"^The depth maps show no surface .*\.$"):
        fuse([empty, empty])


def test_noise_of_which_every_pixel_is_an_edge_is_refused() -> None:
    frame = shoot(room_rays(), np.eye(4))
    depth = torch.where((torch.arange(H)[:, None] + torch.arange(W)) % 2 == 0, 1.0, 3.0)
    with pytest.raises(UserError, match="no surface"):
        fuse([DepthFrame(depth, frame.colour, frame.w2c, frame.intrinsics)])


def test_other_mistakes_are_refused_in_a_sentence() -> None:
    frame = shoot(room_rays(), np.eye(4))
    with pytest.raises(UserError, match="no depth maps"):
        fuse([])
    lost = DepthFrame(frame.depth, frame.colour, torch.full((4, 4), float("nan")), frame.intrinsics)
    with pytest.raises(UserError, match="not finite"):
        fuse([frame, lost])
    for voxel in (0.0, -1.0, float("nan")):
        with pytest.raises(UserError, match="positive size"):
            fuse([frame], voxel=voxel)
    assert MAX_BLOCKS * 512 * 24 < 256 * 2**20
