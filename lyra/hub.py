"""Where weights are: names of models and of depth networks, the folders that hold them, their licences and hashes.

A model is one that ships with the project, a folder, or a repository on Hugging Face. Gated licences are asked for
before anything is downloaded or handed on. Knows file names and no network's code: `lyra.hub_files` downloads and
`lyra.loading` opens the files.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Literal

from lyra import hub_files
from lyra.config import RELEASED_SETTINGS, ModelSettings
from lyra.errors import UserError
from lyra.licences import APACHE_2, DEPTH_ANYTHING_3, RELEASED_PARTS, Licence, by_id, named_in, require
from lyra.progress import Progress

MODELS = Path(__file__).resolve().parent.parent / "assets" / "models"
"""Weights that ship with the project."""

DEFAULT_MODEL = "lyra-tiny"
RELEASED_MODEL = "nvidia/Lyra-2.0"
TOKENIZER = "google/umt5-xxl"
"""Repository of the tokenizer that the released text encoder was trained with; its 50 GB of weights are not needed."""

RELEASED_FILES: Mapping[str, tuple[str, ...]] = {
    "transformer": (
        "model/model/.metadata",
        "model/model/*.distcp",
        *(f"model/*{suffix}" for suffix in (".pth", ".pt", ".safetensors")),
    ),
    "sizes": ("sizes.json",),
    "lora": ("lora/dmd_distillation.safetensors",),
    "reconstruction": ("recon/model.pt",),
    "negative_prompt": ("text_encoder/negative_prompt.pt",),
    "autoencoder": ("vae/vae.pth",),
    "text_encoder": ("text_encoder/encoder.pth",),
    "image_encoder": ("image_encoder/model.pth",),
}
"""The released files that are read, by part, below the `checkpoints` folder; its other files are never downloaded."""

RELEASED_PATTERNS = tuple(pattern for patterns in RELEASED_FILES.values() for pattern in patterns)

TOKENIZER_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
LYRA_FILES = ("*.json", "*.safetensors")
"""Files of a repository in this project's own layout that are read."""

HASHED_FILES = (".safetensors", ".json", ".distcp", ".pth", ".pt")
WHOLE_HASH_BYTES = 64 * 2**20
"""Larger files are hashed by their size and both ends."""
EDGE_BYTES = 2**20

DEPTH_ANYTHING_OWNER = "depth-anything"
"""Owner of the public Depth Anything 3 repositories."""
DEPTH_ANYTHING_FILES = ("config.json", "model.safetensors")
"""What such a repository holds; its config.json names the published network as `model_name`."""

Layout = Literal["lyra", "released", "depth-anything"]

_IN_REPOSITORY = tuple(prefix + pattern for pattern in RELEASED_PATTERNS for prefix in ("checkpoints/", ""))
"""Patterns of the released files in a repository that has a `checkpoints` folder or is one."""
_RECONSTRUCTION = tuple(f"checkpoints/{path}" for part in ("reconstruction", "sizes") for path in RELEASED_FILES[part])

_REPOSITORY = re.compile(r"(?P<id>[\w-][\w.-]*/[\w-][\w.-]*)(@(?P<revision>[0-9a-f]{40}))?")


@dataclass(frozen=True)
class ModelSource:
    """A model that is there and may be loaded."""

    name: str
    """As the user named it."""
    folder: Path
    """Holds lyra.json (layout "lyra"), or `model`, `vae`, `text_encoder` and the others (layout "released"), or nothing
    but a public Depth Anything 3 (layout "depth-anything", which only `find_depth` gives)."""
    layout: Layout
    licences: Mapping[str, Licence]
    """Licence of each part; a folder in the "lyra" layout has one for all its weights."""
    shipped: bool
    """It came with this project."""
    revision: str | None = None
    """Commit of the Hugging Face repository, where the folder is a download."""


