"""Which part of a clip a training step sees, what is drawn for it, and the latents of that part (released code).

All chance is in `draw_choices`; everything after it is a function of the clip and of the choices. Knows neither what
the network is told nor the loss: `lyra.training.released_step` does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lyra.diffusion.schedulers import TRAIN_TIMESTEPS
from lyra.errors import UserError
from lyra.memory.history import seed_repetitions
from lyra.memory.retrieval import View, owned_pixels
from lyra.memory.spatial_cache import MemoryFrame, sparse_points
from lyra.models.framepack import FramePackLayout
from lyra.models.streaming import Cache, StreamingAutoencoder, copy_cache, encode_repeated, encode_video
from lyra.types import Cameras

StepKind = Literal["plain", "image-to-video", "self-augmented"]


@dataclass(frozen=True)
class TrainingClip:
    """A video with all that is known about it."""

    video: Float[Tensor, "t 3 h w"]
    """In [-1, 1]."""
    cameras: Cameras
    depth: Float[Tensor, "t h w"]
    """z depth in the units of the cameras."""
    chunk_keys: Int[Tensor, "k"]
    """Ascending frame numbers from which the captions hold (`t5_chunk_keys`)."""
    chunk_text: Float[Tensor, "k l e"]
    """Embeddings of the captions (`t5_chunk_embeddings`)."""
    empty_text: Float[Tensor, "1 l e"]
    """Takes the place of a dropped caption: the negative prompt (released code)."""
    frame_numbers: Int[Tensor, "t"] | None = None
    """Number of each frame as `chunk_keys` counts them (`sample_frame_indices`); None counts the clip's own frames."""

    def __post_init__(self) -> None:
        counts = {"frames": len(self.video), "cameras": len(self.cameras), "depth maps": len(self.depth)}
        if self.frame_numbers is not None:
            counts["frame numbers"] = len(self.frame_numbers)
        if len(set(counts.values())) > 1:
            listed = ", ".join(f"{count} {name}" for name, count in counts.items())
            raise UserError(f"the training clip has {listed}; give it as many of one as of the others")
        if len(self.chunk_keys) != len(self.chunk_text) or len(self.chunk_keys) == 0:
            raise UserError(
                f"the training clip has {len(self.chunk_keys)} caption starts for {len(self.chunk_text)} captions; "
                "give it one start for each caption, and at least one caption"
            )

    def __len__(self) -> int:
        return len(self.video)

    def text_at(self, frame: int) -> Float[Tensor, "1 l e"]:
        """The caption that holds at a frame of the clip; before the first caption that is the first."""
        number = frame if self.frame_numbers is None else int(self.frame_numbers[frame])
        index = max(int((self.chunk_keys <= number).sum()) - 1, 0)
        return self.chunk_text[index : index + 1]


@dataclass(frozen=True)
class StepSettings:
    """The constants of a training step; the defaults are the released code's."""

    flow_shift: float = 5.0
    """Of the training time grid."""
    most_segments: int = 13
    self_augment_every: int = 2
    """Steps whose number divides by this are self-augmented or image-to-video."""
    image_to_video_share: float = 0.3
    """Share of image-to-video steps among these."""
    longest_augmentation_time: int = 500
    """Upper end of the times of the first call of a self-augmented step, of 1000."""
    memory_stride: int = 8
    """Frames whose number in the clip divides by this may be remembered."""
    memory_gap: int = 16
    """Frames before and after the targets that are not remembered."""
    memory_floor: float = 0.02
    """Share of the best candidate's score that every candidate gets on top of its own."""
    memory_dropout: float = 0.1
    text_dropout: float = 0.2
    history_noise_log_mean: float = -3.0
    history_noise_log_std: float = 2.0
    """Of the logarithm of the noise level on the remembered frames' latents."""
    warp_group: int = 16
    latent_channels: int = 16
    cell_samples: int = 8
    """Samples a side with which rays and coordinates are folded to latent cells."""


@dataclass(frozen=True)
class StepParts:
    """The networks of a training step."""

    transformer: Callable[..., Tensor]
    """A `Lyra2Transformer3DModel`, or anything that is called like one."""
    layout: FramePackLayout
    autoencoder: StreamingAutoencoder
    encode_image: Callable[[Tensor], Tensor]
    """An image (1, 3, h, w) to image tokens."""
    settings: StepSettings = StepSettings()
    dtype: torch.dtype = torch.float32
    """Of the pixels, the latents and the transformer's inputs (released: bfloat16)."""

    @property
    def new_frames(self) -> int:
        """Frames of one segment (released: 80)."""
        return self.layout.targets.count * self.autoencoder.temporal_stride


