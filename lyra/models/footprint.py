"""How much memory and time does a chunk take, with weights stored and moved in a given way?

Adds up what `lyra.models.cost` counts for the ways in which `lyra.offload` moves networks. Knows no machine: what fits
where is asked in `lyra.placement`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from lyra.errors import UserError
from lyra.models.cost import ModelCost, WeightFormat, count_activations

Offload = Literal["none", "model", "group"]
"""All networks but the text encoder stay on the device; all but the autoencoder come there only to run (diffusers'
model offload); the same, and the transformer's blocks are streamed from pinned memory (group offload)."""
Decode = Literal["streamed", "tiled"]
"""The autoencoder works latent by latent on whole frames, or on tiles whose caches wait in host memory."""

OFFLOADS: tuple[Offload, ...] = get_args(Offload)
DECODES: tuple[Decode, ...] = get_args(Decode)

OTHER_PARTS: Mapping[str, float] = {"text": 11.36e9, "image": 1.26e9, "autoencoder": 0.25e9, "depth": 3.89e9}
"""Bytes of the released model's other networks: UMT5-XXL, CLIP ViT-H and the autoencoder in bf16, Depth Anything 3
(nested) with bf16 backbones and float32 heads."""
FLOAT32_PARTS: Mapping[str, float] = {"text": 22.72e9, "image": 2.52e9, "autoencoder": 0.51e9, "depth": 6.76e9}

LORA = 0.45e9
"""Bytes of the few-step sampler's LoRA beside the transformer's weights."""
STREAMED_BLOCKS = 3
"""Blocks on the device at once: the one that computes, the next, and the last, whose memory is not free yet."""
CONTEXT = 0.5e9
"""Bytes of a CUDA context and its libraries."""
PROCESS = 3e9
"""Bytes of host memory of a process with its libraries, history and frames."""

TILE, TILE_STEP = 256, 192
"""Side and distance of the autoencoder's tiles in pixels (diffusers' AutoencoderKLWan)."""

SLOWDOWN: Mapping[WeightFormat, float] = {"bf16": 1.0, "fp32": 1.0, "fp8": 1.05, "nf4": 1.10}
"""Time of a forward pass with weights that are cast up first (5 to 10 % in published comparisons)."""
PINNED_BYTES_PER_SECOND, PAGEABLE_BYTES_PER_SECOND = 12e9, 8e9
"""Host to device: half of what PCIe 4 x16 does with pinned memory, and what it does without."""


@dataclass(frozen=True)
class Rates:
    """How fast a device computes the model's two kinds of work."""

    linear_tflops: float
    """Products with weights."""
    attention_tflops: float
    source: str
    """Where the figures come from, for people."""


@dataclass(frozen=True)
class Phases:
    """Bytes on the device in each phase of a chunk, weights and a CUDA context included, each at its widest moment."""

    text: float
    denoise: float
    autoencode: float
    depth: float

    @property
    def peak(self) -> float:
        """The largest."""
        return max(self.text, self.denoise, self.autoencode, self.depth)


def part_bytes(cost: ModelCost, weights: WeightFormat) -> dict[str, float]:
    """Bytes of each network's weights; the format is that of the transformer, float32 that of all."""
    others = FLOAT32_PARTS if weights == "fp32" else OTHER_PARTS
    return {"transformer": cost.parameters.bytes(weights) + LORA, **others}


def device_phases(
    cost: ModelCost, weights: WeightFormat, offload: Offload, decode: Decode = "streamed", *, on_cpu: bool = False
) -> Phases:
    """Estimated memory of the device that computes, in each phase of a chunk."""
    parts, stays = part_bytes(cost, weights), {"autoencoder"}
    if on_cpu:
        stays = set(parts)
    elif offload == "none":
        stays = set(parts) - {"text"}
    elif offload == "model" and weights == "nf4":
        stays = {"autoencoder", "transformer"}
    if offload == "group":
        parts["transformer"] = streamed_bytes(cost, weights)
    act = count_activations(cost, 4 if weights == "fp32" else 2)
    tiled = decode == "tiled"
    carried = 0 if tiled else act.carried
    cast = 2 * cost.parameters.largest_matrix if weights in ("fp8", "nf4") else 0
    always = sum(parts[name] for name in stays) + (0 if on_cpu else CONTEXT)

    def comes(name: str) -> float:
        return 0 if name in stays else parts[name]

    return Phases(
        text=always + comes("text") + act.text + carried,
        denoise=always + comes("transformer") + cast + act.denoise + carried,
        autoencode=always + act.autoencode * (tile_share(cost) if tiled else 1),
        depth=always + comes("depth") + act.depth + carried,
    )


