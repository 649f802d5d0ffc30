"""What can a visitor ask for, and what does each request do: see a photo, plan a path, generate, lift?

Joins the pipeline (loaded once, in the background), the job queue and the sessions' folders. Worlds are named by ids.
Knows no user interface: the app's handlers and any other front end call these methods.
"""

from __future__ import annotations

import hashlib
import shutil
import threading
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from lyra.config import FormatName, GenerateJob, MeshJob, ModelSettings, ReconstructJob
from lyra.errors import UserError
from lyra.exporting import FORMATS, export
from lyra.generation.chunk_store import writing_to
from lyra.generation.walkthrough import to_uint8
from lyra.hub import DEFAULT_MODEL
from lyra.lifting import ESTIMATE, OF_MESH, OF_RECONSTRUCTION, mesh
from lyra.pipeline import LyraPipeline, PlannedPath, SeenPhoto
from lyra.progress import Cancelled, Progress
from lyra.serving.jobs import JobManager
from lyra.serving.sessions import Sessions
from lyra.serving.stages import PlannedStage
from lyra.trajectory.gui_path import read_path
from lyra.world import World

PHOTO_DEPTH = "Photo depth"
OF_A_WALK = "Remember the photo"
CAPTION = "Caption"
KEEP_PIXELS = "Keep seen pixels"
OF_A_CHUNK = (
    CAPTION,
    "Retrieve",
    "Correspond",
    "Denoise",
    "Decode",
    KEEP_PIXELS,
    "Measure depth",
    "Remember",
    "Write video",
)
"""Stages as the pipeline enters them; a name that is missing here costs only the estimate of the time left."""

JobKind = Literal["video", "world"]
"""What a world is doing: its walkthrough is made, or its splats, mesh or files are."""

_SEEN_KEPT = 8
"""Photos whose depth stays in memory, at about 8 MB each."""


@dataclass(frozen=True)
class Seen:
    """A photo with its depth, and the world that belongs to it."""

    world_id: str
    photo: SeenPhoto


