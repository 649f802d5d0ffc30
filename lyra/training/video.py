"""Trains the video transformer and the text encoder on samples of rendered walks, by rectified flow.

x_t = sigma * noise + (1 - sigma) * data on the target latents; the history stays clean (released code). Times follow
the released schedule, a quarter of them are the four levels of the few-step sampler. Cells that the warp does not show
weigh more, because the others are taken from memory. Run with `python -m lyra.training.video`.
"""

from __future__ import annotations

import logging
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from torch import Tensor, nn

from lyra.diffusion.schedulers import dmd_sigmas, training_sigmas, training_weights
from lyra.models.blocks import Lyra2Block
from lyra.models.text import HashedTextEncoder
from lyra.models.transformer import Lyra2Transformer3DModel
from lyra.training.data import load_walk
from lyra.training.loop import LoopSettings, TrainingLoop
from lyra.training.parts import TINY_TRANSFORMER, conditioning_parts
from lyra.training.samples import Sample, load_sample, make_sample, save_sample

logger = logging.getLogger(__name__)

SEEN_WEIGHT = 0.25
"""Loss weight of a cell that the warp covers; an uncovered one has 1."""
TEXT_DROPOUT = 0.2
"""Share of samples without text, so that guidance has an unconditional model (released code)."""
LARGEST_GAIN = 4.0
"""Largest weight of a small sigma, where an error of the sample is amplified by 1 / sigma^2."""


@dataclass(frozen=True)
class VideoTraining:
    """Settings of a video run."""

    models: Path
    """Folder with the trained autoencoder/ and depth/."""
    data: Path
    """Folder of walk-*.safetensors."""
    samples: Path
    """Folder of prepared samples."""
    out: Path
    minutes: float = 40.0
    batch: int = 4
    threads: int = 1
    seed: int = 0
    prepare: int = 0
    """Prepare so many samples and stop, instead of training."""


class VideoModel(nn.Module):
    """The two networks that are trained together."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = Lyra2Transformer3DModel(**TINY_TRANSFORMER)
        self.text_encoder = HashedTextEncoder()
        initialise(self.transformer)


def initialise(model: Lyra2Transformer3DModel) -> None:
    """Xavier linears, small ray and correspondence encoders, zero head, packed embeddings from the base one.

    A packed embedding starts as the base one spread over its kernel and averaged (released code).
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for block in model.blocks:
        assert isinstance(block, Lyra2Block)
        squeeze, expand = block.correspondence_encoder
        for layer in (block.camera_encoder, squeeze, expand):
            assert isinstance(layer, nn.Linear)
            nn.init.trunc_normal_(layer.weight, std=model.config.dim**-0.5)
    nn.init.zeros_(model.proj_out.weight)
    nn.init.zeros_(model.proj_out.bias)
    base = model.patch_embedding.weight.data.unflatten(1, (-1, 1, 2, 2))
    for embed, segment in zip(model.history_patch_embeddings, model.layout.history, strict=True):
        assert isinstance(embed, nn.Linear)
        kt, kh, kw = segment.kernel
        spread = base
        for axis, k in ((2, kt), (3, kh), (4, kw)):
            spread = spread.repeat_interleave(k, dim=axis)
        embed.weight.data.copy_((spread / (kt * kh * kw)).flatten(1))


def prepare(settings: VideoTraining) -> None:
    """Make samples from random walks until there are enough."""
    parts, depth = conditioning_parts(settings.models)
    settings.samples.mkdir(parents=True, exist_ok=True)
    for number in range(settings.prepare):
        path = settings.samples / f"sample-{settings.seed:03d}-{number:06d}.safetensors"
        if path.exists():
            continue
        walks = sorted(settings.data.glob("walk-*.safetensors"))
        rng = np.random.default_rng((settings.seed, number))
        save_sample(path, make_sample(parts, depth, load_walk(walks[rng.integers(len(walks))]), rng))


