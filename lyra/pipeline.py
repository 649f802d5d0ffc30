"""Photo and camera path in, a world folder out: the one place where the stages meet.

`LyraPipeline` is the Python interface; the command line and the app call the same methods. Knows no user interface.
"""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from threading import RLock
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from lyra import __version__, lifting
from lyra.config import GenerateJob, LoadOptions, MeshJob, ReconstructJob
from lyra.depth.base import intrinsics_from_fov
from lyra.device import choose_device
from lyra.generation.caption_views import caption_request
from lyra.generation.captioner import VisionLanguageCaptioner
from lyra.generation.captions import caption_of_chunk, read_captions
from lyra.generation.chunk_store import content_key, writing_to
from lyra.generation.legs import WalkedLeg, shown_walk, write_walk
from lyra.generation.state import WalkState
from lyra.generation.walkthrough import (
    Walk,
    from_uint8,
    generate_chunk,
    resize_depth,
    start,
    to_uint8,
)
from lyra.hub import DEFAULT_MODEL, ModelSource, find_model, weights_hash
from lyra.loading import LoadedModel, load_components, serve_transformer
from lyra.models.context_parallel import ONE_PROCESS, ContextParallelGroup
from lyra.photo import fit_photo, load_photo, output_size
from lyra.placement import Placement, choose_placement, memory_explained
from lyra.progress import Cancelled, Progress
from lyra.reconstructors import reconstructor_for, resolve
from lyra.record import LoadedFrom, chunk_key, refuse_other_photo, run_record, save_chunk
from lyra.trajectory.clearance import ClearanceReport, shorten_path
from lyra.trajectory.files import relative_to_first
from lyra.trajectory.gui_path import read_path
from lyra.trajectory.presets import preset_cameras
from lyra.trajectory.recipes import RECIPES, Leg, Recipe, joined_cameras, scaled_path
from lyra.types import Cameras, DepthMap, GaussianScene, TriangleMesh
from lyra.world import World

logger = logging.getLogger(__name__)


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
    recipe: Recipe
    """The walks that are made: one for most jobs, shortened where the asked one would pass through the scene."""
    report: ClearanceReport
    """About the asked path, or the leg of it that was shortened most."""

    @property
    def cameras(self) -> Cameras:
        """The path of the finished video."""
        return joined_cameras(self.recipe)


