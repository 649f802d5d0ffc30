"""What is a captioner shown before a chunk? Views of the coming path, warped from what memory knows (released server).

Knows the loop's state, no captioner's model.
"""

from __future__ import annotations

import torch

from lyra.config import CHUNK_FRAMES
from lyra.generation.captioner import CaptionRequest, preview_offsets
from lyra.generation.state import WalkState
from lyra.generation.walkthrough import Walk, retrieve, to_uint8
from lyra.geometry.warp import forward_warp

REMEMBERED_SOURCES = 2
"""Remembered frames that are warped besides the newest one (released server)."""


def caption_request(walk: Walk, state: WalkState, hint: str) -> CaptionRequest:
    """What a captioner is shown before a chunk: the photo, the newest frame and warped views of the coming path.

    The views are made of the newest frame and the two best remembered ones; where none of them sees anything they are
    black (released server).
    """
    newest, first = state.finished_frames, state.finished_frames + 1
    coming = state.cameras[first : first + CHUNK_FRAMES]
    targets = coming[preview_offsets(CHUNK_FRAMES)]
    frames = [(state.images[newest], state.buffer_depth, newest)]
    frames += [
        (state.images[frame.frame_id], frame.depth, frame.frame_id)
        for frame in reversed(retrieve(state, coming, "lyra")[-REMEMBERED_SOURCES:])
        if frame.frame_id != newest
    ]
    views = torch.full((len(targets), *state.images[newest].shape), -1.0, device=state.buffer_depth.device)
    for image, depth, number in reversed(frames):
        w2c, intrinsics = state.cameras.w2c[number], state.cameras.intrinsics[number]
        warped = forward_warp(image.float(), depth, w2c, intrinsics, targets.w2c, targets.intrinsics)
        # The most trusted source is drawn last, over the others.
        views = torch.where(warped.covered[:, None], warped.values, views)
    return CaptionRequest(
        photo=to_uint8(walk.photo).cpu(),
        newest=to_uint8(state.images[newest]).cpu(),
        previews=to_uint8(views).cpu(),
        region_hint=hint,
        previous=hint,
    )
