"""The whole loop at tiny size against the released code's run: two chunks, three UniPC steps."""

import pytest
import torch
from safetensors.torch import load_file

from lyra.config import GenerateJob
from lyra.generation.state import ChunkRecord
from tests.conftest import GOLDEN
from tests.generation.golden_walk import golden_parts, walk_golden_path


def difference(golden, name, ours):
    """Ours and the golden values of a tensor, at the places that the golden file keeps."""
    if name in golden:
        return ours, golden[name]
    assert list(ours.shape) == golden[f"{name}@shape"].tolist()
    return ours.flatten()[golden[f"{name}@index"]], golden[f"{name}@value"]


def agree(ours, golden):
    """True within 1e-4, absolute for values up to 1 and relative beyond, because this random autoencoder's latents
    reach 28 and its colours 5."""
    return bool(((ours - golden).abs() < 1e-4 * golden.abs().clamp(min=1)).all())


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
        "cond_latent": torch.cat([inputs.conditioning, inputs.rays], dim=1),
        "gen_latents": run.sampled[index],
    }
    for name, ours in told.items():
        assert agree(*difference(golden, f"s{index}.{name}", ours)), name
    ours, released = difference(golden, f"s{index}.history_full", run.history[index])
    # The second chunk's history is its encoding of the first one's video: one more network's rounding, at values of 28.
    assert (ours - released).abs().max() < 1e-5 * released.abs().max()


def test_the_video_is_the_released_one(run, golden):
    video = torch.cat([run.decoded[0], run.decoded[1]], dim=2)
    assert golden["video@shape"].tolist() == [1, 3, 161, 64, 96]
    rows = torch.unravel_index(golden["video@index"], (1, 3, 161, 64, 96))[2]
    generated = rows > 0
    full = torch.cat([torch.zeros_like(video[:, :, :1]), video], dim=2)
    ours, released = full.flatten()[golden["video@index"]][generated], golden["video@value"][generated]
    assert int(generated.sum()) > 4000
    # What is shown is cut to [-1, 1], and there 1e-4 is absolute.
    assert (ours.clamp(-1, 1) - released.clamp(-1, 1)).abs().max() < 1e-4
    assert agree(ours, released)


def test_a_record_read_back_is_the_same(run):
    record = run.records[0]
    again = ChunkRecord.from_tensors(record.to_tensors())
    for name, tensor in record.to_tensors().items():
        assert torch.equal(tensor, again.to_tensors()[name]), name
