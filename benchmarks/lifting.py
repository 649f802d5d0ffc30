"""Measures stage two on procedural worlds with exact geometry: splats at held-out poses, the mesh, what fusion saves.

Run with `python benchmarks/lifting.py` on an idle machine; writes benchmarks/lifting.json, which the README quotes.
Walks of 81 frames at 480x832 through worlds that nothing was trained on; every 8th frame is lifted, and the views
that are compared lie halfway between the frames that were lifted.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from scipy.spatial import cKDTree
from skimage.metrics import structural_similarity
from torch import Tensor

from lyra.config import MeshJob, ReconstructJob
from lyra.depth.base import align_depth
from lyra.export.video import write_video
from lyra.generation.walkthrough import from_uint8
from lyra.geometry.cameras import unproject
from lyra.lifting import mesh, reconstruct
from lyra.metrics.image import psnr_db
from lyra.pipeline import LyraPipeline
from lyra.progress import Progress
from lyra.reconstruction.base import Walkthrough
from lyra.reconstruction.gaussians import GeometricLift, lift_frame, lifted_frames
from lyra.reconstruction.rasterizer import choose_renderer
from lyra.training.data import HELD_OUT_SEEDS
from lyra.training.worlds import build_world
from lyra.types import Cameras, GaussianScene, TriangleMesh
from lyra.world import World

ROOT = Path(__file__).resolve().parent.parent
HEIGHT, WIDTH, FRAMES = 480, 832, 81
FAMILIES = ("room", "hall", "street", "square", "ruins", "forest")
MEASURED = 4
"""Depth is known of every n-th frame, as in a world that was generated."""
TESTED = tuple(range(6, FRAMES, 16))
"""Frames that are compared; none is lifted, and none has depth."""
SAMPLES = 100_000
"""Points of the true and of the made surface that are compared."""


@dataclass(frozen=True)
class Walked:
    """A walk through a procedural world with all that is true of it."""

    frames: UInt8[Tensor, "t 3 h w"]
    cameras: Cameras
    depth: dict[int, Float[Tensor, "h w"]]
    """Of every measured and every tested frame."""
    sky: dict[int, Bool[Tensor, "h w"]]


@dataclass(frozen=True)
class SceneQuality:
    """Splats against the true frames of `TESTED`; means over them."""

    psnr_db: float
    ssim: float
    splats: int
    splats_without_fusion: int
    """One for each 2x2 pixels of the same frames."""


@dataclass(frozen=True)
class MeshQuality:
    """A mesh against the true surface that the walk shows; distances are shares of the median depth."""

    accuracy_median: float
    """From the mesh to the true surface."""
    completeness_median: float
    """From the true surface to the mesh."""
    completeness_within_2_percent: float
    seconds: float


@dataclass(frozen=True)
class FamilyResult:
    """One world."""

    family: str
    exact: SceneQuality
    predicted: SceneQuality
    concatenated: SceneQuality
    """Exact depth, all frames' Gaussians without leaving out what earlier frames show."""
    mesh: MeshQuality


def walk_through(family: str, seed: int) -> Walked:
    """Photograph a walk."""
    rng = np.random.default_rng(seed)
    world = build_world(family, seed, texture_seed=1)
    intrinsics, poses = world.random_intrinsics(rng, HEIGHT, WIDTH), world.random_walk(rng, FRAMES)
    frames, depth, sky = [], {}, {}
    for index, pose in enumerate(poses):
        view = world.render(pose, intrinsics, HEIGHT, WIDTH, supersample=2)
        frames.append(torch.from_numpy(view.rgb).movedim(-1, 0))
        if index % MEASURED == 0 or index in TESTED:
            depth[index], sky[index] = torch.from_numpy(view.depth), torch.from_numpy(view.sky)
    w2c = torch.from_numpy(np.asarray(poses, np.float32))
    k = torch.from_numpy(np.asarray(intrinsics, np.float32)).expand(FRAMES, 3, 3)
    return Walked(torch.stack(frames), Cameras(w2c, k, HEIGHT, WIDTH), depth, sky)


def predicted_depth(walked: Walked, pipeline: LyraPipeline) -> dict[int, Float[Tensor, "h w"]]:
    """The shipped network's depth of the measured frames, each scaled to the truth by the median of their ratio.

    In a walkthrough the scale comes from what the memory sees of the earlier frames; here the truth stands for that.
    """
    found = {}
    for index in range(0, FRAMES, MEASURED):
        prediction = pipeline.depth.predict(from_uint8(walked.frames[index])[None])
        ground = ~walked.sky[index] & ~prediction.sky[0]
        found[index] = align_depth(prediction.depth[0], walked.depth[index], ground)
    return found


