"""How is a walkthrough kept as a nerfstudio data set, and what if such a data set is wrong?

`transforms.json` beside `images` and `points.ply`. Poses are camera-to-world with OpenGL cameras (x right, y up, z
back) in a world with z up, into which OpenCV axes turn as (x, z, -y); `applied_transform` says so, as nerfstudio's own
converter does. The centre of the top left pixel is at (0.5, 0.5), so principal points move by half a pixel.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lyra.errors import UserError
from lyra.export.files import replacing_folder
from lyra.export.frames import (
    MAX_POINTS,
    PosedFrames,
    coloured_points,
    frame_name,
    require_frames,
    write_images,
)
from lyra.export.ply import write_point_ply
from lyra.types import Cameras

_POINTS = "points.ply"
_Z_UP = ((1.0, 0.0, 0.0, 0.0), (0.0, 0.0, 1.0, 0.0), (0.0, -1.0, 0.0, 0.0), (0.0, 0.0, 0.0, 1.0))
"""From OpenCV world axes to the file's."""
_OPENGL = (1.0, -1.0, -1.0, 1.0)
"""From an OpenGL camera's axes to OpenCV's, and back."""
_HALF_PIXEL = 0.5
_PINHOLES = ("OPENCV", "PINHOLE", "SIMPLE_PINHOLE")
_DISTORTION = ("k1", "k2", "k3", "k4", "p1", "p2")


def write_nerfstudio(folder: Path, posed: PosedFrames, *, max_points: int = MAX_POINTS, provenance: str = "") -> None:
    """Write images, poses and coloured points to start from; the provenance is a key that nerfstudio does not read.

    Raises:
        UserError: there are no frames, their number or size is not the cameras', or the folder holds other files.
    """
    require_frames(folder, posed)
    z_up = torch.tensor(_Z_UP, dtype=torch.float64)
    c2w = z_up @ torch.linalg.inv(posed.cameras.w2c.detach().cpu().double()) * torch.tensor(_OPENGL).double()
    lenses = [_lens(matrix) for matrix in posed.cameras.intrinsics.detach().cpu().double()]
    shared = all(lens == lenses[0] for lens in lenses)
    points = coloured_points(posed, max_points)
    about: dict[str, Any] = {"provenance": provenance} if provenance else {}
    about |= {"camera_model": "OPENCV", "w": posed.cameras.image_width, "h": posed.cameras.image_height}
    about |= lenses[0] if shared else {}
    about |= {"applied_transform": z_up[:3].tolist()}
    about |= {"ply_file_path": _POINTS} if len(points.positions) else {}
    about["frames"] = [
        {"file_path": f"images/{frame_name(index)}.png", "transform_matrix": c2w[index].tolist()}
        | ({} if shared else lenses[index])
        for index in range(len(posed))
    ]
    with replacing_folder(folder, {"images", "transforms.json", _POINTS}) as temporary:
        write_images(temporary / "images", posed.frames)
        if len(points.positions):
            turned = points.positions @ z_up[:3, :3].float().T
            write_point_ply(temporary / _POINTS, turned, points.colours, provenance)
        (temporary / "transforms.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


def read_nerfstudio(folder: Path) -> Cameras:
    """Read the cameras into OpenCV axes, in the order of the file.

    `applied_transform`, where the file has one, is undone; a world without it is taken as it is.

    Raises:
        UserError: there is no such data set, it cannot be read, has lens distortion, or images of several sizes.
    """
    path = folder / "transforms.json"
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        frames = [about | frame for frame in about["frames"]]
        bent = [key for key in _DISTORTION if any(frame.get(key, 0) for frame in frames)]
        if bent or any(frame.get("camera_model", "OPENCV") not in _PINHOLES for frame in frames):
            raise UserError(f"The cameras of {path} are no pinholes; undistort the images first.")
        sizes = {(int(frame["h"]), int(frame["w"])) for frame in frames}
        if len(sizes) != 1:
            raise UserError(f"The images of {path} have {len(sizes)} sizes; give all of them one size.")
        c2w = torch.tensor([frame["transform_matrix"] for frame in frames], dtype=torch.float64)
        applied = torch.eye(4, dtype=torch.float64)
        applied[:3] = torch.tensor(about.get("applied_transform", applied[:3].tolist()), dtype=torch.float64)
        w2c = torch.linalg.inv(torch.linalg.inv(applied) @ c2w * torch.tensor(_OPENGL).double())
        intrinsics = torch.tensor([_matrix(frame) for frame in frames])
        return Cameras(w2c.float(), intrinsics, *sizes.pop())
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"There is no data set to read at {path} ({error.strerror}); check the folder.") from error
    except (ValueError, KeyError, TypeError, RuntimeError, RecursionError) as error:
        raise UserError(f"{path} is not a data set that can be read ({error!r}); export it again.") from error


def _lens(matrix: Float[Tensor, "3 3"]) -> dict[str, float]:
    """Focal lengths and principal point by nerfstudio's names."""
    fx, fy, cx, cy = (float(matrix[place]) for place in ((0, 0), (1, 1), (0, 2), (1, 2)))
    return {"fl_x": fx, "fl_y": fy, "cx": cx + _HALF_PIXEL, "cy": cy + _HALF_PIXEL}


def _matrix(frame: dict[str, Any]) -> list[list[float]]:
    """The intrinsics of a frame with pixel centres at integers."""
    fx = float(frame["fl_x"])
    cx, cy = float(frame["cx"]) - _HALF_PIXEL, float(frame["cy"]) - _HALF_PIXEL
    return [[fx, 0.0, cx], [0.0, float(frame.get("fl_y", fx)), cy], [0.0, 0.0, 1.0]]
