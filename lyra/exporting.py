"""Which file formats can a world be written in, what does each need, and where do the files go?

The formats themselves are `lyra.export`, one a file. Everything lands in the world's `exports` folder.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import get_args

from lyra.config import FormatName
from lyra.errors import UserError
from lyra.export.colmap import write_colmap
from lyra.export.frames import PosedFrames, write_frames
from lyra.export.gltf import write_mesh_glb, write_splat_glb
from lyra.export.nerfstudio import write_nerfstudio
from lyra.export.obj import write_obj
from lyra.export.ply import write_splat_ply
from lyra.export.splat import write_splat
from lyra.export.spz import write_spz
from lyra.export.usd import write_usd
from lyra.generation.chunk_store import writing_to
from lyra.lifting import WalkableGround, provenance, read_posed, read_scene, read_surface
from lyra.progress import Progress
from lyra.types import GaussianScene, TriangleMesh
from lyra.world import World

TRAINING_STEP = 4
"""Every n-th frame goes into COLMAP and nerfstudio folders: those whose depth was measured."""


@dataclass(frozen=True)
class WorldParts:
    """A world's parts, each read when a format asks for it and then kept."""

    world: World

    @cached_property
    def scene(self) -> GaussianScene:
        """The splats."""
        return read_scene(self.world)

    @cached_property
    def surface(self) -> tuple[TriangleMesh, TriangleMesh, WalkableGround]:
        """Coloured surface, collider, and which way is up."""
        return read_surface(self.world)

    @cached_property
    def frames(self) -> PosedFrames:
        """All frames with their cameras and measured depth."""
        walkthrough = read_posed(self.world)
        assert walkthrough.cameras is not None
        return PosedFrames(walkthrough.frames, walkthrough.cameras, dict(walkthrough.depths))


@dataclass(frozen=True)
class Format:
    """One way to write a world."""

    file: str
    """Name of the file or folder that is written."""
    readers: str
    """Who reads it, for people."""
    write: Callable[[Path, WorldParts, str], None]
    """Given where, what and by what it was made."""
    of_the_mesh: bool = False
    """It has the surface or the collider in it, which must have been made."""


def _usd(path: Path, parts: WorldParts, made_by: str) -> None:
    surface, collider, ground = parts.surface
    write_usd(
        path,
        parts.scene,
        surface,
        collider,
        up=ground.up,
        cameras=parts.world.cameras,
        drop_points=ground.drop_points,
        provenance=made_by,
    )


FORMATS: dict[FormatName, Format] = {
    "ply": Format(
        "scene.ply",
        "splats for SuperSplat, Blender add-ons, gsplat and most viewers (INRIA layout, OpenCV axes: y down)",
        lambda path, parts, made_by: write_splat_ply(path, parts.scene, made_by),
    ),
    "spz": Format(
        "scene.spz",
        "splats in a seventh of the size, for Spark and Niantic's tools (version 3, y up)",
        lambda path, parts, made_by: write_spz(path, parts.scene, made_by),
    ),
    "splat": Format(
        "scene.splat",
        "splats for antimatter15's viewer and its kin (OpenCV axes: y down)",
        lambda path, parts, made_by: write_splat(path, parts.scene),
    ),
    "glb-splats": Format(
        "scene.glb",
        "splats for glTF viewers that know KHR_gaussian_splatting; a point cloud in others",
        lambda path, parts, made_by: write_splat_glb(path, parts.scene, made_by),
    ),
    "glb": Format(
        "mesh.glb",
        "coloured surface for Blender, browsers and game engines (y up)",
        lambda path, parts, made_by: write_mesh_glb(path, parts.surface[0], made_by),
        of_the_mesh=True,
    ),
    "obj": Format(
        "mesh.obj",
        "coloured surface for MeshLab and CAD (y up)",
        lambda path, parts, made_by: write_obj(path, parts.surface[0], made_by),
        of_the_mesh=True,
    ),
    "usd": Format("scene.usdc", "splats, collider and physics for Isaac Sim and Newton (z up, metres)", _usd, True),
    "usdz": Format("scene.usdz", "the same as one package", _usd, True),
    "colmap": Format(
        "colmap",
        "images, cameras and points for 3DGS trainers",
        lambda path, parts, made_by: write_colmap(path, parts.frames.every(TRAINING_STEP), provenance=made_by),
    ),
    "nerfstudio": Format(
        "nerfstudio",
        "images and transforms.json for nerfstudio",
        lambda path, parts, made_by: write_nerfstudio(path, parts.frames.every(TRAINING_STEP), provenance=made_by),
    ),
    "frames": Format(
        "frames",
        "every frame with its camera, and depth where it was measured",
        lambda path, parts, made_by: write_frames(path, parts.frames, made_by),
    ),
}


def export(world: World, names: Sequence[FormatName], progress: Progress | None = None) -> list[Path]:
    """Write a world in some formats into its exports folder; returns the files and folders.

    Raises:
        UserError: a format is unknown, the world lacks what it needs, or the folder cannot be written.
        Cancelled: the listener asked to stop; what was written stays.
    """
    if unknown := [name for name in names if name not in FORMATS]:
        raise UserError(f"There is no format '{unknown[0]}'; choose from {', '.join(get_args(FormatName))}.")
    progress, parts, written = progress or Progress(), WorldParts(world), []
    made_by = provenance(world)
    for name in dict.fromkeys(names):
        progress.enter(f"Write {name}")
        with writing_to(world.exports):
            world.exports.mkdir(parents=True, exist_ok=True)
            FORMATS[name].write(world.exports / FORMATS[name].file, parts, made_by)
        written.append(world.exports / FORMATS[name].file)
    progress.finish()
    return written
