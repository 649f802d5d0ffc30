"""LoRAs in the released format on a tiny transformer, against weights to which the updates were added by hand."""

import ast
import copy
import logging

import pytest
import recipe
import torch
from safetensors.torch import save_file

from lyra.errors import UserError
from lyra.models import lora
from lyra.models.checkpoint import from_released, from_released_name, load_strictly
from lyra.models.transformer import Lyra2Transformer3DModel
from tests.conftest import ROOT

LAYERS = 3
SMALL = recipe.TINY | {"correspondence_channels": 40, "camera_channels": 24, "image_dim": 32}
"""The golden network with narrower inputs, because copies of it are made all the time."""


def released_linears(layers: int) -> list[str]:
    """Every released name of a linear map, with its numbers."""
    counts = {name: layers if name.startswith("blocks") else 6 for name in lora.RELEASED_LINEARS if "#" in name}
    plain = [name for name in lora.RELEASED_LINEARS if name not in counts]
    return plain + [name.replace("#", str(number)) for name in counts for number in range(counts[name])]


def ours(released: str) -> str:
    return from_released_name(f"{released}.weight").removesuffix(".weight")


def factors(model, modules, rank, seed, size=0.3):
    """Random factors by released module; about `size` of an update's output against a unit input."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: model.get_parameter(f"{ours(name)}.weight").shape for name in modules}
    return {
        name: (
            torch.randn(rank, inputs, generator=generator) / inputs**0.5,
            torch.randn(outputs, rank, generator=generator) * size / rank**0.5,
        )
        for name, (outputs, inputs) in shapes.items()
    }


def write(path, pairs, extra=None, prefix="diffusion_model.", halves=("lora_A.weight", "lora_B.weight")):
    flat = prefix == "lora_unet_"
    tensors = {
        f"{prefix}{name.replace('.', '_') if flat else name}.{half}": tensor
        for name, pair in pairs.items()
        for half, tensor in zip(halves, pair, strict=True)
    }
    save_file(tensors | {f"{prefix}{name}": tensor for name, tensor in (extra or {}).items()}, path)
    return path


def outputs(model):
    given = recipe.transformer_inputs(4, 4)
    with torch.no_grad():
        return model(
            given["x"], given["mask"], given["cond"], given["plucker"][:, :24], given["buffer"][:, :40], given["text"],
            given["clip"][..., :32], torch.tensor([731.0]),
        )  # fmt: skip


def base_weights(model) -> dict[str, torch.Tensor]:
    """Copies of the parameters that are no LoRA's, under their names without LoRAs."""
    return {
        name.replace("base_layer.", ""): parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if ".lora_" not in name
    }


def twin(model, *loras):
    """A copy whose weights got strength * sum_k up[:, k] down[k] added, one rank-one update after the other."""
    model = copy.deepcopy(model).double()
    for strength, pairs in loras:
        for name, (down, up) in pairs.items():
            weight = model.get_parameter(f"{ours(name)}.weight")
            for lower, column in zip(down, up.T, strict=True):
                weight.data += strength * torch.outer(column.double(), lower.double())
    return model.float()


def differs(a, b) -> float:
    return float((a - b).detach().abs().max())


def unchanged(model, before) -> bool:
    after = base_weights(model)
    return all(torch.equal(after[name], before[name]) for name in before)


@pytest.fixture(scope="module")
def base(released_shapes) -> Lyra2Transformer3DModel:
    model = Lyra2Transformer3DModel(**SMALL).eval()
    released = {from_released_name(name): name for name in released_shapes}
    weights = recipe.fill({released[name]: tuple(p.shape) for name, p in model.named_parameters()})
    load_strictly(model, from_released(weights))
    return model


@pytest.fixture
def model(base):
    return copy.deepcopy(base)


@pytest.fixture(scope="module")
def three(base):
    """Factors of rank 3 for all linear maps."""
    return factors(base, released_linears(LAYERS), 3, seed=1)


@pytest.fixture(scope="module")
def five(base):
    """Factors of rank 5 for the attentions and feed-forwards."""
    modules = [name for name in released_linears(LAYERS) if "attn" in name or "ffn" in name]
    return factors(base, modules, 5, seed=2)


@pytest.fixture
def load(tmp_path):
    """Writes a LoRA file named like the LoRA, reads it and loads it."""

    def write_and_load(model, name, pairs, extra=None, **spelling):
        lora.load_lora(model, lora.read_lora(write(tmp_path / f"{name}.safetensors", pairs, extra, **spelling)), name)

    return write_and_load


