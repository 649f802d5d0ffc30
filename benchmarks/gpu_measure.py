"""How is something measured on a device: its time, its memory, and the speeds that it is compared with?

CUDA events on a GPU and the wall clock on the CPU; two warm-ups, five repetitions, the median; random numbers of the
size that a network has, because zeros run faster. Knows no case: `benchmarks/gpu_cases.py` decides what is measured.
"""

from __future__ import annotations

import gc
import logging
import math
import platform
import resource
import statistics
import subprocess
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu import Limit, Memory, Request, Result, Timing, append, now
from lyra.models.cost import ModelCost, count_cost

T = TypeVar("T")
logger = logging.getLogger(__name__)
WARM_UPS = 2
REPEATS = 5
SEED = 0
PEAKED = 1.7
"""Weight of the norms of random queries and keys: attention then picks a few of 38,000 tokens, as a trained network's
does. With weights of one it would be their mean, and a wrong kernel would hardly change the result."""

TINY: Mapping[str, int] = {
    "dim": 64,
    "num_heads": 2,
    "num_layers": 3,
    "ffn_dim": 128,
    "text_dim": 32,
    "freq_dim": 32,
    "image_dim": 32,
    "camera_channels": 24,
    "correspondence_channels": 80,
    "correspondence_squeeze": 32,
}
"""Sizes of the rehearsal's transformer; the rest is as released."""

KERNELS: Mapping[str, Mapping[str, SDPBackend]] = {
    "cuda": {
        "_native_cudnn": SDPBackend.CUDNN_ATTENTION,
        "_native_flash": SDPBackend.FLASH_ATTENTION,
        "_native_efficient": SDPBackend.EFFICIENT_ATTENTION,
    },
    "cpu": {"_native_flash": SDPBackend.FLASH_ATTENTION, "_native_math": SDPBackend.MATH},
}
"""Attention kernels of a device that need no package, by diffusers' name."""


class OutOfTime(Exception):
    """The case's budget is used."""


@dataclass(frozen=True)
class Rates:
    """Speeds in TFLOP/s, measured in this process."""

    linear: float
    """Products with the model's matrices, weighted by their FLOPs."""
    attention: Mapping[str, float]
    """Self-attention by kernel; those that do not work are missing."""

    @property
    def fastest(self) -> str:
        """The kernel to use."""
        return max(self.attention, key=lambda name: self.attention[name])


