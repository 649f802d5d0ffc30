"""Does a model fit on this machine, in which ways, and which of them is best?

Plans from counted bytes (`lyra.models.footprint`) and from what a machine has; only `this_machine` and what calls it
look at the real one. `lyra.offload` applies a placement; how fast a device is, `lyra.doctor` finds out.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lyra.device import choose_device, usable_cores
from lyra.errors import UserError
from lyra.hub import ModelSource
from lyra.models import footprint
from lyra.models.cost import WEIGHT_FORMATS, ModelCost, count_cost
from lyra.models.footprint import DECODES, OFFLOADS, ON_CPU, ON_GPU, OPTIONAL_PACKAGES, Placement, Rates

GIB = 2**30
CAPABILITY = (8, 0)
"""Compute capability from which a GPU calculates in bfloat16."""
WORTH_IT = 0.95
"""Memory of another way, as a share, up to which it is worth changing to."""
SMALL_MODEL = 2e9
"""Bytes of weight files up to which a model is taken to fit anywhere, so that nothing is planned."""
FRAME = (480, 832)
"""Height and width that a run is planned for; it is the largest size that is offered."""


@dataclass(frozen=True)
class Machine:
    """What a machine has, as far as it decides what runs."""

    gpu_name: str | None
    """None without a CUDA device."""
    gpu_total_gib: float
    gpu_free_gib: float
    compute_capability: tuple[int, int]
    host_total_gib: float
    host_available_gib: float
    cores: int
    free_disk_gib: float
    packages: frozenset[str]
    """Those of `OPTIONAL_PACKAGES` that are installed."""


@dataclass(frozen=True)
class Needs:
    """What a placement asks of a machine."""

    packages: tuple[str, ...]
    compute_capability: tuple[int, int] | None
    """None on the CPU."""
    gpu_gib: float
    """Estimated peak."""
    host_gib: float


@dataclass(frozen=True)
class PlannedPlacement:
    """A placement on a machine."""

    placement: Placement
    needs: Needs
    few_step_seconds: float | None
    """Of an 80-frame chunk with 4 distilled steps; None where the device's speed is unknown."""
    full_seconds: float | None
    """Of an 80-frame chunk with 35 steps and guidance."""
    gpu_short_gib: float
    """GPU memory that is missing; 0 where there is enough."""
    host_short_gib: float
    missing_packages: tuple[str, ...]
    too_old: bool
    """The GPU cannot calculate in bfloat16."""

    @property
    def has_room(self) -> bool:
        """Whether the machine can run it, once packages are installed and the model is converted."""
        return not (self.gpu_short_gib or self.host_short_gib or self.too_old)

    @property
    def fits(self) -> bool:
        """Whether it can be run as it is."""
        return self.has_room and not (self.missing_packages or self.placement.must_be_converted)

    @property
    def verdict(self) -> str:
        """What is missing, or that it fits."""
        if self.too_old:
            return f"needs compute capability {CAPABILITY[0]}.{CAPABILITY[1]}"
        lacks = [f"{self.gpu_short_gib:.1f} GiB of GPU memory short"] if self.gpu_short_gib else []
        lacks += [f"{self.host_short_gib:.1f} GiB of host memory short"] if self.host_short_gib else []
        lacks += [f"needs pip install {' '.join(self.missing_packages)}"] if self.missing_packages else []
        lacks += ["needs a converted model"] if self.placement.must_be_converted else []
        return ", ".join(lacks) or "fits"


def needs(placement: Placement, cost: ModelCost) -> Needs:
    """What a placement asks of a machine, estimated from counted bytes."""
    phases = footprint.device_phases(cost, placement)
    if placement.on_cpu:
        return Needs(placement.packages, None, 0.0, (phases.peak + footprint.PROCESS) / GIB)
    return Needs(placement.packages, CAPABILITY, phases.peak / GIB, footprint.host_bytes(cost, placement) / GIB)


