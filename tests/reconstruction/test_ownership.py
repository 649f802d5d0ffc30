"""Frustum ownership: the compiled rule equals its obvious twin, and copies of a wall go to who was nearest."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lyra.geometry.rotations import axis_angle_to_matrix, world_to_camera
from lyra.reconstruction.ownership import (
    MAX_DIFF_SHARE,
    RELEASED_MAX_DIFF,
    frustum_distance,
    median_distance,
    owned,
    owned_reference,
    prune_foreign,
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
    for chunk in range(chunks):
        fast = owned(means, chunk, groups, max_diff=max_diff, batch=7)
        assert torch.equal(fast, owned_reference(means, chunk, groups, max_diff=max_diff))


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


def test_the_default_tolerance_grows_with_the_scene():
    parts, groups = [scene(WALL), scene(WALL)], walls_seen_from(5.0, 5.5)
    # 0.2 of about 5 is the released metre.
    assert MAX_DIFF_SHARE * median_distance(parts, groups) == pytest.approx(RELEASED_MAX_DIFF, rel=0.1)
    for scale in (0.01, 1.0, 100.0):
        sim3 = Sim3(scale, torch.eye(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64))
        moved = [sim3.apply_to_scene(part) for part in parts]
        views = [sim3.apply_to_cameras(group) for group in groups]
        assert [len(part) for part in prune_foreign(moved, views)] == [3, 3]
    larger = [sim3.apply_to_scene(part) for part in parts]
    assert [len(part) for part in prune_foreign(larger, views, max_diff=RELEASED_MAX_DIFF)] == [3, 0]


def test_chunks_without_gaussians_are_no_trouble():
    parts = [scene(torch.zeros(0, 3)), scene(WALL)]
    assert [len(part) for part in prune_foreign(parts, walls_seen_from(2.0, 2.1))] == [0, 3]
    assert prune_foreign([scene(torch.zeros(0, 3))] * 2, walls_seen_from(2.0, 2.1))[1].means.shape == (0, 3)
