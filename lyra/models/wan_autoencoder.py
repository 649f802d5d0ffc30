"""Names of the released Wan 2.1 autoencoder mapped to diffusers' AutoencoderKLWan.

Knows names only. The released file lists a level's residual blocks and its resampling in one flat sequence; diffusers
nests them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

RESIDUAL_PARTS = {
    "residual.0.gamma": "norm1.gamma",
    "residual.2": "conv1",
    "residual.3.gamma": "norm2.gamma",
    "residual.6": "conv2",
    "shortcut": "conv_shortcut",
}
"""Parts of a residual block, released and diffusers."""

DECODER_LEVEL_BLOCKS = 4
"""Entries of a decoder level in the flat sequence: three residual blocks and, but for the last level, a resampling."""


def from_released_autoencoder_name(name: str) -> str:
    """diffusers' name of a released autoencoder parameter.

    Raises:
        KeyError: no rule covers the name.
    """
    simple = {
        r"conv1\.": "quant_conv.",
        r"conv2\.": "post_quant_conv.",
        r"(encoder|decoder)\.conv1\.": r"\1.conv_in.",
        r"(encoder|decoder)\.head\.0\.gamma": r"\1.norm_out.gamma",
        r"(encoder|decoder)\.head\.2\.": r"\1.conv_out.",
        r"(encoder|decoder)\.middle\.1\.": r"\1.mid_block.attentions.0.",
    }
    for pattern, replacement in simple.items():
        if re.match(pattern, name):
            return re.sub("^" + pattern, replacement, name)
    match = re.fullmatch(r"(encoder|decoder)\.middle\.([02])\.(.+)", name)
    if match:
        return f"{match[1]}.mid_block.resnets.{int(match[2]) // 2}.{residual_part(match[3])}"
    match = re.fullmatch(r"encoder\.downsamples\.(\d+)\.(.+)", name)
    if match:
        return f"encoder.down_blocks.{match[1]}.{residual_part(match[2])}"
    match = re.fullmatch(r"decoder\.upsamples\.(\d+)\.(.+)", name)
    if match:
        level, index = divmod(int(match[1]), DECODER_LEVEL_BLOCKS)
        if index == DECODER_LEVEL_BLOCKS - 1:
            return f"decoder.up_blocks.{level}.upsamplers.0.{match[2]}"
        return f"decoder.up_blocks.{level}.resnets.{index}.{residual_part(match[2])}"
    raise KeyError(f"the released autoencoder has a parameter '{name}' that this project does not know")


def residual_part(name: str) -> str:
    """Part of a residual block, or the name itself for a resampling."""
    for released, diffusers in RESIDUAL_PARTS.items():
        if name == released or name.startswith(released + "."):
            return diffusers + name[len(released) :]
    return name


def from_released_autoencoder(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A released autoencoder state dict under diffusers' names."""
    return {from_released_autoencoder_name(name): tensor for name, tensor in weights.items()}


def to_released_autoencoder_name(name: str) -> str:
    """Released name of a parameter of AutoencoderKLWan.

    Raises:
        KeyError: no rule covers the name.
    """
    back = {diffusers: released for released, diffusers in RESIDUAL_PARTS.items()}

    def part(inner: str) -> str:
        for diffusers, released in back.items():
            if inner == diffusers or inner.startswith(diffusers + "."):
                return released + inner[len(diffusers) :]
        return inner

    rules: list[tuple[str, str]] = [
        (r"quant_conv\.(.+)", r"conv1.\1"),
        (r"post_quant_conv\.(.+)", r"conv2.\1"),
        (r"(encoder|decoder)\.conv_in\.(.+)", r"\1.conv1.\2"),
        (r"(encoder|decoder)\.norm_out\.gamma", r"\1.head.0.gamma"),
        (r"(encoder|decoder)\.conv_out\.(.+)", r"\1.head.2.\2"),
        (r"(encoder|decoder)\.mid_block\.attentions\.0\.(.+)", r"\1.middle.1.\2"),
    ]
    for pattern, replacement in rules:
        if re.fullmatch(pattern, name):
            return re.sub(pattern, replacement, name)
    match = re.fullmatch(r"(encoder|decoder)\.mid_block\.resnets\.(\d)\.(.+)", name)
    if match:
        return f"{match[1]}.middle.{int(match[2]) * 2}.{part(match[3])}"
    match = re.fullmatch(r"encoder\.down_blocks\.(\d+)\.(.+)", name)
    if match:
        return f"encoder.downsamples.{match[1]}.{part(match[2])}"
    match = re.fullmatch(r"decoder\.up_blocks\.(\d+)\.(resnets|upsamplers)\.(\d+)\.(.+)", name)
    if match:
        index = int(match[1]) * DECODER_LEVEL_BLOCKS
        index += DECODER_LEVEL_BLOCKS - 1 if match[2] == "upsamplers" else int(match[3])
        return f"decoder.upsamples.{index}.{part(match[4])}"
    raise KeyError(f"AutoencoderKLWan has a parameter '{name}' without a released counterpart")
