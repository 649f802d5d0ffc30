"""From a world's walkthrough to splats, a surface and a collider: stage two, on the files of a world folder.

Joins the reconstructors, the renderer and the mesh; needs no video model. Which files other programs read is
`lyra.exporting`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, overload

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor
from torch.nn import functional as F

from lyra import __version__
from lyra.config import MeshJob, ReconstructJob
from lyra.depth.base import DepthEstimator
from lyra.depth.walk import FARTHEST
from lyra.errors import UserError
from lyra.export.gltf import read_mesh_glb, write_mesh_glb
from lyra.export.obj import read_obj, write_obj
from lyra.export.ply import read_splat_ply, write_splat_ply
from lyra.export.spz import write_spz
from lyra.generation.chunk_store import writing_to
from lyra.generation.walkthrough import from_uint8
from lyra.geometry.resample import enlarge_depth
from lyra.hub import DEFAULT_MODEL
from lyra.placement import Placement
from lyra.progress import Progress
from lyra.reconstruction.base import Reconstruction, Reconstructor, Walkthrough
from lyra.reconstruction.collider import Collider, make_collider, walkable
from lyra.reconstruction.odometry import cameras_of_all, estimate_cameras
from lyra.reconstruction.odometry_depth import (
    estimate_walk,
    in_known_world,
    in_unit_of,
    measured_frames,
    rendered_depth,
)
from lyra.reconstruction.pose_report import compare_cameras
from lyra.reconstruction.rasterizer import choose_renderer
from lyra.reconstruction.surface import SurfaceSettings, extract_surface
from lyra.reconstruction.tsdf import DepthFrame, fuse
from lyra.types import GaussianScene, TriangleMesh
from lyra.world import World

ESTIMATE = "Estimate cameras"
OF_RECONSTRUCTION = ("Read walkthrough", ESTIMATE, "Lift to splats", "Write splats")
OF_MESH = ("Render depth", "Fuse depth", "Surface", "Collider", "Write mesh")
"""Stages as they are entered; the second one only for cameras or depth that are estimated."""
ESTIMATED_CAMERAS = "estimated_cameras"
"""Entry of run.json of a world whose cameras.npz holds what was found in its video."""
SOLID = 0.5
"""Share of light that splats must stop for a pixel's rendered depth to count."""
SKY_MARGIN = 4
"""Pixels around measured sky whose rendered depth is not used: splats reach over the border of what they show."""
SEEN_THROUGH = 1.5
"""A pixel that shows something this many times farther than was measured there looks through thin splats."""
FUSED_PIXELS = 100_000_000
"""Pixels of the frames that are fused, at 8 bytes each: 250 frames of 480x832."""
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
    """Lift a walkthrough to splats; writes scene.ply and scene.spz, and cameras and depth where there are none.

    Raises:
        UserError: the walkthrough cannot be lifted in this way, or the folder cannot be written.
        Cancelled: the listener asked to stop; what was there before is as it was.
    """
    progress = progress or Progress()
    with noting_in_run(world, "reconstruct", progress) as notes:
        progress.enter("Read walkthrough")
        known = read_walkthrough(world)
        told, trusted = known, None
        if job.reconstructor == "depth-anything":
            # It estimates cameras itself.
            told = replace(known, cameras=None) if job.poses == "estimated" else known
        elif job.poses == "estimated" or known.cameras is None or not known.depths:
            progress.enter(ESTIMATE)
            told, trusted = with_estimates(known, job, progress)
        progress.enter("Lift to splats")
        lifted = reconstructor.reconstruct(told, progress.step)
        if told.cameras is None and (known.cameras is not None or known.depths):
            lifted = in_known_world(known, lifted)
        progress.enter("Write splats")
        write_estimates(world, known, told, lifted, trusted)
        write_scene(world, lifted)
        notes |= {
            "reconstructor": job.reconstructor or "geometric",
            "poses": "estimated" if ESTIMATED_CAMERAS in world.run else job.poses,
            "splats": len(lifted.scene),
            "frames": len(lifted.frame_ids),
        }
        if trusted is not None:
            notes["trusted_poses"] = share_of(trusted)
        if note := pose_note(known, told, lifted, trusted):
            notes["pose_note"] = note
    return lifted.scene


