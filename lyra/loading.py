"""Builds the loop's parts from a model's files; the only place that maps files to classes.

Two layouts are read: this project's (lyra.json and one folder of config.json and safetensors for each part) and the
one that NVIDIA released. Which class a part is says its config; a model's name decides nothing. Knows the classes, not
the loop; what stays on the device and what comes there only to run is `lyra.offload`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers.models.attention_dispatch import attention_backend
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from diffusers.utils import logging as diffusers_logging
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPVisionModel, UMT5EncoderModel
from transformers.utils import logging as transformers_logging

from lyra.config import RELEASED_SETTINGS, ModelSettings
from lyra.depth.base import DepthEstimator
from lyra.depth.depth_anything import DepthAnythingDepth
from lyra.depth.tiny import TinyDepthModel
from lyra.depth.walk import SeenDepth
from lyra.errors import UserError
from lyra.generation.walkthrough import Components, WalkDepth
from lyra.hub import ModelSource, tokenizer_folder
from lyra.models.autoencoder import TinyCausalAutoencoder
from lyra.models.blocks import fastest_attention
from lyra.models.clip_vision import CLIPImageEncoder
from lyra.models.context_parallel import (
    ONE_PROCESS,
    ContextParallelGroup,
    ParallelTransformer,
    call_everywhere,
    serve,
)
from lyra.models.depth_anything.model import AnyDepthAnything
from lyra.models.depth_anything_folder import (
    CLASS_NAME,
    AnyDepthAnythingConfig,
    config_from_json,
    load_depth_folder,
    load_released_depth,
)
from lyra.models.pretrained import class_of, load_pretrained
from lyra.models.refiner import SeamRefiner
from lyra.models.released import (
    LORA_FILE,
    NEGATIVE_FILE,
    NEGATIVE_TENSOR,
    RECONSTRUCTION_FILE,
    ReleasedSizes,
    load_autoencoder,
    load_image_encoder,
    load_text_encoder,
    load_transformer,
)
from lyra.models.streaming import StreamingAutoencoder, StreamingWanAutoencoder
from lyra.models.text import HashedTextEncoder
from lyra.models.tiled_autoencoder import TiledWanAutoencoder
from lyra.models.transformer import Lyra2Transformer3DModel
from lyra.models.umt5 import TEXT_LEN, UMT5TextEncoder, load_tokenizer, read_negative_embedding
from lyra.offload import CachedTexts, OnDemand, place_text_encoder, place_transformer, switch_loras
from lyra.placement import Placement


@dataclass(frozen=True)
class Networks:
    """The networks of a model, on the CPU."""

    settings: ModelSettings
    transformer: Lyra2Transformer3DModel
    autoencoder: nn.Module
    """TinyCausalAutoencoder or diffusers' AutoencoderKLWan."""
    text_encoder: nn.Module
    encode_text: Callable[[Sequence[str]], Tensor]
    image_encoder: CLIPVisionModel | None
    """None where the depth network's tokens are used."""
    depth: TinyDepthModel | AnyDepthAnything
    depth_config: AnyDepthAnythingConfig | None
    """Sizes of a Depth Anything 3 network."""
    negative_text: Tensor | None
    """Stored embedding; that of an empty text where there is none."""
    refiner: SeamRefiner | None
    dmd_lora: Path | None


@dataclass(frozen=True)
class LoadedModel:
    """A model, ready to run."""

    parts: Components
    depth: DepthEstimator
    """Sees the photo."""


def load_components(
    source: ModelSource, placement: Placement, group: ContextParallelGroup = ONE_PROCESS, *, fuse_loras: bool = False
) -> LoadedModel:
    """The loop's parts and the depth estimator of the photo.

    Args:
        group: processes that share the transformer's work.
        fuse_loras: add the LoRAs of a job to the weights instead of computing them beside.

    Raises:
        UserError: a part is missing, damaged or hostile, or its tensors do not fit.
    """
    if fuse_loras and (placement.offload == "group" or placement.weights in ("fp8", "nf4")):
        raise UserError(
            "LoRAs can be fused only into bf16 or fp32 weights that are not streamed; leave --fuse-loras out, or "
            "choose --weights bf16 with --offload none or model."
        )
    # Progress bars and notices about number formats would run into the job's own progress.
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    diffusers_logging.set_verbosity_error()
    transformers_logging.set_verbosity_error()
    read = released_networks if source.layout == "released" else saved_networks
    try:
        networks = read(source.folder, placement)
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = error.args[0] if isinstance(error, KeyError) else error
        raise UserError(
            f"The weights in {source.folder} cannot be loaded ({reason}); restore or download them again."
        ) from error
    return assemble(networks, placement, group, fuse_loras)


