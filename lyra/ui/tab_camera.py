"""Tab 2: which way does the camera go, how far and for how long? Or along a path from a file.

Lays out components; what happens with them is `wiring.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from html import escape

import gradio as gr

from lyra.config import CHUNK_FRAMES, MAX_CHUNKS, RECIPE_CHUNKS
from lyra.trajectory.presets import PROJECT_PRESETS
from lyra.trajectory.recipes import RECIPES
from lyra.ui.handlers import length_in_words

DEFAULT_PRESET = "push-in"
STRENGTHS = (0.2, 2.0)


@dataclass(frozen=True)
class CameraTab:
    """Components of the tab."""

    tab: gr.Tab
    preset: gr.Radio
    strength: gr.Slider
    chunks: gr.Slider
    trajectory: gr.File
    fact: gr.HTML
    """What the camera does and for how long."""
    note: gr.HTML
    """Why the path was shortened or cannot be used."""
    onward: gr.Button

    @property
    def choices(self) -> list[gr.components.Component]:
        """Inputs of a `PathChoice`, in its order."""
        return [self.preset, self.strength, self.chunks, self.trajectory]


def preset_label(name: str) -> str:
    """A preset's name for people."""
    return name.replace("-", " ").capitalize()


def build_camera_tab() -> CameraTab:
    """Lay out the tab in the present `gr.Tabs`."""
    with gr.Tab("2 Camera", id="camera", interactive=False) as tab:
        preset = gr.Radio(
            [(preset_label(name), name) for name in (*PROJECT_PRESETS, *RECIPES)],
            value=DEFAULT_PRESET,
            label="Camera move",
            elem_id="lyra-preset",
        )
        strength = gr.Slider(
            *STRENGTHS,
            value=1.0,
            step=0.1,
            label="Strength",
            info="1 is a comfortable move",
            buttons=[],
            elem_id="lyra-strength",
        )
        chunks = gr.Slider(
            1,
            MAX_CHUNKS,
            value=1,
            step=1,
            label="Chunks",
            info=f"{CHUNK_FRAMES} frames each",
            buttons=[],
            elem_id="lyra-chunks",
        )
        fact = gr.HTML(path_in_words(DEFAULT_PRESET, 1, None), elem_classes="lyra-flat", elem_id="lyra-path")
        with gr.Accordion("Use a path from a file instead of a preset", open=False):
            gr.Markdown(
                "`trajectory.npz`: arrays `w2c` (N, 4, 4), `intrinsics` (N, 3, 3) in pixels, `image_height` and "
                "`image_width`, with at least 1 + 80 poses for each chunk; a world's own `cameras.npz` has this form. "
                "Or the camera path JSON of the released Lyra 2 interface."
            )
            trajectory = gr.File(label="trajectory.npz or camera path JSON", height=120, elem_id="lyra-trajectory")
        note = gr.HTML(visible=False, elem_classes="lyra-flat", elem_id="lyra-path-note")
        onward = gr.Button("Continue to the video", variant="primary")
    return CameraTab(tab, preset, strength, chunks, trajectory, fact, note, onward)


def chooses_chunks(preset: str, trajectory: str | None) -> bool:
    """Whether the length of the move is for the user to choose; recipes have their own."""
    return bool(trajectory) or preset not in RECIPE_CHUNKS


def path_in_words(preset: str, chunks: int, trajectory: str | None) -> str:
    """What the camera does and for how long, as HTML."""
    known = PROJECT_PRESETS.get(preset) or RECIPES.get(preset)
    move = "Follow the poses of the file." if trajectory else known.description if known else ""
    chunks = chunks if trajectory else RECIPE_CHUNKS.get(preset, chunks)
    return f'<p class="lyra-fact">{escape(move)} <b>{length_in_words(chunks)}</b></p>'