def read_walkthrough(world: World) -> Walkthrough:
    """What is known of a walkthrough; its frames are decoded when they are asked for.

    Raises:
        UserError: a file is damaged, or the video has another number of frames than there are cameras or depth for.
    """
    frames, depths = world.frames, world.depth
    cameras = world.cameras if world.cameras_path.exists() else None
    count, (height, width) = len(frames), frames.shape[-2:]
    if cameras is not None and count != len(cameras):
        raise UserError(
            f"{world.video_path} has {count} frames, but there are {len(cameras)} cameras; generate the walkthrough "
            "again, or restore its files."
        )
    if depths and not (min(depths) >= 0 and max(depths) < count):
        raise UserError(
            f"{world.video_path} has {count} frames, but {world.depth_path.name} has depth of frame {max(depths)}; "
            "generate the walkthrough again, or restore its files."
        )
    if cameras is not None and (cameras.image_height, cameras.image_width) != (height, width):
        cameras = cameras.resized(height, width)
    return Walkthrough(frames, cameras, depths)


def read_posed(world: World) -> Walkthrough:
    """A walkthrough whose cameras are known.

    Raises:
        UserError: they are not, or as `read_walkthrough`.
    """
    walkthrough = read_walkthrough(world)
    return walkthrough if walkthrough.cameras is not None else replace(walkthrough, cameras=world.cameras)


def with_estimates(
    known: Walkthrough, job: ReconstructJob, progress: Progress
) -> tuple[Walkthrough, Bool[Tensor, "n"] | None]:
    """A walkthrough with the cameras that are asked for and with depth, and which poses were measured in the video."""
    if known.cameras is not None and known.depths:
        guess = known.cameras
        found = estimate_cameras(known.frames, known.depths, guess.intrinsics, guess=guess, check=progress.step)
        return replace(known, cameras=found.cameras), found.trusted
    walk = estimate_walk(known.frames, shipped_depth(), depths=known.depths, check=progress.step)
    if known.cameras is not None:
        walk = in_unit_of(walk, known.cameras)
        if job.poses == "commanded":
            return replace(known, depths=walk.depths), None
    return replace(known, cameras=walk.cameras, depths=walk.depths), walk.trusted


def shipped_depth() -> DepthEstimator:
    """The default model's depth network, on the CPU.

    Raises:
        UserError: its files are missing or damaged.
    """
    # Imported here because it brings networks of all kinds, and no other step needs one.
    from lyra.loading import load_depth

    return load_depth(DEFAULT_MODEL, Placement("fp32", device="cpu")).photo


def pose_note(
    known: Walkthrough, told: Walkthrough, lifted: Reconstruction, trusted: Bool[Tensor, "n"] | None
) -> str | None:
    """What is to be said of estimated cameras; None where the scene was made with those that were known."""
    if told.cameras is known.cameras and known.cameras is not None:
        return None
    sentences = ["The cameras were estimated from the video."]
    if known.cameras is not None:
        sentences = [compare_cameras(known.cameras[list(lifted.frame_ids)], lifted.cameras).describe()]
    if trusted is not None and not trusted.all():
        count, lost = len(trusted), int((~trusted).sum())
        sentences.append(f"The poses of {lost} of {count} frames could not be measured, so they are not to be trusted.")
    return " ".join(sentences)


def write_estimates(
    world: World,
    known: Walkthrough,
    told: Walkthrough,
    lifted: Reconstruction,
    trusted: Bool[Tensor, "n"] | None,
) -> None:
    """Write cameras and depth where the world has none; what it has stays."""
    if known.cameras is None:
        count = len(known.frames)
        world.write_cameras(told.cameras or cameras_of_all(lifted.cameras, lifted.frame_ids, count))
        found = {} if trusted is None else {"trusted_poses": share_of(trusted)}
        world.write_run(world.run | {ESTIMATED_CAMERAS: {"frames": count} | found})
    if not known.depths:
        world.write_depth(told.depths or rendered_depth(lifted, lifted.frame_ids))


