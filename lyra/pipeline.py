"""Photo and camera path in, a world folder out: the one place where the stages meet.

`LyraPipeline` is the Python interface; the command line and the app call the same methods. Knows no user interface.
"""

from __future__ import annotations

import logging
import platform
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from lyra import __version__
from lyra.config import CHUNK_FRAMES, GenerateJob
from lyra.depth.base import intrinsics_from_fov
from lyra.depth.tiny import TinyDepthModel
from lyra.device import Device, choose_device, peak_memory_gib
from lyra.errors import UserError
from lyra.export.ply import write_splat_ply
from lyra.export.video import join_videos
from lyra.generation.captions import caption_of_chunk, read_captions
from lyra.generation.chunk_store import ChunkStore, content_key, writing_to
from lyra.generation.walkthrough import (
    Components,
    FinishedChunk,
    Walk,
    from_uint8,
    generate_chunk,
    resize_depth,
    start,
    to_uint8,
)
from lyra.hub import DEFAULT_MODEL, model_folder, weights_hash
from lyra.loading import load_components
from lyra.photo import fit_photo, load_photo, output_size
from lyra.progress import Progress
from lyra.reconstruction.gaussians import lift, lifted_frames
from lyra.trajectory.clearance import ClearanceReport, shorten_path
from lyra.trajectory.files import read_trajectory, relative_to_first
from lyra.trajectory.presets import preset_cameras
from lyra.types import Cameras, DepthMap, GaussianScene
from lyra.world import World

logger = logging.getLogger(__name__)

LIFT_INTERVAL = 8
"""Every n-th measured frame is lifted, besides the photo and the last frame."""


@dataclass(frozen=True)
class SeenPhoto:
    """A photo as the model sees it, with its depth."""

    image: Float[Tensor, "3 h w"]
    """At output size, in [-1, 1]."""
    depth: DepthMap
    """At output size."""
    fov_x_deg: float


@dataclass(frozen=True)
class PlannedPath:
    """A camera path and what its check against the photo's depth found."""

    asked: Cameras
    """The path as the job asks for it."""
    cameras: Cameras
    """The path that is walked: shortened where the asked one would pass through the scene."""
    report: ClearanceReport
    """About the asked path."""


