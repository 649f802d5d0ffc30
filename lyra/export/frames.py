"""How is a walkthrough kept as a data set of pictures, cameras and depth that any program can read?

A folder with `images/*.png`, `cameras.npz` (the released trajectory format), `depth.npz` (exact), `depth/*.png` (16
bits) and `dataset.json`, which says what the numbers mean. What other data-set formats share is here too: the frames
themselves and coloured points from their depth. Knows no scene.
"""

from __future__ import annotations

import json
import os
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from PIL import Image
from torch import Tensor

from lyra.errors import UserError
from lyra.export.files import replacing_folder
from lyra.export.video import Frames
from lyra.geometry.cameras import unproject
from lyra.trajectory.files import read_trajectory, write_trajectory
from lyra.types import Cameras

FARTHEST = 200.0
"""Depth from which on a pixel counts as sky, in scene units; no point is made of it."""
MAX_POINTS = 200_000
"""Points that a scene is started from are no more than this; trainers add and remove their own."""
SMALLEST_DEPTH_STEP = 0.001
"""Step of the depth pictures in scene units (a millimetre if the unit is a metre); a multiple where depth is large."""
SATURATED = 65535
"""Count in a depth picture for depth beyond its range, and for sky."""
_WRITTEN_AT_ONCE = 32
"""Pictures that are in memory while they are written."""
_MEMBERS = frozenset({"images", "depth", "cameras.npz", "depth.npz", "dataset.json"})


