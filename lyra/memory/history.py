"""Which latents fill the packed history: the anchor, the newest ones, and the retrieved frames between them.

Follows the slots of a `FramePackLayout`; knows no pixels and no cameras.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lyra.models.framepack import FramePackLayout


def seed_repetitions(layout: FramePackLayout, frames_per_latent: int = 4) -> int:
    """How often the photo is repeated so that the history is full at the start: 97 for 25 slots (released code)."""
    return (layout.history_slots - 1) * frames_per_latent + 1


def temporal_indices(latents: int, layout: FramePackLayout) -> Int[Tensor, "n"]:
    """Indices into the list of all history latents: the first, then the newest ones in time order."""
    newest = len(layout.temporal_slots) - 1
    return torch.tensor([0, *range(latents - newest, latents)])


def assemble_history(
    temporal: Float[Tensor, "b c n h w"], spatial: Float[Tensor, "b c s h w"], layout: FramePackLayout
) -> Float[Tensor, "b c t h w"]:
    """Place temporal and spatial entries (latents or rays) in their slots."""
    shape = list(temporal.shape)
    shape[2] = layout.history_slots
    history = temporal.new_empty(shape)
    history[:, :, list(layout.temporal_slots)] = temporal
    history[:, :, list(layout.spatial_slots)] = spatial
    return history


def latent_to_frame(latents: Int[Tensor, "n"], layout: FramePackLayout, frames_per_latent: int = 4) -> Int[Tensor, "n"]:
    """Absolute frame whose camera a history latent carries: the last frame of its group, the photo for repetitions.

    Latent l covers window frames up to 4 l, and the window starts 96 frames before frame 0 (released code).
    """
    offset = seed_repetitions(layout, frames_per_latent) - 1
    return (latents * frames_per_latent - offset).clamp(min=0)
