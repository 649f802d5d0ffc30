"""The surface: closed, turned towards the cameras, accurate, cleaned, within its budget; also on a procedural world."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import trimesh
from jaxtyping import Float
from scipy.spatial import cKDTree
from skimage.measure import marching_cubes

from lyra.errors import UserError
from lyra.reconstruction.surface import SurfaceSettings, clean_surface, extract_surface, march, opposite_half_edges
from lyra.reconstruction.tsdf import Contraction, DepthFrame, SparseTsdf, fuse
from lyra.training.worlds import MAX_DEPTH, build_world
from lyra.types import TriangleMesh
from tests.reconstruction.test_tsdf import around_sphere, inside_room

ALL = SurfaceSettings(min_component_share=0.0, max_hole_edges=0, max_faces=10**9)
ROOM = np.array([2.0, 1.5, 3.0])


def as_trimesh(mesh: TriangleMesh) -> trimesh.Trimesh:
    return trimesh.Trimesh(mesh.vertices.numpy(), mesh.faces.numpy(), process=False)


def as_mesh(vertices: np.ndarray, faces: np.ndarray) -> TriangleMesh:
    colours = np.random.default_rng(0).integers(0, 255, (len(vertices), 3)).astype(np.uint8)
    return TriangleMesh(torch.from_numpy(vertices).float(), torch.from_numpy(faces).long(), torch.from_numpy(colours))


def filled_field(values: Float[np.ndarray, "x y z"], seen: np.ndarray | None = None) -> SparseTsdf:
    """A field of given values at lattice points from 0 on, in blocks of shuffled order."""
    size = -(-np.array(values.shape) // 8)
    padded = np.zeros(size * 8, np.float32)
    weight = np.zeros(size * 8, np.float32)
    inner = tuple(slice(0, n) for n in values.shape)
    padded[inner], weight[inner] = values, 1.0 if seen is None else seen
    blocks = np.stack(np.meshgrid(*[np.arange(n) for n in size], indexing="ij"), -1).reshape(-1, 3)
    blocks = blocks[np.random.default_rng(1).permutation(len(blocks))]

    def cut(array: np.ndarray) -> np.ndarray:
        return np.stack([array[tuple(slice(8 * b, 8 * b + 8) for b in block)] for block in blocks])

    colour = np.stack(np.broadcast_arrays(*np.ogrid[tuple(slice(0, 8 * n) for n in size)]), -1).astype(np.uint8)
    space = Contraction(np.zeros(3), 1e6)
    return SparseTsdf(blocks.astype(np.int32), cut(padded), cut(weight), cut(colour), 1.0, 4.0, space)


def borders(mesh: TriangleMesh) -> int:
    """Half-edges without exactly one neighbour that runs the other way."""
    return int((opposite_half_edges(mesh.faces.numpy()) < 0).sum())


# ---- marching cubes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_any_closed_field_gives_a_closed_surface(seed: int) -> None:
    # Noise has all 256 cases, with all kinds of ambiguous faces; its border is made to be free space.
    values = np.random.default_rng(seed).normal(size=(19, 17, 18))
    for axis in range(3):
        for end in (0, -1):
            values[(slice(None),) * axis + (end,)] = 1.0
    triangles = march(filled_field(values))
    assert len(triangles.faces) > 5000
    assert (opposite_half_edges(triangles.faces) >= 0).all()


def test_marching_agrees_with_scikit_image_on_a_smooth_field() -> None:
    index = np.stack(np.meshgrid(*[np.arange(27.0)] * 3, indexing="ij"), -1)
    values = np.linalg.norm((index - 13.2) * [1, 0.8, 1.2], axis=-1) - 8.3 + 0.3 * np.sin(index[..., 0])
    triangles = march(filled_field(values))
    vertices, faces, _, _ = marching_cubes(values.astype(np.float32), 0.0)
    ours, theirs = trimesh.Trimesh(triangles.vertices, triangles.faces), trimesh.Trimesh(vertices, faces)
    assert len(triangles.vertices) == len(vertices)
    # Distances nearer to zero than a thousandth of a voxel are moved away from it.
    assert cKDTree(vertices).query(triangles.vertices)[0].max() < 0.02
    assert ours.area == pytest.approx(theirs.area, rel=2e-3)
    assert ours.volume == pytest.approx(abs(theirs.volume), rel=1e-3)
    assert ours.volume > 0


def test_cubes_with_an_unmeasured_corner_have_no_surface() -> None:
    values = np.broadcast_to(np.arange(16.0) - 7.4, (16, 16, 16))
    seen = np.ones((16, 16, 16))
    seen[5, 5, 7] = 0
    whole, holed = march(filled_field(values)), march(filled_field(values, seen))
    assert len(whole.faces) == 2 * 15 * 15
    assert len(holed.faces) == 2 * (15 * 15 - 4)
    np.testing.assert_allclose(whole.vertices[:, 2], 7.4, atol=1e-5)
    # Colour is the lattice position.
    np.testing.assert_allclose(whole.colours, whole.vertices, atol=1e-5)


# ---- exact geometry ----------------------------------------------------------------------------------------------


def test_a_sphere_is_watertight_round_and_turned_outwards() -> None:
    field = fuse(around_sphere(20), voxel=0.05)
    mesh = as_trimesh(extract_surface(field, ALL))
    assert mesh.is_watertight and mesh.is_winding_consistent
    assert mesh.body_count == 1 and mesh.euler_number == 2
    assert mesh.volume == pytest.approx(4 / 3 * np.pi, rel=0.01)
    error = np.abs(np.linalg.norm(mesh.vertices, axis=1) - 1)
    assert np.median(error) < 0.1 * field.voxel
    assert (mesh.face_normals * mesh.triangles_center).sum(1).min() > 0


def test_a_room_is_accurate_and_faces_the_cameras() -> None:
    frames = inside_room()
    field = fuse(frames)
    mesh = extract_surface(field)
    shape = as_trimesh(mesh)
    median_depth = float(torch.cat([f.depth.flatten() for f in frames]).median())
    error = np.abs(ROOM - np.abs(shape.vertices)).min(1)
    assert np.median(error) < min(0.01 * median_depth, 0.3 * field.voxel)
    assert np.quantile(error, 0.95) < 0.01 * median_depth
    eye = np.linalg.inv(frames[0].w2c.numpy())[:3, 3]
    towards = (shape.face_normals * (eye - shape.triangles_center)).sum(1)
    assert (towards > 0).mean() > 0.99
    # Colour is a function of the place (see `shoot`).
    expected = (np.cos(shape.vertices) + 1) * 127.5
    assert np.median(np.abs(mesh.colours.numpy() - expected)) < 3


def test_a_finer_voxel_gives_a_finer_mesh() -> None:
    coarse, fine = (extract_surface(fuse(around_sphere(), voxel=v), ALL) for v in (0.08, 0.04))
    assert 3 < len(fine.faces) / len(coarse.faces) < 5
    errors = [np.abs(m.vertices.norm(dim=1).numpy() - 1).mean() for m in (coarse, fine)]
    assert errors[1] < errors[0]


# ---- cleaning ----------------------------------------------------------------------------------------------------


def pierced_sphere(rings: float) -> trimesh.Trimesh:
    """A sphere without the faces within an angle (in edges of the mesh) of its top."""
    sphere = trimesh.creation.icosphere(4)
    angle = np.arccos(sphere.triangles_center[:, 2])
    sphere.update_faces(angle > rings * 0.07)
    sphere.remove_unreferenced_vertices()
    return sphere


def test_small_holes_are_closed_and_large_ones_stay() -> None:
    small, large = pierced_sphere(4.0), pierced_sphere(12.0)
    settings = SurfaceSettings(max_faces=10**9)
    closed = clean_surface(as_mesh(small.vertices, small.faces), settings)
    assert not small.is_watertight and as_trimesh(closed).is_watertight
    assert as_trimesh(closed).volume == pytest.approx(trimesh.creation.icosphere(4).volume, rel=0.01)
    assert len(closed.vertices) == len(small.vertices)
    still_open = clean_surface(as_mesh(large.vertices, large.faces), settings)
    assert len(still_open.faces) == len(large.faces) and borders(still_open) > 64


def test_the_outer_border_of_an_open_piece_is_no_hole() -> None:
    x, y = np.meshgrid(np.arange(6.0), np.arange(6.0), indexing="ij")
    vertices = np.stack([x, y, 0 * x], -1).reshape(-1, 3)
    corner = (np.arange(6)[:5, None] * 6 + np.arange(5)).reshape(-1)
    faces = np.concatenate(
        [np.stack([corner, corner + 6, corner + 7], 1), np.stack([corner, corner + 7, corner + 1], 1)]
    )
    middle = faces[(np.abs(vertices[faces].mean(1)[:, :2] - 2.5) > 0.5).any(1)]
    mesh = clean_surface(as_mesh(vertices, middle))
    # The hole in the middle is closed with two triangles, the outer border of 20 edges is not.
    assert len(middle) == 48 and len(mesh.faces) == 50 and borders(mesh) == 20
    assert as_trimesh(mesh).face_normals[:, 2].min() > 0.99


def test_holes_that_touch_at_a_point_are_both_closed() -> None:
    sphere = trimesh.creation.icosphere(3)
    inner = np.flatnonzero(sphere.vertices[:, 2] > 0.8)
    one = inner[0]
    ring = [f for f in range(len(sphere.faces)) if one in sphere.faces[f]]
    # Two of the faces around a vertex that do not share an edge.
    apart = next((a, b) for a in ring for b in ring if a < b and len(set(sphere.faces[a]) & set(sphere.faces[b])) == 1)
    faces = np.delete(sphere.faces, apart, axis=0)
    closed = clean_surface(as_mesh(sphere.vertices, faces))
    assert len(closed.faces) == len(sphere.faces) and borders(closed) == 0


def test_scraps_are_dropped_and_the_largest_piece_never() -> None:
    large, small = trimesh.creation.icosphere(3), trimesh.creation.icosphere(2, 0.03)
    small.apply_translation([3, 0, 0])
    both = trimesh.util.concatenate([large, small])
    mesh = clean_surface(as_mesh(both.vertices, both.faces))
    assert len(mesh.faces) == len(large.faces) and len(mesh.vertices) == len(large.vertices)
    kept = clean_surface(as_mesh(both.vertices, both.faces), SurfaceSettings(min_component_share=1e-4))
    assert len(kept.faces) == len(both.faces)
    alone = clean_surface(as_mesh(small.vertices, small.faces), SurfaceSettings(min_component_share=2.0))
    assert len(alone.faces) == len(small.faces)


def test_far_scraps_count_by_how_large_they_look() -> None:
    # The far sphere has a hundred times the area and looks a thirtieth as wide.
    near, far = trimesh.creation.icosphere(3, 1.0), trimesh.creation.icosphere(3, 10.0)
    far.apply_translation([1000, 0, 0])
    both = trimesh.util.concatenate([near, far])
    mesh = as_mesh(both.vertices, both.faces)
    settings = SurfaceSettings(min_component_share=0.05)
    assert clean_surface(mesh, settings).vertices[:, 0].min() > 900
    seen = clean_surface(mesh, settings, Contraction(np.array([0.0, 0.0, 3.0]), 4.0))
    assert seen.vertices[:, 0].max() < 2


@pytest.mark.parametrize("budget", [4000, 700])
def test_decimation_keeps_the_budget_the_shape_and_the_colours(budget: int) -> None:
    sphere = trimesh.creation.icosphere(5)
    mesh = as_mesh(sphere.vertices, sphere.faces)
    smooth = (sphere.vertices + 1) * 127
    mesh = TriangleMesh(mesh.vertices, mesh.faces, torch.from_numpy(smooth).to(torch.uint8))
    light = clean_surface(mesh, SurfaceSettings(max_faces=budget))
    shape = as_trimesh(light)
    assert 0.9 * budget < len(light.faces) <= budget
    assert shape.is_watertight and shape.volume == pytest.approx(sphere.volume, rel=0.02)
    assert np.abs(np.linalg.norm(shape.vertices, axis=1) - 1).max() < 0.03
    # Every vertex has the mean colour of those that it stands for, which are about it.
    edge = float(np.median(shape.edges_unique_length))
    assert np.abs(light.colours.numpy() - (shape.vertices + 1) * 127).max() < 127 * edge


def test_even_a_tangle_keeps_the_budget() -> None:
    rng = np.random.default_rng(0)
    mesh = as_mesh(rng.normal(size=(120, 3)), rng.integers(0, 120, (1200, 3)))
    light = clean_surface(mesh, SurfaceSettings(max_faces=300))
    assert len(light.faces) == 300 and torch.isfinite(light.vertices).all()


def test_a_field_without_a_surface_is_refused_in_a_sentence() -> None:
    with pytest.raises(UserError, match=r"^The depth maps hold too little surface .*\.$"):
        extract_surface(filled_field(np.ones((8, 8, 8))))
    nothing = TriangleMesh(torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.long), torch.zeros(0, 3, dtype=torch.uint8))
    with pytest.raises(UserError, match=r"^The mesh has no triangle .*\.$"):
        clean_surface(nothing)


# ---- a procedural world ------------------------------------------------------------------------------------------


def test_a_procedural_world_is_accurate_and_complete_from_other_views() -> None:
    world, rng, size = build_world("hall", 4), np.random.default_rng(2), (90, 160)
    k = world.random_intrinsics(rng, *size)
    poses = world.random_walk(rng, 41)
    frames = []
    for pose in poses[::4]:
        view, black = world.render(pose, k, *size, shading=False), torch.zeros(3, *size)
        frames.append(DepthFrame(torch.from_numpy(view.depth), black, *(torch.tensor(a).float() for a in (pose, k))))
    mesh = extract_surface(fuse(frames))
    shape = as_trimesh(mesh)
    points = shape.triangles_center
    # Accuracy: from some camera, the first thing in the direction of a triangle is there.
    eyes = np.linalg.inv(poses[::4])[:, :3, 3]
    error = np.full(len(points), np.inf)
    facing = np.zeros(len(points), bool)
    for eye in eyes:
        t, _ = world.cast_rays(np.repeat(eye[None], len(points), 0), points - eye, 3.0)
        error = np.minimum(error, np.abs(t - 1))
        facing |= ((eye - points) * shape.face_normals).sum(1) > 0
    assert np.median(error) < 0.002
    assert np.quantile(error, 0.95) < 0.02
    assert facing.mean() > 0.99
    # Completeness: what views between the fused ones see has a triangle near it, if a fused view saw it too.
    tree = cKDTree(np.concatenate([points, shape.vertices]))
    near = []
    for pose in poses[2::8]:
        view = world.render(pose, k, *size, shading=False)
        v, u = np.nonzero(view.depth[2:-2, 2:-2] < MAX_DEPTH)
        z = view.depth[v + 2, u + 2].astype(np.float64)
        c2w = np.linalg.inv(pose)
        seen = (np.linalg.inv(k) @ np.stack([u + 2, v + 2, np.ones_like(u)]) * z).T @ c2w[:3, :3].T + c2w[:3, 3]
        near.append(tree.query(seen)[0] < 0.02 * z + 2 * z / k[0, 0])
    assert np.concatenate(near).mean() > 0.9
