"""lyra-tiny's text encoder: words and their letter trigrams, hashed into an embedding table, and two attention layers.

It understands the words of the captions that it was trained with (places, light, weather, colours, materials) and
ignores others. Same interface as UMT5 in the released model: texts in, `text_len` embedded positions out.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from jaxtyping import Float
from torch import Tensor, nn


class HashedTextEncoder(ModelMixin, ConfigMixin):
    """Texts to (batch, text_len, dim); positions past the text are zero, as in the released model.

    Args:
        buckets: rows of the hash table. width: its columns. dim: width of the output. text_len: positions.
    """

    @register_to_config
    def __init__(
        self, buckets: int = 4096, width: int = 64, dim: int = 128, text_len: int = 64, num_layers: int = 2
    ) -> None:
        super().__init__()
        self.table = nn.EmbeddingBag(buckets, width, mode="mean")
        self.project = nn.Linear(width, dim)
        self.position = nn.Parameter(torch.randn(text_len, dim) * 0.02)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                dim, 4, dim * 2, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
            )
            for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(dim)

    def forward(self, texts: Sequence[str]) -> Float[Tensor, "b l d"]:
        """Embed texts; an empty text gives zeros everywhere."""
        length, device = self.config.text_len, self.position.device
        words = [split_words(text)[:length] for text in texts]
        flat = [hashed_pieces(word, self.config.buckets) for row in words for word in row]
        out = torch.zeros(len(texts), length, self.config.dim, device=device)
        if not flat:
            return out
        offsets = torch.tensor([0, *(len(pieces) for pieces in flat)], device=device).cumsum(0)[:-1]
        embedded = self.project(
            self.table(torch.tensor([p for pieces in flat for p in pieces], device=device), offsets)
        )
        filled = torch.zeros(len(texts), length, dtype=torch.bool, device=device)
        for row, items in enumerate(words):
            filled[row, : len(items)] = True
        rows = filled.any(1)
        x = torch.zeros_like(out).masked_scatter(filled[..., None], embedded) + self.position
        x = x[rows]
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=~filled[rows])
        out[rows] = self.norm(x)
        return out * filled[..., None]


def split_words(text: str) -> list[str]:
    """Lower-case words of letters and digits."""
    return re.findall(r"[^\W_]+", text.lower())


def hashed_pieces(word: str, buckets: int) -> list[int]:
    """Table rows of a word: the word itself and its letter trigrams, by CRC-32 so that they never change."""
    padded = f"<{word}>"
    pieces = [word, *(padded[i : i + 3] for i in range(len(padded) - 2))]
    return [zlib.crc32(piece.encode()) % buckets for piece in pieces]