class Samples:
    """Random batches of prepared samples, re-listed as more arrive."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.random = folder, random.Random(seed)
        self.refresh()

    def refresh(self) -> None:
        """List the samples that are there."""
        self.paths = sorted(self.folder.glob("sample-*.safetensors"))

    def batch(self, size: int) -> list[Sample]:
        """Random samples."""
        return [load_sample(self.random.choice(self.paths)) for _ in range(size)]


def draw_sigmas(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Noise levels and loss weights: three quarters by the released schedule, a quarter at the few-step levels."""
    grid = training_sigmas()
    weights = training_weights(grid).clamp(min=0.2)
    u = torch.sigmoid(torch.randn(count, generator=generator))
    index = (u * len(grid)).long().clamp(max=len(grid) - 1)
    few = dmd_sigmas(5.0).float()
    nearest = torch.stack([(grid - level).abs().argmin() for level in few])
    choice = nearest[torch.randint(0, len(few), (count,), generator=generator)]
    index = torch.where(torch.rand(count, generator=generator) < 0.25, choice, index)
    return grid[index], weights[index]


def flow_loss(model: VideoModel, samples: list[Sample], generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
    """The weighted velocity loss of a batch."""
    stacked = {
        name: torch.cat([getattr(s.inputs, name) for s in samples]) for name in samples[0].inputs.__dataclass_fields__
    }
    targets, image = torch.cat([s.targets for s in samples]), torch.cat([s.image for s in samples])
    sigma, weight = draw_sigmas(len(samples), generator)
    noise = torch.randn(targets.shape, generator=generator)
    shaped = sigma.view(-1, 1, 1, 1, 1)
    noisy = shaped * noise + (1 - shaped) * targets
    drop = torch.rand(len(samples), generator=generator) < TEXT_DROPOUT
    text = model.text_encoder(["" if d else s.caption for d, s in zip(drop, samples, strict=True)])
    velocity = model.transformer(
        hidden_states=torch.cat([stacked["history"], noisy], dim=2),
        mask=stacked["mask"],
        conditioning=stacked["conditioning"],
        rays=stacked["rays"],
        correspondence=stacked["correspondence"],
        text=text,
        image=image,
        timestep=sigma * 1000,
    )
    first = model.transformer.layout.targets.start
    visible = stacked["mask"][:, :, first:].mean(1, keepdim=True)
    # The loss is taken on the clean sample and scaled back to velocities, with a bound for small noise levels.
    estimate = noisy - shaped * velocity
    gain = (1 / sigma**2).clamp(max=LARGEST_GAIN) * weight
    importance = visible * SEEN_WEIGHT + (1 - visible)
    error = (estimate - targets).pow(2) * importance
    loss = (error.mean((1, 2, 3, 4)) / importance.mean((1, 2, 3, 4)) * gain).mean()
    with torch.no_grad():
        hole = (visible < 0.5).expand_as(targets)
        ours = (estimate - targets)[hole].pow(2).mean() if hole.any() else torch.zeros(())
        copied = (
            (stacked["conditioning"][:, :, first:] - targets)[hole].pow(2).mean() if hole.any() else torch.zeros(())
        )
    return loss, {"hole": ours.item(), "hole_copied": copied.item()}


def main(settings: VideoTraining) -> None:
    """Prepare samples, or train until the budget is spent; the averaged model is exported at every save."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(settings.threads)
    if settings.prepare:
        prepare(settings)
        return
    torch.manual_seed(settings.seed)
    model = VideoModel()
    loop = TrainingLoop(
        model, settings.out, LoopSettings(minutes=settings.minutes, learning_rate=5e-4, ema_decay=0.995)
    )
    samples = Samples(settings.samples, settings.seed + loop.step)
    generator = torch.Generator().manual_seed(settings.seed + loop.step)

    def loss_of_step(step: int) -> tuple[Tensor, dict[str, float]]:
        if step % 20 == 0:
            samples.refresh()
        return flow_loss(model, samples.batch(settings.batch), generator)

    def export() -> None:
        model.transformer.save_pretrained(settings.out / "transformer")
        model.text_encoder.save_pretrained(settings.out / "text_encoder")

    loop.run(loss_of_step, export)


if __name__ == "__main__":
    main(tyro.cli(VideoTraining))
