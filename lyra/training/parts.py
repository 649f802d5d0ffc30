"""lyra-tiny's shape and settings, and the parts that make training samples before there is a trained transformer."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import torch

from lyra.config import ModelSettings
from lyra.depth.tiny import TinyDepthModel
from lyra.depth.walk import SeenDepth
from lyra.generation.walkthrough import Components
from lyra.models.autoencoder import TinyCausalAutoencoder
from lyra.models.framepack import RELEASED_LAYOUT, FramePackLayout

TINY_TRANSFORMER = {
    "dim": 256,
    "num_heads": 4,
    "num_layers": 7,
    "ffn_dim": 768,
    "in_channels": 68,
    "out_channels": 32,
    "text_dim": 128,
    "text_len": 64,
    "freq_dim": 256,
    "image_dim": 160,
    "camera_channels": 24,
    "correspondence_channels": 80,
    "correspondence_squeeze": 64,
    "prediction": "residual",
}
"""lyra-tiny's transformer; everything that is not named is as released."""

TINY_SETTINGS = ModelSettings(
    name="lyra-tiny",
    licence="Apache-2.0",
    generation_height=128,
    generation_width=224,
    keep_seen_pixels=True,
    fill_holes=True,
    visibility_mask=True,
    few_step_note="flow matching, a quarter of its training at the four DMD noise levels; no separate distillation",
    guidance_scale=2.0,
    depth_interval=4,
    depth_frames=20,
)


def conditioning_parts(models: Path) -> tuple[Components, TinyDepthModel]:
    """The loop's parts with a trained autoencoder and depth network, and no transformer."""
    autoencoder = TinyCausalAutoencoder.from_pretrained(models / "autoencoder").eval().requires_grad_(False)
    depth = TinyDepthModel.from_pretrained(models / "depth").eval().requires_grad_(False)
    parts = Components(
        settings=TINY_SETTINGS,
        # Only the transformer's shape is asked for when a sample is made.
        transformer=SimpleNamespace(config=SimpleNamespace(**TINY_TRANSFORMER)),  # type: ignore[arg-type]
        layout=FramePackLayout.parse(RELEASED_LAYOUT),
        autoencoder=autoencoder,
        encode_text=lambda texts: torch.zeros(len(texts), 1, 128),
        negative_text=torch.zeros(1, 1, 128),
        encode_image=lambda image: depth.predict(image).features,
        depth=SeenDepth(depth),
        blend=None,
        use_sampler=lambda name, loras: None,
    )
    return parts, depth