@dataclass(frozen=True)
class CallChoices:
    """What is drawn for one call of the network."""

    memory_drawn: tuple[int, ...]
    """Frames of the clip drawn from the candidates, in slot order: the one drawn first is last."""
    memory_dropped: tuple[int, ...]
    """Those of them that are left out again."""
    history_sigmas: Float[Tensor, "s"]
    """Noise levels of the spatial slots."""
    history_noise: Float[Tensor, "1 z s h w"]
    time_index: int
    """Index into the descending grid of 1000 training times; 0 is pure noise."""
    noise: Float[Tensor, "1 z g h w"]
    """Of the target latents."""

    @property
    def memory(self) -> list[int]:
        """The frames that stay, in slot order."""
        return [frame for frame in self.memory_drawn if frame not in self.memory_dropped]


@dataclass(frozen=True)
class StepChoices:
    """Everything that is drawn for a training step."""

    kind: StepKind
    segment: int
    """The targets are the frames 80 segment + 1 to 80 (segment + 1); a self-augmented step trains on the next ones."""
    call: CallChoices
    """Of the call that has a loss."""
    text_dropped: bool
    first_call: CallChoices | None = None
    """Of the call that degrades the history; in self-augmented steps only."""

    def __post_init__(self) -> None:
        if (self.kind == "self-augmented") != (self.first_call is not None):
            raise ValueError("a self-augmented step has choices for a first call, the other steps have none")


def step_kind(iteration: int, share: float, settings: StepSettings) -> StepKind:
    """Kind of a step; `share` is uniform in [0, 1] and the same on all machines."""
    if iteration % settings.self_augment_every:
        return "plain"
    return "self-augmented" if share > settings.image_to_video_share else "image-to-video"


def draw_choices(clip: TrainingClip, parts: StepParts, iteration: int, generator: torch.Generator) -> StepChoices:
    """Draw everything that is random in a step.

    Segments are uniform over those that leave another one after them, because any may become self-augmented.
    """
    settings = parts.settings
    kind = step_kind(iteration, float(uniform(generator)), settings)
    count = (len(clip) - 1) // parts.new_frames - 1
    segment = int(integer(max(1, min(count, settings.most_segments)), generator))
    if kind == "image-to-video":
        return StepChoices(kind, 0, draw_call(clip, parts, 0, [0], generator), draw_text_dropout(settings, generator))
    first, trained = None, segment
    if kind == "self-augmented":
        first, trained = (
            draw_call(clip, parts, segment, memory_candidates(clip, parts, segment), generator),
            segment + 1,
        )
    call = draw_call(clip, parts, trained, memory_candidates(clip, parts, trained), generator)
    return StepChoices(kind, segment, call, draw_text_dropout(settings, generator), first)


def draw_text_dropout(settings: StepSettings, generator: torch.Generator) -> bool:
    """Whether the caption is replaced by the empty one."""
    return float(uniform(generator)) < settings.text_dropout


