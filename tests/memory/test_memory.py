"""Retrieval and correspondences against the released outputs, and against slow twins."""

import json

import pytest
import recipe
import torch

from lyra.geometry.warp import forward_warp
from lyra.memory.correspondence import SLOTS, canonical_coordinates, fold_to_cells, target_correspondence
from lyra.memory.history import assemble_history, latent_to_frame, seed_repetitions, temporal_indices
from lyra.memory.retrieval import View, chunk_views, covered_pixels, greedy_coverage, nearest_ownership
from lyra.memory.spatial_cache import MemoryFrame, SpatialCache
from lyra.models.framepack import RELEASED_LAYOUT, FramePackLayout
from tests.conftest import GOLDEN

HEIGHT, WIDTH = 64, 96


@pytest.fixture(scope="module")
def cache(conditioning) -> SpatialCache:
    """Every eighth frame of the wall scene; frame 24 lost the depth of its upper rows, as in the golden run."""
    memory, k = SpatialCache(), conditioning["warp.K"]
    for frame in range(0, 81, 8):
        w2c = conditioning["warp.w2c_all"][frame]
        depth = torch.from_numpy(recipe.wall_depth(w2c.numpy(), k.numpy(), HEIGHT, WIDTH))
        if frame == 24:
            depth[:20] = 0
        memory.write(frame, depth, w2c, k)
    return memory


@pytest.fixture(scope="module")
def views(conditioning) -> list[View]:
    return [View(w2c, conditioning["warp.K"], HEIGHT, WIDTH) for w2c in conditioning["warp.w2c_all"]]


def test_stored_points_are_the_released_ones(cache, conditioning):
    assert (cache.read(24).points - conditioning["retr.world_24"][0]).abs().max() < 1e-5


def test_retrieved_ids_are_the_released_ones(cache, views):
    expected = json.loads((GOLDEN / "retrieval.json").read_text())
    for frame in (80, 60, 30):
        assert greedy_coverage(cache.frames, [views[frame]]) == expected[f"retr.t{frame}"]
        assert nearest_ownership(cache.frames, [views[frame]]) == expected[f"retr_simple.t{frame}"]
    several = chunk_views(views[1:], 4)
    assert greedy_coverage(cache.frames, several) == expected["retr.views4"]
    assert nearest_ownership(cache.frames, several) == expected["retr_simple.views4"]
    assert greedy_coverage(cache.frames[:1], [views[80]]) == expected["retr.only_first"]


def covered_by_loops(frames: list[MemoryFrame], view: View) -> list[set[tuple[int, int]]]:
    """The obvious twin: one point at a time."""
    landed: list[dict[tuple[int, int], list[float]]] = []
    nearest: dict[tuple[int, int], float] = {}
    scale = torch.tensor([0.25, 0.25, 1.0])[:, None]
    for frame in frames:
        cells: dict[tuple[int, int], list[float]] = {}
        for point in frame.points.reshape(-1, 3):
            camera = view.w2c[:3, :3] @ point + view.w2c[:3, 3]
            pixel = (view.intrinsics * scale) @ camera
            z = camera[2].item()
            column, row = (round((pixel[i] / (pixel[2] + 1e-7)).item()) for i in (0, 1))
            if z > 0 and 0 <= row < view.height // 4 and 0 <= column < view.width // 4:
                cells.setdefault((row, column), []).append(z)
                nearest[row, column] = min(z, nearest.get((row, column), float("inf")))
        landed.append(cells)
    return [{c for c, zs in cells.items() if min(zs) <= nearest[c] + 0.1} for cells in landed]


def test_coverage_equals_its_slow_twin(cache, views):
    frames = cache.frames[:3]
    fast = covered_pixels(frames, [views[40]])
    slow = covered_by_loops(frames, views[40])
    for index in range(3):
        cells = {(p // (WIDTH // 4), p % (WIDTH // 4)) for p in fast[index].nonzero()[:, 0].tolist()}
        assert len(cells ^ slow[index]) <= 2  # A point exactly between two cells may round either way.


def test_nothing_is_retrieved_from_an_empty_memory(views):
    assert greedy_coverage([], [views[0]]) == []


def test_canonical_coordinates_and_their_warp_are_the_released_ones(conditioning):
    g = conditioning
    for slot in range(SLOTS):
        assert torch.equal(canonical_coordinates(slot, HEIGHT, WIDTH), g["coords.canonical5"][slot])
    w2c, k = g["warp.w2c_all"], g["warp.K"]
    warped = forward_warp(
        canonical_coordinates(4, HEIGHT, WIDTH), g["warp.depth"][0, 0], w2c[0], k, w2c[1:], k.expand(80, 3, 3)
    )
    for n, frame in enumerate((1, 16, 40, 80)):
        assert (warped.values[frame - 1] - g["coords.warp_slot4[1,16,40,80]"][n]).abs().max() < 1e-5
        assert (warped.depth[frame - 1] - g["coords.warp_slot4_z[1,16,40,80]"][n]).abs().max() < 1e-5


def test_folding_keeps_the_released_channel_order(conditioning):
    assert torch.equal(fold_to_cells(conditioning["warp.img"], 8, 8)[0], conditioning["pix.h8w8_of_img"][0, :, 0])


def test_missing_slots_hold_the_released_dummy(cache, conditioning):
    w2c, k = conditioning["warp.w2c_all"][1:9], conditioning["warp.K"].expand(8, 3, 3)
    out = target_correspondence(cache.frames[:1], w2c, k, height=HEIGHT, width=WIDTH, stride=8, samples_per_cell=8)
    assert out.shape == (1, SLOTS * 256, 2, 8, 12)
    empty = out[:, 256:].unflatten(1, (4, 4, 64))
    assert (empty[:, :, :3] == -1).all()
    assert (empty[:, :, 3] == 1).all()


def test_history_takes_the_anchor_and_the_newest_latents_around_the_spatial_slots():
    layout = FramePackLayout.parse(RELEASED_LAYOUT)
    assert (layout.history_slots, layout.slots) == (25, 45)
    assert layout.spatial_slots == (1, 2, 3, 4, 5)
    assert seed_repetitions(layout) == 97
    chosen = temporal_indices(45, layout)
    assert chosen.tolist() == [0, *range(26, 45)]
    assert latent_to_frame(torch.tensor([0, 24, 25, 44]), layout).tolist() == [0, 0, 4, 80]
    temporal = torch.arange(20.0).view(1, 1, 20, 1, 1)
    spatial = -torch.arange(1.0, 6.0).view(1, 1, 5, 1, 1)
    packed = assemble_history(temporal, spatial, layout).flatten().tolist()
    assert packed == [0, -1, -2, -3, -4, -5, *range(1, 20)]
