"""The autoregressive loop: retrieve, correspond, denoise, decode, measure, remember (paper section 4, figure 3).

Follows DESIGN.md's figure. Every part is passed in; nothing here depends on which model it is, only on its settings.
Knows no file: `lyra.generation.chunk_store` keeps what a chunk leaves behind.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from diffusers.models.attention_dispatch import attention_backend
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional as F

from lyra.config import CHUNK_FRAMES, GenerateJob, ModelSettings
from lyra.diffusion.sampling import initial_noise, sample_dmd, sample_full
from lyra.generation.conditioning import (
    ChunkInputs,
    ChunkScene,
    build_inputs,
    encode_stills,
    encode_warp,
    samples_per_cell,
    slot_memory,
)
from lyra.generation.state import ChunkRecord, WalkState
from lyra.geometry.fill import fill_unseen
from lyra.geometry.warp import forward_warp
from lyra.memory.appearance import SeenView, draw_seen, remember_pixels, visibility_channels
from lyra.memory.history import seed_repetitions
from lyra.memory.retrieval import View, chunk_views, greedy_coverage
from lyra.memory.spatial_cache import MemoryFrame, SpatialCache
from lyra.models.blocks import fastest_attention
from lyra.models.framepack import FramePackLayout
from lyra.models.streaming import (
    StreamingAutoencoder,
    cache_to,
    decode_video,
    encode_repeated,
    encode_video,
    prime_decoder,
)
from lyra.models.transformer import ChunkCache
from lyra.progress import Progress
from lyra.types import Cameras


class WalkDepth(Protocol):
    """Measures the depth of new frames with their known cameras."""

    def measure(
        self, images: Float[Tensor, "n 3 h w"], cameras: Cameras, seen_depth: Float[Tensor, "n h w"]
    ) -> Float[Tensor, "n h w"]:
        """z depth in the units of `seen_depth`, which is infinite where memory shows nothing."""
        ...


class Blend(Protocol):
    """Joins seen pixels and generated ones at output size."""

    def __call__(
        self,
        generated: Float[Tensor, "n 3 h w"],
        seen: Float[Tensor, "n 3 h w"],
        where: Float[Tensor, "n h w"],
        check: Callable[[int, int], None],
    ) -> Float[Tensor, "n 3 h w"]:
        """Frames in which what was seen is kept; `check(done, all)` is called as frames are finished."""
        ...


@dataclass(frozen=True)
class Components:
    """The parts of a model family, ready to run."""

    settings: ModelSettings
    transformer: Any
    """A `Lyra2Transformer3DModel`, or anything that is called like one and has its configuration."""
    layout: FramePackLayout
    autoencoder: StreamingAutoencoder
    encode_text: Callable[[Sequence[str]], Tensor]
    """Texts to embeddings; the negative prompt is the model's own."""
    negative_text: Float[Tensor, "1 l e"]
    encode_image: Callable[[Tensor], Tensor]
    """An image (1, 3, h, w) at generation size to image tokens."""
    depth: WalkDepth
    blend: Blend | None
    """Present where the settings keep seen pixels."""
    use_sampler: Callable[[str, Mapping[str, float]], None]
    """Puts the weights of `dmd` or `full` in place, with further LoRAs by path and strength."""
    release: Callable[[], None] = lambda: None
    """Lets the transformer leave the device after denoising, where others need the room."""
    attention: str = "native"
    """Which of diffusers' attention backends the transformer uses."""
    waiting_caches: torch.device | None = None
    """Where the autoencoder's caches are between chunks; where they are made, when None."""


@dataclass(frozen=True)
class Walk:
    """What one run of the loop works on; all tensors are on the device of the run."""

    photo: Float[Tensor, "3 h2 w2"]
    """At output size, in [-1, 1]."""
    photo_depth: Float[Tensor, "h w"]
    """At generation size."""
    cameras: Cameras
    """The whole path at output size."""
    generation_size: tuple[int, int]
    """Height and width at which the network works."""


