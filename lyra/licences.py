"""Which licence covers which weights, what does it forbid, and has the user accepted it?

A gated licence must be accepted before its weights are downloaded or loaded; the acceptance is remembered in the
user's config folder. Knows no folder of weights and no network: `lyra.hub` asks `require` before it touches either.
"""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from pathlib import Path
from types import MappingProxyType

from lyra import __version__
from lyra.errors import UserError

logger = logging.getLogger(__name__)

ACCEPT_VARIABLE = "LYRA_ACCEPT_LICENCE"
"""Environment variable with the ids of accepted licences, separated by commas."""

SWITCH_OFF_VARIABLE = "LYRA_NO_GATED_MODELS"
"""Environment variable with which a deployment refuses every model under a gated licence."""

ACCEPTANCE_FILE = "licences.json"


@dataclass(frozen=True)
class Licence:
    """A licence of weights, told in the words of this project; the text behind `url` is what counts."""

    id: str
    """Short name: SPDX's where there is one."""
    name: str
    url: str
    applies_to: str
    """Which parts of which models it covers."""
    forbids: str
    """What it does not allow, as the object of "forbids"."""
    gated: bool
    """Whether the user must accept it before the weights are downloaded or loaded."""


APACHE_2 = Licence(
    id="Apache-2.0",
    name="Apache License 2.0",
    url="https://www.apache.org/licenses/LICENSE-2.0",
    applies_to=(
        "lyra-tiny; of nvidia/Lyra-2.0 the Wan 2.1 autoencoder, the UMT5-XXL text encoder and its tokenizer; the "
        "Qwen3-VL captioner; Depth Anything 3 small, base, mono-large and metric-large"
    ),
    forbids="passing the weights on without the licence text and the notices that came with them",
    gated=False,
)
MIT = Licence(
    id="MIT",
    name="MIT License",
    url="https://opensource.org/license/mit",
    applies_to="the OpenCLIP ViT-H/14 image encoder of nvidia/Lyra-2.0",
    forbids="passing the weights on without the copyright notice and the licence text",
    gated=False,
)
NVIDIA_RESEARCH = Licence(
    id="nvidia-research",
    name="NVIDIA Internal Scientific Research and Development Model License",
    url=(
        "https://www.nvidia.com/en-us/agreements/enterprise-software/"
        "nvidia-internal-scientific-research-and-development-model-license/"
    ),
    applies_to=(
        "the weights that NVIDIA trained for nvidia/Lyra-2.0 (transformer, DMD LoRA, negative prompt, reconstruction) "
        "and every checkpoint converted or fine-tuned from them"
    ),
    forbids=(
        "everything but your own scientific research and development: no commercial or production use, no deployment "
        "for others, no passing on, sublicensing or public showing of the weights or of what is derived from them, "
        "and no making of works that are sold or distributed"
    ),
    gated=True,
)
CC_BY_NC_4 = Licence(
    id="CC-BY-NC-4.0",
    name="Creative Commons Attribution-NonCommercial 4.0 International",
    url="https://creativecommons.org/licenses/by-nc/4.0/",
    applies_to="Depth Anything 3 large, giant and nested, as published by their authors",
    forbids="use aimed at commercial advantage or payment, and sharing without credit and a link to the licence",
    gated=True,
)

LICENCES = (APACHE_2, MIT, NVIDIA_RESEARCH, CC_BY_NC_4)
"""All licences that this program knows."""

RELEASED_PARTS: Mapping[str, Licence] = MappingProxyType(
    {
        "transformer": NVIDIA_RESEARCH,
        "lora": NVIDIA_RESEARCH,
        "reconstruction": NVIDIA_RESEARCH,
        "negative_prompt": NVIDIA_RESEARCH,
        "autoencoder": APACHE_2,
        "text_encoder": APACHE_2,
        "tokenizer": APACHE_2,
        "image_encoder": MIT,
    }
)
"""Licence of each part of nvidia/Lyra-2.0. NVIDIA's own parts are under its licence; the others are unchanged copies of
public weights, listed with the licence that their authors gave them. The reconstruction network is a fine-tuned Depth
Anything 3 nested, which its authors published under CC-BY-NC-4.0."""

