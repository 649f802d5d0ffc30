"""What the page and the HTTP API can do, as typed functions: see a photo, plan a path, generate, lift.

Each calls the studio and turns its answer into files and plain values. `Handlers` is used by the tabs' events and, by
way of `api.py`, by other programs. Knows no component's layout and does no maths. Mistakes of the user are `UserError`s
here; the tabs show them beside the control, the API reports them as its error.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar

from gradio.processing_utils import save_file_to_cache
from gradio.utils import get_upload_folder

from lyra.config import CHUNK_FRAMES, FormatName, GenerateJob, MeshJob
from lyra.errors import UserError
from lyra.export.gltf import write_mesh_glb
from lyra.export.video import FRAMES_PER_SECOND
from lyra.licences import Licence, accept, gated_models_allowed, require
from lyra.lifting import read_surface
from lyra.serving.jobs import APOLOGY, JobStatus
from lyra.serving.studio import Studio
from lyra.trajectory.clearance import check_clearance
from lyra.trajectory.files import write_trajectory
from lyra.ui.previews import photo_camera, write_depth_picture, write_photo_points
from lyra.ui.viewer import viewer_value
from lyra.world import World

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.25
WorldShape = Literal["splats", "mesh", "collider"]

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class PhotoView:
    """A photo as the model sees it."""

    world_id: str
    """Names the photo's world in later calls; whoever knows it can read the world."""
    photo: str
    depth_picture: str
    """Depth in colours, near is light; sky is grey."""
    points: str
    """Point cloud (PLY)."""
    fov_x_deg: float
    viewer: dict[str, Any]


@dataclass(frozen=True)
class PathView:
    """A camera path over the photo's point cloud."""

    reason: str | None
    """Why the path was shortened, in one sentence; None when it is clear."""
    viewer: dict[str, Any]
    cameras: str
    """The path as it will be walked (cameras.npz)."""


@dataclass(frozen=True)
class PathChoice:
    """The settings of a camera path."""

    preset: str = "push-in"
    strength: float = 1.0
    chunks: int = 1
    trajectory: str | None = None
    """An uploaded trajectory.npz or camera path JSON, which replaces preset and strength."""


@dataclass(frozen=True)
class VideoChoice:
    """The settings of a walkthrough besides its path."""

    sampler: Literal["dmd", "full"] = "dmd"
    steps: int = 35
    guidance_scale: float = 5.0
    seed: int = 0
    prompt: str = ""
    memory: Literal["lyra", "none"] = "lyra"


