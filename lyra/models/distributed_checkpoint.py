"""Reads a torch distributed checkpoint (DCP) folder without processes and without trusting its pickle.

The released transformer is such a folder: `.metadata` says which slice of which tensor lies where in `__*.distcp`.
torch's own reader does the reading; only its metadata, a pickle, is read by an unpickler that knows the few harmless
classes of the format. Knows no model.
"""

from __future__ import annotations

import io
import pickle
import warnings
from collections.abc import Collection, Iterator, Mapping
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, StorageMeta, TensorStorageMetadata

from lyra.errors import UserError

METADATA = ".metadata"
GROUP_BYTES = 2 << 30
"""About how much is read at a time, which bounds memory while a checkpoint is cast or converted."""

_FORMAT_CLASSES = {
    "torch.distributed.checkpoint.metadata": {
        "Metadata",
        "MetadataIndex",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "TensorProperties",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "collections": {"OrderedDict"},
}


class RecordedPath(str):
    """A path as text: the folder that the checkpoint was written to, which nothing here opens."""

    __slots__ = ()

    def __new__(cls, *parts: str) -> RecordedPath:
        """A path of these parts."""
        return super().__new__(cls, "/".join(parts))


class MetadataUnpickler(pickle._Unpickler):
    """Builds the classes of the checkpoint format and refuses every other name.

    It is the unpickler in Python, because only that one can be kept from setting attributes on classes, by which a
    file could change how this process reads paths.
    """

    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)

    def find_class(self, module: str, name: str) -> Any:
        """The class of that name.

        Raises:
            pickle.UnpicklingError: it is none of the format's.
        """
        if name in _FORMAT_CLASSES.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and (name == "Size" or isinstance(getattr(torch, name, None), torch.dtype)):
            return getattr(torch, name)
        if module.startswith("pathlib") and name in ("PosixPath", "WindowsPath"):
            return RecordedPath
        raise pickle.UnpicklingError(f"it names {module}.{name}, which the format does not have")

    def load_build(self) -> None:
        """Give an object its state, if it is one of the format's records.

        Raises:
            pickle.UnpicklingError: it is anything else, such as a class.
        """
        record = self.stack[-2]  # type: ignore[attr-defined] # typeshed lists the public members only.
        if isinstance(record, type) or not is_dataclass(record):
            raise pickle.UnpicklingError(f"it changes {record!r}")
        super().load_build()  # type: ignore[misc] # As above.

    dispatch[pickle.BUILD[0]] = load_build


class SafeReader(dcp.FileSystemReader):
    """torch's file reader with checked metadata, which is read once."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.metadata = read_metadata(folder)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The checked metadata."""
        if self.metadata.storage_meta is None:
            self.metadata.storage_meta = StorageMeta()
        self.metadata.storage_meta.load_id = self.load_id
        return self.metadata


def is_distributed_checkpoint(folder: Path) -> bool:
    """Whether a folder is one."""
    return (folder / METADATA).is_file()


def read_metadata(folder: Path) -> Metadata:
    """The metadata of a checkpoint folder, whose files must be there and whole.

    Raises:
        UserError: the metadata is missing, damaged or hostile, or a file that it names is missing or cut short.
    """
    path = folder / METADATA
    try:
        metadata = MetadataUnpickler(io.BytesIO(path.read_bytes())).load()
    except FileNotFoundError as error:
        raise UserError(f"{folder} has no {METADATA}; it is not a whole checkpoint, so download it again.") from error
    except Exception as error:  # A pickle may fail in any way; none of them may pass.
        raise UserError(f"{path} is damaged or hostile and is not read ({error}); download it again.") from error
    if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, Mapping):
        raise UserError(f"{path} is not the metadata of a torch checkpoint; download it again.")
    check_files(folder, metadata)
    return metadata


def check_files(folder: Path, metadata: Metadata) -> None:
    """Every slice lies inside a file of this folder.

    Raises:
        UserError: a file lies elsewhere, is missing or is cut short.
    """
    needed: dict[str, int] = {}
    for info in metadata.storage_data.values():
        name = str(info.relative_path)
        if (
            Path(name).name != name
            or info.offset < 0
            or info.length < 0
            or getattr(info, "transform_descriptors", None)
        ):
            raise UserError(
                f"{folder / METADATA} points to '{name}', which is no plain file of its folder; it is not read."
            )
        needed[name] = max(needed.get(name, 0), info.offset + info.length)
    for name, size in sorted(needed.items()):
        file = folder / name
        there = file.stat().st_size if file.is_file() else 0
        if there < size:
            raise UserError(
                f"{file} has {there:,} bytes but the checkpoint needs {size:,}; the download is not complete, so "
                "run it again."
            )


def tensor_shapes(metadata: Metadata) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor; entries that are no tensors are left out."""
    return {
        name: tuple(entry.size)
        for name, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }


def other_entries(metadata: Metadata) -> list[str]:
    """Names of entries that are pickled objects and not tensors; they are never read."""
    return [name for name, entry in metadata.state_dict_metadata.items() if isinstance(entry, BytesStorageMetadata)]


def read_groups(folder: Path, names: Collection[str], dtype: torch.dtype | None = None) -> Iterator[dict[str, Tensor]]:
    """The named tensors, a few gigabytes at a time, in the given dtype or as stored.

    Raises:
        UserError: as `read_metadata`, or the data are damaged.
        KeyError: a name is not in the checkpoint.
    """
    reader = SafeReader(folder)
    group: dict[str, Tensor] = {}
    size = 0
    for name in names:
        entry = reader.metadata.state_dict_metadata[name]
        if not isinstance(entry, TensorStorageMetadata):
            raise KeyError(f"{name} is no tensor")
        stored = entry.properties.dtype
        wanted = dtype if dtype is not None and stored.is_floating_point else stored
        group[name] = torch.empty(entry.size, dtype=wanted)
        size += group[name].nbytes
        if size >= GROUP_BYTES:
            yield load_into(reader, folder, group)
            group, size = {}, 0
    if group:
        yield load_into(reader, folder, group)


def load_into(reader: SafeReader, folder: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Fill tensors from the checkpoint.

    Raises:
        UserError: the data are damaged.
    """
    try:
        with warnings.catch_warnings():
            # torch remarks that there is only one process, which is meant here.
            warnings.simplefilter("ignore", UserWarning)
            # Only tensors are asked for, so that no pickled object is ever loaded.
            dcp.load(tensors, storage_reader=reader, no_dist=True)
    except Exception as error:  # torch wraps whatever a reader raises.
        raise UserError(f"The checkpoint in {folder} is damaged ({error}); download it again.") from error
    return tensors
