"""Trains lyra-tiny's Gaussian head: posed frames of a walk in, and what other frames of it show as the only teacher.

Four frames of a rendered walk are lifted from exact depth, or from the depth network's as it is measured along a
walkthrough; the Gaussians are rendered at frames between them and compared with the truth: L1, squared error,
structural similarity and log depth. The depth network is not trained on. Run with `python -m lyra.training.gaussians`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from lyra.depth.base import align_depth
from lyra.depth.tiny import TinyDepthModel
from lyra.depth.walk import anchored
from lyra.geometry.resample import Surface, draw_surface, enlarge_depth, make_surface
from lyra.models.gaussian_head import TinyGaussianHead
from lyra.reconstruction.gaussians import FARTHEST, FusedFrame, LiftedFrame, fused_frames, join_scenes, pixel_blocks
from lyra.reconstruction.rasterizer_gradients import render_with_gradients
from lyra.reconstruction.tiny_gaussians import changed_gaussians, head_input, in_time, median_depth
from lyra.training.data import Walk, load_walk, to_model_range
from lyra.training.loop import LoopSettings, TrainingLoop
from lyra.types import Cameras, GaussianScene

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class GaussianTraining:
    """Settings of a run."""

    models: Path
    """Folder with the trained depth/."""
    data: Path
    """Folder of walk-*.safetensors; new ones are found while training."""
    out: Path
    """Folder of the run: state, metrics and the exported head."""
    start: Path | None = None
    """A head to go on from."""
    minutes: float = 30.0
    threads: int = 1
    sources: int = 4
    targets: int = 2
    learning_rate: float = 1e-3
    seed: int = 0


@dataclass(frozen=True)
class Window:
    """Frames to lift and frames to compare with."""

    fused: list[FusedFrame]
    """In time's order."""
    images: Float[Tensor, "n 3 h w"]
    """Frames to compare with, in [0, 1]."""
    depth: Float[Tensor, "n h w"]
    w2c: Float[Tensor, "n 4 4"]
    intrinsics: Float[Tensor, "3 3"]
    covered: Bool[Tensor, "n h w"]
    """Pixels that at least one lifted frame shows."""


class Windows:
    """Random windows of the walks in a folder."""

    def __init__(self, settings: GaussianTraining, depth: TinyDepthModel, seed: int) -> None:
        self.settings, self.depth = settings, depth
        self.generator = torch.Generator().manual_seed(seed)
        self.walks: dict[Path, Walk] = {}

    def refresh(self) -> None:
        """Load walks that were not there before."""
        for path in sorted(self.settings.data.glob("walk-*.safetensors")):
            if path not in self.walks:
                self.walks[path] = load_walk(path)

    def uniform(self) -> float:
        """One random number in [0, 1)."""
        return float(torch.rand((), generator=self.generator))

    def draw(self) -> Window:
        """A window with random spacing, kind of depth and colours."""
        walk = list(self.walks.values())[int(self.uniform() * len(self.walks))]
        spacing, count = (2 if self.uniform() < 0.8 else 1), self.settings.sources
        first = int(self.uniform() * (len(walk.rgb) - spacing * (count - 1)))
        sources = [first + spacing * i for i in range(count)]
        between = range(max(first - 1, 0), min(sources[-1] + 2, len(walk.rgb)))
        others = [i for i in between if i not in sources] or list(between)
        order = torch.randperm(len(others), generator=self.generator).tolist()
        return self.window(walk, sources, [others[i] for i in order[: self.settings.targets]])

    def window(self, walk: Walk, sources: Sequence[int], targets: Sequence[int]) -> Window:
        """Sources lifted as far as nothing is learnt, beside the true targets."""
        images = recoloured(to_model_range(walk.rgb[[*sources, *targets]]), self.generator)
        kind = self.uniform()
        depths = [walk.depth[i] for i in sources]
        if kind > 0.35:
            cameras = Cameras(
                walk.w2c[list(sources)], walk.intrinsics.expand(len(sources), 3, 3), *walk.depth.shape[1:]
            )
            depths = measured_depths(images[: len(sources)], depths, cameras, self.depth, anchor=kind > 0.6)
            depths = [self.blurred(depth) for depth in depths]
        frames = [
            LiftedFrame(image, depth, walk.w2c[i], walk.intrinsics)
            for image, depth, i in zip(images, depths, sources, strict=False)
        ]
        fused = in_time(list(fused_frames([frames[0], *reversed(frames[1:])])))
        size = walk.depth.shape[1:]
        covered = [
            torch.stack([draw_surface(f.surface, walk.w2c[i], walk.intrinsics, *size).depth.isfinite() for f in fused])
            for i in targets
        ]
        return Window(
            fused=fused,
            images=images[len(sources) :] * 0.5 + 0.5,
            depth=walk.depth[list(targets)],
            w2c=walk.w2c[list(targets)],
            intrinsics=walk.intrinsics,
            covered=torch.stack([each.any(0) for each in covered]),
        )

    def blurred(self, depth: Float[Tensor, "h w"]) -> Float[Tensor, "h w"]:
        """Depth as coarse as that of a small network beside a large image."""
        height, width = depth.shape
        shrink = 1 + 2.7 * self.uniform()
        small = (1 / depth)[None, None]
        small = F.interpolate(small, (round(height / shrink), round(width / shrink)), mode="area")
        return enlarge_depth(1 / small[0, 0], (height, width))