class Studio:
    """One pipeline and everybody's worlds.

    Args:
        load: makes the pipeline; called once, in the background.
        sessions: where worlds are kept.
        jobs: runs the long work.
        model: name or folder of the model that `load` loads, as jobs record it.
    """

    def __init__(
        self, load: Callable[[], LyraPipeline], sessions: Sessions, jobs: JobManager, model: str = DEFAULT_MODEL
    ) -> None:
        self.sessions, self.jobs, self.model = sessions, jobs, model
        self._load = load
        self._loading = self._start_loading()
        self._seen: OrderedDict[str, SeenPhoto] = OrderedDict()
        self._latest: dict[tuple[str, JobKind], str] = {}
        self._lock = threading.Lock()

    def _start_loading(self, before: Future[LyraPipeline] | None = None) -> Future[LyraPipeline]:
        def load() -> LyraPipeline:
            # An attempt that is still under way may succeed, and the weights must not be there twice.
            if before is not None and before.exception() is None:
                return before.result()
            return self._load()

        # The page answers while the weights load; whoever needs them waits in `pipeline`.
        loader = ThreadPoolExecutor(1, thread_name_prefix="lyra-load")
        loading = loader.submit(load)
        loader.shutdown(wait=False)
        return loading

    def load_again(self) -> None:
        """Load the weights after all, once what stood in the way (a licence, the network) is settled."""
        with self._lock:
            if not self._loading.done() or self._loading.exception() is not None:
                self._loading = self._start_loading(self._loading)

    @property
    def is_loading(self) -> bool:
        """Whether the weights are on their way, so that whoever needs them now has to wait."""
        return not self._loading.done()

    @property
    def pipeline(self) -> LyraPipeline:
        """The loaded pipeline.

        Raises:
            UserError: the weights cannot be loaded.
        """
        return self._loading.result()

    def see(self, photo: str | Path, session: str | None) -> Seen:
        """Estimate the depth of a photo and give it a world in a session, or in a new one.

        Raises:
            UserError: the photo cannot be used or the disk cannot be written.
        """
        if not self.is_loading:
            self.load_again()
        seen = self.pipeline.see(photo)
        pixels = to_uint8(seen.image)
        if session is None or not self.sessions.is_session(session):
            session = self.sessions.new_session()
        world_id = self.sessions.new_world(session, hashlib.sha256(pixels.numpy().tobytes()).hexdigest())
        world = self.sessions.world(world_id)
        if not world.photo_path.exists():
            # Jobs read this copy: it has the size the model sees, and none of the upload's metadata.
            world.write_photo(pixels)
        self._keep(world_id, seen)
        return Seen(world_id, seen)

    def seen(self, world_id: str) -> SeenPhoto:
        """The photo of a world, with its depth.

        Raises:
            UserError: there is no such world any more.
        """
        world = self.sessions.world(world_id)
        with self._lock:
            known = self._seen.get(world_id)
        if known is None:
            known = self.pipeline.see(world.photo_path)
            self._keep(world_id, known)
        return known

    def job(self, world_id: str, **choices: object) -> GenerateJob:
        """A job for the photo of a world; `choices` are fields of `GenerateJob`.

        Raises:
            UserError: there is no such world any more, or a choice is out of range.
        """
        photo = str(self.sessions.world(world_id).photo_path)
        job = GenerateJob(photo=photo, model=self.model, **choices)  # type: ignore[arg-type]
        if job.trajectory is None:
            return job
        return replace(job, trajectory=str(self._keep_trajectory(world_id, Path(job.trajectory))))

    def plan(self, world_id: str, job: GenerateJob) -> PlannedPath:
        """The path of a job, as asked for and as it will be walked.

        Raises:
            UserError: the world is gone, or the path cannot be used.
        """
        return self.pipeline.plan(self.seen(world_id), job)

    def generate(self, world_id: str, job: GenerateJob) -> str:
        """Queue a walkthrough and return the id of its job.

        Raises:
            UserError: the world is gone, the path cannot be used, or too many jobs are waiting.
        """
        world = self.sessions.world(world_id)
        # A path that cannot be used is refused now and not after the queue.
        walks = [leg.chunks for leg in self.plan(world_id, job).recipe.legs]
        stages = planned_stages(job, self.pipeline.parts.settings, walks)

        def work(progress: Progress) -> World:
            # Splats of the walkthrough that is about to be replaced would no longer belong to it.
            world.forget_lifting()
            try:
                return self.pipeline.generate(job, world.folder, progress)
            except Cancelled:
                note_in_run(world, status="cancelled")
                raise
            finally:
                note_in_run(world)

        return self._submit(world_id, "video", work, stages)

    def lift(self, world_id: str, poses: Literal["commanded", "estimated"] = "commanded") -> str:
        """Queue the lifting of a walkthrough to splats and return the id of its job.

        Raises:
            UserError: the world is gone or has no walkthrough yet, or too many jobs are waiting.
        """
        world = self.sessions.world(world_id)
        if not world.video_path.exists():
            raise UserError("This world has no walkthrough yet; generate one first.")
        job = ReconstructJob(poses=poses)

        def work(progress: Progress) -> World:
            self.pipeline.reconstruct(World.open(world.folder), job, progress)
            return world

        stages = [name for name in OF_RECONSTRUCTION if name != ESTIMATE or poses == "estimated"]
        return self._submit(world_id, "world", work, [PlannedStage(name) for name in stages])

    def mesh(self, world_id: str, triangles: int = MeshJob.triangles) -> str:
        """Queue a world's surface and collider and return the id of the job.

        Raises:
            UserError: the world is gone or has no splats yet, the number is out of range, or too many jobs are waiting.
        """
        world, job = self._lifted(world_id), MeshJob(triangles=triangles)

        def work(progress: Progress) -> World:
            mesh(world, job, progress)
            return world

        return self._submit(world_id, "world", work, [PlannedStage(name) for name in OF_MESH])

    def export(self, world_id: str, formats: Sequence[FormatName]) -> str:
        """Queue a world's files in other formats and return the id of the job; a missing mesh is made first.

        Raises:
            UserError: the world is gone or has no splats yet, no format is chosen, or too many jobs are waiting.
        """
        world = self._lifted(world_id)
        if not formats:
            raise UserError("No format is chosen; tick at least one.")
        needs_mesh = not world.mesh_path.exists() and any(FORMATS[name].of_the_mesh for name in formats)

        def work(progress: Progress) -> World:
            if needs_mesh:
                mesh(world, MeshJob(), progress)
            export(world, formats, progress)
            return world

        stages = [*(OF_MESH if needs_mesh else ()), *(f"Write {name}" for name in formats)]
        return self._submit(world_id, "world", work, [PlannedStage(name) for name in stages])

    def _lifted(self, world_id: str) -> World:
        """A world that has splats.

        Raises:
            UserError: the world is gone or has none.
        """
        world = self.sessions.world(world_id)
        if not world.scene_path.exists():
            raise UserError("This world has no splats yet; lift the walkthrough first.")
        return world

    def latest_job(self, world_id: str, kind: JobKind) -> str | None:
        """Id of the newest job of a world that is still remembered: how a reloaded page finds it again."""
        with self._lock:
            job_id = self._latest.get((world_id, kind))
        return job_id if job_id is not None and self.jobs.status(job_id) is not None else None

    def _submit(self, world_id: str, kind: JobKind, work: Callable[[Progress], World], plan: list[PlannedStage]) -> str:
        job_id = self.jobs.submit(work, self.sessions.session_of(world_id), plan)
        with self._lock:
            self._latest = {key: known for key, known in self._latest.items() if self.jobs.status(known) is not None}
            self._latest[world_id, kind] = job_id
        return job_id

    def _keep(self, world_id: str, seen: SeenPhoto) -> None:
        with self._lock:
            self._seen[world_id] = seen
            self._seen.move_to_end(world_id)
            while len(self._seen) > _SEEN_KEPT:
                self._seen.popitem(last=False)

    def _keep_trajectory(self, world_id: str, upload: Path) -> Path:
        """A copy in the world's folder, under a name of its content: uploads do not outlive the app."""
        read_path(upload, frames=1, image_height=480, image_width=832)
        world = self.sessions.world(world_id)
        suffix = ".npz" if zipfile.is_zipfile(upload) else ".json"
        kept = world.folder / f"trajectory-{hashlib.sha256(upload.read_bytes()).hexdigest()[:12]}{suffix}"
        if not kept.exists():
            with writing_to(world.folder):
                shutil.copyfile(upload, kept)
        return kept


