"""Six chunks of a walk out and back through a procedural world, each in a world of its own, become one scene.

Each chunk has what a network would give: noise and waves in its depth, also of the frames that it shares, and a scale,
a turn and a place of its own. What is measured also shows that putting the chunks side by side is not good enough.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pytest
import torch
from jaxtyping import Float
from scipy.spatial import cKDTree
from torch import Tensor
from torch.nn import functional as F

from lyra.geometry.cameras import unproject
from lyra.geometry.rotations import axis_angle_to_matrix
from lyra.metrics.image import psnr_db
from lyra.reconstruction.chunks import LiftedChunk, align_chunks, plan_chunks
from lyra.reconstruction.gaussians import SH_C0, join_scenes
from lyra.reconstruction.ownership import prune_foreign, seen_depth
from lyra.reconstruction.rasterizer import RenderedGaussians, choose_renderer
from lyra.reconstruction.sim3 import Sim3
from lyra.training.worlds import RenderedView, World, build_world
from lyra.training.worlds.camera_paths import pose
from lyra.types import Cameras, GaussianScene

HEIGHT, WIDTH = 48, 80
CHUNKS, SIZE, OVERLAP = 6, 9, 4
FRAMES = CHUNKS * SIZE - (CHUNKS - 1) * OVERLAP
NOISE = 0.01
"""Standard deviation of the depth's noise, pixel by pixel, and of its waves, as a share of depth."""
FAR = 50.0
"""Nothing further from all cameras than this is compared: it is sky."""
EYE, YAW = np.array([5.8, -1.3, -1.5]), np.radians(288.0)
"""Where the walk starts and the way that it looks, among broken walls and columns."""


def out_and_back(world: World) -> Float[np.ndarray, "n 4 4"]:
    """Four metres ahead and one to the side while looking to the right, and back a little beside the way there."""
    share = np.linspace(0, 2 * np.pi, FRAMES)
    out, beside = (1 - np.cos(share)) / 2, 0.15 * np.sin(share)
    ahead, right = (np.array([np.sin(YAW), 0, np.cos(YAW)]), np.array([np.cos(YAW), 0, -np.sin(YAW)]))
    eyes = EYE + 4.0 * out[:, None] * ahead + (out**2 + beside)[:, None] * right
    return np.stack([pose(eye, YAW + np.radians(50) * s, 0.0, 0.0) for eye, s in zip(eyes, out, strict=True)])


def own_world(seed: int) -> Sim3:
    """3 degrees about some axis, 6 % larger or smaller, and 0.3 to some side; the first chunk's is the true one."""
    if seed == 0:
        return Sim3.identity()
    draw = torch.Generator().manual_seed(seed)
    turn, side = F.normalize(torch.randn(2, 3, generator=draw, dtype=torch.float64), dim=1)
    return Sim3(1.06 if seed % 2 else 1 / 1.06, axis_angle_to_matrix(np.radians(3.0) * turn), 0.3 * side)


