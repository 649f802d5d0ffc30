"""Tab 4: the walkthrough as splats, as a surface with a collider, and as files in other formats.

Lays out components; what happens with them is `wiring.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from typing import Any

import gradio as gr

from lyra.config import MeshJob
from lyra.exporting import FORMATS

POSES = [("As commanded", "commanded"), ("Estimated from the video", "estimated")]
SHAPES = [("Splats", "splats"), ("Mesh", "mesh"), ("Collider", "collider")]
USUAL_FORMATS = ["spz", "glb", "usd"]


@dataclass(frozen=True)
class WorldTab:
    """Components of the tab."""

    tab: gr.Tab
    job: gr.State
    """Id of the job on the world that this page watches: lifting, mesh or files."""
    poses: gr.Radio
    lift: gr.Button
    cancel: gr.Button
    progress: gr.HTML
    shape: gr.Radio
    """What of the world the viewer shows; there once there is a mesh."""
    fact: gr.HTML
    """How many splats and triangles there are."""
    made: gr.Column
    """What can be done with splats; there once there are some."""
    triangles: gr.Slider
    mesh: gr.Button
    formats: gr.CheckboxGroup
    export: gr.Button
    downloads: gr.File

    @property
    def starts(self) -> list[gr.Button]:
        """Buttons that start work, of which one thing is done at a time."""
        return [self.lift, self.mesh, self.export]


def made_in_words(run: dict[str, Any]) -> str:
    """What there is of a world, from its run.json, as HTML."""
    splats, mesh = run.get("reconstruct", {}), run.get("mesh", {})
    facts = [f"<b>{splats['splats']:,}</b> splats"] if "splats" in splats else []
    if "triangles" in mesh:
        facts.append(f"<b>{mesh['triangles']:,}</b> triangles, collider {mesh['collider_triangles']:,}")
    text = "; ".join(facts) + (f". {escape(splats['pose_note'])}" if splats.get("pose_note") else "")
    return f'<p class="lyra-fact" role="status">{text}</p>' if text else ""


def build_world_tab() -> WorldTab:
    """Lay out the tab in the present `gr.Tabs`."""
    with gr.Tab("4 World", id="world", interactive=False) as tab:
        gr.Markdown("Lift the walkthrough to Gaussian splats and walk through them in the 3D view.")
        job = gr.State(None)
        with gr.Accordion("Advanced", open=False):
            poses = gr.Radio(
                POSES,
                value="commanded",
                label="Camera poses",
                info="Where the cameras were: the path that was asked for, or what the video itself shows.",
                elem_id="lyra-poses",
            )
        with gr.Row():
            lift = gr.Button("Lift to splats", variant="primary", min_width=120, elem_id="lyra-lift")
            cancel = gr.Button("Cancel", variant="stop", interactive=False, min_width=120, elem_id="lyra-cancel-lift")
        progress = gr.HTML(visible=False, elem_classes="lyra-flat", elem_id="lyra-world-progress")
        fact = gr.HTML(visible=False, elem_classes="lyra-flat", elem_id="lyra-world-fact")
        shape = gr.Radio(SHAPES, value="splats", label="Shown", visible=False, elem_id="lyra-shape")
        with gr.Column(visible=False) as made:
            gr.Markdown("A surface for game engines, and a collider without holes that a robot can stand on.")
            triangles = gr.Slider(
                5_000, 500_000, value=MeshJob.triangles, step=5_000, label="Most triangles", elem_id="lyra-triangles"
            )
            mesh = gr.Button("Make the mesh", elem_id="lyra-mesh")
            formats = gr.CheckboxGroup(
                [(f"{name}: {entry.readers}", name) for name, entry in FORMATS.items()],
                value=USUAL_FORMATS,
                label="Formats",
                elem_id="lyra-formats",
            )
            export = gr.Button("Write the files", elem_id="lyra-export")
        downloads = gr.File(
            label="Downloads", file_count="multiple", interactive=False, visible=False, elem_id="lyra-downloads"
        )
    return WorldTab(
        tab, job, poses, lift, cancel, progress, shape, fact, made, triangles, mesh, formats, export, downloads
    )
