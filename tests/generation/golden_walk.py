"""The golden run of two chunks, ready to be walked in this project's loop on any device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import recipe
import torch
from torch import Tensor

from lyra.config import GenerateJob, ModelSettings
from lyra.generation import walkthrough
from lyra.generation.conditioning import ChunkInputs
from lyra.generation.state import ChunkRecord
from lyra.generation.walkthrough import Components, Walk, generate_chunk, start
from lyra.models.streaming import StreamingWanAutoencoder
from lyra.progress import Progress
from lyra.types import Cameras
from tests.models.tiny_released import golden_autoencoder, golden_transformer

SETTINGS = ModelSettings(
    name="golden",
    licence="",
    generation_height=None,
    generation_width=None,
    keep_seen_pixels=False,
    fill_holes=False,
    visibility_mask=False,
    few_step_note="",
)
CPU = torch.device("cpu")


class WallDepth:
    """Exact depth of the golden scene."""

    def measure(self, images: Tensor, cameras: Cameras, seen_depth: Tensor) -> Tensor:
        size = images.shape[-2:]
        pairs = zip(cameras.w2c.cpu().numpy(), cameras.intrinsics.cpu().numpy(), strict=True)
        return torch.stack([torch.from_numpy(recipe.wall_depth(w, k, *size)) for w, k in pairs]).to(images.device)


@dataclass
class GoldenRun:
    """What the network was told, what it gave, and what was kept, chunk by chunk."""

    told: list[ChunkInputs] = field(default_factory=list)
    history: list[Tensor] = field(default_factory=list)
    sampled: list[Tensor] = field(default_factory=list)
    decoded: list[Tensor] = field(default_factory=list)
    records: list[ChunkRecord] = field(default_factory=list)


def golden_parts(released_shapes: dict[str, tuple[int, ...]], device: torch.device = CPU) -> Components:
    """The tiny golden networks on a device."""
    given = recipe.pipeline_inputs()
    texts = {"first": given["chunk_text"][:, 0], "second": given["chunk_text"][:, 1]}
    transformer = golden_transformer(released_shapes).requires_grad_(False).to(device)
    return Components(
        settings=SETTINGS,
        transformer=transformer,
        layout=transformer.layout,
        autoencoder=StreamingWanAutoencoder(golden_autoencoder().requires_grad_(False).to(device)),
        encode_text=lambda prompts: texts[prompts[0]].to(device),
        negative_text=given["negative"].to(device),
        encode_image=lambda image: recipe.stand_in_clip(image.cpu()).to(device),
        depth=WallDepth(),
        blend=None,
        use_sampler=lambda name, loras: None,
    )


def walk_golden_path(parts: Components, job: GenerateJob, device: torch.device = CPU) -> GoldenRun:
    """Generate the job's chunks of the golden path, watching what goes in and out of the network."""
    given = recipe.pipeline_inputs()
    cameras = Cameras(given["w2c"], given["K"].expand(161, 3, 3), 64, 96)
    depth = torch.from_numpy(recipe.wall_depth(given["w2c"][0].numpy(), given["K"].numpy(), 64, 96))
    walk = Walk(given["photo"][0].to(device), depth.to(device), cameras.to(device), (64, 96))
    run = GoldenRun()
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        watch(patch, "build_inputs", run.told, lambda kwargs: run.history.append(kwargs["history_latents"]))
        watch(patch, "denoise", run.sampled)
        watch(patch, "decode_video", run.decoded)
        state = start(parts, walk)
        for index, prompt in enumerate(("first", "second")[: job.chunks]):
            chunk = generate_chunk(parts, walk, state, job, prompt, job.seed + index, Progress())
            run.records.append(chunk.record)
            state.apply(ChunkRecord.from_tensors(chunk.record.to_tensors()).to(device))
    return run


def watch(patch: pytest.MonkeyPatch, name: str, results: list, look: Callable[[dict], None] = lambda k: None) -> None:
    """Keep what a function of the loop returns, and look at its arguments."""
    original = getattr(walkthrough, name)

    def watched(*args, **kwargs):
        look(kwargs)
        results.append(original(*args, **kwargs))
        return results[-1]

    patch.setattr(walkthrough, name, watched)