def plan(placement: Placement, machine: Machine, cost: ModelCost, rates: Rates | None = None) -> PlannedPlacement:
    """One placement on a machine; times are left out where the device's speed is unknown."""
    asked = needs(placement, cost)

    def seconds(steps: int, guided: bool) -> float | None:
        return None if rates is None else footprint.chunk_seconds(cost, rates, steps, placement, guided=guided)

    return PlannedPlacement(
        placement=placement,
        needs=asked,
        few_step_seconds=seconds(4, False),
        full_seconds=seconds(35, True),
        gpu_short_gib=max(0.0, asked.gpu_gib - machine.gpu_free_gib),
        host_short_gib=max(0.0, asked.host_gib - machine.host_available_gib),
        missing_packages=tuple(name for name in asked.packages if name not in machine.packages),
        too_old=asked.compute_capability is not None and machine.compute_capability < asked.compute_capability,
    )


def plan_placements(
    machine: Machine, cost: ModelCost, rates: Rates | None = None, *, released: bool = False
) -> list[PlannedPlacement]:
    """What is chosen from on a machine, best first, fitting or not; tiles only where they take less memory.

    Args:
        released: the model's files are laid out as NVIDIA released them.
    """
    plans = [plan(placement, machine, cost, rates) for placement in offered(machine, released=released)]

    def worth_it(planned: PlannedPlacement) -> bool:
        whole = needs(replace(planned.placement, decode="streamed"), cost)
        return planned.placement.decode == "streamed" or planned.needs.gpu_gib <= WORTH_IT * whole.gpu_gib

    return [planned for planned in plans if worth_it(planned)]


def offered(
    machine: Machine,
    weights: str | None = None,
    offload: str | None = None,
    decode: str | None = None,
    *,
    released: bool = False,
) -> list[Placement]:
    """The placements with the given settings, best first; any setting where None.

    Raises:
        UserError: a setting does not exist, or not without a GPU.
    """
    check_names(weights, offload, decode)
    if machine.gpu_name is None:
        if weights not in (None, "fp32") or offload not in (None, "none"):
            raise UserError(
                "Without a GPU this model runs in float32 and stays in memory; leave --weights and --offload out."
            )
        found: tuple[Placement, ...] = ON_CPU
    elif weights == "fp32":
        found = tuple(Placement("fp32", way) for way in OFFLOADS)
    else:
        found = ON_GPU
    named = [p for p in found if weights in (None, p.weights) and offload in (None, p.offload)]
    if decode == "tiled":
        named = list(dict.fromkeys(replace(p, decode="tiled") for p in named))
    return [replace(p, released=released) for p in named if decode in (None, p.decode)]


def check_names(weights: str | None, offload: str | None, decode: str | None) -> None:
    """Refuse settings that do not exist.

    Raises:
        UserError: one does not.
    """
    for option, value, known in (
        ("weights", weights, WEIGHT_FORMATS),
        ("offload", offload, OFFLOADS),
        ("decode", decode, DECODES),
    ):
        if value is not None and value not in known:
            raise UserError(f"--{option} is '{value}'; choose one of: {', '.join(known)}.")


def best_placement(
    machine: Machine,
    cost: ModelCost,
    weights: str | None = None,
    offload: str | None = None,
    decode: str | None = None,
    model: str = "The model",
    *,
    released: bool = False,
) -> PlannedPlacement:
    """The best placement with the given settings that fits.

    Args:
        model: its name, for the sentence that says why none fits.
        released: its files are laid out as NVIDIA released them.

    Raises:
        UserError: none fits, or a setting does not exist.
    """
    ways = offered(machine, weights, offload, decode, released=released)
    plans = [plan(placement, machine, cost) for placement in ways]
    for planned in plans:
        if planned.fits:
            return planned
    others = plan_placements(machine, cost, released=released)
    raise UserError(nothing_fits_sentence(plans, others, machine, cost, model))


