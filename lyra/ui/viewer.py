"""The 3D view beside the tabs: a Gradio component that shows a point cloud, splats or a mesh, and a camera path.

This file answers what is sent to the browser and in which form; how it is drawn is `frontend/src`, bundled into
`assets/viewer/viewer.js`. It does not know where scenes come from, when a path is blocked, or what the tabs do.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Literal

import gradio as gr
import numpy as np
from gradio.data_classes import FileData, GradioModel

from lyra.types import Cameras

ASSETS = Path(__file__).resolve().parents[2] / "assets" / "viewer"
BUNDLE = ASSETS / "viewer.js"
MOST_POSES = 120
PATH_COLOUR = "#38bdf8"
BLOCKED_COLOUR = "#ef4444"

gr.set_static_paths([ASSETS])  # Only static files are served as scripts; everything in this folder becomes readable.


class SceneFile(GradioModel):
    """A file the browser can draw."""

    file: FileData
    """Each in the axes of its format, as the writers of `lyra.export` have it, because no file says which it is in.
    `splats`: an INRIA PLY (OpenCV axes) or an SPZ of version 2 or 3 (y up, z backwards). `points`: what
    `lyra.export.ply.write_point_ply` writes (OpenCV axes). `mesh`: a GLB of triangles with vertex colours (y up, z
    backwards)."""
    kind: Literal["splats", "points", "mesh"]
    wireframe: bool = False
    """Draw a mesh shaded and with its edges, instead of in its colours."""


class ViewerPath(GradioModel):
    """A camera path, thinned for drawing, with plain numbers only."""

    w2c: list[list[float]]
    """Per pose the world-to-camera matrix in OpenCV axes, 16 numbers row by row."""
    frames: list[int]
    """Per pose its frame number in the walkthrough; with `fps` this times the playback."""
    fps: float
    fy: float
    """Focal length in pixels of an image of `height` x `width`; the principal point counts as central."""
    height: int
    width: int
    start_pose: int
    """Index into `w2c` of the pose the view starts from."""
    colours: list[str] | None = None
    """Per pose a CSS colour; one colour for all if absent."""
    overview: bool = False
    """Start behind and above the path, and draw the path through what is before it."""


class ViewerValue(GradioModel):
    """Everything the viewer shows, as it travels to the browser."""

    lib: FileData
    """The viewer's own script; Gradio fills in its address."""
    scene: SceneFile | None = None
    path: ViewerPath | None = None
    keep_view: bool = False
    """Leave the visitor's eye where it is when the scene changes."""


def viewer_value(
    *,
    splats: Path | None = None,
    points: Path | None = None,
    mesh: Path | None = None,
    wireframe: bool = False,
    cameras: Cameras | None = None,
    blocked: list[bool] | None = None,
    start_pose: int = 0,
    fps: float = 16.0,
    keep_view: bool = False,
    overview: bool = False,
) -> dict[str, Any]:
    """Build what a handler returns to a `WorldViewer`.

    Args:
        splats: Gaussian scene file of `lyra.export.ply.write_splat_ply` or `lyra.export.spz.write_spz`, or another one
            in the same axes. At most one of `splats`, `points` and `mesh` is given.
        points: point cloud file of `lyra.export.ply.write_point_ply`.
        mesh: triangle mesh of `lyra.export.gltf.write_mesh_glb`, or another GLB. At most 5 million triangles are shown.
        wireframe: show the mesh's shape, shaded and with its edges, instead of its colours; for colliders.
        cameras: the walkthrough's camera path, drawn and playable; its `start_pose` is where the view starts.
        blocked: per camera whether something is in its way; such stretches are red.
        start_pose: index into `cameras`.
        fps: frames per second at which the path is played.
        keep_view: leave the visitor's eye where it is although the scene changes.
        overview: start behind and above the path, and draw the path through what is before it.
    """
    files = {"splats": splats, "points": points, "mesh": mesh}
    given = {kind: str(path) for kind, path in files.items() if path is not None}
    if len(given) > 1:
        raise ValueError(f"a viewer shows one scene, not {' and '.join(given)}")
    if wireframe and mesh is None:
        raise ValueError("only a mesh has a wireframe")
    return {
        "scene": next(({"kind": k, "path": path, "wireframe": wireframe} for k, path in given.items()), None),
        "path": None if cameras is None else _thinned_path(cameras, blocked, start_pose, fps) | {"overview": overview},
        "keep_view": keep_view,
    }


