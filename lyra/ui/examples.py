"""Which photos come with the app, who took them and under which licence?

Reads `examples/photos` and its credits.json. Knows no component; the HTML it makes is escaped.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

PHOTOS = Path(__file__).resolve().parents[2] / "examples" / "photos"


@dataclass(frozen=True)
class Example:
    """An example photo with its credit."""

    path: Path
    title: str
    author: str
    licence: str
    licence_url: str
    source: str

    @property
    def name(self) -> str:
        """Short name, for under a thumbnail."""
        return self.path.stem.replace("-", " ").capitalize()

    @property
    def credit(self) -> str:
        """Title, author, licence and source, with links, as HTML."""
        licence, source = escape(self.licence_url, quote=True), escape(self.source, quote=True)
        return (
            f"{escape(self.title)} by {escape(self.author)}, "
            f'<a href="{licence}" target="_blank" rel="noopener">{escape(self.licence)}</a>, '
            f'<a href="{source}" target="_blank" rel="noopener">source</a>'
        )


def load_examples(folder: Path = PHOTOS) -> list[Example]:
    """The photos named in the folder's credits.json; none if there is no such file."""
    credits = folder / "credits.json"
    if not credits.exists():
        return []
    entries = json.loads(credits.read_text(encoding="utf-8")).items()
    return [Example(folder / name, **entry) for name, entry in entries if (folder / name).exists()]


def credits_list(examples: Sequence[Example]) -> str:
    """All credits as an HTML list."""
    items = "".join(f"<li>{example.credit}</li>" for example in examples)
    return f'<ul class="lyra-credits">{items}</ul>'
