"""Where weights are: names of models, the folders that hold them, their licences and hashes.

Knows no network's code. `lyra-tiny` ships with the project; a folder with a lyra.json is a model too. Weights that
would have to be downloaded are not fetched here.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path

from lyra.config import ModelSettings
from lyra.errors import UserError

MODELS = Path(__file__).resolve().parent.parent / "assets" / "models"
"""Weights that ship with the project."""

DEFAULT_MODEL = "lyra-tiny"
RELEASED_MODEL = "nvidia/Lyra-2.0"


def model_folder(name: str) -> Path:
    """Folder of a model by its name or path.

    Raises:
        UserError: there is no such model, or it cannot be used yet.
    """
    shipped = MODELS / name
    folder = Path(name).expanduser()
    if (shipped / "lyra.json").exists():
        return shipped
    if (folder / "lyra.json").exists():
        return folder
    if name == RELEASED_MODEL:
        raise UserError(
            "nvidia/Lyra-2.0 cannot be loaded by this version yet: its network, memory and loop are implemented, its "
            "checkpoint loader is not; use --model lyra-tiny."
        )
    names = ", ".join(sorted(path.parent.name for path in MODELS.glob("*/lyra.json"))) or "none is installed"
    raise UserError(f"There is no model '{name}'; choose one of: {names}, or a folder that holds a lyra.json.")


@lru_cache
def weights_hash(folder: Path) -> str:
    """SHA-256 over the names and bytes of a model's weight files, shortened."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.safetensors")) + sorted(folder.rglob("*.json")):
        digest.update(path.relative_to(folder).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def settings_of(name: str) -> ModelSettings:
    """Settings of a model, without loading its weights."""
    return ModelSettings.load(model_folder(name))
