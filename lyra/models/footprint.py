"""How much memory and time does a chunk take, with weights stored and moved in a given way?

Adds up what `lyra.models.cost` counts for the ways in which `lyra.offload` moves networks, along the loop of
`lyra.generation.walkthrough`. Knows no machine: what fits where is asked in `lyra.placement`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from lyra.errors import UserError
from lyra.models.cost import NF4_BYTES, WEIGHT_FORMATS, ModelCost, WeightFormat, count_activations
from lyra.models.framepack import FramePackLayout
from lyra.models.streaming import PIECE_LATENTS
from lyra.models.tiled_autoencoder import TILE, tiles

Offload = Literal["none", "model", "group"]
"""All networks but the text encoder stay on the device; all but the autoencoder come there only to run (diffusers'
model offload); the same, and the transformer and the text encoder are streamed from pinned memory (group offload)."""
Decode = Literal["streamed", "tiled"]
"""The autoencoder works latent by latent on whole frames, or on tiles whose caches wait in host memory."""

OFFLOADS: tuple[Offload, ...] = get_args(Offload)
DECODES: tuple[Decode, ...] = get_args(Decode)
OPTIONAL_PACKAGES = ("accelerate", "bitsandbytes")

OTHER_PARTS: Mapping[str, float] = {"text": 11.36e9, "image": 1.26e9, "autoencoder": 0.25e9, "depth": 3.89e9}
"""Bytes of the released model's other networks: UMT5-XXL, CLIP ViT-H and the autoencoder in bf16, Depth Anything 3
(nested) with bf16 backbones and float32 heads."""
FLOAT32_PARTS: Mapping[str, float] = {"text": 22.72e9, "image": 2.52e9, "autoencoder": 0.51e9, "depth": 6.76e9}
TEXT_EMBEDDING, TEXT_PINNED = 2.10e9, 15.03e9
"""Bytes of UMT5-XXL's largest layer, which it is streamed with, and of all its layers in pinned memory (bf16)."""

LORA = 0.45e9
"""Bytes of the few-step sampler's LoRA beside the transformer's weights."""
STREAMED_BLOCKS = 3
"""Blocks on the device at once: the one that computes, the next, and the last, whose memory is not free yet. Where
there is room, more arrive ahead."""
CONTEXT = 0.5e9
"""Bytes of a CUDA context and its libraries."""
PROCESS = 3e9
"""Bytes of host memory of a process with its libraries, history and frames."""

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
class Placement:
    """One way to run a model."""

    weights: WeightFormat = "bf16"
    """How the transformer's weights are stored; the other networks stay as they are."""
    offload: Offload = "none"
    decode: Decode = "streamed"
    device: str = "cuda"
    cost: ModelCost | None = field(default=None, compare=False, repr=False)
    """Of the model that it was planned for; None for a small one."""
    released: bool = field(default=False, compare=False, repr=False)
    """The model's files are laid out as NVIDIA released them, of which no 4-bit weights can be made."""

    @property
    def torch_device(self) -> torch.device:
        """The device that computes."""
        return torch.device(self.device)

    @property
    def on_cpu(self) -> bool:
        """Whether the processor computes."""
        return self.torch_device.type == "cpu"

    @property
    def dtype(self) -> torch.dtype:
        """Number format of activations, and of weights that are not stored in fewer bits."""
        narrow = self.weights == "bf16" or not (self.weights == "fp32" or self.on_cpu)
        return torch.bfloat16 if narrow else torch.float32

    @property
    def attention(self) -> str:
        """diffusers' name of the attention backend: torch's own choice, which needs no package."""
        return "native"

    @property
    def numbers(self) -> str:
        """What of a placement changes the result's bytes; moving networks does not."""
        return f"{self.weights} weights, {self.dtype}, {self.decode}"

    @property
    def options(self) -> str:
        """The command-line options that choose it."""
        tiled = " --decode tiled" if self.decode == "tiled" else ""
        device = " --device cpu" if self.on_cpu else ""
        return f"--weights {self.weights} --offload {self.offload}{tiled}{device}"

    @property
    def packages(self) -> tuple[str, ...]:
        """Packages from `OPTIONAL_PACKAGES` that it is made with."""
        if self.on_cpu and self.offload == "none" and self.weights != "nf4":
            return ()
        return OPTIONAL_PACKAGES if self.weights == "nf4" else ("accelerate",)

    @property
    def must_be_converted(self) -> bool:
        """Whether the model has to be converted first."""
        return self.released and self.weights == "nf4"


