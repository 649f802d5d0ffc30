"""The released model's text encoder: how captions become UMT5-XXL embeddings, and how its weights are named.

Knows the released names, sizes and text cleaning, and uses transformers' UMT5EncoderModel and tokenizer; it does not
know which caption belongs to which chunk, nor what the transformer does with an embedding.
"""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import ftfy
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase, UMT5Config, UMT5EncoderModel

from lyra.errors import UserError
from lyra.models.checkpoint import load_strictly
from lyra.models.weight_files import read_torch

UMT5_XXL: Mapping[str, Any] = MappingProxyType(
    {
        "vocab_size": 256384,
        "d_model": 4096,
        "d_kv": 64,
        "d_ff": 10240,
        "num_layers": 24,
        "num_heads": 64,
        "relative_attention_num_buckets": 32,
        "relative_attention_max_distance": 128,
        "layer_norm_epsilon": 1e-6,
        "feed_forward_proj": "gated-gelu",
    }
)
"""Sizes of the released encoder, as fields of transformers' UMT5Config: 242 tensors, 5.68 billion parameters."""

TEXT_LEN = 512
"""Positions of a text embedding (released code)."""

NEGATIVE_KEY = "t5_text_embeddings"
"""Name of the embedding in the released negative_prompt.pt."""

EMBEDDING = "token_embedding.weight"
TIED_EMBEDDINGS = ("shared.weight", "encoder.embed_tokens.weight")
"""The released embedding is one tensor; transformers lists the same parameter under two names."""

BLOCK_PARTS: Mapping[str, str] = MappingProxyType(
    {
        "norm1": "layer.0.layer_norm",
        "attn.q": "layer.0.SelfAttention.q",
        "attn.k": "layer.0.SelfAttention.k",
        "attn.v": "layer.0.SelfAttention.v",
        "attn.o": "layer.0.SelfAttention.o",
        "pos_embedding.embedding": "layer.0.SelfAttention.relative_attention_bias",
        "norm2": "layer.1.layer_norm",
        "ffn.gate.0": "layer.1.DenseReluDense.wi_0",
        "ffn.fc1": "layer.1.DenseReluDense.wi_1",
        "ffn.fc2": "layer.1.DenseReluDense.wo",
    }
)
"""Modules of a block, released name to transformers' name; each has one weight and no bias."""

RELEASED_PARTS: Mapping[str, str] = MappingProxyType({ours: released for released, ours in BLOCK_PARTS.items()})


def umt5_config(**overrides: Any) -> UMT5Config:
    """The released encoder's configuration, with some of its sizes replaced."""
    return UMT5Config(**{**UMT5_XXL, **overrides})


def from_released_umt5_name(name: str) -> tuple[str, ...]:
    """The names under which transformers lists a released parameter; two for the embedding.

    Raises:
        KeyError: the encoder has no parameter of that name.
    """
    if name == EMBEDDING:
        return TIED_EMBEDDINGS
    if name == "norm.weight":
        return ("encoder.final_layer_norm.weight",)
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)\.weight", name)
    if match is None or match[2] not in BLOCK_PARTS:
        raise KeyError(f"the released text encoder has a parameter '{name}' that UMT5 does not have")
    return (f"encoder.block.{match[1]}.{BLOCK_PARTS[match[2]]}.weight",)


def to_released_umt5_name(name: str) -> str:
    """The released name of a parameter of transformers' UMT5EncoderModel; both tied names give the same one.

    Raises:
        KeyError: the released file has no such parameter.
    """
    if name in TIED_EMBEDDINGS:
        return EMBEDDING
    if name == "encoder.final_layer_norm.weight":
        return "norm.weight"
    match = re.fullmatch(r"encoder\.block\.(\d+)\.(.+)\.weight", name)
    if match is None or match[2] not in RELEASED_PARTS:
        raise KeyError(f"UMT5 has a parameter '{name}' that the released text encoder does not have")
    return f"blocks.{match[1]}.{RELEASED_PARTS[match[2]]}.weight"


