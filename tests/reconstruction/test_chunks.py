"""Chunks: which frames they take, and that their Gaussians come back into one world."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from lyra.errors import UserError
from lyra.geometry.rotations import axis_angle_to_matrix, rotation_angle, world_to_camera
from lyra.models.depth_anything.alignment import camera_centres
from lyra.reconstruction.chunks import (
    ChunkAlignment,
    LiftedChunk,
    align_chunk,
    align_chunks,
    plan_chunks,
    point_pairs,
    take,
)
from lyra.reconstruction.gaussians import join_scenes
from lyra.reconstruction.ownership import prune_foreign
from lyra.reconstruction.sim3 import Sim3
from lyra.types import Cameras, GaussianScene

ROWS, COLUMNS = 24, 32
K = torch.tensor([[20.0, 0, 16.0], [0, 20.0, 12.0], [0, 0, 1]], dtype=torch.float64)
ROOM = torch.tensor([[-2.5, -1.5, -1.0], [2.5, 1.5, 9.0]], dtype=torch.float64)
PILLARS = torch.tensor(
    [[[-1.6, -1.5, 2.5], [-1.1, 1.5, 3.0]], [[1.0, -0.2, 4.0], [1.9, 1.5, 4.9]], [[-1.9, 0.4, 5.5], [-0.9, 1.5, 6.4]]],
    dtype=torch.float64,
)


def slabs(centre, rays, box):
    """Ray parameters at which rays enter and leave a box."""
    first, second = (box[0] - centre) / rays, (box[1] - centre) / rays
    return torch.minimum(first, second).amax(-1), torch.maximum(first, second).amin(-1)


def room_depth(w2c):
    """Exact z depth of a room with pillars."""
    y, x = torch.meshgrid(
        torch.arange(ROWS, dtype=torch.float64), torch.arange(COLUMNS, dtype=torch.float64), indexing="ij"
    )
    pixels = torch.stack([x + 0.5, y + 0.5, torch.ones_like(x)], dim=-1)
    c2w = torch.linalg.inv(w2c)
    rays = (pixels @ torch.linalg.inv(K).T) @ c2w[:3, :3].T
    depth = slabs(c2w[:3, 3], rays, ROOM)[1]
    for pillar in PILLARS:
        enter, leave = slabs(c2w[:3, 3], rays, pillar)
        depth = torch.where((enter < leave) & (enter > 0), torch.minimum(depth, enter), depth)
    return depth, c2w[:3, 3] + rays * depth[..., None]


def out_and_back(count):
    """A walk into the room and the same way back, with swaying looks; frame i is where frame -1 - i is."""
    half = torch.linspace(0, 1, count // 2, dtype=torch.float64)
    there = torch.cat([half, half.flip(0)])
    centre = torch.stack([0.3 * torch.sin(6 * there), 0.1 * torch.cos(5 * there), 3.5 * there], dim=-1)
    look = torch.stack([0.08 * torch.sin(9 * there), 0.5 * torch.sin(7 * there), torch.zeros_like(there)], dim=-1)
    return world_to_camera(axis_angle_to_matrix(look).transpose(1, 2), centre)


def lifted(w2c, frame_ids, noise=0.0, outliers=0.0, seed=0):
    """Gaussians of exact views, their depth off by a share of itself and some of them anywhere."""
    draw = torch.Generator().manual_seed(seed)
    means = []
    for view in w2c:
        depth, points = room_depth(view)
        centre = camera_centres(view[None])[0]
        factor = 1 + noise * torch.randn(depth.shape, generator=draw, dtype=torch.float64)
        wild = torch.rand(depth.shape, generator=draw) < outliers
        factor = torch.where(wild, 0.3 + 5 * torch.rand(depth.shape, generator=draw, dtype=torch.float64), factor)
        means.append((centre + (points - centre) * factor[..., None]).flatten(0, 1))
    count = len(w2c) * ROWS * COLUMNS
    scene = GaussianScene(
        means=torch.cat(means),
        quats=torch.tensor([1.0, 0, 0, 0], dtype=torch.float64).expand(count, 4),
        scales=torch.full((count, 3), 0.05, dtype=torch.float64),
        opacities=torch.full((count,), 0.9, dtype=torch.float64),
        sh=torch.zeros(count, 1, 3, dtype=torch.float64),
    )
    cameras = Cameras(w2c, K.expand(len(w2c), 3, 3), ROWS, COLUMNS)
    return LiftedChunk(tuple(frame_ids), cameras, scene, (ROWS, COLUMNS))


def random_sim3(seed):
    draw = torch.Generator().manual_seed(seed)
    turn, move = torch.randn(2, 3, generator=draw, dtype=torch.float64)
    return Sim3(float(torch.exp(0.7 * torch.randn(1, generator=draw))), axis_angle_to_matrix(turn), 3 * move)


def shaken(chunk, seed, degrees=0.2, distance=0.01):
    """The chunk with cameras that are a little off."""
    draw = torch.Generator().manual_seed(seed)
    turn = torch.deg2rad(torch.tensor(degrees)) * torch.randn(len(chunk.cameras), 3, generator=draw).double()
    w2c = chunk.cameras.w2c.clone()
    w2c[:, :3] = axis_angle_to_matrix(turn) @ w2c[:, :3]
    w2c[:, :3, 3] += distance * torch.randn(len(w2c), 3, generator=draw).double()
    return replace(chunk, cameras=Cameras(w2c, chunk.cameras.intrinsics, ROWS, COLUMNS))


# Which frames.


def test_chunks_worked_by_hand():
    # 3 chunks of 5 that share 3 need 9 frames, of 17 every second one.
    plan = plan_chunks(17, chunks=3, size=5, overlap=3)
    assert plan.chunks == ((0, 2, 4, 6, 8), (4, 6, 8, 10, 12), (8, 10, 12, 14, 16))
    assert plan.frames == tuple(range(0, 17, 2))
    # floor(linspace(0, 9, 7)) = floor(0, 1.5, 3, 4.5, 6, 7.5, 9).
    plan = plan_chunks(10, chunks=2, size=5, overlap=3)
    assert plan.chunks == ((0, 1, 3, 4, 6), (3, 4, 6, 7, 9))


def test_the_released_defaults_need_364_frames_for_three_chunks():
    plan = plan_chunks(364, chunks=3)
    assert plan.frames == tuple(range(364))
    assert [chunk[0] for chunk in plan.chunks] == [0, 118, 236]
    assert {len(chunk) for chunk in plan.chunks} == {128}
    with pytest.raises(UserError, match="364 frames"):
        plan_chunks(363, chunks=3)


def test_one_chunk_takes_what_there_is():
    assert plan_chunks(4).chunks == ((0, 1, 2, 3),)
    assert plan_chunks(1).chunks == ((0,),)
    assert plan_chunks(9, size=5).chunks == ((0, 2, 4, 6, 8),)


def test_longer_videos_get_more_chunks_unless_told_otherwise():
    assert [len(plan_chunks(count).chunks) for count in (81, 500, 501, 1281)] == [1, 1, 2, 3]
    assert len(plan_chunks(1281, chunks=1).chunks) == 1
    # As many as fit: 3 chunks of 500 that share 10 need 1480 frames.
    assert len(plan_chunks(1281, size=500).chunks) == 2


def test_split_frames_end_segments_and_shared_views_come_from_the_chunk_before():
    plan = plan_chunks(30, size=6, overlap=3, split_frames=(10, 19))
    # floor(linspace(0, 10, 6)); then 3 of frames 11 to 19; then 3 of frames 20 to 29.
    assert plan.chunks == ((0, 2, 4, 6, 8, 10), (6, 8, 10, 11, 15, 19), (11, 15, 19, 20, 24, 29))


@pytest.mark.parametrize(
    ("count", "options", "says"),
    [
        (0, {}, "at least one frame"),
        (100, {"chunks": 0}, "0 chunks"),
        (100, {"chunks": 2, "size": 10, "overlap": 2}, "at least 3"),
        (100, {"chunks": 2, "size": 10, "overlap": 10}, "smaller"),
        (100, {"chunks": 3, "split_frames": (50,), "size": 10, "overlap": 3}, "2 chunks and not 3"),
        (100, {"split_frames": (50, 50), "size": 10, "overlap": 3}, "grow"),
        (100, {"split_frames": (99,), "size": 10, "overlap": 3}, "between 0 and 98"),
        (100, {"split_frames": (-1,), "size": 10, "overlap": 3}, "between 0 and 98"),
        (100, {"split_frames": (5,), "size": 10, "overlap": 3}, "needs 10"),
    ],
)
def test_plans_that_cannot_be_are_refused_in_one_sentence(count, options, says):
    with pytest.raises(UserError, match=says) as refusal:
        plan_chunks(count, **options)
    assert str(refusal.value).endswith(".") and "\n" not in str(refusal.value)


# One fit.


@pytest.fixture(scope="module")
def shared():
    """Six views of the room."""
    return lifted(out_and_back(40)[4:10], range(4, 10))


@pytest.mark.parametrize("rule", ["orientations", "centres"])
def test_a_known_similarity_is_recovered_from_noisy_points_with_outliers(rule):
    w2c = out_and_back(40)[4:10]
    source, target = (lifted(w2c, range(6), noise=0.01, outliers=0.1, seed=seed) for seed in (1, 2))
    known = random_sim3(5)
    fit = align_chunk(source.moved(known.inverse()), target, ChunkAlignment(rule=rule))
    assert fit.method == "cameras and points" and fit.pairs > 4000
    assert fit.sim3.scale == pytest.approx(known.scale, rel=0.005)
    assert float(torch.rad2deg(rotation_angle(fit.sim3.rotation, known.rotation))) < 0.3
    moved = fit.sim3.apply_to_points(camera_centres(source.moved(known.inverse()).cameras.w2c))
    assert (moved - camera_centres(w2c)).norm(dim=1).max() < 0.02


def test_trimming_is_what_keeps_outliers_out():
    w2c = out_and_back(40)[4:10]
    source, target = (lifted(w2c, range(6), noise=0.01, outliers=0.1, seed=seed) for seed in (1, 2))
    errors = [abs(align_chunk(source, target, ChunkAlignment(max_iters=rounds)).sim3.scale - 1) for rounds in (0, 3)]
    assert errors[0] > 10 * errors[1]


def test_one_nan_leaves_its_own_pair_out_and_no_other(shared):
    means = shared.scene.means.clone()
    means[7] = torch.nan
    hurt = replace(shared, scene=replace(shared.scene, means=means))
    whole, without = point_pairs(shared, shared, ChunkAlignment()), point_pairs(hurt, shared, ChunkAlignment())
    assert len(without.weights) == len(whole.weights) - 1
    assert torch.equal(without.source, without.target)
    assert align_chunk(hurt, shared).sim3.scale == pytest.approx(1, abs=1e-12)
    # The first view's pairs are one fewer, the others the same to the last bit.
    assert torch.equal(without.source[ROWS * COLUMNS - 1 :], whole.source[ROWS * COLUMNS :])


def test_gaussians_behind_their_camera_are_no_pairs(shared):
    scales = shared.scene.scales.clone()
    scales[:100] = -0.05
    turned = replace(shared, scene=replace(shared.scene, scales=scales))
    assert len(point_pairs(shared, turned, ChunkAlignment()).weights) == 6 * ROWS * COLUMNS - 100


def test_near_points_weigh_more_up_to_a_limit(shared):
    pairs = point_pairs(shared, shared, ChunkAlignment())
    depth = torch.cat([room_depth(view)[0].flatten() for view in shared.cameras.w2c])
    view = slice(0, ROWS * COLUMNS)
    expected = 1 / depth[view]
    expected = expected.clamp(max=float(np.quantile(expected.numpy(), 0.98)))
    torch.testing.assert_close(pairs.weights[view], expected / expected.mean())
    assert float(pairs.weights.mean()) == pytest.approx(1)
    flat = point_pairs(shared, shared, ChunkAlignment(inv_depth_power=0.0))
    torch.testing.assert_close(flat.weights, torch.ones_like(flat.weights))


def test_points_are_evenly_strided(shared):
    pairs = point_pairs(shared, shared, ChunkAlignment(max_points_per_frame=100))
    assert len(pairs.weights) == 600
    wanted = torch.from_numpy(np.linspace(0, ROWS * COLUMNS - 1, 100).astype(int))
    assert torch.equal(pairs.source[:100], shared.scene.means[wanted])


def test_with_few_points_the_cameras_are_aligned(shared):
    known = random_sim3(3)
    fit = align_chunk(shared.moved(known.inverse()), shared, ChunkAlignment(max_points_per_frame=10))
    assert (fit.method, fit.pairs) == ("cameras", 60)
    assert fit.sim3.scale == pytest.approx(known.scale, rel=1e-6)


def test_cameras_that_stand_still_get_their_scale_from_points_or_keep_it():
    w2c = out_and_back(40)[4:10]
    w2c[:, :3, 3] = 0
    turning, known = lifted(w2c, range(6)), random_sim3(8)
    moved = turning.moved(known.inverse())
    assert align_chunk(moved, turning).sim3.scale == pytest.approx(known.scale, rel=1e-6)
    fit = align_chunk(moved, turning, ChunkAlignment(min_points=10**6))
    assert (fit.method, fit.sim3.scale) == ("orientations", 1.0)
    assert rotation_angle(fit.sim3.rotation, known.rotation) < 1e-6


# All chunks.

SIZE, OVERLAP, CHUNKS = 10, 4, 6


@pytest.fixture(scope="module")
def walk():
    """Six chunks of a walk out and back, each with noise of its own and in a world of its own."""
    plan = plan_chunks(40, chunks=CHUNKS, size=SIZE, overlap=OVERLAP)
    assert len(plan.frames) == 40
    w2c = out_and_back(40)
    return [
        shaken(lifted(w2c[list(ids)], ids, noise=0.01, outliers=0.05, seed=index), index).moved(random_sim3(index))
        for index, ids in enumerate(plan.chunks)
    ]


def relative_gaps(aligned):
    """Distance between the two copies of what the first and the last view both see, as a share of its depth."""
    back = random_sim3(0).inverse()
    views = [aligned[0].views(0, 3).moved(back), aligned[-1].views(len(aligned[-1].frame_ids) - 3, SIZE).moved(back)]
    first = views[0].points()
    last = views[1].points().flip(0)
    depth = torch.stack([room_depth(view)[0].flatten() for view in out_and_back(40)[:3]])
    return (first - last).norm(dim=-1) / depth


def test_a_walk_out_and_back_comes_back_as_one_scene(walk):
    aligned = [part.chunk for part in align_chunks(walk, OVERLAP)]
    assert [len(chunk.frame_ids) for chunk in aligned] == [SIZE] + [SIZE - OVERLAP] * (CHUNKS - 1)
    gaps = relative_gaps(aligned)
    # Two copies with 1 % of depth noise each differ by 1 % in the median; drift over five seams adds little.
    assert float(gaps.median()) < 0.02
    assert float((gaps < 0.05).double().mean()) > 0.85


def test_the_same_walk_without_alignment_is_six_scenes(walk):
    apart = [chunk if index == 0 else chunk.views(OVERLAP, SIZE) for index, chunk in enumerate(walk)]
    assert float(relative_gaps(apart).median()) > 0.3


def test_the_joined_scene_lies_on_the_walls_and_in_order(walk):
    aligned = [part.chunk for part in align_chunks(walk, OVERLAP)]
    assert [frame for chunk in aligned for frame in chunk.frame_ids] == list(range(40))
    parts = [take(chunk.scene, chunk.usable) for chunk in aligned]
    kept = prune_foreign(parts, [chunk.cameras for chunk in aligned], max_diff=0.0)
    scene = random_sim3(0).inverse().apply_to_scene(join_scenes(kept))
    assert 0.3 * sum(map(len, parts)) < len(scene) < 0.8 * sum(map(len, parts))
    boxes = torch.cat([ROOM[None], PILLARS])
    outside = torch.maximum(boxes[:, 0] - scene.means[:, None], scene.means[:, None] - boxes[:, 1])
    # Distance to the nearest face of each box, from inside or outside.
    distance = torch.where((outside <= 0).all(-1), outside.amax(-1).abs(), outside.clamp(min=0).norm(dim=-1)).amin(
        dim=1
    )
    assert float(distance.median()) < 0.05
    assert float((distance < 0.25).double().mean()) > 0.9
    places = [camera_centres(chunk.moved(random_sim3(0).inverse()).cameras.w2c) for chunk in aligned]
    wanted = camera_centres(out_and_back(40))
    # Per cent of the path's length.
    assert (torch.cat(places) - wanted).norm(dim=1).max() < 0.02 * wanted.diff(dim=0).norm(dim=1).sum()