@dataclass(frozen=True)
class FinishedChunk:
    """The output of one step of the loop."""

    frames: UInt8[Tensor, "80 3 h2 w2"]
    """New frames at output size."""
    record: ChunkRecord


def start(parts: Components, walk: Walk) -> WalkState:
    """Encode the repeated photo, prime both caches with it and remember it (released code)."""
    image = resize(walk.photo[None], walk.generation_size)[0]
    cameras = walk.cameras.resized(*walk.generation_size)
    encoder_cache: dict = {}
    decoder_cache: dict = {}
    history = encode_repeated(parts.autoencoder, image[None], seed_repetitions(parts.layout), encoder_cache)
    prime_decoder(parts.autoencoder, history, decoder_cache)
    waiting = parts.waiting_caches or image.device
    memory = SpatialCache()
    memory.write(0, walk.photo_depth, cameras.w2c[0], cameras.intrinsics[0])
    return WalkState(
        cameras=cameras,
        history=history,
        encoder_cache=cache_to(encoder_cache, waiting),
        decoder_cache=cache_to(decoder_cache, waiting),
        memory=memory,
        images={0: image},
        pixels={0: to_uint8(walk.photo)},
        buffer_depth=walk.photo_depth,
        memory_stride=parts.settings.spatial_memory_stride,
        depths={0: walk.photo_depth},
    )


@torch.no_grad()
def generate_chunk(
    parts: Components, walk: Walk, state: WalkState, job: GenerateJob, prompt: str, seed: int, progress: Progress
) -> FinishedChunk:
    """One step of the loop: 80 new frames from the state, which is not changed."""
    first = state.finished_frames + 1
    targets = state.cameras[first : first + CHUNK_FRAMES]

    progress.enter("Retrieve")
    retrieved = retrieve(state, targets, job.memory, job.retrieval_views)
    seen = None
    if parts.settings.keep_seen_pixels:
        seen = draw_memory(walk, state, retrieved, with_photo=job.memory != "none")

    progress.enter("Correspond")
    inputs = correspond(parts, walk, state, retrieved, seen)

    progress.enter("Denoise")
    latents = denoise(parts, state, inputs, job, prompt, seed, progress)

    progress.enter("Decode")
    at_work = torch.device("cpu") if getattr(parts.autoencoder, "caches_on_host", False) else latents.device
    decoder_cache = cache_to(state.decoder_cache, at_work)
    frames = decode_video(parts.autoencoder, latents, decoder_cache)[0].transpose(0, 1)
    if seen is not None and parts.blend is not None:
        frames = keep_seen_pixels(parts.blend, frames, seen, progress)
    frames = resize(frames, (walk.photo.shape[-2], walk.photo.shape[-1]))

    progress.enter("Measure depth")
    small = resize(frames, walk.generation_size)
    measured = measured_frames(parts.settings)
    seen_depth = [resize_depth(seen[i].depth, walk.generation_size) for i in measured] if seen is not None else None
    depth = parts.depth.measure(small[measured], targets[measured], stack_or_unknown(seen_depth, small[measured]))

    progress.enter("Remember")
    encoder_cache = cache_to(state.encoder_cache, at_work)
    pixels = to_uint8(frames).cpu()
    record = ChunkRecord(
        latents=encode_video(parts.autoencoder, small.transpose(0, 1)[None], encoder_cache),
        measured_ids=torch.tensor([first + i for i in measured]),
        depth=depth,
        images=small[measured],
        pixels=pixels[measured],
        retrieved_ids=torch.tensor([frame.frame_id for frame in retrieved], dtype=torch.int64),
        encoder_cache=cache_to(encoder_cache, parts.waiting_caches or latents.device),
        decoder_cache=cache_to(decoder_cache, parts.waiting_caches or latents.device),
    )
    progress.finish()
    return FinishedChunk(pixels, record)


