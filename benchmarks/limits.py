"""Counts a chunk of 80 frames: tokens, FLOPs, bytes, and the least time that it can take at given speeds.

Run with `python benchmarks/limits.py --height 480 --width 832`; every figure is counted from the released model's
configuration, nothing is loaded. `--measure` times the model's matrix products and attention on this GPU first and
keeps the speeds in benchmarks/rates.json, from which `python -m lyra doctor` estimates times.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import tyro
from torch.nn import functional as F

from lyra.doctor import MEASURED_RATES
from lyra.errors import UserError
from lyra.models.cost import WEIGHT_FORMATS, ModelCost, count_activations, count_cost
from lyra.models.footprint import Rates
from lyra.models.framepack import FramePackLayout

REPEATS = 5
WARM_UPS = 2
SCHEDULES = ((35, True), (50, True), (4, False))
"""Steps, and whether with guidance: the released samplers, and the reference's command-line default of 50 steps."""


@dataclass(frozen=True)
class Options:
    """What to count."""

    height: int = 480
    """Height of the frames in pixels."""
    width: int = 832
    rates: tuple[str, ...] = ("790", "989", "1580/790", "1580", "1979")
    """Speeds in TFLOP/s, or LINEAR/ATTENTION. By default: bf16 as measured on an H200, its datasheet, float8 products
    with bf16 attention, all float8 at twice the measured speed, its datasheet."""
    measure: bool = False
    """Time the products and the attention on this GPU and add its speeds."""


def parse_rates(text: str) -> Rates:
    """Speeds from `TFLOPS` or `LINEAR/ATTENTION`.

    Raises:
        UserError: the text is neither.
    """
    try:
        values = [float(part) for part in text.split("/")]
    except ValueError:
        values = []
    if len(values) not in (1, 2) or min(values) <= 0:
        raise UserError(f"--rates has '{text}'; write TFLOP/s such as 790, or products/attention such as 1580/790.")
    return Rates(values[0], values[-1], text)


def limit_seconds(cost: ModelCost, rates: Rates, steps: int, *, guided: bool) -> float:
    """Least time of a chunk's denoising when every pass computes everything, as the released code does."""
    flops = cost.flops
    linear = (flops.total - flops.attention) / rates.linear_tflops
    return steps * (2 if guided else 1) * (linear + flops.attention / rates.attention_tflops) / 1e12


def report(cost: ModelCost, rates: list[Rates]) -> str:
    """All counts as text."""
    return "\n".join([*token_lines(cost), "", *flop_lines(cost), "", *byte_lines(cost), "", *limit_lines(cost, rates)])


def token_lines(cost: ModelCost) -> list[str]:
    """Tokens by segment of the packed history."""
    layout = FramePackLayout.parse(cost.config.layout)
    lines = [f"Tokens of a forward pass at {cost.height}x{cost.width}"]
    for segment, count in zip(layout.history, cost.tokens.segments, strict=True):
        kind = "retrieved" if segment.spatial else "history"
        kernel = "x".join(str(k) for k in segment.kernel)
        lines.append(f"  {f'{kind}, {segment.count} latents at {kernel}':<34}{count:>9,}")
    lines.append(f"  {f'new, {layout.targets.count} latents':<34}{cost.tokens.targets:>9,}")
    return [*lines, f"  {'all':<34}{cost.tokens.total:>9,}"]


def flop_lines(cost: ModelCost) -> list[str]:
    """FLOPs of a forward pass by term, what of it is the same throughout a chunk, and the other networks'."""
    flops, other = cost.flops, cost.other
    lines = ["TFLOP of a forward pass"]
    for item in fields(flops):
        value = getattr(flops, item.name)
        lines.append(f"  {item.name.replace('_', ' '):<34}{value / 1e12:>9.1f}{value / flops.total:>8.1%}")
    constant = (flops.per_chunk + flops.per_text) / 1e12
    lines.append(f"  {'all':<34}{flops.total / 1e12:>9.1f}")
    lines.append(f"  {'of which the same in all steps':<34}{constant:>9.1f}")
    lines += ["", "TFLOP of the rest of a chunk"]
    lines += [f"  {item.name.replace('_', ' '):<34}{getattr(other, item.name) / 1e12:>9.1f}" for item in fields(other)]
    return [*lines, f"  {'all':<34}{other.total / 1e12:>9.1f}"]


