"""What happens on the page when something is clicked, changed or loaded?

Each method takes the values of components and returns updates of components; `connect` binds them. Long work is a job
that a generator only watches, so a reload or a closed tab stops nothing and the page finds its job again. The visitor's
browser keeps `Visit`, whose entries come back from outside and are checked where they are used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import gradio as gr

from lyra.config import FormatName
from lyra.lifting import OF_MESH, OF_RECONSTRUCTION
from lyra.serving.jobs import JobStatus
from lyra.serving.studio import JobKind
from lyra.ui.examples import Example
from lyra.ui.handlers import Handlers, PathChoice, PhotoView, VideoChoice, WorldShape, attempt, published
from lyra.ui.licence_gate import OPERATOR_FIRST, LicenceGate
from lyra.ui.stages import message, stage_list
from lyra.ui.tab_camera import CameraTab, chooses_chunks, path_in_words
from lyra.ui.tab_photo import PhotoTab
from lyra.ui.tab_video import VideoTab
from lyra.ui.tab_world import WorldTab, made_in_words
from lyra.ui.viewer import WorldViewer
from lyra.world import World

Updates = dict[Any, Any]
"""New values or properties by component."""
Visit = dict[str, str]
"""What the visitor's browser keeps: the ids `session` and `world`."""

DEPTH_KEY = "light is near, dark is far, grey is sky"
LOADING = "The model is being loaded…"
BUSY = "The world of this photo is still being made; wait for it or cancel it in tab 3 or 4."


