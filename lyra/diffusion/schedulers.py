"""The time grids of both samplers, and UniPC set up so that its numbers are the released model's.

Knows no network. The UniPC solver itself is diffusers'.
"""

from __future__ import annotations

import numpy as np
import torch
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler
from jaxtyping import Float, Int
from torch import Tensor

TRAIN_TIMESTEPS = 1000
DMD_TIMES = (1.0, 0.75, 0.5, 0.25)
"""Unshifted times of the four distilled steps (paper section 4.4)."""


def shift_time(sigma: Float[np.ndarray, "n"] | float, shift: float) -> Float[np.ndarray, "n"]:
    """Time shift s t / (1 + (s - 1) t) (SD3; released: s = 5)."""
    return np.asarray(shift * np.asarray(sigma) / (1 + (shift - 1) * np.asarray(sigma)))


def unipc(steps: int, shift: float) -> UniPCMultistepScheduler:
    """UniPC, order 2, bh2, data prediction, on the released grid: 0.999 to 0, shifted, a final zero."""
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift, solver_order=2, solver_type="bh2"
    )
    scheduler.set_timesteps(sigmas=np.linspace(0.999, 0.0, steps + 1)[:-1])
    return scheduler


def network_timesteps(scheduler: UniPCMultistepScheduler) -> Int[Tensor, "n"]:
    """The times that the network is told: integer parts of 1000 sigma (released code)."""
    return (scheduler.sigmas[:-1].double() * TRAIN_TIMESTEPS).long()


def dmd_sigmas(shift: float) -> Float[Tensor, "4"]:
    """Sigmas of the four-step sampler: 1, 0.9375, 0.8333, 0.625 at shift 5."""
    return torch.from_numpy(shift_time(np.array(DMD_TIMES), shift))


def training_sigmas(shift: float = 5.0) -> Float[Tensor, "1000"]:
    """Descending training grid: 1000 shifted times from 1 to 0.005 (released code)."""
    return torch.from_numpy(shift_time(np.linspace(1.0, 1 / TRAIN_TIMESTEPS, TRAIN_TIMESTEPS), shift)).float()


def training_weights(sigmas: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
    """Loss weight of each time: a bell around t = 500, from 0, with mean 1 over the grid (released code)."""
    times = sigmas.double() * TRAIN_TIMESTEPS
    bell = torch.exp(-2 * ((times - 500) / TRAIN_TIMESTEPS) ** 2)
    bell = bell - bell.min()
    return (bell * len(bell) / bell.sum()).float()