def retrieve(state: WalkState, targets: Cameras, strategy: str, scored_views: int = 1) -> list[MemoryFrame]:
    """Remembered frames for the new cameras, worst first; the strategy `none` remembers nothing."""
    if strategy == "none":
        return []
    height, width = targets.image_height, targets.image_width
    views = [View(w, k, height, width) for w, k in zip(targets.w2c, targets.intrinsics, strict=True)]
    return [state.memory.read(i) for i in greedy_coverage(state.memory.frames, chunk_views(views, scored_views))]


def draw_memory(walk: Walk, state: WalkState, retrieved: Sequence[MemoryFrame], *, with_photo: bool) -> list[SeenView]:
    """The new views as far as the photo, the retrieved frames and the newest frame show them, at output size."""
    newest, first = state.finished_frames, state.finished_frames + 1
    order = [0] if with_photo else []
    order += [frame.frame_id for frame in reversed(retrieved) if frame.frame_id != 0]
    order += [newest] if newest not in order else []
    # Surfaces are drawn by compiled kernels on the CPU, wherever the networks run.
    cameras, device = walk.cameras.to(torch.device("cpu")), walk.photo.device
    frames = [
        remember_pixels(from_uint8(state.pixels[i].cpu()), state.depths[i].cpu(), cameras.w2c[i], cameras.intrinsics[i])
        for i in order
    ]
    views = draw_seen(frames, cameras[first : first + CHUNK_FRAMES])
    return [SeenView(v.image.to(device), v.seen.to(device), v.depth.to(device)) for v in views]


def correspond(
    parts: Components, walk: Walk, state: WalkState, retrieved: Sequence[MemoryFrame], seen: list[SeenView] | None
) -> ChunkInputs:
    """Warp the newest frame and the retrieved frames' coordinates into the new views, and fill the slots."""
    first = state.finished_frames + 1
    cameras = state.cameras[: first + CHUNK_FRAMES]
    if seen is None:
        newest = state.images[state.finished_frames]
        targets, last = cameras[first:], cameras[first - 1]
        warped = forward_warp(
            newest.float(),
            state.buffer_depth,
            last.w2c[0],
            last.intrinsics[0],
            targets.w2c,
            targets.intrinsics,
            group=parts.settings.warp_group,
        )
        frames, where = warped.values, warped.covered
    else:
        frames = resize(torch.stack([view.image for view in seen]), walk.generation_size)
        share = torch.stack([view.seen for view in seen]).float()
        share = resize(share[:, None], walk.generation_size)
        where = share[:, 0] > 0.5
        frames = torch.where(where[:, None], frames / share.clamp(min=0.5), torch.full_like(frames, -1.0))
    if parts.settings.fill_holes:
        frames = fill_unseen(frames, where)
    warp_latents = encode_warp(parts.autoencoder, frames.transpose(0, 1)[None].to(state.history.dtype))
    scene = ChunkScene(cameras, CHUNK_FRAMES, retrieved, state.memory.read(0))
    spatial = [state.images[frame.frame_id] for frame in slot_memory(scene, parts.layout)]
    mask = visibility_channels(where, *warp_latents.shape[-2:]) if parts.settings.visibility_mask else None
    return build_inputs(
        scene,
        parts.layout,
        history_latents=state.history,
        spatial_latents=encode_stills(parts.autoencoder, spatial),
        warp_latents=warp_latents,
        target_mask=mask,
        stride=parts.autoencoder.spatial_stride,
        cell_samples=samples_per_cell(parts.transformer.config.camera_channels),
        warp_group=parts.settings.warp_group,
    )