@dataclass(frozen=True)
class Page:
    """The whole page's components and what its events call."""

    handlers: Handlers
    examples: tuple[Example, ...]
    visit: gr.BrowserState
    tabs: gr.Tabs
    viewer: WorldViewer
    licence: LicenceGate
    photo: PhotoTab
    camera: CameraTab
    video: VideoTab
    world: WorldTab

    def accept_licence(self, agreed: bool) -> Updates:
        """The box under the licence was ticked: remember it and load the model."""
        gate = self.licence
        if not agreed:
            return {gate.note: gr.skip()}
        if not gate.visitors_accept:
            # The box is greyed out, but whoever speaks to the server without the page is not held by that.
            return {gate.agree: False} | shown(gate.note, message(OPERATOR_FIRST, "error"))
        _, error = attempt(self.handlers.accept_licences, gate.licences)
        if error is not None:
            return {gate.agree: False} | shown(gate.note, message(error, "error"))
        return shown(gate.note, "") | shown(self.photo.note, "")

    def choose_upload(self, upload: dict[str, Any] | None, visit: Any) -> Iterator[Updates]:
        """A photo was uploaded; Gradio hands over its untouched file."""
        if upload and upload.get("path"):
            yield from self._choose(upload["path"], read_visit(visit), credit=None)
        else:
            yield {self.photo.note: gr.skip()}

    def choose_example(self, visit: Any, event: gr.SelectData) -> Iterator[Updates]:
        """An example was clicked."""
        example = self.examples[event.index]
        yield from self._choose(str(example.path), read_visit(visit), example.credit)

    def show_photo(self, visit: Any) -> Updates:
        """Tab 1 was opened: the point cloud without a path."""
        view, _ = attempt(self.handlers.view_photo, read_visit(visit).get("world", ""))
        return {self.viewer: view.viewer if view else gr.skip()}

    def draw_path(self, visit: Any, preset: str, strength: float, chunks: int, trajectory: str | None) -> Updates:
        """Tab 2 was opened or a setting of the path has changed: draw the path and say what is in its way."""
        world_id = read_visit(visit).get("world", "")
        choice = PathChoice(preset, strength, chunks, trajectory)
        view, error = attempt(self.handlers.plan_path, world_id, choice)
        camera = self.camera
        updates: Updates = {
            camera.fact: path_in_words(preset, int(chunks or 0), trajectory),
            camera.chunks: gr.update(visible=chooses_chunks(preset, trajectory)),
            camera.onward: gr.update(interactive=view is not None),
            self.video.tab: gr.Tab(interactive=view is not None),
            self.viewer: view.viewer if view else gr.skip(),
        }
        note = message(error, "error") if view is None else message(view.reason, "warning")
        return updates | shown(camera.note, note)

    def start_video(self, visit: Any, *choices: Any) -> Updates:
        """Generate was clicked."""
        world_id = read_visit(visit).get("world", "")
        path, video = choices[: len(self.camera.choices)], choices[len(self.camera.choices) :]
        started = attempt(self.handlers.generate, world_id, PathChoice(*path), VideoChoice(*video))
        return self._started(self.video, *started)

    def start_lift(self, visit: Any, poses: Literal["commanded", "estimated"]) -> Updates:
        """Lift was clicked."""
        return self._started(self.world, *attempt(self.handlers.lift, read_visit(visit).get("world", ""), poses))

    def start_mesh(self, visit: Any, triangles: float | None) -> Updates:
        """Make the mesh was clicked."""
        return self._started(self.world, *attempt(self.handlers.mesh, read_visit(visit).get("world", ""), triangles))

    def start_export(self, visit: Any, formats: list[FormatName]) -> Updates:
        """Write the files was clicked."""
        return self._started(self.world, *attempt(self.handlers.export, read_visit(visit).get("world", ""), formats))

    def watch_video(self, visit: Any, job_id: str | None) -> Iterator[Updates]:
        """Follow the walkthrough's job until it ends; the video appears with its first chunk."""
        tab, world_id = self.video, read_visit(visit).get("world", "")
        yield {tab.progress: gr.skip()}
        pictures = 0
        for updates, status in self._watch(job_id, tab.progress, [tab.generate], tab.cancel):
            if status.pictures > pictures and status.picture is not None:
                pictures = status.pictures
                updates[tab.video] = gr.update(value=published(status.picture), visible=True)
            if status.ended:
                updates |= self._world_updates(world_id)
            if updates:
                yield updates

    def watch_world(self, visit: Any, job_id: str | None) -> Iterator[Updates]:
        """Follow the job on splats, mesh or files until it ends; then what was made is in the viewer."""
        tab, world_id = self.world, read_visit(visit).get("world", "")
        yield {tab.progress: gr.skip()}
        for updates, status in self._watch(job_id, tab.progress, tab.starts, tab.cancel):
            if status.state == "done":
                updates |= self._world_updates(world_id)
                made = {stage.name for stage in status.stages if stage.state == "done"}
                shape: WorldShape | None = "mesh" if OF_MESH[-1] in made else None
                if shape is None and OF_RECONSTRUCTION[-1] in made:
                    shape = "splats"
                if shape is not None:
                    updates |= self.show_world(visit, shape)
                    updates[tab.shape] |= {"value": shape}
            if updates:
                yield updates

    def cancel_video(self, job_id: str | None) -> Updates:
        """Cancel was clicked in tab 3."""
        return self._cancel(job_id, self.video.cancel)

    def cancel_world(self, job_id: str | None) -> Updates:
        """Cancel was clicked in tab 4."""
        return self._cancel(job_id, self.world.cancel)

    def show_world(self, visit: Any, shape: WorldShape) -> Updates:
        """Tab 4 was opened or another shape chosen: the splats, the mesh or the collider, if there are any."""
        world, _ = attempt(self.handlers.studio.sessions.world, read_visit(visit).get("world"))
        if world is None or not world.scene_path.exists():
            return {self.viewer: gr.skip()}
        value, error = attempt(self.handlers.view_world, world, shape)
        return {self.viewer: value or gr.skip()} | (
            shown(self.world.progress, message(error, "error")) if error else {}
        )

    def arrive(self, visit: Any) -> Iterator[Updates]:
        """The page was loaded, or its licence accepted: ask for the licence, or wait for the model and restore."""
        gate, studio = self.licence, self.handlers.studio
        waiting = gate.reason is not None
        yield {gate.panel: gr.update(visible=waiting)}
        if waiting:
            return
        if not studio.is_loading:
            studio.load_again()  # What was in the way when the app was started may be settled by now.
        if studio.is_loading:
            yield shown(gate.note, message(LOADING))
        _, error = attempt(lambda: studio.pipeline)
        yield shown(gate.note, message(error, "error")) | ({} if error else self._restored(read_visit(visit)))

    def _restored(self, visit: Visit) -> Updates:
        """The visitor's photo, settings and results, and the jobs to watch that are unfinished."""
        world_id = visit.get("world")
        if world_id is None:
            return {}
        view, _ = attempt(self.handlers.view_photo, world_id)
        if view is None:
            return {self.visit: {}}
        updates = self._photo_updates(view) | self._world_updates(world_id) | self._settings(world_id)
        running = {tab: self._unfinished(world_id, kind) for tab, kind in self._long_work}
        updates |= {tab.job: job_id for tab, job_id in running.items()}
        if job_tabs := [tab for tab, job_id in running.items() if job_id]:
            updates |= {tab.tab: gr.Tab(interactive=True) for tab in (self.video, *job_tabs)}
            updates[self.tabs] = gr.Tabs(selected=job_tabs[-1].tab.id)
        return updates

    @property
    def _long_work(self) -> tuple[tuple[VideoTab | WorldTab, JobKind], ...]:
        return (self.video, "video"), (self.world, "world")

    def _choose(self, path: str, visit: Visit, credit: str | None) -> Iterator[Updates]:
        if (reason := self.licence.reason) is not None:
            yield shown(self.photo.note, message(reason, "error")) | {self.photo.photo: None}
            return
        if any(self._unfinished(visit.get("world", ""), kind) for _, kind in self._long_work):
            yield shown(self.photo.note, message(BUSY, "error"))
            return
        if self.handlers.studio.is_loading:
            yield shown(self.photo.note, message(LOADING))
            attempt(lambda: self.handlers.studio.pipeline)
        yield shown(self.photo.note, message("Measuring depth and field of view…"))
        view, error = attempt(self.handlers.see_photo, path, visit.get("session"))
        if view is None:
            before, _ = attempt(self.handlers.view_photo, visit.get("world", ""))
            yield shown(self.photo.note, message(error, "error")) | {self.photo.photo: before.photo if before else None}
            return
        session = view.world_id.partition("-")[0]
        updates = self._photo_updates(view, credit) | {self.visit: {"session": session, "world": view.world_id}}
        updates[self.video.tab] = gr.Tab(interactive=False)
        for tab, _ in self._long_work:
            updates |= {tab.job: None, **shown(tab.progress, "")}
        yield updates | self._world_updates(view.world_id)

    def _photo_updates(self, view: PhotoView, credit: str | None = None) -> Updates:
        """The photo and what is known of it; `credit` is HTML."""
        tab = self.photo
        fact = f'<p class="lyra-fact" role="status">Field of view <b>{view.fov_x_deg:.0f}°</b>; depth: {DEPTH_KEY}</p>'
        if credit:
            fact += f'<p class="lyra-credit">Photo: {credit}.</p>'
        return {
            tab.photo: view.photo,
            tab.depth: gr.update(value=view.depth_picture, visible=True),
            tab.onward: gr.update(visible=True),
            self.camera.tab: gr.Tab(interactive=True),
            self.viewer: view.viewer,
            **shown(tab.note, fact),
        }

    def _world_updates(self, world_id: str) -> Updates:
        """What there is of a world already: its video and its files, and tab 4 if there is something to lift."""
        world, _ = attempt(self.handlers.studio.sessions.world, world_id)
        done = world is not None and world.video_path.exists()
        files = self.handlers.downloads(world) if world is not None and done else []
        return {
            self.video.video: gr.update(value=published(world.video_path) if world and done else None, visible=done),
            self.video.onward: gr.update(visible=done),
            self.world.tab: gr.Tab(interactive=done),
            self.world.downloads: gr.update(value=files or None, visible=bool(files)),
            **(self._made(world) if world is not None else {}),
        }

    def _made(self, world: World) -> Updates:
        """What can be done with a world that has splats, and what there is of it."""
        tab, lifted = self.world, world.scene_path.exists()
        run, _ = attempt(lambda: world.run)
        return {
            tab.made: gr.update(visible=lifted),
            tab.shape: gr.update(visible=lifted and world.mesh_path.exists()),
            **shown(tab.fact, made_in_words(run or {}) if lifted else ""),
        }

    def _settings(self, world_id: str) -> Updates:
        """The settings of the world's last job, and its path in the viewer."""
        world, _ = attempt(self.handlers.studio.sessions.world, world_id)
        run, _ = attempt(lambda: world.run if world is not None else {})
        job = run.get("job") if run else None
        if world is None or not job:
            return {}
        camera, video = self.camera, self.video
        file = world.folder / job["trajectory"] if job["trajectory"] else None
        choice = PathChoice(job["preset"], job["strength"], job["chunks"], str(file) if file else None)
        path, _ = attempt(self.handlers.plan_path, world_id, choice)
        return {
            camera.preset: choice.preset,
            camera.strength: choice.strength,
            camera.chunks: gr.update(value=choice.chunks, visible=chooses_chunks(choice.preset, choice.trajectory)),
            camera.trajectory: published(file) if file else None,
            camera.fact: path_in_words(choice.preset, choice.chunks, choice.trajectory),
            video.sampler: job["sampler"],
            video.steps: job["steps"],
            video.guidance: job["guidance_scale"],
            video.seed: job["seed"],
            video.prompt: job["prompt"],
            video.memory: job["memory"],
            video.tab: gr.Tab(interactive=True),
            **({self.viewer: path.viewer} if path else {}),
        }

    def _started(self, tab: VideoTab | WorldTab, job_id: str | None, error: str | None) -> Updates:
        note = message(error, "error") if error else message("Waiting for the device…")
        return {tab.job: job_id, **shown(tab.progress, note)}

    def _watch(
        self, job_id: str | None, progress: gr.HTML, starts: list[gr.Button], cancel: gr.Button
    ) -> Iterator[tuple[Updates, JobStatus]]:
        """Statuses of a job with the updates of its stage list and buttons; updates are empty when nothing changed."""
        before, buttons = None, None
        for status in self.handlers.follow(job_id):
            updates: Updates = {}
            html = stage_list(status)
            if html != before:
                before = html
                updates |= shown(progress, html)
            if status.ended != buttons:
                buttons = status.ended
                updates |= {start: gr.update(interactive=status.ended) for start in starts}
                updates[cancel] = gr.update(interactive=not status.ended, value="Cancel")
            yield updates, status

    def _cancel(self, job_id: str | None, button: gr.Button) -> Updates:
        stopped = job_id is not None and self.handlers.studio.jobs.cancel(job_id)
        return {button: gr.update(interactive=False, value="Cancelling…") if stopped else gr.skip()}

    def _unfinished(self, world_id: str, kind: JobKind) -> str | None:
        """The world's newest job, if it still waits or runs."""
        job_id = self.handlers.studio.latest_job(world_id, kind)
        status = self.handlers.studio.jobs.status(job_id) if job_id else None
        return job_id if status is not None and not status.ended else None


