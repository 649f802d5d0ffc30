"""A small checkpoint in the layout that NVIDIA released, key for key, with random weights."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import recipe
import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from torch.distributed import checkpoint as dcp
from transformers import CLIPVisionModel, PreTrainedTokenizerFast, UMT5EncoderModel

from lyra.models.checkpoint import from_released_name
from lyra.models.clip_vision import clip_vision_config, to_released_clip
from lyra.models.depth_anything.config import SMALL, BackboneConfig, DepthAnythingConfig, NestedDepthAnythingConfig
from lyra.models.depth_anything.model import build
from lyra.models.transformer import Lyra2Transformer3DModel
from lyra.models.umt5 import to_released_umt5_name, umt5_config
from lyra.models.wan_autoencoder import to_released_autoencoder_name

BACKBONE = BackboneConfig(48, 4, 2, (0, 1, 2, 3), 1, table_side=8)
DEPTH = NestedDepthAnythingConfig(
    DepthAnythingConfig(replace(BACKBONE, feed_forward="swiglu"), 16, (8, 16, 32, 32), gaussian_head=True),
    DepthAnythingConfig(replace(BACKBONE, alternation_start=None), 16, (8, 16, 32, 32)),
)
assert SMALL.backbone.depth > BACKBONE.depth


@dataclass(frozen=True)
class Sizes:
    """What differs from the released sizes."""

    transformer: dict[str, Any] = field(default_factory=lambda: {**recipe.TINY, "image_dim": 32})
    text_encoder: dict[str, Any] = field(
        default_factory=lambda: {
            "vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
        }
    )  # fmt: skip
    image_encoder: dict[str, Any] = field(
        default_factory=lambda: {
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2,
        }
    )  # fmt: skip
    autoencoder: dict[str, Any] = field(default_factory=lambda: {"base_dim": 8})
    reconstruction: dict[str, Any] = field(default_factory=lambda: asdict(DEPTH))
    settings: dict[str, Any] = field(default_factory=lambda: {"generation_height": 32, "generation_width": 48})


def write_released(folder: Path, released_names: dict[str, Any], sizes: Sizes | None = None) -> Path:
    """Write the whole repository; returns its `checkpoints` folder.

    Args:
        released_names: the 1,435 names of the released transformer.
    """
    sizes = sizes or Sizes()
    root = folder / "checkpoints"
    weights = transformer_weights(released_names, sizes)
    write_distributed(root / "model" / "model", weights)
    write_lora(root / "lora" / "dmd_distillation.safetensors", weights)
    write_text_encoder(root, sizes)
    write_image_encoder(root / "image_encoder" / "model.pth", sizes)
    write_autoencoder(root / "vae" / "vae.pth", sizes)
    write_reconstruction(root / "recon" / "model.pt")
    (root / "sizes.json").write_text(json.dumps(asdict(sizes)), encoding="utf-8")
    (folder / "config.json").write_text("{}", encoding="utf-8")
    return root


def transformer_weights(released_names: dict[str, Any], sizes: Sizes) -> dict[str, Tensor]:
    """Parameters of the transformer under the released names, by the golden recipe."""
    with torch.device("meta"):
        model = Lyra2Transformer3DModel(**sizes.transformer)
    released = {from_released_name(name): name for name in released_names}
    return recipe.fill({released[name]: tuple(p.shape) for name, p in model.named_parameters()})


def write_distributed(folder: Path, weights: dict[str, Tensor]) -> None:
    """A distributed checkpoint with the counters and kernel states that the released one has beside its parameters."""
    state: dict[str, Any] = {f"net.{name}": tensor for name, tensor in weights.items()}
    state |= {f"net.accum_{name}": torch.tensor(7) for name in ("video_sample_counter", "iteration")}
    state["net.accum_train_in_hours"] = torch.tensor(1.5)
    state["net.blocks.0.self_attn.attn_op._extra_state"] = torch.zeros(0, dtype=torch.uint8)
    folder.mkdir(parents=True, exist_ok=True)
    dcp.save(state, checkpoint_id=folder, no_dist=True)


def write_lora(path: Path, weights: dict[str, Tensor], rank: int = 4) -> None:
    """A LoRA over every linear map, in the released key format."""
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for name, weight in weights.items():
        module = name.removesuffix(".weight")
        if weight.ndim == 2 and module != name:
            out, inputs = weight.shape
            draw = torch.randn(rank, inputs, generator=generator) * 0.1 / inputs**0.5
            tensors[f"diffusion_model.{module}.lora_A.weight"] = draw
            tensors[f"diffusion_model.{module}.lora_B.weight"] = torch.randn(out, rank, generator=generator) * 0.1
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)


def write_text_encoder(root: Path, sizes: Sizes) -> None:
    """UMT5 under its original names, a tokenizer, and the stored negative prompt."""
    torch.manual_seed(0)
    model = UMT5EncoderModel(umt5_config(**sizes.text_encoder))
    folder = root / "text_encoder"
    folder.mkdir(parents=True)
    torch.save(
        {to_released_umt5_name(name): t.clone() for name, t in model.state_dict().items()}, folder / "encoder.pth"
    )
    dim = sizes.text_encoder["d_model"]
    torch.save({"t5_text_embeddings": torch.randn(1, 512, dim)}, folder / "negative_prompt.pt")
    words = ["<pad>", "</s>", "<unk>", "a", "the", "of", "street", "house", "tree", "sky", "light", "evening", "quiet"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(root / "tokenizer")


def write_image_encoder(path: Path, sizes: Sizes) -> None:
    """The whole CLIP file: the vision tower, and what the loader must know to leave out."""
    torch.manual_seed(1)
    model = CLIPVisionModel(clip_vision_config(**sizes.image_encoder))
    weights = to_released_clip({name: tensor.half() for name, tensor in model.state_dict().items()})
    width = sizes.image_encoder["hidden_size"]
    weights |= {"visual.head": torch.zeros(width, 16).half(), "log_scale": torch.tensor(4.6).half()}
    weights |= {"textual.token_embedding.weight": torch.zeros(5, 8).half()}
    path.parent.mkdir(parents=True)
    torch.save(weights, path)


def write_autoencoder(path: Path, sizes: Sizes) -> None:
    """The Wan autoencoder under its original names."""
    vae = AutoencoderKLWan(**sizes.autoencoder)
    shapes = {to_released_autoencoder_name(name): tuple(p.shape) for name, p in vae.state_dict().items()}
    path.parent.mkdir(parents=True)
    torch.save(recipe.fill_vae(shapes), path)


def write_reconstruction(path: Path) -> None:
    """Depth Anything 3 in the released wrapping: the weights, and a second copy beside them."""
    shapes = {name: tuple(t.shape) for name, t in build(DEPTH).state_dict().items()}
    weights = {f"model.{name}": tensor for name, tensor in recipe.fill_depth_anything(shapes).items()}
    # Random weights give any field of view; these give about 35 by 57 degrees.
    weights["model.da3.cam_dec.fc_fov.0.weight"] *= 0.01
    weights["model.da3.cam_dec.fc_fov.0.bias"] = torch.tensor([0.6, 1.0])
    path.parent.mkdir(parents=True)
    torch.save({"module": weights, "ema": {"step": torch.tensor(3)}}, path)
