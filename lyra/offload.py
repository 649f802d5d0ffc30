"""Where networks wait and where they run: resident, one at a time on the device, or streamed block by block.

All moving is done by the hooks of accelerate and diffusers; this file decides which network gets which, switches LoRAs
per job and remembers text embeddings. Knows no file layout and no loop.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import cpu_offload_with_hook
from diffusers.hooks import apply_group_offloading
from diffusers.hooks.group_offloading import _maybe_remove_and_reapply_group_offloading
from torch import Tensor, nn

from lyra.errors import UserError
from lyra.hub import file_hash
from lyra.models.lora import fuse_loras, load_lora, loaded_loras, read_lora, set_loras
from lyra.models.transformer import Lyra2Transformer3DModel
from lyra.placement import Placement

TEXTS_KEPT = 64
"""Embeddings that stay in memory, at 4 MB each in the released model."""
DMD = "dmd"
"""Name under which the distillation's LoRA is loaded."""


class OnDemand:
    """A network that comes to the device when it is called and leaves it when it is told to.

    Args:
        resident: it stays on the device instead.
        placed: other hooks move it already.
    """

    def __init__(self, network: nn.Module, device: torch.device, *, resident: bool, placed: bool = False) -> None:
        self._hook: Any = None
        if resident and not placed:
            network.to(device)
        elif not resident:
            _, self._hook = cpu_offload_with_hook(network, device)

    def leave(self) -> None:
        """Free the device."""
        if self._hook is not None:
            self._hook.offload()

    def leaving_call(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, after which the network leaves the device."""

        def called(*args: Any, **kwargs: Any) -> Any:
            try:
                return function(*args, **kwargs)
            finally:
                self.leave()

        return called

    def leaving(self, owner: Any, *methods: str) -> Any:
        """An object with the same methods as `owner`, after each of which the network leaves the device."""
        wrapped = {name: staticmethod(self.leaving_call(getattr(owner, name))) for name in methods}
        return type(type(owner).__name__, (), wrapped)()


class CachedTexts:
    """Embeds texts, each once, and lets the encoder leave the device."""

    def __init__(self, encode: Callable[[Sequence[str]], Tensor], on_demand: OnDemand, device: torch.device) -> None:
        self._encode, self._on_demand, self._device = encode, on_demand, device
        self._known: OrderedDict[str, Tensor] = OrderedDict()

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Embeddings of texts, one row each."""
        missing = [text for text in dict.fromkeys(texts) if text not in self._known]
        if missing:
            try:
                rows = self._encode(missing).to(self._device)
            finally:
                self._on_demand.leave()
            self._known |= {text: rows[i : i + 1] for i, text in enumerate(missing)}
        result = torch.cat([self._known[text] for text in texts])
        for text in texts:
            self._known.move_to_end(text)
        while len(self._known) > TEXTS_KEPT:
            self._known.popitem(last=False)
        return result


def switch_loras(
    transformer: Lyra2Transformer3DModel,
    dmd_lora: Path | None,
    needs_dmd_lora: bool,
    fuse: bool,
    sampler: str,
    loras: Mapping[str, float],
) -> None:
    """`SamplerSwitch` as one call, which every process of a context-parallel group makes on its own transformer."""
    SamplerSwitch(transformer, dmd_lora, needs_dmd_lora, fuse)(sampler, loras)


@dataclass(frozen=True)
class SamplerSwitch:
    """Puts the LoRAs of a job on the transformer; nothing is loaded twice."""

    transformer: Lyra2Transformer3DModel
    dmd_lora: Path | None
    needs_dmd_lora: bool
    """The four-step sampler's weights are a LoRA."""
    fuse: bool = False
    """Add the LoRAs to the weights, which saves two products per layer and keeps the plain weights in host memory."""

    def __call__(self, sampler: str, loras: Mapping[str, float]) -> None:
        """Make exactly the job's LoRAs active.

        Raises:
            UserError: a LoRA cannot be read or does not fit, or the four-step weights are missing.
        """
        strengths = {self.load(Path(path)): strength for path, strength in loras.items()}
        if sampler == "dmd" and self.needs_dmd_lora:
            if self.dmd_lora is None:
                raise UserError(
                    "This model's folder has no lora/dmd_distillation.safetensors, which the 4-step sampler needs; "
                    "download it or choose --sampler full."
                )
            # Added after the others, as in the released code.
            strengths[self.load(self.dmd_lora, DMD)] = 1.0
        if strengths or loaded_loras(self.transformer):
            (fuse_loras if self.fuse else set_loras)(self.transformer, strengths)

    def load(self, path: Path, name: str | None = None) -> str:
        """Load a LoRA if it is not there yet; returns its name."""
        path = path.expanduser()
        if name is None:
            # By content, so that a file that was trained on is read again.
            name = f"{re.sub(r'[^A-Za-z0-9]', '_', path.stem)}_{file_hash(path)}"
        if name not in loaded_loras(self.transformer):
            load_lora(self.transformer, read_lora(path), name)
            # New layers get the hooks of the streaming that is in force.
            _maybe_remove_and_reapply_group_offloading(self.transformer)
        return name


def place_transformer(transformer: Lyra2Transformer3DModel, placement: Placement) -> Callable[[], None]:
    """Put the transformer where the placement wants it; returns what lets it leave the device after denoising."""
    device = placement.torch_device
    if placement.weights == "fp8":
        transformer.enable_layerwise_casting(
            storage_dtype=torch.float8_e4m3fn,
            compute_dtype=placement.dtype,
            skip_modules_pattern=(*Lyra2Transformer3DModel.KEPT_PRECISE, "lora_"),
        )
    if placement.offload == "group":
        transformer.enable_group_offload(
            offload_type="block_level", num_blocks_per_group=1, **streaming_options(placement.torch_device)
        )
        return lambda: None
    return OnDemand(transformer, device, resident=placement.offload == "none").leave


def place_text_encoder(encoder: nn.Module, placement: Placement) -> OnDemand:
    """Put the text encoder where the placement wants it: on an accelerator it never stays after its work."""
    device = placement.torch_device
    if placement.offload == "group":
        apply_group_offloading(encoder, offload_type="leaf_level", **streaming_options(device))
        return OnDemand(encoder, device, resident=True, placed=True)
    return OnDemand(encoder, device, resident=device.type == "cpu")


def streaming_options(device: torch.device) -> dict[str, Any]:
    """Options of diffusers' group offloading: from pinned memory, ahead of the computation, where there are streams."""
    streams = device.type == "cuda"
    return {
        "onload_device": device,
        "offload_device": torch.device("cpu"),
        "use_stream": streams,
        "record_stream": streams,
    }
