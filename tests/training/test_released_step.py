"""The training step against the released code's run, number for number, and the truths of its other two kinds.

The golden file stores one plain step: what the network was told and said, and the loss. Four things were worked out
from it once and stand here as constants: seed and length of the noise behind the video (from the stored pixels), the
segment (from the rays), and how many numbers the run had taken from torch's generator, seeded with 5 like numpy's,
before the step (by solving for the generator's state from the noise in `call0.x`). Everything else is an independent
check: memory, dropout, time and all noise are drawn again from the seeds, and no compared tensor enters what it is
compared with.
"""

from dataclasses import replace
from statistics import NormalDist

import numpy as np
import pytest
import recipe
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from lyra.diffusion.schedulers import training_sigmas
from lyra.errors import UserError
from lyra.geometry.cameras import ray_maps
from lyra.memory.correspondence import fold_to_cells
from lyra.models.streaming import StreamingWanAutoencoder, copy_cache, decode_video, encode_video
from lyra.training import released_batch as batch
from lyra.training.released_batch import CallChoices, StepChoices, StepParts, StepSettings, TrainingClip, window_frames
from lyra.training.released_step import self_augment, training_step
from lyra.training.self_augmentation import augmentation_index, paste_frames
from lyra.types import Cameras
from tests.conftest import GOLDEN
from tests.models.tiny_released import golden_autoencoder, golden_transformer

VIDEO_SEED, VIDEO_KEYS = 9, 26
SEGMENT = 1
RUN_SEED, NUMBERS_BEFORE = 5, 151_379_147
PASTED = 176


def make_clip(frames: int, height: int, width: int) -> TrainingClip:
    """The golden clip's scene at any length and size: smooth noise seen by a camera that looks at a wavy wall."""
    given = recipe.pipeline_inputs(frames)
    generator = torch.Generator().manual_seed(VIDEO_SEED)
    noise = torch.rand(1, 3, VIDEO_KEYS, 8, 12, generator=generator) * 2 - 1
    video = F.interpolate(noise, size=(frames, height, width), mode="trilinear", align_corners=False)
    cameras = Cameras(given["w2c"], given["K"].expand(frames, 3, 3), 64, 96).resized(height, width)
    pairs = zip(cameras.w2c.numpy(), cameras.intrinsics.numpy(), strict=True)
    depth = torch.stack([torch.from_numpy(recipe.wall_depth(w2c, k, height, width)) for w2c, k in pairs])
    keys = torch.tensor([0, 81])
    return TrainingClip(video[0].transpose(0, 1), cameras, depth, keys, given["chunk_text"][0], given["negative"])


@pytest.fixture(scope="module")
def parts(released_shapes) -> StepParts:
    transformer = golden_transformer(released_shapes)
    autoencoder = StreamingWanAutoencoder(golden_autoencoder())
    return StepParts(transformer, transformer.layout, autoencoder, recipe.stand_in_clip)


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "train_plain.safetensors")


@pytest.fixture(scope="module")
def golden_clip() -> TrainingClip:
    return make_clip(401, 64, 96)


@pytest.fixture(scope="module")
def small_clip() -> TrainingClip:
    """Long enough for four segments."""
    return make_clip(321, 16, 16)


@pytest.fixture(scope="module")
def replayed(golden_clip, parts) -> StepChoices:
    """The released run's draws, in its order."""
    generator = torch.Generator().manual_seed(RUN_SEED)
    for first in range(0, NUMBERS_BEFORE, 1 << 22):
        torch.rand(min(1 << 22, NUMBERS_BEFORE - first), generator=generator)
    candidates = batch.memory_candidates(golden_clip, parts, SEGMENT)
    drawn, dropped = batch.draw_memory(golden_clip, parts, SEGMENT, candidates, generator)
    torch.randn(1, 16, 5, 8, 12, generator=generator)  # Drawn and never used.
    history_noise = torch.randn(1, 16, 5, 8, 12, generator=generator)
    kept = float(torch.rand(1, generator=generator)) < 0.8
    torch.rand(2, generator=generator)  # The dropout of two inputs that are never dropped.
    time = int(1000 * torch.sigmoid(torch.randn(1, generator=generator)))
    noise = torch.randn(1, 16, 20, 8, 12, generator=generator)
    quantiles = np.random.RandomState(RUN_SEED).uniform(size=5)
    sigmas = torch.tensor([NormalDist(-3, 2).inv_cdf(q) for q in quantiles]).exp()
    call = CallChoices(drawn, dropped, sigmas, history_noise, time, noise)
    return StepChoices("plain", SEGMENT, call, text_dropped=not kept)


