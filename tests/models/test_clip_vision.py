"""The image encoder against a vision tower written out under the released names."""

import math

import pytest
import torch

from lyra.models.clip_vision import (
    CLIPImageEncoder,
    clip_vision_config,
    from_released_clip,
    load_clip_vision,
    preprocess,
    to_released_clip,
)
from lyra.models.weight_files import read_weights

WIDTH, HEADS, LAYERS, PATCH, SIZE = 64, 4, 3, 14, 56
TINY = {
    "hidden_size": WIDTH,
    "intermediate_size": 4 * WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "image_size": SIZE,
    "patch_size": PATCH,
}


def released_shapes(width: int, layers: int, tokens: int, output: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the vision tower in the released file."""
    shapes: dict[str, tuple[int, ...]] = {
        "visual.cls_embedding": (1, 1, width),
        "visual.pos_embedding": (1, tokens, width),
        "visual.patch_embedding.weight": (width, 3, PATCH, PATCH),
        "visual.head": (width, output),
    }
    linears = {"attn.to_qkv": (3 * width, width), "attn.proj": (width, width)}
    linears |= {"mlp.0": (4 * width, width), "mlp.2": (width, 4 * width)}
    norms = ["visual.pre_norm", "visual.post_norm"]
    for i in range(layers):
        norms += [f"visual.transformer.{i}.norm1", f"visual.transformer.{i}.norm2"]
        for part, shape in linears.items():
            shapes[f"visual.transformer.{i}.{part}.weight"] = shape
            shapes[f"visual.transformer.{i}.{part}.bias"] = shape[:1]
    return shapes | {f"{norm}.{kind}": (width,) for norm in norms for kind in ("weight", "bias")}


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    """A released file at a small size, with some of the text tower's parameters beside the vision tower's."""
    generator = torch.Generator().manual_seed(0)

    def draw(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        values = torch.randn(shape, generator=generator)
        if "norm" in name and name.endswith("weight"):
            return 1 + 0.3 * values
        return 0.3 * values if len(shape) == 1 else values * math.prod(shape[1:]) ** -0.5

    visual = {name: draw(name, shape) for name, shape in released_shapes(WIDTH, LAYERS, 17, 32).items()}
    return visual | {
        "log_scale": torch.tensor(2.66),
        "textual.token_embedding.weight": torch.zeros(10, 8),
        "textual.head.0.weight": torch.zeros(8, 8),
    }


@pytest.fixture(scope="module")
def encoder(weights) -> CLIPImageEncoder:
    return CLIPImageEncoder(load_clip_vision(weights, clip_vision_config(**TINY), torch.float32))


def picture(height: int, width: int) -> torch.Tensor:
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


def cubic_matrix(source: int, target: int) -> torch.Tensor:
    """Bicubic interpolation (a = -0.75) of one axis: pixel centres at halves, edges repeated, no anti-aliasing."""
    matrix = torch.zeros(target, source, dtype=torch.float64)
    for row in range(target):
        centre = (row + 0.5) * source / target - 0.5
        for tap in range(math.floor(centre) - 1, math.floor(centre) + 3):
            d = abs(centre - tap)
            near, far = 1.25 * d**3 - 2.25 * d**2 + 1, -0.75 * (d**3 - 5 * d**2 + 8 * d - 4)
            matrix[row, min(max(tap, 0), source - 1)] += near if d <= 1 else far
    return matrix


def written_out_preprocess(image: torch.Tensor, size: int) -> torch.Tensor:
    square = cubic_matrix(image.shape[-2], size) @ image.double() @ cubic_matrix(image.shape[-1], size).T
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073], dtype=torch.float64)[:, None, None]
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711], dtype=torch.float64)[:, None, None]
    return ((square + 1) / 2 - mean) / std


def norm(x: torch.Tensor, w: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]


def linear(x: torch.Tensor, w: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def written_out_tower(weights: dict[str, torch.Tensor], pixels: torch.Tensor) -> torch.Tensor:
    """CLIP's vision tower for one picture in float64, without its last block."""
    w = {name.removeprefix("visual."): tensor.double() for name, tensor in weights.items()}
    kernel = w["patch_embedding.weight"].flatten(1)
    rows, columns = range(0, pixels.shape[-2], PATCH), range(0, pixels.shape[-1], PATCH)
    patches = [kernel @ pixels[:, y : y + PATCH, x : x + PATCH].flatten() for y in rows for x in columns]
    x = torch.stack([w["cls_embedding"][0, 0], *patches]) + w["pos_embedding"][0]
    x = norm(x, w, "pre_norm")
    for i in range(LAYERS - 1):
        block = f"transformer.{i}"
        q, k, v = linear(norm(x, w, f"{block}.norm1"), w, f"{block}.attn.to_qkv").split(WIDTH, dim=-1)
        heads = []
        for head in range(HEADS):
            part = slice(head * WIDTH // HEADS, (head + 1) * WIDTH // HEADS)
            logits = q[:, part] @ k[:, part].T / math.sqrt(WIDTH // HEADS)
            heads.append(torch.softmax(logits, dim=-1) @ v[:, part])
        x = x + linear(torch.cat(heads, dim=-1), w, f"{block}.attn.proj")
        h = linear(norm(x, w, f"{block}.norm2"), w, f"{block}.mlp.0")
        x = x + linear(h * (1 + torch.erf(h / math.sqrt(2))) / 2, w, f"{block}.mlp.2")
    return x


def test_a_released_file_gives_the_written_out_tower(weights, tmp_path):
    torch.save(weights, tmp_path / "model.pth")
    model = load_clip_vision(read_weights(tmp_path / "model.pth"), clip_vision_config(**TINY), torch.float32)
    image = picture(90, 160)
    out = CLIPImageEncoder(model)(image)
    # The resize has a test of its own; its float32 coordinates would hide errors of the tower.
    expected = written_out_tower(weights, preprocess(image, SIZE)[0].double())
    assert out.shape == (1, 17, WIDTH) and not out.requires_grad
    assert (out[0] - expected).abs().max() < 1e-5
    assert expected.abs().max() > 1


@pytest.mark.parametrize(("height", "width"), [(480, 832), (30, 41), (56, 56)])
def test_the_picture_is_stretched_without_anti_aliasing(height, width):
    image = picture(height, width)
    expected = written_out_preprocess(image[0], SIZE)
    # White noise turns the rounding of the sampling positions into 2e-4; anti-aliasing would change it by 1.
    assert (preprocess(image, SIZE)[0] - expected).abs().max() < 5e-4
    # float32 throughout, whatever the picture's dtype.
    assert preprocess(image.bfloat16(), SIZE).dtype == torch.float32


def test_neither_the_last_block_nor_the_final_norm_has_a_say(weights, encoder):
    image = picture(64, 64)
    changed = {
        name: tensor + 1 if name.startswith((f"visual.transformer.{LAYERS - 1}.", "visual.post_norm")) else tensor
        for name, tensor in weights.items()
    }
    model = load_clip_vision(changed, clip_vision_config(**TINY), torch.float32)
    assert torch.equal(CLIPImageEncoder(model)(image), encoder(image))
    changed = {**weights, f"visual.transformer.{LAYERS - 2}.mlp.2.bias": torch.ones(WIDTH)}
    model = load_clip_vision(changed, clip_vision_config(**TINY), torch.float32)
    assert not torch.allclose(CLIPImageEncoder(model)(image), encoder(image))


def test_the_released_names_and_sizes_fit_without_a_rest():
    shapes = released_shapes(1280, 32, 257, 1024)
    assert len(shapes) == 392
    assert sum(math.prod(shape) for shape in shapes.values()) == 632_076_800
    with torch.device("meta"):
        released = {name: torch.empty(shape, dtype=torch.float16) for name, shape in shapes.items()}
    model = load_clip_vision(released, clip_vision_config(), torch.float16)
    assert model.embeddings.num_positions == 257
    del shapes["visual.head"]
    assert {name: tuple(tensor.shape) for name, tensor in to_released_clip(model.state_dict()).items()} == shapes


def test_loading_keeps_the_tensors_and_leaves_nothing_without_values(weights):
    model = load_clip_vision(weights, clip_vision_config(**TINY), torch.float32)
    storages = {tensor.untyped_storage().data_ptr() for tensor in weights.values()}
    assert all(parameter.untyped_storage().data_ptr() in storages for parameter in model.parameters())
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    assert model.embeddings.position_ids.tolist() == [list(range(17))]
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())


def test_the_output_has_the_models_dtype(weights, encoder):
    half = CLIPImageEncoder(load_clip_vision(weights, clip_vision_config(**TINY), torch.bfloat16))
    out = half(picture(64, 64))
    assert out.dtype == torch.bfloat16
    assert (out.float() - encoder(picture(64, 64))).abs().mean() < 0.1


def test_the_inverse_names_give_the_file_back(weights):
    back = to_released_clip(from_released_clip(weights))
    assert back.keys() == {name for name in weights if name.startswith("visual.")} - {"visual.head"}
    assert all(torch.equal(back[name], weights[name]) for name in back)


def test_missing_misshapen_and_unknown_weights_are_named(weights):
    config = clip_vision_config(**TINY)
    without = {name: tensor for name, tensor in weights.items() if name != "visual.transformer.1.attn.to_qkv.bias"}
    with pytest.raises(ValueError, match=r"missing encoder\.layers\.1\.self_attn\.k_proj\.bias"):
        load_clip_vision(without, config, torch.float32)
    with pytest.raises(ValueError, match=r"position_embedding\.weight is \[16, 64\], not \[17, 64\]"):
        load_clip_vision({**weights, "visual.pos_embedding": torch.zeros(1, 16, 64)}, config, torch.float32)
    with pytest.raises(ValueError, match=r"unexpected encoder\.layers\.3\.layer_norm1\.bias"):
        load_clip_vision({**weights, "visual.transformer.3.norm1.bias": torch.zeros(64)}, config, torch.float32)
    names = ("visual.transformer.0.attn.to_q.weight", "visual.patch_embedding.bias", "pre_norm.weight", "visual.head.0")
    for name in (*names, "transformer.0.norm1.weight", "logit_scale", "text.log_scale"):
        with pytest.raises(KeyError, match=name):
            load_clip_vision({**weights, name: torch.zeros(1)}, config, torch.float32)
    with pytest.raises(KeyError, match="visual_projection"):
        to_released_clip({"visual_projection.weight": torch.zeros(1)})