def nothing_fits_sentence(
    plans: list[PlannedPlacement], others: list[PlannedPlacement], machine: Machine, cost: ModelCost, model: str
) -> str:
    """Why none of some placements fits, by how much the nearest one does not, and what would help."""

    def distance(p: PlannedPlacement) -> tuple[bool, float, bool, int]:
        return p.too_old, p.gpu_short_gib + p.host_short_gib, p.placement.must_be_converted, len(p.missing_packages)

    nearest = min(plans, key=distance)
    asked = nearest.needs
    if nearest.too_old:
        major, minor = machine.compute_capability
        has = f"{nearest.verdict}, and {machine.gpu_name} has {major}.{minor}"
        return f"{model} cannot run on this GPU: its bfloat16 {has}; use a newer GPU or --model lyra-tiny."
    lacks = []
    if nearest.gpu_short_gib:
        lacks.append(f"{asked.gpu_gib:.1f} GiB of GPU memory, {nearest.gpu_short_gib:.1f} GiB more than is free")
    if nearest.host_short_gib:
        lacks.append(f"{asked.host_gib:.1f} GiB of host memory, {nearest.host_short_gib:.1f} GiB more than is free")
    if nearest.missing_packages:
        lacks.append(f"the package {' and '.join(nearest.missing_packages)}")
    if nearest.placement.must_be_converted:
        lacks.append("a converted model")
    lead = f"even {nearest.placement.options}" if len(plans) > 1 else nearest.placement.options
    way_out = what_would_help(nearest, others, model)
    if machine.gpu_name is None:
        p = cost.parameters
        lead = (
            f"its {p.total / 1e9:.1f} billion weights alone are {p.bytes('fp32') / 1e9:.0f} GB in float32, and the CPU"
        )
        way_out = "use a machine with a GPU or more memory, or --model lyra-tiny"
    return f"{model} does not fit this machine: {lead} needs {' and '.join(lacks)}; {way_out}."


def what_would_help(nearest: PlannedPlacement, others: list[PlannedPlacement], model: str) -> str:
    """A placement that fits, or what to install or convert so that one does."""
    fitting = next((planned for planned in others if planned.fits), None)
    if fitting is not None:
        return f"use {fitting.placement.options}, which fits"
    roomy = nearest if nearest.has_room else next((planned for planned in others if planned.has_room), None)
    if roomy is None:
        return "close other programs, use a machine with more memory, or --model lyra-tiny"
    steps = []
    if roomy.missing_packages:
        steps.append(f"run pip install {' '.join(roomy.missing_packages)}")
    if roomy.placement.must_be_converted:
        steps.append(f"run python -m lyra convert {model} --out FOLDER once and use --model FOLDER")
    return " and ".join(steps) + ("" if roomy is nearest else f", and {roomy.placement.options} fits")


def choose_placement(
    source: ModelSource,
    *,
    device: str | None = None,
    weights: str | None = None,
    offload: str | None = None,
    decode: str | None = None,
) -> Placement:
    """The best placement of a model on this machine, or the one that the settings name.

    A small model stays on the device, in bf16 on a GPU that calculates in it and in float32 elsewhere, unless the
    settings say otherwise.

    Raises:
        UserError: the device is not there, a setting does not exist, or the model does not fit.
    """
    chosen, released = choose_device(device).device, source.layout == "released"
    machine = this_machine(chosen)
    if footprint.stored_bytes(source.folder) > SMALL_MODEL:
        cost = count_cost(footprint.transformer_config(source.folder, released=released), *FRAME)
        found = best_placement(machine, cost, weights, offload, decode, source.name, released=released)
        return replace(found.placement, device=str(chosen), cost=cost)
    check_names(weights, offload, decode)
    if weights == "nf4" and chosen.type != "cuda":
        raise UserError("4-bit weights are made on a CUDA GPU; leave --weights out or choose another format.")
    default = "fp32" if chosen.type == "cpu" or machine.compute_capability < CAPABILITY else "bf16"
    settings: Any = {"weights": weights or default, "offload": offload or "none", "decode": decode or "streamed"}
    placement = replace(Placement(device=str(chosen), released=released), **settings)
    missing = [name for name in placement.packages if name not in machine.packages]
    if missing:
        raise UserError(f"{placement.options} needs a package that is missing; run pip install {' '.join(missing)}.")
    return placement