@dataclass(frozen=True)
class PosedFrames:
    """Pictures with their cameras and, of some of them, depth."""

    frames: Frames
    """RGB bytes (t, 3, h, w)."""
    cameras: Cameras
    """One for each frame, for its size."""
    depths: dict[int, Float[Tensor, "h2 w2"]]
    """z depth in scene units by index of the frame, at its size or another; empty when nothing is known."""

    def __len__(self) -> int:
        return len(self.frames)

    def every(self, step: int) -> PosedFrames:
        """Frames 0, step, 2 step and so on, with the depth that is known of them."""
        depths = {index // step: depth for index, depth in self.depths.items() if index % step == 0}
        return PosedFrames(self.frames[::step], self.cameras[::step], depths)


@dataclass(frozen=True)
class ColouredPoints:
    """Points of a world and where in which frame each was seen."""

    positions: Float[Tensor, "p 3"]
    """In OpenCV world axes."""
    colours: UInt8[Tensor, "p 3"]
    frames: Int[Tensor, "p"]
    """Index of the frame."""
    pixels: Float[Tensor, "p 2"]
    """x and y in that frame, pixel centres at integers."""


def coloured_points(posed: PosedFrames, max_points: int = MAX_POINTS, farthest: float = FARTHEST) -> ColouredPoints:
    """At most `max_points` points on a grid in every frame whose depth is known; none where depth is `farthest`."""
    step = 1
    while sum(-(-d.shape[0] // step) * -(-d.shape[1] // step) for d in posed.depths.values()) > max_points:
        step += 1
    positions, colours, frames, pixels = [], [], [], []
    for index, depth in sorted(posed.depths.items()):
        depth = depth.detach().cpu().float()
        height, width = depth.shape
        camera = posed.cameras[index].resized(height, width)
        kept = torch.zeros_like(depth, dtype=torch.bool)
        kept[::step, ::step] = True
        kept &= depth.isfinite() & (depth > 0) & (depth < farthest)
        positions.append(unproject(depth, camera.w2c[0].cpu(), camera.intrinsics[0].cpu())[kept])
        # Cameras are resized by plain ratios, so pixels are too.
        scale = torch.tensor([posed.cameras.image_width / width, posed.cameras.image_height / height])
        pixels.append(kept.nonzero().flip(1) * scale)
        x, y = pixels[-1].round().long().unbind(1)
        x, y = x.clamp(max=posed.frames.shape[-1] - 1), y.clamp(max=posed.frames.shape[-2] - 1)
        colours.append(posed.frames[index].cpu()[:, y, x].T)
        frames.append(torch.full((len(x),), index))
    if not positions:
        none = torch.zeros(0, 3)
        return ColouredPoints(none, none.to(torch.uint8), none[:, 0].long(), none[:, :2])
    return ColouredPoints(torch.cat(positions), torch.cat(colours), torch.cat(frames), torch.cat(pixels))


def write_frames(folder: Path, posed: PosedFrames, provenance: str = "") -> None:
    """Write the data set; the provenance goes into dataset.json.

    Raises:
        UserError: there are no frames, their number or size is not the cameras', or the folder holds other files.
    """
    require_frames(folder, posed)
    ids = sorted(posed.depths)
    depths = {index: posed.depths[index].detach().cpu().float().numpy() for index in ids}
    finite = [d[np.isfinite(d) & (d < FARTHEST)].max(initial=0) for d in depths.values()]
    step = SMALLEST_DEPTH_STEP * max(1, int(np.ceil(max(finite, default=0) / SMALLEST_DEPTH_STEP / (SATURATED - 1))))
    with replacing_folder(folder, _MEMBERS) as temporary:
        write_images(temporary / "images", posed.frames)
        write_trajectory(temporary / "cameras.npz", posed.cameras)
        if ids:
            maps: dict[str, Any] = {frame_name(index): depth for index, depth in depths.items()}
            np.savez(temporary / "depth.npz", **maps)
            (temporary / "depth").mkdir()
        for index, depth in depths.items():
            counts = np.nan_to_num(np.rint(depth / step), nan=0, posinf=SATURATED)
            picture = np.clip(counts, 0, SATURATED).astype(np.uint16)
            Image.fromarray(picture).save(temporary / "depth" / f"{frame_name(index)}.png", compress_level=1)
        about = _description(posed, ids, step, provenance)
        (temporary / "dataset.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def read_frames(folder: Path) -> PosedFrames:
    """Read a data set of `write_frames`, depth from the exact file.

    Raises:
        UserError: there is none in the folder, or a file of it is missing or cannot be read.
    """
    try:
        about = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
        frames = [read_image(folder / "images" / f"{frame_name(index)}.png") for index in range(about["frames"])]
        depths = {}
        if about["depth"]["frames"]:
            with np.load(folder / "depth.npz", allow_pickle=False) as arrays:
                depths = {index: torch.from_numpy(arrays[frame_name(index)]) for index in about["depth"]["frames"]}
        return PosedFrames(torch.stack(frames), read_trajectory(folder / "cameras.npz", frames=len(frames)), depths)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{folder} is not a whole data set ({error}); export the frames again.") from error
    except (ValueError, KeyError, TypeError, RuntimeError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{folder} holds a data set that cannot be read ({error}); export the frames again.") from error


def frame_name(index: int) -> str:
    """Name of a frame's files, without an ending."""
    return f"frame_{index:06d}"


def write_images(folder: Path, frames: Frames) -> None:
    """Write all frames as PNG into a new folder, several at a time."""
    folder.mkdir(parents=True)

    def write(index: int, frame: UInt8[Tensor, "3 h w"]) -> None:
        picture = Image.fromarray(frame.movedim(0, -1).cpu().numpy())
        # Level 1 takes a third of the time of the usual 6 and makes files a tenth larger.
        picture.save(folder / f"{frame_name(index)}.png", compress_level=1)

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for first in range(0, len(frames), _WRITTEN_AT_ONCE):
            ids = range(first, min(first + _WRITTEN_AT_ONCE, len(frames)))
            # Frames of a video are read in order, and not all before the first is written.
            list(pool.map(write, ids, [frames[index] for index in ids]))


def read_image(path: Path) -> UInt8[Tensor, "3 h w"]:
    """A picture as it is in the file, in RGB."""
    with Image.open(path) as picture:
        return torch.from_numpy(np.array(picture.convert("RGB"))).movedim(-1, 0)


def require_frames(folder: Path, posed: PosedFrames) -> None:
    """Check what a data set is made from.

    Raises:
        UserError: there are no frames, or their number or size is not that of the cameras.
    """
    if len(posed) == 0:
        raise UserError(f"There is nothing to write to {folder}: the walkthrough has no frames.")
    height, width = posed.frames.shape[-2:]
    cameras = (len(posed.cameras), posed.cameras.image_height, posed.cameras.image_width)
    if cameras != (len(posed), height, width):
        raise UserError(
            f"The walkthrough for {folder} has {len(posed)} frames of {height}x{width} but {cameras[0]} cameras for "
            f"{cameras[1]}x{cameras[2]}; give one camera for each frame, resized to it."
        )


def _description(posed: PosedFrames, ids: list[int], step: float, provenance: str) -> dict[str, Any]:
    """The contents of dataset.json."""
    return {
        "provenance": provenance,
        "frames": len(posed),
        "image_height": posed.cameras.image_height,
        "image_width": posed.cameras.image_width,
        "images": "images/frame_NNNNNN.png, sRGB",
        "cameras": {
            "file": "cameras.npz",
            "w2c": "(N, 4, 4) world-to-camera matrices that act on column vectors, translation in scene units",
            "intrinsics": "(N, 3, 3) pinhole matrices in pixels; the centre of the top left pixel is at (0, 0)",
            "axes": "OpenCV: x right, y down, z forward",
        },
        "depth": {
            "frames": ids,
            "meaning": "z along the camera's axis, not the length of the ray",
            "unit": "scene unit, about a metre",
            "exact": "depth.npz, float32 in scene units, one array for each frame by name",
            "pictures": "depth/frame_NNNNNN.png, 16 bits; 0 is unknown, 65535 is sky or beyond the range",
            "picture_step": step,
        },
    }
