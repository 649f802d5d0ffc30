"""Above the tabs, for gated weights only: which licence covers what, what does it forbid, and does the user accept it?

Lays out components; what happens with them is `wiring.py`. Nothing is downloaded or loaded before the box is ticked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

import gradio as gr

from lyra.licences import Licence, accepted, gated_models_allowed

OPERATOR_FIRST = (
    "The licence of this model is not accepted yet, and only whoever runs this server can accept it: start it again "
    "with --accept-licence."
)
ACCEPT_FIRST = "Accept the licence of this model first, in the panel above the tabs; then choose the photo again."
SWITCHED_OFF = (
    "This model is switched off here because of its licence; use lyra-tiny, or run the program yourself where the "
    "licence allows it."
)
_ABBREVIATIONS = {"lora": "LoRA"}


@dataclass(frozen=True)
class LicenceGate:
    """Components of the panel."""

    panel: gr.Column
    agree: gr.Checkbox
    note: gr.HTML
    """Why the acceptance did not work, or that the model is being loaded."""
    licences: tuple[Licence, ...]
    """What has to be accepted; none for most models."""
    visitors_accept: bool
    """Visitors of the page are whoever runs the server, as on a laptop; strangers cannot accept in somebody's name."""

    @property
    def reason(self) -> str | None:
        """Why the model may not be loaded, in one sentence; None when nothing is in the way.

        Read anew each time, as a licence can be accepted in another window or on the command line.
        """
        if not self.licences:
            return None
        if not gated_models_allowed():
            return SWITCHED_OFF
        if all(accepted(licence) is not None for licence in self.licences):
            return None
        return ACCEPT_FIRST if self.visitors_accept else OPERATOR_FIRST


def build_licence_gate(model: str, parts: Mapping[str, Licence], *, visitors_accept: bool = True) -> LicenceGate:
    """Lay out the panel.

    It is hidden at first and shown when the page has loaded and the licence still waits, because the layout is the same
    for all visits and an accepted licence must not be asked for again.

    Args:
        model: the model's name, as people know it.
        parts: licence of each of its parts.
        visitors_accept: see `LicenceGate.visitors_accept`.
    """
    gated = gated_licences(parts)
    with gr.Column(visible=False, elem_id="lyra-licence") as panel:
        # A model without gated parts has no panel, so its text is not even sent.
        gr.HTML(panel_text(model, parts, visitors_accept=visitors_accept) if gated else "", elem_classes="lyra-flat")
        agree = gr.Checkbox(
            label=f"I have read the {'licence' if len(gated) == 1 else 'licences'} and accept",
            interactive=visitors_accept and gated_models_allowed(),
            container=False,
            elem_id="lyra-licence-agree",
        )
    note = gr.HTML(visible=False, elem_classes="lyra-flat", elem_id="lyra-model-note")
    return LicenceGate(panel, agree, note, gated, visitors_accept)


def gated_licences(parts: Mapping[str, Licence]) -> tuple[Licence, ...]:
    """The licences of a model that have to be accepted, each once."""
    return tuple(dict.fromkeys(licence for licence in parts.values() if licence.gated))


def panel_text(model: str, parts: Mapping[str, Licence], *, visitors_accept: bool = True) -> str:
    """What is asked, what the gated licences forbid, and which licence each part has, as HTML."""
    gated = gated_licences(parts)
    title = f"{model}: accept its {'licence' if len(gated) == 1 else 'licences'} first"
    text = "Nothing is downloaded or loaded before you accept."
    if not visitors_accept:
        title, text = f"{model} is not available yet", OPERATOR_FIRST
    if not gated_models_allowed():
        title, text = f"{model} is not available here", SWITCHED_OFF
    terms = "".join(f"<p>The {_link(licence)} forbids {escape(licence.forbids)}.</p>" for licence in gated)
    return f"<h2>{escape(title)}</h2><p>{escape(text)}</p>{terms}{licence_table(parts)}"


def licence_table(parts: Mapping[str, Licence]) -> str:
    """Which licence covers which parts, as an HTML table with a row for each licence."""
    rows = "".join(
        f'<tr><th scope="row">{escape(_listed([part for part, its in parts.items() if its == licence]))}</th>'
        f"<td>{_link(licence)}{' (to be accepted)' if licence.gated else ''}</td></tr>"
        for licence in dict.fromkeys(parts.values())
    )
    return (
        '<table><thead><tr><th scope="col">Parts</th><th scope="col">Licence</th></tr></thead>'
        f"<tbody>{rows}</tbody></table>"
    )


def _listed(parts: Sequence[str]) -> str:
    """Names of parts in one line, for people."""
    names = ", ".join(_ABBREVIATIONS.get(part, part.replace("_", " ")) for part in parts)
    return names[:1].upper() + names[1:]


def _link(licence: Licence) -> str:
    """The licence's name, leading to its text where that has an address."""
    if not licence.url:
        return escape(licence.name)
    return f'<a href="{escape(licence.url)}" target="_blank" rel="noopener">{escape(licence.name)}</a>'
