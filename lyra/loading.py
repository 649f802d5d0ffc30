"""Builds the loop's parts from a model's files; the only place that maps files to classes.

Two layouts are read: this project's (lyra.json and one folder of config.json and safetensors for each part) and the
one that NVIDIA released. Which class a part is says its config; a model's name decides nothing. Knows the classes, not
the loop; what stays on the device and what comes there only to run is `lyra.offload`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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
from lyra.depth.combined import CombinedDepth
from lyra.depth.depth_anything import DepthAnythingDepth
from lyra.depth.files import DepthNetwork, read_depth
from lyra.depth.tiny import TinyDepthModel
from lyra.depth.walk import SeenDepth, SeenViewsDepth
from lyra.errors import UserError
from lyra.generation.walkthrough import Components, WalkDepth
from lyra.hub import ModelSource, find_depth, tokenizer_folder
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
from lyra.models.pretrained import class_of, load_pretrained
from lyra.models.refiner import SeamRefiner
from lyra.models.released import (
    LORA_FILE,
    NEGATIVE_FILE,
    NEGATIVE_TENSOR,
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
from lyra.progress import Progress


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
    depth: DepthNetwork | None
    """None where another one takes its place and its tokens are not needed."""
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
    depth_source: ModelSource | None = None
    """Where the depth network and its licence are from, when it is not the model's own."""


@dataclass(frozen=True)
class LoadedDepth:
    """A depth network, ready to run."""

    photo: DepthEstimator
    """Measures the photo."""
    walk: WalkDepth
    """Measures new frames with their cameras."""
    source: ModelSource
    """Where it and its licence are from."""
    knows_cameras: bool
    """It predicts fields of view, and `walk` relates views by their cameras."""


def load_components(
    source: ModelSource,
    placement: Placement,
    group: ContextParallelGroup = ONE_PROCESS,
    *,
    fuse_loras: bool = False,
    depth: str | None = None,
    progress: Progress | None = None,
) -> LoadedModel:
    """The loop's parts and the depth estimator of the photo.

    Args:
        group: processes that share the transformer's work.
        fuse_loras: add the LoRAs of a job to the weights instead of computing them beside.
        depth: a depth network as for `find_depth`, in place of the model's own.
        progress: told about a download of that network.

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
    # First what is small, may have to be fetched and may be refused.
    loaded = None if depth is None else load_depth(depth, placement, progress)
    with damage_explained(source.folder):
        networks = read(source.folder, placement, own_depth=depth is None)
    return assemble(networks, placement, group, fuse_loras, loaded)


def load_depth(name: str, placement: Placement, progress: Progress | None = None) -> LoadedDepth:
    """A depth network alone, where the placement wants it.

    Args:
        name: as for `find_depth`; what is not on this machine is downloaded.
        progress: told about the download.

    Raises:
        UserError: there is no such network, its licence is not accepted, the download failed, a file is damaged or
            hostile, or its tensors do not fit.
        Cancelled: the user stopped the download.
    """
    source = find_depth(name, progress=progress)
    with damage_explained(source.folder):
        network = read_depth(source.folder, source.layout, placement.dtype)
    photo, walk = depth_parts(network, placement)
    return LoadedDepth(photo, walk, source, network.relates_views)


@contextmanager
def damage_explained(folder: Path) -> Iterator[None]:
    """Turn what can be wrong with files of weights into a sentence.

    Raises:
        UserError: something is.
    """
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = error.args[0] if isinstance(error, KeyError) else error
        raise UserError(
            f"The weights in {folder} cannot be loaded ({reason}); restore or download them again."
        ) from error


def released_networks(folder: Path, placement: Placement, *, own_depth: bool = True) -> Networks:
    """The networks in the released layout; the depth network only where it is asked for.

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
    tokenizer = load_tokenizer(tokenizer_folder(folder))
    text_encoder = load_text_encoder(folder, dtype)
    transformer = load_transformer(folder, dtype)
    lora = folder / LORA_FILE
    return Networks(
        settings=replace(RELEASED_SETTINGS, **sizes.settings),
        transformer=transformer,
        autoencoder=load_autoencoder(folder, dtype),
        text_encoder=text_encoder,
        encode_text=UMT5TextEncoder(text_encoder, tokenizer),
        image_encoder=load_image_encoder(folder, dtype),
        depth=read_depth(folder, "released", dtype) if own_depth else None,
        negative_text=read_negative_embedding(folder / NEGATIVE_FILE, TEXT_LEN, transformer.config.text_dim),
        refiner=None,
        dmd_lora=lora if lora.exists() else None,
    )