def byte_lines(cost: ModelCost) -> list[str]:
    """Bytes of the weights by format, and of activations by phase."""
    lines = [f"GB of {cost.parameters.total:,} parameters"]
    lines += [f"  {name:<34}{cost.parameters.bytes(name) / 1e9:>9.2f}" for name in WEIGHT_FORMATS]
    activations = count_activations(cost, 2)
    lines.append("GB beside the weights, bf16")
    return lines + [f"  {item.name:<34}{getattr(activations, item.name) / 1e9:>9.2f}" for item in fields(activations)]


def limit_lines(cost: ModelCost, rates: list[Rates]) -> list[str]:
    """Least seconds of a chunk's denoising at each speed."""
    lines = ["Seconds of a chunk's denoising at TFLOP/s", f"  {'':<24}{'PFLOP':>8}"]
    lines[-1] += "".join(f"{speed.source:>12}" for speed in rates)
    for steps, guided in SCHEDULES:
        name = f"{steps} steps{' with guidance' if guided else ''}"
        work = steps * (2 if guided else 1) * cost.flops.total / 1e15
        seconds = "".join(f"{limit_seconds(cost, speed, steps, guided=guided):>12.1f}" for speed in rates)
        lines.append(f"  {name:<24}{work:>8.2f}{seconds}")
    return lines


def median_seconds(run: Callable[[], object], device: torch.device) -> float:
    """Median time of a call, after warm-ups."""
    seconds = []
    for _ in range(WARM_UPS + REPEATS):
        synchronise(device)
        started = time.perf_counter()
        run()
        synchronise(device)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[WARM_UPS:])


def synchronise(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.no_grad()
def measure_rates(cost: ModelCost, device: torch.device, dtype: torch.dtype) -> Rates:
    """Speed of the feed-forward's and the projections' products, by their FLOPs, and of the self-attention.

    Random values of the size that a network has, because zeros run faster.
    """
    c, n = cost.config, cost.tokens.total
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=dtype)

    x, work, seconds = draw(n, c.dim), 0.0, 0.0
    for width, count in ((c.ffn_dim, 2), (c.dim, 6)):
        weight = draw(width, c.dim) / c.dim**0.5
        work += count * 2 * n * c.dim * width
        seconds += count * median_seconds(lambda weight=weight: F.linear(x, weight), device)
    q, k, v = (draw(1, c.num_heads, n, c.dim // c.num_heads) for _ in range(3))
    attending = median_seconds(lambda: F.scaled_dot_product_attention(q, k, v), device)
    return Rates(work / seconds / 1e12, 4 * n * n * c.dim / attending / 1e12, "measured")


def keep_rates(name: str, rates: Rates, path: Path = MEASURED_RATES) -> None:
    """Write a device's speeds into the file of measured ones."""
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    known[name] = {
        "linear_tflops": round(rates.linear_tflops, 1),
        "attention_tflops": round(rates.attention_tflops, 1),
        "torch": torch.__version__,
    }
    path.write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    """Count and print; returns the exit code."""
    options = tyro.cli(Options, args=arguments, description=__doc__)
    try:
        cost = count_cost({}, options.height, options.width)
        rates = [parse_rates(text) for text in options.rates]
        if options.measure:
            if not torch.cuda.is_available():
                raise UserError("--measure needs a CUDA GPU, and torch can use none here; leave it out.")
            device = torch.device("cuda")
            rates.append(measure_rates(cost, device, torch.bfloat16))
            keep_rates(torch.cuda.get_device_name(device), rates[-1])
    except UserError as error:
        print(f"limits: {error}", file=sys.stderr)
        return 2
    print(report(cost, rates))
    return 0


if __name__ == "__main__":
    sys.exit(main())