DEPTH_ANYTHING_3: Mapping[str, Licence] = MappingProxyType(
    {
        "DA3-SMALL": APACHE_2,
        "DA3-BASE": APACHE_2,
        "DA3MONO-LARGE": APACHE_2,
        "DA3METRIC-LARGE": APACHE_2,
        "DA3-LARGE": CC_BY_NC_4,
        "DA3-LARGE-1.1": CC_BY_NC_4,
        "DA3-GIANT": CC_BY_NC_4,
        "DA3-GIANT-1.1": CC_BY_NC_4,
        "DA3NESTED-GIANT-LARGE": CC_BY_NC_4,
        "DA3NESTED-GIANT-LARGE-1.1": CC_BY_NC_4,
    }
)
"""Licence of each public Depth Anything 3 checkpoint, by its name below `depth-anything/`."""


@dataclass(frozen=True)
class Acceptance:
    """That the user accepted a licence."""

    licence: str
    """Id of the licence."""
    date: str
    """Moment in ISO 8601, UTC."""
    version: str
    """Version of this program that asked."""
    how: str
    """How it was given, such as "command line", "app" or "environment"."""


class LicenceNeeded(UserError):
    """Gated licences have not been accepted yet."""

    def __init__(self, licences: Iterable[Licence], sentence: str) -> None:
        super().__init__(sentence)
        self.licences = tuple(licences)


def by_id(name: str) -> Licence:
    """A licence by its id; upper and lower case are the same.

    Raises:
        UserError: there is no such licence.
    """
    for licence in LICENCES:
        if licence.id.lower() == name.strip().lower():
            return licence
    known = ", ".join(licence.id for licence in LICENCES)
    raise UserError(f"There is no licence '{name}'; choose one of: {known}.")


def named_in(text: str) -> tuple[Licence, ...]:
    """The licences that a text names by id or by name, as a model's lyra.json does.

    A text that names none of them gives one licence that says so, ungated: this program cannot know its terms.
    """
    words = _words(text)
    found = tuple(item for item in LICENCES if _words(item.id) in words or _words(item.name) in words)
    name = text.strip() or "an unnamed licence"
    return found or (
        Licence(
            id=name,
            name=name,
            url="",
            applies_to="these weights",
            forbids="what its own text says, which this program does not know",
            gated=False,
        ),
    )


def _words(text: str) -> str:
    """Lower-case words between single spaces, so that spelling variants of a name compare equal."""
    return f" {' '.join(re.findall('[a-z0-9]+', text.lower()))} "


def gated_models_allowed() -> bool:
    """Whether this deployment lets models under a gated licence be used at all."""
    return os.environ.get(SWITCH_OFF_VARIABLE, "").strip() in ("", "0")


def accepted(licence: Licence) -> Acceptance | None:
    """The acceptance of a licence, from the config folder or the environment; None where there is none."""
    remembered = _read().get(licence.id)
    if remembered is None and licence.id.lower() in _ids_in_environment():
        return _acceptance(licence, "environment")
    return remembered


def accept(licence: Licence, how: str) -> Acceptance:
    """Remember that the user accepts a licence; `how` says by what means.

    Raises:
        UserError: the config folder cannot be written.
    """
    acceptance = _acceptance(licence, how)
    try:
        _write({**_read(), licence.id: acceptance})
    except OSError as error:
        raise UserError(
            f"The acceptance of {licence.name} cannot be remembered in {config_folder()} ({error.strerror or error}); "
            "set LYRA_CONFIG_DIR to a folder that you may write."
        ) from error
    return acceptance


def require(licences: Iterable[Licence]) -> None:
    """Make sure that every gated one of some licences may be used and is accepted.

    Raises:
        UserError: this deployment has switched gated models off, or a licence is not accepted yet.
    """
    gated = [licence for licence in _once(licences) if licence.gated]
    if gated and not gated_models_allowed():
        names = " and ".join(licence.name for licence in gated)
        raise UserError(
            f"This deployment has switched off models under the {names} ({SWITCH_OFF_VARIABLE} is set); use lyra-tiny, "
            "or run the program yourself where the licence allows it."
        )
    found = {licence: accepted(licence) for licence in gated}
    missing = [licence for licence, acceptance in found.items() if acceptance is None]
    if missing:
        terms = "; and the ".join(
            f"{licence.name} ({licence.url}), which covers {licence.applies_to} and forbids {licence.forbids}"
            for licence in missing
        )
        ids = ",".join(licence.id for licence in missing)
        raise LicenceNeeded(
            missing,
            f"This model needs your acceptance of the {terms}; read it and, if you agree, give `--accept-licence`, set "
            f"{ACCEPT_VARIABLE}={ids} or tick the checkbox in the app.",
        )
    remembered = _read()
    for licence, acceptance in found.items():
        if acceptance is not None and licence.id not in remembered:
            _remember_environment(licence)


