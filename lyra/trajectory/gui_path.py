"""How does a camera path of the released viewer (its JSON file of keyframes) become one camera per frame?

The file holds `path`, a list of keyframes {`R`, `T`, `fov`}, `spline_order` and `loop`. Read from the released code:
`R` is a quaternion in the order x, y, z, w that turns camera axes into world axes, `T` is the camera centre, both with
OpenCV camera axes and in the world of the photo's camera; the viewer's server only inverts them. `fov` is vertical, in
degrees, with square pixels and the principal point in the middle of the image.

The path is a uniform B-spline (cubic by default) through control points: the keyframes with the first and the last one
doubled, so that it begins and ends exactly at them and passes near the others. The viewer samples it ten times as
densely as needed, evenly in the spline's parameter, and then takes cameras at equal distances along the curve.

Kept although odd: `time`, `timestamp`, `duration_seconds` and `up_dir` play no part, and a turn on the spot between two
moves takes hardly any frames, because only the distance moved counts. Different from the released code: a loop is
closed by its first keyframe, so that it begins and ends at the photo's camera instead of a sixth of the way to its
neighbour; frame 0 is the first keyframe, which the released server shows once more in frame 1; and the file is one
path, where the viewer samples the keyframes added after each generation on their own.

Knows no photo and no scene: making the first pose the photo's is `relative_to_first` in `files.py`.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lyra.errors import UserError
from lyra.geometry.rotations import matrix_to_quaternion, quaternion_to_matrix, world_to_camera
from lyra.trajectory.files import read_trajectory
from lyra.types import Cameras

_DENSITY = 10
"""Samples along the curve for each frame wanted (released viewer)."""
_STANDING = 1e-8
"""Length of a path, in scene units, up to which the camera only turns (released viewer)."""
_FRAMES_PER_SECOND = 16
"""Rate at which the released viewer turns a duration into a number of frames."""
_MAX_BYTES = 16 * 2**20
"""A keyframe takes about 200 bytes, so this is some 80,000 of them."""
_MAX_NUMBER = 1e9
"""Positions and quaternions beyond it are no scene, and their squares would overflow float32."""
_MIN_FOV, _MAX_FOV = 1.0, 179.0
_ORDERS = (0, 1, 2, 3)
_ZIP_MAGIC = b"PK"


@dataclass(frozen=True)
class _Keyframes:
    """What the file says; float64."""

    quaternions: Float[Tensor, "k 4"]
    """Unit, wxyz, camera to world."""
    centres: Float[Tensor, "k 3"]
    fov_deg: Float[Tensor, "k"]
    """Vertical."""

    def __getitem__(self, index: Tensor) -> _Keyframes:
        return _Keyframes(self.quaternions[index], self.centres[index], self.fov_deg[index])


def read_path(path: str | Path, *, frames: int, image_height: int, image_width: int) -> Cameras:
    """The first `frames` cameras of a `trajectory.npz`, or `frames` cameras along a path of the released viewer.

    Which of the two a file is, its content says and not its name.

    Args:
        path: the file.
        frames: number of cameras, at least 1.
        image_height: pixels of the images that the intrinsics are for.
        image_width: pixels.

    Raises:
        UserError: the file is neither, or something in it is wrong.
    """
    path = Path(path)
    if _looks_like_npz(path):
        return read_trajectory(path, frames=frames).resized(image_height, image_width)
    return read_gui_path(path, frames=frames, image_height=image_height, image_width=image_width)


def read_gui_path(path: str | Path, *, frames: int, image_height: int, image_width: int) -> Cameras:
    """Exactly `frames` cameras along a path of the released viewer, from its first keyframe to its last.

    Args:
        path: the JSON file.
        frames: number of cameras, at least 1.
        image_height: pixels of the images that the intrinsics are for.
        image_width: pixels.

    Raises:
        UserError: the file is missing, too large or not JSON, has no keyframes, or a keyframe has a number that is
            missing or not finite, a quaternion of length zero or a field of view out of range.
        ValueError: fewer than one frame.
    """
    if frames < 1:
        raise ValueError(f"a path needs at least one frame, not {frames}")
    path = Path(path)
    content = _read_object(path)
    keyframes = _read_keyframes(path, content)
    order = _spline_order(path, content)
    visited = [*range(len(content["path"]))] + ([0] if _is_loop(path, content) else [])
    control = keyframes[torch.tensor([visited[0], *visited, visited[-1]])]
    sampled = _at(control, _even_times(control, order, frames), order)
    w2c = world_to_camera(quaternion_to_matrix(sampled.quaternions).transpose(-1, -2), sampled.centres)
    focal = 0.5 * image_height / torch.tan(torch.deg2rad(sampled.fov_deg) / 2)
    middle = torch.tensor([[0.0, 0.0, image_width / 2], [0.0, 0.0, image_height / 2], [0.0, 0.0, 1.0]])
    intrinsics = torch.diag(torch.tensor([1.0, 1.0, 0.0])) * focal.float()[:, None, None] + middle
    # Adding zero turns -0.0 into 0.0, so that equal paths have equal bytes.
    return Cameras(w2c.float() + 0.0, intrinsics, image_height, image_width)


def write_gui_path(path: str | Path, cameras: Cameras, *, every: int = 1) -> None:
    """Write cameras as a path that the released viewer loads, with straight pieces between its keyframes.

    A path of even speed survives writing and reading. The format has one focal length per keyframe, the vertical one,
    and no principal point; what differs from that is lost.

    Args:
        path: the JSON file.
        cameras: at least one camera.
        every: distance between keyframes in cameras; the last camera is always one.

    Raises:
        ValueError: `every` is not positive, or there is no camera.
    """
    count = len(cameras)
    if every < 1 or count == 0:
        raise ValueError(f"keyframes need a positive distance and a camera, not {every} and {count} cameras")
    index = sorted({*range(0, count, every), count - 1})
    chosen = Cameras(cameras.w2c.double(), cameras.intrinsics, cameras.image_height, cameras.image_width)[index]
    w, x, y, z = matrix_to_quaternion(chosen.w2c[:, :3, :3].transpose(-1, -2)).unbind(-1)
    fov_deg = torch.rad2deg(2 * torch.atan(0.5 * chosen.image_height / chosen.intrinsics[:, 1, 1].double()))
    seconds = count / _FRAMES_PER_SECOND
    content = {
        "loop": False,
        "time": 0.0,
        "path": [
            {
                "R": rotation,
                "T": centre,
                "fov": fov,
                # The viewer spaces keyframes evenly and refuses a time of zero.
                "timestamp": seconds * (number + 1) / len(index),
                "up_dir": [0.0, -1.0, 0.0],
            }
            for number, (rotation, centre, fov) in enumerate(
                zip(torch.stack([x, y, z, w], -1).tolist(), chosen.centres.tolist(), fov_deg.tolist(), strict=True)
            )
        ],
        "duration_seconds": seconds,
        "spline_order": 1,
    }
    Path(path).write_text(json.dumps(content), encoding="utf-8")


def _weights(order: int, t: Float[Tensor, "n"]) -> Float[Tensor, "n 4"]:
    """Uniform B-spline weights of the control points i-1 to i+2 at a share t of the piece from i to i+1."""
    zero = torch.zeros_like(t)
    if order == 0:
        near = torch.floor(t + 0.5)
        columns = [zero, 1 - near, near, zero]
    elif order == 1:
        columns = [zero, 1 - t, t, zero]
    elif order == 2:
        columns = [(1 - t) ** 2 / 2, (-2 * t**2 + 2 * t + 1) / 2, t**2 / 2, zero]
    else:
        inner = [3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1]
        columns = [(1 - t) ** 3 / 6, inner[0] / 6, inner[1] / 6, t**3 / 6]
    return torch.stack(columns, dim=-1)


def _at(control: _Keyframes, times: Float[Tensor, "n"], order: int) -> _Keyframes:
    """The spline at times from 0 (first control point) to 1 (last)."""
    pieces = len(control.fov_deg) - 1
    position = times * pieces
    piece = position.floor().clamp(0, pieces - 1)
    weights = _weights(order, position - piece)
    index = (piece.long()[:, None] + torch.arange(-1, 3)).clamp(0, pieces)
    near = control[index]
    # Quaternions are added with the sign that is nearer to the sum so far (released viewer).
    total = weights[:, :1] * near.quaternions[:, 0]
    for number in range(1, 4):
        term = weights[:, number, None] * near.quaternions[:, number]
        total = total + torch.where((total * term).sum(-1, keepdim=True) < 0, -term, term)
    return _Keyframes(
        torch.nn.functional.normalize(total, dim=-1),
        (weights[..., None] * near.centres).sum(1),
        (weights * near.fov_deg).sum(1),
    )


def _even_times(control: _Keyframes, order: int, frames: int) -> Float[Tensor, "n"]:
    """Times between which the camera moves equal distances, measured on a dense sampling of the curve."""
    dense = torch.linspace(0, 1, max(_DENSITY * frames, frames + 1), dtype=torch.float64)
    steps = _at(control, dense, order).centres.diff(dim=0).norm(dim=-1)
    travelled = torch.cat([steps.new_zeros(1), steps.cumsum(0)])
    even = torch.linspace(0, 1, frames, dtype=torch.float64)
    if float(travelled[-1]) <= _STANDING:
        return even
    wanted = even * travelled[-1]
    after = torch.searchsorted(travelled, wanted).clamp(1, len(dense) - 1)
    share = (wanted - travelled[after - 1]) / (travelled[after] - travelled[after - 1]).clamp_min(1e-12)
    times = torch.lerp(dense[after - 1], dense[after], share)
    times[-1] = 1.0
    times[0] = 0.0
    return times


def _looks_like_npz(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(_ZIP_MAGIC)) == _ZIP_MAGIC
    except OSError:
        return False  # The reader of JSON says what is wrong with it.


def _read_object(path: Path) -> dict[str, Any]:
    """The JSON object of a file; every way it can be unreadable becomes one sentence."""
    if not path.exists():
        raise UserError(f"There is no camera path at {path}; check the name or choose a preset.")
    try:
        size = path.stat().st_size
        if size > _MAX_BYTES:
            raise UserError(f"{path.name} has {size / 2**20:.0f} MB; save a camera path of at most 16 MB.")
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except UserError:
        raise
    # Too deeply nested JSON ends in a RecursionError.
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{path.name} is neither JSON nor an npz file; save the camera path again in the viewer."
        ) from error
    if not isinstance(content, dict) or not isinstance(content.get("path"), list):
        raise UserError(f'{path.name} is JSON without a list "path"; save the camera path again in the viewer.')
    return content


def _read_keyframes(path: Path, content: dict[str, Any]) -> _Keyframes:
    """The checked keyframes of a file."""
    entries = content["path"]
    if not entries:
        raise UserError(f"{path.name} has no keyframes; add at least one in the viewer and save the path again.")
    rows = []
    for number, entry in enumerate(entries):
        where = f"In keyframe {number} of {path.name}"
        if not isinstance(entry, dict):
            raise UserError(f'{where} there is no object; save R, T and fov as {{"R": ..., "T": ..., "fov": ...}}.')
        rotation = _numbers(where, entry, "R", 4)
        centre = _numbers(where, entry, "T", 3)
        (fov,) = _numbers(where, {"fov": [entry.get("fov")]}, "fov", 1)
        length = math.hypot(*rotation)
        if length < 1e-6:
            raise UserError(f'{where} the quaternion "R" has length zero; save a unit one in the order x, y, z, w.')
        if not _MIN_FOV <= fov <= _MAX_FOV:
            raise UserError(
                f"{where} the field of view is {fov:g} degrees; save a vertical one from {_MIN_FOV:g} to {_MAX_FOV:g}."
            )
        x, y, z, w = (component / length for component in rotation)
        rows.append([w, x, y, z, *centre, fov])
    table = torch.tensor(rows, dtype=torch.float64)
    return _Keyframes(table[:, :4], table[:, 4:7], table[:, 7])


def _numbers(where: str, entry: dict[str, Any], key: str, count: int) -> list[float]:
    """A list of `count` finite numbers of a keyframe."""
    values = entry.get(key)
    listed: list[Any] = values if isinstance(values, list) and len(values) == count else [None]
    if any(isinstance(value, bool) or not isinstance(value, int | float) for value in listed):
        amount = "one number" if count == 1 else f"a list of {count} numbers"
        raise UserError(f'{where} "{key}" is missing or wrong; save it as {amount}.')
    # NaN fails every comparison, and a whole number of any size can be compared.
    if not all(-_MAX_NUMBER <= value <= _MAX_NUMBER for value in listed):
        raise UserError(f'{where} "{key}" holds a number that is not finite or over 1e9; save it without them.')
    return [float(value) for value in listed]


def _spline_order(path: Path, content: dict[str, Any]) -> int:
    order = content.get("spline_order", 3)
    if isinstance(order, bool) or order not in _ORDERS:
        raise UserError(f'The "spline_order" in {path.name} is not 0, 1, 2 or 3; save 3 for a smooth path.')
    return int(order)


def _is_loop(path: Path, content: dict[str, Any]) -> bool:
    loop = content.get("loop", False)
    if not isinstance(loop, bool):
        raise UserError(f'The value "loop" in {path.name} is neither true nor false; save false for an open path.')
    return loop
