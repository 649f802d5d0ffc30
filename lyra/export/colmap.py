"""How are a walkthrough's cameras and points kept as a COLMAP model, and what if such a model is wrong?

`sparse/0` with cameras, images and points3D, binary or text, beside `images`: the layout that trainers of Gaussians and
radiance fields read. COLMAP's world and cameras are OpenCV's, as ours, but the centre of its top left pixel is at
(0.5, 0.5), where ours is at (0, 0): principal points and observations move by half a pixel on the way out and in.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from numpy.typing import NDArray
from torch import Tensor

from lyra.errors import UserError
from lyra.export.files import one_line, replacing_folder
from lyra.export.frames import (
    MAX_POINTS,
    ColouredPoints,
    PosedFrames,
    coloured_points,
    frame_name,
    require_frames,
    write_images,
)
from lyra.geometry.rotations import matrix_to_quaternion, quaternion_to_matrix, world_to_camera
from lyra.types import Cameras

SIMPLE_PINHOLE, PINHOLE = 0, 1
"""COLMAP's numbers of the camera models that can be read; the second is written."""
_NAMES = {"SIMPLE_PINHOLE": SIMPLE_PINHOLE, "PINHOLE": PINHOLE}
_PARAMETERS = {SIMPLE_PINHOLE: 3, PINHOLE: 4}
_HALF_PIXEL = 0.5
_MODEL = Path("sparse") / "0"
_IMAGE = struct.Struct("<I7dI")
_UNREADABLE = (OSError, ValueError, KeyError, IndexError, struct.error, MemoryError, OverflowError)


@dataclass(frozen=True)
class ColmapModel:
    """What a model holds, in this project's conventions."""

    names: list[str]
    """File names of the images, in the order of the cameras."""
    cameras: Cameras
    points: Float[Tensor, "p 3"]
    colours: UInt8[Tensor, "p 3"]


@dataclass(frozen=True)
class _Camera:
    """A pinhole camera as COLMAP has it: fx, fy, cx, cy with pixel centres at +0.5."""

    width: int
    height: int
    parameters: tuple[float, float, float, float]

    @classmethod
    def of_model(cls, model: int, width: int, height: int, numbers: tuple[float, ...]) -> _Camera:
        """From the numbers of a model."""
        if model not in _PARAMETERS or len(numbers) != _PARAMETERS[model]:
            raise ValueError(f"camera model {model} is not a pinhole; undistort the images first")
        fy, cx, cy = numbers[-3:]
        return cls(width, height, (numbers[0], fy, cx, cy))

    def matrix(self) -> list[list[float]]:
        """The intrinsics with pixel centres at integers."""
        fx, fy, cx, cy = self.parameters
        return [[fx, 0.0, cx - _HALF_PIXEL], [0.0, fy, cy - _HALF_PIXEL], [0.0, 0.0, 1.0]]


@dataclass(frozen=True)
class _Image:
    """An image as COLMAP has it; identifiers of images and cameras count from one."""

    identifier: int
    pose: tuple[float, ...]
    """Rotation as wxyz and translation, world to camera."""
    camera: int
    name: str


def write_colmap(
    folder: Path, posed: PosedFrames, *, text: bool = False, max_points: int = MAX_POINTS, provenance: str = ""
) -> None:
    """Write images and model; frames with the same intrinsics share a camera, each point has one observation.

    Args:
        folder: a new folder, or an earlier export to replace.
        posed: the frames, with depth for the points.
        text: write the text form, which has a place for the provenance, instead of the binary one.
        max_points: limit of points.
        provenance: where the walkthrough comes from.

    Raises:
        UserError: there are no frames, their number or size is not the cameras', or the folder holds other files.
    """
    require_frames(folder, posed)
    cameras, used = _shared_cameras(posed.cameras)
    rotations = matrix_to_quaternion(posed.cameras.w2c[:, :3, :3].detach().cpu().double())
    poses = torch.cat([rotations, posed.cameras.w2c[:, :3, 3].detach().cpu().double()], dim=1).tolist()
    images = [_Image(i + 1, tuple(pose), used[i] + 1, f"{frame_name(i)}.png") for i, pose in enumerate(poses)]
    points = coloured_points(posed, max_points)
    with replacing_folder(folder, {"images", "sparse"}) as temporary:
        write_images(temporary / "images", posed.frames)
        (temporary / _MODEL).mkdir(parents=True)
        (_write_text if text else _write_binary)(temporary / _MODEL, cameras, images, points, provenance)


