"""Tab 3: how is the walkthrough made, how far is it, and what has it become?

Lays out components; what happens with them is `wiring.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import gradio as gr

from lyra.config import ModelSettings

SAMPLERS = [("DMD, 4 steps", "dmd"), ("35 steps", "full")]
MEMORIES = [("Lyra: retrieve what was seen before", "lyra"), ("None: only the newest frames", "none")]
DEFAULT_STEPS = 35
MAX_SEED = 2**31 - 1


@dataclass(frozen=True)
class VideoTab:
    """Components of the tab."""

    tab: gr.Tab
    sampler: gr.Radio
    steps: gr.Slider
    guidance: gr.Slider
    seed: gr.Number
    prompt: gr.Textbox
    memory: gr.Radio
    full_options: gr.Row
    """Steps and guidance, which the 4-step sampler does not have."""
    job: gr.State
    """Id of the job of the walkthrough that this page watches."""
    generate: gr.Button
    cancel: gr.Button
    progress: gr.HTML
    video: gr.Video
    onward: gr.Button

    @property
    def choices(self) -> list[gr.components.Component]:
        """Inputs of a `VideoChoice`, in its order."""
        return [self.sampler, self.steps, self.guidance, self.seed, self.prompt, self.memory]


def build_video_tab(settings: ModelSettings) -> VideoTab:
    """Lay out the tab in the present `gr.Tabs`."""
    with gr.Tab("3 Video", id="video", interactive=False) as tab:
        sampler = gr.Radio(
            SAMPLERS,
            value="dmd",
            label="Sampler",
            info=f"How the 4-step weights of {settings.name} were made: {settings.few_step_note}.",
            elem_id="lyra-sampler",
        )
        with gr.Row(visible=False) as full_options:
            steps = gr.Slider(5, 100, value=DEFAULT_STEPS, step=1, label="Steps", buttons=[], min_width=140)
            guidance = gr.Slider(
                1, 10, value=settings.guidance_scale, step=0.5, label="Guidance", buttons=[], min_width=140
            )
        with gr.Row():
            prompt = gr.Textbox(
                label="Prompt (optional)",
                placeholder="What the walkthrough shows",
                scale=3,
                max_lines=3,
                max_length=2000,
            )
            seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=MAX_SEED, scale=1, min_width=110)
        with gr.Accordion("Advanced", open=False):
            memory = gr.Radio(MEMORIES, value="lyra", label="Memory", elem_id="lyra-memory")
        job = gr.State(None)
        with gr.Row():
            generate = gr.Button("Generate", variant="primary", min_width=120, elem_id="lyra-generate")
            cancel = gr.Button("Cancel", variant="stop", interactive=False, min_width=120, elem_id="lyra-cancel")
        progress = gr.HTML(visible=False, elem_classes="lyra-flat", elem_id="lyra-video-progress")
        video = gr.Video(
            label="Walkthrough", interactive=False, visible=False, autoplay=True, loop=True, elem_id="lyra-video"
        )
        onward = gr.Button("Continue to the world", variant="primary", visible=False)
    return VideoTab(
        tab,
        sampler,
        steps,
        guidance,
        seed,
        prompt,
        memory,
        full_options,
        job,
        generate,
        cancel,
        progress,
        video,
        onward,
    )
