"""How is a LoRA file in the released format read, put on the video transformer through peft, switched and fused?

y = W x + sum_i w_i B_i (A_i x): alpha equals the rank, a stored alpha is folded into A (released code). Unfused, a
change of strengths costs nothing; fused, the two small products per layer are saved (an estimated 5 to 15 % of a pass).

While a LoRA is loaded, peft wraps the linear maps it touches: in the state dict `blocks.0.attn1.to_q.weight` becomes
`blocks.0.attn1.to_q.base_layer.weight`, and `lora_A` and `lora_B` stand beside it. So weights are loaded before
`load_lora`, and saved before it or after `unload_loras`. The model's `config`, `dtype` and `device` stay as they are.
Load before offloading, and give no forward pass a `ChunkCache` from before a change. Knows no sampler and no job.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lyra.errors import UserError
from lyra.models.checkpoint import from_released_name
from lyra.models.conditioning import Float32Linear
from lyra.models.weight_files import read_weights

if TYPE_CHECKING:
    from lyra.models.transformer import Lyra2Transformer3DModel

logger = logging.getLogger(__name__)

NEGLIGIBLE = 0.016
"""An additive weight v with max |v| - min |v| below this is left out (released code)."""

RELEASED_LINEARS: tuple[str, ...] = (
    *(f"blocks.#.self_attn.{part}" for part in ("q", "k", "v", "o")),
    *(f"blocks.#.cross_attn.{part}" for part in ("q", "k", "v", "o", "k_img", "v_img")),
    *(f"blocks.#.{part}" for part in ("ffn.0", "ffn.2", "cam_encoder", "buffer_encoder.0", "buffer_encoder.1")),
    *("time_projection.1", "text_embedding.0", "text_embedding.2", "time_embedding.0", "time_embedding.2"),
    *("patch_embedding", "clean_patch_embeddings.#", "img_emb.proj.1", "img_emb.proj.3", "head.head"),
)
"""Released names of all linear maps; # is a number."""

_FLATTENED = {re.compile(name.replace(".", "_").replace("#", r"(\d+)")): name for name in RELEASED_LINEARS}
"""What kohya-style trainers make of these names: every dot an underscore."""

_KEY = re.compile(
    r"(?P<module>.+)\.(?:(?P<down>lora_(?:A(?:\.default)?|down)\.weight)|(?P<up>lora_(?:B(?:\.default)?|up)\.weight)"
    r"|(?P<alpha>alpha)|(?P<bias>diff_b)|(?P<weight>diff)|(?P<modulation>diff_m))"
)

_PLAIN_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class LoraPair:
    """The two factors of one linear map's update."""

    down: Float[Tensor, "r i"]
    up: Float[Tensor, "o r"]


@dataclass(frozen=True)
class LoraWeights:
    """A LoRA file under this project's names."""

    path: Path
    rank: int
    """Rank of the file's first pair; others may differ."""
    pairs: Mapping[str, LoraPair]
    biases: Mapping[str, Float[Tensor, "o"]]
    """What modules add to their output besides; as the pairs, by module."""
    deltas: Mapping[str, Tensor]
    """What is added to other parameters, by parameter."""


class _Term(NamedTuple):
    """A summand of a parameter: strength * values, or strength * values @ down."""

    strength: float
    values: Tensor
    down: Tensor | None = None


@dataclass
class _Loras:
    """What is loaded into a model, which of it is active, and what the changed parameters were before."""

    deltas: dict[str, Mapping[str, Tensor]] = field(default_factory=dict)
    active: dict[str, float] = field(default_factory=dict)
    fused: bool = False
    originals: dict[str, Tensor] = field(default_factory=dict)


class _Float32Factor(nn.Linear):
    """A LoRA factor beside a `Float32Linear`; computes in float32 whatever the model is cast to."""

    def forward(self, x: Float[Tensor, "*batch i"]) -> Float[Tensor, "*batch o"]:
        return nn.functional.linear(x.float(), self.weight.float(), None if self.bias is None else self.bias.float())


