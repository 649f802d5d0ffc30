"""How are weights wrapped in a released file? Names inside it are this project's own once the wrapping is off.

A released torch file keeps the state dict under `module`, else under `model`, else it is the state dict; names start
with `model.`. Knows no network and reads no file.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

PREFIX = "model."
WRAPPERS = ("module", "model")
SHARED_NORM = re.compile(r"(.*\.output_conv2_aux)\.0(\.2\.(?:weight|bias))")
"""The ray branch has one layer norm at four levels; safetensors files hold it once, torch files four times."""
RAY_LEVELS = 4

logger = logging.getLogger(__name__)


def unwrap_checkpoint(contents: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state dict in the contents of a released file, without the `model.` prefix.

    Entries beside the state dict (an averaged copy of the weights, a step count) are left out, and the log names them.

    Raises:
        ValueError: the contents are no state dict, or two names become the same.
    """
    wrapper = next((name for name in WRAPPERS if name in contents), None)
    weights = contents
    if wrapper is not None:
        weights = contents[wrapper]
        ignored = [str(name) for name in contents if name != wrapper]
        if ignored:
            logger.info("Weights are taken from the entry '%s'; left out: %s.", wrapper, ", ".join(ignored))
    if not isinstance(weights, Mapping):
        raise ValueError(f"the entry '{wrapper}' holds a {type(weights).__name__} and not named tensors")
    odd = [str(name) for name, value in weights.items() if not isinstance(value, Tensor)]
    if odd:
        raise ValueError(f"{len(odd)} entries are not tensors: {', '.join(odd[:10])}")
    unwrapped = {name.removeprefix(PREFIX): tensor for name, tensor in weights.items()}
    if len(unwrapped) < len(weights):
        raise ValueError(f"some names occur both with and without the prefix '{PREFIX}'")
    return unwrapped


def with_shared_norms(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same weights with the ray branch's shared norm under all four of its names."""
    complete = dict(weights)
    for name, tensor in weights.items():
        match = SHARED_NORM.fullmatch(name)
        if match is None:
            continue
        for level in range(1, RAY_LEVELS):
            complete.setdefault(f"{match.group(1)}.{level}{match.group(2)}", tensor)
    return complete