def saved_networks(folder: Path, placement: Placement, *, own_depth: bool = True) -> Networks:
    """The networks in this project's layout; the depth network where it is asked for, or embeds images.

    Raises:
        UserError, ValueError: files are missing or damaged, or tensors do not fit.
    """
    settings, dtype = ModelSettings.load(folder), placement.dtype
    text_encoder, encode_text = saved_text_encoder(folder, dtype)
    negative, lora = folder / NEGATIVE_TENSOR, folder / LORA_FILE
    image_encoder = saved_image_encoder(folder / "image_encoder", dtype)
    return Networks(
        settings=settings,
        transformer=saved_transformer(folder / "transformer", placement),
        autoencoder=load_pretrained(
            one_of(folder / "autoencoder", TinyCausalAutoencoder, AutoencoderKLWan), folder / "autoencoder", dtype=dtype
        ),
        text_encoder=text_encoder,
        encode_text=encode_text,
        image_encoder=image_encoder,
        depth=read_depth(folder, "lyra", dtype) if own_depth or image_encoder is None else None,
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
    return network, UMT5TextEncoder(network, load_tokenizer(tokenizer_folder(folder)))


def saved_image_encoder(folder: Path, dtype: torch.dtype) -> Any:
    """The CLIP tower, where the model has one."""
    return load_pretrained(CLIPVisionModel, folder, dtype=dtype) if folder.is_dir() else None


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


def assemble(
    networks: Networks,
    placement: Placement,
    group: ContextParallelGroup,
    fuse_loras: bool,
    instead: LoadedDepth | None = None,
) -> LoadedModel:
    """Put the networks where the placement wants them and join them to the loop's parts.

    Args:
        instead: a depth network in place of the model's own.
    """
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
    own = None if networks.depth is None else depth_parts(networks.depth, placement)
    photo_depth, walk_depth = chosen_depth(own, instead)
    return LoadedModel(
        Components(
            settings=networks.settings,
            transformer=transformer,
            layout=networks.transformer.layout,
            autoencoder=streaming(networks.autoencoder.to(device), placement.decode),
            encode_text=texts,
            negative_text=texts([""]) if networks.negative_text is None else networks.negative_text.to(device),
            encode_image=image_tokens(networks, own[0] if own else None, device, resident),
            depth=walk_depth,
            blend=networks.refiner.to(device).blend if networks.refiner is not None else None,
            use_sampler=use_sampler,
            release=release,
            attention=placement.attention,
            waiting_caches=None if resident and placement.decode == "streamed" else torch.device("cpu"),
        ),
        photo_depth,
        None if instead is None else instead.source,
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


def depth_parts(depth: DepthNetwork, placement: Placement) -> tuple[DepthEstimator, WalkDepth]:
    """What measures the photo, and what measures new frames with their cameras."""
    device, resident = placement.torch_device, placement.offload == "none"
    if isinstance(depth.network, TinyDepthModel):
        tiny = depth.network.to(device)
        return tiny, SeenDepth(tiny)
    assert depth.config is not None
    network = DepthAnythingDepth(depth.network, depth.config, device, placement.dtype, depth.resolution)
    both = OnDemand(depth.network, device, resident=resident).leaving(network, "predict", "measure")
    # Networks that see one image at a time are anchored in what memory shows.
    return both, both if depth.relates_views else SeenDepth(both)


def chosen_depth(
    own: tuple[DepthEstimator, WalkDepth] | None, instead: LoadedDepth | None
) -> tuple[DepthEstimator, WalkDepth]:
    """The model's own depth or the one in its place; an own network that embeds images keeps the rest of its work."""
    if instead is None:
        assert own is not None
        return own
    if own is None:
        return instead.photo, instead.walk
    combined = CombinedDepth(instead.photo, own[0], own_fov=not instead.knows_cameras)
    if instead.knows_cameras:
        return combined, SeenViewsDepth(instead.walk.measure, sky=own[0])
    return combined, SeenDepth(combined)


def image_tokens(
    networks: Networks, own: DepthEstimator | None, device: torch.device, resident: bool
) -> Callable[[Tensor], Tensor]:
    """What embeds the newest frame: CLIP, or the model's own depth network."""
    if networks.image_encoder is None:
        assert own is not None
        embeds = own
        return lambda image: embeds.predict(image).features
    on_demand = OnDemand(networks.image_encoder, device, resident=resident)
    return on_demand.leaving_call(CLIPImageEncoder(networks.image_encoder))
