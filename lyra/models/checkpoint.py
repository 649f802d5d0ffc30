"""Names of the released checkpoint mapped to this project's (which are diffusers' where it has a counterpart).

Knows names and shapes only; reading files is the loader's work. A key that no rule covers, or that the model lacks, is
an error: nothing is dropped silently.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

COUNTER_PREFIX = "accum_"
"""Training counters in the released file; they are not parameters."""

RELEASED_RULES: tuple[tuple[str, str], ...] = (
    (r"clean_patch_embeddings\.(\d+)\.", r"history_patch_embeddings.\1."),
    (r"text_embedding\.0\.", "condition_embedder.text_embedder.linear_1."),
    (r"text_embedding\.2\.", "condition_embedder.text_embedder.linear_2."),
    (r"time_embedding\.0\.", "condition_embedder.time_embedder.linear_1."),
    (r"time_embedding\.2\.", "condition_embedder.time_embedder.linear_2."),
    (r"time_projection\.1\.", "condition_embedder.time_proj."),
    (r"img_emb\.proj\.0\.", "condition_embedder.image_embedder.norm1."),
    (r"img_emb\.proj\.1\.", "condition_embedder.image_embedder.ff.net.0.proj."),
    (r"img_emb\.proj\.3\.", "condition_embedder.image_embedder.ff.net.2."),
    (r"img_emb\.proj\.4\.", "condition_embedder.image_embedder.norm2."),
    (r"(blocks\.\d+)\.modulation$", r"\1.scale_shift_table"),
    (r"head\.modulation$", "scale_shift_table"),
    (r"head\.head\.", "proj_out."),
    (r"(blocks\.\d+)\.self_attn\.([qkv])\.", r"\1.attn1.to_\2."),
    (r"(blocks\.\d+)\.self_attn\.o\.", r"\1.attn1.to_out.0."),
    (r"(blocks\.\d+)\.self_attn\.norm_([qk])\.", r"\1.attn1.norm_\2."),
    (r"(blocks\.\d+)\.cross_attn\.([qkv])\.", r"\1.attn2.to_\2."),
    (r"(blocks\.\d+)\.cross_attn\.o\.", r"\1.attn2.to_out.0."),
    (r"(blocks\.\d+)\.cross_attn\.([kv])_img\.", r"\1.attn2.add_\2_proj."),
    (r"(blocks\.\d+)\.cross_attn\.norm_k_img\.", r"\1.attn2.norm_added_k."),
    (r"(blocks\.\d+)\.cross_attn\.norm_([qk])\.", r"\1.attn2.norm_\2."),
    (r"(blocks\.\d+)\.norm3\.", r"\1.norm2."),
    (r"(blocks\.\d+)\.ffn\.0\.", r"\1.ffn.net.0.proj."),
    (r"(blocks\.\d+)\.ffn\.2\.", r"\1.ffn.net.2."),
    (r"(blocks\.\d+)\.cam_encoder\.", r"\1.camera_encoder."),
    (r"(blocks\.\d+)\.buffer_encoder\.", r"\1.correspondence_encoder."),
    (r"patch_embedding\.", "patch_embedding."),
)
"""Patterns on released names without their `net.` prefix, matched at the start; the first that matches renames."""


def from_released_name(name: str) -> str:
    """This project's name of a released transformer parameter.

    Raises:
        KeyError: no rule covers the name.
    """
    name = name.removeprefix("net.")
    for pattern, replacement in RELEASED_RULES:
        if re.match(pattern, name):
            return re.sub("^" + pattern, replacement, name)
    raise KeyError(f"the released checkpoint has a parameter '{name}' that this transformer does not know")


def is_parameter(name: str) -> bool:
    """Whether a released entry is a parameter and not a training counter or a state of NVIDIA's kernels."""
    return re.search(rf"^(net\.)?{COUNTER_PREFIX}|_extra_state$", name) is None


def from_released(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A released transformer state dict under this project's names; counters and kernel states are left out."""
    return {from_released_name(name): tensor for name, tensor in weights.items() if is_parameter(name)}


class WrongWeights(ValueError):
    """Weights do not fit a model; `problems` lists every one, the message the first few."""

    SHOWN = 12

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        more = len(problems) - self.SHOWN
        shown = "; ".join(problems[: self.SHOWN]) + (f"; and {more} more" if more > 0 else "")
        super().__init__(f"{len(problems)} weights do not fit the model: {shown}")


Shapes = Mapping[str, tuple[int, ...]]
"""Name and shape of parameters."""


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a state dict."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def check_shapes(expected: Shapes, found: Shapes) -> None:
    """Names and shapes must agree exactly.

    Raises:
        WrongWeights: names are missing, unexpected or misshapen.
    """
    problems = [f"missing {name} {list(expected[name])}" for name in sorted(expected.keys() - found.keys())]
    problems += [f"unexpected {name} {list(found[name])}" for name in sorted(found.keys() - expected.keys())]
    problems += [
        f"{name} is {list(found[name])}, not {list(expected[name])}"
        for name in sorted(expected.keys() & found.keys())
        if tuple(expected[name]) != tuple(found[name])
    ]
    if problems:
        logger.info("weights that do not fit: %s", "; ".join(problems))
        raise WrongWeights(problems)


def load_strictly(model: torch.nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load weights that must match the model name for name and shape for shape.

    Raises:
        WrongWeights: names are missing, unexpected or misshapen.
    """
    check_shapes(shapes_of(model.state_dict()), shapes_of(weights))
    # A model on the meta device has no storage to copy into: it takes the tensors themselves.
    on_meta = any(parameter.is_meta for parameter in model.parameters())
    model.load_state_dict(dict(weights), strict=True, assign=on_meta)
