"""Every second frame of the default job at a fifth of its size, for tests that need a world but no fine picture."""

import shutil
from pathlib import Path

import torch
from torch.nn import functional as F

from lyra.config import MeshJob, ReconstructJob
from lyra.export.video import write_video
from lyra.lifting import mesh, reconstruct
from lyra.reconstruction.gaussians import GeometricLift
from lyra.world import World

SMALL = (96, 168)
"""Its height and width."""
FRAMES = 41


def small_world(world: World, folder: Path) -> World:
    """A world with every second frame of another one, lifted and meshed."""
    small = World(folder)
    folder.mkdir()
    write_video(small.video_path, F.interpolate(world.video[::2].float(), SMALL, mode="area").round().to(torch.uint8))
    depth = {frame // 2: depth for frame, depth in world.depth.items() if frame % 8 == 0}
    small.write_path(world.cameras[::2].resized(*SMALL), depth)
    small.write_run({"model": world.run["model"]})
    reconstruct(small, ReconstructJob(), GeometricLift())
    mesh(small, MeshJob(triangles=20_000, collider_triangles=5_000))
    return small


def copied(world: World, folder: Path, *without: str) -> World:
    """A copy of a world that lacks some files."""
    shutil.copytree(world.folder, folder, ignore=shutil.ignore_patterns(*without))
    return World(folder)