def released_networks(folder: Path, placement: Placement) -> Networks:
    """The networks in the released layout.

    Raises:
        UserError, ValueError, KeyError: files are missing or damaged, or tensors do not fit.
    """
    if placement.weights == "nf4":
        raise UserError(
            "4-bit weights are made from a converted model; run `python -m lyra convert` once and give its folder as "
            "--model."
        )
    dtype, sizes = placement.dtype, ReleasedSizes.of(folder)
    # First what may have to be fetched, because reading the large files takes minutes.
    tokenizer = load_tokenizer(str(tokenizer_folder(folder)))
    text_encoder = load_text_encoder(folder, dtype)
    depth_config = config_from_json(sizes.reconstruction)
    transformer = load_transformer(folder, dtype)
    lora = folder / LORA_FILE
    return Networks(
        settings=replace(RELEASED_SETTINGS, **sizes.settings),
        transformer=transformer,
        autoencoder=load_autoencoder(folder, dtype),
        text_encoder=text_encoder,
        encode_text=UMT5TextEncoder(text_encoder, tokenizer),
        image_encoder=load_image_encoder(folder, dtype),
        depth=load_released_depth(folder / RECONSTRUCTION_FILE, depth_config),
        depth_config=depth_config,
        negative_text=read_negative_embedding(folder / NEGATIVE_FILE, TEXT_LEN, transformer.config.text_dim),
        refiner=None,
        dmd_lora=lora if lora.exists() else None,
    )


def saved_networks(folder: Path, placement: Placement) -> Networks:
    """The networks in this project's layout.

    Raises:
        UserError, ValueError: files are missing or damaged, or tensors do not fit.
    """
    settings, dtype = ModelSettings.load(folder), placement.dtype
    text_encoder, encode_text = saved_text_encoder(folder, dtype)
    negative, lora = folder / NEGATIVE_TENSOR, folder / LORA_FILE
    depth, depth_config = saved_depth(folder / "depth", dtype)
    return Networks(
        settings=settings,
        transformer=saved_transformer(folder / "transformer", placement),
        autoencoder=load_pretrained(
            one_of(folder / "autoencoder", TinyCausalAutoencoder, AutoencoderKLWan), folder / "autoencoder", dtype=dtype
        ),
        text_encoder=text_encoder,
        encode_text=encode_text,
        image_encoder=saved_image_encoder(folder / "image_encoder", dtype),
        depth=depth,
        depth_config=depth_config,
        negative_text=load_file(negative)["negative_text"] if negative.exists() else None,
        refiner=load_pretrained(SeamRefiner, folder / "refiner", dtype=dtype) if settings.keep_seen_pixels else None,
        dmd_lora=lora if lora.exists() else None,
    )


def saved_transformer(folder: Path, placement: Placement) -> Any:
    """The video transformer, quantised while it is read where the placement asks for 4-bit weights."""
    if placement.weights != "nf4":
        return load_pretrained(Lyra2Transformer3DModel, folder, dtype=placement.dtype)
    from diffusers import BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=placement.dtype,
        llm_int8_skip_modules=list(Lyra2Transformer3DModel.KEPT_PRECISE),
    )
    return load_pretrained(Lyra2Transformer3DModel, folder, dtype=placement.dtype, quantization_config=quantization)


def saved_text_encoder(folder: Path, dtype: torch.dtype) -> tuple[nn.Module, Callable[[Sequence[str]], Tensor]]:
    """The text encoder's network, and what embeds texts with it."""
    chosen = one_of(folder / "text_encoder", HashedTextEncoder, UMT5EncoderModel)
    network = load_pretrained(chosen, folder / "text_encoder", dtype=dtype)
    if chosen is HashedTextEncoder:
        return network, network
    return network, UMT5TextEncoder(network, load_tokenizer(str(tokenizer_folder(folder))))


def saved_image_encoder(folder: Path, dtype: torch.dtype) -> Any:
    """The CLIP tower, where the model has one."""
    return load_pretrained(CLIPVisionModel, folder, dtype=dtype) if folder.is_dir() else None