def read_colmap(folder: Path) -> ColmapModel:
    """Read a binary or text model of pinhole cameras of one size; images in the order of their names.

    Raises:
        UserError: there is no model in the folder, it cannot be read, or its cameras are no pinholes of one size.
    """
    places = [folder / _MODEL, folder / "sparse", folder]
    endings = [(place, end) for place in places for end in ("bin", "txt") if (place / f"images.{end}").exists()]
    if not endings:
        raise UserError(f"There is no COLMAP model in {folder}; choose the folder that holds sparse/0.")
    place, end = endings[0]
    try:
        if end == "bin":
            cameras, images = _read_binary_cameras(place), _read_binary_images(place)
            points, colours = _read_binary_points(place)
        else:
            cameras, images = _read_text_cameras(place), _read_text_images(place)
            points, colours = _read_text_points(place)
        images.sort(key=lambda image: image.name)
        sizes = {(cameras[image.camera].height, cameras[image.camera].width) for image in images}
        if len(sizes) != 1:
            raise ValueError(f"its images have {len(sizes)} sizes and not one")
        poses = torch.tensor([image.pose for image in images], dtype=torch.float64)
        rotation, translation = quaternion_to_matrix(poses[:, :4]), poses[:, 4:]
        centres = -(rotation.transpose(1, 2) @ translation[..., None])[..., 0]
        intrinsics = torch.tensor([cameras[image.camera].matrix() for image in images])
        path = Cameras(world_to_camera(rotation, centres).float(), intrinsics, *sizes.pop())
        return ColmapModel([i.name for i in images], path, torch.from_numpy(points), torch.from_numpy(colours))
    except _UNREADABLE as error:
        raise UserError(f"The COLMAP model in {place} cannot be read ({error}); export it again.") from error


def _shared_cameras(path: Cameras) -> tuple[list[_Camera], list[int]]:
    """The different cameras of a path and which of them each frame has."""
    k = path.intrinsics.detach().cpu().double()
    numbers = torch.stack([k[:, 0, 0], k[:, 1, 1], k[:, 0, 2] + _HALF_PIXEL, k[:, 1, 2] + _HALF_PIXEL], dim=1)
    different, used = numbers.unique(dim=0, return_inverse=True)
    cameras = [_Camera(path.image_width, path.image_height, (fx, fy, cx, cy)) for fx, fy, cx, cy in different.tolist()]
    return cameras, used.tolist()


def _write_binary(
    folder: Path, cameras: list[_Camera], images: list[_Image], points: ColouredPoints, provenance: str
) -> None:
    """The binary form, which has no place for the provenance."""
    with (folder / "cameras.bin").open("wb") as file:
        file.write(struct.pack("<Q", len(cameras)))
        for number, camera in enumerate(cameras):
            file.write(struct.pack("<IiQQ4d", number + 1, PINHOLE, camera.width, camera.height, *camera.parameters))
    observed = np.dtype([("pixel", "<f8", 2), ("point", "<u8")])
    with (folder / "images.bin").open("wb") as file:
        file.write(struct.pack("<Q", len(images)))
        for image, (pixels, identifiers) in zip(images, _observations(points, len(images)), strict=True):
            file.write(_IMAGE.pack(image.identifier, *image.pose, image.camera) + image.name.encode() + b"\0")
            table = np.empty(len(pixels), observed)
            table["pixel"], table["point"] = pixels, identifiers
            file.write(struct.pack("<Q", len(table)) + table.tobytes())
    table = np.empty(len(points.positions), _point_record(1))
    table["id"], table["error"], table["length"] = np.arange(1, len(table) + 1), 0, 1
    table["xyz"], table["rgb"] = points.positions.numpy(), points.colours.numpy()
    table["track"] = _tracks(points)
    with (folder / "points3D.bin").open("wb") as file:
        file.write(struct.pack("<Q", len(table)) + table.tobytes())


def _write_text(
    folder: Path, cameras: list[_Camera], images: list[_Image], points: ColouredPoints, provenance: str
) -> None:
    """The text form; each file may begin with comments."""
    note = f"# {one_line(provenance)}\n" if provenance else ""
    lines = [
        f"{number + 1} PINHOLE {camera.width} {camera.height} {' '.join(map(repr, camera.parameters))}\n"
        for number, camera in enumerate(cameras)
    ]
    (folder / "cameras.txt").write_text(note + "".join(lines), encoding="utf-8")
    lines = []
    for image, (pixels, identifiers) in zip(images, _observations(points, len(images)), strict=True):
        lines.append(f"{image.identifier} {' '.join(map(repr, image.pose))} {image.camera} {image.name}\n")
        seen = zip(pixels.tolist(), identifiers.tolist(), strict=True)
        lines.append(" ".join(f"{x:g} {y:g} {point}" for (x, y), point in seen) + "\n")
    (folder / "images.txt").write_text(note + "".join(lines), encoding="utf-8")
    rows = zip(points.positions.tolist(), points.colours.tolist(), _tracks(points).tolist(), strict=True)
    lines = [
        f"{number + 1} {x:.7g} {y:.7g} {z:.7g} {r} {g} {b} 0 {image} {place}\n"
        for number, ((x, y, z), (r, g, b), (image, place)) in enumerate(rows)
    ]
    (folder / "points3D.txt").write_text(note + "".join(lines), encoding="utf-8")


