"""Seconds of one forward pass of the transformer, for as many processes as torchrun starts.

`torchrun --standalone --nproc-per-node 2 benchmarks/context_parallel.py`; with python alone, for a single process. The
weights are random: times do not depend on them.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
import tyro
from torch import Tensor

from lyra.device import choose_device
from lyra.models.context_parallel import ContextParallelGroup, ParallelTransformer, context_parallel, serve
from lyra.models.transformer import ChunkCache, Lyra2Transformer3DModel


@dataclass(frozen=True)
class Settings:
    """What is measured; the defaults are the released model at 480 x 832."""

    height: int = 480
    width: int = 832
    layers: int = 40
    heads: int = 40
    passes: int = 4
    """Timed passes with a filled cache, after the first one, which fills it."""
    device: str | None = None
    """cpu or cuda; by default cuda where there is one."""


def random_inputs(
    model: Lyra2Transformer3DModel, settings: Settings, device: torch.device, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Inputs of the right shapes."""
    cells = (model.layout.slots, settings.height // 8, settings.width // 8)
    config = model.config
    channels = {
        "hidden_states": 16,
        "mask": 4,
        "conditioning": 16,
        "rays": config.camera_channels,
        "correspondence": config.correspondence_channels,
    }
    shapes = {name: (1, count, *cells) for name, count in channels.items()}
    shapes |= {"text": (1, config.text_len, config.text_dim), "image": (1, 257, config.image_dim)}
    inputs = {name: torch.rand(shape, device=device, dtype=dtype) for name, shape in shapes.items()}
    return inputs | {"timestep": torch.tensor([731.0], device=device)}


def measure(transformer: Any, inputs: dict[str, Tensor], passes: int) -> list[float]:
    """Seconds of each pass with one cache."""
    cache, seconds = ChunkCache(), []
    for _ in range(passes + 1):
        started = time.perf_counter()
        # Reading a value waits for the device.
        float(transformer(**inputs, cache=cache).sum())
        seconds.append(time.perf_counter() - started)
    return seconds


@torch.no_grad()
def run(settings: Settings, group: ContextParallelGroup) -> None:
    """Measure in the first process, serve in the others."""
    place = choose_device(settings.device)
    torch.manual_seed(0)
    torch.set_default_dtype(place.dtype)  # In float32 the released size would not fit while it is made.
    with torch.device(place.device):
        model = Lyra2Transformer3DModel(
            dim=128 * settings.heads,
            ffn_dim=27 * 128 * settings.heads // 10,
            num_heads=settings.heads,
            num_layers=settings.layers,
        )
    model.eval().requires_grad_(False)
    if group.is_worker:
        serve(model, group)
        return
    torch.set_default_dtype(torch.float32)
    inputs = random_inputs(model, settings, place.device, place.dtype)
    transformer = model if group.channel is None else ParallelTransformer(model, group)
    first, *others = measure(transformer, inputs, settings.passes)
    name = torch.cuda.get_device_name() if place.device.type == "cuda" else "cpu"
    found = {"processes": group.tokens.size, "device_name": name, "first_pass": first, "pass": min(others)}
    print(json.dumps(asdict(settings) | {key: round(v, 3) if isinstance(v, float) else v for key, v in found.items()}))


def main(settings: Settings) -> None:
    """Measure and print one line of JSON."""
    with context_parallel(settings.device) as group:
        run(settings, group)


if __name__ == "__main__":
    main(tyro.cli(Settings))