def find_model(name: str, *, download: bool = True, progress: Progress | None = None) -> ModelSource:
    """A model by its name, folder or Hugging Face id, downloaded if need be.

    Args:
        name: a shipped model; a folder with a lyra.json; a folder as NVIDIA released it, either the repository or its
            `checkpoints`; or `owner/name` of a repository with one of these layouts, `owner/name@commit` for an exact
            version. A repository that has been downloaded is used as it is, without a look at the network.
        download: whether a repository that is not there yet may be downloaded.
        progress: told about each downloaded file, and asked before each whether to stop. Finished files are kept, so
            the same call goes on after an interruption.

    Raises:
        UserError: there is no such model, its licence is not accepted or switched off, or the download failed.
        Cancelled: the user stopped the download.
    """
    if name in shipped_models():
        return _local_source(name, MODELS / name, shipped=True)
    folder = Path(name).expanduser()
    if folder.is_dir():
        return _local_source(name, folder)
    if match := _REPOSITORY.fullmatch(name):
        return _repository_source(name, match["id"], match["revision"], download, progress or Progress())
    shipped = ", ".join(shipped_models()) or "none is installed"
    raise UserError(
        f"There is no model '{name}'; choose one of: {shipped}, {RELEASED_MODEL}, or a folder that holds a lyra.json "
        "or NVIDIA's released files."
    )


def find_depth(name: str, *, download: bool = True, progress: Progress | None = None) -> ModelSource:
    """A depth network by name; of a whole model, the source stands for its depth network only, as do its licences.

    Args:
        name: a public Depth Anything 3 such as `da3-small`, `DA3-BASE` or `depth-anything/DA3-BASE@commit`; a folder
            with its config.json and model.safetensors; or a model as for `find_model`. Of NVIDIA's repository only the
            reconstruction network is downloaded; a folder in its layout needs no other file.
        download: whether a repository that is not there yet may be downloaded.
        progress: as for `find_model`.

    Raises:
        UserError: there is no such network, its licence is not accepted or switched off, or the download failed.
        Cancelled: the user stopped the download.
    """
    repository, _, commit = name.partition("@")
    public, revision = repository.lower().removeprefix(f"{DEPTH_ANYTHING_OWNER}/").upper(), commit or None
    if public in DEPTH_ANYTHING_3 and re.fullmatch("|[0-9a-f]{40}", commit):
        repository, parts = f"{DEPTH_ANYTHING_OWNER}/{public}", {"depth": DEPTH_ANYTHING_3[public]}
        return _fetched_depth(name, repository, DEPTH_ANYTHING_FILES, parts, revision, download, progress)
    folder = Path(name).expanduser()
    if name not in shipped_models() and folder.is_dir():
        return _depth_in_folder(name, folder)
    if repository.lower() == RELEASED_MODEL.lower() and downloaded(name) is None:
        parts = {"depth": RELEASED_PARTS["reconstruction"]}
        return _fetched_depth(name, RELEASED_MODEL, _RECONSTRUCTION, parts, revision, download, progress)
    if name not in shipped_models() and not _REPOSITORY.fullmatch(name):
        raise UserError(
            f"There is no depth network '{name}'; choose da3-small, da3-base, a folder that holds Depth Anything 3's "
            "config.json and model.safetensors, or a model that has a depth network."
        )
    return _depth_of(find_model(name, download=download, progress=progress))


def licences_of(name: str) -> Mapping[str, Licence]:
    """Licence of each part of a model, as far as it can be told without a download; asks for no acceptance.

    Raises:
        UserError: a folder's lyra.json cannot be read.
    """
    if name.split("@")[0].lower() == RELEASED_MODEL.lower():
        return RELEASED_PARTS
    folder = downloaded(name)
    found = _layout_of(folder) if folder is not None else None
    if found is None:
        return {}
    return RELEASED_PARTS if found[0] == "released" else _licences_of(ModelSettings.load(found[1]))


def downloaded(name: str) -> Path | None:
    """The folder of a model if it is complete on this machine; only looks, and asks for no licence."""
    folder = MODELS / name if name in shipped_models() else Path(name).expanduser()
    if not folder.is_dir() and (match := _REPOSITORY.fullmatch(name)):
        folder = _model_snapshot(match["id"], match["revision"]) or folder
    found = _layout_of(folder)
    return found[1] if found else None


def model_folder(name: str) -> Path:
    """Folder of a model that is on this machine, by its name or path.

    Raises:
        UserError: there is no such model here, or its licence is not accepted.
    """
    return find_model(name, download=False).folder


