"""Which text a chunk is generated with: one prompt for all, or a captions file with a text from each frame on."""

from __future__ import annotations

import json
from pathlib import Path

from lyra.config import CHUNK_FRAMES, GenerateJob
from lyra.errors import UserError


def read_captions(job: GenerateJob) -> dict[int, str]:
    """First frame of each caption and its text, ascending.

    Raises:
        UserError: the captions file cannot be used.
    """
    if job.captions is None:
        return {0: job.prompt}
    path = Path(job.captions)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        captions = {int(frame): str(text) for frame, text in values.items()}
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(
            f'The captions file {path} cannot be used ({error}); it must be JSON such as {{"0": "...", "81": "..."}}.'
        ) from error
    kept = {frame: captions[frame] for frame in sorted(captions) if 0 <= frame < job.frames}
    if not kept:
        raise UserError(f'The captions file {path} has no caption for frames 0 to {job.frames - 1}; add one under "0".')
    return kept


def caption_of_chunk(captions: dict[int, str], chunk: int) -> str:
    """The caption with the largest first frame up to the chunk's first new frame, or the first (released code)."""
    first_new = CHUNK_FRAMES * chunk + 1
    started = [frame for frame in captions if frame <= first_new]
    return captions[max(started) if started else min(captions)]
