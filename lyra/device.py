"""Which device and number format a run uses, and how much memory a process has used.

float32 on the CPU, because bfloat16 is several times slower there; bfloat16 on CUDA.
"""

from __future__ import annotations

import os
import resource
import sys
from dataclasses import dataclass

import torch

from lyra.errors import UserError


@dataclass(frozen=True)
class Device:
    """Where a model runs."""

    device: torch.device
    dtype: torch.dtype


def choose_device(name: str | None = None) -> Device:
    """The named device, or CUDA where there is one, or the CPU.

    Raises:
        UserError: the named device is not there.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"'{name}' is not a device; choose cpu or cuda.") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"'{name}' is not a device that is supported; choose cpu or cuda.")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("This machine has no CUDA device that torch can use; choose --device cpu.")
    return Device(device, torch.bfloat16 if device.type == "cuda" else torch.float32)


def usable_cores() -> int:
    """Processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def peak_memory_gib() -> float:
    """Largest resident memory of this process so far, in GiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20