class Bench:
    """What all measurements of one case share.

    Args:
        request: for this case alone; its minutes start now.
    """

    def __init__(self, request: Request) -> None:
        self.request, self.case = request, request.cases[0]
        self.ends = time.monotonic() + 60 * request.minutes
        self.device = torch.device("cuda", 0) if request.device == "cuda" else torch.device("cpu")
        self.on_gpu = self.device.type == "cuda"
        self.dtype = torch.bfloat16 if self.on_gpu else torch.float32
        self.generator = torch.Generator(self.device).manual_seed(SEED)
        self.sizes: dict[str, Any] = dict(TINY) if request.tiny else {}
        self.cost: ModelCost = count_cost(self.sizes, request.height, request.width)
        self.machine = machine_facts(self.device)
        self.rates = Rates(math.nan, {})
        """Of `measure_rates`."""

    def measure_rates(self) -> Rates:
        """Measure this device's speeds, with which results are compared from then on."""
        c, n = self.cost.config, self.cost.tokens.total
        work = seconds = 0.0
        for width, count in ((c.ffn_dim, 2), (c.dim, 6)):
            x, weight = self.matrices(n, c.dim, width)
            work += count * 2 * n * c.dim * width
            seconds += count * self.time(lambda x=x, weight=weight: F.linear(x, weight)).median
        attention = {}
        q, k, v = self.heads()
        for name, kernel in KERNELS[self.device.type].items():
            try:
                found = self.time(lambda kernel=kernel: attend(q, k, v, kernel)).median
            except RuntimeError as error:
                logger.warning("%s does not work here: %s", name, error)
                continue
            attention[name] = 4 * n * n * c.dim / found / 1e12
        self.rates = Rates(work / seconds / 1e12, attention)
        return self.rates

    def matrices(self, rows: int, inner: int, width: int) -> tuple[Tensor, Tensor]:
        """Tokens and a weight matrix that they are multiplied with."""
        return self.random(rows, inner), self.random(width, inner) / math.sqrt(inner)

    def heads(self) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of the model's self-attention."""
        c, n = self.cost.config, self.cost.tokens.total
        q, k, v = (self.random(1, c.num_heads, n, c.dim // c.num_heads) for _ in range(3))
        return q * PEAKED, k * PEAKED, v

    def random(self, *shape: int) -> Tensor:
        """Standard normal numbers on the device."""
        return torch.randn(*shape, generator=self.generator, device=self.device, dtype=self.dtype)

    def synchronise(self) -> None:
        """Wait for the device."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def seconds(self, run: Callable[[], object]) -> float:
        """Time of one call."""
        if not self.on_gpu:
            started = time.perf_counter()
            run()
            return time.perf_counter() - started
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000

    def time(self, run: Callable[[], object]) -> Timing:
        """Repeated time of a call; fewer repetitions than usual where the budget ends."""
        for _ in range(WARM_UPS):
            run()
        self.synchronise()
        self.reset_peak()
        found: list[float] = []
        while len(found) < REPEATS and not (found and self.late):
            found.append(self.seconds(run))
        return timing(found)

    @property
    def late(self) -> bool:
        """Whether the budget is used."""
        return time.monotonic() > self.ends

    def check_time(self, seconds: float = 0.0) -> None:
        """End the case where less than so much of its budget is left.

        Raises:
            OutOfTime: it is.
        """
        left = self.ends - time.monotonic()
        if left <= seconds:
            raise OutOfTime(f"stopped: {max(left, 0):.0f} s are left of {self.request.minutes * 60:.0f} s")

    def reset_peak(self) -> None:
        """Forget the most memory so far."""
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)

    @property
    def memory(self) -> Memory:
        """Most memory since `reset_peak`."""
        host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if not self.on_gpu:
            return Memory(None, None, host)
        allocated, reserved = torch.cuda.max_memory_allocated(self.device), torch.cuda.max_memory_reserved(self.device)
        return Memory(allocated, reserved, host)

    def free(self) -> None:
        """Give back memory that nothing uses."""
        if self.on_gpu:
            gc.collect()
            torch.cuda.empty_cache()

    def limit(self, linear: float, attention: float) -> Limit:
        """Least time of counted FLOPs at this device's speeds, attention with the fastest kernel."""
        rates = self.rates
        fast = rates.attention[rates.fastest]
        return Limit(rates.linear, fast, linear / rates.linear / 1e12 + attention / fast / 1e12)

    def write(self, name: str, seconds: Timing | None = None, **values: Any) -> None:
        """Add a result; rates and ratios follow from its time, FLOPs, bytes and limit."""
        values = {"memory": self.memory, "shapes": self.shapes} | values
        if seconds is not None:
            if "flops" in values:
                values["tflops"] = values["flops"] / seconds.median / 1e12
            if "bytes" in values:
                values["gigabytes_per_second"] = values["bytes"] / seconds.median / 1e9
            if "limit" in values:
                values["ratio_to_limit"] = seconds.median / values["limit"].seconds
        of_all = (self.case, self.request.revision, now(), self.machine)
        append(self.request.out, Result(f"{self.case}/{name}", *of_all, seconds=seconds, **values))

    @property
    def shapes(self) -> dict[str, Any]:
        """The model's sizes."""
        c, cost = self.cost.config, self.cost
        frame = [self.request.height, self.request.width]
        return {"frame": frame, "tokens": cost.tokens.total, "dim": c.dim, "layers": c.num_layers, "heads": c.num_heads}

    def attempt(self, name: str, function: Callable[..., T], *arguments: Any) -> T | None:
        """Run one measurement; one that fails is written as an error, and the case goes on.

        Raises:
            OutOfTime: the budget is used.
        """
        self.check_time()
        try:
            return function(*arguments)
        except OutOfTime:
            raise
        except Exception as error:
            self.fail(name, error)
        self.free()
        return None

    def fail(self, name: str, error: Exception) -> None:
        """Write an error as a result."""
        traceback.print_exception(error)
        lines = str(error).strip().splitlines() or [""]
        self.write(name, error=f"{type(error).__name__}: {lines[0][:300]}")


def timing(seconds: Sequence[float], warm_ups: int = WARM_UPS) -> Timing:
    """Repeated times in short."""
    return Timing(statistics.median(seconds), min(seconds), max(seconds), len(seconds), warm_ups)


def attend(q: Tensor, k: Tensor, v: Tensor, kernel: SDPBackend) -> Tensor:
    """Attention with one kernel.

    Raises:
        RuntimeError: it does not work on this device or with these tensors.
    """
    with sdpa_kernel(kernel):
        return F.scaled_dot_product_attention(q, k, v)


def relative_error(found: Tensor, exact: Tensor) -> float:
    """‖found - exact‖ / ‖exact‖."""
    return float((found.double() - exact.double()).norm() / exact.double().norm())


def machine_facts(device: torch.device) -> dict[str, Any]:
    """Device, driver and versions."""
    facts: dict[str, Any] = {"host": platform.machine(), "python": platform.python_version()}
    for name in ("torch", "diffusers", "transformers", "accelerate", "triton"):
        try:
            facts[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            facts[name] = None
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {"gpu": properties.name, "gpu_bytes": properties.total_memory, "driver": driver_version()}
        facts |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    return facts


def driver_version() -> str | None:
    """Version of NVIDIA's driver, where its tool can be asked."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.check_output(command, text=True, timeout=10).splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return None