@pytest.fixture(scope="module")
def golden_step(parts, golden_clip, replayed):
    with torch.no_grad():
        return training_step(parts, golden_clip, replayed)


def difference(golden, name, ours):
    """Largest difference at the stored places; the mean and spread of the whole tensor are compared too."""
    if name in golden:
        assert ours.shape == golden[name].shape
        return (ours - golden[name]).abs().max()
    assert list(ours.shape) == golden[f"{name}@shape"].tolist()
    stats = torch.stack([ours.mean(), ours.std(), ours.abs().max()])
    assert (stats - golden[f"{name}@stats"]).abs().max() < 1e-4
    return (ours.flatten()[golden[f"{name}@index"]] - golden[f"{name}@value"]).abs().max()


def test_the_golden_clip_is_made_again_from_its_seeds(golden, golden_clip):
    assert difference(golden, "in.video", golden_clip.video.transpose(0, 1)[None]) < 1e-6
    assert difference(golden, "in.depth", golden_clip.depth[None, :, None]) < 1e-6
    cameras = golden_clip.cameras
    for name, ours in (
        ("camera_w2c", cameras.w2c),
        ("intrinsics", cameras.intrinsics),
        ("t5_chunk_keys", golden_clip.chunk_keys),
        ("t5_chunk_embeddings", golden_clip.chunk_text),
        ("neg_t5_text_embeddings", golden_clip.empty_text[0]),
    ):
        assert torch.equal(golden[f"in.{name}"][0], ours), name
    assert golden["in.sample_frame_indices"][0].tolist() == list(range(401))


def test_the_released_memory_is_drawn_from_the_released_generator(golden, golden_clip, parts, replayed):
    """Which frames the released step remembered is read off the rays of its spatial slots."""
    index, value = golden["call0.y@index"], golden["call0.y@value"]
    cells = 8 * 12
    channel, slot, cell = index // (45 * cells), index // cells % 45, index % cells
    cameras, newest = golden_clip.cameras, 80 * SEGMENT
    maps = ray_maps(cameras.w2c[newest] @ cameras.c2w, cameras.intrinsics, 64, 96)
    rays = fold_to_cells(maps.movedim(-1, 1), 8, 8).flatten(2)
    seen = []
    for position in parts.layout.spatial_slots:
        here = (slot == position) & (channel >= 20)
        errors = (rays[:, channel[here] - 20, cell[here]] - value[here]).abs().amax(1)
        assert errors.min() < 1e-5
        assert (errors < 1e-4).sum() == 1
        seen.append(int(errors.argmin()))
    assert replayed.call.memory_drawn == tuple(seen)
    assert replayed.call.memory_dropped == ()


def test_every_input_of_the_network_is_the_released_one(golden, golden_step):
    (call,) = golden_step.calls
    y = torch.cat([call.mask, call.conditioning, call.rays], dim=1)
    for name, ours in (("x", call.hidden_states), ("y", y), ("buf", call.correspondence), ("clip", call.image)):
        assert difference(golden, f"call0.{name}", ours) < 1e-4, name
    assert torch.equal(call.text, golden["call0.ctx"])
    assert torch.equal(call.timestep, golden["call0.t"][0])


def test_the_output_and_the_loss_are_the_released_ones(golden, golden_step):
    assert difference(golden, "call0.out", golden_step.calls[0].output) < 1e-4
    assert abs(golden_step.loss - golden["loss"][0]) < 1e-4


def test_candidates_keep_away_from_the_targets_but_reach_into_the_future(small_clip, parts):
    candidates = batch.memory_candidates(small_clip, parts, 1)
    assert candidates == [*range(8, 65, 8), *range(184, 321, 8)]
    # Frame 80 is the one before the targets of segment 1; it stays out even when nothing else near does.
    alone = replace(parts, settings=StepSettings(memory_gap=-100))
    assert 80 not in batch.memory_candidates(small_clip, alone, 1)
    assert 88 in batch.memory_candidates(small_clip, alone, 1)