@dataclass(frozen=True)
class Handlers:
    """The requests of a visitor."""

    studio: Studio

    def accept_licences(self, licences: Sequence[Licence]) -> None:
        """Remember that the user accepts the licences of the model's weights, and load it.

        Raises:
            UserError: the acceptance cannot be kept, or this deployment has switched such models off.
        """
        if gated_models_allowed():
            for licence in licences:
                accept(licence, "app")
        require(licences)
        self.studio.load_again()

    def see_photo(self, photo: str, session: str | None = None) -> PhotoView:
        """Estimate depth and field of view of a photo file and make its world.

        Raises:
            UserError: the photo cannot be used.
        """
        return self.view_photo(self.studio.see(photo, session).world_id)

    def view_photo(self, world_id: str) -> PhotoView:
        """The photo of a world with its depth picture and point cloud.

        Raises:
            UserError: the world is gone.
        """
        seen, folder = self.studio.seen(world_id), self.studio.sessions.previews(world_id)
        picture, points = folder / "depth.png", folder / "points.ply"
        if not points.exists():
            write_depth_picture(picture, seen)
            write_photo_points(points, seen)
        shown = published(points)
        viewer = viewer_value(points=Path(shown), cameras=photo_camera(seen))
        photo = published(self.studio.sessions.world(world_id).photo_path)
        return PhotoView(world_id, photo, published(picture), shown, seen.fov_x_deg, viewer)

    def plan_path(self, world_id: str, path: PathChoice) -> PathView:
        """Plan a camera path, check it against the photo's depth and shorten it where it would hit something.

        Raises:
            UserError: the world is gone or the path cannot be used.
        """
        plan = self.studio.plan(world_id, self._job(world_id, path, VideoChoice()))
        folder = self.studio.sessions.previews(world_id)
        write_trajectory(folder / "cameras.npz", plan.cameras)
        viewer = viewer_value(
            points=Path(published(folder / "points.ply")),
            cameras=plan.asked,
            # Of the whole path: a recipe's report is about one of its walks.
            blocked=check_clearance(plan.asked, self.studio.seen(world_id).depth).blocked.tolist(),
            overview=True,
        )
        return PathView(plan.report.reason, viewer, published(folder / "cameras.npz"))

    def generate(self, world_id: str, path: PathChoice, video: VideoChoice) -> str:
        """Queue a walkthrough and return the id of its job.

        Raises:
            UserError: the world is gone, the path cannot be used, or too many jobs are waiting.
        """
        return self.studio.generate(world_id, self._job(world_id, path, video))

    def lift(self, world_id: str, poses: Literal["commanded", "estimated"] = "commanded") -> str:
        """Queue the lifting of a walkthrough to splats and return the id of its job.

        Raises:
            UserError: the world is gone or has no walkthrough yet, or too many jobs are waiting.
        """
        return self.studio.lift(world_id, poses)

    def mesh(self, world_id: str, triangles: float | None = MeshJob.triangles) -> str:
        """Queue a world's surface and collider and return the id of the job.

        Raises:
            UserError: the world is gone or has no splats yet, or too many jobs are waiting.
        """
        return self.studio.mesh(world_id, int(number(triangles, "Triangles")))

    def export(self, world_id: str, formats: Sequence[FormatName]) -> str:
        """Queue a world's files in other formats and return the id of the job; a missing mesh is made first.

        Raises:
            UserError: the world is gone or has no splats yet, no format is chosen, or too many jobs are waiting.
        """
        return self.studio.export(world_id, formats)

    def follow(self, job_id: str | None) -> Iterator[JobStatus]:
        """The statuses of a job until it has ended; none for an unknown one."""
        while job_id is not None and (status := self.studio.jobs.status(job_id)) is not None:
            yield status
            if status.ended:
                return
            self.studio.jobs.wait(job_id, POLL_SECONDS)

    def finished(self, job_id: str) -> World:
        """Wait for a job to end and return its world. A caller that goes away takes nothing with it.

        Raises:
            UserError: the job failed or was cancelled.
        """
        while (status := self.studio.jobs.wait(job_id, 60.0)) is not None and not status.ended:
            pass
        if status is None or status.state != "done":
            raise UserError((status.error if status else None) or "The job was cancelled.")
        return status.result

    def view_world(self, world: World, shape: WorldShape = "splats") -> dict[str, Any]:
        """Viewer value of a world's splats, surface or collider, with the camera path.

        Raises:
            UserError: the world has no mesh.
        """
        if shape == "splats":
            return viewer_value(splats=Path(published(world.scene_path)), cameras=world.cameras)
        if shape == "mesh":
            return viewer_value(mesh=Path(published(world.mesh_path)), cameras=world.cameras, keep_view=True)
        collider = self.studio.sessions.previews_of(world) / "collider.glb"
        if not collider.exists() or collider.stat().st_mtime < world.collider_path.stat().st_mtime:
            write_mesh_glb(collider, read_surface(world)[1])
        return viewer_value(mesh=Path(published(collider)), wireframe=True, cameras=world.cameras, keep_view=True)

    def downloads(self, world: World) -> list[str]:
        """The files of a world that are worth having, and those that were written in other formats."""
        names = (world.scene_path, world.packed_scene_path, world.mesh_path, world.collider_path)
        files = [*names, world.video_path, world.cameras_path, world.folder / "run.json", *self.exported(world)]
        # Some exports are what the world has anyway, and are listed once.
        return [published(path) for path in {path.name: path for path in files if path.exists()}.values()]

    def exported(self, world: World) -> list[Path]:
        """The files that were written in other formats; folders as zip archives."""
        found = []
        for path in sorted(world.exports.iterdir()) if world.exports.is_dir() else ():
            file = path
            if path.is_dir():
                archive = self.studio.sessions.previews_of(world) / path.name
                file = Path(shutil.make_archive(str(archive), "zip", path))
            found.append(file)
        return found

    def _job(self, world_id: str, path: PathChoice, video: VideoChoice) -> GenerateJob:
        return self.studio.job(
            world_id,
            preset=path.preset,
            strength=number(path.strength, "Strength"),
            chunks=int(number(path.chunks, "Chunks")),
            trajectory=path.trajectory,
            sampler=video.sampler,
            steps=int(number(video.steps, "Steps")),
            # A float, because whole numbers from the browser are integers and chunks are found by the job's exact text.
            guidance_scale=number(video.guidance_scale, "Guidance"),
            seed=int(number(video.seed, "Seed")),
            prompt=video.prompt or "",
            memory=video.memory,
        )


def published(path: Path) -> str:
    """A copy of a file where the app may serve it, under a name of its content.

    Nothing else of the worlds' folders can be fetched, and a new video never has an old one's address.
    """
    return save_file_to_cache(path, cache_dir=get_upload_folder())


def attempt(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> tuple[T | None, str | None]:
    """What a function returns, or the sentence that tells the user why it cannot; the other one is None."""
    try:
        return function(*args, **kwargs), None
    except UserError as error:
        return None, str(error)
    except Exception:
        logger.exception("A request failed in %s.", getattr(function, "__qualname__", function))
        return None, APOLOGY


def number(value: float | None, name: str) -> float:
    """A number from a field that the user may have left empty.

    Raises:
        UserError: the field is empty.
    """
    if value is None:
        raise UserError(f"{name} is empty; enter a number.")
    return float(value)


def length_in_words(chunks: int) -> str:
    """Length of a walkthrough of some chunks."""
    frames = CHUNK_FRAMES * chunks
    return f"{frames / FRAMES_PER_SECOND:g} s ({frames} frames)"
