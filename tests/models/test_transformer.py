"""The transformer against the released network's outputs."""

import shutil

import pytest
import recipe
import torch
from safetensors.torch import load_file

from lyra.models import blocks
from lyra.models.checkpoint import from_released_name, load_strictly
from lyra.models.transformer import ChunkCache, Lyra2Transformer3DModel
from tests.conftest import GOLDEN
from tests.models.tiny_released import golden_transformer


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "transformer_8x12.safetensors")


@pytest.fixture(scope="module")
def inputs() -> dict[str, torch.Tensor]:
    return recipe.transformer_inputs(8, 12)


@pytest.fixture(scope="module")
def model(released_shapes) -> Lyra2Transformer3DModel:
    return golden_transformer(released_shapes)


def at_index(golden, name, tensor):
    assert tensor.numel() >= int(golden[f"{name}@index"].max())
    return (tensor.flatten()[golden[f"{name}@index"]] - golden[f"{name}@value"]).abs().max()


def test_recipe_inputs_are_those_of_the_golden_file(golden, inputs):
    for name in ("x", "mask", "cond", "plucker", "buffer", "text", "clip"):
        assert at_index(golden, f"in.{name}", inputs[name]) == 0


def test_tokens_and_rotary_angles_are_the_released_ones(model, golden, inputs):
    full = torch.cat([inputs["x"], inputs["mask"], inputs["cond"]], dim=1)
    tokens = torch.cat([model.embed_history(full), model.embed_targets(full)], dim=1)
    assert (tokens - golden["cap.tokens"]).abs().max() < 1e-5
    angles = model.rotary_angles(8, 12, torch.device("cpu"))
    assert (angles - golden["cap.freqs"][:, 0, 0]).abs().max() < 1e-5


def test_camera_tokens_are_the_released_ones(model, golden, inputs):
    tokens = model.camera_tokens(inputs["plucker"])
    assert list(tokens.shape) == golden["cap.camera_tokens@shape"].tolist()
    assert at_index(golden, "cap.camera_tokens", tokens) < 1e-6


def test_correspondence_tokens_are_the_released_ones(model, golden, inputs):
    values, index = model.correspondence_tokens(inputs["buffer"])
    tokens, width = golden["cap.buffer_tokens@shape"].tolist()[1:]
    # The released capture holds the values and, last, whether the token has any.
    captured = torch.full((tokens, width), torch.nan)
    captured[index] = torch.cat([values[0], torch.ones(len(index), 1)], dim=-1)
    ours = captured.flatten()[golden["cap.buffer_tokens@index"]]
    ours, expected = ours[~ours.isnan()], golden["cap.buffer_tokens@value"][~ours.isnan()]
    assert len(ours) > 3000
    assert (ours - expected).abs().max() < 1e-5


def test_work_in_slices_gives_what_it_gives_at_once(model, inputs, monkeypatch):
    def run():
        with torch.no_grad():
            names = ("x", "mask", "cond", "plucker", "buffer", "text", "clip")
            return model(*(inputs[name] for name in names), inputs["timestep"][0].float())

    at_once = run()
    monkeypatch.setattr(blocks, "SLICE_TOKENS", 100)
    assert torch.allclose(run(), at_once, atol=1e-5)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on the CPU")
def test_compiled_blocks_lose_nothing(released_shapes, inputs):
    names = ("x", "mask", "cond", "plucker", "buffer", "text", "clip")
    given = (*(inputs[name] for name in names), inputs["timestep"][0].float())
    eager, compiled = golden_transformer(released_shapes), golden_transformer(released_shapes)
    compiled.compile_repeated_blocks(fullgraph=True)
    with torch.no_grad():
        assert torch.allclose(compiled(*given), eager(*given), atol=1e-5)


def test_later_passes_with_a_cache_are_those_without_one(model, inputs):
    names = ("mask", "cond", "plucker", "buffer")
    cache = ChunkCache()
    generator = torch.Generator().manual_seed(4)
    texts = [torch.randn(1, 512, 32, generator=generator) for _ in range(2)]
    for step, text in enumerate((texts[0], texts[1], texts[0])):
        x = inputs["x"].clone()
        x[:, :, 25:] = torch.randn(x[:, :, 25:].shape, generator=generator)
        given = (x, *(inputs[name] for name in names), text, inputs["clip"], torch.tensor([100.0 * (step + 1)]))
        with torch.no_grad():
            assert torch.allclose(model(*given, cache=cache), model(*given), atol=1e-5)


def test_output_of_every_block_and_of_the_network_is_within_1e_5(model, golden, inputs):
    outputs = []
    hooks = [block.register_forward_hook(lambda m, a, out: outputs.append(out)) for block in model.blocks]
    with torch.no_grad():
        out = model(
            inputs["x"], inputs["mask"], inputs["cond"], inputs["plucker"], inputs["buffer"], inputs["text"],
            inputs["clip"], inputs["timestep"][0].float(),
        )  # fmt: skip
    for hook in hooks:
        hook.remove()
    for index, block in enumerate(outputs):
        assert (block - golden[f"cap.block{index}_out"]).abs().max() < 1e-5
    assert (out - golden["out"]).abs().max() < 1e-5


def test_released_size_has_exactly_the_released_parameters(released_shapes):
    with torch.device("meta"):
        model = Lyra2Transformer3DModel()
    ours = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert len(ours) == 1435
    assert ours == {from_released_name(name): shape for name, shape in released_shapes.items()}
    assert sum(p.numel() for p in model.parameters()) == 17_029_871_424


def test_unknown_released_name_is_refused():
    with pytest.raises(KeyError, match=r"blocks\.0\.surprise"):
        from_released_name("net.blocks.0.surprise.weight")


def test_missing_extra_and_misshapen_weights_are_listed():
    model = torch.nn.Linear(2, 3)
    wrong = {"weight": torch.zeros(3, 3), "extra": torch.zeros(1)}
    with pytest.raises(
        ValueError, match=r"3 weights .*missing bias.*unexpected extra.*weight is \[3, 3\], not \[3, 2\]"
    ):
        load_strictly(model, wrong)


def test_untrained_residual_prediction_copies_its_conditioning(released_shapes):
    model = Lyra2Transformer3DModel(**recipe.TINY, prediction="residual").eval()
    torch.nn.init.zeros_(model.proj_out.weight)
    torch.nn.init.zeros_(model.proj_out.bias)
    given = recipe.transformer_inputs(8, 12)
    sigma = 0.731
    with torch.no_grad():
        velocity = model(
            given["x"], given["mask"], given["cond"], given["plucker"], given["buffer"], given["text"], given["clip"],
            torch.tensor([1000 * sigma]),
        )  # fmt: skip
    sample = given["x"][:, :, 25:] - sigma * velocity
    assert torch.allclose(sample, given["cond"][:, :, 25:], atol=1e-5)


def test_packed_tokens_are_padded_where_the_latent_does_not_divide():
    model = Lyra2Transformer3DModel(**recipe.TINY).eval()
    given = recipe.transformer_inputs(12, 20)
    full = torch.cat([given["x"], given["mask"], given["cond"]], dim=1)
    assert model.embed_history(full).shape[1] + model.embed_targets(full).shape[1] == 1479
    assert model.camera_tokens(given["plucker"]).shape[1] == 1479
    assert model.rotary_angles(12, 20, torch.device("cpu")).shape[0] == 1479
