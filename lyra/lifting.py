"""From a world's walkthrough to splats, a surface and a collider: stage two, on the files of a world folder.

Joins the reconstructors, the renderer and the mesh; needs no video model. Which files other programs read is
`lyra.exporting`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from lyra import __version__
from lyra.config import MeshJob, ReconstructJob
from lyra.depth.base import SKY_DEPTH
from lyra.errors import UserError
from lyra.export.gltf import read_mesh_glb, write_mesh_glb
from lyra.export.obj import read_obj, write_obj
from lyra.export.ply import read_splat_ply, write_splat_ply
from lyra.export.spz import write_spz
from lyra.generation.chunk_store import writing_to
from lyra.generation.walkthrough import from_uint8
from lyra.geometry.resample import enlarge_depth
from lyra.progress import Progress
from lyra.reconstruction.base import Reconstruction, Reconstructor, Walkthrough
from lyra.reconstruction.collider import Collider, make_collider, walkable
from lyra.reconstruction.odometry import EstimatedCameras, estimate_cameras
from lyra.reconstruction.pose_report import compare_cameras
from lyra.reconstruction.rasterizer import choose_renderer
from lyra.reconstruction.surface import SurfaceSettings, extract_surface
from lyra.reconstruction.tsdf import DepthFrame, fuse
from lyra.types import GaussianScene, TriangleMesh
from lyra.world import World

ESTIMATE = "Estimate cameras"
OF_RECONSTRUCTION = ("Read walkthrough", ESTIMATE, "Lift to splats", "Write splats")
OF_MESH = ("Render depth", "Fuse depth", "Surface", "Collider", "Write mesh")
"""Stages as they are entered; the second one only for estimated cameras."""
SOLID = 0.5
"""Share of light that splats must stop for a pixel's rendered depth to count."""
SKY_MARGIN = 4
"""Pixels around measured sky whose rendered depth is not used: splats reach over the border of what they show."""
DROP_PLACES = 40
"""Places over walkable ground that are kept for simulators."""


@dataclass(frozen=True)
class WalkableGround:
    """What a simulator has to know of a world besides its meshes."""

    up: Float[Tensor, "3"]
    """Unit vector in OpenCV world axes."""
    drop_points: Float[Tensor, "n 3"]
    """Places over walkable ground from which things can be dropped."""


def reconstruct(
    world: World, job: ReconstructJob, reconstructor: Reconstructor, progress: Progress | None = None
) -> GaussianScene:
    """Lift a walkthrough to splats; writes scene.ply and scene.spz.

    Raises:
        UserError: the walkthrough cannot be lifted in this way, or the folder cannot be written.
        Cancelled: the listener asked to stop; what was there before is as it was.
    """
    progress = progress or Progress()
    with noting_in_run(world, "reconstruct", progress) as notes:
        progress.enter("Read walkthrough")
        walkthrough = read_walkthrough(world)
        told = walkthrough
        if job.poses == "estimated" and job.reconstructor != "depth-anything":
            progress.enter(ESTIMATE)
            found = estimated_cameras(walkthrough, progress)
            told = replace(walkthrough, cameras=found.cameras)
            notes["trusted_poses"] = round(float(found.trusted.float().mean()), 3)
        elif job.poses == "estimated":
            told = replace(walkthrough, cameras=None)
        progress.enter("Lift to splats")
        lifted = reconstructor.reconstruct(told, progress.step)
        if job.poses == "estimated" and walkthrough.cameras is not None:
            commanded = walkthrough.cameras[list(lifted.frame_ids)]
            notes["pose_note"] = compare_cameras(commanded, lifted.cameras).describe()
        progress.enter("Write splats")
        write_scene(world, lifted)
        notes |= {
            "reconstructor": job.reconstructor or "geometric",
            "poses": job.poses,
            "splats": len(lifted.scene),
            "frames": len(lifted.frame_ids),
        }
    return lifted.scene


def read_walkthrough(world: World) -> Walkthrough:
    """The frames of a world with their cameras and measured depth.

    Raises:
        UserError: the video is damaged or has another number of frames than cameras.
    """
    try:
        frames = world.video
    except (OSError, RuntimeError) as error:
        raise UserError(f"{world.video_path} cannot be read ({error}); generate the walkthrough again.") from error
    cameras = world.cameras
    if len(frames) != len(cameras):
        raise UserError(
            f"{world.video_path} has {len(frames)} frames, but there are {len(cameras)} cameras; generate the "
            "walkthrough again, or restore its files."
        )
    return Walkthrough(frames, cameras, world.depth)


def estimated_cameras(walkthrough: Walkthrough, progress: Progress) -> EstimatedCameras:
    """Cameras found in the video, with the commanded ones as a guess."""
    guess = walkthrough.cameras
    if guess is None:
        raise UserError("This walkthrough has no intrinsics to estimate its cameras with; restore its cameras.npz.")
    return estimate_cameras(
        walkthrough.frames, dict(walkthrough.depths), guess.intrinsics, guess=guess, check=progress.step
    )


def write_scene(world: World, lifted: Reconstruction) -> None:
    """Write the splats; a surface of earlier ones is deleted."""
    with writing_to(world.folder):
        write_splat_ply(world.scene_path, lifted.scene, provenance(world))
        write_spz(world.packed_scene_path, lifted.scene, provenance(world))
        world.forget_mesh()