def settings_of(name: str) -> ModelSettings:
    """Settings of a model, without loading or downloading its weights.

    Raises:
        UserError: there is no such model, or its lyra.json cannot be read.
    """
    folder = downloaded(name)
    found = _layout_of(folder) if folder is not None else None
    if found is not None:
        return RELEASED_SETTINGS if found[0] == "released" else ModelSettings.load(found[1])
    if name.split("@")[0].lower() == RELEASED_MODEL.lower():
        return RELEASED_SETTINGS
    return ModelSettings.load(model_folder(name))


def tokenizer_folder(model: Path, *, download: bool = True, progress: Progress | None = None) -> Path:
    """Folder of the released text encoder's tokenizer: `tokenizer` beside the weights, or the one of Hugging Face.

    Raises:
        UserError: it is not there and cannot be downloaded.
        Cancelled: the user stopped the download.
    """
    own = model / "tokenizer"
    if (own / "tokenizer.json").is_file():
        return own
    return hub_files.fetch(TOKENIZER, TOKENIZER_FILES, licences=(APACHE_2,), download=download, progress=progress)


@lru_cache
def weights_hash(folder: Path) -> str:
    """SHA-256 over the names and bytes of a model's files, shortened.

    Files above 64 MiB count with their size, first and last MiB, so that tens of GB take no time: this tells versions
    of weights apart and is no proof that a file is undamaged. In the released layout only files that are read count.
    """
    layout, base = _layout_of(folder) or ("lyra", folder)
    patterns = RELEASED_PATTERNS if layout == "released" else [f"**/*{suffix}" for suffix in HASHED_FILES]
    digest = hashlib.sha256()
    for path in [path for pattern in patterns for path in sorted(base.glob(pattern))]:
        name = path.relative_to(base)
        if name.parts[0] == ".cache":
            continue  # Notes of `hf download`, which differ from one download to the next.
        digest.update(name.as_posix().encode())
        for piece in _telling_bytes(path):
            digest.update(piece)
    return digest.hexdigest()[:16]


def file_hash(path: Path) -> str:
    """SHA-256 of one file, with the shortcut and the length of `weights_hash`.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        return hashlib.sha256(b"".join(_telling_bytes(path.expanduser()))).hexdigest()[:16]
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}); check its path.") from error


def _telling_bytes(path: Path) -> Iterator[bytes]:
    """All of a file, or the size and both ends of a large one."""
    size = path.stat().st_size
    if size <= WHOLE_HASH_BYTES:
        yield path.read_bytes()
        return
    yield str(size).encode()
    with path.open("rb") as file:
        yield file.read(EDGE_BYTES)
        file.seek(-EDGE_BYTES, os.SEEK_END)
        yield file.read(EDGE_BYTES)


def shipped_models() -> list[str]:
    """Names of the models that ship with the project."""
    return sorted(path.parent.name for path in MODELS.glob("*/lyra.json"))


def _layout_of(folder: Path) -> tuple[Layout, Path] | None:
    """Layout of a folder and the folder that holds its parts; None where it is no model."""
    if (folder / "lyra.json").is_file():
        return "lyra", folder
    for base in (folder, folder / "checkpoints"):
        if any(path.is_file() for pattern in RELEASED_FILES["transformer"] for path in base.glob(pattern)):
            return "released", base
    return None


def _local_source(name: str, folder: Path, *, shipped: bool = False, revision: str | None = None) -> ModelSource:
    """The model in a folder, once its licences are accepted."""
    found = _layout_of(folder)
    if found is None:
        raise UserError(
            f"{folder} is no model; give a folder that holds a lyra.json, or NVIDIA's released files in `checkpoints`."
        )
    layout, base = found
    licences = RELEASED_PARTS if layout == "released" else _licences_of(ModelSettings.load(base))
    require(licences.values())
    return ModelSource(name, base, layout, licences, shipped, revision)


def _licences_of(settings: ModelSettings) -> dict[str, Licence]:
    """Licences of weights in this project's layout; converted weights name the licences that they came with."""
    if settings.part_licences:
        return {part: by_id(name) for part, name in settings.part_licences.items()}
    found = named_in(str(settings.licence))
    return {"weights": found[0]} if len(found) == 1 else {f"weights ({item.id})": item for item in found}


