"""Where weights are: names of models, the folders that hold them, their licences and hashes, and how they get there.

A model is one that ships with the project, a folder, or a repository on Hugging Face. Gated licences are asked for
before anything is downloaded or handed on. Knows file names and no network's code: `lyra.loading` opens the files.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import HfApi, constants, errors, get_cached_repo_tree, snapshot_download, try_to_load_from_cache

from lyra.config import RELEASED_SETTINGS, ModelSettings
from lyra.errors import UserError
from lyra.licences import APACHE_2, RELEASED_PARTS, Licence, by_id, named_in, require
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

Layout = Literal["lyra", "released"]

_IN_REPOSITORY = tuple(prefix + pattern for pattern in RELEASED_PATTERNS for prefix in ("checkpoints/", ""))
"""Patterns of the released files in a repository that has a `checkpoints` folder or is one."""

_HTTP_ERROR: Any = errors.HfHubHTTPError.__bases__[0]
"""Base class of the HTTP library's errors, which is httpx or httpx2, depending on the version of huggingface_hub."""

_REPOSITORY = re.compile(r"(?P<id>[\w-][\w.-]*/[\w-][\w.-]*)(@(?P<revision>[0-9a-f]{40}))?")


@dataclass(frozen=True)
class ModelSource:
    """A model that is there and may be loaded."""

    name: str
    """As the user named it."""
    folder: Path
    """Holds lyra.json (layout "lyra"), or `model`, `vae`, `text_encoder` and the others (layout "released")."""
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
    return fetch(TOKENIZER, TOKENIZER_FILES, licences=(APACHE_2,), download=download, progress=progress)


def fetch(
    repository: str,
    patterns: Iterable[str],
    *,
    licences: Iterable[Licence],
    revision: str | None = None,
    download: bool = True,
    progress: Progress | None = None,
) -> Path:
    """Folder with some files of a Hugging Face repository, from the cache without a request if they are all there.

    Args:
        repository: its `owner/name`.
        patterns: shell patterns of paths in it; `*` also matches a slash.
        licences: licences of these files, required before anything is asked of the network.
        revision: a commit; the newest one if None.
        download: whether missing files may be downloaded.
        progress: as for `find_model`.

    Raises:
        UserError: a licence is not accepted, the repository cannot be read, or the disk is too small.
        Cancelled: the user stopped the download.
    """
    require(licences)
    patterns = tuple(patterns)
    if snapshot := _complete_snapshot(repository, patterns, revision):
        return snapshot
    commit, files = _listing(repository, revision, download)
    return _download(repository, commit, _matching(files, patterns), progress or Progress())


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
    commit, files = _listing(repository, revision, download)
    if "lyra.json" in files:
        # Only this small file can say what licence the weights have.
        snapshot = _download(repository, commit, {"lyra.json": files["lyra.json"]}, progress)
        require(_licences_of(ModelSettings.load(snapshot)).values())
        snapshot = _download(repository, commit, _matching(files, LYRA_FILES), progress)
        return _local_source(name, snapshot, revision=commit)
    wanted = _matching(files, _IN_REPOSITORY)
    if not _matching(wanted, ["*" + pattern for pattern in RELEASED_FILES["transformer"]]):
        raise UserError(
            f"{repository} on Hugging Face holds neither a lyra.json nor NVIDIA's released files; choose another model."
        )
    require(RELEASED_PARTS.values())
    fetch(TOKENIZER, TOKENIZER_FILES, licences=(APACHE_2,), progress=progress)
    snapshot = _download(repository, commit, wanted, progress)
    return _local_source(name, snapshot, revision=commit)


def _matching(files: Mapping[str, int], patterns: Iterable[str]) -> dict[str, int]:
    """The files, with their sizes, that match one of the patterns."""
    patterns = tuple(patterns)
    return {path: size for path, size in files.items() if any(fnmatchcase(path, pattern) for pattern in patterns)}


def _model_snapshot(repository: str, revision: str | None) -> Path | None:
    """Snapshot folder of a model whose download is complete."""
    for layout, patterns in (("lyra", LYRA_FILES), ("released", _IN_REPOSITORY)):
        snapshot = _complete_snapshot(repository, patterns, revision)
        found = _layout_of(snapshot) if snapshot else None
        if found and found[0] == layout:
            return snapshot
    return None