@pytest.fixture
def loaded(model, three, five, load):
    """A model with both LoRAs loaded, one written with the `net.` prefix and one without."""
    load(model, "three", three, prefix="diffusion_model.net.")
    load(model, "five", five)
    return model


def test_every_linear_map_of_the_released_size_has_a_dotted_and_a_flattened_name(tmp_path):
    names = released_linears(40)
    with torch.device("meta"):
        released = Lyra2Transformer3DModel()
    linears = {path for path, module in released.named_modules() if isinstance(module, torch.nn.Linear)}
    assert len(names) == len(linears) == 615
    pairs = {name: (torch.ones(1, 1), torch.ones(1, 1)) for name in names}
    for prefix in ("diffusion_model.", "lora_unet_"):
        assert set(lora.read_lora(write(tmp_path / "lora.safetensors", pairs, prefix=prefix)).pairs) == linears


@pytest.mark.parametrize("prefix", ["", "net.", "diffusion_model.", "diffusion_model.net.", "lora_unet_"])
@pytest.mark.parametrize("halves", ["lora_A lora_B", "lora_A.default lora_B.default", "lora_down lora_up"])
def test_every_spelling_of_the_keys_gives_the_same_pairs(three, tmp_path, prefix, halves):
    halves = [f"{half}.weight" for half in halves.split()]
    weights = lora.read_lora(write(tmp_path / "lora.safetensors", three, prefix=prefix, halves=halves))
    assert (weights.path, weights.rank) == (tmp_path / "lora.safetensors", 3)
    assert set(weights.pairs) == {ours(name) for name in three}
    for name, (down, up) in three.items():
        pair = weights.pairs[ours(name)]
        assert torch.equal(pair.down, down) and torch.equal(pair.up, up)


def test_output_with_two_loras_is_that_of_weights_summed_by_hand(base, loaded, three, five):
    lora.set_loras(loaded, {"five": -0.4, "three": 0.7})
    assert differs(outputs(loaded), outputs(twin(base, (0.7, three), (-0.4, five)))) < 1e-5
    lora.set_loras(loaded, {"five": 1})
    assert differs(outputs(loaded), outputs(twin(base, (1, five)))) < 1e-5


def test_lora_on_any_kind_of_module_alone_changes_the_output(model, base, load):
    kinds = [name for name in released_linears(LAYERS) if not name.startswith(("blocks.0", "blocks.2"))]
    assert len(kinds) == 30
    for number, name in enumerate(kinds):
        load(model, "alone", factors(model, [name], 2, seed=number))
        lora.set_loras(model, {"alone": 1})
        assert differs(outputs(model), outputs(base)) > 1e-4, name
        lora.unload_loras(model)
    assert torch.equal(outputs(model), outputs(base))


def test_no_active_lora_gives_the_base_output_bit_for_bit(loaded, base):
    assert torch.equal(outputs(loaded), outputs(base))
    for active, inactive in (({"three": 1, "five": 1}, {"three": 0.0}), ({"five": 1}, {})):
        lora.set_loras(loaded, active)
        assert differs(outputs(loaded), outputs(base)) > 0.1
        lora.set_loras(loaded, inactive)
        assert torch.equal(outputs(loaded), outputs(base))


def test_loading_another_lora_leaves_the_active_ones_active(loaded, five, load):
    lora.set_loras(loaded, {"three": 0.5})
    before = outputs(loaded)
    load(loaded, "another", five)
    assert torch.equal(outputs(loaded), before)
    assert lora.loaded_loras(loaded) == ("three", "five", "another")


def test_stored_alpha_over_rank_scales_and_ranks_may_differ(base, model, three, five, load):
    mixed = three | five
    alpha = {"blocks.1.ffn.0.alpha": torch.tensor(2.0), "head.head.alpha": torch.tensor(6.0)}
    scaled = {
        name: (down, up * {"blocks.1.ffn.0": 2 / 5, "head.head": 2}.get(name, 1)) for name, (down, up) in mixed.items()
    }
    load(model, "mixed", mixed, alpha)
    expected = outputs(twin(base, (0.8, scaled)))
    for apply in (lora.set_loras, lora.fuse_loras):
        apply(model, {"mixed": 0.8})
        assert differs(outputs(model), expected) < 1e-5


