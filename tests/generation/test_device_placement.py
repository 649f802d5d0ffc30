"""Every tensor of the loop is where the networks are: the golden run on a pretended accelerator."""

import pytest
import torch

from lyra import photo
from lyra.config import GenerateJob
from lyra.hub import find_model
from lyra.loading import load_components
from lyra.pipeline import LyraPipeline
from lyra.placement import Placement
from tests.conftest import DEFAULT_PHOTO
from tests.generation.golden_walk import golden_parts, walk_golden_path
from tests.simulated_device import DEVICE, SimulatedDevice


def test_the_pretended_device_refuses_what_a_real_one_refuses():
    with torch.no_grad(), SimulatedDevice():
        there = torch.ones(3, device=DEVICE)
        assert (there + there).device == DEVICE
        assert (there + there).cpu().device.type == "cpu"
        with pytest.raises(RuntimeError, match="one device"):
            there + torch.ones(3)
        with pytest.raises(RuntimeError, match="CPU tensor is written"):
            there[:2] = torch.zeros(2)


@pytest.mark.parametrize(("sampler", "chunks"), [("dmd", 2), ("full", 1)])
def test_chunks_on_an_accelerator_are_what_they_are_on_the_cpu(released_shapes, sampler, chunks):
    job = GenerateJob(photo="", sampler=sampler, steps=4, guidance_scale=5.0, seed=1, chunks=chunks)
    expected = walk_golden_path(golden_parts(released_shapes), job)
    with torch.no_grad(), SimulatedDevice():
        ours = walk_golden_path(golden_parts(released_shapes, DEVICE), job, DEVICE)
        assert all(latents.device == DEVICE for latents in ours.sampled)
        for there, here in zip(ours.records, expected.records, strict=True):
            assert there.retrieved_ids.tolist() == here.retrieved_ids.tolist()
            assert there.latents.device == DEVICE and there.pixels.device.type == "cpu"
            assert torch.allclose(there.depth.cpu(), here.depth)
        for there, here in zip(ours.sampled, expected.sampled, strict=True):
            assert torch.allclose(there.cpu(), here, atol=5e-3)


def test_the_default_model_makes_its_chunk_on_an_accelerator(tmp_path, monkeypatch):
    monkeypatch.setattr(photo, "LANDSCAPE", {"480x832": (128, 224)})
    source = find_model("lyra-tiny")

    def walk(device: str):
        placement = Placement("fp32", "none", device=device)
        pipeline = LyraPipeline(load_components(source, placement), source, placement)
        return pipeline(DEFAULT_PHOTO, tmp_path / device, preset="push-in").video.float()

    expected = walk("cpu")
    with torch.no_grad(), SimulatedDevice():
        ours = walk(str(DEVICE))
    assert (ours - expected).abs().mean() < 1