def saved_depth(folder: Path, dtype: torch.dtype) -> tuple[Any, AnyDepthAnythingConfig | None]:
    """The depth network, and its sizes where it is Depth Anything 3."""
    if class_of(folder) == CLASS_NAME:
        return load_depth_folder(folder)
    return load_pretrained(one_of(folder, TinyDepthModel), folder, dtype=dtype), None


def one_of(folder: Path, *classes: Any) -> Any:
    """The class that a part was saved from.

    Raises:
        UserError: it is none of these.
    """
    name = class_of(folder)
    for known in classes:
        if known.__name__ == name:
            return known
    names = " or ".join(known.__name__ for known in classes)
    raise UserError(f"{folder / 'config.json'} names the class {name}, but {names} is needed here; restore the folder.")


def assemble(networks: Networks, placement: Placement, group: ContextParallelGroup, fuse_loras: bool) -> LoadedModel:
    """Put the networks where the placement wants them and join them to the loop's parts."""
    device, resident = placement.torch_device, placement.offload == "none"
    release = place_transformer(networks.transformer, placement)
    transformer: Any = networks.transformer
    if group.channel is not None:
        transformer = ParallelTransformer(networks.transformer, group)

    def use_sampler(sampler: str, loras: Mapping[str, float]) -> None:
        needs_lora = networks.settings.few_step_lora
        call_everywhere(transformer, switch_loras, networks.dmd_lora, needs_lora, fuse_loras, sampler, dict(loras))

    # Text is encoded once per caption, so its encoder never keeps room that denoising could use.
    texts = CachedTexts(networks.encode_text, place_text_encoder(networks.text_encoder, placement), device)
    depth, walk_depth = depth_parts(networks, placement, resident)
    return LoadedModel(
        Components(
            settings=networks.settings,
            transformer=transformer,
            layout=networks.transformer.layout,
            autoencoder=streaming(networks.autoencoder.to(device), placement.decode),
            encode_text=texts,
            negative_text=texts([""]) if networks.negative_text is None else networks.negative_text.to(device),
            encode_image=image_tokens(networks, depth, device, resident),
            depth=walk_depth,
            blend=networks.refiner.to(device).blend if networks.refiner is not None else None,
            use_sampler=use_sampler,
            release=release,
            attention=placement.attention,
            waiting_caches=None if resident and placement.decode == "streamed" else torch.device("cpu"),
        ),
        depth,
    )


def serve_transformer(source: ModelSource, placement: Placement, group: ContextParallelGroup) -> None:
    """Load the transformer alone and take part in the first process's forward passes until it is done.

    Raises:
        UserError: the transformer is missing, damaged or hostile, or its tensors do not fit.
        ConnectionError: another process has ended.
    """
    if source.layout == "released":
        transformer = load_transformer(source.folder, placement.dtype)
    else:
        transformer = saved_transformer(source.folder / "transformer", placement)
    place_transformer(transformer, placement)
    # The first process chooses its kernel around its own passes only.
    with attention_backend(placement.attention), fastest_attention():
        serve(transformer, group)


def streaming(autoencoder: Any, decode: str) -> StreamingAutoencoder:
    """The interface of the loop to either autoencoder."""
    if not isinstance(autoencoder, AutoencoderKLWan):
        return autoencoder
    return TiledWanAutoencoder(autoencoder) if decode == "tiled" else StreamingWanAutoencoder(autoencoder)


def depth_parts(networks: Networks, placement: Placement, resident: bool) -> tuple[DepthEstimator, WalkDepth]:
    """What measures the photo, and what measures new frames with their cameras."""
    device = placement.torch_device
    if isinstance(networks.depth, TinyDepthModel):
        tiny = networks.depth.to(device)
        return tiny, SeenDepth(tiny)
    assert networks.depth_config is not None
    network = DepthAnythingDepth(networks.depth, networks.depth_config, device, placement.dtype)
    on_demand = OnDemand(networks.depth, device, resident=resident)
    both = on_demand.leaving(network, "predict", "measure")
    # Networks that see one image at a time are anchored in what memory shows.
    relates_views = getattr(networks.depth_config, "any_view", False)
    return both, both if relates_views else SeenDepth(both)


def image_tokens(
    networks: Networks, depth: DepthEstimator, device: torch.device, resident: bool
) -> Callable[[Tensor], Tensor]:
    """What embeds the newest frame."""
    if networks.image_encoder is None:
        return lambda image: depth.predict(image).features
    on_demand = OnDemand(networks.image_encoder, device, resident=resident)
    return on_demand.leaving_call(CLIPImageEncoder(networks.image_encoder))
