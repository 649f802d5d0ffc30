"""Trains the monocular depth network on rendered views: scale-free log depth, sky, confidence and field of view.

Losses: L1 on log depth after removing the median difference, gradient matching at four scales (MiDaS), binary cross
entropy for the sky, the Laplace likelihood of the error for confidence. Run with `python -m lyra.training.depth`.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from lyra.depth.tiny import TinyDepthModel
from lyra.training.data import to_model_range
from lyra.training.loop import LoopSettings, TrainingLoop

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DepthTraining:
    """Settings of a depth run."""

    data: Path
    """Folder of stills-*.safetensors."""
    out: Path
    """Folder of the run: state, metrics and the exported model."""
    start: Path | None = None
    """A trained depth network to go on from."""
    minutes: float = 30.0
    learning_rate: float = 8e-4
    batch: int = 12
    threads: int = 1
    small: tuple[int, int] = (96, 160)
    """Image size of the first part of the run."""
    large: tuple[int, int] = (128, 224)
    small_share: float = 0.6
    seed: int = 0


@dataclass(frozen=True)
class DepthBatch:
    """Augmented views with their exact targets."""

    images: Float[Tensor, "b 3 h w"]
    log_depth: Float[Tensor, "b h w"]
    sky: Float[Tensor, "b h w"]
    log_tan: Float[Tensor, "b"]
    """Logarithm of the tangent of half the horizontal field of view."""


class Stills:
    """Random augmented batches from a folder of shards, re-read when new shards have arrived."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.generator = folder, torch.Generator().manual_seed(seed)
        self.shards: list[dict[str, Tensor]] = []
        self.refresh()

    def refresh(self) -> None:
        """Map shards that were not there before."""
        paths = sorted(self.folder.glob("stills-*.safetensors"))
        self.shards += [load_file(path) for path in paths[len(self.shards) :]]

    def uniform(self, low: float, high: float) -> float:
        """One random number."""
        return low + (high - low) * torch.rand((), generator=self.generator).item()

    def batch(self, size: int, height: int, width: int) -> DepthBatch:
        """Crop, flip and recolour random views to one size."""
        items = [self._view(height, width) for _ in range(size)]
        images, log_depth, sky, log_tan = (torch.stack(parts) for parts in zip(*items, strict=True))
        return DepthBatch(augment_colours(images, self.generator), log_depth, sky, log_tan)

    def _view(self, height: int, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        shard = self.shards[int(self.uniform(0, len(self.shards) - 1e-6))]
        index = int(self.uniform(0, len(shard["rgb"]) - 1e-6))
        full_height, full_width = shard["depth"].shape[1:]
        scale = self.uniform(0.55, 1.0)
        crop_h = min(full_height, round(full_height * scale * math.exp(self.uniform(-0.12, 0.12))))
        crop_w = min(full_width, round(full_width * scale * math.exp(self.uniform(-0.12, 0.12))))
        y, x = int(self.uniform(0, full_height - crop_h + 0.99)), int(self.uniform(0, full_width - crop_w + 0.99))
        area = (slice(y, y + crop_h), slice(x, x + crop_w))
        image = to_model_range(shard["rgb"][index][area])
        depth, sky = shard["depth"][index][area].float(), shard["sky"][index][area].float()
        image = F.interpolate(image[None], (height, width), mode="bilinear", antialias=True)[0]
        maps = F.interpolate(torch.stack([depth.clamp(0.15, 250).log(), sky])[None], (height, width))[0]
        if self.uniform(0, 1) < 0.5:
            image, maps = image.flip(-1), maps.flip(-1)
        return image, maps[0], maps[1], torch.log(crop_w / (2 * shard["focal"][index].float()))


def augment_colours(images: Float[Tensor, "b 3 h w"], generator: torch.Generator) -> Float[Tensor, "b 3 h w"]:
    """Random gamma, gain per channel, saturation, contrast, blur and noise, as cameras and skies differ."""
    b = images.shape[0]

    def draw(low: float, high: float, channels: int = 1) -> Tensor:
        return low + (high - low) * torch.rand(b, channels, 1, 1, generator=generator)

    x = (images * 0.5 + 0.5).clamp(1e-4, 1) ** draw(0.6, 1.6)
    x = x * draw(0.8, 1.2) * draw(0.85, 1.15, 3)
    grey = x.mean(1, keepdim=True)
    x = grey + (x - grey) * draw(0.2, 1.5)
    x = 0.5 + (x - 0.5) * draw(0.7, 1.25)
    blurred = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    x = torch.where(draw(0, 1) < 0.35, blurred, x)
    x = x + torch.randn(x.shape, generator=generator) * draw(0, 0.03)
    return x.clamp(0, 1) * 2 - 1


def depth_losses(model: TinyDepthModel, batch: DepthBatch) -> tuple[Tensor, dict[str, float]]:
    """The training loss of one batch and its parts."""
    images = batch.images.contiguous(memory_format=torch.channels_last)
    log_depth, sky_logit, log_error, log_tan, _ = model(images)
    size = log_depth.shape[-2:]
    target = F.interpolate(batch.log_depth[:, None], size)[:, 0]
    sky = F.interpolate(batch.sky[:, None], size)[:, 0]
    ground = sky < 0.5
    difference = torch.where(ground, log_depth - target, torch.nan)
    shift = difference.flatten(1).nanmedian(1).values.nan_to_num(0.0).view(-1, 1, 1)
    residual = torch.where(ground, log_depth - target - shift, torch.zeros(()))
    count = ground.sum().clamp(min=1)
    data = residual.abs().sum() / count
    scale = shift.abs().mean()
    gradient = gradient_matching(residual, ground)
    error = residual.detach().abs()
    confidence = ((error / log_error.exp() + log_error) * ground).sum() / count
    sky_loss = F.binary_cross_entropy_with_logits(sky_logit, sky)
    fov = (log_tan - batch.log_tan).abs().mean()
    loss = data + 0.5 * gradient + 0.3 * sky_loss + 0.05 * scale + 0.05 * confidence + 0.3 * fov
    parts = {"data": data.item(), "gradient": gradient.item(), "sky": sky_loss.item(), "fov": fov.item()}
    return loss, parts | {"scale": scale.item()}


def gradient_matching(residual: Float[Tensor, "b h w"], valid: Tensor) -> Tensor:
    """L1 of the residual's differences at four scales, where both pixels are valid (MiDaS)."""
    total = residual.new_zeros(())
    for _ in range(4):
        for axis in (-1, -2):
            both = valid.narrow(axis, 1, valid.shape[axis] - 1) & valid.narrow(axis, 0, valid.shape[axis] - 1)
            total = total + (residual.diff(dim=axis).abs() * both).sum() / both.sum().clamp(min=1)
        residual, valid = residual[:, ::2, ::2], valid[:, ::2, ::2]
    return total


def main(settings: DepthTraining) -> None:
    """Train until the budget is spent; the averaged model is exported at every save."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    start = settings.start
    model = TinyDepthModel() if start is None else TinyDepthModel.from_pretrained(start).float().train()
    model = model.to(memory_format=torch.channels_last)
    loop = TrainingLoop(model, settings.out, LoopSettings(settings.minutes, settings.learning_rate))
    stills = Stills(settings.data, settings.seed + loop.step)

    def loss_of_step(step: int) -> tuple[Tensor, dict[str, float]]:
        if step % 200 == 0:
            stills.refresh()
        early = loop.spent_seconds < settings.small_share * settings.minutes * 60
        return depth_losses(model, stills.batch(settings.batch, *(settings.small if early else settings.large)))

    loop.run(loss_of_step, lambda: model.save_pretrained(settings.out / "export"))


if __name__ == "__main__":
    main(tyro.cli(DepthTraining))