def _point_record(track: int) -> np.dtype:
    """A point in the binary form, seen in `track` images."""
    fields = [("id", "<u8"), ("xyz", "<f8", 3), ("rgb", "u1", 3), ("error", "<f8"), ("length", "<u8")]
    return np.dtype([*fields, ("track", "<u4", (2 * track,))])


def _observations(points: ColouredPoints, images: int) -> Iterator[tuple[NDArray[np.floating], NDArray[np.int64]]]:
    """Pixels and point identifiers of each image."""
    for image in range(images):
        seen = (points.frames == image).nonzero()[:, 0].numpy()
        yield points.pixels[seen].numpy() + _HALF_PIXEL, seen + 1


def _tracks(points: ColouredPoints) -> NDArray[np.int64]:
    """For each point the identifier of its image and its place among what that image sees; points come by image."""
    frames = points.frames.numpy()
    first = np.searchsorted(frames, frames)
    return np.stack([frames + 1, np.arange(len(frames)) - first], axis=1)


def _read_binary_cameras(folder: Path) -> dict[int, _Camera]:
    """Cameras by identifier."""
    data, at = (folder / "cameras.bin").read_bytes(), 8
    cameras = {}
    for _ in range(struct.unpack_from("<Q", data)[0]):
        identifier, model, width, height = struct.unpack_from("<IiQQ", data, at)
        # An unknown model is refused below, so how many numbers it has does not matter.
        numbers = struct.unpack_from(f"<{_PARAMETERS.get(model, 0)}d", data, at + 24)
        cameras[identifier] = _Camera.of_model(model, width, height, numbers)
        at += 24 + 8 * len(numbers)
    return cameras


def _read_binary_images(folder: Path) -> list[_Image]:
    """Images without their observations."""
    data, at = (folder / "images.bin").read_bytes(), 8
    images = []
    for _ in range(struct.unpack_from("<Q", data)[0]):
        identifier, *pose, camera = _IMAGE.unpack_from(data, at)
        end = data.index(b"\0", at + _IMAGE.size)
        images.append(_Image(identifier, tuple(pose), camera, data[at + _IMAGE.size : end].decode()))
        at = end + 9 + 24 * struct.unpack_from("<Q", data, end + 1)[0]
    return images


def _read_binary_points(folder: Path) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Positions and colours; points of other programs are seen in any number of images."""
    data, at = (folder / "points3D.bin").read_bytes(), 8
    count = struct.unpack_from("<Q", data)[0]
    if len(data) == 8 + count * _point_record(1).itemsize:
        table = np.frombuffer(data, _point_record(1), count, 8)
        if (table["length"] == 1).all():
            return table["xyz"].astype(np.float32), table["rgb"].copy()
    rows = []
    for _ in range(count):
        rows.append(struct.unpack_from("<Q3d3BdQ", data, at))
        at += 51 + 8 * rows[-1][-1]
    return _points([row[1:4] for row in rows], [row[4:7] for row in rows])


def _read_text_cameras(folder: Path) -> dict[int, _Camera]:
    """Cameras by identifier."""
    cameras = {}
    for words in _text_lines(folder / "cameras.txt"):
        if words:
            model, numbers = _NAMES.get(words[1], -1), tuple(map(float, words[4:]))
            cameras[int(words[0])] = _Camera.of_model(model, int(words[2]), int(words[3]), numbers)
    return cameras


def _read_text_images(folder: Path) -> list[_Image]:
    """Images without their observations, which are every second line and may be empty."""
    lines = list(_text_lines(folder / "images.txt"))[::2]
    return [
        _Image(int(words[0]), tuple(map(float, words[1:8])), int(words[8]), " ".join(words[9:]))
        for words in lines
        if words
    ]


def _read_text_points(folder: Path) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Positions and colours."""
    rows = [words for words in _text_lines(folder / "points3D.txt") if words]
    return _points([tuple(map(float, row[1:4])) for row in rows], [tuple(map(int, row[4:7])) for row in rows])


def _text_lines(path: Path) -> Iterator[list[str]]:
    """The words of each line that is not a comment."""
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            yield line.split()


def _points(
    positions: list[tuple[float, ...]], colours: list[tuple[int, ...]]
) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Arrays of three columns, also when there are no rows."""
    return np.array(positions, np.float32).reshape(-1, 3), np.array(colours, np.uint8).reshape(-1, 3)