def read_lora(path: Path) -> LoraWeights:
    """Read a LoRA file: names of the released network, with or without prefixes, or of kohya-style trainers.

    Additive weights (`diff`, `diff_b`, `diff_m`) below `NEGLIGIBLE` are left out. Larger `diff_b` become biases of
    their pairs (released code); the rest, which the released code ignores, is added to the parameters it names.

    Raises:
        UserError: the file cannot be read, holds no LoRA, or has keys that no rule covers, halves of pairs, or
            factors that do not fit together; the message names the first few.
    """
    parts, problems = _parts(read_weights(path))
    pairs, additive = {}, {}
    for released, tensors in parts.items():
        try:
            if not tensors.keys().isdisjoint(("down", "up", "alpha")):
                pairs[from_released_name(f"{released}.weight").removesuffix(".weight")] = _pair(tensors)
            for kind in ("weight", "bias", "modulation"):
                if kind in tensors:
                    additive[from_released_name(f"{released}.{kind}")] = tensors[kind]
        except (KeyError, ValueError) as error:
            problems.append(f"{released}: {error.args[0]}")
    if problems or not (pairs or additive):
        raise UserError(
            f"{path} is no LoRA for this video transformer ({_listed(problems) or 'it is empty'}); use one that was "
            "made for Lyra 2.0 or Wan 2.1."
        )
    kept = {name: tensor for name, tensor in additive.items() if not _is_negligible(tensor)}
    if additive:
        logger.info("%s: %d of %d additive weights are negligible.", path, len(additive) - len(kept), len(additive))
    biases = {module: kept.pop(f"{module}.bias") for module in pairs if f"{module}.bias" in kept}
    rank = next((len(pair.down) for pair in pairs.values()), 0)
    return LoraWeights(path, rank, pairs, biases, kept)


def load_lora(model: Lyra2Transformer3DModel, weights: LoraWeights, name: str) -> None:
    """Put a LoRA on the model, switched off; others that are loaded stay as they are.

    Factors are stored in the dtype their linear map computes in: float32 beside a `Float32Linear`. The linear maps may
    be quantised (bitsandbytes) or stored in float8 (layerwise casting).

    Raises:
        UserError: the name is taken or unusable, or modules or shapes do not fit the model; nothing is changed then.
    """
    loras = model.__dict__.get("_loras") or _Loras()
    if name in loras.deltas:
        raise UserError(f"A LoRA '{name}' is loaded already; choose another name or unload first.")
    # peft keeps the factors in a ModuleDict under this name, which must be no attribute of it.
    if not re.fullmatch(r"[\w-]+", name) or hasattr(nn.ModuleDict(), name):
        raise UserError(f"A LoRA cannot be called '{name}'; choose another word of letters, digits, - and _.")
    if problems := list(_misfits(model, weights)):
        raise UserError(f"{weights.path} does not fit this model ({_listed(problems)}); use a LoRA made for it.")
    if weights.pairs:
        _inject(model, weights, name)
    loras.deltas[name] = weights.deltas
    model._loras = loras
    _activate(model, loras)


def set_loras(model: Lyra2Transformer3DModel, strengths: Mapping[str, float]) -> None:
    """Make exactly these LoRAs active, unfused; with an empty mapping the outputs are bit for bit those of the base.

    Raises:
        UserError: a name is not loaded or a strength is not finite.
    """
    _apply(model, strengths, fused=False)


def fuse_loras(model: Lyra2Transformer3DModel, strengths: Mapping[str, float]) -> None:
    """Add exactly these LoRAs to the weights, in place, each sum formed in float32 and rounded once to their dtype.

    The originals are kept, so that another set can follow and `unfuse_loras` restores every bit. That costs host
    memory: one copy of each touched weight, 34 GB in bfloat16 if that is all linear maps of the released network. The
    copies are not pinned, because torch rounds pinned blocks up to powers of two (51 GB).

    Raises:
        UserError: a name is not loaded, a strength is not finite, or a weight is quantised, stored in float8 or not in
            memory; nothing is changed then.
    """
    _apply(model, strengths, fused=True)


def unfuse_loras(model: Lyra2Transformer3DModel) -> None:
    """Restore the base weights exactly; no LoRA is active afterwards."""
    _apply(model, {}, fused=False)


def loaded_loras(model: Lyra2Transformer3DModel) -> tuple[str, ...]:
    """Names of the loaded LoRAs, in the order of loading."""
    return tuple(getattr(model.__dict__.get("_loras"), "deltas", ()))


def unload_loras(model: Lyra2Transformer3DModel) -> None:
    """Take all LoRAs off the model; modules, weights and state dict names are then as before the first was loaded."""
    unfuse_loras(model)
    for path, layer in _lora_layers(model):
        parent, _, child = path.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.get_base_layer())
    model.__dict__.pop("peft_config", None)
    model.__dict__.pop("_loras", None)


