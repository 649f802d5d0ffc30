"""Builds the loop's parts from a folder of weights; the only place that maps files to classes.

A folder holds lyra.json and one sub-folder for each part in diffusers' layout. Knows the classes, not the loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging as diffusers_logging
from torch import Tensor

from lyra.config import ModelSettings
from lyra.depth.tiny import TinyDepthModel
from lyra.depth.walk import SeenDepth
from lyra.device import Device
from lyra.errors import UserError
from lyra.generation.walkthrough import Components
from lyra.models.autoencoder import TinyCausalAutoencoder
from lyra.models.refiner import SeamRefiner
from lyra.models.text import HashedTextEncoder
from lyra.models.transformer import Lyra2Transformer3DModel


def load_components(folder: Path, device: Device) -> tuple[Components, TinyDepthModel]:
    """The loop's parts and the monocular depth network.

    Raises:
        UserError: a part is missing or damaged.
    """
    settings = ModelSettings.load(folder)
    # Progress bars and notices about number formats would run into the job's own progress.
    diffusers_logging.disable_progress_bar()
    diffusers_logging.set_verbosity_error()
    try:
        depth = place(TinyDepthModel.from_pretrained(folder / "depth"), device)
        transformer = place(Lyra2Transformer3DModel.from_pretrained(folder / "transformer"), device)
        autoencoder = place(TinyCausalAutoencoder.from_pretrained(folder / "autoencoder"), device)
        text_encoder = place(HashedTextEncoder.from_pretrained(folder / "text_encoder"), device)
        refiner = place(SeamRefiner.from_pretrained(folder / "refiner"), device) if settings.keep_seen_pixels else None
    except (OSError, ValueError) as error:
        raise UserError(f"The weights in {folder} cannot be loaded ({error}); restore the folder.") from error

    @torch.no_grad()
    def encode_text(texts: Sequence[str]) -> Tensor:
        return text_encoder(texts)

    return Components(
        settings=settings,
        transformer=transformer,
        layout=transformer.layout,
        autoencoder=autoencoder,
        encode_text=encode_text,
        negative_text=encode_text([""]),
        encode_image=lambda image: depth.predict(image).features,
        depth=SeenDepth(depth),
        blend=refiner.blend if refiner is not None else None,
        use_sampler=lambda name: None,
    ), depth


def place(model: Any, device: Device) -> Any:
    """Put a model on its device, ready to run."""
    return model.to(device.device, device.dtype).eval().requires_grad_(False)
