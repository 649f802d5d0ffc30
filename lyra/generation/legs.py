"""How do the finished chunks of one or several walks become the video, cameras and depth that are shown?

Most jobs are one walk, whose chunk videos are joined as they are. A recipe's walks are shown in its own order, some
backwards. Knows chunks by their keys, no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from lyra.config import CHUNK_FRAMES
from lyra.export.video import join_videos, read_video, write_video
from lyra.generation.chunk_store import ChunkStore
from lyra.trajectory.recipes import Leg, Recipe, joined_cameras, shown_order
from lyra.types import Cameras


@dataclass
class WalkedLeg:
    """A leg and what there is of it so far; mutable because it grows chunk by chunk."""

    leg: Leg
    keys: list[str] = field(default_factory=list)
    """Keys of its finished chunks."""
    depths: dict[int, Float[Tensor, "h w"]] = field(default_factory=dict)
    """Measured depth by the leg's own frame numbers."""

    @property
    def finished(self) -> Leg:
        """The leg up to its last finished chunk."""
        return replace(self.leg, cameras=self.leg.cameras[: 1 + CHUNK_FRAMES * len(self.keys)])


@dataclass(frozen=True)
class ShownWalk:
    """What the world folder keeps beside the video."""

    cameras: Cameras
    depths: dict[int, Float[Tensor, "h w"]]
    """By the frame numbers of the video."""


def finished_recipe(legs: Sequence[WalkedLeg]) -> Recipe:
    """The recipe as far as it is finished."""
    return Recipe(tuple(walked.finished for walked in legs if walked.keys))


def shown_walk(legs: Sequence[WalkedLeg]) -> ShownWalk:
    """Cameras and depth in the order of the video."""
    recipe, started = finished_recipe(legs), [walked for walked in legs if walked.keys]
    depths = {
        index: started[shown.leg].depths[shown.frame]
        for index, shown in enumerate(shown_order(recipe))
        if shown.frame in started[shown.leg].depths
    }
    return ShownWalk(joined_cameras(recipe), depths)


def write_walk(path: Path, store: ChunkStore, legs: Sequence[WalkedLeg], comment: str) -> None:
    """Write the video of the finished chunks."""
    started = [walked for walked in legs if walked.keys]
    if len(started) == 1 and not started[0].leg.reversed:
        join_videos(path, [store.video(key) for key in started[0].keys], comment)
        return
    # Frames that change their order have to be encoded again.
    frames = [torch.cat([read_video(store.video(key)) for key in walked.keys]) for walked in started]
    order = shown_order(finished_recipe(legs))
    write_video(path, torch.stack([frames[shown.leg][shown.frame] for shown in order]), comment)
