"""What this machine can run: processor, memory, GPU, installed models and their licences, read and not guessed."""

from __future__ import annotations

import os
import platform
import shutil
from importlib import metadata
from pathlib import Path

import torch

from lyra import __version__
from lyra.config import ModelSettings
from lyra.device import usable_cores
from lyra.hub import MODELS, RELEASED_MODEL

NEEDED_MEMORY_GIB = 4.0
"""Peak memory of the default job, as the README states it."""


def report() -> str:
    """The whole report as text."""
    lines = [f"Lyra {__version__}, Python {platform.python_version()}, torch {torch.__version__}", ""]
    lines += machine_lines()
    lines += ["", "Models"]
    lines += model_lines()
    lines += ["", "Packages"]
    lines += [f"  {name:<14}{package_version(name)}" for name in ("gradio", "diffusers", "numba", "av", "plyfile")]
    return "\n".join(lines)


def machine_lines() -> list[str]:
    """Processor, memory, disk and GPU, each with what follows from it."""
    total = total_memory_gib()
    fits = "enough for lyra-tiny" if total >= NEEDED_MEMORY_GIB else f"lyra-tiny wants {NEEDED_MEMORY_GIB:.0f} GiB"
    lines = [
        "Machine",
        f"  processor     {usable_cores()} cores ({platform.machine()})",
        f"  memory        {total:.1f} GiB, {fits}",
        f"  free disk     {shutil.disk_usage(Path.cwd()).free / 2**30:.1f} GiB here",
    ]
    if not torch.cuda.is_available():
        return [*lines, "  GPU           none that torch can use; lyra-tiny runs on the processor"]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        lines.append(f"  GPU {index}         {properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    return lines


def model_lines() -> list[str]:
    """Installed models and the released one."""
    lines = []
    for path in sorted(MODELS.glob("*/lyra.json")):
        settings = ModelSettings.load(path.parent)
        size = sum(file.stat().st_size for file in path.parent.rglob("*.safetensors")) / 1e6
        lines.append(
            f"  {settings.name:<18}ready, {size:.0f} MB, {settings.licence}; few steps: {settings.few_step_note}"
        )
    lines.append(
        f"  {RELEASED_MODEL:<18}not loadable by this version; its weights are for research only "
        "(NVIDIA Internal Scientific Research and Development Model License)"
    )
    return lines


def total_memory_gib() -> float:
    """Installed memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def package_version(name: str) -> str:
    """Installed version of a package."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed: pip install -r requirements.txt"