def _complete_snapshot(repository: str, patterns: Iterable[str], revision: str | None) -> Path | None:
    """The newest snapshot in the Hugging Face cache that has all files matching the patterns; makes no request."""
    folder = _cache() / f"models--{repository.replace('/', '--')}" / "snapshots"
    snapshots = [path for path in folder.glob(revision or "*") if path.is_dir()]
    for snapshot in sorted(snapshots, key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            tree = get_cached_repo_tree(repository, revision=snapshot.name)
        except errors.CachedRepoTreeNotFoundError:
            continue  # Without the list of files nobody can tell whether one is missing.
        wanted = _matching({file.path: file.size for file in tree}, patterns)
        if wanted and all((snapshot / path).is_file() for path in wanted):
            return snapshot
    return None


def _listing(repository: str, revision: str | None, download: bool) -> tuple[str, dict[str, int]]:
    """Commit of a repository and the size in bytes of each of its files, the first request to the network."""
    if not download:
        raise UserError(f"{repository} is not on this machine; allow its download, or give a folder that holds it.")
    with _asking(repository):
        info = HfApi(endpoint=_endpoint()).model_info(repository, revision=revision, files_metadata=True)
    return str(info.sha), {file.rfilename: file.size or 0 for file in info.siblings or ()}


def _download(repository: str, commit: str, files: Mapping[str, int], progress: Progress) -> Path:
    """Download some files into the Hugging Face cache, one after the other, and return the snapshot that holds them.

    A broken connection goes on where it broke; after that, whole files are kept for the next call.
    """
    if not files:
        raise UserError(f"{repository} on Hugging Face has none of the files that are needed; choose another model.")
    missing = [path for path in files if not isinstance(try_to_load_from_cache(repository, path, revision=commit), str)]
    total, done = sum(files[path] for path in missing), 0
    _check_disk(repository, total)
    if missing:
        progress.enter(f"downloading {repository} (MB)")
    for path in missing:
        progress.step(done // 10**6, max(total // 10**6, 1))
        with _asking(repository):
            snapshot_download(repository, revision=commit, allow_patterns=[glob.escape(path)], endpoint=_endpoint())
        done += files[path]
    progress.finish()
    with _asking(repository):
        # Everything is there now: this checks it and leaves the list of files that `_complete_snapshot` reads.
        patterns = [glob.escape(path) for path in files]
        return Path(snapshot_download(repository, revision=commit, allow_patterns=patterns, endpoint=_endpoint()))


def _cache() -> Path:
    """The folder in which Hugging Face's library keeps repositories."""
    return Path(constants.HF_HUB_CACHE)


def _endpoint() -> str:
    """Address of Hugging Face, or of the mirror that HF_ENDPOINT names."""
    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or constants.ENDPOINT


def _check_disk(repository: str, needed: int) -> None:
    """Make sure that a download of so many bytes fits on the disk."""
    folder = _cache()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"{repository} needs {needed / 1e9:.1f} GB more in {_cache()}, where {free / 1e9:.1f} GB are free; free "
            "some space or set HF_HOME to a folder on a larger disk."
        )


@contextmanager
def _asking(repository: str) -> Iterator[None]:
    """Turn what can go wrong with Hugging Face into one sentence."""
    try:
        yield
    except (OSError, _HTTP_ERROR, errors.HFValidationError, errors.XetDownloadError, RuntimeError) as error:
        raise UserError(_sentence(repository, error)) from error


def _sentence(repository: str, error: BaseException) -> str:
    """What is wrong with a repository and what to do."""
    if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ is not None:
        return _sentence(repository, error.__cause__)
    if isinstance(error, errors.GatedRepoError):
        return (
            f"{repository} is open to registered people only; accept its terms at https://huggingface.co/{repository} "
            "and sign in with `hf auth login` or HF_TOKEN."
        )
    if isinstance(error, (errors.RepositoryNotFoundError, errors.HFValidationError)):
        return (
            f"There is neither a folder {repository} nor a Hugging Face repository of that name that you may read; "
            "check the name, or sign in with `hf auth login` if it is private."
        )
    if isinstance(error, (errors.RevisionNotFoundError, errors.EntryNotFoundError)):
        return f"{repository} has not got the asked version or file; leave the version out to get the newest one."
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        if status in (401, 403):
            return (
                f"Hugging Face refuses access to {repository} (status {status}); check the rights of your token, or "
                "sign in again with `hf auth login`."
            )
        return f"Hugging Face answers with status {status} for {repository}; try the same again later."
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
        return f"The disk of {_cache()} is full; free some space and try again, finished files are kept."
    if isinstance(error, OSError) and error.filename is not None:
        return f"{_cache()} cannot be written ({error.strerror}); set HF_HOME to a folder that you may write."
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return (
        f"{repository} cannot be downloaded ({reason}); check the network and try again, finished files are kept, or "
        "give a folder with the files instead."
    )