def test_a_candidate_that_owns_no_pixel_can_still_be_drawn(small_clip, parts):
    weights = batch.memory_weights(small_clip, parts, 1, batch.memory_candidates(small_clip, parts, 1))
    assert weights.max() / weights.min() == pytest.approx(51, rel=1e-3)
    assert (weights > 0).all()
    assert batch.memory_weights(small_clip, parts, 1, []).tolist() == []


def test_draws_repeat_and_stay_in_their_ranges(small_clip, parts):
    kinds, dropped = [], 0
    for iteration in range(20):
        choices = batch.draw_choices(small_clip, parts, iteration, torch.Generator().manual_seed(iteration))
        assert 0 <= choices.segment <= 2
        assert 0 <= choices.call.time_index < 1000
        trained = choices.segment + (choices.kind == "self-augmented")
        candidates = [0] if choices.kind == "image-to-video" else batch.memory_candidates(small_clip, parts, trained)
        assert set(choices.call.memory_drawn) <= set(candidates)
        assert set(choices.call.memory_dropped) <= set(choices.call.memory_drawn)
        assert len(set(choices.call.memory_drawn)) == len(choices.call.memory_drawn) <= 5
        kinds.append(choices.kind)
        dropped += bool(choices.call.memory_dropped)
    assert set(kinds[1::2]) == {"plain"}
    assert set(kinds[::2]) == {"image-to-video", "self-augmented"}
    assert dropped < 10
    again = batch.draw_choices(small_clip, parts, 19, torch.Generator().manual_seed(19))
    assert torch.equal(choices.call.noise, again.call.noise)
    assert choices.call.memory_drawn == again.call.memory_drawn


def test_dropped_memory_keeps_the_order_of_the_rest(small_clip, parts):
    always = replace(parts, settings=StepSettings(memory_dropout=1.0))
    candidates = batch.memory_candidates(small_clip, parts, 1)
    generator = torch.Generator().manual_seed(0)
    counts = set()
    for _ in range(20):
        call = batch.draw_call(small_clip, always, 1, candidates, generator)
        counts.add(len(call.memory_dropped))
        assert len(call.memory) == 5 - len(call.memory_dropped)
        assert call.memory == sorted(call.memory, key=call.memory_drawn.index)
    assert 0 not in counts
    assert {1, 5} <= counts


def test_even_steps_are_self_augmented_or_image_to_video():
    settings = StepSettings()
    assert batch.step_kind(7, 0.9, settings) == "plain"
    assert batch.step_kind(8, 0.31, settings) == "self-augmented"
    assert batch.step_kind(8, 0.3, settings) == "image-to-video"
    with pytest.raises(ValueError, match="self-augmented step has choices for a first call"):
        StepChoices("self-augmented", 0, call_of((), 0), text_dropped=False)


def call_of(memory: tuple[int, ...], time_index: int, seed: int = 0) -> CallChoices:
    """Choices for a call on the small clip."""
    generator = torch.Generator().manual_seed(seed)
    history, noise = (torch.randn(1, 16, n, 2, 2, generator=generator) for n in (5, 20))
    return CallChoices(memory, (), torch.full((5,), 0.1), history, time_index, noise)


@pytest.fixture(scope="module")
def first_chunk(parts, small_clip):
    """An image-to-video step and its choices."""
    choices = StepChoices("image-to-video", 0, call_of((0,), 400), text_dropped=True)
    return choices, training_step(parts, small_clip, choices)


def test_an_image_to_video_step_remembers_only_the_first_frame(parts, small_clip, first_chunk):
    choices, step = first_chunk
    (call,) = step.calls
    still = parts.autoencoder.encode_piece(small_clip.video[0][None, :, None], {})
    spatial, added = list(parts.layout.spatial_slots), 0.1 * choices.call.history_noise
    assert torch.allclose(call.hidden_states[:, :, spatial], still + added, atol=1e-5)
    assert torch.equal(call.conditioning[:, :, :25], call.hidden_states[:, :, :25])
    # The temporal history repeats the first frame, and by then the encoder has settled.
    assert torch.allclose(call.hidden_states[:, :, 10], call.hidden_states[:, :, 24], atol=1e-4)
    # One remembered frame: the other four blocks of the targets' coordinates hold what stands for nothing.
    blocks = call.correspondence[:, :, 25:].unflatten(1, (5, 4, 64))
    assert (blocks[:, 0, :3] > -1).any()
    assert (blocks[:, 1:, :3] == -1).all()
    assert (blocks[:, 1:, 3] == 1).all()
    assert torch.equal(call.text, small_clip.empty_text)
    assert torch.equal(call.image, recipe.stand_in_clip(small_clip.video[:1]))