class LyraPipeline:
    """One photo in, a world out."""

    def __init__(self, parts: Components, depth: TinyDepthModel, device: Device, folder: Path) -> None:
        self.parts, self.depth, self.device, self.folder = parts, depth, device, folder

    @classmethod
    def from_pretrained(cls, name: str = DEFAULT_MODEL, *, device: str | None = None) -> LyraPipeline:
        """Load a model by name or folder.

        Raises:
            UserError: there is no such model or device, or its weights are damaged.
        """
        folder, chosen = model_folder(name), choose_device(device)
        parts, depth = load_components(folder, chosen)
        return cls(parts, depth, chosen, folder)

    def __call__(
        self, photo: str | Path, out: str | Path = "world", *, progress: Progress | None = None, **options: Any
    ) -> World:
        """Make a walkthrough; `options` are fields of `GenerateJob`.

        Raises:
            UserError: the photo, the path or an option cannot be used, or the folder cannot be written.
        """
        return self.generate(GenerateJob(photo=str(photo), **options), Path(out), progress or Progress())

    def see(self, photo: Image.Image | str | Path) -> SeenPhoto:
        """Fit a photo to the output size and estimate its depth and field of view.

        Raises:
            UserError: the file is not an image that can be used.
        """
        image = photo if isinstance(photo, Image.Image) else load_photo(photo)
        height, width = output_size(image)
        pixels = from_uint8(to_uint8(fit_photo(image, height, width)))
        prediction = self.depth.predict(pixels[None].to(self.device.device, self.device.dtype))
        fov_x_deg = float(prediction.fov_x_deg[0])
        sky = prediction.sky[0].cpu()
        depth = DepthMap(
            depth=prediction.depth[0].cpu(),
            valid=~sky,
            sky=sky,
            intrinsics=intrinsics_from_fov(fov_x_deg, height, width),
        )
        return SeenPhoto(pixels, depth, fov_x_deg)

    def plan(self, seen: SeenPhoto, job: GenerateJob) -> PlannedPath:
        """The job's camera path, shortened where it would pass through the scene.

        Raises:
            UserError: the preset is unknown or the trajectory file cannot be used.
        """
        height, width = seen.image.shape[-2:]
        if job.trajectory is not None:
            asked = relative_to_first(read_trajectory(Path(job.trajectory), frames=job.frames))
            asked = asked[: job.frames].resized(height, width)
        else:
            asked = preset_cameras(
                job.preset,
                frames=job.frames,
                depth=seen.depth,
                intrinsics=seen.depth.intrinsics,
                image_height=height,
                image_width=width,
                strength=float(job.strength),
            )
        cameras, report = shorten_path(asked, seen.depth)
        return PlannedPath(asked, cameras, report)

    def generate(self, job: GenerateJob, out: Path, progress: Progress) -> World:
        """Make the walkthrough of a job in a world folder, going on from finished chunks.

        Raises:
            UserError: the photo, the path or an option cannot be used, or the folder cannot be written.
            Cancelled: the listener asked to stop; finished chunks stay.
        """
        progress.chunks, world = job.chunks, World(out)
        job = replace(job, guidance_scale=job.guidance(self.parts.settings))
        progress.enter("Photo depth")
        seen = self.see(job.photo)
        planned = self.plan(seen, job)
        photo = to_uint8(seen.image)
        refuse_other_photo(world, photo)
        world.write_photo(photo)
        world.write_run(self.run_record(job, "running", progress, planned))

        generation_size = self.generation_size(*seen.image.shape[-2:])
        depth = resize_depth(seen.depth.depth, generation_size)
        walk = Walk(seen.image, depth, planned.cameras, generation_size)
        progress.enter("Remember the photo")
        with torch.no_grad():
            state = start(self.parts, walk)
        keys = []
        captions = read_captions(job)
        key = content_key(
            self.parts.settings.name, weights_hash(self.folder), str(self.device.dtype), photo.numpy().tobytes()
        )
        for chunk in range(job.chunks):
            progress.chunk = chunk
            prompt = caption_of_chunk(captions, chunk)
            key = chunk_key(key, job, planned.cameras, chunk, prompt)
            record = world.chunks.load(key)
            if record is None:
                finished = generate_chunk(self.parts, walk, state, job, prompt, job.seed + chunk, progress)
                save_chunk(
                    world.chunks, key, finished, photo if chunk == 0 else None, {"prompt": prompt, "chunk": chunk}
                )
                record = finished.record
            state.apply(record)
            keys.append(key)
            self.publish(world, keys, planned.cameras, state.depths, progress)
        world.write_run(self.run_record(job, "finished", progress, planned))
        return World.open(out)

    def publish(
        self, world: World, keys: list[str], cameras: Cameras, depths: dict[int, Tensor], progress: Progress
    ) -> None:
        """Write the walkthrough, cameras and depth of the chunks that are finished."""
        progress.enter("Write video")
        comment = f"Made by Lyra {__version__} with {self.parts.settings.name} ({self.parts.settings.licence})"
        frames = 1 + CHUNK_FRAMES * len(keys)
        with writing_to(world.folder):
            temporary = world.folder / ".walkthrough.tmp.mp4"
            join_videos(temporary, [world.chunks.video(key) for key in keys], comment)
            temporary.replace(world.video_path)
        world.write_path(cameras[:frames], depths)
        progress.enter("Chunk finished", world.video_path)
        progress.finish()

    def reconstruct(self, world: World, progress: Progress | None = None) -> GaussianScene:
        """Lift a walkthrough to splats and write scene.ply.

        Raises:
            UserError: the folder cannot be written.
        """
        progress = progress or Progress()
        progress.enter("Read walkthrough")
        video, depths, cameras = world.video, world.depth, world.cameras
        last = len(video) - 1
        chosen = [i for i in depths if i % LIFT_INTERVAL == 0 or i == last]
        frames = lifted_frames({i: from_uint8(video[i]) for i in chosen}, {i: depths[i] for i in chosen}, cameras)
        progress.enter("Lift to splats")
        scene = lift(frames, progress.step)
        progress.enter("Write splats")
        with writing_to(world.folder):
            write_splat_ply(world.scene_path, scene, f"Lyra {__version__}, {self.parts.settings.name}, OpenCV axes")
        run = world.run
        run["reconstruct"] = {"splats": len(scene), "frames": len(frames)}
        progress.finish()
        run["reconstruct"]["stage_seconds"] = {k: round(v, 2) for k, v in progress.stage_seconds.items()}
        world.write_run(run)
        return scene

    def generation_size(self, height: int, width: int) -> tuple[int, int]:
        """Size at which the network works for an output size; a portrait photo swaps the sides."""
        settings = self.parts.settings
        if settings.generation_height is None or settings.generation_width is None:
            return height, width
        if height == width:
            side = round((settings.generation_height * settings.generation_width) ** 0.5 / 32) * 32
            return side, side
        size = (settings.generation_height, settings.generation_width)
        return size if width > height else (size[1], size[0])

    def run_record(self, job: GenerateJob, status: str, progress: Progress, planned: PlannedPath) -> dict[str, Any]:
        """The contents of run.json."""
        return {
            "status": status,
            "job": job.to_json(),
            "model": {
                "name": self.parts.settings.name,
                "licence": self.parts.settings.licence,
                "weights_sha256": weights_hash(self.folder),
            },
            "path_note": planned.report.reason,
            "versions": {"lyra": __version__, "torch": torch.__version__, "python": platform.python_version()},
            "device": str(self.device.device),
            "stage_seconds": {name: round(seconds, 2) for name, seconds in progress.stage_seconds.items()},
            "peak_memory_gib": round(peak_memory_gib(), 2),
        }


