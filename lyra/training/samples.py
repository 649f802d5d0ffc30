"""Turns rendered walks into training samples of the video transformer, with the loop's own retrieval and conditioning.

A sample is one chunk: what the transformer would be told by `lyra.generation.walkthrough`, and the latents that it
should produce. Knows no loss.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lyra.config import CHUNK_FRAMES
from lyra.depth.tiny import TinyDepthModel
from lyra.generation.conditioning import ChunkInputs
from lyra.generation.state import WalkState
from lyra.generation.walkthrough import Components, Walk, correspond, draw_memory, retrieve, to_uint8
from lyra.memory.history import seed_repetitions
from lyra.memory.spatial_cache import SpatialCache
from lyra.models.streaming import encode_repeated, encode_video
from lyra.training.data import Walk as RenderedWalk
from lyra.training.data import to_model_range
from lyra.types import Cameras

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sample:
    """One chunk to learn from; the latents are the autoencoder's, normalised."""

    inputs: ChunkInputs
    targets: Float[Tensor, "1 z g h w"]
    image: Float[Tensor, "1 m f"]
    """Image tokens of the newest known frame."""
    caption: str


def make_sample(parts: Components, depth: TinyDepthModel, walk: RenderedWalk, rng: np.random.Generator) -> Sample:
    """Cut a random chunk from a rendered walk, mirrored or reversed at random, as the first or a later chunk.

    Remembered depth is the exact depth or, as often, the depth network's, because the loop has only the latter.
    """
    frames, exact, cameras = augmented(walk, rng)
    later = len(frames) > 2 * CHUNK_FRAMES and rng.random() < 0.5
    length = 1 + CHUNK_FRAMES * (2 if later else 1)
    begin = int(rng.integers(0, len(frames) - length + 1))
    window = slice(begin, begin + length)
    frames, exact, cameras = frames[window], exact[window], relative_to_first(cameras[window])
    known = length - CHUNK_FRAMES

    cache: dict = {}
    start = encode_repeated(parts.autoencoder, frames[:1], seed_repetitions(parts.layout), cache)
    latents = torch.cat([start, encode_video(parts.autoencoder, frames[1:].transpose(0, 1)[None], cache)], dim=2)
    new = CHUNK_FRAMES // parts.autoencoder.temporal_stride
    remembered = range(0, known, parts.settings.spatial_memory_stride)
    depths = {i: exact[i] for i in remembered}
    if rng.random() < 0.5:
        depths = predicted_depths(depth, frames, depths)
    memory = SpatialCache()
    for i in remembered:
        memory.write(i, depths[i], cameras.w2c[i], cameras.intrinsics[i])
    state = WalkState(
        cameras=cameras,
        history=latents[:, :, :-new],
        encoder_cache={},
        decoder_cache={},
        memory=memory,
        images={i: frames[i] for i in remembered},
        pixels={i: to_uint8(frames[i]) for i in remembered},
        buffer_depth=depths[known - 1],
        memory_stride=parts.settings.spatial_memory_stride,
        finished_frames=known - 1,
        depths=depths,
    )
    size = (cameras.image_height, cameras.image_width)
    loop_walk = Walk(frames[0], depths[0], cameras, size)
    retrieved = retrieve(state, cameras[known:], "lyra")
    seen = draw_memory(loop_walk, state, retrieved, with_photo=True) if parts.settings.keep_seen_pixels else None
    inputs = correspond(parts, loop_walk, state, retrieved, seen)
    image = parts.encode_image(frames[known - 1 : known])
    return Sample(inputs, latents[:, :, -new:], image, walk.caption)


def augmented(walk: RenderedWalk, rng: np.random.Generator) -> tuple[Tensor, Tensor, Cameras]:
    """Frames, depth and cameras, mirrored and reversed at random; the caption stays true."""
    frames, depth = to_model_range(walk.rgb), walk.depth
    w2c, intrinsics = walk.w2c.clone(), walk.intrinsics.clone()
    height, width = depth.shape[1:]
    if rng.random() < 0.5:
        frames, depth = frames.flip(-1), depth.flip(-1)
        mirror = torch.diag(torch.tensor([-1.0, 1.0, 1.0, 1.0]))
        w2c = mirror @ w2c @ mirror
        intrinsics[0, 2] = width - 1 - intrinsics[0, 2]
    if rng.random() < 0.5:
        frames, depth, w2c = frames.flip(0), depth.flip(0), w2c.flip(0)
    return frames, depth, Cameras(w2c, intrinsics.expand(len(w2c), 3, 3), height, width)


def relative_to_first(cameras: Cameras) -> Cameras:
    """The same path with the first camera at the origin, as the loop sees it."""
    w2c = cameras.w2c @ torch.linalg.inv(cameras.w2c[0])
    return Cameras(w2c, cameras.intrinsics, cameras.image_height, cameras.image_width)


@torch.no_grad()
def predicted_depths(model: TinyDepthModel, frames: Tensor, exact: dict[int, Tensor]) -> dict[int, Tensor]:
    """The depth network's view of the remembered frames, each scaled to the exact depth's median."""
    ids = list(exact)
    prediction = model.predict(frames[ids])
    result = {}
    for index, frame in enumerate(ids):
        ground = ~prediction.sky[index] & (exact[frame] < 200)
        ratio = (exact[frame][ground] / prediction.depth[index][ground]).median() if ground.any() else torch.tensor(1.0)
        scaled = torch.where(prediction.sky[index], prediction.depth[index], prediction.depth[index] * ratio)
        result[frame] = scaled
    return result


def save_sample(path: Path, sample: Sample) -> None:
    """Write a sample in half precision."""
    tensors = {name: getattr(sample.inputs, name) for name in ChunkInputs.__dataclass_fields__}
    tensors |= {"targets": sample.targets, "image": sample.image}
    half = {name: tensor.to(torch.float16).contiguous() for name, tensor in tensors.items()}
    temporary = path.with_suffix(".tmp")
    save_file(half, temporary, metadata={"caption": json.dumps(sample.caption)})
    temporary.replace(path)


def load_sample(path: Path) -> Sample:
    """Read a sample."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118 - not a dict
        caption = json.loads((file.metadata() or {})["caption"])
    inputs = ChunkInputs(**{name: tensors[name] for name in ChunkInputs.__dataclass_fields__})
    return Sample(inputs, tensors["targets"], tensors["image"], caption)


def mean_visibility(mask: Float[Tensor, "b 4 g h w"]) -> Float[Tensor, "b 1 g h w"]:
    """Share of each target cell that the warp covers."""
    return mask.mean(1, keepdim=True)