def recoloured(images: Float[Tensor, "n 3 h w"], generator: torch.Generator) -> Float[Tensor, "n 3 h w"]:
    """One random gamma and gain for all frames of a walk."""
    gamma, gain = 0.7 + 0.7 * torch.rand((), generator=generator), 0.8 + 0.3 * torch.rand(3, 1, 1, generator=generator)
    return ((images * 0.5 + 0.5).clamp(1e-4, 1) ** gamma * gain).clamp(0, 1) * 2 - 1


def measured_depths(
    images: Float[Tensor, "n 3 h w"],
    truth: Sequence[Float[Tensor, "h w"]],
    cameras: Cameras,
    network: TinyDepthModel,
    *,
    anchor: bool,
) -> list[Float[Tensor, "h w"]]:
    """The network's depth of frames in time's order, in the unit of the true depth.

    Args:
        truth: exact depth, which gives the scale.
        anchor: keep what earlier frames know, as a walkthrough does, so that one scale is measured for the first frame;
            otherwise each frame has its own.
    """
    predictions = [network.predict(image[None]) for image in images]
    depths: list[Tensor] = []
    surfaces: list[Surface] = []
    for i, prediction in enumerate(predictions):
        depth, sky = prediction.depth[0], prediction.sky[0]
        w2c, intrinsics = cameras.w2c[i], cameras.intrinsics[i]
        if depths and anchor:
            seen = [draw_surface(s, w2c, intrinsics, cameras.image_height, cameras.image_width).depth for s in surfaces]
            depth = anchored(depth[None], sky[None], torch.stack(seen).amin(0)[None])[0]
        else:
            depth = torch.where(sky, depth, align_depth(depth, truth[i], (truth[i] < FARTHEST) & ~sky))
        depths.append(depth)
        surfaces.append(make_surface(depth, w2c, intrinsics))
    return depths


def lift_window(window: Window, head: TinyGaussianHead, depth: TinyDepthModel) -> GaussianScene:
    """The window's Gaussians with gradients to the head."""
    blocks = [pixel_blocks(frame) for frame in window.fused]
    changes = head(head_input(window.fused, blocks, depth, median_depth(window.fused)))
    return join_scenes([changed_gaussians(f, b, changes, i) for i, (f, b) in enumerate(zip(window.fused, blocks))])  # noqa: B905


def window_losses(
    window: Window, head: TinyGaussianHead, depth: TinyDepthModel, pool: ThreadPoolExecutor
) -> tuple[Tensor, dict[str, float]]:
    """The loss of one window and its parts; views are rendered side by side."""
    scene = lift_window(window, head, depth)
    height, width = window.depth.shape[1:]
    views = list(pool.map(lambda w2c: render_with_gradients(scene, w2c, window.intrinsics, height, width), window.w2c))
    colours, alpha = torch.stack([v.colours for v in views]), torch.stack([v.alpha for v in views])
    weight = window.covered.float()
    total = weight.sum().clamp(min=1)
    difference = (colours - window.images).abs() * weight[:, None]
    absolute, squared = difference.sum() / (3 * total), difference.square().sum() / (3 * total)
    unlike = ((1 - similarity(colours, window.images)) * weight).sum() / total
    solid = weight * (window.depth < FARTHEST) * (alpha.detach() > 0.5)
    rendered = torch.stack([v.depth for v in views]).clamp(min=1e-3)
    far = ((rendered.log() - window.depth.log()).abs().clamp(max=0.5) * solid).sum() / solid.sum().clamp(min=1)
    loss = absolute + 4 * squared + 0.1 * unlike + 0.1 * far
    parts = {"l1": absolute.item(), "psnr_db": -10 * squared.clamp(min=1e-9).log10().item()}
    return loss, parts | {"unlike": unlike.item(), "log_depth": far.item()}


def similarity(a: Float[Tensor, "n 3 h w"], b: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n h w"]:
    """Structural similarity over 7x7 windows, mean of the channels; images in [0, 1] (Wang et al. 2004)."""

    def mean(x: Tensor) -> Tensor:
        return F.avg_pool2d(F.pad(x, (3, 3, 3, 3), mode="replicate"), 7, stride=1)

    mean_a, mean_b = mean(a), mean(b)
    var_a, var_b = mean(a * a) - mean_a.square(), mean(b * b) - mean_b.square()
    covariance = mean(a * b) - mean_a * mean_b
    light = (2 * mean_a * mean_b + 1e-4) / (mean_a.square() + mean_b.square() + 1e-4)
    return (light * (2 * covariance + 9e-4) / (var_a + var_b + 9e-4)).mean(1)


def main(settings: GaussianTraining) -> None:
    """Train until the budget is spent; the averaged head is exported at every save."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    depth = TinyDepthModel.from_pretrained(settings.models / "depth").eval().requires_grad_(False)
    start = settings.start
    head = TinyGaussianHead() if start is None else TinyGaussianHead.from_pretrained(start).float().train()
    head = head.to(memory_format=torch.channels_last)
    loop = TrainingLoop(head, settings.out, LoopSettings(settings.minutes, settings.learning_rate))
    windows = Windows(settings, depth, settings.seed + loop.step)
    with ThreadPoolExecutor(settings.targets) as pool:

        def loss_of_step(step: int) -> tuple[Tensor, dict[str, float]]:
            if step % 100 == 0:
                windows.refresh()
            return window_losses(windows.draw(), head, depth, pool)

        windows.refresh()
        loop.run(loss_of_step, lambda: head.save_pretrained(settings.out / "export"))


if __name__ == "__main__":
    main(tyro.cli(GaussianTraining))
