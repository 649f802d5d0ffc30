"""Finished chunks on disk, under a key made of everything that decides their content.

The same job finds its chunks again, a longer job finds those of the shorter one, and a crash loses only the chunk that
was running. Knows no model: the caller says what a chunk depends on.
"""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtyping import UInt8
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lyra.errors import UserError
from lyra.export.video import write_video
from lyra.generation.state import ChunkRecord

FORMAT_VERSION = 2
"""Part of every key; raised when the loop's numbers change."""


@dataclass(frozen=True)
class ChunkStore:
    """A folder of chunks."""

    folder: Path

    def path(self, key: str) -> Path:
        """Folder of a chunk."""
        return self.folder / key

    def video(self, key: str) -> Path:
        """Video of a chunk."""
        return self.path(key) / "video.mp4"

    def load(self, key: str) -> ChunkRecord | None:
        """A finished chunk, or None; a damaged one counts as missing."""
        if not (self.path(key) / "chunk.json").exists() or not self.video(key).exists():
            return None
        try:
            return ChunkRecord.from_tensors(load_file(self.path(key) / "record.safetensors"))
        except (OSError, SafetensorError, TypeError, KeyError):
            return None

    def save(self, key: str, record: ChunkRecord, frames: UInt8[Tensor, "t 3 h w"], about: dict[str, Any]) -> None:
        """Write a chunk under a temporary name and rename it, so that a kill leaves no half chunk.

        Raises:
            UserError: the disk is full or cannot be written.
        """
        temporary = self.folder / f".{key}.tmp"
        with writing_to(self.folder):
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            save_file({name: t.cpu() for name, t in record.to_tensors().items()}, temporary / "record.safetensors")
            write_video(temporary / "video.mp4", frames)
            (temporary / "chunk.json").write_text(json.dumps(about, indent=1), encoding="utf-8")
            shutil.rmtree(self.path(key), ignore_errors=True)
            temporary.rename(self.path(key))


def content_key(*parts: Any) -> str:
    """A short hash of JSON values and bytes."""
    digest = hashlib.sha256(f"lyra chunk {FORMAT_VERSION}".encode())
    for part in parts:
        data = b"b" + part if isinstance(part, bytes) else b"j" + json.dumps(part, sort_keys=True).encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()[:24]


@contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Turn the failures of a disk into one sentence.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    try:
        yield
    except OSError as error:
        raise UserError(disk_message(folder, error)) from error
    except SafetensorError as error:
        raise UserError(f"{folder} cannot be written ({error}); free some space or choose another --out.") from error


def disk_message(folder: Path, error: OSError) -> str:
    """What is wrong with writing to a folder and what to do."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"The disk of {folder} is full; free some space and run the same command again, finished chunks are kept."
        )
    reason = error.strerror or str(error)
    return f"{folder} cannot be written ({reason}); choose another --out or change its permissions."
