"""Which way leads from a walkthrough to Gaussians, and with which network?

Finds and loads the depth network of a model alone: nothing else of it is read, and of NVIDIA's repository nothing else
is downloaded. What a reconstructor does is `lyra.reconstruction`; what becomes of its Gaussians, `lyra.lifting`.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Literal

import torch

from lyra.config import LoadOptions, ReconstructJob
from lyra.depth.files import makes_gaussians, read_config, read_depth
from lyra.depth.tiny import TinyDepthModel
from lyra.device import choose_device
from lyra.errors import UserError
from lyra.hub import DEFAULT_MODEL, MODELS, ModelSource, find_depth
from lyra.loading import damage_explained
from lyra.models.gaussian_head import TinyGaussianHead
from lyra.models.pretrained import load_pretrained
from lyra.placement import CAPABILITY, Placement, this_machine
from lyra.progress import Progress
from lyra.reconstruction.base import Reconstructor
from lyra.reconstruction.depth_anything import DepthAnythingReconstructor, LiftSettings
from lyra.reconstruction.gaussians import LIFT_INTERVAL, GeometricLift
from lyra.reconstruction.tiny_gaussians import TinyGaussianReconstructor
from lyra.world import World

ReconstructorName = Literal["geometric", "lyra-tiny", "depth-anything"]

logger = logging.getLogger(__name__)

LOAD = "Load reconstruction network"
WITHOUT_DEPTH_ANYTHING: ReconstructorName = "lyra-tiny"
"""What lifts a world whose model has no Gaussian head; benchmarks/lifting.py compares it with the geometric lift."""


def load_reconstructor(
    name: ReconstructorName,
    source: ModelSource | None,
    placement: Placement,
    progress: Progress | None = None,
    *,
    interval: int = LIFT_INTERVAL,
    settings: LiftSettings | None = None,
) -> Reconstructor:
    """A reconstructor by name, ready to run.

    Args:
        source: where Depth Anything 3 is, as `find_depth` gives it; the others need none.
        placement: device and number format of Depth Anything 3; lyra-tiny's head runs on the CPU.
        interval: of all but Depth Anything 3, in frames.
        settings: of Depth Anything 3.

    Raises:
        UserError: there is no such way, the network has no Gaussian head, its files are missing, damaged or hostile, or
            its tensors do not fit.
    """
    if name == "geometric":
        return GeometricLift(interval)
    if name == "lyra-tiny":
        return load_tiny(interval, progress)
    if name != "depth-anything":
        raise UserError(f"There is no reconstructor '{name}'; choose geometric, lyra-tiny or depth-anything.")
    if source is None:
        raise UserError(
            "The reconstructor depth-anything needs its weights; name a model or a folder that has them, or choose "
            "lyra-tiny or geometric."
        )
    if not has_gaussian_head(source):
        raise UserError(
            f"The depth network of {source.name} has no Depth Anything Gaussian head; choose nvidia/Lyra-2.0, "
            "da3-giant or a folder with such a network as --model, or another reconstructor."
        )
    if progress is not None:
        progress.enter(LOAD)
    with damage_explained(source.folder):
        network = read_depth(source.folder, source.layout, placement.dtype).network
    assert not isinstance(network, TinyDepthModel)
    return DepthAnythingReconstructor(network, placement.torch_device, placement.dtype, settings or LiftSettings())


def load_tiny(interval: int, progress: Progress | None = None) -> TinyGaussianReconstructor:
    """lyra-tiny's Gaussian head with the trunk that it shares with the depth network; both come with the package."""
    if progress is not None:
        progress.enter(LOAD)
    folder = MODELS / DEFAULT_MODEL
    with damage_explained(folder):
        trunk = load_pretrained(TinyDepthModel, folder / "depth", dtype=torch.float32)
        head = load_pretrained(TinyGaussianHead, folder / "gaussian_head", dtype=torch.float32)
    return TinyGaussianReconstructor(trunk.eval(), head.eval(), interval)


def has_gaussian_head(source: ModelSource) -> bool:
    """Whether the depth network of a source makes Gaussians; reads its sizes and no weights.

    Raises:
        UserError: its files are missing or damaged.
    """
    return makes_gaussians(read_config(source.folder, source.layout))


def resolve(world: World, job: ReconstructJob) -> ReconstructJob:
    """A job whose reconstructor and model are chosen.

    A job that names a model means its network; one that names neither, the network of the model that made the world
    where that is on this machine and makes Gaussians, and lyra-tiny's elsewhere.
    """
    model = job.model or model_of(world)
    if job.reconstructor is not None:
        return replace(job, model=model)
    network = job.model is not None or (model is not None and usable(model))
    return replace(job, model=model, reconstructor="depth-anything" if network else WITHOUT_DEPTH_ANYTHING)


def reconstructor_for(
    world: World, job: ReconstructJob, load: LoadOptions, progress: Progress | None = None
) -> Reconstructor:
    """The reconstructor that a job asks for, ready to run; see `resolve` for what it leaves open.

    Raises:
        UserError: as `load_reconstructor` and `find_depth`.
        Cancelled: the user stopped a download.
    """
    chosen = resolve(world, job)
    assert chosen.reconstructor is not None
    source = None
    if chosen.reconstructor == "depth-anything" and chosen.model is not None:
        source = find_depth(chosen.model, progress=progress)
    return load_reconstructor(
        chosen.reconstructor,
        source,
        lifting_placement(load),
        progress,
        interval=chosen.interval,
        settings=LiftSettings(chunks=chosen.chunks),
    )


def model_of(world: World) -> str | None:
    """The model that made a world, as the user named it."""
    run = world.run
    name = run.get("job", {}).get("model") or run.get("model", {}).get("name")
    return str(name) if name else None


def usable(model: str) -> bool:
    """Whether a world's model is on this machine and makes Gaussians; the log says why it is not used."""
    try:
        return has_gaussian_head(find_depth(model, download=False))
    except UserError as error:
        logger.warning("The Gaussians are made without the world's own model: %s", error)
        return False


def lifting_placement(load: LoadOptions) -> Placement:
    """Where the network runs when it lifts: alone on the device, in bfloat16 where that calculates in it.

    Raises:
        UserError: the device is not there.
    """
    device = choose_device(load.device).device
    narrow = device.type == "cuda" and load.weights != "fp32"
    if narrow and load.weights is None:
        narrow = this_machine(device).compute_capability >= CAPABILITY
    return Placement("bf16" if narrow else "fp32", device=str(device))