def test_the_loss_is_the_weighted_velocity_error_and_reaches_every_layer(parts, small_clip, first_chunk):
    choices, step = first_chunk
    sigma = float(training_sigmas()[400])
    noisy, clean = step.calls[0].hidden_states[:, :, 25:], choices.call.noise - step.target
    assert torch.allclose(noisy, sigma * choices.call.noise + (1 - sigma) * clean, atol=1e-5)
    weight = step.loss.item() / (step.calls[0].output - step.target).pow(2).mean().item()
    bell = np.exp(-2 * (training_sigmas().double().numpy() - 0.5) ** 2)
    bell -= bell.min()
    assert weight == pytest.approx(bell[400] / bell.mean(), rel=1e-4)
    step.loss.backward()
    assert all(p.grad.abs().sum() > 0 for name, p in parts.transformer.named_parameters() if name.endswith("weight"))
    parts.transformer.zero_grad()


def test_pure_noise_has_no_weight(parts, small_clip):
    with torch.no_grad():
        step = training_step(parts, small_clip, StepChoices("plain", 0, call_of((104, 200), 0), text_dropped=False))
    assert step.calls[0].timestep.item() == 1000
    assert (step.calls[0].output - step.target).abs().max() > 0.1
    assert step.loss == 0


@pytest.mark.parametrize("drawn", [0, 1, 253, 500, 998, 999])
def test_the_first_calls_time_is_halved_cut_and_snapped_to_the_grid(drawn):
    times = training_sigmas() * 1000
    index = augmentation_index(drawn, training_sigmas(), 500)
    wanted = max(1, int(times[drawn].item() * 0.5))
    assert (times - wanted).abs().min() == (times[index] - wanted).abs()
    assert int(times[index]) <= 500


@pytest.fixture(scope="module")
def augmented(parts, small_clip):
    """Segment 2, and what follows it when a perfect network says the exact velocity."""
    segment = batch.encode_segment(small_clip, parts, 2)
    choices = call_of((8, 320), 100)
    perfect = replace(parts, transformer=lambda **told: choices.noise - segment.targets)
    return segment, *self_augment(perfect, segment, choices)


def test_a_perfect_networks_frames_are_the_decoded_latents_and_replace_the_last_176(parts, small_clip, augmented):
    segment, following, _ = augmented
    latents = torch.cat([segment.history, segment.targets], dim=2)
    decoded = decode_video(parts.autoencoder, latents, {})[0].transpose(0, 1)
    window = window_frames(small_clip, parts, 2)
    assert len(window) == len(decoded) == 97 + 240
    changed = (following.clip.video != small_clip.video).flatten(1).any(1)
    assert changed.nonzero()[:, 0].tolist() == window[-PASTED:] == list(range(65, 241))
    expected = decoded[-PASTED:].clamp(-1, 1)
    assert (following.clip.video[65:241] - expected).abs().max() < 1e-4
    assert (expected - small_clip.video[65:241]).abs().mean() > 0.1


def test_only_the_last_chunk_of_the_history_is_degraded_and_targets_come_from_the_clean_cache(
    parts, small_clip, augmented
):
    segment, following, _ = augmented
    known = segment.history.shape[2]
    assert following.number == 3
    assert following.history.shape[2] == known + 20
    assert torch.equal(following.history[:, :, :known], segment.history)

    def encoded(video, frames, cache):
        return encode_video(parts.autoencoder, video[frames].transpose(0, 1)[None], cache)

    degraded_cache = copy_cache(segment.cache_before)
    previous = encoded(following.clip.video, slice(161, 241), degraded_cache)
    assert torch.equal(following.history[:, :, known:], previous)
    assert (previous - segment.targets).abs().max() > 0.1
    clean = encoded(small_clip.video, slice(241, 321), copy_cache(segment.cache_after))
    assert torch.equal(following.targets, clean)
    disturbed = encoded(small_clip.video, slice(241, 321), degraded_cache)
    assert (disturbed - clean).abs().max() > 0.01
    assert torch.equal(following.clip.depth, small_clip.depth)


