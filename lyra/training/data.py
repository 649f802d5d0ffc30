"""Rendered views and walks of procedural worlds on disk, and how batches are drawn from them.

`render_stills` and `render_walks` fill a folder and go on where they stopped; the readers map the files, so memory
stays small. Knows no network. Run with `python -m lyra.training.data`.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from jaxtyping import Float, UInt8
from safetensors import safe_open
from safetensors.numpy import save_file
from torch import Tensor

from lyra.training.worlds import FAMILIES, HELD_OUT_FAMILIES, build_world

logger = logging.getLogger(__name__)

TRAINING_FAMILIES = tuple(family for family in FAMILIES if family not in HELD_OUT_FAMILIES)
STILLS_PER_SHARD = 64
HELD_OUT_SEEDS = 1_000_000
"""World seeds from here on are never trained on."""


@dataclass(frozen=True)
class Walk:
    """A rendered camera path."""

    rgb: UInt8[Tensor, "t h w 3"]
    depth: Float[Tensor, "t h w"]
    """z depth in metres; the sky's is lyra.depth.base.SKY_DEPTH."""
    w2c: Float[Tensor, "t 4 4"]
    intrinsics: Float[Tensor, "3 3"]
    caption: str
    family: str


def render_stills(folder: Path, count: int, height: int, width: int, first_seed: int = 0, minutes: float = 1e9) -> None:
    """Render single views, a new world for every two, into shards of 64."""
    folder.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    for shard in range(-(-count // STILLS_PER_SHARD)):
        path = folder / f"stills-{first_seed + shard:06d}.safetensors"
        if path.exists():
            continue
        if time.perf_counter() - started > minutes * 60:
            return
        rng = np.random.default_rng(first_seed + shard)
        views, focals = [], []
        for index in range(STILLS_PER_SHARD // 2):
            number = (first_seed + shard) * STILLS_PER_SHARD // 2 + index
            world = build_world(TRAINING_FAMILIES[number % len(TRAINING_FAMILIES)], number)
            for _ in range(2):
                intrinsics = world.random_intrinsics(rng, height, width)
                views.append(world.render(world.random_view(rng), intrinsics, height, width, supersample=1))
                focals.append(intrinsics[0, 0])
        save_atomically(
            path,
            {
                "rgb": np.stack([view.rgb for view in views]),
                "depth": np.stack([view.depth for view in views]).astype(np.float16),
                "sky": np.stack([view.sky for view in views]),
                "focal": np.array(focals, np.float32),
            },
            {},
        )


def render_walks(
    folder: Path,
    count: int,
    frames: int,
    height: int,
    width: int,
    first_seed: int = 0,
    minutes: float = 1e9,
    *,
    every: int = 1,
    supersample: int = 1,
) -> None:
    """Render every n-th frame of camera walks, one world each, one file each."""
    folder.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    for number in range(first_seed, first_seed + count):
        path = folder / f"walk-{number:07d}.safetensors"
        if path.exists():
            continue
        if time.perf_counter() - started > minutes * 60:
            return
        family = TRAINING_FAMILIES[number % len(TRAINING_FAMILIES)]
        save_walk(path, family, number, frames, height, width, every=every, supersample=supersample)


def save_walk(
    path: Path, family: str, seed: int, frames: int, height: int, width: int, *, every: int = 1, supersample: int = 1
) -> None:
    """Render every n-th frame of one walk of a world to a file."""
    rng = np.random.default_rng(seed + 7)
    world = build_world(family, seed)
    intrinsics = world.random_intrinsics(rng, height, width)
    w2c = world.random_walk(rng, frames)[::every]
    views = [world.render(pose, intrinsics, height, width, supersample=supersample) for pose in w2c]
    tensors = {
        "rgb": np.stack([view.rgb for view in views]),
        "depth": np.stack([view.depth for view in views]).astype(np.float16),
        "w2c": np.asarray(w2c, np.float32),
        "intrinsics": np.asarray(intrinsics, np.float32),
    }
    save_atomically(path, tensors, {"caption": world.caption(), "family": family})


def save_atomically(path: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    """Write a safetensors file under a temporary name and rename it, so that a kill leaves no half file."""
    temporary = path.with_suffix(".tmp")
    save_file(tensors, temporary, metadata=metadata)
    temporary.replace(path)


def load_walk(path: Path) -> Walk:
    """Read a walk."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        return Walk(
            rgb=file.get_tensor("rgb"),
            depth=file.get_tensor("depth").float(),
            w2c=file.get_tensor("w2c"),
            intrinsics=file.get_tensor("intrinsics"),
            caption=metadata.get("caption", ""),
            family=metadata.get("family", ""),
        )


def to_model_range(rgb: UInt8[Tensor, "*batch h w 3"]) -> Float[Tensor, "*batch 3 h w"]:
    """uint8 pixels to [-1, 1], channels first."""
    return rgb.movedim(-1, -3).float() / 127.5 - 1


@dataclass(frozen=True)
class Rendering:
    """What to render."""

    out: Path
    """Gets the folders stills/, walks/ and posed/."""
    stills: int = 4160
    """Single views, 144 x 256 pixels."""
    walks: int = 73
    """Walks of 161 frames, 128 x 224 pixels."""
    posed: int = 800
    """Walks of 41 frames of which every fourth is rendered, 128 x 224 pixels with four rays each, for Gaussians."""
    minutes: float = 1e9
    """Stop after so many minutes of each; a later run goes on."""


def main(settings: Rendering) -> None:
    """Render all three."""
    render_stills(settings.out / "stills", settings.stills, 144, 256, minutes=settings.minutes)
    render_walks(settings.out / "walks", settings.walks, 161, 128, 224, minutes=settings.minutes)
    posed = settings.out / "posed"
    render_walks(posed, settings.posed, 41, 128, 224, minutes=settings.minutes, every=4, supersample=2)


if __name__ == "__main__":
    main(tyro.cli(Rendering))
