"""The whole loop at tiny size against the released code's run: two chunks, three UniPC steps."""

import pytest
import torch
from safetensors.torch import load_file

from lyra.config import GenerateJob
from lyra.generation.state import ChunkRecord
from tests.conftest import GOLDEN
from tests.generation.golden_walk import golden_parts, walk_golden_path


def largest_error(golden, name, ours):
    """Largest difference to a golden tensor, and the largest golden value."""
    if name in golden:
        return float((ours - golden[name]).abs().max()), float(golden[name].abs().max())
    assert list(ours.shape) == golden[f"{name}@shape"].tolist()
    difference = ours.flatten()[golden[f"{name}@index"]] - golden[f"{name}@value"]
    return float(difference.abs().max()), float(golden[f"{name}@stats"][2])


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN / "pipeline_unipc3.safetensors")


@pytest.fixture(scope="module")
def run(released_shapes):
    job = GenerateJob(photo="", sampler="full", steps=3, guidance_scale=5.0, seed=1, chunks=2)
    return walk_golden_path(golden_parts(released_shapes), job)


@pytest.mark.parametrize("index", [0, 1])
def test_every_input_of_the_network_and_the_sampled_latents_are_the_released_ones(run, golden, index):
    inputs = run.told[index]
    assert run.records[index].retrieved_ids.tolist() == golden[f"s{index}.retrieved_ids"].tolist()
    assert torch.equal(inputs.mask, golden[f"s{index}.mask"])
    told = {
        "buffer": inputs.correspondence,
        "history_full": run.history[index],
        "cond_latent": torch.cat([inputs.conditioning, inputs.rays], dim=1),
        "gen_latents": run.sampled[index],
    }
    for name, ours in told.items():
        error, scale = largest_error(golden, f"s{index}.{name}", ours)
        # Latents of this random autoencoder reach 28, where a float32 rounds at 2e-6.
        assert error < 1e-4 * max(1.0, scale / 4), name


def test_the_video_is_the_released_one(run, golden):
    video = torch.cat([run.decoded[0], run.decoded[1]], dim=2)
    assert golden["video@shape"].tolist() == [1, 3, 161, 64, 96]
    rows = torch.unravel_index(golden["video@index"], (1, 3, 161, 64, 96))[2]
    generated = rows > 0
    full = torch.cat([torch.zeros_like(video[:, :, :1]), video], dim=2)
    difference = (full.flatten()[golden["video@index"]] - golden["video@value"])[generated]
    assert int(generated.sum()) > 4000
    assert difference.abs().max() < 1e-4 * max(1.0, float(golden["video@stats"][2]) / 4)


def test_a_record_read_back_is_the_same(run):
    record = run.records[0]
    again = ChunkRecord.from_tensors(record.to_tensors())
    for name, tensor in record.to_tensors().items():
        assert torch.equal(tensor, again.to_tensors()[name]), name
