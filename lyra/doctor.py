"""What this machine can run: processor, memory, GPU, installed models and their licences, read and not guessed.

For the released model it shows every way to run it with the memory and time that it is estimated to take. How fast the
device is comes from a measurement, or from a datasheet that is named; where there is neither, no time is given.
"""

from __future__ import annotations

import json
import platform
import re
import shutil
import time
from importlib import metadata
from pathlib import Path

import torch
from huggingface_hub import constants

from lyra import __version__
from lyra.config import ModelSettings
from lyra.hub import MODELS, RELEASED_MODEL, downloaded, licences_of
from lyra.licences import ACCEPT_VARIABLE, accepted
from lyra.models.cost import count_cost
from lyra.models.footprint import Rates
from lyra.placement import FRAME, Machine, PlannedPlacement, plan_placements, this_machine

NEEDED_MEMORY_GIB = 4.0
"""Peak memory of the default job, as the README states it."""
DOWNLOAD_GIB = 90.0
"""Size of the released files that are read."""

MEASURED_RATES = Path(__file__).resolve().parent.parent / "benchmarks" / "rates.json"
"""Written by `benchmarks/limits.py --measure`: by device name, `linear_tflops` and `attention_tflops`."""
MATRIX_SHARE = 0.75
"""Share of a forward pass's time that matrix products take; the rest is norms, rotary embedding and gates (counted)."""

DATASHEET_TFLOPS: tuple[tuple[str, float], ...] = (
    (r"B200", 2250), (r"H200", 989), (r"H100.*HBM3", 989), (r"H100.*NVL", 835), (r"H100", 756), (r"A100", 312),
    (r"L40S", 362), (r"L40", 181), (r"L4", 121), (r"A40", 150), (r"A10G", 70), (r"A10", 125), (r"RTX A6000", 155),
    (r"RTX 6000 Ada", 364), (r"RTX 5090", 210), (r"RTX 5080", 113), (r"RTX 4090", 165), (r"RTX 4080", 97),
    (r"RTX 3090", 71), (r"RTX 3080", 60),
)  # fmt: skip
"""Dense bf16 tensor TFLOP/s with float32 accumulation by device name, from NVIDIA's datasheets (data-centre and
workstation cards) and architecture white papers (GeForce: GA102, Ada, RTX Blackwell)."""
DATASHEET_SHARE = 0.35
"""Share of the datasheet's figure that a forward pass is assumed to reach: what diffusers reached with Wan 2.1 14B on
an H100, 345 of 989 TFLOP/s, by the step times that LightX2V published."""


def report() -> str:
    """The whole report as text."""
    machine = this_machine()
    lines = [f"Lyra {__version__}, Python {platform.python_version()}, torch {torch.__version__}", ""]
    lines += machine_lines(machine)
    lines += ["", "Models"]
    lines += model_lines()
    lines += ["", f"Ways to run {RELEASED_MODEL} at {FRAME[0]}x{FRAME[1]}, best first"]
    lines += placement_lines(machine, device_rates(machine))
    lines += ["", "Packages"]
    names = ("gradio", "diffusers", "accelerate", "numba", "av", "plyfile")
    lines += [f"  {name:<14}{package_version(name)}" for name in names]
    lines += [f"  {'bitsandbytes':<14}{package_version('bitsandbytes', 'not installed; only --weights nf4 needs it')}"]
    return "\n".join(lines)


def machine_lines(machine: Machine) -> list[str]:
    """Processor, memory, disk and GPU, each with what follows from it."""
    fits = machine.host_total_gib >= NEEDED_MEMORY_GIB
    tiny = "enough for lyra-tiny" if fits else f"lyra-tiny wants {NEEDED_MEMORY_GIB:.0f} GiB"
    lines = [
        "Machine",
        f"  processor     {machine.cores} cores ({platform.machine()})",
        f"  memory        {machine.host_total_gib:.1f} GiB, {machine.host_available_gib:.1f} free, {tiny}",
        f"  free disk     {machine.free_disk_gib:.1f} GiB here",
    ]
    if machine.gpu_name is None:
        return [*lines, "  GPU           none that torch can use; lyra-tiny runs on the processor"]
    major, minor = machine.compute_capability
    memory = f"{machine.gpu_total_gib:.0f} GiB, {machine.gpu_free_gib:.1f} free"
    return [*lines, f"  GPU           {machine.gpu_name}, {memory}, compute capability {major}.{minor}"]