def test_the_first_call_is_told_an_integer_time_and_noised_to_a_time_of_the_grid(small_clip, augmented):
    segment, _, call = augmented
    time = call.timestep.item()
    assert time == int(time) <= 500
    difference = call_of((8, 320), 100).noise - segment.targets
    sigma = ((call.hidden_states[:, :, 25:] - segment.targets) * difference).sum() / difference.pow(2).sum()
    grid = training_sigmas()
    nearest = grid[(grid - sigma).abs().argmin()]
    assert abs(sigma - nearest) < 1e-5
    assert int(nearest * 1000) == time
    assert torch.equal(call.text, small_clip.chunk_text[1:])


def test_a_self_augmented_step_calls_twice_and_trains_on_the_segment_after(parts, small_clip):
    choices = StepChoices("self-augmented", 0, call_of((16,), 300, 1), True, first_call=call_of((200,), 500, 2))
    images, gradients = [], []

    def encode_image(image):
        images.append(image)
        return recipe.stand_in_clip(image)

    def transformer(**told):
        gradients.append(torch.is_grad_enabled())
        return parts.transformer(**told)

    step = training_step(replace(parts, encode_image=encode_image, transformer=transformer), small_clip, choices)
    first, last = step.calls
    assert gradients == [False, True]
    assert not first.output.requires_grad
    assert step.loss.requires_grad
    assert torch.equal(first.text, small_clip.chunk_text[:1])
    assert torch.equal(last.text, small_clip.empty_text)
    # The image is the last pasted frame, so the second call sees what the first one made of it.
    assert torch.equal(images[0], small_clip.video[:1])
    assert (images[1] - small_clip.video[80:81]).abs().max() > 0.01
    assert last.timestep.item() == pytest.approx(1000 * training_sigmas()[300].item())
    assert torch.equal(first.hidden_states[:, :, 24], first.hidden_states[:, :, 20])
    assert not torch.equal(last.hidden_states[:, :, 24], last.hidden_states[:, :, 20])


def test_frames_are_pasted_from_the_end_when_the_window_is_shorter_than_they_are():
    video = torch.zeros(6, 3, 2, 2)
    frames = torch.tensor([0.1, 0.2, 0.3, 0.4, 3.0]).view(5, 1, 1, 1).expand(5, 3, 2, 2)
    first = slice(None), 0, 0, 0
    assert paste_frames(video, frames, [0, 1, 2])[first].tolist() == pytest.approx([0.3, 0.4, 1, 0, 0, 0])
    assert paste_frames(video, frames, [0, 0, 0, 1, 2, 3])[first].tolist() == pytest.approx([0.2, 0.3, 0.4, 1, 0, 0])
    assert paste_frames(video, frames, [4, 5, 6, 7])[first].tolist() == pytest.approx([0, 0, 0, 0, 0.4, 1])
    assert paste_frames(video, frames, [7, 8])[first].tolist() == [0] * 6
    assert video.abs().max() == 0


def test_a_short_clip_repeats_its_last_frame(small_clip, parts):
    first = {name: getattr(small_clip, name)[:100] for name in ("video", "cameras", "depth")}
    short = replace(small_clip, **first)
    window = window_frames(short, parts, 1)
    assert window == [0] * 96 + [*range(100)] + [99] * 61
    assert batch.draw_choices(short, parts, 1, torch.Generator().manual_seed(0)).segment == 0


def test_captions_are_found_by_the_numbers_of_the_source_video(small_clip):
    assert torch.equal(small_clip.text_at(80), small_clip.chunk_text[:1])
    assert torch.equal(small_clip.text_at(81), small_clip.chunk_text[1:])
    later = replace(small_clip, frame_numbers=torch.arange(321) + 60)
    assert torch.equal(later.text_at(21), small_clip.chunk_text[1:])
    assert torch.equal(replace(small_clip, chunk_keys=torch.tensor([5, 81])).text_at(0), small_clip.chunk_text[:1])


def test_a_clip_whose_parts_do_not_fit_is_refused_in_one_sentence(small_clip):
    with pytest.raises(UserError, match="321 frames, 321 cameras, 320 depth maps"):
        replace(small_clip, depth=small_clip.depth[1:])
    with pytest.raises(UserError, match="1 caption starts for 2 captions"):
        replace(small_clip, chunk_keys=torch.tensor([0]))
