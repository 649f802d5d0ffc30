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
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import tyro
from jaxtyping import Bool, Float, UInt8
from scipy.spatial import cKDTree
from skimage.metrics import structural_similarity
from torch import Tensor

from lyra.config import MeshJob, ReconstructJob
from lyra.depth.tiny import TinyDepthModel
from lyra.export.video import write_video
from lyra.generation.walkthrough import from_uint8
from lyra.geometry.cameras import unproject
from lyra.hub import MODELS
from lyra.lifting import mesh, reconstruct
from lyra.metrics.image import psnr_db
from lyra.models.gaussian_head import TinyGaussianHead
from lyra.progress import Progress
from lyra.reconstruction.base import Reconstructor, Walkthrough
from lyra.reconstruction.gaussians import GeometricLift, frames_to_lift, fused_frames, join_scenes, lift_frame
from lyra.reconstruction.rasterizer import choose_renderer
from lyra.reconstruction.tiny_gaussians import TinyGaussianReconstructor
from lyra.training.data import HELD_OUT_SEEDS
from lyra.training.gaussians import measured_depths
from lyra.training.worlds import build_world
from lyra.types import Cameras, GaussianScene, TriangleMesh
from lyra.world import World

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "lifting.json"
HEIGHT, WIDTH, FRAMES = 480, 832, 81
FAMILIES = ("room", "hall", "street", "square", "ruins", "forest")
MEASURED = 8
"""Every n-th frame has depth and is lifted, as in a world that was generated."""
TESTED = tuple(range(4, FRAMES, 16))
"""Frames that are compared, halfway between two that are lifted; none has depth."""
SAMPLES = 20_000
"""Points of the true and of the made surface that are compared."""
FARTHEST = 0.25
"""Distances between surfaces are counted up to this share of the median depth."""


@dataclass(frozen=True)
class Walked:
    """A walk through a procedural world with all that is true of it."""

    frames: UInt8[Tensor, "t 3 h w"]
    cameras: Cameras
    depth: dict[int, Float[Tensor, "h w"]]
    """Of every measured and every tested frame; the frames between them are black, for nothing reads them."""
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
class LiftQuality:
    """One reconstructor in one world."""

    exact: SceneQuality
    predicted: SceneQuality
    """With depth as a walkthrough measures it: one true scale, and what earlier frames know is kept."""
    mesh: MeshQuality
    """With exact depth."""
    mesh_predicted: MeshQuality


@dataclass(frozen=True)
class FamilyResult:
    """One world."""

    family: str
    geometric: LiftQuality
    lyra_tiny: LiftQuality
    concatenated: SceneQuality
    """Exact depth, all frames' discs without leaving out what earlier frames show."""


def walk_through(family: str, seed: int) -> Walked:
    """Photograph a walk."""
    rng = np.random.default_rng(seed)
    world = build_world(family, seed, texture_seed=1)
    intrinsics, poses = world.random_intrinsics(rng, HEIGHT, WIDTH), world.random_walk(rng, FRAMES)
    frames, depth, sky = torch.zeros(FRAMES, 3, HEIGHT, WIDTH, dtype=torch.uint8), {}, {}
    for index in sorted({*range(0, FRAMES, MEASURED), *TESTED}):
        view = world.render(poses[index], intrinsics, HEIGHT, WIDTH, supersample=2)
        frames[index] = torch.from_numpy(view.rgb).movedim(-1, 0)
        depth[index], sky[index] = torch.from_numpy(view.depth), torch.from_numpy(view.sky)
    w2c = torch.from_numpy(np.asarray(poses, np.float32))
    k = torch.from_numpy(np.asarray(intrinsics, np.float32)).expand(FRAMES, 3, 3)
    return Walked(frames, Cameras(w2c, k, HEIGHT, WIDTH), depth, sky)


def predicted_depth(walked: Walked, network: TinyDepthModel) -> dict[int, Float[Tensor, "h w"]]:
    """The shipped network's depth of the measured frames."""
    ids = list(range(0, FRAMES, MEASURED))
    images = torch.stack([from_uint8(walked.frames[i]) for i in ids])
    depths = measured_depths(images, [walked.depth[i] for i in ids], walked.cameras[ids], network, anchor=True)
    return dict(zip(ids, depths, strict=True))


def scene_quality(scene: GaussianScene, walked: Walked, without_fusion: int) -> SceneQuality:
    """Render the tested frames and compare."""
    renderer = choose_renderer(scene)
    psnr, ssim = [], []
    for index in TESTED:
        view = renderer.render(walked.cameras.w2c[index], walked.cameras.intrinsics[index], HEIGHT, WIDTH)
        true = walked.frames[index].float() / 255
        psnr.append(psnr_db(view.colours, true, peak=1.0))
        ssim.append(structural_similarity(view.colours.numpy(), true.numpy(), channel_axis=0, data_range=1.0))
    return SceneQuality(
        round(float(statistics.mean(psnr)), 2), round(float(statistics.mean(ssim)), 4), len(scene), without_fusion
    )