def model_lines() -> list[str]:
    """Installed models and the released one, with its licences."""
    lines = []
    for path in sorted(MODELS.glob("*/lyra.json")):
        settings = ModelSettings.load(path.parent)
        size = sum(file.stat().st_size for file in path.parent.rglob("*.safetensors")) / 1e6
        lines.append(
            f"  {settings.name:<18}ready, {size:.0f} MB, {settings.licence}; few steps: {settings.few_step_note}"
        )
    folder, cache = downloaded(RELEASED_MODEL), Path(constants.HF_HUB_CACHE)
    free = free_disk_gib(cache)
    if folder is not None:
        state = f"downloaded to {folder}"
    elif free < DOWNLOAD_GIB:
        state = (
            f"not downloaded; its {DOWNLOAD_GIB:.0f} GiB are {DOWNLOAD_GIB - free:.0f} GiB more than {cache} has free"
        )
    else:
        state = f"not downloaded; the first run fetches up to {DOWNLOAD_GIB:.0f} GiB"
    lines.append(f"  {RELEASED_MODEL:<18}{state}")
    for licence in dict.fromkeys(licences_of(RELEASED_MODEL).values()):
        if licence.gated:
            given = accepted(licence)
            how = f"accepted on {given.date[:10]}" if given else "not accepted yet"
            lines.append(f"  {'':<18}{licence.name}: {how}")
            if not given:
                lines.append(f"  {'':<18}(read it at {licence.url};")
                lines.append(f"  {'':<18}accept it with --accept-licence or {ACCEPT_VARIABLE}={licence.id})")
    return lines


def free_disk_gib(folder: Path) -> float:
    """Free space where a folder is, or will be."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free / 2**30


def placement_lines(machine: Machine, rates: Rates | None) -> list[str]:
    """Every way to run the released model on a machine: memory, time of an 80-frame chunk, and whether it fits."""
    plans = plan_placements(machine, count_cost({}, *FRAME), rates, released=True)
    width = max(len(planned.placement.options) for planned in plans)
    lines = [f"  {'':<{width}}   GPU GiB  host GiB   4 steps  35 steps"]
    lines += [f"  {planned.placement.options:<{width}}  {figures(planned)}  {planned.verdict}" for planned in plans]
    source = rates.source if rates is not None else f"unknown, because nothing is known of the {machine.gpu_name}"
    lines.append(f"  Estimates for 80 frames, memory counted from tensor sizes; speed: {source}.")
    if not any(planned.fits for planned in plans):
        lines.append("  None fits here; lyra-tiny runs everywhere.")
    if machine.gpu_name is not None:
        lines.append("  4-bit weights (nf4) are made from a converted model: see python -m lyra convert --help.")
    else:
        parameters = count_cost({}, *FRAME).parameters
        weights = f"{parameters.total / 1e9:.0f} billion weights take {parameters.bytes('fp32') / 1e9:.0f} GB"
        lines.append(f"  On the processor its {weights} in float32, because bfloat16 is several times slower there.")
    return lines


def figures(planned: PlannedPlacement) -> str:
    """Memory and time of a placement, in columns."""
    gpu = "-" if planned.placement.on_cpu else f"{planned.needs.gpu_gib:.1f}"
    times = f"{duration(planned.few_step_seconds):>8}  {duration(planned.full_seconds):>8}"
    return f"{gpu:>8}  {planned.needs.host_gib:>8.1f}  {times}"


def duration(seconds: float | None) -> str:
    """A time in a unit that suits it."""
    if seconds is None:
        return "unknown"
    for limit, unit, name in ((300, 1, "s"), (7200, 60, "min"), (172_800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / unit:.0f} {name}"
    return f"{seconds / 86_400:.0f} days"


def device_rates(machine: Machine, measured: Path = MEASURED_RATES) -> Rates | None:
    """Speed of a machine's device, measured by the benchmark or a share of the datasheet's; None where it is unknown.

    The CPU is measured on the spot, which takes a fraction of a second.
    """
    if machine.gpu_name is None:
        measured_now = cpu_tflops()
        return Rates(measured_now, measured_now, f"{measured_now * 1000:.0f} GFLOP/s, measured on this processor now")
    known = json.loads(measured.read_text(encoding="utf-8")) if measured.exists() else {}
    if machine.gpu_name in known:
        linear, attention = (known[machine.gpu_name][name] for name in ("linear_tflops", "attention_tflops"))
        source = f"{linear:.0f} TFLOP/s in products and {attention:.0f} in attention, measured on such a GPU"
        return Rates(MATRIX_SHARE * linear, MATRIX_SHARE * attention, source)
    tflops = datasheet_tflops(machine.gpu_name)
    if tflops is None:
        return None
    source = f"{DATASHEET_SHARE:.0%} of the datasheet's {tflops:.0f} TFLOP/s in bf16, not measured"
    return Rates(DATASHEET_SHARE * tflops, DATASHEET_SHARE * tflops, source)


def datasheet_tflops(gpu_name: str) -> float | None:
    """Dense bf16 TFLOP/s of a GPU by its name; None for unknown ones, laptop versions and slices of a GPU."""
    if re.search(r"Laptop|Max-Q|MIG", gpu_name):
        return None
    return next((tflops for name, tflops in DATASHEET_TFLOPS if re.search(rf"\b{name}\b", gpu_name)), None)


def cpu_tflops(size: int = 1024) -> float:
    """Speed of a float32 matrix product on this processor now, the best of three."""
    a, b = torch.randn(2, size, size, generator=torch.Generator().manual_seed(0))
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / min(seconds) / 1e12


def package_version(name: str, otherwise: str = "not installed: pip install -r requirements.txt") -> str:
    """Installed version of a package."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return otherwise
