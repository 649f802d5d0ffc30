"""Puts trained parts together as a model folder: half-precision safetensors in small shards, settings beside them.

Run with `python -m lyra.training.assemble`. Knows no training.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from lyra.depth.tiny import TinyDepthModel
from lyra.models.autoencoder import TinyCausalAutoencoder
from lyra.models.gaussian_head import TinyGaussianHead
from lyra.models.refiner import SeamRefiner
from lyra.models.text import HashedTextEncoder
from lyra.models.transformer import Lyra2Transformer3DModel
from lyra.training.parts import TINY_SETTINGS

LARGEST_SHARD = "9MB"
"""A Space takes no larger plain file than 10 MB."""

PART_CLASSES: dict[str, type[torch.nn.Module]] = {
    "depth": TinyDepthModel,
    "autoencoder": TinyCausalAutoencoder,
    "transformer": Lyra2Transformer3DModel,
    "text_encoder": HashedTextEncoder,
    "refiner": SeamRefiner,
    "gaussian_head": TinyGaussianHead,
}


@dataclass(frozen=True)
class Assembly:
    """Where the trained parts are, each a folder that `save_pretrained` wrote; the model keeps what is not named."""

    out: Path
    depth: Path | None = None
    autoencoder: Path | None = None
    transformer: Path | None = None
    text_encoder: Path | None = None
    refiner: Path | None = None
    gaussian_head: Path | None = None


def main(settings: Assembly) -> None:
    """Convert the parts to half precision and write them to the model folder; its model card is kept."""
    settings.out.mkdir(parents=True, exist_ok=True)
    for name, part in PART_CLASSES.items():
        trained, target = getattr(settings, name), settings.out / name
        if trained is None:
            continue
        model = part.from_pretrained(trained).half()  # type: ignore[attr-defined]
        shutil.rmtree(target, ignore_errors=True)
        model.save_pretrained(target, max_shard_size=LARGEST_SHARD)
        forget_origin(target / "config.json")
    text = json.dumps(dataclasses.asdict(TINY_SETTINGS), indent=2) + "\n"
    (settings.out / "lyra.json").write_text(text, encoding="utf-8")


def forget_origin(path: Path) -> None:
    """Remove the folder that a configuration was loaded from, which means nothing elsewhere."""
    values = json.loads(path.read_text(encoding="utf-8"))
    values.pop("_name_or_path", None)
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(tyro.cli(Assembly))