def streamed_bytes(cost: ModelCost, weights: WeightFormat) -> float:
    """Bytes of the transformer on the device while its blocks are streamed."""
    p = cost.parameters
    return p.outside_bytes(weights) + min(STREAMED_BLOCKS, p.layers) / p.layers * (p.block_bytes(weights) + LORA)


def host_bytes(cost: ModelCost, weights: WeightFormat, decode: Decode = "streamed") -> float:
    """Estimated host memory where a GPU computes.

    All networks are in host memory once, when they are loaded, whatever moves later; float8 weights are made from bf16
    ones there.
    """
    parts = part_bytes(cost, "bf16" if weights == "fp8" else weights)
    caches = count_activations(cost, 2).carried * tile_work(cost) if decode == "tiled" else 0.0
    return sum(parts.values()) + caches + PROCESS


def tile_share(cost: ModelCost) -> float:
    """Pixels of a tile as a share of the frame's."""
    return min(cost.height, TILE) * min(cost.width, TILE) / (cost.height * cost.width)


def tile_work(cost: ModelCost) -> float:
    """Pixels of all overlapping tiles together as a multiple of the frame's."""

    def covered(side: int) -> int:
        return sum(min(TILE, side - start) for start in range(0, side, TILE_STEP))

    return covered(cost.height) * covered(cost.width) / (cost.height * cost.width)


def chunk_seconds(
    cost: ModelCost,
    rates: Rates,
    steps: int,
    weights: WeightFormat = "bf16",
    offload: Offload = "none",
    decode: Decode = "streamed",
    *,
    guided: bool,
) -> float:
    """Estimated time of an 80-frame chunk with a new caption, in seconds.

    Weights that are streamed arrive while the block before computes, so the slower of the two counts. With offloading,
    every network comes and goes once; what stays is free.
    """
    flops, branches = cost.flops, 2 if guided else 1
    attention = flops.attention / (rates.attention_tflops * 1e12)
    linear = (flops.per_forward - flops.attention) / (rates.linear_tflops * 1e12)
    forward = (attention + linear) * SLOWDOWN[weights]
    parts = part_bytes(cost, weights)
    moving = {
        "none": ("text",),
        "model": ("text", "image", "depth", "transformer"),
        "group": ("text", "image", "depth"),
    }
    moved = 2 * sum(parts[name] for name in moving[offload])
    if offload == "group":
        forward = max(forward, cost.parameters.block_bytes(weights) / PINNED_BYTES_PER_SECOND)
    elif offload == "model" and weights == "nf4":
        moved -= 2 * parts["transformer"]
    once = flops.per_chunk + branches * flops.per_text
    tiles = (tile_work(cost) - 1) * cost.other.autoencoder if decode == "tiled" else 0.0
    rest = (once + cost.other.total + tiles) / (rates.linear_tflops * 1e12)
    return steps * branches * forward + rest + moved / PAGEABLE_BYTES_PER_SECOND


def stored_bytes(folder: Path) -> int:
    """Bytes of the weight files in a model's folder."""
    suffixes = (".safetensors", ".distcp", ".pth", ".pt")
    return sum(path.stat().st_size for path in folder.rglob("*") if path.suffix in suffixes)


def transformer_config(folder: Path, *, released: bool) -> dict[str, Any]:
    """Constructor arguments of the transformer in a model's folder; empty for the released sizes.

    Args:
        released: the folder is laid out as NVIDIA released it, with other sizes in `sizes.json`.

    Raises:
        UserError: the file that holds them is missing or damaged.
    """
    path = folder / ("sizes.json" if released else "transformer/config.json")
    if released and not path.exists():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return dict(values.get("transformer", {}) if released else values)
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{path} cannot be read ({error}); restore the folder or download it again.") from error
