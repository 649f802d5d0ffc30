"""How do files of a Hugging Face repository get here? From the cache, or by a download that can be stopped.

What can go wrong with the network, the cache and the disk becomes one sentence each. Licences are asked for before the
first request. Knows no model: which files belong to one is `lyra.hub`.
"""

from __future__ import annotations

import errno
import glob
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, errors, get_cached_repo_tree, snapshot_download, try_to_load_from_cache

from lyra.errors import UserError
from lyra.licences import Licence, require
from lyra.progress import Progress

_HTTP_ERROR: Any = errors.HfHubHTTPError.__bases__[0]
"""Base class of the HTTP library's errors, which is httpx or httpx2, depending on the version of huggingface_hub."""


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
        progress: told about each downloaded file, and asked before each whether to stop. Finished files are kept, so
            the same call goes on after an interruption.

    Raises:
        UserError: a licence is not accepted, the repository cannot be read, or the disk is too small.
        Cancelled: the user stopped the download.
    """
    require(licences)
    patterns = tuple(patterns)
    if snapshot := complete_snapshot(repository, patterns, revision):
        return snapshot
    commit, files = listing(repository, revision, download)
    return download_files(repository, commit, matching(files, patterns), progress or Progress())


def matching(files: Mapping[str, int], patterns: Iterable[str]) -> dict[str, int]:
    """The files, with their sizes, that match one of the patterns."""
    patterns = tuple(patterns)
    return {path: size for path, size in files.items() if any(fnmatchcase(path, pattern) for pattern in patterns)}


def complete_snapshot(repository: str, patterns: Iterable[str], revision: str | None) -> Path | None:
    """The newest snapshot in the Hugging Face cache that has all files matching the patterns; makes no request."""
    patterns = tuple(patterns)
    exact = not any(character in pattern for pattern in patterns for character in "*?[")
    folder = _cache() / f"models--{repository.replace('/', '--')}" / "snapshots"
    snapshots = [path for path in folder.glob(revision or "*") if path.is_dir()]
    for snapshot in sorted(snapshots, key=lambda path: path.stat().st_mtime, reverse=True):
        if exact and all((snapshot / path).is_file() for path in patterns):
            return snapshot  # Also where another program put them, which leaves no list of files.
        try:
            tree = get_cached_repo_tree(repository, revision=snapshot.name)
        except errors.CachedRepoTreeNotFoundError:
            continue  # Without the list of files nobody can tell whether one is missing.
        wanted = matching({file.path: file.size for file in tree}, patterns)
        if wanted and all((snapshot / path).is_file() for path in wanted):
            return snapshot
    return None


def listing(repository: str, revision: str | None, download: bool) -> tuple[str, dict[str, int]]:
    """Commit of a repository and the size in bytes of each of its files, the first request to the network."""
    if not download:
        raise UserError(f"{repository} is not on this machine; allow its download, or give a folder that holds it.")
    with _asking(repository):
        info = HfApi(endpoint=_endpoint()).model_info(repository, revision=revision, files_metadata=True)
    return str(info.sha), {file.rfilename: file.size or 0 for file in info.siblings or ()}


def download_files(repository: str, commit: str, files: Mapping[str, int], progress: Progress) -> Path:
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
        # Everything is there now: this checks it and leaves the list of files that `complete_snapshot` reads.
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
