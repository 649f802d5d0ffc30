"""Reading weights from files that a stranger may have written: tensors come out, code never runs.

safetensors, and torch files through `weights_only` with memory mapping. Knows no model; the distributed checkpoint of
the released transformer has a reader of its own (`distributed_checkpoint`).
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lyra.errors import UserError

TORCH_SUFFIXES = (".pth", ".pt", ".bin")


def read_weights(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors or torch file, on the CPU, mapped from disk where the format allows it.

    Raises:
        UserError: the file is missing, is damaged, holds something else than named tensors, or would run code.
    """
    values = read_torch(path) if path.suffix in TORCH_SUFFIXES else read_safetensors(path)
    odd = [str(name) for name, value in values.items() if not isinstance(value, Tensor)]
    if odd:
        raise UserError(
            f"{path} holds entries that are not tensors ({', '.join(odd[:5])}); it is not the weights file that was "
            "expected here, so download it again."
        )
    return dict(values)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"{path} cannot be read as safetensors ({error}); download it again.") from error


def read_torch(path: Path) -> Mapping[Any, Any]:
    """The mapping in a torch file, whose pickle may only build tensors and plain containers.

    Raises:
        UserError: the file is missing, damaged, holds no mapping, or would run code.
    """
    if not path.exists():
        raise UserError(f"There is no file {path}; download the model again or check the folder.")
    try:
        # Only the zip container of torch >= 1.6 can be mapped; the older one is read whole.
        values = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} asks for code to be run or is damaged, so it is not read; use the file from its original source."
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise UserError(f"{path} cannot be read as a torch file ({error}); download it again.") from error
    if not isinstance(values, Mapping):
        raise UserError(f"{path} holds no named tensors but a {type(values).__name__}; it is not the expected file.")
    return values
