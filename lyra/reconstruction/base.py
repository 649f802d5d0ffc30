"""The protocol of reconstructors: a walkthrough in, Gaussians and the cameras that they belong to out.

Knows no way to lift. A reconstructor takes what it needs of a walkthrough: one without a network wants depth and
cameras, Depth Anything 3 can do without both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from jaxtyping import Float
from torch import Tensor

from lyra.export.video import Frames
from lyra.types import Cameras, GaussianScene

Check = Callable[[int, int], None]
"""Called with finished and all steps; whoever listens may raise to stop the work (`Progress.step`)."""


@dataclass(frozen=True)
class Walkthrough:
    """Frames of a video and what is known of them."""

    frames: Frames
    """(t, 3, h, w) RGB bytes: a tensor, or those of a file, decoded when they are asked for."""
    cameras: Cameras | None = None
    """One camera a frame, pixel centres at integers; None where only the video is known."""
    depths: Mapping[int, Float[Tensor, "h2 w2"]] = field(default_factory=dict)
    """Measured z depth by frame number, in the unit of the cameras."""

    def __post_init__(self) -> None:
        if self.cameras is not None and len(self.cameras) != len(self.frames):
            raise ValueError(f"{len(self.frames)} frames cannot have {len(self.cameras)} cameras")


@dataclass(frozen=True)
class Reconstruction:
    """Gaussians of a walkthrough."""

    scene: GaussianScene
    """In the world of the given cameras; of the first frame's camera where none were given."""
    cameras: Cameras
    """What the scene was made with: views of it from here show the frames. Of the frames' size."""
    frame_ids: tuple[int, ...]
    """Which frame each camera belongs to."""


class Reconstructor(Protocol):
    """Any way from a walkthrough to Gaussians."""

    def reconstruct(self, walkthrough: Walkthrough, check: Check) -> Reconstruction:
        """Lift a walkthrough; `check(done, all)` is called after each step.

        Raises:
            UserError: the walkthrough cannot be lifted in this way.
        """
        ...
