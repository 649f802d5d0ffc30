"""Loads and saves networks as folders of config.json and sharded safetensors (diffusers, transformers), strictly.

diffusers fills what a folder lacks with random numbers and only warns; here names and shapes are compared with the
model before any weight is read. Knows no model of its own.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lyra.errors import UserError
from lyra.models.checkpoint import check_shapes, shapes_of

SHARD_BYTES = 4 << 30
"""Largest shard that is written."""


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a part.

    Raises:
        UserError: it is missing or damaged.
    """
    path = folder / "config.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); restore the folder or convert the model again.") from error


def class_of(folder: Path) -> str:
    """Name of the class that a part was saved from, as diffusers or transformers note it.

    Raises:
        UserError: the config is missing or names none.
    """
    config = read_config(folder)
    name = config.get("_class_name") or next(iter(config.get("architectures") or []), None)
    if not isinstance(name, str):
        raise UserError(f"{folder / 'config.json'} names no class; restore the folder or convert the model again.")
    return name


def stored_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in the safetensors files of a folder, read from their headers.

    Raises:
        UserError: there is none, one is damaged, or two hold the same name.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"{folder} holds no .safetensors file; restore the folder or convert the model again.")
    for path in files:
        try:
            with safe_open(path, "pt") as file:
                found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no dict
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} cannot be read ({error}); restore it or convert the model again.") from error
        twice = sorted(found.keys() & shapes.keys())
        if twice:
            raise UserError(f"{folder} holds {twice[0]} in two files; remove the one that does not belong there.")
        shapes |= found
    return shapes


def load_pretrained(model_class: Any, folder: Path, *, dtype: torch.dtype | None = None, **options: Any) -> Any:
    """A model of diffusers or transformers from its folder, ready to run.

    Args:
        model_class: has `from_pretrained`. dtype: number format; as stored when None.
        options: passed on, for instance `quantization_config`.

    Raises:
        UserError: a file is missing or damaged.
        WrongWeights: tensors are missing, unexpected or misshapen.
    """
    with torch.device("meta"):
        if hasattr(model_class, "load_config"):
            expected = model_class.from_config(model_class.load_config(folder))
        else:
            expected = model_class(model_class.config_class.from_pretrained(folder))
    found, shapes = stored_shapes(folder), shapes_of(expected.state_dict())
    # transformers saves a tensor that two names share once.
    tied = getattr(expected, "_tied_weights_keys", None) or {}
    shapes = {name: shape for name, shape in shapes.items() if name in found or name not in tied}
    check_shapes(shapes, found)
    word = {} if dtype is None else {"torch_dtype" if hasattr(model_class, "load_config") else "dtype": dtype}
    try:
        model = model_class.from_pretrained(folder, use_safetensors=True, **word, **options)
    except (OSError, ValueError) as error:
        raise UserError(f"The weights in {folder} cannot be loaded ({error}); restore the folder.") from error
    return model.eval().requires_grad_(False)


def save_sharded(
    groups: Iterable[dict[str, Tensor]], folder: Path, stem: str, *, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write tensors as numbered safetensors shards with an index, keeping at most one shard in memory.

    Args:
        groups: tensors as they come, each name once.
        stem: file name before the number: "diffusion_pytorch_model" (diffusers) or "model" (transformers).
    """
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[list[str]] = []
    waiting: dict[str, Tensor] = {}
    total = 0

    def write() -> None:
        nonlocal waiting
        if waiting:
            save_file(waiting, folder / f".{stem}-{len(shards) + 1:05d}", metadata={"format": "pt"})
            shards.append(sorted(waiting))
            waiting = {}

    for group in groups:
        for name, tensor in group.items():
            total += tensor.nbytes
            waiting[name] = tensor.contiguous()
            if sum(t.nbytes for t in waiting.values()) >= shard_bytes:
                write()
    write()
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        final = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        (folder / f".{stem}-{number:05d}").replace(folder / final)
        weight_map |= dict.fromkeys(names, final)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