_WAYS: tuple[tuple[Offload, Decode], ...] = (
    ("none", "streamed"),
    ("model", "streamed"),
    ("group", "streamed"),
    ("group", "tiled"),
)
ON_GPU = tuple(Placement(w, offload, decode) for w in WEIGHT_FORMATS if w != "fp32" for offload, decode in _WAYS)
"""What is chosen from on a GPU, best first: weights as released before rounded ones, then what moves least. Streaming
costs little time, because a pass computes longer than its weights take to arrive. Tiles, which take twice the time and
change pixels a little, come last, where other networks are out of the way; float32 is there on request only."""
ON_CPU = (Placement("fp32", device="cpu"),)


@dataclass(frozen=True)
class Phases:
    """Bytes on the device in each phase of a run, weights and a CUDA context included, each at its widest moment."""

    load: float
    """4-bit weights are made on the device."""
    start: float
    """The photo is encoded, and the decoder's cache made while the one before is compared."""
    correspond: float
    text: float
    denoise: float
    decode: float
    depth: float
    encode: float
    """New frames, for the history."""

    @property
    def peak(self) -> float:
        """The largest."""
        return max(getattr(self, item.name) for item in fields(self))


def part_bytes(cost: ModelCost, weights: WeightFormat) -> dict[str, float]:
    """Bytes of each network's weights; the format is that of the transformer, float32 that of all."""
    others = FLOAT32_PARTS if weights == "fp32" else OTHER_PARTS
    return {"transformer": cost.parameters.bytes(weights) + LORA, **others}


def device_phases(cost: ModelCost, placement: Placement) -> Phases:
    """Estimated memory of the device that computes, in each phase of a run.

    A chunk's inputs are there until its end, in float32, and its decoder's cache until the autoencoder has encoded.
    """
    weights, tiled = placement.weights, placement.decode == "tiled"
    resident, on_cpu = placement.offload == "none", placement.on_cpu
    act = count_activations(cost, 4 if placement.dtype == torch.float32 else 2)
    parts = part_bytes(cost, weights)
    stays = set(parts) if on_cpu else {"autoencoder"}
    if resident:
        stays |= set(parts) - {"text"}
    comes = {name: 0.0 if name in stays else size for name, size in parts.items()}
    if placement.offload == "group" and not on_cpu:
        comes |= {
            "transformer": streamed_bytes(cost, weights),
            "text": TEXT_EMBEDDING * (2 if weights == "fp32" else 1),
        }
    cast = 2 * cost.parameters.largest_matrix if weights in ("fp8", "nf4") else 0
    # Those of tiles stay in host memory, those of whole frames stay on the device where nothing moves.
    decoder, encoder = (0.0, 0.0) if tiled else (act.decoder_cache, act.encoder_cache)
    share = tile_share(cost) if tiled else 1.0
    context = 0.0 if on_cpu else CONTEXT
    networks = context + sum(parts[name] for name in stays)
    always = networks + act.remembered + (decoder + encoder if resident else 0.0)
    chunk = always + act.inputs
    decoded = chunk + decoder + act.frames
    return Phases(
        load=context + parts["transformer"] if weights == "nf4" else 0.0,
        start=networks + share * act.decode + decoder + encoder,
        correspond=always + act.build_inputs,
        text=chunk + comes["text"] + act.text,
        denoise=chunk + comes["transformer"] + cast + act.denoise,
        decode=chunk + share * act.decode + (act.frames if tiled else 0.0),
        depth=decoded + comes["depth"] + act.depth,
        encode=decoded + share * act.encode,
    )


def streamed_bytes(cost: ModelCost, weights: WeightFormat) -> float:
    """Bytes of the transformer on the device while its blocks are streamed; scales of 4-bit weights stay there."""
    p = cost.parameters
    scales = (NF4_BYTES - 0.5) * p.block_matrices if weights == "nf4" else 0.0
    blocks = min(STREAMED_BLOCKS, p.layers) / p.layers * (p.block_bytes(weights) - scales + LORA)
    return p.outside_bytes(weights) + scales + blocks