@dataclass(frozen=True)
class Walk:
    """A walk with its true pictures, and the chunks that were made of it."""

    world: World
    poses: Float[np.ndarray, "n 4 4"]
    k: Float[np.ndarray, "3 3"]
    views: list[RenderedView]
    chunks: list[LiftedChunk]
    """Where they belong, each with errors of its own."""

    @cached_property
    def apart(self) -> list[LiftedChunk]:
        """The chunks as a network gives them."""
        return [chunk.moved(own_world(index)) for index, chunk in enumerate(self.chunks)]

    @cached_property
    def aligned(self) -> list[LiftedChunk]:
        """The chunks brought into one world."""
        return [part.chunk for part in align_chunks(self.apart, OVERLAP)]

    @cached_property
    def scene(self) -> GaussianScene:
        """All that is left when each place belongs to one chunk."""
        depths = [seen_depth(chunk) for chunk in self.aligned]
        parts, cameras = [chunk.scene for chunk in self.aligned], [chunk.cameras for chunk in self.aligned]
        return join_scenes(prune_foreign(parts, cameras, depths=depths))

    @cached_property
    def surface(self) -> cKDTree:
        """Points of the true surface, a third of a pixel apart."""
        fine = self.k * np.array([[3.0], [3.0], [1.0]]) + np.array([[0, 0, 1.0], [0, 0, 1.0], [0, 0, 0]])
        points = []
        for w2c in self.poses[::3]:
            view = self.world.render(w2c, fine, 3 * HEIGHT, 3 * WIDTH, shading=False)
            found = unproject(
                torch.from_numpy(view.depth), torch.from_numpy(w2c).float(), torch.from_numpy(fine).float()
            )
            points.append(found[~torch.from_numpy(view.sky)])
        return cKDTree(torch.cat(points).numpy())

    def errors(self, scene: GaussianScene) -> Float[Tensor, "n"]:
        """Distance of each Gaussian from the true surface, as a share of that from the nearest camera."""
        centres = torch.from_numpy(np.linalg.inv(self.poses)[:, :3, 3])
        away = torch.cdist(scene.means.double(), centres).amin(1)
        near = away < FAR
        return torch.from_numpy(self.surface.query(scene.means[near].numpy())[0]) / away[near]

    def shown(self, scene: GaussianScene, frames: range) -> list[RenderedGaussians]:
        """Views of a scene from the true cameras."""
        renderer, k = choose_renderer(scene), torch.from_numpy(self.k).float()
        return [renderer.render(torch.from_numpy(self.poses[i]).float(), k, HEIGHT, WIDTH) for i in frames]

    def true_colours(self, frames: range) -> Float[Tensor, "n 3 h w"]:
        """The pictures in 0..1."""
        return torch.stack([torch.from_numpy(self.views[i].rgb).movedim(-1, 0).float() / 255 for i in frames])


def lifted(
    walk_views: list[RenderedView], poses: np.ndarray, k: np.ndarray, ids: tuple[int, ...], seed: int
) -> LiftedChunk:
    """A Gaussian for each pixel of some frames, with errors that are the chunk's own."""
    draw, intrinsics = torch.Generator().manual_seed(seed), torch.from_numpy(k).float()
    w2c, scenes = torch.from_numpy(poses[list(ids)]), []
    for index, place in zip(ids, w2c.float(), strict=True):
        view = walk_views[index]
        exact = torch.where(torch.from_numpy(view.sky), torch.tensor(2 * FAR), torch.from_numpy(view.depth))
        waves = F.interpolate(torch.randn(1, 1, 4, 6, generator=draw), size=(HEIGHT, WIDTH), mode="bicubic")[0, 0]
        depth = exact * (1 + NOISE * waves + NOISE * torch.randn(HEIGHT, WIDTH, generator=draw))
        count = HEIGHT * WIDTH
        colours = torch.from_numpy(view.rgb).float().reshape(count, 1, 3) / 255
        scenes.append(
            GaussianScene(
                means=unproject(depth, place, intrinsics).reshape(count, 3),
                quats=torch.tensor([1.0, 0, 0, 0]).expand(count, 4),
                scales=(0.6 * depth / intrinsics[0, 0]).reshape(count, 1).expand(count, 3),
                opacities=torch.full((count,), 0.95),
                sh=(colours - 0.5) / SH_C0,
            )
        )
    cameras = Cameras(w2c, torch.from_numpy(k).expand(len(ids), 3, 3), HEIGHT, WIDTH)
    return LiftedChunk(ids, cameras, join_scenes(scenes), (HEIGHT, WIDTH))