def denoise(
    parts: Components,
    state: WalkState,
    inputs: ChunkInputs,
    job: GenerateJob,
    prompt: str,
    seed: int,
    progress: Progress,
) -> Float[Tensor, "1 z g h w"]:
    """Sample the latents of the new frames."""
    parts.use_sampler(job.sampler, job.lora_strengths())
    # One number format for all steps: that of the latents.
    inputs = inputs.to(state.history.dtype)
    text = parts.encode_text([prompt])
    image = parts.encode_image(state.images[state.finished_frames][None])

    cache = ChunkCache()

    def velocity(embedding: Tensor) -> Callable[[Tensor, float], Tensor]:
        def of(noisy: Tensor, timestep: float) -> Tensor:
            return parts.transformer(
                hidden_states=torch.cat([inputs.history.float(), noisy], dim=2),
                mask=inputs.mask,
                conditioning=inputs.conditioning,
                rays=inputs.rays,
                correspondence=inputs.correspondence,
                text=embedding,
                image=image,
                timestep=torch.tensor([timestep], device=noisy.device),
                cache=cache,
            ).float()

        return of

    shape = list(inputs.history.shape)
    shape[2] = parts.layout.targets.count
    noise = initial_noise(seed, tuple(shape)).to(state.history.device)
    try:
        with attention_backend(parts.attention), fastest_attention():
            if job.sampler == "dmd":
                latents = sample_dmd(
                    velocity(text),
                    noise,
                    flow_shift=parts.settings.flow_shift,
                    history_slots=parts.layout.history_slots,
                    generator=torch.Generator().manual_seed(seed),
                    callback_on_step_end=progress.step,
                )
            else:
                latents = sample_full(
                    velocity(text),
                    velocity(parts.negative_text),
                    noise,
                    num_inference_steps=job.steps,
                    guidance_scale=job.guidance(parts.settings),
                    flow_shift=parts.settings.flow_shift,
                    callback_on_step_end=progress.step,
                )
    finally:
        # Also after a cancel, because others need the room.
        parts.release()
    return latents.to(state.history.dtype)


def keep_seen_pixels(
    blend: Blend, generated: Float[Tensor, "n 3 h w"], seen: list[SeenView], progress: Progress
) -> Float[Tensor, "n 3 h2 w2"]:
    """Generated frames at output size, with what memory sees kept as it is."""
    progress.enter("Keep seen pixels")
    size = seen[0].seen.shape
    images, where = torch.stack([v.image for v in seen]), torch.stack([v.seen for v in seen]).float()
    return blend(resize(generated, (size[0], size[1])), images, where, progress.step)


def measured_frames(settings: ModelSettings) -> list[int]:
    """Offsets in the chunk of the frames whose depth is measured, ascending; the last frame is always one."""
    last = CHUNK_FRAMES - 1
    return sorted(last - i * settings.depth_interval for i in range(settings.depth_frames))


def stack_or_unknown(depths: list[Tensor] | None, images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n h w"]:
    """Seen depth of each image; infinite everywhere when memory was not drawn."""
    if depths is None:
        return torch.full((len(images), *images.shape[-2:]), torch.inf, device=images.device)
    return torch.stack(depths)


def resize(images: Float[Tensor, "n c h w"], size: tuple[int, int]) -> Float[Tensor, "n c h2 w2"]:
    """Stretch images to a size; the same size returns them unchanged."""
    if tuple(images.shape[-2:]) == tuple(size):
        return images
    smaller = size[0] < images.shape[-2]
    return F.interpolate(images, size, mode="bilinear" if smaller else "bicubic", antialias=smaller)


def resize_depth(depth: Float[Tensor, "h w"], size: tuple[int, int]) -> Float[Tensor, "h2 w2"]:
    """Nearest samples, because depth (and infinity) must not be averaged over edges."""
    return F.interpolate(depth[None, None], size, mode="nearest-exact")[0, 0]


def to_uint8(images: Float[Tensor, "*batch"]) -> UInt8[Tensor, "*batch"]:
    """[-1, 1] to bytes, rounded."""
    return ((images.float().clamp(-1, 1) * 0.5 + 0.5) * 255 + 0.5).to(torch.uint8)


def from_uint8(pixels: UInt8[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    """Bytes to [-1, 1]."""
    return pixels.float() / 127.5 - 1
