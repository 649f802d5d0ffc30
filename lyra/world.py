"""The world folder: everything a run makes, readable without this project (DESIGN.md section 4).

Reads and writes the folder's files; knows no model. A finished walkthrough has photo.png, walkthrough.mp4, cameras.npz,
depth.safetensors and run.json; lifting adds scene.ply. A folder with nothing but a walkthrough.mp4 is a world too:
lifting estimates the rest.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lyra.errors import UserError
from lyra.export.files import replacing_path
from lyra.export.video import VideoFrames, read_video
from lyra.generation.chunk_store import ChunkStore, writing_to
from lyra.trajectory.files import read_trajectory, write_trajectory
from lyra.types import Cameras


@dataclass(frozen=True)
class World:
    """A folder with a walkthrough and what was made from it."""

    folder: Path

    @classmethod
    def open(cls, folder: Path) -> World:
        """An existing world.

        Raises:
            UserError: the folder holds no walkthrough.
        """
        world = cls(folder)
        if not folder.is_dir():
            raise UserError(
                f"There is no folder {folder}; make a world with `python -m lyra generate PHOTO --out {folder}`."
            )
        if not world.video_path.exists():
            raise UserError(
                f"{folder} holds no finished walkthrough ({world.video_path.name} missing); "
                f"run `python -m lyra generate PHOTO --out {folder}` first."
            )
        return world

    @property
    def photo_path(self) -> Path:
        """The photo as the model saw it, at output size."""
        return self.folder / "photo.png"

    @property
    def video_path(self) -> Path:
        """The walkthrough, 16 frames a second."""
        return self.folder / "walkthrough.mp4"

    @property
    def cameras_path(self) -> Path:
        """The path in the released trajectory format."""
        return self.folder / "cameras.npz"

    @property
    def depth_path(self) -> Path:
        """Depth of some frames."""
        return self.folder / "depth.safetensors"

    @property
    def scene_path(self) -> Path:
        """Splats in the INRIA layout."""
        return self.folder / "scene.ply"

    @property
    def packed_scene_path(self) -> Path:
        """The same splats as SPZ, a seventh of the size."""
        return self.folder / "scene.spz"

    @property
    def mesh_path(self) -> Path:
        """Coloured surface (glTF axes: y up)."""
        return self.folder / "mesh.glb"

    @property
    def collider_path(self) -> Path:
        """What things stand on, without a hole under the walked area (y up)."""
        return self.folder / "collider.obj"

    @property
    def ground_path(self) -> Path:
        """Which way is up, and places over walkable ground."""
        return self.folder / "collider.json"

    @property
    def exports(self) -> Path:
        """Folder of the files in other formats."""
        return self.folder / "exports"

    def forget_lifting(self) -> None:
        """Delete the splats and what was made from them, because the walkthrough is about to be another one."""
        for path in (self.scene_path, self.packed_scene_path):
            path.unlink(missing_ok=True)
        self.forget_mesh()

    def forget_mesh(self) -> None:
        """Delete the surface, the collider and the exports, because the splats are about to be others."""
        for path in (self.mesh_path, self.collider_path, self.ground_path):
            path.unlink(missing_ok=True)
        shutil.rmtree(self.exports, ignore_errors=True)

    @property
    def chunks(self) -> ChunkStore:
        """Finished chunks by content key."""
        return ChunkStore(self.folder / "chunks")

    @property
    def video(self) -> UInt8[Tensor, "t 3 h w"]:
        """All frames of the walkthrough, decoded.

        Raises:
            UserError: the file is missing or damaged.
        """
        return read_video(self.video_path)

    @property
    def frames(self) -> VideoFrames:
        """The frames of the walkthrough, each decoded when it is asked for.

        Raises:
            UserError: the file is missing or damaged.
        """
        return VideoFrames.open(self.video_path)

    @property
    def cameras(self) -> Cameras:
        """Cameras of all frames.

        Raises:
            UserError: they are not known yet, or the file is damaged.
        """
        if not self.cameras_path.exists():
            raise UserError(
                f"{self.folder} has no cameras; run `python -m lyra reconstruct {self.folder}`, which estimates them."
            )
        return read_trajectory(self.cameras_path)

    @property
    def depth(self) -> dict[int, Float[Tensor, "h w"]]:
        """Measured depth by frame number, in the units of the photo's depth; empty where nothing is measured.

        Raises:
            UserError: the file is damaged.
        """
        if not self.depth_path.exists():
            return {}
        try:
            tensors = load_file(self.depth_path)
            maps, ids = tensors["depth"].float(), tensors["frame_ids"].tolist()
            if maps.ndim != 3 or len(maps) != len(ids):
                raise ValueError(f"maps of shape {tuple(maps.shape)} for {len(ids)} frames")
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{self.depth_path} cannot be read ({error}); restore it, or delete it to have depth estimated."
            ) from error
        return {int(frame): depth for frame, depth in zip(ids, maps, strict=True)}

    @property
    def run(self) -> dict[str, Any]:
        """The contents of run.json; empty when there is none."""
        path = self.folder / "run.json"
        if not path.exists():
            return {}
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError) as error:
            raise UserError(f"{path} cannot be read ({error}); delete it and run the job again.") from error

    def write_run(self, values: dict[str, Any]) -> None:
        """Replace run.json at once.

        Raises:
            UserError: the disk is full or cannot be written.
        """
        with writing_to(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            with replacing_path(self.folder / "run.json") as temporary:
                temporary.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")

    def write_photo(self, photo: UInt8[Tensor, "3 h w"]) -> None:
        """Save the photo.

        Raises:
            UserError: the disk is full or cannot be written.
        """
        with writing_to(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(photo.movedim(0, -1).numpy()).save(self.photo_path)

    def write_path(self, cameras: Cameras, depths: dict[int, Float[Tensor, "h w"]]) -> None:
        """Save cameras and measured depth.

        Raises:
            UserError: the disk is full or cannot be written.
        """
        self.write_cameras(cameras)
        self.write_depth(depths)

    def write_cameras(self, cameras: Cameras) -> None:
        """Save the cameras of all frames.

        Raises:
            UserError: the disk is full or cannot be written.
        """
        with writing_to(self.folder), replacing_path(self.cameras_path) as temporary:
            write_trajectory(temporary, cameras)

    def write_depth(self, depths: Mapping[int, Float[Tensor, "h w"]]) -> None:
        """Save measured depth, maps of one size by frame number.

        Raises:
            UserError: the disk is full or cannot be written.
        """
        ids = sorted(depths)
        tensors = {
            "frame_ids": torch.tensor(ids),
            "depth": torch.stack([depths[i] for i in ids]).to("cpu", torch.float32).contiguous(),
        }
        with writing_to(self.folder), replacing_path(self.depth_path) as temporary:
            save_file(tensors, temporary)