def next_to_try(placement: Placement, machine: Machine) -> Placement | None:
    """The next placement that takes at least 5 % less GPU memory and can be run; None where there is none."""
    if placement.on_cpu:
        return None
    known = (replace(placement, device="cuda"), replace(placement, decode="streamed", device="cuda"))
    place = next((ON_GPU.index(way) + 1 for way in known if way in ON_GPU), 0)
    settings: Any = {name: getattr(placement, name) for name in ("device", "cost", "released")}
    for following in (replace(p, **settings) for p in ON_GPU[place:]):
        if following.must_be_converted or any(name not in machine.packages for name in following.packages):
            continue
        if placement.cost is None:
            return following
        # The memory that is free now says little, because the run that failed holds some of it.
        planned = plan(following, machine, placement.cost)
        most = min(WORTH_IT * needs(placement, placement.cost).gpu_gib, machine.gpu_total_gib)
        if planned.needs.gpu_gib <= most and not planned.host_short_gib:
            return following
    return None


def out_of_memory_sentence(placement: Placement, machine: Machine) -> str:
    """What to tell the user when the GPU ran out of memory."""
    start = f"{machine.gpu_total_gib:.0f} GiB of GPU memory were not enough for {placement.options}"
    following = next_to_try(placement, machine)
    if following is None:
        return (
            f"{start}, and no smaller mode runs here; close other programs that use the GPU or use --model lyra-tiny."
        )
    takes = f", which takes about {needs(following, following.cost).gpu_gib:.1f} GiB" if following.cost else ""
    return f"{start}; try {following.options}{takes}."


@contextmanager
def memory_explained(placement: Placement) -> Iterator[None]:
    """Turn running out of GPU memory into a sentence that names what to try next.

    Raises:
        UserError: the GPU ran out of memory.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(out_of_memory_sentence(placement, this_machine(placement.torch_device))) from error


def this_machine(device: torch.device | None = None) -> Machine:
    """The machine that this process runs on, with a CUDA device: the given one, or the current one where None."""
    total, available = host_memory_bytes()
    name: str | None = None
    gpu_total, gpu_free, capability = 0, 0, (0, 0)
    if torch.cuda.is_available() and (device is None or device.type == "cuda"):
        name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
        gpu_free, gpu_total = torch.cuda.mem_get_info(device)
    return Machine(
        gpu_name=name,
        gpu_total_gib=gpu_total / GIB,
        gpu_free_gib=gpu_free / GIB,
        compute_capability=capability,
        host_total_gib=total / GIB,
        host_available_gib=available / GIB,
        cores=usable_cores(),
        free_disk_gib=shutil.disk_usage(Path.cwd()).free / GIB,
        packages=frozenset(name for name in OPTIONAL_PACKAGES if importlib.util.find_spec(name) is not None),
    )


def host_memory_bytes(root: Path = Path("/")) -> tuple[int, int]:
    """Installed and available host memory, within the limit of a container; `root` is where /proc and /sys are."""
    total = available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    information = root / "proc" / "meminfo"
    if information.exists():
        found = dict(re.findall(r"(\w+):\s+(\d+) kB", information.read_text(encoding="utf-8")))
        total, available = int(found["MemTotal"]) * 1024, int(found["MemAvailable"]) * 1024
    group = root / "sys" / "fs" / "cgroup"
    if (group / "memory.max").exists():
        limit = (group / "memory.max").read_text(encoding="utf-8").strip()
        if limit != "max":
            # Pages of files are given back when memory is needed.
            files = re.search(r"^inactive_file (\d+)", (group / "memory.stat").read_text(encoding="utf-8"), re.M)
            used = int((group / "memory.current").read_text(encoding="utf-8")) - int(files[1] if files else 0)
            total, available = min(total, int(limit)), max(0, min(available, int(limit) - used))
    return total, available