def concatenated(walked: Walked, depth: dict[int, Tensor]) -> GaussianScene:
    """Every lifted frame's Gaussians, none left out."""
    chosen = sorted(depth)
    frames = fused_frames(frames_to_lift(Walkthrough(walked.frames, walked.cameras, depth), chosen))
    return join_scenes([lift_frame(replace(frame, fresh=torch.ones_like(frame.fresh))) for frame in frames])


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
    seen = nearest(dense, made, FARTHEST * median_depth)
    back = nearest(sample_surface(surface, 20 * SAMPLES, g), true[tested[:SAMPLES]], FARTHEST * median_depth)
    return MeshQuality(
        accuracy_median=round(float(seen.median()) / median_depth, 5),
        completeness_median=round(float(back.median()) / median_depth, 5),
        completeness_within_2_percent=round(float((back < 0.02 * median_depth).float().mean()), 4),
        seconds=round(seconds, 1),
    )


def nearest(points: Float[Tensor, "n 3"], of: Float[Tensor, "m 3"], farthest: float) -> Float[Tensor, "m"]:
    """Distance to the nearest of many points, at most `farthest`: a tree is slow for what lies far from all of them."""
    found = cKDTree(points.numpy()).query(of.numpy(), distance_upper_bound=farthest)[0]
    return torch.from_numpy(found).clamp(max=farthest)


def sample_surface(surface: TriangleMesh, count: int, generator: torch.Generator) -> Float[Tensor, "count 3"]:
    """Points spread evenly over a mesh."""
    corners = surface.vertices[surface.faces.long()]
    areas = torch.linalg.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]).norm(dim=-1)
    chosen = torch.multinomial(areas.double(), count, replacement=True, generator=generator)
    u, v = torch.rand(2, count, 1, generator=generator)
    u, v = torch.where(u + v > 1, 1 - u, u), torch.where(u + v > 1, 1 - v, v)
    a, b, c = corners[chosen].unbind(1)
    return a + u * (b - a) + v * (c - a)


def as_world(folder: Path, walked: Walked, depth: dict[int, Tensor]) -> World:
    """A world folder with some depth."""
    world = World(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_video(world.video_path, walked.frames)
    world.write_path(walked.cameras, depth)
    return world


def lifted(
    walked: Walked, depth: dict[int, Tensor], reconstructor: Reconstructor, blocks: int
) -> tuple[SceneQuality, MeshQuality]:
    """Splats and mesh of one way to lift."""
    with tempfile.TemporaryDirectory() as name:
        world = as_world(Path(name), walked, depth)
        scene = reconstruct(world, ReconstructJob(), reconstructor, Progress())
        started = time.perf_counter()
        surface = mesh(world, MeshJob(), Progress())
        seconds = time.perf_counter() - started
    return scene_quality(scene, walked, blocks), mesh_quality(surface, walked, seconds)


def measure(family: str, seed: int, network: TinyDepthModel, head: TinyGaussianHead) -> FamilyResult:
    """All figures of one world."""
    walked = walk_through(family, seed)
    exact = {i: walked.depth[i] for i in range(0, FRAMES, MEASURED)}
    predicted = predicted_depth(walked, network)
    blocks = len(exact) * (HEIGHT // 2) * (WIDTH // 2)
    ways = {}
    for name, way in (("geometric", GeometricLift()), ("lyra_tiny", TinyGaussianReconstructor(network, head))):
        splats, surface = lifted(walked, exact, way, blocks)
        splats_predicted, surface_predicted = lifted(walked, predicted, way, blocks)
        ways[name] = LiftQuality(splats, splats_predicted, surface, surface_predicted)
    return FamilyResult(family, **ways, concatenated=scene_quality(concatenated(walked, exact), walked, blocks))


def main(head: Path | None = None, families: tuple[str, ...] = FAMILIES, out: Path = RESULTS) -> None:
    """Measure and write the figures, as far as they are, after every world.

    Args:
        head: folder of another Gaussian head than the shipped one.
        families: worlds to walk through.
        out: the JSON file that is written.
    """
    models = MODELS / "lyra-tiny"
    network = TinyDepthModel.from_pretrained(models / "depth").eval()
    gaussians = TinyGaussianHead.from_pretrained(head or models / "gaussian_head").eval()
    results = []
    for family in families:
        seed = HELD_OUT_SEEDS + 900 + FAMILIES.index(family)
        results.append(asdict(measure(family, seed, network, gaussians)))
        print(json.dumps(results[-1]), flush=True)
        out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    tyro.cli(main)
