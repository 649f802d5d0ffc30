"""Trains the causal video autoencoder on clips of rendered walks and on pans over photos.

Losses: L1 on pixels, on their spatial differences and on their differences in time. Run with
`python -m lyra.training.autoencoder`.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from jaxtyping import Float
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional as F

from lyra.models.autoencoder import TinyCausalAutoencoder
from lyra.training.data import to_model_range
from lyra.training.loop import LoopSettings, TrainingLoop
from lyra.training.photos import training_photos

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class AutoencoderTraining:
    """Settings of an autoencoder run."""

    data: Path
    """Folder of walk-*.safetensors."""
    stills: Path
    """Folder of stills-*.safetensors."""
    out: Path
    minutes: float = 35.0
    batch: int = 6
    frames: int = 9
    small: int = 64
    """Crop size of the first part of the run, pixels."""
    large: int = 112
    small_share: float = 0.7
    threads: int = 1
    seed: int = 0


class Clips:
    """Random crops of walks, and of photos and stills under a moving window."""

    def __init__(self, settings: AutoencoderTraining, seed: int) -> None:
        self.settings, self.rng = settings, np.random.default_rng(seed)
        self.photos = [torch.from_numpy(photo) for photo in training_photos()]
        self.walks: list[Path] = []
        self.stills: list[Path] = []
        self.refresh()

    def refresh(self) -> None:
        """List walks and stills that have arrived."""
        self.walks = sorted(self.settings.data.glob("walk-*.safetensors"))
        self.stills = sorted(self.settings.stills.glob("stills-*.safetensors"))

    def batch(self, count: int, size: int) -> Float[Tensor, "b 3 t h w"]:
        """Clips in [-1, 1]; half from walks, the others pans over photos and stills."""
        clips = []
        for _ in range(count):
            kind = self.rng.random()
            if kind < 0.5 and self.walks:
                clip = self._walk(size)
            elif kind < 0.75 or not self.stills:
                clip = self._pan(self.photos[self.rng.integers(len(self.photos))], size)
            else:
                clip = self._pan(self._still(), size)
            clips.append(self._recolour(clip))
        return torch.stack(clips)

    def _walk(self, size: int) -> Tensor:
        with safe_open(self.walks[self.rng.integers(len(self.walks))], "pt") as file:
            rgb = file.get_slice("rgb")
            total, height, width, _ = rgb.get_shape()
            stride = int(self.rng.integers(1, 4))
            length = (self.settings.frames - 1) * stride + 1
            start = int(self.rng.integers(0, total - length + 1))
            y, x = int(self.rng.integers(0, height - size + 1)), int(self.rng.integers(0, width - size + 1))
            clip = rgb[start : start + length, y : y + size, x : x + size][::stride]
        return to_model_range(clip).transpose(0, 1)

    def _still(self) -> Tensor:
        with safe_open(self.stills[self.rng.integers(len(self.stills))], "pt") as file:
            rgb = file.get_slice("rgb")
            return rgb[int(self.rng.integers(0, rgb.get_shape()[0]))]

    def _pan(self, photo: Tensor, size: int) -> Tensor:
        """A window that moves, zooms and turns over a picture."""
        height, width = photo.shape[:2]
        frames = self.settings.frames
        largest = min(height, width) / size
        zoom = math.exp(self.rng.uniform(math.log(0.9), math.log(max(1.0, min(5.0, largest)))))
        span = size * zoom
        start = self.rng.uniform([0, 0], [max(1, height - span), max(1, width - span)])
        step = self.rng.normal(0, 1.5, 2) * zoom
        growth, turn = self.rng.normal(0, 0.006), self.rng.normal(0, 0.008)
        grid = torch.stack(torch.meshgrid(*[torch.linspace(-0.5, 0.5, size)] * 2, indexing="ij"), -1)
        frames_grid = []
        for t in range(frames):
            c, s = math.cos(turn * t), math.sin(turn * t)
            rotated = grid @ torch.tensor([[c, -s], [s, c]]) * span * math.exp(growth * t)
            centre = torch.tensor([start[0] + span / 2 + step[0] * t, start[1] + span / 2 + step[1] * t])
            y, x = (rotated + centre).float().unbind(-1)
            frames_grid.append(torch.stack([x / (width - 1) * 2 - 1, y / (height - 1) * 2 - 1], -1))
        picture = to_model_range(photo)[None]
        if zoom > 1.5:
            # Averaged first, so that the window does not alias when it is smaller than what it covers.
            picture = F.avg_pool2d(picture, int(zoom))
        warped = F.grid_sample(
            picture.expand(frames, -1, -1, -1),
            torch.stack(frames_grid).float(),
            mode="bicubic",
            padding_mode="reflection",
            align_corners=True,
        )
        return warped.clamp(-1, 1).transpose(0, 1)

    def _recolour(self, clip: Tensor) -> Tensor:
        if self.rng.random() < 0.5:
            clip = clip.flip(-1)
        gamma, gain = math.exp(self.rng.normal(0, 0.2)), torch.from_numpy(self.rng.uniform(0.8, 1.15, (3, 1, 1, 1)))
        return ((clip * 0.5 + 0.5).clamp(1e-4, 1) ** gamma * gain.float()).clamp(0, 1) * 2 - 1


def reconstruction_loss(decoded: Tensor, clip: Tensor) -> tuple[Tensor, dict[str, float]]:
    """The training loss and its parts."""
    error = decoded - clip
    pixel = error.abs().mean()
    spatial = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    temporal = error.diff(dim=2).abs().mean()
    mse = error.pow(2).mean() / 4
    loss = pixel + 4 * mse + 0.5 * spatial + 0.5 * temporal
    return loss, {"psnr": -10 * math.log10(max(mse.item(), 1e-9)), "temporal": temporal.item()}


@torch.no_grad()
def export(model: TinyCausalAutoencoder, clips: Clips, folder: Path) -> None:
    """Save the model with the statistics of its latents, so that normalised latents have unit deviation."""
    model.mean.zero_(), model.std.fill_(1.0)
    latents = torch.cat([model.encode_piece(clips.batch(8, 96), {}) for _ in range(6)])
    mean, std = latents.mean((0, 2, 3, 4)), latents.std((0, 2, 3, 4))
    model.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
    model.save_pretrained(folder)


def main(settings: AutoencoderTraining) -> None:
    """Train until the budget is spent; the averaged model is exported at every save."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    model = TinyCausalAutoencoder()
    for part in (model.encoder, model.decoder):
        part.to(memory_format=torch.channels_last)
    loop = TrainingLoop(model, settings.out, LoopSettings(minutes=settings.minutes, learning_rate=6e-4))
    clips = Clips(settings, settings.seed + loop.step)

    def loss_of_step(step: int) -> tuple[Tensor, dict[str, float]]:
        if step % 200 == 0:
            clips.refresh()
        early = loop.spent_seconds < settings.small_share * settings.minutes * 60
        clip = clips.batch(
            settings.batch if early else max(2, settings.batch // 3), settings.small if early else settings.large
        )
        latents = model.encode_piece(clip, {})
        # Small noise keeps the decoder smooth in the latent, which the diffusion model never hits exactly.
        noisy = latents + 0.03 * latents.detach().std() * torch.randn_like(latents)
        loss, parts = reconstruction_loss(model.decode_piece(noisy, {}), clip)
        return loss, parts

    loop.run(loss_of_step, lambda: export(model, clips, settings.out / "export"))


if __name__ == "__main__":
    main(tyro.cli(AutoencoderTraining))