def share_of(trusted: Bool[Tensor, "n"]) -> float:
    """Share of the poses that were measured, for run.json."""
    return round(float(trusted.float().mean()), 3)


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
        walkthrough = read_posed(world)
        frames = rendered_frames(scene, walkthrough, progress)
        progress.enter("Fuse depth")
        field = fuse(frames, voxel=job.voxel, check=progress.step)
        progress.enter("Surface")
        surface = extract_surface(field, SurfaceSettings(max_faces=job.triangles))
        progress.enter("Collider")
        assert walkthrough.cameras is not None
        collider = make_collider(surface, walkthrough.cameras, max_faces=job.collider_triangles)
        ground = WalkableGround(collider.up, walkable(collider, DROP_PLACES))
        progress.enter("Write mesh")
        write_surface(world, surface, collider, ground)
        notes |= {
            "triangles": len(surface.faces),
            "collider_triangles": len(collider.mesh.faces),
            "voxel": round(field.voxel, 5),
        }
    return surface


@dataclass(frozen=True)
class RenderedView:
    """A frame with the splats' depth, in as little memory as that needs."""

    depth: Float[Tensor, "h w"]
    solid: Bool[Tensor, "h w"]
    """Pixels whose depth is to be used."""
    picture: UInt8[Tensor, "3 h w"]
    w2c: Float[Tensor, "4 4"]
    intrinsics: Float[Tensor, "3 3"]


@dataclass(frozen=True)
class RenderedFrames(Sequence[DepthFrame]):
    """Views as frames to be fused, each made when it is asked for."""

    views: list[RenderedView]

    def __len__(self) -> int:
        return len(self.views)

    @overload
    def __getitem__(self, index: int) -> DepthFrame: ...

    @overload
    def __getitem__(self, index: slice) -> RenderedFrames: ...

    def __getitem__(self, index: int | slice) -> DepthFrame | RenderedFrames:
        if isinstance(index, slice):
            return RenderedFrames(self.views[index])
        view = self.views[index]
        return DepthFrame(view.depth, from_uint8(view.picture), view.w2c, view.intrinsics, weight=view.solid.float())


def rendered_frames(scene: GaussianScene, walkthrough: Walkthrough, progress: Progress) -> RenderedFrames:
    """The splats' depth in the frames that were measured, with the video's colours and without the sky.

    Raises:
        UserError: all that was measured is sky.
    """
    video, cameras, measured = walkthrough.frames, walkthrough.cameras, walkthrough.depths
    assert cameras is not None
    height, width = video.shape[-2:]
    if measured and not any(bool((depth < FARTHEST).any()) for depth in measured.values()):
        raise UserError(
            "All that was measured of this video is sky, so it has no surface; choose one of something nearer."
        )
    renderer = choose_renderer(scene, "median")
    ids, views = fused_frames(sorted(measured) or measured_frames(len(video)), height * width), []
    for done, index in enumerate(ids):
        w2c, intrinsics = cameras.w2c[index], cameras.intrinsics[index]
        view = renderer.render(w2c, intrinsics, height, width)
        solid = view.alpha > SOLID
        if index in measured:
            seen = enlarge_depth(measured[index], (height, width))
            sky = (seen > FARTHEST).float()
            solid &= F.max_pool2d(sky[None], 2 * SKY_MARGIN + 1, stride=1, padding=SKY_MARGIN)[0] == 0
            solid &= ~(view.depth > SEEN_THROUGH * seen)
        views.append(RenderedView(view.depth, solid, video[index], w2c, intrinsics))
        progress.step(done + 1, len(ids))
    return RenderedFrames(views)


def fused_frames(ids: Sequence[int], pixels: int) -> Sequence[int]:
    """As many frames, evenly spread, as memory is meant for."""
    most = max(1, FUSED_PIXELS // pixels)
    return ids if len(ids) <= most else [ids[round(place)] for place in np.linspace(0, len(ids) - 1, most)]


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
    if entry == "reconstruct":
        run.pop("mesh", None)  # It was of the splats before.
    run[entry] = notes | {"stage_seconds": spent}
    world.write_run(run)
