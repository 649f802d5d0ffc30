"""The denoising loops: UniPC with guidance, and four distilled steps without.

Only the target latents are sampled; the history stays clean outside. Knows neither the network nor what it is
conditioned on: it gets a velocity function.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from lyra.diffusion.schedulers import TRAIN_TIMESTEPS, dmd_sigmas, network_timesteps, unipc

Velocity = Callable[[Tensor, float], Tensor]
"""(noisy targets, timestep in 0..1000) -> velocity."""
OnStep = Callable[[int, int], None]
"""(finished steps, all steps); may raise to stop the loop."""


def initial_noise(seed: int, shape: tuple[int, ...]) -> Float[Tensor, "1 c t h w"]:
    """Standard normal noise from numpy's RandomState, so that it is the released model's (released code)."""
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape).astype(np.float32))


def sample_full(
    conditional: Velocity,
    unconditional: Velocity,
    noise: Float[Tensor, "b c t h w"],
    *,
    num_inference_steps: int,
    guidance_scale: float,
    flow_shift: float,
    callback_on_step_end: OnStep,
) -> Float[Tensor, "b c t h w"]:
    """UniPC with classifier-free guidance v = v_u + g (v_c - v_u)."""
    scheduler = unipc(num_inference_steps, flow_shift)
    state = noise
    for index, timestep in enumerate(network_timesteps(scheduler).tolist()):
        velocity = conditional(state, float(timestep))
        if guidance_scale != 1.0:
            without = unconditional(state, float(timestep))
            velocity = without + guidance_scale * (velocity - without)
        state = scheduler.step(velocity, scheduler.timesteps[index], state, return_dict=False)[0]
        callback_on_step_end(index + 1, num_inference_steps)
    return state


def sample_dmd(
    velocity: Velocity,
    noise: Float[Tensor, "b c t h w"],
    *,
    flow_shift: float,
    history_slots: int = 0,
    generator: torch.Generator,
    callback_on_step_end: OnStep,
) -> Float[Tensor, "b c t h w"]:
    """Four steps: estimate the clean sample, add fresh noise of the next level, and again (released code).

    The released code draws the fresh noise from the device's global generator, for history and targets together and
    with time as the first axis; here it comes from `generator`, in the same order, so that a generator in the state of
    the released run gives the released numbers.

    Args:
        history_slots: latents before the targets, for which noise is drawn and not used.
    """
    sigmas = dmd_sigmas(flow_shift)
    state = noise
    for index, sigma in enumerate(sigmas.tolist()):
        sample = (state.double() - sigma * velocity(state, sigma * TRAIN_TIMESTEPS).double()).float()
        if index + 1 < len(sigmas):
            following = float(sigmas[index + 1])
            fresh = fresh_noise(state, history_slots, generator)
            state = (1 - following) * sample + following * fresh
        callback_on_step_end(index + 1, len(sigmas))
    return sample


def fresh_noise(
    state: Float[Tensor, "b c t h w"], history_slots: int, generator: torch.Generator
) -> Float[Tensor, "b c t h w"]:
    """Standard normal noise for the targets, drawn with time first and for the history too (released code)."""
    batch, channels, time, height, width = state.shape
    shape = (batch, history_slots + time, channels, height, width)
    noise = torch.randn(shape, generator=generator, device=generator.device)
    return noise[:, history_slots:].transpose(1, 2).to(state.device)
