"""What the network's own mistakes do to a clip: targets estimated in one step, decoded, and put back as history.

A self-augmented step trains on the segment after the estimated one (paper section 4.3; released code). Depth, cameras
and targets stay the clip's own. Knows no network: it gets the estimate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from lyra.diffusion.schedulers import TRAIN_TIMESTEPS
from lyra.models.streaming import copy_cache, decode_video
from lyra.training.released_batch import StepParts, TrainingSegment, encode_frames, window_frames


def augmentation_index(time_index: int, sigmas: Float[Tensor, "n"], longest: int) -> int:
    """Index of the noise level at which the targets are estimated (released code).

    The drawn time is scaled to 0..`longest` of 1000, cut to an integer of at least 1 and moved to the nearest one of
    the grid.
    """
    times = sigmas * TRAIN_TIMESTEPS
    wanted = (times[time_index] * (longest / TRAIN_TIMESTEPS)).floor().clamp(min=1)
    return int((times - wanted).abs().argmin())


@torch.no_grad()
def degrade(segment: TrainingSegment, parts: StepParts, estimate: Float[Tensor, "1 z g h w"]) -> TrainingSegment:
    """The segment after an estimated one, as the network would meet it in generation.

    The whole history is decoded with the estimate, from an empty cache, and the frames of all latents but one that the
    network sees (176) replace the last ones that the window shows. Older latents stay; the estimated segment is encoded
    again from the cache before it, the targets from the undisturbed cache after it.
    """
    latents = torch.cat([segment.history, estimate.to(parts.dtype)], dim=2)
    video = decode_video(parts.autoencoder, latents, {})[0].transpose(0, 1)
    frames = video[-(parts.layout.slots - 1) * parts.autoencoder.temporal_stride :]
    shown = window_frames(segment.clip, parts, segment.number)
    clip = replace(segment.clip, video=paste_frames(segment.clip.video, frames, shown))
    window = window_frames(clip, parts, segment.number + 1)
    before, after = copy_cache(segment.cache_before), copy_cache(segment.cache_after)
    previous = encode_frames(clip, parts, window[-2 * parts.new_frames : -parts.new_frames], before)
    targets = encode_frames(clip, parts, window[-parts.new_frames :], after)
    history = torch.cat([segment.history, previous], dim=2)
    return TrainingSegment(clip, segment.number + 1, history, targets, before, after)


def paste_frames(
    video: Float[Tensor, "t 3 h w"], frames: Float[Tensor, "n 3 h w"], window: Sequence[int]
) -> Float[Tensor, "t 3 h w"]:
    """A copy of a video in which decoded frames, clamped to [-1, 1], replace those that a window shows.

    Windows and frames are aligned at their ends. When the window is the shorter, the earliest decoded frames have no
    place and are left out; the released code cuts its batch axis there instead of its frames. A frame that the window
    repeats gets the last of its decoded ones.
    """
    shown = [frame for frame in window if frame < len(video)]
    count = min(len(shown), len(frames))
    source = dict(zip(shown[len(shown) - count :], range(len(frames) - count, len(frames)), strict=True))
    result = video.clone()
    result[list(source)] = frames[list(source.values())].clamp(-1, 1).to(video.dtype)
    return result
