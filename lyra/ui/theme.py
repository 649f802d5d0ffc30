"""What does the page look like? One theme and a little CSS; fonts come from the app itself.

Colours are the theme's variables, so light and dark need no second rule. Knows the classes that `stages.py` and the
tabs use, and nothing else.
"""

from __future__ import annotations

import gradio as gr

THEME = gr.themes.Base(
    primary_hue=gr.themes.colors.sky,
    secondary_hue=gr.themes.colors.sky,
    neutral_hue=gr.themes.colors.slate,
    radius_size=gr.themes.sizes.radius_md,
    font=["system-ui", "sans-serif"],
    font_mono=["ui-monospace", "monospace"],
).set(
    body_background_fill="*neutral_50",
    body_text_color_subdued="*neutral_500",
    block_shadow="none",
    block_label_text_weight="600",
    button_primary_background_fill="*primary_700",
    button_primary_background_fill_hover="*primary_800",
    button_primary_background_fill_dark="*primary_700",
    button_primary_background_fill_hover_dark="*primary_600",
    button_primary_text_color="white",
    button_primary_text_color_dark="white",
    slider_color="*primary_600",
)

CSS = """
.block.lyra-flat > .html-container { padding: 0; }
.lyra-header h1 { font-size: 1.5rem; margin: 0 0 2px; }
.lyra-header p { margin: 0; text-wrap: pretty; color: var(--body-text-color-subdued); }
.gradio-container { overflow: clip !important; } /* With Gradio's own `hidden` nothing inside could be sticky. */
@media (min-width: 900px) {
  .lyra-columns > .column.lyra-viewer-column { position: sticky; top: 12px; align-self: flex-start; }
}

#lyra-downloads .label-clear-button { display: none; } /* The files are on the server; nothing is to be removed. */
#lyra-examples .grid-wrap { max-height: none; }
@media (max-width: 480px) {
  .tab-container button { padding: 0 8px; } /* All four in one row, or Gradio hides two behind a menu. */
  #lyra-examples .grid-container { grid-template-columns: repeat(2, 1fr); }
}

#lyra-licence { gap: 10px; padding: 12px 16px; border: 1px solid var(--border-color-primary);
  border-left: 3px solid #d97706; border-radius: 4px; background: var(--background-fill-primary); }
#lyra-licence h2 { margin: 0 0 6px; font-size: 1.1rem; }
#lyra-licence p { margin: 0 0 6px; text-wrap: pretty; }
#lyra-licence a { margin: 0; padding: 0; }
#lyra-licence table { width: 100%; margin: 0; border: 0; border-collapse: collapse; font-size: var(--text-sm); }
#lyra-licence :is(thead, tbody, tr) { border: 0; }
#lyra-licence :is(th, td) { padding: 4px 12px 4px 0; border: 0; border-top: 1px solid var(--border-color-primary);
  text-align: left; vertical-align: top; font-weight: 400; }
#lyra-licence thead th { border-top: 0; color: var(--body-text-color-subdued); }

.lyra-note { margin: 0; padding: 8px 12px; border-left: 3px solid var(--color-accent); border-radius: 4px;
  background: var(--background-fill-secondary); text-wrap: pretty; }
.lyra-warning { border-left-color: #d97706; }
.lyra-error { border-left-color: #dc2626; }
.lyra-fact { margin: 0; font-variant-numeric: tabular-nums; }
.lyra-credit { margin: 0; font-size: var(--text-sm); color: var(--body-text-color-subdued); }
.lyra-credit a, .lyra-credits a { margin: 0; padding: 0; }
.lyra-credits { margin: 0; padding-left: 1.2em; font-size: var(--text-sm); }

.lyra-summary { margin: 0 0 6px; font-weight: 600; }
.lyra-job summary { cursor: pointer; color: var(--body-text-color-subdued); font-size: var(--text-sm); }
.lyra-times { margin: 2px 0 8px; color: var(--body-text-color-subdued); font-variant-numeric: tabular-nums; }
.lyra-job progress { appearance: none; display: block; width: 100%; height: 8px; border: 0; border-radius: 4px;
  overflow: hidden; background: var(--border-color-primary); color: var(--color-accent); }
.lyra-job progress::-webkit-progress-bar { background: transparent; }
.lyra-job progress::-webkit-progress-value { background: var(--color-accent); }
.lyra-job progress::-moz-progress-bar { background: var(--color-accent); }
.lyra-job progress:indeterminate { animation: lyra-unknown 1.6s linear infinite; background:
  linear-gradient(90deg, transparent 0 35%, var(--color-accent) 35% 65%, transparent 65%) 0 0 / 200% 100%,
  var(--border-color-primary); }
.lyra-job progress:indeterminate::-moz-progress-bar { background: transparent; }
@keyframes lyra-unknown { from { background-position: 200% 0, 0 0; } to { background-position: 0 0, 0 0; } }
@media (prefers-reduced-motion: reduce) { .lyra-job progress:indeterminate { animation-duration: 8s; } }
.lyra-stages { list-style: none; margin: 0; padding: 0; font-size: var(--text-sm); }
.lyra-stages li { display: grid; grid-template-columns: 1.2em 11em 1fr auto; align-items: center; gap: 8px;
  padding: 3px 0; margin: 0; }
.lyra-stages li > span:last-child { grid-column: 4; text-align: right; font-variant-numeric: tabular-nums; }
.lyra-stages li.lyra-waiting { color: var(--body-text-color-subdued); }
.lyra-running { font-weight: 600; }
.lyra-done > span:first-child { color: #16a34a; }
"""
