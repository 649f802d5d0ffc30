"""Which of the app's abilities can other programs call over HTTP, and with which arguments?

Six named endpoints on components that no page shows: `see_photo`, `plan_path`, `generate`, `lift`, `mesh` and `export`.
Their types come from the components, which also check that files were uploaded by the caller. All work is `Handlers`'.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import gradio as gr

from lyra.config import MAX_CHUNKS, MeshJob, ModelSettings
from lyra.exporting import FORMATS
from lyra.trajectory.presets import PRESETS
from lyra.trajectory.recipes import RECIPES
from lyra.ui.handlers import Handlers, PathChoice, VideoChoice, attempt
from lyra.ui.tab_camera import DEFAULT_PRESET
from lyra.ui.tab_video import DEFAULT_STEPS, MAX_SEED

T = TypeVar("T")


@dataclass(frozen=True)
class Api:
    """The endpoints' functions."""

    handlers: Handlers

    def see_photo(self, photo: str | None) -> tuple[str, float, str, str]:
        """Estimate the depth of a photo and make a world for it.

        Returns the world's id, which later calls need and which is the only key to it; the field of view in degrees;
        the depth as a picture; and the photo's point cloud (PLY, OpenCV axes).
        """
        if photo is None:
            raise gr.Error("No photo was sent; upload an image file.")
        view = or_error(self.handlers.see_photo, photo)
        return view.world_id, view.fov_x_deg, view.depth_picture, view.points

    def plan_path(
        self, world: str, preset: str, strength: float, chunks: int, trajectory: str | None
    ) -> tuple[str, str]:
        """Plan a camera path and check it against the photo's depth.

        A trajectory (an npz, or a camera path JSON of the released interface) replaces preset and strength. The preset
        zoom-in-zoom-out has 4 chunks, whatever is asked for.

        Returns the path as it will be walked (cameras.npz), and the reason if it was shortened.
        """
        view = or_error(self.handlers.plan_path, world, PathChoice(preset, strength, chunks, trajectory))
        return view.cameras, view.reason or ""

    def generate(
        self,
        world: str,
        preset: str,
        strength: float,
        chunks: int,
        trajectory: str | None,
        sampler: Literal["dmd", "full"],
        steps: int,
        guidance_scale: float,
        seed: int,
        prompt: str,
        memory: Literal["lyra", "none"],
    ) -> list[str]:
        """Make the walkthrough of a world and wait for it; finished chunks of earlier calls are used again.

        Returns walkthrough.mp4, cameras.npz and run.json.
        """
        path = PathChoice(preset, strength, chunks, trajectory)
        video = VideoChoice(sampler, steps, guidance_scale, seed, prompt, memory)
        job_id = or_error(self.handlers.generate, world, path, video)
        return self.handlers.downloads(or_error(self.handlers.finished, job_id))

    def lift(self, world: str, poses: Literal["commanded", "estimated"]) -> list[str]:
        """Lift the walkthrough of a world to Gaussian splats and wait for them.

        Poses are those that the video was asked for (commanded), or found in the video (estimated).

        Returns scene.ply (INRIA layout, OpenCV axes), scene.spz, walkthrough.mp4, cameras.npz and run.json.
        """
        job_id = or_error(self.handlers.lift, world, poses)
        return self.handlers.downloads(or_error(self.handlers.finished, job_id))

    def mesh(self, world: str, triangles: int) -> list[str]:
        """Make a coloured surface and a collider of a world's splats and wait for them.

        Returns what lift returns, mesh.glb and collider.obj.
        """
        job_id = or_error(self.handlers.mesh, world, triangles)
        return self.handlers.downloads(or_error(self.handlers.finished, job_id))

    def export(self, world: str, formats: list[str]) -> list[str]:
        """Write a world in other formats and wait for them; a mesh that they need is made first.

        Returns all files of the world; formats that are folders (colmap, nerfstudio, frames) come as zip archives.
        """
        job_id = or_error(self.handlers.export, world, formats)
        return self.handlers.downloads(or_error(self.handlers.finished, job_id))


def or_error(function: Callable[..., T], *args: Any) -> T:
    """What a function returns; its sentence becomes the endpoint's error."""
    value, error = attempt(function, *args)
    if value is None:
        raise gr.Error(error or "Nothing came of it.")
    return value


def build_api(handlers: Handlers, settings: ModelSettings) -> None:
    """Add the endpoints to the present `gr.Blocks`."""
    api = Api(handlers)
    with gr.Row(visible=False):
        photo = gr.File(label="photo")
        world = gr.Textbox(label="world")
        path = [
            gr.Dropdown([*PRESETS, *RECIPES], value=DEFAULT_PRESET, label="preset"),
            gr.Number(1.0, label="strength"),
            gr.Number(1, label="chunks", precision=0, minimum=1, maximum=MAX_CHUNKS),
            gr.File(label="trajectory"),
        ]
        video = [
            gr.Radio(["dmd", "full"], value="dmd", label="sampler"),
            gr.Number(DEFAULT_STEPS, label="steps", precision=0),
            gr.Number(settings.guidance_scale, label="guidance_scale"),
            gr.Number(0, label="seed", precision=0, minimum=0, maximum=MAX_SEED),
            gr.Textbox("", label="prompt"),
            gr.Radio(["lyra", "none"], value="lyra", label="memory"),
        ]
        fov, reason = gr.Number(label="fov_x_deg"), gr.Textbox(label="reason")
        depth, points, cameras = (
            gr.Image(label="depth", format="png"),
            gr.File(label="points"),
            gr.File(label="cameras"),
        )
        files = gr.File(label="files", file_count="multiple")
        poses = gr.Radio(["commanded", "estimated"], value="commanded", label="poses")
        triangles = gr.Number(MeshJob.triangles, label="triangles", precision=0)
        formats = gr.CheckboxGroup(list(FORMATS), value=["glb", "usd"], label="formats")
        see, plan, generate, lift, mesh, export = (gr.Button() for _ in range(6))
    see.click(api.see_photo, photo, [world, fov, depth, points], api_name="see_photo")
    plan.click(api.plan_path, [world, *path], [cameras, reason], api_name="plan_path")
    generate.click(api.generate, [world, *path, *video], files, api_name="generate", concurrency_limit=8)
    lift.click(api.lift, [world, poses], files, api_name="lift", concurrency_limit=8)
    mesh.click(api.mesh, [world, triangles], files, api_name="mesh", concurrency_limit=8)
    export.click(api.export, [world, formats], files, api_name="export", concurrency_limit=8)
