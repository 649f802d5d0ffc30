"""One training step of the video transformer: what the network is told, its answer and the loss (released code).

Three kinds of step: plain, image-to-video (first segment, only the first frame remembered) and self-augmented (a
second call on a history that a first one degraded). Knows no optimiser and draws nothing; all chance is in
`lyra.training.released_batch.draw_choices`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from lyra.diffusion.schedulers import TRAIN_TIMESTEPS, training_sigmas, training_weights
from lyra.generation.conditioning import (
    ChunkInputs,
    ChunkScene,
    build_inputs,
    encode_stills,
    encode_warp,
    slot_memory,
)
from lyra.geometry.warp import forward_warp
from lyra.memory.history import seed_repetitions
from lyra.models.framepack import FramePackLayout
from lyra.training.released_batch import (
    CallChoices,
    StepChoices,
    StepParts,
    TrainingClip,
    TrainingSegment,
    encode_segment,
    memory_frame,
    segment_text,
    window_frames,
)
from lyra.training.self_augmentation import augmentation_index, degrade


@dataclass(frozen=True)
class NetworkCall:
    """What the network was told in one call, and what it said."""

    hidden_states: Float[Tensor, "1 z s h w"]
    """History latents, then noisy targets."""
    mask: Float[Tensor, "1 4 s h w"]
    conditioning: Float[Tensor, "1 z s h w"]
    rays: Float[Tensor, "1 r s h w"]
    correspondence: Float[Tensor, "1 c s h w"]
    text: Float[Tensor, "1 l e"]
    image: Float[Tensor, "1 m f"]
    timestep: Float[Tensor, "1"]
    """In 0..1000."""
    output: Float[Tensor, "1 z g h w"]
    """Velocity (noise - data) of the targets."""


@dataclass(frozen=True)
class StepResult:
    """The outcome of a step."""

    loss: Float[Tensor, ""]
    calls: tuple[NetworkCall, ...]
    """One, or two in a self-augmented step; the loss is that of the last."""
    target: Float[Tensor, "1 z g h w"]
    """The velocity that the last call should have said."""


def training_step(parts: StepParts, clip: TrainingClip, choices: StepChoices) -> StepResult:
    """The loss of one step; only the last call of the network keeps its gradients.

    x_t = sigma noise + (1 - sigma) data on the targets alone, and the loss is w(t) times the mean squared error of the
    velocity.
    """
    segment = encode_segment(clip, parts, choices.segment)
    calls: tuple[NetworkCall, ...] = ()
    if choices.first_call is not None:
        segment, first = self_augment(parts, segment, choices.first_call)
        calls = (first,)
    sigmas, index = training_sigmas(parts.settings.flow_shift), choices.call.time_index
    sigma, noise = float(sigmas[index]), choices.call.noise.to(parts.dtype)
    text = segment_text(segment.clip, parts, segment.number, dropped=choices.text_dropped)
    noisy = noisy_targets(segment.targets, noise, sigma)
    call = call_network(parts, segment, choices.call, noisy, text, sigma * TRAIN_TIMESTEPS)
    target = (noise - segment.targets).to(call.output.dtype)
    loss = float(training_weights(sigmas)[index]) * (call.output - target).pow(2).mean()
    return StepResult(loss, (*calls, call), target)


@torch.no_grad()
def self_augment(
    parts: StepParts, segment: TrainingSegment, choices: CallChoices
) -> tuple[TrainingSegment, NetworkCall]:
    """The first call of a self-augmented step, and the next segment with what came of it as history.

    The targets are noised to a level of the training grid, the network is told that time's integer part, as by the
    sampler, and one step to 0 without guidance gives the estimate. The caption is never dropped here (released code).
    """
    sigmas = training_sigmas(parts.settings.flow_shift)
    index = augmentation_index(choices.time_index, sigmas, parts.settings.longest_augmentation_time)
    sigma = float(sigmas[index])
    noisy = noisy_targets(segment.targets, choices.noise, sigma)
    text = segment_text(segment.clip, parts, segment.number, dropped=False)
    call = call_network(parts, segment, choices, noisy, text, float(int(sigma * TRAIN_TIMESTEPS)))
    return degrade(segment, parts, noisy - sigma * call.output.float()), call


def noisy_targets(
    clean: Float[Tensor, "1 z g h w"], noise: Float[Tensor, "1 z g h w"], sigma: float
) -> Float[Tensor, "1 z g h w"]:
    """Targets on the straight path between data (sigma 0) and noise (sigma 1), in float32."""
    return noise.float() * sigma + clean.float() * (1 - sigma)


def call_network(
    parts: StepParts,
    segment: TrainingSegment,
    choices: CallChoices,
    noisy: Float[Tensor, "1 z g h w"],
    text: Float[Tensor, "1 l e"],
    time: float,
) -> NetworkCall:
    """Tell the network everything about a segment and ask for the velocity of its noisy targets."""
    inputs = call_inputs(parts, segment, choices)
    told = {
        "hidden_states": torch.cat([inputs.history.float(), noisy], dim=2),
        "mask": inputs.mask,
        "conditioning": inputs.conditioning,
        "rays": inputs.rays,
        "correspondence": inputs.correspondence,
        "text": text,
        "image": newest_image(parts, segment),
    }
    told = {name: tensor.to(noisy.device, parts.dtype) for name, tensor in told.items()}
    told["timestep"] = torch.tensor([time], dtype=torch.float32, device=noisy.device)
    return NetworkCall(**told, output=parts.transformer(**told))


@torch.no_grad()
def call_inputs(parts: StepParts, segment: TrainingSegment, choices: CallChoices) -> ChunkInputs:
    """What the network is told, as in generation, but with noise on the remembered frames' latents."""
    clip, window = segment.clip, window_frames(segment.clip, parts, segment.number)
    cameras = clip.cameras[window[seed_repetitions(parts.layout) - 1 :]]
    last, targets = cameras[-parts.new_frames - 1 : -parts.new_frames], cameras[-parts.new_frames :]
    newest = window[-parts.new_frames - 1]
    warped = forward_warp(
        clip.video[newest].to(parts.dtype).float(),
        clip.depth[newest],
        last.w2c[0],
        last.intrinsics[0],
        targets.w2c,
        targets.intrinsics,
        group=parts.settings.warp_group,
    )
    remembered = [memory_frame(clip, frame) for frame in choices.memory]
    scene = ChunkScene(cameras, parts.new_frames, remembered, memory_frame(clip, 0))
    slots = [frame.frame_id for frame in slot_memory(scene, parts.layout)]
    stills = {frame: clip.video[frame].to(parts.dtype) for frame in slots}
    inputs = build_inputs(
        scene,
        parts.layout,
        history_latents=segment.history,
        spatial_latents=encode_stills(parts.autoencoder, [stills[frame] for frame in slots]),
        warp_latents=encode_warp(parts.autoencoder, warped.values.transpose(0, 1)[None].to(parts.dtype)),
        target_mask=None,
        stride=parts.autoencoder.spatial_stride,
        cell_samples=parts.settings.cell_samples,
        warp_group=parts.settings.warp_group,
    )
    return with_history_noise(inputs, parts.layout, choices)


def with_history_noise(inputs: ChunkInputs, layout: FramePackLayout, choices: CallChoices) -> ChunkInputs:
    """Add the drawn noise to the latents of the spatial slots, the same in state and conditioning (released code)."""
    slots, dtype = list(layout.spatial_slots), inputs.history.dtype
    added = choices.history_noise.to(dtype) * choices.history_sigmas.to(dtype).view(1, 1, -1, 1, 1)
    history, conditioning = inputs.history.clone(), inputs.conditioning.clone()
    history[:, :, slots] += added
    conditioning[:, :, slots] = history[:, :, slots]
    return replace(inputs, history=history, conditioning=conditioning)


@torch.no_grad()
def newest_image(parts: StepParts, segment: TrainingSegment) -> Float[Tensor, "1 m f"]:
    """Image tokens of the frame before the targets."""
    frame = window_frames(segment.clip, parts, segment.number)[-parts.new_frames - 1]
    return parts.encode_image(segment.clip.video[frame : frame + 1].to(parts.dtype))