def read_visit(value: Any) -> Visit:
    """The entries of a `Visit` in whatever the browser sent."""
    if not isinstance(value, dict):
        return {}
    return {key: value[key] for key in ("session", "world") if isinstance(value.get(key), str)}


def shown(component: gr.HTML, html: str) -> Updates:
    """A piece of HTML that takes no room when it is empty."""
    return {component: gr.update(value=html, visible=bool(html))}


def connect(page: Page, app: gr.Blocks) -> None:
    """Bind every event of the page. All are private: other programs use the endpoints of `api.py`."""
    photo, camera, video, world = page.photo, page.camera, page.video, page.world
    everything: list[Any] = [page.visit, page.tabs, page.viewer]
    gate = page.licence
    everything += [gate.panel, gate.agree, gate.note]
    for tab in (photo, camera, video, world):
        everything += [getattr(tab, name) for name in tab.__dataclass_fields__]
    private: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
    quick: dict[str, Any] = private | {"concurrency_limit": 4}
    watching: dict[str, Any] = private | {"concurrency_limit": None}
    visit = [page.visit]

    photo.photo.upload(page.choose_upload, [photo.photo, *visit], everything, preprocess=False, **private)
    photo.gallery.select(page.choose_example, visit, everything, **private)
    photo.tab.select(page.show_photo, visit, everything, **quick)

    settings = [camera.preset.input, camera.strength.input, camera.chunks.input]
    settings += [camera.trajectory.upload, camera.trajectory.clear, camera.tab.select]
    gr.on(settings, page.draw_path, visit + camera.choices, everything, trigger_mode="always_last", **quick)

    video.sampler.change(lambda sampler: gr.Row(visible=sampler == "full"), video.sampler, video.full_options, **quick)
    start = video.generate.click(page.start_video, visit + camera.choices + video.choices, everything, **quick)
    start.then(page.watch_video, [*visit, video.job], everything, **watching)
    video.cancel.click(page.cancel_video, video.job, everything, **watching)

    for button, begin, setting in (
        (world.lift, page.start_lift, world.poses),
        (world.mesh, page.start_mesh, world.triangles),
        (world.export, page.start_export, world.formats),
    ):
        begun = button.click(begin, [*visit, setting], everything, **quick)
        begun.then(page.watch_world, [*visit, world.job], everything, **watching)
    world.cancel.click(page.cancel_world, world.job, everything, **watching)
    gr.on([world.tab.select, world.shape.input], page.show_world, [*visit, world.shape], everything, **quick)

    for button, following in ((photo.onward, "camera"), (camera.onward, "video"), (video.onward, "world")):
        button.click(selecting(following), None, page.tabs, **quick)

    accepted = gate.agree.input(page.accept_licence, gate.agree, [gate.agree, gate.note, photo.note], **quick)
    loaded = app.load(page.arrive, visit, everything, **watching)
    for arrived in (loaded, accepted.then(page.arrive, visit, everything, **watching)):
        arrived.then(page.watch_video, [*visit, video.job], everything, **watching)
        arrived.then(page.watch_world, [*visit, world.job], everything, **watching)


def selecting(tab: str) -> Callable[[], gr.Tabs]:
    """A handler that opens a tab."""
    return lambda: gr.Tabs(selected=tab)