def test_fused_output_equals_unfused_and_another_set_can_be_fused_at_once(base, loaded, three, five):
    sets = [{"three": 1.0}, {"three": 0.3, "five": -0.5}, {"five": 1.0}]
    unfused = []
    for strengths in sets:
        lora.set_loras(loaded, strengths)
        unfused.append(outputs(loaded))
    for strengths, expected in zip(sets, unfused, strict=True):
        lora.fuse_loras(loaded, strengths)
        assert differs(outputs(loaded), expected) < 1e-5
    weight = base.get_parameter("blocks.0.attn1.to_q.weight")
    down, up = five["blocks.0.self_attn.q"]
    assert differs(loaded.get_submodule("blocks.0.attn1.to_q").base_layer.weight, weight + up @ down) < 1e-6
    # Maps that only the earlier sets touched have their base weights back, bit for bit.
    assert torch.equal(loaded.proj_out.base_layer.weight, base.proj_out.weight)
    lora.set_loras(loaded, {"three": 1})
    assert torch.equal(outputs(loaded), unfused[0])
    lora.unfuse_loras(loaded)
    assert torch.equal(outputs(loaded), outputs(base))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unfusing_restores_every_bit_however_often(loaded, dtype):
    loaded.to(dtype)
    before, places = base_weights(loaded), [parameter.data_ptr() for parameter in loaded.parameters()]
    for round_ in range(4):
        lora.fuse_loras(loaded, {"three": 0.9 + round_, "five": 0.3})
        lora.fuse_loras(loaded, {"five": -0.7})
        changed = base_weights(loaded)
        assert sum(not torch.equal(changed[name], before[name]) for name in before) == 12 * LAYERS
        lora.unfuse_loras(loaded)
        assert unchanged(loaded, before)
    assert loaded.blocks[0].attn1.to_q.base_layer.weight.dtype == dtype
    assert [parameter.data_ptr() for parameter in loaded.parameters()] == places


@pytest.mark.parametrize("cast_after_loading", [False, True])
def test_lora_beside_a_float32_map_computes_in_float32_in_a_bfloat16_model(model, three, load, cast_after_loading):
    steps = [lambda: model.to(torch.bfloat16), lambda: load(model, "three", three)]
    for step in steps[::-1] if cast_after_loading else steps:
        step()
    lora.set_loras(model, {"three": 1})
    x = torch.randn(2, 48, generator=torch.Generator().manual_seed(3))
    for name in ("head.head", "time_projection.1"):
        layer = model.get_submodule(ours(name))
        # Casting the whole model rounds the factors too, but must not change what they compute in.
        down, up = (half.bfloat16().double() if cast_after_loading else half.double() for half in three[name])
        out = layer(x)
        assert out.dtype == torch.float32
        weight, bias = layer.base_layer.weight.double() + up @ down, layer.base_layer.bias.double()
        assert differs(out, x.double() @ weight.T + bias) < 1e-5
    assert outputs(model).dtype == torch.float32


def test_biases_and_deltas_are_added_and_negligible_ones_left_out(base, model, three, tmp_path, caplog):
    targets = {
        "blocks.1.self_attn.q.diff_b": ("blocks.1.attn1.to_q.bias", (48,)),
        "blocks.0.norm3.diff": ("blocks.0.norm2.weight", (48,)),
        "blocks.0.norm3.diff_b": ("blocks.0.norm2.bias", (48,)),
        "blocks.2.diff_m": ("blocks.2.scale_shift_table", (1, 6, 48)),
        "patch_embedding.diff": ("patch_embedding.weight", (48, 36, 1, 2, 2)),
    }
    generator = torch.Generator().manual_seed(4)
    extra = {name: torch.randn(shape, generator=generator) for name, (_, shape) in targets.items()}
    small = {"blocks.1.ffn.0.diff_b": torch.linspace(-0.0159, 0.0159, 96), "blocks.1.norm3.diff": torch.zeros(48)}
    pairs = {name: three[name] for name in ("blocks.1.self_attn.q", "blocks.1.ffn.0")}
    with caplog.at_level(logging.INFO, logger="lyra.models.lora"):
        weights = lora.read_lora(write(tmp_path / "lora.safetensors", pairs, extra | small))
    assert "2 of 7 additive weights are negligible" in caplog.text
    assert set(weights.biases) == {"blocks.1.attn1.to_q"}
    assert set(weights.deltas) == {parameter for parameter, _ in targets.values()} - {"blocks.1.attn1.to_q.bias"}
    expected = twin(base, (0.5, pairs))
    for name, (parameter, _) in targets.items():
        values = expected.get_parameter(parameter).data
        values += 0.5 * extra[name].reshape(values.shape)
    before = base_weights(model)
    lora.load_lora(model, weights, "full")
    for apply in (lora.set_loras, lora.fuse_loras, lora.set_loras):
        apply(model, {"full": 0.5})
        assert differs(outputs(model), outputs(expected)) < 2e-5
    lora.set_loras(model, {})
    assert unchanged(model, before)


