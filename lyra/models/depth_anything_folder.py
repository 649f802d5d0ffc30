"""Depth Anything 3 as a folder of config.json and one safetensors file, public or our own, and from a torch file.

Knows where the weights are kept and how their sizes are written down; the networks are `lyra.models.depth_anything`.
A public folder names its network as `model_name`, and that name alone decides the sizes, as in the published code.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from lyra.errors import UserError
from lyra.models.depth_anything.config import (
    CONFIGS,
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
PUBLISHED_NAME = "model_name"
"""Entry of a public config.json."""
PUBLISHED_RESOLUTION = 504
"""Pixels of the longest side at which public networks work (published default)."""

UNUSED_FOR_DEPTH: Mapping[str, str] = {
    "rays": r"(?:da3\.)?head\.scratch\.\w+_aux\..*",
    "Gaussians": r"(?:da3\.)?gs_head\..*",
}
"""Heads of a file that depth and cameras do not need, with the names of their tensors; they are loaded and checked with
the rest, and never computed for depth."""

logger = logging.getLogger(__name__)


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


def read_depth_config(folder: Path) -> AnyDepthAnythingConfig:
    """Sizes of the network in a folder, public or of `save_depth_folder`.

    Raises:
        UserError: the config.json is missing, damaged or names an unknown network.
    """
    values = read_config(folder)
    if not isinstance(values, dict):
        raise UserError(f"{folder / 'config.json'} holds no sizes but a {type(values).__name__}; restore the folder.")
    if PUBLISHED_NAME in values:
        return published_config(values)
    return config_from_json({name: value for name, value in values.items() if not name.startswith("_")})


def published_config(values: Mapping[str, Any]) -> AnyDepthAnythingConfig:
    """Sizes of a public network from its config.json.

    Raises:
        UserError: there is no such network, or the entries beside the name are of another one.
    """
    name = str(values[PUBLISHED_NAME])
    layout = re.sub("^da3-?", "", name.lower())
    if layout not in CONFIGS:
        known = ", ".join(CONFIGS)
        raise UserError(f"There is no Depth Anything 3 of the name '{name}'; its sizes may be: {known}.")
    found = CONFIGS[layout]
    details = values.get("config")
    details = details if isinstance(details, dict) else {}
    if isinstance(found, NestedDepthAnythingConfig):
        parts = {"anyview": found.any_view, "metric": found.metric}
        pairs = [(details.get(part), config) for part, config in parts.items()]
    else:
        pairs = [(details, found)]
    for given, config in pairs:
        net = given.get("net") if isinstance(given, dict) else None
        # Shapes are checked with the weights; these two change no shape and would give wrong depth silently.
        expected = (list(config.backbone.output_layers), config.backbone.alternation_start)
        if isinstance(net, dict) and (net.get("out_layers"), _start(net.get("alt_start"))) != expected:
            raise UserError(f"The config.json names {name}, but its layers are of another network; download it again.")
    return found


def _start(block: Any) -> Any:
    """First block that alternates; the published config has -1 where none does."""
    return None if block == -1 else block


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
    """The network in a folder, public or of `save_depth_folder`; every tensor is accounted for.

    Raises:
        UserError: a file is missing or damaged.
        ValueError: tensors are missing, unexpected or misshapen.
    """
    config, path = read_depth_config(folder), folder / WEIGHTS
    weights = unwrap_checkpoint(read_safetensors(path))
    model = load_depth_anything(config, weights)
    unused = [f"{head} ({count} tensors)" for head, count in unused_for_depth(weights).items() if count]
    if unused:
        logger.info("%s also holds heads that depth does not need: %s.", path, ", ".join(unused))
    return model, config


def unused_for_depth(names: Iterable[str]) -> dict[str, int]:
    """How many of some tensors belong to each head that depth does not need."""
    names = list(names)
    return {
        head: sum(re.fullmatch(pattern, name) is not None for name in names)
        for head, pattern in UNUSED_FOR_DEPTH.items()
    }


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
