"""Renders Gaussian scenes: gsplat where it and CUDA are, and a compiled tile rasteriser of the same maths elsewhere.

Pixel convention: this project's intrinsics have pixel centres at integers and gsplat's have them at +0.5, so every
renderer here adds 0.5 to the principal point before it projects. `rasterizer_reference` holds the slow, obvious twin.
Knows neither paths nor videos, and colours only as what the splats hold: sRGB blended as it is, like all splat viewers.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lyra.reconstruction import rasterizer_kernels as kernels
from lyra.types import GaussianScene

DepthMode = Literal["expected", "median"]
"""`expected` is the mean z depth of what a pixel shows, `median` the z depth of the Gaussian that takes what is left
of the light below a half."""
CHUNKS = 128
"""Parts of a scene that threads project; fixed, so that no result depends on the number of threads."""
LEAST_CHUNK = 4096
BAND_ENTRIES = 1 << 25
"""Entries of tile lists held at a time, 8 bytes each. A view with more is drawn in several bands of tile rows."""


@dataclass(frozen=True)
class RenderedGaussians:
    """One view of a scene."""

    colours: Float[Tensor, "3 h w"]
    """In 0..1, in the colour space of the splats, background included."""
    depth: Float[Tensor, "h w"]
    """z depth in scene units as the depth mode says; 0 where there is none, which for the median is where alpha stays
    at a half or below."""
    alpha: Float[Tensor, "h w"]
    """Opacity in 0..1 of everything along the ray."""


class GaussianRenderer(Protocol):
    """Renders views of one scene; what is the same for all views was done when it was made."""

    def render(
        self,
        w2c: Float[Tensor, "4 4"],
        intrinsics: Float[Tensor, "3 3"],
        height: int,
        width: int,
        *,
        background: Float[Tensor, "3"] | None = None,
    ) -> RenderedGaussians:
        """One view of height x width pixels, as `render` describes it."""
        ...


def render(
    scene: GaussianScene,
    w2c: Float[Tensor, "4 4"],
    intrinsics: Float[Tensor, "3 3"],
    height: int,
    width: int,
    *,
    background: Float[Tensor, "3"] | None = None,
    depth_mode: DepthMode = "expected",
) -> RenderedGaussians:
    """One view of a scene; for many views make a renderer with `choose_renderer` once.

    Args:
        w2c: world-to-camera matrix.
        intrinsics: in pixels of the height x width image, pixel centres at integers.
        background: colour in 0..1 behind the scene; black if None.

    Raises:
        ValueError: the image is empty, or the scene has a number of harmonics that no degree from 0 to 3 has.
    """
    renderer = choose_renderer(scene, depth_mode)
    return renderer.render(w2c, intrinsics, height, width, background=background)


def choose_renderer(scene: GaussianScene, depth_mode: DepthMode = "expected") -> GaussianRenderer:
    """gsplat for a scene on a CUDA device if it is installed, the compiled rasteriser otherwise.

    The median depth is always the compiled rasteriser's, because gsplat has none.

    Raises:
        ValueError: the scene has a number of harmonics that no degree from 0 to 3 has.
    """
    on_cuda = scene.means.device.type == "cuda" and torch.cuda.is_available()
    if on_cuda and depth_mode == "expected" and importlib.util.find_spec("gsplat") is not None:
        return GsplatRenderer(scene)
    return NumbaRenderer(scene, depth_mode)


def sh_degree(scene: GaussianScene) -> int:
    """Degree of a scene's spherical harmonics, 0 to 3.

    Raises:
        ValueError: the number of coefficients belongs to no such degree.
    """
    count = scene.sh.shape[1]
    if count not in (1, 4, 9, 16):
        raise ValueError(f"{count} spherical harmonics for each colour are of no degree from 0 to 3")
    return math.isqrt(count) - 1


def drawable(scene: GaussianScene) -> Bool[Tensor, "n"]:
    """Gaussians without NaN, infinity and zero quaternions; the others are left out of every view."""
    fields = (scene.means, scene.quats, scene.scales, scene.opacities[:, None], scene.sh.flatten(1))
    finite = torch.stack([field.isfinite().all(dim=1) for field in fields]).all(dim=0)
    return finite & (scene.quats != 0).any(dim=1)


class NumbaRenderer:
    """The compiled rasteriser on the CPU, with as many threads as torch has; results go to the scene's device."""

    def __init__(self, scene: GaussianScene, depth_mode: DepthMode = "expected") -> None:
        sh_degree(scene)
        self.device, self.depth_mode = scene.means.device, depth_mode
        fields = (scene.means, scene.quats, scene.scales, scene.opacities, scene.sh)
        self.fields = tuple(f.detach().to("cpu", torch.float32).contiguous().numpy() for f in fields)

    def render(
        self,
        w2c: Float[Tensor, "4 4"],
        intrinsics: Float[Tensor, "3 3"],
        height: int,
        width: int,
        *,
        background: Float[Tensor, "3"] | None = None,
    ) -> RenderedGaussians:
        """One view of height x width pixels, as `lyra.reconstruction.rasterizer.render` describes it."""
        if height < 1 or width < 1:
            raise ValueError(f"an image of {height}x{width} pixels cannot be rendered")
        behind = np.zeros(3, np.float32) if background is None else background.detach().cpu().float().numpy()
        colours = np.empty((3, height, width), np.float32)
        depth, median, alpha = (np.empty((height, width), np.float32) for _ in range(3))
        projected = self.project(w2c, intrinsics, height, width)
        for first_row, last_row in row_bands(projected.counts.sum(axis=(0, 2), dtype=np.int64)):
            starts, entries = projected.tile_lists(first_row, last_row)
            outputs = (behind, colours, depth, median, alpha)
            composite = partial(kernels.composite_kernel, projected.splats, entries, starts, first_row, *outputs)
            in_parallel(composite, range(first_row, last_row))
        shown = depth if self.depth_mode == "expected" else median
        return RenderedGaussians(*(torch.from_numpy(image).to(self.device) for image in (colours, shown, alpha)))

    def project(
        self, w2c: Float[Tensor, "4 4"], intrinsics: Float[Tensor, "3 3"], height: int, width: int
    ) -> ProjectedSplats:
        """All splats of a view with the number of tiles that they touch."""
        pose, k = w2c.detach().cpu().double(), intrinsics.detach().cpu().double()
        centre = torch.linalg.inv(pose)[:3, 3]
        camera = np.array([k[0, 0], k[1, 1], k[0, 2] + 0.5, k[1, 2] + 0.5])
        count = len(self.fields[0])
        chunk_size = max(LEAST_CHUNK, -(-count // CHUNKS))
        chunks, rows, columns = -(-count // chunk_size), -(-height // kernels.TILE), -(-width // kernels.TILE)
        # Pages of these two that no splat is written to cost no memory.
        splats, boxes = np.empty((count, kernels.FIELDS), np.float32), np.empty((count, 4), np.int16)
        visible, counts = np.zeros(chunks, np.int64), np.zeros((chunks, rows, columns), np.int32)
        view = (pose.numpy(), centre.numpy(), camera, height, width)
        outputs = (splats, boxes, visible, counts)
        project: Any = kernels.project_kernel  # Its compiled type counts no starred arguments.
        in_parallel(partial(project, *self.fields, *view, chunk_size, *outputs), range(chunks))
        return ProjectedSplats(splats, boxes, visible, counts, chunk_size)


@dataclass(frozen=True)
class ProjectedSplats:
    """The splats of one view, packed at the start of each chunk."""

    splats: np.ndarray
    """(n, FIELDS), columns as in the kernels."""
    boxes: np.ndarray
    """(n, 4) first and last tile column and row."""
    visible: np.ndarray
    """(chunks,) splats in each chunk."""
    counts: np.ndarray
    """(chunks, rows, columns) splats of each chunk in each tile."""
    chunk_size: int

    def tile_lists(self, first_row: int, last_row: int) -> tuple[np.ndarray, np.ndarray]:
        """Starts of the lists of some rows of tiles, one more than tiles, and their entries, in the scene's order."""
        counts = self.counts[:, first_row:last_row]
        starts = np.concatenate([[0], np.cumsum(counts.sum(axis=0, dtype=np.int64))])
        offsets = np.cumsum(counts, axis=0, dtype=np.int64) - counts + starts[:-1].reshape(counts.shape[1:])
        entries = np.empty(starts[-1], np.uint64)
        splats = (self.splats, self.splats.view(np.uint32), self.boxes, self.visible)
        fill = partial(kernels.fill_kernel, *splats, self.chunk_size, first_row, offsets, entries)
        in_parallel(fill, range(len(counts)))
        return starts, entries


def in_parallel(kernel: Callable[[int], None], parts: range) -> None:
    """Run a kernel, which lets other threads run, for each part on as many threads as torch has.

    Not on numba's own threads: its OpenMP layer sets the number of threads of the whole process, torch's with it, and
    its portable layer ends the process when two Python threads enter it.
    """
    threads = min(torch.get_num_threads(), len(parts))
    if threads > 1:
        with ThreadPoolExecutor(threads) as pool:
            # Consumed, so that an exception of a part is raised here.
            list(pool.map(kernel, parts))
    else:
        for part in parts:
            kernel(part)


def row_bands(entries: np.ndarray) -> Iterator[tuple[int, int]]:
    """First and last row, exclusive, of bands with at most `BAND_ENTRIES` entries, or of a single row."""
    first, held = 0, 0
    for row, count in enumerate(entries.tolist()):
        if row > first and held + count > BAND_ENTRIES:
            yield first, row
            first, held = row, 0
        held += count
    yield first, len(entries)


class GsplatRenderer:
    """gsplat 1.5 on the scene's CUDA device."""

    def __init__(self, scene: GaussianScene) -> None:
        keep = drawable(scene)
        fields = (scene.means, scene.quats, scene.scales, scene.opacities, scene.sh)
        means, quats, scales, opacities, sh = (f.detach().float()[keep].contiguous() for f in fields)
        self.gaussians = dict(means=means, quats=quats, scales=scales, opacities=opacities, colors=sh)
        self.sh_degree = sh_degree(scene)

    def render(
        self,
        w2c: Float[Tensor, "4 4"],
        intrinsics: Float[Tensor, "3 3"],
        height: int,
        width: int,
        *,
        background: Float[Tensor, "3"] | None = None,
    ) -> RenderedGaussians:
        """One view of height x width pixels, as `lyra.reconstruction.rasterizer.render` describes it."""
        from gsplat import rasterization

        device = self.gaussians["means"].device
        half = torch.tensor([[0, 0, 0.5], [0, 0, 0.5], [0, 0, 0]], device=device)
        images, alphas, _ = rasterization(
            **self.gaussians,
            viewmats=w2c.detach().to(device).float()[None],
            Ks=(intrinsics.detach().to(device).float() + half)[None],
            width=width,
            height=height,
            near_plane=kernels.NEAR,
            far_plane=kernels.FAR,
            eps2d=kernels.LOW_PASS,
            sh_degree=self.sh_degree,
            render_mode="RGB+ED",
        )
        colours, alpha = images[0, ..., :3].movedim(-1, 0), alphas[0, ..., 0]
        if background is not None:
            colours = colours + (1 - alpha) * background.to(colours)[:, None, None]
        return RenderedGaussians(colours.clamp(0, 1), images[0, ..., 3], alpha)
