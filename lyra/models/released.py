"""Builds the networks of a model from the files that NVIDIA released, each strictly: every tensor is accounted for.

Knows the released files, names and sizes, and our classes; what runs where and the licence are the callers' business.
A checkpoint of other sizes (say, a 1.3 B model that somebody trained) names them in `sizes.json` beside the parts; a
file without one must have the released sizes exactly, so that a truncated checkpoint cannot pass for a smaller model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from torch import Tensor, nn
from transformers import CLIPVisionModel, UMT5EncoderModel

from lyra.errors import UserError
from lyra.models.checkpoint import (
    check_shapes,
    from_released,
    from_released_name,
    is_parameter,
    load_strictly,
    shapes_of,
)
from lyra.models.clip_vision import clip_vision_config, load_clip_vision
from lyra.models.distributed_checkpoint import (
    is_distributed_checkpoint,
    other_entries,
    read_groups,
    read_metadata,
    tensor_shapes,
)
from lyra.models.transformer import Lyra2Transformer3DModel
from lyra.models.umt5 import load_umt5, umt5_config
from lyra.models.wan_autoencoder import from_released_autoencoder
from lyra.models.weight_files import TORCH_SUFFIXES, read_weights

SIZES_FILE = "sizes.json"
SIZE_SETTINGS = ("generation_height", "generation_width")
"""Settings that a sizes file may give; a licence or a name is none of them."""
LORA_FILE = "lora/dmd_distillation.safetensors"
NEGATIVE_FILE = "text_encoder/negative_prompt.pt"
NEGATIVE_TENSOR = "negative_prompt.safetensors"
"""The same in a converted model."""
RECONSTRUCTION_FILE = "recon/model.pt"


@dataclass(frozen=True)
class ReleasedSizes:
    """Constructor arguments that differ from the released sizes, by part; empty for the released checkpoint."""

    transformer: Mapping[str, Any] = field(default_factory=dict)
    text_encoder: Mapping[str, Any] = field(default_factory=dict)
    image_encoder: Mapping[str, Any] = field(default_factory=dict)
    autoencoder: Mapping[str, Any] = field(default_factory=dict)
    reconstruction: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `ModelSettings` that differ, such as the size in pixels that the network was trained for."""

    @classmethod
    def of(cls, folder: Path) -> ReleasedSizes:
        """The sizes that a folder names, or the released ones.

        Raises:
            UserError: the file cannot be read or names a part that there is not.
        """
        path = folder / SIZES_FILE
        if not path.exists():
            return cls()
        parts = ", ".join(item.name for item in fields(cls))
        try:
            sizes = cls(**json.loads(path.read_text(encoding="utf-8")))
            odd = sorted(set(sizes.settings) - set(SIZE_SETTINGS))
            if odd:
                raise ValueError(f"settings may not have {', '.join(odd)}")
            return sizes
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{path} cannot be used ({error}); give sizes of {parts} as JSON, or delete it.") from error


def transformer_file(folder: Path) -> Path:
    """The distributed checkpoint's folder, or the single file that stands in its place.

    Raises:
        UserError: there is none, or several.
    """
    for place in (folder / "model" / "model", folder / "model"):
        if is_distributed_checkpoint(place):
            return place
    single = [p for p in sorted((folder / "model").glob("*")) if p.suffix in (*TORCH_SUFFIXES, ".safetensors")]
    if len(single) != 1:
        found = f"{len(single)} single files" if single else "neither a .metadata nor a single weights file"
        raise UserError(
            f"{folder / 'model'} holds {found}; put the released distributed checkpoint there, or one .pth or "
            ".safetensors file."
        )
    return single[0]


def transformer_groups(folder: Path, expected: nn.Module, dtype: torch.dtype | None) -> Iterator[dict[str, Tensor]]:
    """The transformer's parameters under this project's names, a few gigabytes at a time.

    Names and shapes are checked before the first is read.

    Args:
        expected: a model of the right size, on any device.
        dtype: number format to cast to; as stored when None.

    Raises:
        UserError: the files are missing, damaged or hostile.
        WrongWeights, KeyError: tensors are missing, unexpected or misshapen.
    """
    path, shapes = transformer_file(folder), shapes_of(expected.state_dict())
    if path.is_dir():
        metadata = read_metadata(path)
        stored = {name: shape for name, shape in tensor_shapes(metadata).items() if is_parameter(name)}
        # An entry that is no tensor may only be one of the states that are never read.
        objects = {name: () for name in other_entries(metadata) if is_parameter(name)}
        ours = {name: from_released_name(name) for name in (*stored, *objects)}
        check_shapes(shapes, {ours[name]: shape for name, shape in (stored | objects).items()})
        for group in read_groups(path, list(stored), dtype):
            yield {ours[name]: tensor for name, tensor in group.items()}
        return
    weights = from_released(read_weights(path))
    check_shapes(shapes, shapes_of(weights))
    for name, tensor in weights.items():
        yield {name: tensor.to(dtype) if dtype is not None else tensor}


def empty_transformer(sizes: ReleasedSizes) -> Lyra2Transformer3DModel:
    """The transformer without storage."""
    with torch.device("meta"):
        return Lyra2Transformer3DModel(**sizes.transformer)


def load_transformer(folder: Path, dtype: torch.dtype) -> Lyra2Transformer3DModel:
    """The video transformer.

    Raises:
        UserError: the files are missing, damaged or hostile.
        WrongWeights, KeyError: tensors are missing, unexpected or misshapen.
    """
    model = empty_transformer(ReleasedSizes.of(folder))
    for group in transformer_groups(folder, model, dtype):
        model.load_state_dict(group, strict=False, assign=True)
    return model.eval().requires_grad_(False)


def load_autoencoder(folder: Path, dtype: torch.dtype) -> AutoencoderKLWan:
    """The Wan 2.1 autoencoder.

    Raises:
        UserError: the file is missing, damaged or hostile.
        WrongWeights, KeyError: tensors are missing, unexpected or misshapen.
    """
    # Some sizes are derived from others when the class is built, and it is small, so it is built for real.
    vae = AutoencoderKLWan(**ReleasedSizes.of(folder).autoencoder)
    load_strictly(vae, from_released_autoencoder(read_weights(folder / "vae" / "vae.pth")))
    return (vae if dtype == torch.float32 else vae.to(dtype)).eval().requires_grad_(False)


def load_text_encoder(folder: Path, dtype: torch.dtype) -> UMT5EncoderModel:
    """The UMT5-XXL encoder.

    Raises:
        UserError: the file is missing, damaged or hostile.
        WrongWeights, KeyError: tensors are missing, unexpected or misshapen.
    """
    config = umt5_config(**ReleasedSizes.of(folder).text_encoder)
    return load_umt5(read_weights(folder / "text_encoder" / "encoder.pth"), config, dtype)


def load_image_encoder(folder: Path, dtype: torch.dtype) -> CLIPVisionModel:
    """The CLIP vision tower.

    Raises:
        UserError: the file is missing, damaged or hostile.
        WrongWeights, KeyError: tensors are missing, unexpected or misshapen.
    """
    config = clip_vision_config(**ReleasedSizes.of(folder).image_encoder)
    return load_clip_vision(read_weights(folder / "image_encoder" / "model.pth"), config, dtype)