def _repository_source(
    name: str, repository: str, revision: str | None, download: bool, progress: Progress
) -> ModelSource:
    """The model in a Hugging Face repository; what is not here yet is downloaded after its licences are accepted."""
    if repository.lower() == RELEASED_MODEL.lower():
        require(RELEASED_PARTS.values())
    if snapshot := _model_snapshot(repository, revision):
        return _local_source(name, snapshot, revision=snapshot.name)
    commit, files = hub_files.listing(repository, revision, download)
    if "lyra.json" in files:
        # Only this small file can say what licence the weights have.
        snapshot = hub_files.download_files(repository, commit, {"lyra.json": files["lyra.json"]}, progress)
        require(_licences_of(ModelSettings.load(snapshot)).values())
        snapshot = hub_files.download_files(repository, commit, hub_files.matching(files, LYRA_FILES), progress)
        return _local_source(name, snapshot, revision=commit)
    wanted = hub_files.matching(files, _IN_REPOSITORY)
    if not hub_files.matching(wanted, ["*" + pattern for pattern in RELEASED_FILES["transformer"]]):
        raise UserError(
            f"{repository} on Hugging Face holds neither a lyra.json nor NVIDIA's released files; choose another model."
        )
    require(RELEASED_PARTS.values())
    hub_files.fetch(TOKENIZER, TOKENIZER_FILES, licences=(APACHE_2,), progress=progress)
    snapshot = hub_files.download_files(repository, commit, wanted, progress)
    return _local_source(name, snapshot, revision=commit)


def _model_snapshot(repository: str, revision: str | None) -> Path | None:
    """Snapshot folder of a model whose download is complete."""
    for layout, patterns in (("lyra", LYRA_FILES), ("released", _IN_REPOSITORY)):
        snapshot = hub_files.complete_snapshot(repository, patterns, revision)
        found = _layout_of(snapshot) if snapshot else None
        if found and found[0] == layout:
            return snapshot
    return None


def _fetched_depth(
    name: str,
    repository: str,
    patterns: tuple[str, ...],
    licences: Mapping[str, Licence],
    revision: str | None,
    download: bool,
    progress: Progress | None,
) -> ModelSource:
    """The depth network among some files of a repository."""
    snapshot = hub_files.fetch(
        repository, patterns, licences=licences.values(), revision=revision, download=download, progress=progress
    )
    return replace(_depth_in_folder(name, snapshot), licences=licences, revision=snapshot.name)


def _depth_in_folder(name: str, folder: Path) -> ModelSource:
    """The depth network in a folder, once its licence is accepted."""
    if (folder / "lyra.json").is_file():
        return _depth_of(_local_source(name, folder))
    for base in (folder, folder / "checkpoints"):
        if any((base / path).is_file() for path in RELEASED_FILES["reconstruction"]):
            require([RELEASED_PARTS["reconstruction"]])
            return _depth_of(ModelSource(name, base, "released", RELEASED_PARTS, shipped=False))
    missing = [path for path in DEPTH_ANYTHING_FILES if not (folder / path).is_file()]
    if missing:
        raise UserError(
            f"{folder} holds no depth network ({' and '.join(missing)} missing); give a folder with Depth Anything 3's "
            "config.json and model.safetensors as published, or the folder of a model."
        )
    licence = _published_licence(folder / DEPTH_ANYTHING_FILES[0])
    require([licence])
    return ModelSource(name, folder, "depth-anything", {"depth": licence}, shipped=False)


def _published_licence(config: Path) -> Licence:
    """The licence of the public Depth Anything 3 that a config.json names."""
    try:
        values = json.loads(config.read_text(encoding="utf-8"))
        published = str(values["model_name"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{config} names no published Depth Anything 3 ({type(error).__name__}: {error}); use the config.json that "
            "came with the weights, or give the folder of the whole model."
        ) from error
    if published.upper() not in DEPTH_ANYTHING_3:
        known = ", ".join(sorted(name.lower() for name in DEPTH_ANYTHING_3))
        raise UserError(f"{config} names the network '{published}', which is none of: {known}.")
    return DEPTH_ANYTHING_3[published.upper()]


def _depth_of(source: ModelSource) -> ModelSource:
    """A model as the source of its depth network alone."""
    own = source.licences.get("reconstruction")
    found = {own} if own is not None else set(source.licences.values())
    return replace(source, licences={"depth": found.pop()} if len(found) == 1 else source.licences)