def test_bias_on_a_map_without_one_works_unfused_and_refuses_to_fuse(model, base, three, load):
    name = "blocks.1.cam_encoder"
    load(model, "biased", {name: three[name]}, {f"{name}.diff_b": torch.linspace(0, 1, 48)})
    lora.set_loras(model, {"biased": 1})
    expected = twin(base, (1, {name: three[name]}))
    expected.blocks[1].camera_encoder.bias = torch.nn.Parameter(torch.linspace(0, 1, 48))
    before = outputs(model)
    assert differs(before, outputs(expected)) < 1e-5
    with pytest.raises(UserError, match=r"bias to blocks\.1\.camera_encoder\.bias.*unfused"):
        lora.fuse_loras(model, {"biased": 1})
    assert torch.equal(outputs(model), before)


def test_names_change_only_while_a_lora_is_loaded(base, model, three, load):
    names, trained = list(model.state_dict()), [p.requires_grad for p in model.parameters()]
    lora.set_loras(model, {})
    assert lora.loaded_loras(model) == ()
    load(model, "three", three)
    assert "blocks.0.attn1.to_q.base_layer.weight" in model.state_dict()
    assert "blocks.0.attn1.to_q.lora_A.three.weight" in model.state_dict()
    assert (model.config, model.dtype, model.device) == (base.config, torch.float32, torch.device("cpu"))
    lora.fuse_loras(model, {"three": 1})
    lora.unload_loras(model)
    assert list(model.state_dict()) == names
    assert [p.requires_grad for p in model.parameters()] == trained
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), base.state_dict().values(), strict=True))
    assert torch.equal(outputs(model), outputs(base))
    assert not hasattr(model, "peft_config")


def test_unknown_keys_halves_and_unfitting_factors_are_listed(three, tmp_path):
    down, up = three["blocks.0.ffn.0"]
    path = tmp_path / "lora.safetensors"
    cases = [
        ({"blocks.0.ffn.0.dora_scale": up}, r"blocks\.0\.ffn\.0\.dora_scale follows no known naming"),
        ({"lora_unet_blocks_0_ffn_1.lora_up.weight": up}, r"lora_unet_blocks_0_ffn_1\S+ follows no known naming"),
        ({"lora_te_text_model.lora_up.weight": up}, r"lora_te_text_model"),
        ({"blocks.0.ffn.0.lora_A.weight": down}, r"blocks\.0\.ffn\.0: lacks its up matrix"),
        ({"blocks.0.ffn.0.alpha": torch.ones(1)}, r"lacks its down and its up matrix"),
        ({"blocks.0.ffn.0.lora_A.weight": down, "blocks.0.ffn.0.lora_B.weight": up[:, :2]}, r"\[3, 48\] and \[96, 2\]"),
        ({"blocks.0.ffn.0.lora_A.weight": down[0], "blocks.0.ffn.0.lora_B.weight": up}, r"\[48\] and \[96, 3\]"),
        ({"blocks.0.ffn.0.lora_A.weight": down, "net.blocks.0.ffn.0.lora_A.weight": down}, r"is there twice"),
        ({}, r"it is empty"),
    ]
    for tensors, message in cases:
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, path)
        with pytest.raises(UserError, match=message):
            lora.read_lora(path)
    save_file({f"blocks.{number}.surprise": up.clone() for number in range(9)}, path)
    with pytest.raises(UserError, match=r"blocks\.0\.surprise.*; 9 problems in all\)"):
        lora.read_lora(path)
    with pytest.raises(UserError, match=r"nowhere"):
        lora.read_lora(tmp_path / "nowhere.safetensors")


