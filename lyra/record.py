"""What tells a run and its chunks apart from others, and what run.json says of it?

Keys are of everything that decides a chunk's bytes; the record names the weights, their licences and the machine.
Knows no stage and makes nothing.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lyra import __version__
from lyra.config import CHUNK_FRAMES, GenerateJob, LoadOptions, ModelSettings
from lyra.device import peak_memory_gib
from lyra.errors import UserError
from lyra.generation.chunk_store import ChunkStore, content_key
from lyra.generation.walkthrough import FinishedChunk
from lyra.hub import ModelSource, file_hash, weights_hash
from lyra.licences import accepted
from lyra.photo import load_photo
from lyra.progress import Progress
from lyra.types import Cameras
from lyra.world import World


@dataclass(frozen=True)
class LoadedFrom:
    """Where a pipeline's weights come from and how they were placed."""

    settings: ModelSettings
    source: ModelSource
    depth_source: ModelSource | None
    """Of the depth network that replaces the model's own."""
    device: torch.device
    load: LoadOptions

    @property
    def sources(self) -> Sequence[ModelSource]:
        """All of them."""
        return (self.source,) if self.depth_source is None else (self.source, self.depth_source)


def run_record(
    job: GenerateJob, status: str, progress: Progress, path_note: str | None, loaded: LoadedFrom
) -> dict[str, Any]:
    """The contents of run.json."""
    licences = {part: licence for source in loaded.sources for part, licence in source.licences.items()}
    return {
        "status": status,
        "job": job.to_json(),
        "model": {
            "name": loaded.settings.name,
            "licence": loaded.settings.licence,
            "licences": {part: licence.id for part, licence in licences.items()}
            | ({"captioner": f"as the model card of {job.captioner} says"} if job.captioner else {}),
            "accepted": {
                given.licence: given.date
                for licence in dict.fromkeys(licences.values())
                if (given := accepted(licence)) is not None
            },
            "revision": loaded.source.revision,
            "weights_sha256": weights_hash(loaded.source.folder),
            "depth": None if loaded.depth_source is None else loaded.depth_source.name,
        },
        "path_note": path_note,
        "versions": {
            "lyra": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "diffusers", "transformers", "numba")},
        },
        "device": str(loaded.device),
        "placement": loaded.load.to_json(),
        "stage_seconds": {name: round(seconds, 2) for name, seconds in progress.stage_seconds.items()},
        "peak_memory_gib": round(peak_memory_gib(), 2),
    }


def chunk_key(before: str, job: GenerateJob, cameras: Cameras, chunk: int, prompt: str) -> str:
    """Key of a chunk: everything before it, its cameras, its text and how it is sampled."""
    first = 1 + CHUNK_FRAMES * chunk
    span = cameras[(0 if chunk == 0 else first) : first + CHUNK_FRAMES]
    sampling = replace(
        job,
        photo="",
        chunks=1,
        preset="",
        trajectory=None,
        strength=1.0,
        prompt="",
        captions=None,
        pose_scale=None,
        model="",
        loras=(),
    )
    how = sampling.to_json() | {"loras": [(file_hash(Path(p)), s) for p, s in job.lora_strengths().items()]}
    if job.sampler == "dmd":
        # The distilled sampler has neither a number of steps nor guidance.
        how["steps"] = how["guidance_scale"] = None
    return content_key(before, how, span.w2c.numpy().tobytes(), span.intrinsics.numpy().tobytes(), prompt)


def save_chunk(
    store: ChunkStore, key: str, finished: FinishedChunk, photo: Tensor | None, about: dict[str, Any]
) -> None:
    """Store a chunk; the first one's video begins with the photo."""
    frames = finished.frames if photo is None else torch.cat([photo[None], finished.frames])
    store.save(key, finished.record, frames, about)


def refuse_other_photo(world: World, photo: Tensor) -> None:
    """Keep a world of another photo from being overwritten.

    Raises:
        UserError: the folder holds the world of another photo.
    """
    if not world.photo_path.exists() or not world.run:
        return
    before = load_photo(world.photo_path)
    same = (
        before.size == (photo.shape[2], photo.shape[1]) and before.tobytes() == photo.movedim(0, -1).numpy().tobytes()
    )
    if not same:
        raise UserError(
            f"{world.folder} holds the world of another photo or another --resolution; choose another --out so that it "
            "is not lost."
        )