def _parts(weights: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """The tensors of a file by released module and kind, and what cannot be placed."""
    parts: dict[str, dict[str, Tensor]] = {}
    problems = []
    for key, tensor in weights.items():
        match = _KEY.fullmatch(key)
        module = _released_module(match["module"]) if match else None
        if match is None or match.lastgroup is None or module is None:
            problems.append(f"{key} follows no known naming")
        elif match.lastgroup in parts.setdefault(module, {}):
            problems.append(f"{key} is there twice")
        else:
            # A convolution's kernel is the matrix that the patch embedding has here.
            parts[module][match.lastgroup] = tensor.flatten(1) if tensor.ndim > 3 else tensor
    return parts, problems


def _released_module(name: str) -> str | None:
    """The released module that a file's module name means, without prefixes; None if no kohya-style name fits."""
    flat = name.removeprefix("lora_unet_")
    if flat == name:
        return name.removeprefix("diffusion_model.").removeprefix("net.")
    found = ((pattern.fullmatch(flat), released) for pattern, released in _FLATTENED.items())
    return next((released.replace("#", "".join(match.groups())) for match, released in found if match), None)


def _pair(tensors: Mapping[str, Tensor]) -> LoraPair:
    """The factors of one module with alpha folded into the lower one (released code); ValueError says what is wrong."""
    if missing := [half for half in ("down", "up") if half not in tensors]:
        raise ValueError(f"lacks its {' and its '.join(missing)} matrix")
    down, up = tensors["down"], tensors["up"]
    if down.ndim != 2 or up.ndim != 2 or len(down) != up.shape[1] or len(down) == 0:
        raise ValueError(f"has factors {list(down.shape)} and {list(up.shape)}, which do not multiply")
    if "alpha" in tensors:
        if tensors["alpha"].numel() != 1:
            raise ValueError("has an alpha that is not one number")
        scale = float(tensors["alpha"]) / len(down)
        down = down if scale == 1 else down.float() * scale
    return LoraPair(down, up)


def _is_negligible(tensor: Tensor) -> bool:
    """Whether the released code would leave an additive weight out."""
    size = tensor.float().abs()
    return size.numel() == 0 or float(size.max() - size.min()) < NEGLIGIBLE


def _listed(problems: Sequence[str]) -> str:
    """The first few problems and how many more there are."""
    return "; ".join(problems[:4]) + (f"; {len(problems)} problems in all" if len(problems) > 4 else "")


def _base(model: nn.Module, path: str) -> nn.Module | None:
    """The module itself where peft has wrapped it; None if the model lacks it."""
    try:
        module = model.get_submodule(path)
    except AttributeError:
        return None
    return getattr(module, "base_layer", module)


def _parameter(model: nn.Module, name: str) -> Any:
    """A parameter of the base model by its name without LoRAs; None if the model lacks it."""
    path, _, leaf = name.rpartition(".")
    return getattr(_base(model, path), leaf, None)


def _misfits(model: nn.Module, weights: LoraWeights) -> Iterator[str]:
    """Why a LoRA cannot go on a model."""
    for module, pair in weights.pairs.items():
        base, bias = _base(model, module), weights.biases.get(module)
        if not isinstance(base, nn.Linear):
            yield f"the model lacks the linear map {module}"
        elif (wanted := (base.out_features, base.in_features)) != (found := (len(pair.up), pair.down.shape[1])):
            yield f"{module} is {list(wanted)}, not {list(found)}"
        elif bias is not None and bias.shape != wanted[:1]:
            yield f"{module} takes a bias of {list(wanted[:1])}, not {list(bias.shape)}"
        elif base.weight.is_meta:
            yield f"{module} is not in memory"
    for name, delta in weights.deltas.items():
        parameter = _parameter(model, name)
        if parameter is None:
            yield f"the model lacks {name}"
        elif not _is_plain(parameter):
            yield f"{name} is quantised or not in memory"
        elif parameter.shape != delta.shape:
            yield f"{name} is {list(parameter.shape)}, not {list(delta.shape)}"


def _is_plain(parameter: Tensor) -> bool:
    """Whether values can be added to a parameter: neither quantised nor float8 nor a placeholder."""
    return type(parameter.data) is Tensor and parameter.dtype in _PLAIN_DTYPES and not parameter.is_meta


def _inject(model: Lyra2Transformer3DModel, weights: LoraWeights, name: str) -> None:
    """Let peft wrap the modules, then give it the factors."""
    from peft import LoraConfig, inject_adapter_in_model

    modules = "|".join(re.escape(module) for module in weights.pairs)
    config = LoraConfig(r=weights.rank, target_modules=f"(?:{modules})", init_lora_weights=False)
    # peft freezes what it wraps; whether the base is trained is not this module's to decide.
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    known = model.__dict__.pop("peft_config", {})  # peft warns of a second LoRA if it sees this.
    inject_adapter_in_model(config, model, adapter_name=name, low_cpu_mem_usage=True)
    model.peft_config, dtype = {**known, **model.peft_config}, model.dtype
    for parameter in trained:
        parameter.requires_grad_(True)
    for module, pair in weights.pairs.items():
        layer: Any = model.get_submodule(module)
        base, bias = layer.get_base_layer(), weights.biases.get(module)
        layer.r[name] = layer.lora_alpha[name] = len(pair.down)  # The scale is 1 whatever each pair's rank.
        layer.lora_A[name] = _factor(base, pair.down, None, dtype)
        layer.lora_B[name] = _factor(base, pair.up, bias, dtype)
        layer.lora_bias[name] = bias is not None
        layer.cast_input_dtype_enabled = not isinstance(base, Float32Linear)


def _factor(base: nn.Linear, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> nn.Linear:
    """A factor beside its base, in the base's dtype, or in `dtype` if that is not the one the base computes in."""
    kind = _Float32Factor if isinstance(base, Float32Linear) else nn.Linear
    own = torch.float32 if kind is _Float32Factor else getattr(base, "compute_dtype", None) or base.weight.dtype
    dtype, device = own if own in _PLAIN_DTYPES else dtype, base.weight.device
    factor = kind(weight.shape[1], len(weight), bias=bias is not None, device="meta")
    factor.weight = nn.Parameter(weight.to(device, dtype).contiguous(), requires_grad=False)
    if bias is not None:
        factor.bias = nn.Parameter(bias.to(device, dtype), requires_grad=False)
    return factor


def _lora_layers(model: nn.Module) -> list[tuple[str, Any]]:
    """Path and peft layer of every wrapped module."""
    return [(path, module) for path, module in model.named_modules() if hasattr(module, "lora_A")]


@torch.no_grad()
def _apply(model: Lyra2Transformer3DModel, strengths: Mapping[str, float], fused: bool) -> None:
    """Bring parameters and peft layers to what these strengths mean; a mistake is found before anything changes."""
    loras: _Loras = model.__dict__.get("_loras") or _Loras()
    if unknown := [name for name in strengths if name not in loras.deltas]:
        raise UserError(f"No LoRA '{unknown[0]}' is loaded but {', '.join(loras.deltas) or 'none'}; load it first.")
    if odd := [name for name, strength in strengths.items() if not math.isfinite(strength)]:
        raise UserError(f"The strength of the LoRA '{odd[0]}' is not finite; choose a number such as 1.")
    # In the order of loading, so that equal jobs give equal bits however their mapping is ordered.
    active = {name: float(strengths[name]) for name in loras.deltas if strengths.get(name, 0) != 0}
    if (active, fused) == (loras.active, loras.fused):
        return
    terms = _terms(model, loras, active, fused)
    for name in terms:
        parameter = _parameter(model, name)
        if parameter is None:
            raise UserError(f"A LoRA adds a bias to {name}, which has none to fuse it into; use the LoRA unfused.")
        if not _is_plain(parameter):
            raise UserError(f"No LoRA can be fused into {name}, which is quantised or offloaded; use it unfused.")
    for name in [*terms, *(loras.originals.keys() - terms.keys())]:
        parameter = _parameter(model, name)
        if name not in loras.originals:
            loras.originals[name] = parameter.detach().to("cpu", copy=True)
        total = loras.originals[name].to(parameter.device, copy=True)
        total = total.to(torch.promote_types(total.dtype, torch.float32))
        for strength, values, down in terms.get(name, ()):
            if down is None:
                total.add_(values.to(total).view_as(total), alpha=strength)
            else:
                total.addmm_(values.to(total), down.to(total), alpha=strength)
        parameter.copy_(total)
        if name not in terms:
            del loras.originals[name]
    loras.active, loras.fused = active, fused
    _activate(model, loras)


def _terms(model: nn.Module, loras: _Loras, active: Mapping[str, float], fused: bool) -> dict[str, list[_Term]]:
    """What has to be added to which parameter."""
    terms: dict[str, list[_Term]] = {}
    for lora, strength in active.items():
        for name, delta in loras.deltas[lora].items():
            terms.setdefault(name, []).append(_Term(strength, delta))
    for path, layer in _lora_layers(model) if fused else []:
        for lora in (name for name in active if name in layer.lora_A):
            up, down = layer.lora_B[lora], layer.lora_A[lora]
            terms.setdefault(f"{path}.weight", []).append(_Term(active[lora], up.weight, down.weight))
            if up.bias is not None:
                terms.setdefault(f"{path}.bias", []).append(_Term(active[lora], up.bias))
    return terms


def _activate(model: nn.Module, loras: _Loras) -> None:
    """Tell peft's layers which LoRAs to add to their outputs; none while they are fused."""
    for _, layer in _lora_layers(model):
        here = [] if loras.fused else [name for name in loras.active if name in layer.lora_A]
        for name in here:
            layer.set_scale(name, loras.active[name])
        layer.set_adapter(here, inference_mode=True)
