"""Films a Gaussian scene along a path of cameras, into an MP4 file.

A frame is rendered, encoded and forgotten, so the length of the path costs no memory. Knows neither how paths are made
nor how splats are drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from lyra.errors import UserError
from lyra.export.files import replacing_path
from lyra.export.video import FRAMES_PER_SECOND, write_video
from lyra.reconstruction.rasterizer import GaussianRenderer, choose_renderer
from lyra.types import Cameras, GaussianScene


def never_stop(done: int, of: int) -> None:
    """A `check` that lets everything pass."""


def write_fly_through(
    scene: GaussianScene,
    cameras: Cameras,
    path: Path,
    fps: int = FRAMES_PER_SECOND,
    check: Callable[[int, int], None] = never_stop,
    background: Float[Tensor, "3"] | None = None,
) -> None:
    """Render the scene from each camera and write the frames as a video; an existing file is replaced at the end.

    Args:
        fps: frames a second.
        check: called as `check(done, all)` after each frame; what it raises ends the work and leaves no file behind.
        background: colour in 0..1 behind the scene; black if None.

    Raises:
        UserError: the scene or the path is empty, the frame rate is not positive, or the image is less than 2 pixels
            high or wide.
    """
    if len(scene) == 0:
        raise UserError("The scene has no splats to film; lift a walkthrough to splats first.")
    if len(cameras) == 0:
        raise UserError("The camera path has no cameras; choose a path with at least one.")
    if fps < 1:
        raise UserError(f"A video of {fps} frames a second cannot be written; choose 1 or more.")
    # H.264 halves the colour's resolution, so an odd image loses its last row or column.
    height, width = (size // 2 * 2 for size in (cameras.image_height, cameras.image_width))
    if min(height, width) < 2:
        raise UserError(f"An image of {cameras.image_height}x{cameras.image_width} is too small; make it larger.")
    with replacing_path(path) as temporary:
        frames = film(choose_renderer(scene), cameras, height, width, background, check)
        write_video(temporary, frames, fps=fps)


def film(
    renderer: GaussianRenderer,
    cameras: Cameras,
    height: int,
    width: int,
    background: Float[Tensor, "3"] | None,
    check: Callable[[int, int], None],
) -> Iterator[UInt8[Tensor, "3 h w"]]:
    """The frames, one at a time, each rendered when it is asked for."""
    for index in range(len(cameras)):
        view = renderer.render(cameras.w2c[index], cameras.intrinsics[index], height, width, background=background)
        yield (view.colours * 255).round().to("cpu", torch.uint8)
        check(index + 1, len(cameras))
