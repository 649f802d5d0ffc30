"""What the transformer is told about a chunk: history latents, warped views, rays and correspondences, in their slots.

`build_inputs` is shared by generation and training. Knows the layout and the autoencoder, but neither the sampler nor
where frames are stored.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lyra.geometry.cameras import ray_maps
from lyra.memory.correspondence import fold_to_cells, history_correspondence, target_correspondence
from lyra.memory.history import assemble_history, latent_to_frame, temporal_indices
from lyra.memory.spatial_cache import MemoryFrame
from lyra.models.framepack import FramePackLayout
from lyra.models.streaming import StreamingAutoencoder, encode_video
from lyra.types import Cameras


@dataclass(frozen=True)
class ChunkInputs:
    """Everything but the noise, the text and the timestep."""

    history: Float[Tensor, "1 z t h w"]
    """Clean latents of the history slots."""
    mask: Float[Tensor, "1 4 s h w"]
    conditioning: Float[Tensor, "1 z s h w"]
    """History latents, then the encoded appearance warp."""
    rays: Float[Tensor, "1 r s h w"]
    correspondence: Float[Tensor, "1 c s h w"]

    def to(self, dtype: torch.dtype) -> ChunkInputs:
        """The same inputs in a number format."""
        return ChunkInputs(**{item.name: getattr(self, item.name).to(dtype) for item in fields(self)})


@dataclass(frozen=True)
class ChunkScene:
    """The remembered and the new cameras of one chunk, all at generation size."""

    cameras: Cameras
    """Cameras of all frames so far and of the new ones, frame 0 first."""
    new_frames: int
    """How many of them are new."""
    retrieved: Sequence[MemoryFrame]
    """Worst first, best last."""
    padding: MemoryFrame
    """Fills spatial slots when fewer frames are retrieved: the photo."""


def samples_per_cell(camera_channels: int) -> int:
    """Samples a side with which rays and coordinates are folded to latent cells (released: 8)."""
    return math.isqrt(camera_channels // 6)


def build_inputs(
    scene: ChunkScene,
    layout: FramePackLayout,
    *,
    history_latents: Float[Tensor, "1 z n h w"],
    spatial_latents: Float[Tensor, "1 z s h w"],
    warp_latents: Float[Tensor, "1 z g h w"],
    target_mask: Float[Tensor, "1 4 g h w"] | None,
    stride: int,
    cell_samples: int,
    warp_group: int,
) -> ChunkInputs:
    """Put every part into its slots.

    Args:
        history_latents: all latents so far; the layout picks the anchor and the newest.
        spatial_latents: the retrieved frames, each encoded alone, in slot order.
        warp_latents: encoded appearance warp of the new frames.
        target_mask: which target pixels the warp covers; None puts ones (released code).
    """
    chosen = temporal_indices(history_latents.shape[2], layout)
    history = assemble_history(history_latents[:, :, chosen], spatial_latents, layout)
    mask = torch.ones(1, 4, layout.slots, *history.shape[-2:], device=history.device)
    if target_mask is not None:
        mask[:, :, layout.targets.start :] = target_mask
    return ChunkInputs(
        history=history,
        mask=mask,
        conditioning=torch.cat([history, warp_latents], dim=2),
        rays=chunk_rays(scene, layout, chosen, stride, cell_samples),
        correspondence=chunk_correspondence(scene, layout, stride, cell_samples, warp_group),
    )


def slot_memory(scene: ChunkScene, layout: FramePackLayout) -> list[MemoryFrame]:
    """The frames of the spatial slots: retrieved ones, padded on the left with the photo (released code)."""
    missing = len(layout.spatial_slots) - len(scene.retrieved)
    return [scene.padding] * missing + list(scene.retrieved)


def chunk_rays(
    scene: ChunkScene, layout: FramePackLayout, chosen: Int[Tensor, "n"], stride: int, cell_samples: int
) -> Float[Tensor, "1 r s h w"]:
    """Rays of all slots, relative to the camera of the newest known frame (released code)."""
    cameras, memory = scene.cameras, slot_memory(scene, layout)
    last_known = len(cameras) - scene.new_frames - 1
    temporal = latent_to_frame(chosen, layout)
    per_latent = scene.new_frames // layout.targets.count
    targets = torch.arange(last_known + per_latent, len(cameras), per_latent)
    w2c = torch.cat([cameras.w2c[temporal], torch.stack([frame.w2c for frame in memory]), cameras.w2c[targets]])
    intrinsics = torch.cat(
        [cameras.intrinsics[temporal], torch.stack([f.intrinsics for f in memory]), cameras.intrinsics[targets]]
    )
    relative = cameras.w2c[last_known] @ torch.linalg.inv(w2c)
    maps = ray_maps(relative, intrinsics, cameras.image_height, cameras.image_width).movedim(-1, 1)
    folded = fold_to_cells(maps, stride, cell_samples).transpose(0, 1)[None]
    split = [len(temporal), len(memory), len(targets)]
    recent, spatial, new = folded.split(split, dim=2)
    return torch.cat([assemble_history(recent, spatial, layout), new], dim=2)


def chunk_correspondence(
    scene: ChunkScene, layout: FramePackLayout, stride: int, cell_samples: int, warp_group: int
) -> Float[Tensor, "1 c s h w"]:
    """Correspondence channels of all slots."""
    cameras = scene.cameras
    height, width = cameras.image_height, cameras.image_width
    first = len(cameras) - scene.new_frames
    history = history_correspondence(
        layout.history_slots,
        layout.spatial_slots,
        height=height,
        width=width,
        stride=stride,
        samples_per_cell=cell_samples,
        device=cameras.w2c.device,
    )
    targets = target_correspondence(
        scene.retrieved,
        cameras.w2c[first:],
        cameras.intrinsics[first:],
        height=height,
        width=width,
        stride=stride,
        samples_per_cell=cell_samples,
        frames_per_latent=scene.new_frames // layout.targets.count,
        group=warp_group,
    )
    return torch.cat([history, targets], dim=2)


def encode_warp(autoencoder: StreamingAutoencoder, frames: Float[Tensor, "1 3 t h w"]) -> Float[Tensor, "1 z g h w"]:
    """Encode the warped new frames with a fresh cache, their first frame repeated before them (released code)."""
    clip = torch.cat([frames[:, :, :1], frames], dim=2)
    return encode_video(autoencoder, clip, {})[:, :, 1:]


def encode_stills(
    autoencoder: StreamingAutoencoder, images: Sequence[Float[Tensor, "3 h w"]]
) -> Float[Tensor, "1 z s h w"]:
    """Encode images alone, each as the first frame of a video of its own (released code)."""
    known: dict[int, Tensor] = {}
    for image in images:
        if id(image) not in known:
            known[id(image)] = autoencoder.encode_piece(image[None, :, None], {})
    return torch.cat([known[id(image)] for image in images], dim=2)
