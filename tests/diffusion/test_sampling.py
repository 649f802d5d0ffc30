"""Time grids against the released tables, and what the samplers do with an exact velocity."""

import pytest
import torch

from lyra.diffusion.sampling import initial_noise, sample_dmd, sample_full
from lyra.diffusion.schedulers import dmd_sigmas, network_timesteps, training_sigmas, training_weights, unipc


def silent(step: int, steps: int) -> None:
    """Ignore progress."""


@pytest.mark.parametrize("steps", [4, 35, 50])
def test_unipc_times_are_the_released_ones(conditioning, steps):
    scheduler = unipc(steps, 5.0)
    assert torch.equal(network_timesteps(scheduler), conditioning[f"unipc.{steps}.timesteps"])
    assert (scheduler.sigmas - conditioning[f"unipc.{steps}.sigmas"]).abs().max() < 1e-6


def test_unipc_updates_are_the_released_ones(conditioning):
    states, x0 = conditioning["unipc.run35.states"], conditioning["unipc.run35.x0"]
    scheduler = unipc(35, 5.0)
    # The golden run's velocity is that of a known clean sample; from each state the next one must follow.
    state = states[0]
    for index, timestep in enumerate(scheduler.timesteps):
        velocity = (state - x0) / scheduler.sigmas[index]
        state = scheduler.step(velocity, timestep, state, return_dict=False)[0]
    assert (state - x0).abs().max() < 1e-4


def test_training_grid_and_weights_are_the_released_ones(conditioning):
    sigmas = training_sigmas()
    assert (sigmas - conditioning["train.sigmas"]).abs().max() < 1e-6
    assert (training_weights(sigmas) - conditioning["train.weight_all"]).abs().max() < 1e-5


def test_four_step_levels():
    assert (dmd_sigmas(5.0) * 1000).tolist() == pytest.approx([1000, 937.5, 833.3333, 625], abs=1e-3)


def test_both_samplers_reach_the_sample_of_an_exact_velocity():
    clean = torch.linspace(-1, 1, 60).view(1, 3, 5, 2, 2)

    def velocity(state: torch.Tensor, timestep: float) -> torch.Tensor:
        return (state - clean) / (timestep / 1000)

    noise = initial_noise(3, tuple(clean.shape))
    few = sample_dmd(
        velocity, noise, flow_shift=5.0, generator=torch.Generator().manual_seed(0), callback_on_step_end=silent
    )
    assert torch.allclose(few, clean, atol=1e-5)
    full = sample_full(
        velocity,
        velocity,
        noise,
        num_inference_steps=12,
        guidance_scale=5.0,
        flow_shift=5.0,
        callback_on_step_end=silent,
    )
    assert torch.allclose(full, clean, atol=5e-3)


def test_a_callback_stops_the_loop_within_one_step():
    calls = []

    def velocity(state: torch.Tensor, timestep: float) -> torch.Tensor:
        calls.append(timestep)
        return state

    def stop(step: int, steps: int) -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        sample_dmd(
            velocity,
            initial_noise(0, (1, 1, 1, 2, 2)),
            flow_shift=5.0,
            generator=torch.Generator().manual_seed(0),
            callback_on_step_end=stop,
        )
    assert len(calls) == 1


def test_noise_is_numpys_so_that_seeds_mean_what_they_mean_in_the_released_code():
    assert initial_noise(1, (1, 1, 1, 1, 2)).flatten().tolist() == pytest.approx([1.6243453, -0.6117564])
