"""The app: four numbered tabs beside one 3D view that stays.

Lays out the page and joins its parts; each tab is a file of its own, and what happens is `wiring.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from lyra.config import ModelSettings
from lyra.hub import DEFAULT_MODEL, licences_of, settings_of, shipped_models
from lyra.pipeline import LyraPipeline
from lyra.serving.jobs import JobManager
from lyra.serving.sessions import Sessions
from lyra.serving.studio import Studio
from lyra.ui.api import build_api
from lyra.ui.examples import load_examples
from lyra.ui.handlers import Handlers
from lyra.ui.licence_gate import build_licence_gate
from lyra.ui.tab_camera import build_camera_tab
from lyra.ui.tab_photo import build_photo_tab
from lyra.ui.tab_video import build_video_tab
from lyra.ui.tab_world import build_world_tab
from lyra.ui.theme import CSS, THEME
from lyra.ui.viewer import WorldViewer
from lyra.ui.wiring import Page, connect

TITLE = "Lyra 2.0: a photo to walk through"
SERVED_COPIES = (6 * 3600, 48 * 3600)
"""How often copies of files for the browser are looked through, and from what age they are deleted, in seconds."""
MAX_UPLOAD = "40mb"

LAUNCH: dict[str, Any] = {
    "theme": THEME,
    "css": CSS,
    "footer_links": [],
    "run_history": False,
    "max_file_size": MAX_UPLOAD,
    "ssr_mode": False,
}
"""Options of `launch` that belong to the app and not to where it runs."""


def build_app(
    pipeline_loader: Callable[[], LyraPipeline],
    worlds_root: Path,
    model: str = DEFAULT_MODEL,
    *,
    visitors_accept: bool = True,
) -> gr.Blocks:
    """The page, its events and its HTTP API.

    Args:
        pipeline_loader: makes the pipeline; called once, in the background, so that the page answers at once.
        worlds_root: folder in which each session's worlds are kept; sessions that have expired are deleted from it.
        model: name or folder of the model that the loader loads; its licences are asked for on the page.
        visitors_accept: whoever opens the page may accept them; False where strangers can open it.

    Raises:
        UserError: there is no such model.
    """
    settings, licences = settings_of(model), licences_of(model)
    sessions = Sessions(worlds_root.expanduser())
    sessions.expire()
    handlers = Handlers(Studio(pipeline_loader, sessions, JobManager(), model))
    examples = load_examples()
    with gr.Blocks(title=TITLE, analytics_enabled=False, fill_width=True, delete_cache=SERVED_COPIES) as app:
        # The key is no secret, as Gradio sends it to every browser; it is fixed so that a restart loses nothing.
        visit = gr.BrowserState({}, storage_key="lyra-visit", secret="lyra-visit")
        gr.HTML(header(settings, shipped=model in shipped_models()), elem_classes=["lyra-header", "lyra-flat"])
        with gr.Row(elem_classes="lyra-columns"):
            with gr.Column(scale=2, min_width=340):
                licence = build_licence_gate(settings.name, licences, visitors_accept=visitors_accept)
                with gr.Tabs() as tabs:
                    photo, camera = build_photo_tab(examples), build_camera_tab()
                    video, world = build_video_tab(settings), build_world_tab()
            with gr.Column(scale=3, min_width=340, elem_classes="lyra-viewer-column"):
                viewer = WorldViewer()
        page = Page(handlers, tuple(examples), visit, tabs, viewer, licence, photo, camera, video, world)
        connect(page, app)
        build_api(handlers, settings)
    return app.queue(max_size=64)


def header(settings: ModelSettings, *, shipped: bool) -> str:
    """Name, model, licence and what to expect of it, as HTML."""
    expect = (
        "A small model, trained on procedural worlds: expect soft inventions where the photo shows nothing."
        if shipped
        else ""
    )
    name, licence = escape(settings.name), escape(settings.licence)
    return f"<h1>{escape(TITLE)}</h1><p>Model: <b>{name}</b>, weights under {licence}. {expect}</p>"
