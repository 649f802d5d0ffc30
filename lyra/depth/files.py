"""Which depth network is in a folder of weights, how large is it, and does it make Gaussians?

One of three layouts: NVIDIA's release, this project's, and a public Depth Anything 3 alone. Only the depth network's
own files are opened. Knows no name of a model and no licence (`lyra.hub`), nor where a network runs (`lyra.loading`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from lyra.depth.tiny import TinyDepthModel
from lyra.errors import UserError
from lyra.models.depth_anything.config import AnyDepthAnythingConfig, DepthAnythingConfig
from lyra.models.depth_anything.model import AnyDepthAnything
from lyra.models.depth_anything_folder import (
    CLASS_NAME,
    PUBLISHED_RESOLUTION,
    config_from_json,
    load_depth_folder,
    load_released_depth,
    read_depth_config,
)
from lyra.models.pretrained import class_of, load_pretrained
from lyra.models.released import RECONSTRUCTION_FILE, ReleasedSizes

Layout = Literal["lyra", "released", "depth-anything"]
FOLDER = "depth"
"""Of the depth network in this project's layout."""


@dataclass(frozen=True)
class DepthNetwork:
    """A depth network, on the CPU."""

    network: TinyDepthModel | AnyDepthAnything
    config: AnyDepthAnythingConfig | None = None
    """Sizes of a Depth Anything 3 network."""
    resolution: int | None = None
    """Pixels of the longest side at which it works; that of its input when None."""

    @property
    def relates_views(self) -> bool:
        """Whether it predicts cameras, and measures several views together with theirs."""
        if isinstance(self.config, DepthAnythingConfig):
            return self.config.any_view
        return self.config is not None


def read_depth(folder: Path, layout: Layout, dtype: torch.dtype) -> DepthNetwork:
    """The depth network in a folder.

    Args:
        dtype: number format of lyra-tiny's network; Depth Anything 3 is read in float32, and cast where it is placed.

    Raises:
        UserError: files are missing, damaged or hostile, or hold another network.
        ValueError: tensors are missing, unexpected or misshapen.
    """
    if layout == "depth-anything":
        return DepthNetwork(*load_depth_folder(folder), PUBLISHED_RESOLUTION)
    if layout == "released":
        config = config_from_json(ReleasedSizes.of(folder).reconstruction)
        return DepthNetwork(load_released_depth(folder / RECONSTRUCTION_FILE, config), config)
    name = class_of(folder / FOLDER)
    if name == CLASS_NAME:
        return DepthNetwork(*load_depth_folder(folder / FOLDER))
    if name == TinyDepthModel.__name__:
        return DepthNetwork(load_pretrained(TinyDepthModel, folder / FOLDER, dtype=dtype))
    raise UserError(
        f"{folder / FOLDER / 'config.json'} names the class {name}, but {TinyDepthModel.__name__} or {CLASS_NAME} is "
        "needed here; restore the folder."
    )


def read_config(folder: Path, layout: Layout) -> AnyDepthAnythingConfig | None:
    """Sizes of the Depth Anything 3 in a folder, without its weights; None where the depth network is another one.

    Raises:
        UserError: files are missing or damaged.
    """
    if layout == "depth-anything":
        return read_depth_config(folder)
    if layout == "released":
        return config_from_json(ReleasedSizes.of(folder).reconstruction)
    return read_depth_config(folder / FOLDER) if class_of(folder / FOLDER) == CLASS_NAME else None


def makes_gaussians(config: AnyDepthAnythingConfig | None) -> bool:
    """Whether a depth network of these sizes has a Gaussian head."""
    if config is None:
        return False
    return (config if isinstance(config, DepthAnythingConfig) else config.any_view).gaussian_head