def draw_call(
    clip: TrainingClip, parts: StepParts, segment: int, candidates: Sequence[int], generator: torch.Generator
) -> CallChoices:
    """Draw memory, noise and time of one call.

    Times are logit-normal: the index is floor(1000 sigmoid(n)) into the descending grid, so small draws are high noise.
    """
    settings, layout = parts.settings, parts.layout
    drawn, dropped = draw_memory(clip, parts, segment, candidates, generator)
    stride = parts.autoencoder.spatial_stride
    height, width = (size // stride for size in clip.video.shape[-2:])
    slots = len(layout.spatial_slots)
    log_sigmas = normal((slots,), generator) * settings.history_noise_log_std + settings.history_noise_log_mean
    history_noise = normal((1, settings.latent_channels, slots, height, width), generator)
    share = float(torch.sigmoid(normal((1,), generator)))
    noise = normal((1, settings.latent_channels, layout.targets.count, height, width), generator)
    device = clip.video.device
    return CallChoices(
        memory_drawn=drawn,
        memory_dropped=dropped,
        history_sigmas=log_sigmas.exp().to(device),
        history_noise=history_noise.to(device),
        time_index=min(int(share * TRAIN_TIMESTEPS), TRAIN_TIMESTEPS - 1),
        noise=noise.to(device),
    )


def memory_candidates(clip: TrainingClip, parts: StepParts, segment: int) -> list[int]:
    """Frames that may be remembered, future ones too: every eighth, not the first, not near the targets."""
    settings = parts.settings
    window = window_frames(clip, parts, segment)
    first, last, buffer = window[-parts.new_frames], window[-1], window[-parts.new_frames - 1]
    near = range(first - settings.memory_gap, last + settings.memory_gap + 1)
    remembered = range(settings.memory_stride, len(clip), settings.memory_stride)
    return [frame for frame in remembered if frame not in near and frame != buffer]


def draw_memory(
    clip: TrainingClip, parts: StepParts, segment: int, candidates: Sequence[int], generator: torch.Generator
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Frames drawn from the candidates, and those dropped again, both in slot order.

    Without replacement, weighted by the pixels of the last target view that a candidate owns, plus a floor.
    """
    weights = memory_weights(clip, parts, segment, candidates)
    if not bool((weights > 0).any()):
        return (), ()
    slots = min(len(parts.layout.spatial_slots), len(candidates))
    order = torch.multinomial(weights.to(generator.device), slots, replacement=False, generator=generator)
    drawn = tuple(candidates[index] for index in reversed(order.tolist()))
    if float(uniform(generator)) >= parts.settings.memory_dropout:
        return drawn, ()
    count = 1 + int(integer(len(drawn), generator))
    gone = torch.randperm(len(drawn), generator=generator, device=generator.device)[:count].tolist()
    return drawn, tuple(drawn[index] for index in sorted(gone))


def memory_weights(clip: TrainingClip, parts: StepParts, segment: int, candidates: Sequence[int]) -> Float[Tensor, "n"]:
    """Weights with which the candidates are drawn; all 0 when none of them is seen by the last target view."""
    if not candidates:
        return torch.zeros(0)
    last = clip.cameras[window_frames(clip, parts, segment)[-1]]
    view = View(last.w2c[0], last.intrinsics[0], last.image_height, last.image_width)
    score = owned_pixels([memory_frame(clip, frame) for frame in candidates], [view]).float()
    return score + score.max() * parts.settings.memory_floor


def memory_frame(clip: TrainingClip, frame: int) -> MemoryFrame:
    """A frame of the clip as it would be remembered, with the clip's own depth."""
    depth, w2c, intrinsics = clip.depth[frame], clip.cameras.w2c[frame], clip.cameras.intrinsics[frame]
    return MemoryFrame(frame, depth, w2c, intrinsics, sparse_points(depth, w2c, intrinsics))


def uniform(generator: torch.Generator) -> Float[Tensor, "1"]:
    """One number in [0, 1)."""
    return torch.rand(1, generator=generator, device=generator.device)


def integer(count: int, generator: torch.Generator) -> Int[Tensor, "1"]:
    """One of 0 to count - 1."""
    return torch.randint(count, (1,), generator=generator, device=generator.device)


def normal(shape: tuple[int, ...], generator: torch.Generator) -> Float[Tensor, "*shape"]:
    """Standard normal numbers."""
    return torch.randn(shape, generator=generator, device=generator.device)


def window_frames(clip: TrainingClip, parts: StepParts, segment: int) -> list[int]:
    """Frames of the clip that a segment's window shows: the first one 97 times, then all up to the last target.

    A clip that is too short repeats its last frame.
    """
    length = parts.new_frames * (segment + 1) + 1
    return [0] * (seed_repetitions(parts.layout) - 1) + [min(frame, len(clip) - 1) for frame in range(length)]


def segment_text(clip: TrainingClip, parts: StepParts, segment: int, *, dropped: bool) -> Float[Tensor, "1 l e"]:
    """Caption of the first target frame, or the empty one."""
    return clip.empty_text if dropped else clip.text_at(window_frames(clip, parts, segment)[-parts.new_frames])


@dataclass(frozen=True)
class TrainingSegment:
    """A segment of a clip with the latents of its window."""

    clip: TrainingClip
    number: int
    history: Float[Tensor, "1 z n h w"]
    targets: Float[Tensor, "1 z g h w"]
    cache_before: Cache
    """What the encoder remembers before the targets."""
    cache_after: Cache
    """And after them."""


@torch.no_grad()
def encode_segment(clip: TrainingClip, parts: StepParts, number: int) -> TrainingSegment:
    """Encode a segment's window as one video."""
    window = window_frames(clip, parts, number)
    repeated = seed_repetitions(parts.layout)
    cache: Cache = {}
    latents = [encode_repeated(parts.autoencoder, clip.video[:1].to(parts.dtype), repeated, cache)]
    if number > 0:
        latents.append(encode_frames(clip, parts, window[repeated : -parts.new_frames], cache))
    before = copy_cache(cache)
    targets = encode_frames(clip, parts, window[-parts.new_frames :], cache)
    return TrainingSegment(clip, number, torch.cat(latents, dim=2), targets, before, cache)


def encode_frames(
    clip: TrainingClip, parts: StepParts, frames: Sequence[int], cache: Cache
) -> Float[Tensor, "1 z n h w"]:
    """Latents of frames of the clip, going on from a cache, which is carried on."""
    video = clip.video[list(frames)].to(parts.dtype)
    return encode_video(parts.autoencoder, video.transpose(0, 1)[None], cache)