def from_released_umt5(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A released state dict under transformers' names; the two names of the embedding share one tensor.

    Raises:
        KeyError: a name is not one of the released encoder's.
    """
    return {ours: tensor for name, tensor in weights.items() for ours in from_released_umt5_name(name)}


def load_umt5(weights: Mapping[str, Tensor], config: UMT5Config, dtype: torch.dtype) -> UMT5EncoderModel:
    """The encoder with released weights, ready to run, on the device of the weights.

    Weights that have the dtype already are used as they are: a mapped file is not read before it is needed.

    Raises:
        KeyError: a weight has a name that the encoder does not know.
        ValueError: weights are missing or have another shape than the configuration says.
    """
    with torch.device("meta"):
        model = UMT5EncoderModel(config)
    # The cast comes before the renaming, so that the two names of the embedding still share one tensor after it.
    load_strictly(model, from_released_umt5({name: tensor.to(dtype) for name, tensor in weights.items()}))
    # Assigning made two parameters of that tensor, which a later move to another device would copy twice.
    model.tie_weights()
    return model.eval().requires_grad_(False)


@dataclass(frozen=True)
class UMT5TextEncoder:
    """Texts to embeddings, as the released code makes them."""

    model: UMT5EncoderModel
    tokenizer: PreTrainedTokenizerBase
    text_len: int = TEXT_LEN

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Float[Tensor, "b l e"]:
        """Embeddings of texts on the model's device, (b, 512, 4096) in the released model.

        A longer text is cut so that its end token stays; rows past a text's last token are zero.
        """
        tokens = self.tokenizer(
            [clean_text(text) for text in texts],
            padding="max_length",
            truncation=True,
            max_length=self.text_len,
            add_special_tokens=True,
            return_attention_mask=True,
            return_tensors="pt",
        )
        # Hooks that move the model when it is called also move its inputs, so its output says where it ran.
        mask, device = tokens["attention_mask"], self.model.device
        hidden = self.model(input_ids=tokens["input_ids"].to(device), attention_mask=mask.to(device))[0]
        return hidden.masked_fill(mask.to(hidden.device)[..., None] == 0, 0.0)


def clean_text(text: str) -> str:
    """Text with broken encodings mended, HTML entities resolved twice and white space collapsed (released code)."""
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", text).strip()


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder; `lyra.hub` says which.

    Raises:
        UserError: there is no tokenizer, or it is damaged or cannot pad.
    """
    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"There is no tokenizer.json in {folder}; give the folder of google/umt5-xxl's tokenizer.")
    try:
        # The configuration decides the class. Without it the released tokenizer_config.json would: it names the class
        # of T5, which rebuilds tokenizer.json with T5's own rules for unknown characters and white space.
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder), config=UMT5Config(), padding_side="right", local_files_only=True
        )
    except Exception as error:  # The tokenizers library raises a bare Exception for a damaged file.
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise UserError(f"The tokenizer in {folder} cannot be read ({reason}); download its files again.") from error
    if tokenizer.pad_token is None:
        raise UserError(f"The tokenizer in {folder} has no padding token; use the tokenizer of google/umt5-xxl.")
    return tokenizer


def read_negative_embedding(path: Path, text_len: int, dim: int) -> Float[Tensor, "1 l e"]:
    """The stored embedding of the negative prompt (released: negative_prompt.pt, 1 x 512 x 4096).

    Raises:
        UserError: the file is missing or damaged, or holds no embedding of that shape.
    """
    embedding = read_torch(path).get(NEGATIVE_KEY)
    if not isinstance(embedding, Tensor) or not embedding.is_floating_point():
        raise UserError(f"{path} holds no embedding '{NEGATIVE_KEY}'; it is not the released negative_prompt.pt.")
    if embedding.shape != (1, text_len, dim):
        raise UserError(
            f"The embedding in {path} is {list(embedding.shape)}, but this model takes {[1, text_len, dim]}; use the "
            "negative_prompt.pt that belongs to these weights."
        )
    return embedding
