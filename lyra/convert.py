"""Writes a released checkpoint as a folder of config.json and sharded safetensors for each part, which loads fast.

Every tensor is checked on the way, as when the released files are loaded directly. The transformer is converted a few
gigabytes at a time, the other parts one by one, so that memory is needed for one part only. A part that is finished is
not written again. Knows files; nothing is computed but a change of number format.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch
from diffusers.utils import logging as diffusers_logging
from safetensors.torch import save_file
from transformers.utils import logging as transformers_logging

from lyra.config import RELEASED_SETTINGS
from lyra.errors import UserError
from lyra.generation.chunk_store import writing_to
from lyra.hub import ModelSource, tokenizer_folder, weights_hash
from lyra.models.depth_anything_folder import config_from_json, load_released_depth, save_depth_folder
from lyra.models.lora import read_lora
from lyra.models.pretrained import SHARD_BYTES, save_sharded
from lyra.models.released import (
    LORA_FILE,
    NEGATIVE_FILE,
    NEGATIVE_TENSOR,
    RECONSTRUCTION_FILE,
    ReleasedSizes,
    empty_transformer,
    load_autoencoder,
    load_image_encoder,
    load_text_encoder,
    transformer_groups,
)
from lyra.models.umt5 import TEXT_LEN, read_negative_embedding
from lyra.progress import Progress

DIFFUSERS_STEM = "diffusion_pytorch_model"


UNFINISHED = ".converting.json"
"""Says what is being converted until all parts are there."""

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
"""Number formats that weights can be converted to."""


def convert(
    source: ModelSource, out: Path, *, dtype: torch.dtype, progress: Progress, shard_bytes: int = SHARD_BYTES
) -> None:
    """Convert a model in the released layout.

    Args:
        dtype: of all parts but the depth network, which keeps its own.
        shard_bytes: largest safetensors file of the transformer.

    Raises:
        UserError: the source is not in the released layout, a file is missing, damaged or hostile, tensors are
            missing, unexpected or misshapen, or the disk is full.
        Cancelled: the listener asked to stop; finished parts stay.
    """
    if source.layout != "released":
        raise UserError(f"{source.folder} is converted already; give a folder with NVIDIA's released files.")
    if (out / "lyra.json").exists():
        raise UserError(f"{out} holds a model already; choose another --out.")
    begin(out, {"source": weights_hash(source.folder), "dtype": str(dtype)})
    diffusers_logging.set_verbosity_error()
    transformers_logging.set_verbosity_error()
    for name, write in part_writers(source.folder, dtype, shard_bytes).items():
        if (out / name).exists():
            continue
        progress.enter(f"Convert {name}")
        temporary = out / f".{name.replace('/', '-')}.tmp"
        with writing_to(out):
            out.mkdir(parents=True, exist_ok=True)
            remove(temporary)
            try:
                write(temporary)
            except (ValueError, KeyError) as error:
                reason = error.args[0] if isinstance(error, KeyError) else error
                raise UserError(f"The {name} in {source.folder} cannot be converted ({reason}).") from error
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            temporary.rename(out / name)
    progress.finish()
    # Written last: it is what makes the folder a model.
    with writing_to(out):
        settings = replace(
            RELEASED_SETTINGS,
            **ReleasedSizes.of(source.folder).settings,
            part_licences={part: licence.id for part, licence in source.licences.items()},
        )
        (out / "lyra.json").write_text(json.dumps(asdict(settings), indent=1) + "\n", encoding="utf-8")
        (out / UNFINISHED).unlink()


def begin(out: Path, what: dict[str, str]) -> None:
    """Note what is converted, so that parts of two checkpoints or number formats never meet in one folder.

    Raises:
        UserError: the folder holds an unfinished conversion of something else.
    """
    note = out / UNFINISHED
    with writing_to(out):
        out.mkdir(parents=True, exist_ok=True)
        if note.exists() and json.loads(note.read_text(encoding="utf-8")) != what:
            raise UserError(
                f"{out} holds an unfinished conversion of other weights; delete it or choose another --out."
            )
        note.write_text(json.dumps(what), encoding="utf-8")


def part_writers(folder: Path, dtype: torch.dtype, shard_bytes: int) -> dict[str, Callable[[Path], None]]:
    """What writes each part of the converted model, by its path below the folder."""
    sizes = ReleasedSizes.of(folder)

    def transformer(to: Path) -> None:
        model = empty_transformer(sizes)
        model.save_config(to)
        save_sharded(transformer_groups(folder, model, dtype), to, DIFFUSERS_STEM, shard_bytes=shard_bytes)

    def depth(to: Path) -> None:
        config = config_from_json(sizes.reconstruction)
        save_depth_folder(load_released_depth(folder / RECONSTRUCTION_FILE, config), config, to)

    def negative(to: Path) -> None:
        dim = empty_transformer(sizes).config.text_dim
        embedding = read_negative_embedding(folder / NEGATIVE_FILE, TEXT_LEN, dim)
        save_file({"negative_text": embedding.to(dtype).contiguous()}, to)

    def text_encoder(to: Path) -> None:
        load_text_encoder(folder, dtype).save_pretrained(to)

    def autoencoder(to: Path) -> None:
        load_autoencoder(folder, dtype).save_pretrained(to)

    def image_encoder(to: Path) -> None:
        load_image_encoder(folder, dtype).save_pretrained(to)

    def tokenizer(to: Path) -> None:
        shutil.copytree(tokenizer_folder(folder), to)

    writers: dict[str, Callable[[Path], None]] = {
        "tokenizer": tokenizer,
        NEGATIVE_TENSOR: negative,
        "autoencoder": autoencoder,
        "image_encoder": image_encoder,
        "text_encoder": text_encoder,
        "depth": depth,
        "transformer": transformer,
    }
    if (folder / LORA_FILE).exists():

        def lora(to: Path) -> None:
            read_lora(folder / LORA_FILE)
            shutil.copyfile(folder / LORA_FILE, to)

        writers[LORA_FILE] = lora
    return writers


def remove(path: Path) -> None:
    """Delete what an interrupted conversion left."""
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