def _thinned_path(cameras: Cameras, blocked: list[bool] | None, start_pose: int, fps: float) -> dict[str, Any]:
    """At most `MOST_POSES` poses, with the first, the last and the start pose among them."""
    n = len(cameras)
    if blocked is not None and len(blocked) != n:
        raise ValueError(f"expected one `blocked` flag for each of the {n} cameras, got {len(blocked)}")
    spread = np.linspace(0, n - 1, min(n, MOST_POSES - 1)).round().astype(int).tolist()
    kept = sorted({*spread, range(n)[start_pose]})
    colours = None
    if blocked is not None:
        # A pose stands for the frames up to the next kept one, so that thinning cannot hide a short collision.
        spans = [blocked[frame:following] for frame, following in zip(kept, [*kept[1:], n], strict=True)]
        colours = [BLOCKED_COLOUR if any(span) else PATH_COLOUR for span in spans]
    return {
        "w2c": [[round(number, 6) for number in matrix] for matrix in cameras.w2c[kept].flatten(1).tolist()],
        "frames": kept,
        "fps": fps,
        "fy": float(cameras.intrinsics[start_pose, 1, 1]),
        "height": cameras.image_height,
        "width": cameras.image_width,
        "start_pose": kept.index(range(n)[start_pose]),
        "colours": colours,
    }


def _mount_script() -> str:
    """Script that loads the bundle; its hash in the address makes browsers fetch a new one after an update."""
    version = hashlib.sha256(BUNDLE.read_bytes()).hexdigest()[:12]
    return f"""
        const events = ['viewer_loaded', 'viewer_error'];
        const address = new URL(props.value.lib.url, document.baseURI);
        address.searchParams.set('v', '{version}');
        import(address.href)
            .then((viewer) => viewer.mount({{element, props, trigger, watch}}))
            .catch((error) => {{
                const host = element.querySelector('.lyra-viewer');
                host.dataset.state = 'error';
                host.textContent = 'The 3D view could not be loaded: ' + error;
                trigger('viewer_error', {{message: String(error)}});
            }});
    """


class WorldViewer(gr.HTML):
    """3D view of a world; takes values of `viewer_value`. One per page: it holds the page's WebGL context.

    Events: `viewer_loaded` (its `gr.EventData` carries `kind` and `count`) and `viewer_error` (`message`). Events that
    output a viewer need `show_progress="hidden"`, or Gradio's overlay covers it.
    """

    data_model = ViewerValue  # The value's type, which makes Gradio's string-typed overrides below wrong for mypy.

    def __init__(self, value: dict[str, Any] | None = None, **kwargs: Any) -> None:
        # The template is constant: Gradio would run code found in a value that it puts into a template.
        super().__init__(
            value=value,
            html_template='<div class="lyra-viewer" data-state="loading" data-kind="none">Loading the 3D view…</div>',
            js_on_load=_mount_script(),
            apply_default_css=False,
            **kwargs,
        )

    @property
    def skip_api(self) -> bool:
        """The value is a picture for people, with server paths in it: no part of the HTTP API."""
        return True

    def preprocess(self, payload: ViewerValue | None) -> dict[str, Any] | None:  # type: ignore[override]
        """Handlers that take the viewer as an input get what `viewer_value` had built."""
        if payload is None:
            return None
        scene = payload.scene and {
            "kind": payload.scene.kind,
            "path": payload.scene.file.path,
            "wireframe": payload.scene.wireframe,
        }
        path = payload.path and payload.path.model_dump()
        return {"scene": scene, "path": path, "keep_view": payload.keep_view}

    def postprocess(self, value: dict[str, Any] | None) -> ViewerValue:  # type: ignore[override]
        """A value of `viewer_value`, or None for an empty view, as the browser gets it."""
        value = value or {}
        scene = value.get("scene")
        return ViewerValue(
            lib=FileData(path=str(BUNDLE)),
            scene=scene
            and SceneFile(file=FileData(path=scene["path"]), kind=scene["kind"], wireframe=scene["wireframe"]),
            path=value.get("path") and ViewerPath(**value["path"]),
            keep_view=value.get("keep_view", False),
        )