@pytest.fixture(scope="module")
def walk() -> Walk:
    world = build_world("ruins", 5)
    poses, k = out_and_back(world), np.array([[60.0, 0, 39.5], [0, 60.0, 23.5], [0, 0, 1]])
    views = [world.render(w2c, k, HEIGHT, WIDTH) for w2c in poses]
    plan = plan_chunks(FRAMES, chunks=CHUNKS, size=SIZE, overlap=OVERLAP)
    chunks = [lifted(views, poses, k, ids, seed) for seed, ids in enumerate(plan.chunks)]
    return Walk(world, poses, k, views, chunks)


def side_by_side(chunks: list[LiftedChunk]) -> GaussianScene:
    """All Gaussians of chunks, shared frames once."""
    first = [0, *(max(0, len(chunk.frame_ids) - SIZE + OVERLAP) for chunk in chunks[1:])]
    return join_scenes([c.views(start, len(c.frame_ids)).scene for c, start in zip(chunks, first, strict=True)])


def agreement(walk: Walk, chunks: list[LiftedChunk]) -> tuple[float, float]:
    """What the way out and the way back show of the same views: PSNR in dB, and median difference of depth."""
    frames = range(0, FRAMES // 2, 3)
    out, back = (walk.shown(join_scenes([c.scene for c in half]), frames) for half in (chunks[:3], chunks[3:]))
    colours = [torch.stack([view.colours for view in views]) for views in (out, back)]
    depth = [torch.stack([view.depth for view in views]) for views in (out, back)]
    both = torch.stack([(a.alpha > 0.9) & (b.alpha > 0.9) for a, b in zip(out, back, strict=True)])
    assert both.float().mean() > 0.95
    return psnr_db(*colours, peak=1.0), float(((depth[0] - depth[1]).abs() / depth[0])[both].median())


def quality(walk: Walk, scene: GaussianScene) -> tuple[float, float]:
    """PSNR against the true pictures in dB, and the share of pixels through which one sees."""
    frames = range(0, FRAMES, 3)
    views = walk.shown(scene, frames)
    colours = torch.stack([view.colours for view in views])
    holes = torch.stack([view.alpha < 0.6 for view in views]).float().mean()
    return psnr_db(colours, walk.true_colours(frames), peak=1.0), float(holes)


def test_the_way_back_shows_what_the_way_out_shows(walk: Walk) -> None:
    psnr, depth = agreement(walk, walk.aligned)
    assert psnr > 31 and depth < 0.01
    psnr, depth = agreement(walk, walk.apart)
    assert psnr < 28 and depth > 0.03


def test_no_second_layer_stands_beside_the_true_surface(walk: Walk) -> None:
    apart, best, errors = (
        walk.errors(scene) for scene in (side_by_side(walk.apart), side_by_side(walk.chunks), walk.scene)
    )
    # A network that knew the cameras exactly would have done as well: what is left is the noise of its depth.
    assert errors.median() < 1.05 * best.median() < 0.01
    assert errors.quantile(0.97) < 1.05 * best.quantile(0.97) < 0.03
    assert (errors > 0.05).double().mean() < 0.002
    assert apart.quantile(0.97) > 0.06
    assert (apart > 0.05).double().mean() > 0.1


def test_a_third_of_the_gaussians_shows_more_than_all_of_them(walk: Walk) -> None:
    everything = side_by_side(walk.aligned)
    assert len(everything) == FRAMES * HEIGHT * WIDTH
    assert len(walk.scene) < len(everything) / 3
    psnr, holes = quality(walk, walk.scene)
    assert psnr > quality(walk, everything)[0] + 0.5
    assert psnr > quality(walk, side_by_side(walk.apart))[0] + 3
    assert holes < 0.002


def test_without_knowing_what_hides_what_columns_leave_holes(walk: Walk) -> None:
    parts, cameras = [chunk.scene for chunk in walk.aligned], [chunk.cameras for chunk in walk.aligned]
    psnr, holes = quality(walk, join_scenes(prune_foreign(parts, cameras)))
    assert holes > 0.01
    assert psnr < quality(walk, walk.scene)[0] - 0.5