class LyraPipeline:
    """One photo in, a world out."""

    def __init__(
        self, model: LoadedModel, source: ModelSource, placement: Placement, *, fuse_loras: bool = False
    ) -> None:
        self.parts, self.depth, self.source, self.placement = model.parts, model.depth, source, placement
        self.depth_source, self.fuse_loras = model.depth_source, fuse_loras
        self._captioners: dict[str, VisionLanguageCaptioner] = {}
        # Networks that come and go must not do so under another thread's hands; resident ones are only read.
        self._turn: AbstractContextManager[Any] = nullcontext() if placement.offload == "none" else RLock()

    @classmethod
    def from_pretrained(
        cls,
        name: str = DEFAULT_MODEL,
        *,
        device: str | None = None,
        weights: str | None = None,
        offload: str | None = None,
        decode: str | None = None,
        depth: str | None = None,
        fuse_loras: bool = False,
        progress: Progress | None = None,
        group: ContextParallelGroup = ONE_PROCESS,
    ) -> LyraPipeline:
        """Load a model by name, folder or Hugging Face id; a gated one only after its licence is accepted.

        Args:
            device: cpu or cuda; cuda where there is one by default.
            weights: fp32, bf16, fp8 or nf4; with `offload`, the best that fits by default.
            offload: none, model (one network on the GPU at a time) or group (transformer blocks are streamed).
            decode: streamed (whole frames) or tiled, which takes less memory.
            depth: a depth network instead of the model's own, such as da3-small; see `LoadOptions`.
            fuse_loras: add a job's LoRAs to the weights: faster, for 34 GB of host memory at the released size.
            progress: told about downloads.
            group: processes that share the transformer's work; see `serve`.

        Raises:
            UserError: there is no such model or device, its licence is not accepted, its weights are damaged, or it
                does not fit.
        """
        source = find_model(name, progress=progress)
        placement = group.agree(
            lambda: choose_placement(source, device=device, weights=weights, offload=offload, decode=decode)
        )
        with memory_explained(placement):
            model = load_components(source, placement, group, depth=depth, fuse_loras=fuse_loras, progress=progress)
            return cls(model, source, placement, fuse_loras=fuse_loras)

    @staticmethod
    def serve(name: str, group: ContextParallelGroup, *, device: str | None = None) -> None:
        """Be one of several processes that share the transformer's work, until the first one is done.

        Raises:
            UserError: as `from_pretrained`.
            ConnectionError: another process has ended.
        """
        source = find_model(name)
        # The first process chooses for all, because their shares of a pass must come from the same weights.
        placement = replace(group.agree(None), device=str(choose_device(device).device))
        with memory_explained(placement):
            serve_transformer(source, placement, group)

    def __call__(
        self, photo: str | Path, out: str | Path = "world", *, progress: Progress | None = None, **options: Any
    ) -> World:
        """Make a walkthrough; `options` are fields of `GenerateJob`.

        Raises:
            UserError: the photo, the path or an option cannot be used, or the folder cannot be written.
        """
        return self.generate(GenerateJob(photo=str(photo), **options), Path(out), progress or Progress())

    def see(self, photo: Image.Image | str | Path, resolution: str = "480x832") -> SeenPhoto:
        """Fit a photo to the output size and estimate its depth and field of view.

        Raises:
            UserError: the file is not an image that can be used, or the device has too little memory.
        """
        image = photo if isinstance(photo, Image.Image) else load_photo(photo)
        height, width = output_size(image, resolution)
        pixels = from_uint8(to_uint8(fit_photo(image, height, width)))
        with memory_explained(self.placement), self._turn:
            prediction = self.depth.predict(pixels[None].to(self.placement.torch_device))
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
            UserError: the preset is unknown or the path's file cannot be used.
        """
        asked = self.asked_path(seen, job)
        legs, reports = [], []
        for leg in asked.legs:
            cameras, report = shorten_path(leg.cameras, seen.depth)
            legs.append(replace(leg, cameras=cameras))
            reports.append(report)
        shortened = next((report for report in reports if report.reason), reports[0])
        return PlannedPath(joined_cameras(asked), Recipe(tuple(legs)), shortened)

    def asked_path(self, seen: SeenPhoto, job: GenerateJob) -> Recipe:
        """The walks that a job asks for, before they are checked.

        Raises:
            UserError: the preset is unknown or the path's file cannot be used.
        """
        height, width = seen.image.shape[-2:]
        if job.trajectory is not None:
            path = read_path(Path(job.trajectory), frames=job.frames, image_height=height, image_width=width)
            scale = self.parts.settings.pose_scale if job.pose_scale is None else job.pose_scale
            return Recipe((Leg("walk", scaled_path(relative_to_first(path), scale), reversed=False),))
        photo: dict[str, Any] = {
            "depth": seen.depth,
            "intrinsics": seen.depth.intrinsics,
            "image_height": height,
            "image_width": width,
            "strength": float(job.strength),
        }
        if job.preset in RECIPES:
            return RECIPES[job.preset].make(**photo)
        return Recipe((Leg("walk", preset_cameras(job.preset, frames=job.frames, **photo), reversed=False),))

    def generate(self, job: GenerateJob, out: Path, progress: Progress) -> World:
        """Make the walkthrough of a job in a world folder, going on from finished chunks.

        Raises:
            UserError: the photo, the path or an option cannot be used, the folder cannot be written, or the device
                has too little memory.
            Cancelled: the listener asked to stop; finished chunks stay.
        """
        progress.chunks, world = job.chunks, World(out)
        job = replace(job, model=self.source.name, guidance_scale=job.guidance(self.parts.settings))
        progress.enter("Photo depth")
        seen = self.see(job.photo, job.resolution)
        planned = self.plan(seen, job)
        photo = to_uint8(seen.image)
        refuse_other_photo(world, photo)
        world.write_photo(photo)
        world.write_run(run_record(job, "running", progress, planned.report.reason, self.loaded_from))
        status = "failed"
        try:
            with memory_explained(self.placement):
                finished: list[WalkedLeg] = []
                for leg in planned.recipe.legs:
                    finished.append(WalkedLeg(leg))
                    self.walk_leg(job, seen, world, planned, finished, progress)
            status = "finished"
        except (Cancelled, KeyboardInterrupt):
            status = "cancelled"
            raise
        finally:
            world.write_run(run_record(job, status, progress, planned.report.reason, self.loaded_from))
        return World.open(out)

    def walk_leg(
        self,
        job: GenerateJob,
        seen: SeenPhoto,
        world: World,
        planned: PlannedPath,
        legs: list[WalkedLeg],
        progress: Progress,
    ) -> None:
        """Generate the chunks of the last of `legs`, publishing after each what there is of all of them."""
        walked, device = legs[-1], self.placement.torch_device
        before = sum(leg.leg.chunks for leg in legs[:-1])
        size = self.generation_size(*seen.image.shape[-2:])
        depth = resize_depth(seen.depth.depth, size).to(device)
        walk = Walk(seen.image.to(device), depth, walked.leg.cameras.to(device), size)
        progress.chunk = before
        progress.enter("Remember the photo")
        with torch.no_grad(), self._turn:
            state = start(self.parts, walk)
        captions = read_captions(job)
        if job.captioner is None:
            # All texts at once, so that the text encoder is needed only before the first denoising.
            with self._turn:
                self.parts.encode_text(sorted(set(captions.values())))
        photo = to_uint8(seen.image)
        numbers = self.placement.numbers + (", fused" if self.fuse_loras else "")
        weights = [weights_hash(source.folder) for source in self.loaded_from.sources]
        key = content_key(self.parts.settings.name, *weights, numbers, photo.numpy().tobytes())
        for chunk in range(walked.leg.chunks):
            progress.chunk = before + chunk
            prompt = caption_of_chunk(captions, chunk)
            key = chunk_key(key, job, walked.leg.cameras, chunk, prompt)
            record = world.chunks.load(key)
            if record is None:
                with self._turn:
                    if job.captioner is not None:
                        progress.enter("Caption")
                        prompt = self.caption(job, walk, state, prompt)
                    finished = generate_chunk(self.parts, walk, state, job, prompt, job.seed + chunk, progress)
                save_chunk(
                    world.chunks, key, finished, photo if chunk == 0 else None, {"prompt": prompt, "chunk": chunk}
                )
                record = finished.record
            state.apply(record.to(device))
            walked.keys.append(key)
            walked.depths = {frame: depth.cpu() for frame, depth in state.depths.items()}
            self.publish(world, legs, progress)

    def caption(self, job: GenerateJob, walk: Walk, state: WalkState, hint: str) -> str:
        """A caption for the next chunk by the job's vision-language model; the prompt is its hint.

        Raises:
            UserError: the captioner's model is not there.
        """
        name = str(job.captioner)
        if name not in self._captioners:
            self._captioners[name] = VisionLanguageCaptioner.load(
                name, device=self.placement.torch_device, dtype=self.placement.dtype
            )
        return self._captioners[name](caption_request(walk, state, hint))

    def publish(self, world: World, legs: list[WalkedLeg], progress: Progress) -> None:
        """Write the walkthrough, cameras and depth of the chunks that are finished."""
        progress.enter("Write video")
        comment = f"Made by Lyra {__version__} with {self.parts.settings.name} ({self.parts.settings.licence})"
        shown = shown_walk(legs)
        with writing_to(world.folder):
            temporary = world.folder / ".walkthrough.tmp.mp4"
            write_walk(temporary, world.chunks, legs, comment)
            temporary.replace(world.video_path)
        world.write_path(shown.cameras, shown.depths)
        progress.enter("Chunk finished", world.video_path)
        progress.finish()

    def reconstruct(
        self, world: World, job: ReconstructJob | None = None, progress: Progress | None = None
    ) -> GaussianScene:
        """Lift a walkthrough to splats and write scene.ply and scene.spz.

        Raises:
            UserError: the walkthrough cannot be lifted in this way, or the folder cannot be written.
            Cancelled: the listener asked to stop.
        """
        job, progress = job or ReconstructJob(), progress or Progress()
        with memory_explained(self.placement):
            job = resolve(world, job)
            reconstructor = reconstructor_for(world, job, self.load_options, progress)
            return lifting.reconstruct(world, job, reconstructor, progress)

    def mesh(self, world: World, job: MeshJob | None = None, progress: Progress | None = None) -> TriangleMesh:
        """Make a coloured surface and a collider of a world's splats and write mesh.glb and collider.obj.

        Raises:
            UserError: there are no splats yet, they show no surface, or the folder cannot be written.
            Cancelled: the listener asked to stop.
        """
        return lifting.mesh(world, job or MeshJob(), progress)

    @property
    def loaded_from(self) -> LoadedFrom:
        """Where the weights come from and how they were placed."""
        settings, device = self.parts.settings, self.placement.torch_device
        return LoadedFrom(settings, self.source, self.depth_source, device, self.load_options)

    @property
    def load_options(self) -> LoadOptions:
        """The options that place the model on this machine as it is placed now."""
        p = self.placement
        options: Any = {"weights": p.weights, "offload": p.offload, "decode": p.decode}
        depth = None if self.depth_source is None else self.depth_source.name
        return LoadOptions(depth=depth, device=p.torch_device.type, fuse_loras=self.fuse_loras, **options)

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