def scene_quality(scene: GaussianScene, walked: Walked, without_fusion: int) -> SceneQuality:
    """Render the tested frames and compare."""
    renderer = choose_renderer(scene)
    psnr, ssim = [], []
    for index in TESTED:
        view = renderer.render(walked.cameras.w2c[index], walked.cameras.intrinsics[index], HEIGHT, WIDTH)
        true = walked.frames[index].float() / 255
        psnr.append(psnr_db(view.colours, true, peak=1.0))
        ssim.append(structural_similarity(view.colours.numpy(), true.numpy(), channel_axis=0, data_range=1.0))
    return SceneQuality(round(statistics.mean(psnr), 2), round(statistics.mean(ssim), 4), len(scene), without_fusion)


def concatenated(walked: Walked, depth: dict[int, Tensor]) -> GaussianScene:
    """Every lifted frame's Gaussians, none left out."""
    from lyra.reconstruction.gaussians import join_scenes

    ids = [i for i in depth if i % 8 == 0]
    frames = lifted_frames(
        {i: from_uint8(walked.frames[i]) for i in ids}, {i: depth[i].clamp(max=150) for i in ids}, walked.cameras
    )
    every = torch.ones(HEIGHT, WIDTH, dtype=torch.bool)
    return join_scenes([lift_frame(frame, frame.depth, every) for frame in frames])


def mesh_quality(surface: TriangleMesh, walked: Walked, seconds: float) -> MeshQuality:
    """Distances between the mesh and the points that the true depth of all known frames describes."""
    true_points, depths = [], []
    for index, depth in walked.depth.items():
        near = ~walked.sky[index] & (depth < 200)
        points = unproject(depth, walked.cameras.w2c[index], walked.cameras.intrinsics[index])
        true_points.append(points[near])
        depths.append(depth[near])
    median_depth = float(torch.cat(depths).median())
    g = torch.Generator().manual_seed(0)
    true = torch.cat(true_points)
    dense, tested = true[torch.randperm(len(true), generator=g)[: 20 * SAMPLES]], torch.randperm(len(true), generator=g)
    made = sample_surface(surface, SAMPLES, g)
    seen = torch.from_numpy(cKDTree(dense.numpy()).query(made.numpy())[0])
    target = true[tested[:SAMPLES]]
    back = torch.from_numpy(cKDTree(sample_surface(surface, 20 * SAMPLES, g).numpy()).query(target.numpy())[0])
    return MeshQuality(
        accuracy_median=round(float(seen.median()) / median_depth, 5),
        completeness_median=round(float(back.median()) / median_depth, 5),
        completeness_within_2_percent=round(float((back < 0.02 * median_depth).float().mean()), 4),
        seconds=round(seconds, 1),
    )


def sample_surface(surface: TriangleMesh, count: int, generator: torch.Generator) -> Float[Tensor, "count 3"]:
    """Points spread evenly over a mesh."""
    corners = surface.vertices[surface.faces.long()]
    areas = torch.linalg.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]).norm(dim=-1)
    chosen = torch.multinomial(areas.double(), count, replacement=True, generator=generator)
    u, v = torch.rand(2, count, 1, generator=generator)
    u, v = torch.where(u + v > 1, 1 - u, u), torch.where(u + v > 1, 1 - v, v)
    a, b, c = corners[chosen].unbind(1)
    return a + u * (b - a) + v * (c - a)


def as_world(folder: Path, walked: Walked) -> World:
    """A world folder with the true depth."""
    world = World(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_video(world.video_path, walked.frames)
    world.write_path(walked.cameras, {i: walked.depth[i] for i in range(0, FRAMES, MEASURED)})
    return world


def measure(family: str, seed: int, pipeline: LyraPipeline) -> FamilyResult:
    """All figures of one world."""
    walked = walk_through(family, seed)
    exact = {i: walked.depth[i] for i in range(0, FRAMES, MEASURED)}
    blocks = len([i for i in exact if i % 8 == 0]) * (HEIGHT // 2) * (WIDTH // 2)

    def lifted(depth: dict[int, Tensor]) -> GaussianScene:
        return (
            GeometricLift().reconstruct(Walkthrough(walked.frames, walked.cameras, depth), lambda done, of: None).scene
        )

    with tempfile.TemporaryDirectory() as name:
        world = as_world(Path(name), walked)
        reconstruct(world, ReconstructJob(), GeometricLift(), Progress())
        started = time.perf_counter()
        surface = mesh(world, MeshJob(), Progress())
        seconds = time.perf_counter() - started
    return FamilyResult(
        family,
        exact=scene_quality(lifted(exact), walked, blocks),
        predicted=scene_quality(lifted(predicted_depth(walked, pipeline)), walked, blocks),
        concatenated=scene_quality(concatenated(walked, exact), walked, blocks),
        mesh=mesh_quality(surface, walked, seconds),
    )


def main() -> None:
    """Measure and write the figures."""
    pipeline = LyraPipeline.from_pretrained("lyra-tiny", device="cpu")
    results = []
    for number, family in enumerate(FAMILIES):
        results.append(measure(family, HELD_OUT_SEEDS + 900 + number, pipeline))
        print(json.dumps(asdict(results[-1])), flush=True)
    target = ROOT / "benchmarks" / "lifting.json"
    target.write_text(json.dumps([asdict(result) for result in results], indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
