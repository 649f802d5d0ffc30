"""The released model's image encoder: how a picture becomes CLIP ViT-H/14 tokens, and how its weights are named.

Knows the released names, sizes and preprocessing, and uses transformers' CLIPVisionModel; it does not know which frame
is encoded, nor what the transformer does with the tokens.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPVisionConfig, CLIPVisionModel

from lyra.models.checkpoint import load_strictly

CLIP_VIT_H14: Mapping[str, Any] = MappingProxyType(
    {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "image_size": 224,
        "patch_size": 14,
        "projection_dim": 1024,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
    }
)
"""Sizes of the released vision tower, as fields of transformers' CLIPVisionConfig: 257 tokens of 1280."""

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
"""Statistics of RGB in [0, 1] that CLIP was trained with."""

UNUSED = re.compile(r"textual\..+|log_scale|visual\.head")
"""Released parameters outside the vision tower's blocks: the text tower, the contrastive scale, the projection."""

STEM: Mapping[str, str] = MappingProxyType(
    {
        "cls_embedding": "embeddings.class_embedding",
        "pos_embedding": "embeddings.position_embedding.weight",
        "patch_embedding.weight": "embeddings.patch_embedding.weight",
        "pre_norm.weight": "pre_layrnorm.weight",
        "pre_norm.bias": "pre_layrnorm.bias",
        "post_norm.weight": "post_layernorm.weight",
        "post_norm.bias": "post_layernorm.bias",
    }
)
"""Parameters outside the blocks, released name without `visual.` to transformers' name (its spelling)."""

BATCH_AXES: Mapping[str, int] = MappingProxyType({"cls_embedding": 2, "pos_embedding": 1})
"""Leading axes of length one that the released parameters have and transformers' do not."""

BLOCK_PARTS: Mapping[str, str] = MappingProxyType(
    {
        "norm1": "layer_norm1",
        "attn.proj": "self_attn.out_proj",
        "norm2": "layer_norm2",
        "mlp.0": "mlp.fc1",
        "mlp.2": "mlp.fc2",
    }
)
"""Modules of a block, released name to transformers' name; `attn.to_qkv` is three modules there."""

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
"""The thirds of the released `attn.to_qkv`, in its order."""

RELEASED_STEM: Mapping[str, str] = MappingProxyType({ours: released for released, ours in STEM.items()})
RELEASED_PARTS: Mapping[str, str] = MappingProxyType({ours: released for released, ours in BLOCK_PARTS.items()})


def clip_vision_config(**overrides: Any) -> CLIPVisionConfig:
    """The released vision tower's configuration, with some of its sizes replaced."""
    return CLIPVisionConfig(**{**CLIP_VIT_H14, **overrides})


def from_released_clip(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The vision tower of a released CLIP state dict under transformers' names.

    Raises:
        KeyError: a name is neither the vision tower's nor one of those that are known to be unused.
    """
    state: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if not UNUSED.fullmatch(name):
            state.update(from_released_parameter(name, tensor))
    return state


def from_released_parameter(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """One released parameter of the vision tower as transformers' one, or as its three for queries, keys and values.

    Raises:
        KeyError: the vision tower has no parameter of that name.
    """
    own = name.removeprefix("visual.")
    match = re.fullmatch(r"transformer\.(\d+)\.(.+)\.(weight|bias)", own)
    if name != own and own in STEM:
        for _ in range(BATCH_AXES.get(own, 0)):
            tensor = tensor.squeeze(0)
        return {STEM[own]: tensor}
    if name != own and match is not None:
        block, part, kind = f"encoder.layers.{match[1]}", match[2], match[3]
        if part in BLOCK_PARTS:
            return {f"{block}.{BLOCK_PARTS[part]}.{kind}": tensor}
        if part == "attn.to_qkv":
            return {f"{block}.{third}.{kind}": rows for third, rows in zip(QKV, tensor.tensor_split(3), strict=True)}
    raise KeyError(f"the released image encoder has a parameter '{name}' that CLIP's vision tower does not have")


def to_released_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The vision tower of transformers' CLIPVisionModel under the released names, without the unused projection.

    Raises:
        KeyError: a name is not the vision tower's, or a block lacks its queries, keys or values.
    """
    weights: dict[str, Tensor] = {}
    for name, tensor in state.items():
        match = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
        if name in RELEASED_STEM:
            released = RELEASED_STEM[name]
            for _ in range(BATCH_AXES.get(released, 0)):
                tensor = tensor[None]
            weights[f"visual.{released}"] = tensor
        elif match is not None and match[2] in RELEASED_PARTS:
            weights[f"visual.transformer.{match[1]}.{RELEASED_PARTS[match[2]]}.{match[3]}"] = tensor
        elif match is not None and match[2] in QKV:
            thirds = [state[f"encoder.layers.{match[1]}.{third}.{match[3]}"] for third in QKV]
            if match[2] == QKV[0]:
                weights[f"visual.transformer.{match[1]}.attn.to_qkv.{match[3]}"] = torch.cat(thirds)
        else:
            raise KeyError(f"CLIP's vision tower has a parameter '{name}' that the released one does not have")
    return weights


def load_clip_vision(weights: Mapping[str, Tensor], config: CLIPVisionConfig, dtype: torch.dtype) -> CLIPVisionModel:
    """The vision tower with weights of the released file, ready to run, on the device of the weights.

    Weights that have the dtype already are used as they are: a mapped file is not read before it is needed.

    Raises:
        KeyError: a weight has a name that CLIP does not know.
        ValueError: weights are missing or have another shape than the configuration says.
    """
    with torch.device("meta"):
        model = CLIPVisionModel(config)
    state = {name: tensor.to(dtype) for name, tensor in from_released_clip(weights).items()}
    load_strictly(model, state)
    # The indices of the positions belong to no file, so they are still without values.
    positions = state[STEM["pos_embedding"]]
    indices = torch.arange(len(positions), device=positions.device)[None]
    model.embeddings.register_buffer("position_ids", indices, persistent=False)
    return model.eval().requires_grad_(False)


@dataclass(frozen=True)
class CLIPImageEncoder:
    """A picture to tokens, as the released code makes them."""

    model: CLIPVisionModel

    @torch.no_grad()
    def __call__(self, image: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b m f"]:
        """Tokens of a picture in [-1, 1], (1, 257, 1280) in the released model, on the model's device.

        They are the output of the last block but one, without the final norm (released code).
        """
        size = cast(int, self.model.config.image_size)
        pixels = preprocess(image.to(self.model.device), size).to(self.model.dtype)
        return self.model(pixel_values=pixels, output_hidden_states=True).hidden_states[-2]


def preprocess(image: Float[Tensor, "b 3 h w"], size: int) -> Float[Tensor, "b 3 s s"]:
    """A picture in [-1, 1] stretched to a square and normalised with CLIP's statistics, in float32 (released code).

    The resize is bicubic without anti-aliasing; it ignores the aspect ratio and its overshoot is kept.
    """
    square = F.interpolate(image.float(), (size, size), mode="bicubic", align_corners=False, antialias=False)
    mean = torch.tensor(CLIP_MEAN, device=image.device)[:, None, None]
    std = torch.tensor(CLIP_STD, device=image.device)[:, None, None]
    return (square * 0.5 + 0.5 - mean) / std