def host_bytes(cost: ModelCost, placement: Placement) -> float:
    """Estimated host memory where a GPU computes.

    All networks are in host memory once, when they are loaded, whatever moves later; float8 weights are made from bf16
    ones there, 4-bit ones on the GPU. Streamed blocks are copied to pinned memory before the originals are let go.
    """
    weights = placement.weights
    loaded = part_bytes(cost, "bf16" if weights == "fp8" else weights)
    if weights == "nf4":
        loaded["transformer"] = 0.0
    wait = part_bytes(cost, weights) if placement.offload != "none" else {}
    peaks = [sum(loaded.values())]
    if placement.offload == "group":
        blocks = cost.parameters.block_bytes(weights)
        pinned = pinned_block_bytes(cost, weights)
        originals = sum(wait.values()) - (blocks if weights == "nf4" else 0.0)
        peaks.append(originals + pinned)
        wait["transformer"] += pinned - blocks
        wait["text"] = TEXT_PINNED * (2 if weights == "fp32" else 1)
    caches = count_activations(cost, 4 if weights == "fp32" else 2)
    if placement.offload != "none" or placement.decode == "tiled":
        # The ones that a chunk begins with, and those that it leaves.
        work = tile_work(cost) if placement.decode == "tiled" else 1.0
        peaks.append(sum(wait.values()) + 2 * work * (caches.decoder_cache + caches.encoder_cache))
    return max(peaks) + PROCESS


def pinned_block_bytes(cost: ModelCost, weights: WeightFormat) -> float:
    """Bytes of pinned memory that the blocks' weights take: torch rounds each tensor up to a power of two."""
    c = cost.config
    element = {"fp32": 4.0, "bf16": 2.0, "fp8": 1.0, "nf4": 0.5}[weights]
    matrices = [c.dim * c.dim] * 10 + [c.dim * c.ffn_dim] * 2 + [4 * c.camera_channels * c.dim]
    matrices += [c.encoded_correspondence * c.correspondence_squeeze, c.correspondence_squeeze * c.dim]
    return c.num_layers * sum(2.0 ** math.ceil(math.log2(element * size)) for size in matrices)


def tile_share(cost: ModelCost) -> float:
    """Pixels of a tile as a share of the frame's."""
    return min(cost.height, TILE) * min(cost.width, TILE) / (cost.height * cost.width)


def tile_work(cost: ModelCost) -> float:
    """Pixels of all overlapping tiles together as a multiple of the frame's."""
    return len(list(tiles(*cost.latent_size))) * tile_share(cost)


def chunk_seconds(cost: ModelCost, rates: Rates, steps: int, placement: Placement, *, guided: bool) -> float:
    """Estimated time of an 80-frame chunk with a new caption, in seconds.

    Weights that are streamed arrive while the block before computes, so the slower of the two counts. With offloading,
    every network comes and goes once; what stays is free.
    """
    weights, offload = placement.weights, placement.offload
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
    moved = (
        0.0
        if placement.on_cpu
        else 2 * sum(parts[name] for name in moving[offload]) + moved_cache_bytes(cost, placement)
    )
    if offload == "group":
        forward = max(forward, cost.parameters.block_bytes(weights) / PINNED_BYTES_PER_SECOND)
    once = flops.per_chunk + branches * flops.per_text
    tiles_again = (tile_work(cost) - 1) * cost.other.autoencoder if placement.decode == "tiled" else 0.0
    rest = (once + cost.other.total + tiles_again) / (rates.linear_tflops * 1e12)
    return steps * branches * forward + rest + moved / PAGEABLE_BYTES_PER_SECOND


def moved_cache_bytes(cost: ModelCost, placement: Placement) -> float:
    """Bytes of the autoencoder's caches that a chunk moves, there and back."""
    act = count_activations(cost, 4 if placement.weights == "fp32" else 2)
    if placement.decode == "tiled":
        # Every tile's, for every piece of a video: decoded once, encoded as a condition and as history.
        pieces = FramePackLayout.parse(cost.config.layout).targets.count / PIECE_LATENTS
        return 2 * tile_work(cost) * pieces * (act.decoder_cache + 2 * act.encoder_cache)
    return 0.0 if placement.offload == "none" else 2.0 * (act.decoder_cache + act.encoder_cache)


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