def notice(licences: Iterable[Licence]) -> str:
    """What some licences cover and forbid, as plain text for people; a paragraph for each licence."""
    paragraphs = []
    for licence in _once(licences):
        lines = [
            f"{licence.name} ({licence.id})",
            f"Covers: {licence.applies_to}.",
            f"Forbids: {licence.forbids}.",
        ]
        lines += [f"Text: {licence.url}"] if licence.url else []
        lines += ["Must be accepted before these weights are downloaded or loaded."] if licence.gated else []
        paragraphs.append("\n".join(lines))
    return "\n\n".join(paragraphs)


def config_folder() -> Path:
    """Where this program remembers what the user decided."""
    if own := os.environ.get("LYRA_CONFIG_DIR"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CONFIG_HOME")
    return (Path(base) if base else Path.home() / ".config") / "lyra"


def _once(licences: Iterable[Licence]) -> list[Licence]:
    """Each licence once, in the order given."""
    return list(dict.fromkeys(licences))


def _acceptance(licence: Licence, how: str) -> Acceptance:
    """An acceptance given now."""
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return Acceptance(licence=licence.id, date=now, version=__version__, how=how)


def _ids_in_environment() -> set[str]:
    """Ids that the environment variable accepts, in lower case."""
    ids = {name.strip().lower() for name in os.environ.get(ACCEPT_VARIABLE, "").split(",")} - {""}
    if unknown := ids - {licence.id.lower() for licence in LICENCES}:
        known = ", ".join(licence.id for licence in LICENCES)
        logger.warning("%s names no licence: %s; known are %s.", ACCEPT_VARIABLE, ", ".join(sorted(unknown)), known)
    return ids


def _remember_environment(licence: Licence) -> None:
    """Remember an acceptance by the environment; it counts even where it cannot be written down."""
    try:
        accept(licence, "environment")
    except UserError as error:
        logger.warning("%s", error)


def _read() -> dict[str, Acceptance]:
    """Remembered acceptances by licence id; none where the file is missing, unreadable or damaged."""
    path = config_folder() / ACCEPTANCE_FILE
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return {}
    except OSError as error:
        logger.warning("%s cannot be read (%s), so no licence counts as accepted.", path, error.strerror or error)
        return {}
    try:
        entries = [
            Acceptance(**{field.name: entry[field.name] for field in fields(Acceptance)})
            for entry in json.loads(text.decode("utf-8"))["accepted"]
        ]
        for entry in entries:
            if not all(isinstance(value, str) and value for value in asdict(entry).values()):
                raise TypeError("a value is not a text")
            datetime.fromisoformat(entry.date)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        _set_aside(path, error)
        return {}
    return {entry.licence: entry for entry in entries}


def _set_aside(path: Path, error: Exception) -> None:
    """Rename a damaged file to a free name beside it, so that nothing of it is lost."""
    number = 1
    while (kept := path.with_name(f"{path.name}.damaged-{number}")).exists():
        number += 1
    try:
        path.rename(kept)
        logger.warning("%s is damaged (%s); it is kept as %s and nothing counts as accepted.", path, error, kept.name)
    except OSError as rename_error:
        logger.warning("%s is damaged (%s) and cannot be renamed (%s).", path, error, rename_error)


def _write(acceptances: Mapping[str, Acceptance]) -> None:
    """Write all acceptances; the file is the old one or the new one at every moment."""
    folder = config_folder()
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"accepted": [asdict(entry) for entry in acceptances.values()]}, indent=2) + "\n"
    handle, name = tempfile.mkstemp(dir=folder, prefix=ACCEPTANCE_FILE, suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(folder / ACCEPTANCE_FILE)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