def planned_stages(job: GenerateJob, settings: ModelSettings, walks: Sequence[int]) -> list[PlannedStage]:
    """The stages of a walkthrough in the order in which the pipeline enters them.

    Args:
        job: the walkthrough.
        settings: of the model that makes it.
        walks: chunks of each walk from the photo; one walk for most jobs.
    """
    denoising = f"Denoise {job.sampler}" + (f" {job.steps}" if job.sampler == "full" else "")
    optional = {CAPTION: job.captioner is not None, KEEP_PIXELS: settings.keep_seen_pixels}
    of_a_chunk = [name for name in OF_A_CHUNK if optional.get(name, True)]
    stages, before = [PlannedStage(PHOTO_DEPTH)], 0
    for chunks in walks:
        # Until a walk's first chunk begins, the pipeline counts it to the chunk before it.
        stages.append(PlannedStage(OF_A_WALK, before))
        for chunk in range(before, before + chunks):
            stages += [PlannedStage(name, chunk, denoising if name == "Denoise" else "") for name in of_a_chunk]
        before += chunks
    return stages


def note_in_run(world: World, status: str | None = None) -> None:
    """Set the status in run.json, and name its files as they are named in the world's folder, not on this server."""
    run = world.run
    if not run:
        return
    if status is not None:
        run["status"] = status
    job = run.get("job", {})
    for entry in ("photo", "trajectory"):
        if job.get(entry):
            job[entry] = Path(job[entry]).name
    world.write_run(run)
