"""Trains the seam refiner on rendered walks: a warped frame with holes and a soft generated one, against the truth.

The generated frame is the true one after the autoencoder and at a quarter of the size, its colours off by a little, as
the video model's are; the warped one is the truth under a small wrong displacement near its borders. Run with
`python -m lyra.training.refiner`.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional as F

from lyra.models.autoencoder import TinyCausalAutoencoder
from lyra.models.refiner import SeamRefiner
from lyra.training.data import to_model_range
from lyra.training.loop import LoopSettings, TrainingLoop

SIZE = 128
"""Crop side in pixels."""


@dataclass(frozen=True)
class RefinerTraining:
    """Settings of a refiner run."""

    models: Path
    """Folder with the trained autoencoder/."""
    stills: Path
    """Folder of stills-*.safetensors."""
    out: Path
    minutes: float = 5.0
    batch: int = 6
    threads: int = 1
    seed: int = 0


class Crops:
    """Random crops with holes."""

    def __init__(self, settings: RefinerTraining, autoencoder: TinyCausalAutoencoder, seed: int) -> None:
        self.paths = sorted(settings.stills.glob("stills-*.safetensors"))
        self.autoencoder, self.rng = autoencoder, np.random.default_rng(seed)
        self.generator = torch.Generator().manual_seed(seed)

    def truth(self, count: int) -> Tensor:
        """True crops (n, 3, h, w)."""
        crops = []
        with safe_open(self.paths[self.rng.integers(len(self.paths))], "pt") as file:
            rgb = file.get_slice("rgb")
            total, height, width, _ = rgb.get_shape()
            for _ in range(count):
                y, x = int(self.rng.integers(0, height - SIZE + 1)), int(self.rng.integers(0, width - SIZE + 1))
                crops.append(to_model_range(rgb[int(self.rng.integers(total)), y : y + SIZE, x : x + SIZE]))
        return torch.stack(crops)

    def batch(self, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Truth, generated, seen and where it is seen."""
        truth = self.truth(count)
        with torch.no_grad():
            small = F.interpolate(truth, scale_factor=0.5, mode="area")
            coded = self.autoencoder.decode_piece(self.autoencoder.encode_piece(small[:, :, None], {}), {})[:, :, 0]
        soft = F.interpolate(F.interpolate(coded, scale_factor=0.5, mode="area"), scale_factor=4.0, mode="bicubic")
        offset = 0.12 * torch.randn(count, 3, 1, 1, generator=self.generator)
        slope = F.interpolate(
            0.1 * torch.randn(count, 3, 2, 2, generator=self.generator), (SIZE, SIZE), mode="bilinear"
        )
        where = self.holes(count)
        return truth, (soft + offset + slope).clamp(-1, 1), self.displaced(truth), where

    def holes(self, count: int) -> Tensor:
        """Smooth random seen areas, sometimes a straight border as at the edge of a turn."""
        noise = torch.randn(count, 1, 6, 6, generator=self.generator)
        field = F.interpolate(noise, (SIZE, SIZE), mode="bicubic")[:, 0]
        x = torch.linspace(-1, 1, SIZE)
        tilt = torch.randn(count, 2, generator=self.generator) * 2
        field = field + tilt[:, :1, None] * x[None, None] + tilt[:, 1:, None] * x[None, :, None]
        return (field > -0.6).float()

    def displaced(self, truth: Tensor) -> Tensor:
        """The truth under a smooth displacement of about a pixel, as wrong depth makes it."""
        count = len(truth)
        noise = torch.randn(count, 2, 5, 5, generator=self.generator) * 1.5 / SIZE
        shift = F.interpolate(noise, (SIZE, SIZE), mode="bicubic").movedim(1, -1)
        grid = F.affine_grid(torch.eye(2, 3).expand(count, 2, 3), [count, 3, SIZE, SIZE], align_corners=False)
        return F.grid_sample(truth, grid + shift, mode="bicubic", padding_mode="border", align_corners=False).clamp(
            -1, 1
        )


def main(settings: RefinerTraining) -> None:
    """Train until the budget is spent; the averaged model is exported at every save."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    autoencoder = TinyCausalAutoencoder.from_pretrained(settings.models / "autoencoder").eval().requires_grad_(False)
    model = SeamRefiner().to(memory_format=torch.channels_last)
    loop = TrainingLoop(
        model, settings.out, LoopSettings(minutes=settings.minutes, learning_rate=1e-3, save_minutes=1.0)
    )
    crops = Crops(settings, autoencoder, settings.seed + loop.step)

    def loss_of_step(step: int) -> tuple[Tensor, dict[str, float]]:
        truth, generated, seen, where = crops.batch(settings.batch)
        joined = model(generated, seen, where)
        error = joined - truth
        hole = where[:, None] < 0.5
        plain = torch.where(hole, generated, seen) - truth
        loss = error.abs().mean() + error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        return loss, {"l1": error.abs().mean().item(), "l1_without": plain.abs().mean().item()}

    loop.run(loss_of_step, lambda: model.save_pretrained(settings.out / "export"))


if __name__ == "__main__":
    main(tyro.cli(RefinerTraining))