def test_lora_for_another_network_is_refused_and_changes_nothing(model, base, three, load):
    deep = {name.replace("blocks.2.", "blocks.39."): pair for name, pair in three.items()}
    wide = three | {"head.head": (torch.ones(3, 64), torch.ones(64, 3))}
    norm = three | {"blocks.0.norm3": (torch.ones(3, 48), torch.ones(48, 3))}
    ramp = torch.linspace(0, 1, 47)
    cases = [
        (deep, {}, r"lacks the linear map blocks\.39\..*; 15 problems in all\)"),
        (wide, {}, r"proj_out is \[64, 48\], not \[64, 64\]"),
        (norm, {}, r"lacks the linear map blocks\.0\.norm2\)"),
        (three, {"head.head.diff_b": ramp}, r"proj_out takes a bias of \[64\], not \[47\]"),
        (three, {"blocks.0.norm3.diff": ramp}, r"blocks\.0\.norm2\.weight is \[48\], not \[47\]"),
    ]
    for pairs, extra, message in cases:
        with pytest.raises(UserError, match=message):
            load(model, "wrong", pairs, extra)
    assert lora.loaded_loras(model) == ()
    assert torch.equal(outputs(model), outputs(base))


def test_wrong_names_and_strengths_are_refused_and_change_nothing(loaded, three, load, tmp_path):
    lora.set_loras(loaded, {"three": 1})
    before = outputs(loaded)
    with pytest.raises(UserError, match=r"'style' is loaded but three, five"):
        lora.set_loras(loaded, {"style": 1})
    with pytest.raises(UserError, match=r"'five' is not finite"):
        lora.fuse_loras(loaded, {"five": float("nan")})
    with pytest.raises(UserError, match=r"'three' is loaded already"):
        load(loaded, "three", three)
    for name in ("a.b", "", "keys"):
        with pytest.raises(UserError, match=r"cannot be called"):
            lora.load_lora(loaded, lora.read_lora(tmp_path / "three.safetensors"), name)
    assert torch.equal(outputs(loaded), before)


@pytest.mark.parametrize("casting_first", [True, False])
def test_lora_works_with_float8_storage_and_is_not_fused_into_it(base, five, load, casting_first):
    model = copy.deepcopy(base).to(torch.bfloat16)
    steps = [
        lambda: model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16),
        lambda: load(model, "five", five),
    ]
    for step in steps if casting_first else steps[::-1]:
        step()
    rounded = copy.deepcopy(base).to(torch.bfloat16)
    for name, weight in base_weights(model).items():
        rounded.get_parameter(name).data = weight.to(torch.bfloat16)
    assert model.blocks[0].attn1.to_q.base_layer.weight.dtype == torch.float8_e4m3fn
    assert model.dtype == torch.bfloat16
    load(rounded, "five", five)
    for strengths in ({}, {"five": 1}):
        lora.set_loras(model, strengths)
        lora.set_loras(rounded, strengths)
        assert torch.equal(outputs(model), outputs(rounded))
    with pytest.raises(UserError, match=r"No LoRA can be fused into blocks\.0\.attn1\.to_q\.weight"):
        lora.fuse_loras(model, {"five": 1})


def test_lora_works_on_4_bit_weights_and_is_not_fused_into_them(base, model, five, load):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    unpacked = copy.deepcopy(base)
    for path, linear in unpacked.blocks.named_modules():
        if type(linear) is not torch.nn.Linear:
            continue
        size = (linear.in_features, linear.out_features)
        packed = bitsandbytes.nn.Linear4bit(*size, bias=False, compute_dtype=torch.float32, quant_type="nf4")
        packed.weight = bitsandbytes.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
        packed.bias = linear.bias
        parent, _, child = path.rpartition(".")
        setattr(model.blocks.get_submodule(parent), child, packed.to("cpu"))
        linear.weight.data = bitsandbytes.functional.dequantize_4bit(packed.weight.data, packed.weight.quant_state)
    model.is_loaded_in_4bit = True  # diffusers' quantiser says so.
    without = outputs(model)
    assert differs(without, outputs(unpacked)) < 1e-4
    load(model, "five", five)
    lora.set_loras(model, {"five": 1})
    assert model.blocks[0].attn1.to_q.base_layer.weight.dtype == torch.uint8
    assert differs(outputs(model), outputs(twin(unpacked, (1, five)))) < 1e-4
    with pytest.raises(UserError, match=r"No LoRA can be fused into blocks\.0\.attn1\.to_q\.weight"):
        lora.fuse_loras(model, {"five": 1})
    lora.unload_loras(model)
    assert torch.equal(outputs(model), without)


def test_peft_is_imported_only_when_a_lora_is_loaded():
    tree = ast.parse((ROOT / "lyra" / "models" / "lora.py").read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module == "peft"]
    assert len(imports) == 1
    assert imports[0] not in tree.body
