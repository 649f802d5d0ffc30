"""The world folder: everything a run makes, readable without this project (DESIGN.md section 4).

Reads and writes the folder's files; knows no model. A finished walkthrough has photo.png, walkthrough.mp4, cameras.npz,
depth.safetensors and run.json; lifting adds scene.ply.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from lyra.errors import UserError
from lyra.export.video import read_video
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
            UserError: the folder holds no finished walkthrough.
        """
        world = cls(folder)
        if not folder.is_dir():
            raise UserError(
                f"There is no folder {folder}; make a world with `python -m lyra generate PHOTO --out {folder}`."
            )
        missing = [p.name for p in (world.video_path, world.cameras_path, world.depth_path) if not p.exists()]
        if missing:
            raise UserError(
                f"{folder} holds no finished walkthrough ({', '.join(missing)} missing); "
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
        """Depth of every fourth frame."""
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
        """All frames of the walkthrough."""
        return read_video(self.video_path)

    @property
    def cameras(self) -> Cameras:
        """Cameras of all frames."""
        return read_trajectory(self.cameras_path)

    @property
    def depth(self) -> dict[int, Float[Tensor, "h w"]]:
        """Measured depth by frame number, in the units of the photo's depth."""
        tensors = load_file(self.depth_path)
        return {int(i): tensors["depth"][k].float() for k, i in enumerate(tensors["frame_ids"])}

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
            temporary = self.folder / ".run.json.tmp"
            temporary.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
            temporary.replace(self.folder / "run.json")

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
        with writing_to(self.folder):
            write_trajectory(self.cameras_path, cameras)
            ids = sorted(depths)
            tensors = {
                "frame_ids": torch.tensor(ids),
                "depth": torch.stack([depths[i] for i in ids]).to("cpu", torch.float32).contiguous(),
            }
            temporary = self.folder / ".depth.tmp"
            save_file(tensors, temporary)
            temporary.replace(self.depth_path)