def mesh(world: World, job: MeshJob, progress: Progress | None = None) -> TriangleMesh:
    """A world's splats as a coloured surface and a collider; writes mesh.glb, collider.obj and collider.json.

    Depth is rendered from the merged splats, so the surface is that of what is seen and not of single frames.

    Raises:
        UserError: there are no splats yet, they show no surface, or the folder cannot be written.
        Cancelled: the listener asked to stop; what was there before is as it was.
    """
    progress = progress or Progress()
    scene = read_scene(world)
    with noting_in_run(world, "mesh", progress) as notes:
        progress.enter("Render depth")
        walkthrough = read_walkthrough(world)
        frames = rendered_frames(scene, walkthrough, progress)
        progress.enter("Fuse depth")
        field = fuse(frames, voxel=job.voxel, check=progress.step)
        progress.enter("Surface")
        surface = extract_surface(field, SurfaceSettings(max_faces=job.triangles))
        progress.enter("Collider")
        collider = make_collider(surface, world.cameras, max_faces=job.collider_triangles)
        ground = WalkableGround(collider.up, walkable(collider, DROP_PLACES))
        progress.enter("Write mesh")
        write_surface(world, surface, collider, ground)
        notes |= {
            "triangles": len(surface.faces),
            "collider_triangles": len(collider.mesh.faces),
            "voxel": round(field.voxel, 5),
        }
    return surface


def rendered_frames(scene: GaussianScene, walkthrough: Walkthrough, progress: Progress) -> list[DepthFrame]:
    """The splats' depth in the frames that were measured, with the video's colours and without the sky."""
    video, cameras, measured = walkthrough.frames, walkthrough.cameras, walkthrough.depths
    assert cameras is not None
    height, width = video.shape[-2:]
    renderer = choose_renderer(scene, "median")
    frames = []
    for done, index in enumerate(sorted(measured)):
        w2c, intrinsics = cameras.w2c[index], cameras.intrinsics[index]
        view = renderer.render(w2c, intrinsics, height, width)
        sky = (enlarge_depth(measured[index], (height, width)) > SKY_DEPTH / 5).float()
        near_sky = F.max_pool2d(sky[None], 2 * SKY_MARGIN + 1, stride=1, padding=SKY_MARGIN)[0] > 0
        solid = (view.alpha > SOLID) & ~near_sky
        frames.append(DepthFrame(view.depth, from_uint8(video[index]), w2c, intrinsics, weight=solid.float()))
        progress.step(done + 1, len(measured))
    return frames


def write_surface(world: World, surface: TriangleMesh, collider: Collider, ground: WalkableGround) -> None:
    """Write the surface and what simulators need; exports of an earlier one are deleted."""
    with writing_to(world.folder):
        world.forget_mesh()
        write_mesh_glb(world.mesh_path, surface, provenance(world))
        write_obj(world.collider_path, collider.mesh, provenance(world), colours=False)
        values = {"up": ground.up.tolist(), "drop_points": ground.drop_points.tolist()}
        world.ground_path.write_text(json.dumps(values) + "\n", encoding="utf-8")


def read_scene(world: World) -> GaussianScene:
    """The splats of a world.

    Raises:
        UserError: there are none yet, or the file is damaged.
    """
    if not world.scene_path.exists():
        raise UserError(f"{world.folder} has no splats yet; run `python -m lyra reconstruct {world.folder}` first.")
    try:
        return read_splat_ply(world.scene_path)
    except ValueError as error:
        raise UserError(f"{error}; run `python -m lyra reconstruct {world.folder}` again.") from error


def read_surface(world: World) -> tuple[TriangleMesh, TriangleMesh, WalkableGround]:
    """The surface, the collider and the ground of a world.

    Raises:
        UserError: there are none yet, or a file is damaged.
    """
    missing = [p.name for p in (world.mesh_path, world.collider_path, world.ground_path) if not p.exists()]
    if missing:
        raise UserError(f"{world.folder} has no mesh yet; run `python -m lyra mesh {world.folder}` first.")
    try:
        values = json.loads(world.ground_path.read_text(encoding="utf-8"))
        ground = WalkableGround(torch.tensor(values["up"]), torch.tensor(values["drop_points"]).reshape(-1, 3))
        return read_mesh_glb(world.mesh_path), read_obj(world.collider_path), ground
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"The mesh in {world.folder} is damaged ({error}); run `python -m lyra mesh {world.folder}` again."
        ) from error


def provenance(world: World) -> str:
    """One line that says what made a world, for the files' metadata."""
    model = world.run.get("model", {})
    name, licence = model.get("name", "an unknown model"), model.get("licence", "an unknown licence")
    return f"Lyra {__version__}, {name}, weights under {licence}"


@contextmanager
def noting_in_run(world: World, entry: str, progress: Progress) -> Iterator[dict[str, Any]]:
    """Values for an entry of run.json, which is written with the stages' seconds when the work is finished."""
    notes: dict[str, Any] = {}
    before = dict(progress.stage_seconds)
    yield notes
    progress.finish()
    spent = {name: round(seconds, 2) for name, seconds in progress.stage_seconds.items() if name not in before}
    run = world.run
    run[entry] = notes | {"stage_seconds": spent}
    world.write_run(run)