def chunk_key(before: str, job: GenerateJob, cameras: Cameras, chunk: int, prompt: str) -> str:
    """Key of a chunk: everything before it, its cameras, its text and how it is sampled."""
    first = 1 + CHUNK_FRAMES * chunk
    span = cameras[(0 if chunk == 0 else first) : first + CHUNK_FRAMES]
    sampling = replace(job, photo="", chunks=1, preset="", trajectory=None, strength=1.0, prompt="", captions=None)
    how = sampling.to_json()
    if job.sampler == "dmd":
        # The distilled sampler has neither a number of steps nor guidance.
        how["steps"] = how["guidance_scale"] = None
    return content_key(before, how, span.w2c.numpy().tobytes(), span.intrinsics.numpy().tobytes(), prompt)


def save_chunk(
    store: ChunkStore, key: str, finished: FinishedChunk, photo: Tensor | None, about: dict[str, Any]
) -> None:
    """Store a chunk; the first one's video begins with the photo."""
    frames = finished.frames if photo is None else torch.cat([photo[None], finished.frames])
    store.save(key, finished.record, frames, about)


def refuse_other_photo(world: World, photo: Tensor) -> None:
    """Keep a world of another photo from being overwritten.

    Raises:
        UserError: the folder holds the world of another photo.
    """
    if not world.photo_path.exists() or not world.run:
        return
    before = load_photo(world.photo_path)
    same = (
        before.size == (photo.shape[2], photo.shape[1]) and before.tobytes() == photo.movedim(0, -1).numpy().tobytes()
    )
    if not same:
        raise UserError(
            f"{world.folder} holds the world of another photo; choose another --out so that it is not lost."
        )
