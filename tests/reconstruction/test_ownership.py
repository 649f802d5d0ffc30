"""Frustum ownership: the rule equals its obvious twin, and copies of a wall go to who was nearest and saw it."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lyra.geometry.rotations import axis_angle_to_matrix, world_to_camera
from lyra.reconstruction.chunks import LiftedChunk
from lyra.reconstruction.ownership import (
    RELEASED_MAX_DIFF,
    frustum_distance,
    owned,
    owned_reference,
    prune_foreign,
    seen_depth,
)
from lyra.reconstruction.sim3 import Sim3
from lyra.types import Cameras, GaussianScene

K = torch.tensor([[20.0, 0, 16.0], [0, 20.0, 12.0], [0, 0, 1]], dtype=torch.float64)


def cameras(centres, turns=None):
    centres = torch.as_tensor(centres, dtype=torch.float64)
    turns = torch.zeros_like(centres) if turns is None else turns
    w2c = world_to_camera(axis_angle_to_matrix(turns), centres)
    return Cameras(w2c, K.expand(len(w2c), 3, 3), 24, 32)


def scene(means):
    means = torch.as_tensor(means, dtype=torch.float64)
    count = len(means)
    return GaussianScene(
        means, torch.ones(count, 4), torch.ones(count, 3), torch.arange(count) / count, torch.zeros(count, 1, 3)
    )


def walls_seen_from(*depths):
    """Chunks that look along z from so far in front of the same wall at z = 0."""
    return [cameras([[0.0, 0.0, -depth], [0.1, 0.0, -depth]]) for depth in depths]


WALL = torch.tensor([[0.0, 0.0, 0.0], [0.3, -0.2, 0.0], [-0.4, 0.1, 0.0]], dtype=torch.float64)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10**6), st.integers(1, 4), st.floats(0, 2))
def test_the_rule_equals_its_twin(seed, chunks, max_diff):
    draw = torch.Generator().manual_seed(seed)
    groups = [cameras(*(2 * torch.randn(2, 3, 3, generator=draw, dtype=torch.float64))) for _ in range(chunks)]
    means = 3 * torch.randn(25, 3, generator=draw, dtype=torch.float64)
    grids = [4 * torch.rand(3, 5, 7, generator=draw, dtype=torch.float64) for _ in groups]
    for chunk in range(chunks):
        for depths in (None, grids):
            fast = owned(means, chunk, groups, depths=depths, max_diff=max_diff, batch=7)
            assert torch.equal(fast, owned_reference(means, chunk, groups, depths=depths, max_diff=max_diff))


def test_the_twin_knows_both_outcomes():
    # Otherwise the equality above could be one of constants.
    draw = torch.Generator().manual_seed(0)
    groups = [cameras(*(2 * torch.randn(2, 3, 3, generator=draw, dtype=torch.float64))) for _ in range(3)]
    kept = owned_reference(3 * torch.randn(100, 3, generator=draw, dtype=torch.float64), 0, groups, max_diff=0.3)
    assert 10 < int(kept.sum()) < 95


def test_the_nearer_chunk_keeps_its_copy_and_the_other_one_only_within_the_tolerance():
    groups = walls_seen_from(2.0, 4.0)
    assert owned(WALL, 0, groups, max_diff=0.5).all()
    assert not owned(WALL, 1, groups, max_diff=0.5).any()
    assert owned(WALL, 1, groups, max_diff=2.5).all()


def test_the_third_nearest_chunk_keeps_nothing_however_tolerant():
    groups = walls_seen_from(2.0, 2.1, 2.2)
    assert owned(WALL, 1, groups, max_diff=1.0).all()
    assert not owned(WALL, 2, groups, max_diff=1.0).any()


def test_equally_near_chunks_both_keep_their_copies():
    groups = walls_seen_from(2.0, 2.0, 2.0)
    assert all(owned(WALL, chunk, groups, max_diff=0.0).all() for chunk in range(3))


def test_a_camera_that_does_not_see_a_place_does_not_own_it():
    beside = cameras([[0.0, 0.0, -2.0], [50.0, 0.0, -1.0]])
    behind = cameras([[0.0, 0.0, 0.5]])
    assert owned(WALL, 0, [beside, behind], max_diff=0.0).all()
    # What a chunk's own views do not contain is another's, or its own where no chunk sees it.
    assert not owned(WALL, 1, [beside, behind], max_diff=1e9).any()
    nowhere = WALL + torch.tensor([500.0, 0.0, 0.0], dtype=torch.float64)
    assert owned(nowhere, 1, [beside, behind], max_diff=0.0).all()


def test_a_frustum_ends_at_the_image_border_and_at_the_camera():
    group = cameras([[0.0, 0.0, 0.0]])
    points = torch.tensor(
        [
            [-0.79, 0, 1],
            [-0.81, 0, 1],
            [0.79, 0, 1],
            [0.81, 0, 1],
            [0, 0.59, 1],
            [0, 0.61, 1],
            [0, 0, 0.005],
            [0, 0, -1],
        ],
        dtype=torch.float64,
    )
    inside = [True, False, True, False, True, False, False, False]
    assert frustum_distance(points, group).isfinite().tolist() == inside


def test_pruning_leaves_one_copy_with_all_its_attributes():
    parts = [scene(WALL), scene(WALL + 0.01)]
    groups = walls_seen_from(3.0, 1.0)
    near, far = prune_foreign(parts, groups), prune_foreign(parts, groups, max_diff=10.0)
    assert [len(part) for part in near] == [0, 3]
    assert torch.equal(near[1].opacities, parts[1].opacities)
    assert [len(part) for part in far] == [3, 3]
    assert prune_foreign(parts[:1], groups[:1]) == parts[:1]


def test_without_a_tolerance_only_the_nearest_keeps_its_copy_whatever_the_unit():
    parts, groups = [scene(WALL), scene(WALL)], walls_seen_from(5.0, 5.5)
    assert [len(part) for part in prune_foreign(parts, groups, max_diff=RELEASED_MAX_DIFF)] == [3, 3]
    for scale in (0.01, 1.0, 100.0):
        sim3 = Sim3(scale, torch.eye(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64))
        moved = [sim3.apply_to_scene(part) for part in parts]
        views = [sim3.apply_to_cameras(group) for group in groups]
        assert [len(part) for part in prune_foreign(moved, views)] == [3, 0]


def lifted(group, depth, rows=24, columns=32):
    """A chunk whose views have a Gaussian at each pixel, so far away."""
    y, x = torch.meshgrid(torch.arange(rows).double() + 0.5, torch.arange(columns).double() + 0.5, indexing="ij")
    depth = torch.as_tensor(depth, dtype=torch.float64).expand(len(group), rows, columns)
    rays = torch.stack([(x - 16) / 20, (y - 12) / 20, torch.ones_like(x)], dim=-1)
    local = (rays * depth[..., None]).flatten(1, 2)
    c2w = group.c2w
    means = (local @ c2w[:, :3, :3].transpose(1, 2) + c2w[:, None, :3, 3]).flatten(0, 1)
    return LiftedChunk(tuple(range(len(group))), group, scene(means), (rows, columns))


def test_a_chunk_behind_a_wall_owns_nothing_before_it():
    # One stands 4 before a picture at z = 0, the other one nearer to it, but behind a wall at z = -1.
    before, behind = cameras([[0.0, 0.0, -4.0]]), cameras([[0.0, 0.0, -2.0]])
    picture, wall = lifted(before, 4.0), lifted(behind, 1.0)
    parts, groups = [picture.scene, wall.scene], [before, behind]
    depths = [seen_depth(picture), seen_depth(wall)]
    blind, seeing = prune_foreign(parts, groups), prune_foreign(parts, groups, depths=depths)
    assert len(blind[0]) < 0.8 * len(picture.scene)
    assert len(seeing[0]) == len(picture.scene)
    # Who looks through nothing owns what is there: the picture's copy is nearer, and the other one's goes.
    near = lifted(behind, 2.0)
    depths = [seen_depth(picture), seen_depth(near)]
    again = prune_foreign([picture.scene, near.scene], groups, depths=depths)
    assert len(again[1]) == len(near.scene) and len(again[0]) == len(blind[0])


def test_a_view_sees_as_far_as_its_own_gaussians_but_for_stray_ones():
    group = cameras([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    depth = torch.full((2, 7, 9), 3.0, dtype=torch.float64)
    depth[0, 2, 4] = 0.5
    depth[1, :, 5:] = 9.0
    chunk = lifted(group, depth, 7, 9)
    scales = chunk.scene.scales.clone()
    scales[:18] = -1.0
    chunk = LiftedChunk(
        chunk.frame_ids,
        chunk.cameras,
        GaussianScene(chunk.scene.means, chunk.scene.quats, scales, chunk.scene.opacities, chunk.scene.sh),
        chunk.grid,
    )
    seen = seen_depth(chunk)
    assert seen.shape == (2, 7, 9)
    # Two rows of the first view cannot be shown, so nothing is seen there.
    assert torch.equal(seen[0, :2], torch.zeros(2, 9).double())
    torch.testing.assert_close(seen[0, 2:], torch.full((5, 9), 3.0).double())
    torch.testing.assert_close(seen[1, :, :4], torch.full((7, 4), 3.0).double())
    torch.testing.assert_close(seen[1, :, 6:], torch.full((7, 3), 9.0).double())


def test_chunks_without_gaussians_are_no_trouble():
    parts = [scene(torch.zeros(0, 3)), scene(WALL)]
    groups = walls_seen_from(2.0, 2.1)
    assert [len(part) for part in prune_foreign(parts, groups, max_diff=0.2)] == [0, 3]
    # A chunk that holds nothing owns nothing, though its camera is nearer.
    depths = [torch.zeros(2, 24, 32), torch.full((2, 24, 32), 9.0)]
    assert [len(part) for part in prune_foreign(parts, groups, depths=depths)] == [0, 3]
    assert prune_foreign([scene(torch.zeros(0, 3))] * 2, walls_seen_from(2.0, 2.1))[1].means.shape == (0, 3)
