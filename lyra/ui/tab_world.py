"""Tab 4: the walkthrough as splats, and everything as files.

Lays out components; what happens with them is `wiring.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import gradio as gr


@dataclass(frozen=True)
class WorldTab:
    """Components of the tab."""

    tab: gr.Tab
    job: gr.State
    """Id of the job of the lifting that this page watches."""
    lift: gr.Button
    cancel: gr.Button
    progress: gr.HTML
    downloads: gr.File


def build_world_tab() -> WorldTab:
    """Lay out the tab in the present `gr.Tabs`."""
    with gr.Tab("4 World", id="world", interactive=False) as tab:
        gr.Markdown("Lift the walkthrough to Gaussian splats and walk through them in the 3D view.")
        job = gr.State(None)
        with gr.Row():
            lift = gr.Button("Lift to splats", variant="primary", min_width=120, elem_id="lyra-lift")
            cancel = gr.Button("Cancel", variant="stop", interactive=False, min_width=120, elem_id="lyra-cancel-lift")
        progress = gr.HTML(visible=False, elem_classes="lyra-flat", elem_id="lyra-world-progress")
        downloads = gr.File(
            label="Downloads", file_count="multiple", interactive=False, visible=False, elem_id="lyra-downloads"
        )
    return WorldTab(tab, job, lift, cancel, progress, downloads)
