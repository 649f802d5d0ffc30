"""Tab 1: which photo? Upload or example, with the depth and the field of view that the model finds in it.

Lays out components; what happens with them is `wiring.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import gradio as gr

from lyra.ui.examples import Example, credits_list
from lyra.ui.previews import thumbnail

HEIGHT = 230
"""Of the photo and its depth, in pixels."""


@dataclass(frozen=True)
class PhotoTab:
    """Components of the tab."""

    tab: gr.Tab
    photo: gr.Image
    depth: gr.Image
    note: gr.HTML
    """What is wrong with the photo, or what is known of it."""
    onward: gr.Button
    gallery: gr.Gallery


def build_photo_tab(examples: Sequence[Example]) -> PhotoTab:
    """Lay out the tab in the present `gr.Tabs`."""
    with gr.Tab("1 Photo", id="photo") as tab:
        with gr.Row():
            photo = gr.Image(
                label="Your photo",
                sources=["upload", "clipboard"],
                type="filepath",
                image_mode=None,
                height=HEIGHT,
                min_width=140,
                buttons=[],
                placeholder="Drop a photo here or click to upload",
                alt_text="The photo that the world begins with",
                elem_id="lyra-photo",
            )
            depth = gr.Image(
                label="Depth",
                interactive=False,
                visible=False,
                height=HEIGHT,
                min_width=140,
                buttons=["fullscreen"],
                format="png",
                alt_text="Estimated depth of the photo",
                elem_id="lyra-depth",
            )
        note = gr.HTML(elem_id="lyra-photo-note", visible=False, elem_classes="lyra-flat")
        onward = gr.Button("Continue to the camera", variant="primary", visible=False)
        gr.Markdown("**Or choose an example**")
        gallery = gr.Gallery(
            [(thumbnail(example.path), example.name) for example in examples],
            show_label=False,
            label="Examples",
            columns=3,
            height="auto",
            object_fit="cover",
            allow_preview=False,
            interactive=False,
            buttons=[],
            format="jpeg",
            elem_id="lyra-examples",
        )
        with gr.Accordion("Credits and licences of the examples", open=False):
            gr.HTML(credits_list(examples), elem_classes="lyra-flat")
    return PhotoTab(tab, photo, depth, note, onward, gallery)
