"""Depth Anything 3 as a folder of config.json and one safetensors file, and from the released torch file.

Knows where the weights are kept and how their sizes are written down; the networks are `lyra.models.depth_anything`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from lyra.errors import UserError
from lyra.models.depth_anything.config import (
    NESTED_GIANT_LARGE,
    AnyDepthAnythingConfig,
    BackboneConfig,
    DepthAnythingConfig,
    NestedDepthAnythingConfig,
)
from lyra.models.depth_anything.model import AnyDepthAnything, load_depth_anything
from lyra.models.depth_anything.names import unwrap_checkpoint
from lyra.models.pretrained import read_config
from lyra.models.weight_files import read_safetensors, read_torch

CLASS_NAME = "DepthAnything3"
WEIGHTS = "model.safetensors"


def config_from_json(values: Mapping[str, Any]) -> AnyDepthAnythingConfig:
    """Sizes of a network from plain values: those of `dataclasses.asdict`; the released ones when empty.

    Raises:
        UserError: a field is unknown or missing.
    """
    if not values:
        return NESTED_GIANT_LARGE
    try:
        if "metric" in values:
            return NestedDepthAnythingConfig(_single(values["any_view"]), _single(values["metric"]))
        return _single(values)
    except (TypeError, KeyError, AttributeError) as error:
        raise UserError(f"The sizes of the depth network cannot be used ({error}); restore its config.json.") from error


def _single(values: Mapping[str, Any]) -> DepthAnythingConfig:
    backbone = dict(values["backbone"])
    layers = tuple(backbone.pop("output_layers"))
    channels = tuple(values["channels"])
    rest = {name: value for name, value in values.items() if name not in ("backbone", "channels")}
    return DepthAnythingConfig(backbone=BackboneConfig(output_layers=layers, **backbone), channels=channels, **rest)


def load_released_depth(path: Path, config: AnyDepthAnythingConfig) -> AnyDepthAnything:
    """The network in a released torch or safetensors file.

    Raises:
        UserError: the file is missing, damaged or hostile.
        ValueError: tensors are missing, unexpected or misshapen.
    """
    contents = read_safetensors(path) if path.suffix == ".safetensors" else read_torch(path)
    return load_depth_anything(config, unwrap_checkpoint(contents))


def load_depth_folder(folder: Path) -> tuple[AnyDepthAnything, AnyDepthAnythingConfig]:
    """The network in a folder of `save_depth_folder`.

    Raises:
        UserError: a file is missing or damaged.
        ValueError: tensors are missing, unexpected or misshapen.
    """
    values = {name: value for name, value in read_config(folder).items() if not name.startswith("_")}
    config = config_from_json(values)
    return load_depth_anything(config, read_safetensors(folder / WEIGHTS)), config


def save_depth_folder(model: AnyDepthAnything, config: AnyDepthAnythingConfig, folder: Path) -> None:
    """Write the network; a tensor that several names share is written once."""
    folder.mkdir(parents=True, exist_ok=True)
    weights, seen = {}, set()
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in seen or tensor.numel() == 0:
            weights[name] = tensor.contiguous()
            seen.add(tensor.data_ptr())
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    values = {"_class_name": CLASS_NAME, **asdict(config)}
    (folder / "config.json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
