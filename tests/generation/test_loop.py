"""The whole loop at tiny size against the released code's run: two chunks, three UniPC steps."""

import pytest
import recipe
import torch
from safetensors.torch import load_file

from lyra.config import GenerateJob, ModelSettings
from lyra.generation import walkthrough
from lyra.generation.state import ChunkRecord
from lyra.generation.walkthrough import Components, Walk, generate_chunk, start
from lyra.models.streaming import StreamingWanAutoencoder
from lyra.progress import Progress
from lyra.types import Cameras
from tests.conftest import GOLDEN
from tests.models.tiny_released import golden_autoencoder, golden_transformer

SETTINGS = ModelSettings(
    name="golden",
    licence="",
    generation_height=None,
    generation_width=None,
    keep_seen_pixels=False,
    fill_holes=False,
    visibility_mask=False,
    few_step_note="",
)


class WallDepth:
    """Exact depth of the golden scene."""

    def measure(self, images, cameras, seen_depth):
        size = images.shape[-2:]
        pairs = zip(cameras.w2c.numpy(), cameras.intrinsics.numpy(), strict=True)
        return torch.stack([torch.from_numpy(recipe.wall_depth(w2c, k, *size)) for w2c, k in pairs])


def assert_matches(golden, name, ours, tolerance):
    if name in golden:
        assert (ours - golden[name]).abs().max() < tolerance
        return
    assert list(ours.shape) == golden[f"{name}@shape"].tolist()
    difference = ours.flatten()[golden[f"{name}@index"]] - golden[f"{name}@value"]
    assert difference.abs().max() < tolerance


@pytest.fixture(scope="module")
def run(released_shapes):
    """Both chunks of the golden run, with what the network was told about each."""
    given = recipe.pipeline_inputs()
    texts = {"first": given["chunk_text"][:, 0], "second": given["chunk_text"][:, 1]}
    transformer = golden_transformer(released_shapes)
    parts = Components(
        settings=SETTINGS,
        transformer=transformer,
        layout=transformer.layout,
        autoencoder=StreamingWanAutoencoder(golden_autoencoder()),
        encode_text=lambda prompts: texts[prompts[0]],
        negative_text=given["negative"],
        encode_image=recipe.stand_in_clip,
        depth=WallDepth(),
        blend=None,
        use_sampler=lambda name: None,
    )
    cameras = Cameras(given["w2c"], given["K"].expand(161, 3, 3), 64, 96)
    depth = torch.from_numpy(recipe.wall_depth(given["w2c"][0].numpy(), given["K"].numpy(), 64, 96))
    walk = Walk(given["photo"][0], depth, cameras, (64, 96))
    job = GenerateJob(photo="", sampler="full", steps=3, guidance_scale=5.0, seed=1, chunks=2)
    told, sampled, records = [], [], []
    patch = pytest.MonkeyPatch()
    build, denoise = walkthrough.build_inputs, walkthrough.denoise

    def build_and_keep(*args, **kwargs):
        told.append((build(*args, **kwargs), kwargs["history_latents"]))
        return told[-1][0]

    def denoise_and_keep(*args, **kwargs):
        sampled.append(denoise(*args, **kwargs))
        return sampled[-1]

    patch.setattr(walkthrough, "build_inputs", build_and_keep)
    patch.setattr(walkthrough, "denoise", denoise_and_keep)
    with torch.no_grad():
        state = start(parts, walk)
        for index, prompt in enumerate(texts):
            chunk = generate_chunk(parts, walk, state, job, prompt, 1 + index, Progress())
            records.append(chunk.record)
            state.apply(ChunkRecord.from_tensors(chunk.record.to_tensors()))
    patch.undo()
    return told, sampled, records


@pytest.mark.parametrize("index", [0, 1])
def test_every_input_of_the_network_and_the_sampled_latents_are_the_released_ones(run, index):
    golden = load_file(GOLDEN / "pipeline_unipc3.safetensors")
    told, sampled, records = run
    inputs, history = told[index]
    assert records[index].retrieved_ids.tolist() == golden[f"s{index}.retrieved_ids"].tolist()
    assert torch.equal(inputs.mask, golden[f"s{index}.mask"])
    assert_matches(golden, f"s{index}.buffer", inputs.correspondence, 1e-4)
    # Latents of this random autoencoder reach 28, so this is 1.4e-5 of their range.
    assert_matches(golden, f"s{index}.history_full", history, 4e-4)
    assert_matches(golden, f"s{index}.cond_latent", torch.cat([inputs.conditioning, inputs.rays], dim=1), 4e-4)
    assert_matches(golden, f"s{index}.gen_latents", sampled[index], 1e-4)


def test_a_record_read_back_is_the_same(run):
    record = run[2][0]
    again = ChunkRecord.from_tensors(record.to_tensors())
    for name, tensor in record.to_tensors().items():
        assert torch.equal(tensor, again.to_tensors()[name]), name
