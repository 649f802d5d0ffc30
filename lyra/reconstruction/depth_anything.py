"""Lifts a walkthrough with Depth Anything 3: chunks of frames through its Gaussian head, then into one scene.

The public weights with a Gaussian head are CC BY-NC 4.0 (nested-giant-large, giant), the fine-tuned ones of Lyra 2.0
are under NVIDIA's research licence. Each chunk is lifted in the frame of its own first camera, where the released
quaternions are nearly right (see `gaussian_adapter`), and then moved with correct maths. Knows no file.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor
from torch.nn import functional as F

from lyra.depth.depth_anything import is_still
from lyra.depth.walk import FARTHEST
from lyra.errors import UserError
from lyra.models.depth_anything.camera import normalised_cameras
from lyra.models.depth_anything.gaussian_adapter import (
    SMALLEST_UNIT,
    GaussianCameras,
    gaussian_cameras,
    to_gaussians,
)
from lyra.models.depth_anything.model import (
    AnyDepthAnything,
    AnyViewDepthAnything,
    AnyViewOutput,
    MonocularDepthAnything,
    NestedDepthAnything,
    place,
)
from lyra.models.depth_anything.preprocess import prepare_pixels
from lyra.reconstruction.base import Check, Reconstruction, Walkthrough
from lyra.reconstruction.chunks import (
    CHUNK_OVERLAP,
    CHUNK_SIZE,
    ChunkAlignment,
    LiftedChunk,
    align_chunks,
    plan_chunks,
    take,
)
from lyra.reconstruction.gaussians import join_scenes
from lyra.reconstruction.ownership import prune_foreign, seen_depth
from lyra.reconstruction.sim3 import AlignmentRule, Sim3
from lyra.types import Cameras, GaussianScene

VIEWS_AT_ONCE = 8
"""Views whose raw channels become Gaussians together, which bounds the memory that harmonics take."""
BORDER_SHARE = 8 / 256
"""Share of the rows and of the columns of Gaussians that are cut off on each side (released code)."""
SMALLEST_OPACITY = 1e-6
"""Opacities stay so far from 0 and 1, where their logits are infinite (released code)."""
HALF_PIXEL = 0.5
"""Cameras count pixel centres from 0, the network and its Gaussians from 0.5."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LiftSettings:
    """How a walkthrough is lifted; the values are the released ones where nothing else is said."""

    chunks: int | None = None
    """How many chunks; by default as many as the length of the video needs (released: 3)."""
    chunk_size: int = CHUNK_SIZE
    chunk_overlap: int = CHUNK_OVERLAP
    split_frames: tuple[int, ...] = ()
    """See `plan_chunks`."""
    resolution: int | None = None
    """Pixels of the longest or shortest side at which the network works; None keeps that of the frames."""
    resolution_bound: Literal["upper", "lower"] = "upper"
    gaussian_reduction: int = 2
    """One Gaussian for so many pixels in each direction."""
    use_aligned_pred_cam: bool = True
    """Unproject with the predicted cameras, aligned to the given ones; otherwise with the given ones."""
    rule: AlignmentRule = "orientations"
    """How predicted cameras are aligned to given ones; the released code aligns centres."""
    own_frame: bool = True
    """Lift each chunk in the frame of its first camera; the released code lifts it in the world of the cameras."""
    scale_multiplier: float = 1.0
    """Multiplies the largest scale of a Gaussian."""
    alignment: ChunkAlignment = field(default_factory=ChunkAlignment)
    max_diff: float | None = None
    """See `prune_foreign`; the released value is 1 scene unit."""
    trim_border: bool = True
    opacity_percentile: float | None = None
    """Share of each chunk's Gaussians, the most transparent ones, that is left out."""
    harmonics: bool = False
    """Keep spherical harmonics up to degree 2 (released: degree 0 only)."""

    def __post_init__(self) -> None:
        if self.gaussian_reduction < 1:
            raise UserError(f"One Gaussian for {self.gaussian_reduction} pixels is not possible; ask for 1 or more.")
        if self.opacity_percentile is not None and not 0 <= self.opacity_percentile < 1:
            raise UserError(
                f"The share {self.opacity_percentile} of Gaussians cannot be left out; give a number from 0 up to, but "
                "not including, 1."
            )


@dataclass(frozen=True)
class ToldViews:
    """Views at the processed size with what the network is told of them."""

    pictures: Float[Tensor, "s 3 h w"]
    w2c: Float[Tensor, "s 4 4"]
    """float64 on the CPU."""
    intrinsics: Float[Tensor, "s 3 3"]
    """In pixels of the pictures, pixel centres at +0.5."""
    depths: Mapping[int, Float[Tensor, "h2 w2"]]
    """Known z depth by view, in the unit of the cameras."""


@dataclass(frozen=True)
class DepthAnythingReconstructor:
    """A Depth Anything 3 network with a Gaussian head behind the protocol `Reconstructor`.

    Making one puts the model on the device: matrix products of the backbone in `dtype`, everything else in float32.
    With given cameras only `network` runs; without, the whole model runs first, because a nested one knows metres.
    The scene is on the CPU, where long videos have room.

    Raises:
        UserError: the network has no Gaussian head.
    """

    model: AnyDepthAnything
    device: torch.device
    dtype: torch.dtype = torch.float32
    settings: LiftSettings = field(default_factory=LiftSettings)

    def __post_init__(self) -> None:
        if isinstance(self.model, MonocularDepthAnything) or not self.network.config.gaussian_head:
            raise UserError(
                "This Depth Anything 3 network has no Gaussian head; choose nested-giant-large, giant or the "
                "reconstruction weights of Lyra 2.0, or lift from depth without a network."
            )
        place(self.model, self.device, self.dtype)

    @property
    def network(self) -> AnyViewDepthAnything:
        """The part that makes Gaussians."""
        if isinstance(self.model, NestedDepthAnything):
            return self.model.da3
        if isinstance(self.model, MonocularDepthAnything):
            raise ValueError("a monocular network makes no Gaussians")
        return self.model

    @torch.no_grad()
    def reconstruct(self, walkthrough: Walkthrough, check: Check) -> Reconstruction:
        """Lift a walkthrough; `check(done, all)` is called after each chunk and when the scene is whole.

        Without cameras the scene is in the frame of the first view, in metres of a nested network, else in the
        network's own unit. Known depth is only used where the cameras do not move, for the unit.

        Raises:
            UserError: the video has too few frames for the chunks, or no Gaussian can be shown.
        """
        settings = self.settings
        plan = plan_chunks(
            len(walkthrough.frames),
            chunks=settings.chunks,
            size=settings.chunk_size,
            overlap=settings.chunk_overlap,
            split_frames=settings.split_frames,
        )
        steps = len(plan.chunks) + 1

        def lifted() -> Iterator[LiftedChunk]:
            for index, frame_ids in enumerate(plan.chunks):
                check(index, steps)
                yield self.lift_chunk(walkthrough, frame_ids)

        parts: list[GaussianScene] = []
        cameras: list[Cameras] = []
        depths: list[Tensor] = []
        frame_ids: list[int] = []
        for aligned in align_chunks(lifted(), plan.overlap, settings.alignment):
            parts.append(exported(aligned.chunk, settings))
            cameras.append(aligned.chunk.cameras)
            depths.append(seen_depth(aligned.chunk))
            frame_ids += aligned.chunk.frame_ids
        check(len(plan.chunks), steps)
        owned = prune_foreign(parts, cameras, depths=depths, max_diff=settings.max_diff, device=self.device)
        scene = join_scenes(owned)
        if not len(scene):
            raise UserError("No Gaussian of this video can be shown; check that its cameras belong to its frames.")
        check(steps, steps)
        seen = from_network(Cameras.concatenate(cameras), *walkthrough.frames.shape[-2:])
        return Reconstruction(scene, seen, tuple(frame_ids))

    def lift_chunk(self, walkthrough: Walkthrough, frame_ids: tuple[int, ...]) -> LiftedChunk:
        """Gaussians of some frames in the world of their given cameras, or of the first frame where there are none."""
        pictures = self.prepare(walkthrough.frames[list(frame_ids)])
        if walkthrough.cameras is None:
            told = self.estimated_views(pictures)
        else:
            given = to_network(walkthrough.cameras[list(frame_ids)], *pictures.shape[-2:])
            depths = {view: walkthrough.depths[i] for view, i in enumerate(frame_ids) if i in walkthrough.depths}
            told = ToldViews(pictures, given.w2c.double().cpu(), given.intrinsics, depths)
        if not self.settings.own_frame:
            return self.lift_views(told, frame_ids)
        first = Sim3.from_pose(told.w2c[0])
        own = ToldViews(pictures, first.apply_to_w2c(told.w2c), told.intrinsics, told.depths)
        return self.lift_views(own, frame_ids).moved(first.inverse())

    def prepare(self, frames: UInt8[Tensor, "s 3 h w"]) -> Float[Tensor, "s 3 h2 w2"]:
        """Frames as the network sees them, a few at a time because the rounding to 8 bits needs room."""
        settings = self.settings
        pieces = frames.split(VIEWS_AT_ONCE)
        return torch.cat(
            [prepare_pixels(piece.to(self.device), settings.resolution, settings.resolution_bound) for piece in pieces]
        )

    def estimated_views(self, pictures: Float[Tensor, "s 3 h w"]) -> ToldViews:
        """Views with the cameras and depth that the network estimates from the pictures alone."""
        output = self.model(pictures[None])
        w2c = output.w2c[0].double().cpu()
        known = dict(enumerate(output.depth[0]))
        # A general inverse, because predicted rotations are only as orthonormal as float32 is.
        return ToldViews(pictures, w2c @ torch.linalg.inv(w2c[:1]), output.intrinsics[0], known)

    def lift_views(self, told: ToldViews, frame_ids: tuple[int, ...]) -> LiftedChunk:
        """Gaussians of views in the world of their cameras, however that is turned."""
        settings, device = self.settings, self.device
        height, width = told.pictures.shape[-2:]
        intrinsics = told.intrinsics.to(device).float()
        w2c = normalised_cameras(told.w2c[None]).to(device).float()
        output = self.network(
            told.pictures[None], w2c, intrinsics[None], gaussian_reduction=settings.gaussian_reduction
        )
        assert output.raw_gaussians is not None
        cameras = self.unprojection_cameras(told, output)
        raw, depth = output.raw_gaussians[0], output.depth[0]
        parts = []
        for first in range(0, len(raw), VIEWS_AT_ONCE):
            views = slice(first, first + VIEWS_AT_ONCE)
            part = to_gaussians(
                raw[views],
                depth[views],
                GaussianCameras(cameras.w2c[views], cameras.unit),
                intrinsics[views],
                scale_multiplier=settings.scale_multiplier,
            )
            parts.append(on_cpu(part, part.sh.shape[1] if settings.harmonics else 1))
        seen = Cameras(cameras.w2c.float().cpu(), intrinsics.cpu(), height, width)
        return LiftedChunk(frame_ids, seen, join_scenes(parts), (raw.shape[1], raw.shape[2]))

    def unprojection_cameras(self, told: ToldViews, output: AnyViewOutput) -> GaussianCameras:
        """The cameras that Gaussians are unprojected with, and the network's unit in their world.

        Cameras that do not move, or not as the predicted ones do, say nothing of the unit: known depth does, and
        without it the network's own unit stays. The released code divides by noise there.
        """
        settings = self.settings
        if not is_still(told.w2c):
            cameras = gaussian_cameras(
                told.w2c,
                output.w2c[0].double().cpu(),
                use_predicted=settings.use_aligned_pred_cam,
                orientations=settings.rule == "orientations",
            )
            if cameras.unit > SMALLEST_UNIT:
                return cameras
        return GaussianCameras(told.w2c, unit_of_depth(output.depth[0], told.depths))


def unit_of_depth(predicted: Float[Tensor, "s h w"], known: Mapping[int, Float[Tensor, "h2 w2"]]) -> float:
    """Median ratio of predicted to known depth; 1 where no depth is known."""
    ratios = []
    for view, depth in known.items():
        depth = depth.to(predicted).float()
        resized = F.interpolate(predicted[view][None, None], size=depth.shape, mode="bilinear")[0, 0]
        usable = depth.isfinite() & (depth > 0) & (depth < FARTHEST) & resized.isfinite()
        ratios.append((resized / depth)[usable])
    together = torch.cat(ratios) if ratios else predicted.new_zeros(0)
    if not len(together):
        logger.warning(
            "The cameras do not tell the unit and no depth is known, so the scene keeps the network's own unit."
        )
        return 1.0
    return max(float(together.median()), SMALLEST_UNIT)


def to_network(cameras: Cameras, height: int, width: int) -> Cameras:
    """Cameras for pictures of the processed size, pixel centres at +0.5, where stretching is a mere factor."""
    return shifted(cameras, HALF_PIXEL).resized(height, width)


def from_network(cameras: Cameras, height: int, width: int) -> Cameras:
    """The way back: cameras for frames of their own size, pixel centres at integers."""
    return shifted(cameras.resized(height, width), -HALF_PIXEL)


def shifted(cameras: Cameras, offset: float) -> Cameras:
    """Cameras whose principal points are moved by so many pixels along both axes."""
    intrinsics = cameras.intrinsics.clone()
    intrinsics[:, :2, 2] += offset
    return Cameras(cameras.w2c, intrinsics, cameras.image_height, cameras.image_width)


def on_cpu(scene: GaussianScene, coefficients: int) -> GaussianScene:
    """A copy on the CPU with the first of its spherical harmonics."""
    return GaussianScene(
        scene.means.cpu(),
        scene.quats.cpu(),
        scene.scales.cpu(),
        scene.opacities.cpu(),
        scene.sh[:, :coefficients].contiguous().cpu(),
    )


def exported(chunk: LiftedChunk, settings: LiftSettings) -> GaussianScene:
    """What of a chunk goes into the scene: no borders, nothing behind a camera or without a number, opacities clamped.

    Trimming and the opacity percentile work together; in the released code the percentile switches trimming off.
    """
    keep = chunk.usable
    if settings.trim_border:
        keep = keep & inside_border(*chunk.grid, device=keep.device).flatten().repeat(len(chunk.cameras))
    share = settings.opacity_percentile
    if share and bool(keep.any()):
        opacities = chunk.scene.opacities
        candidates = opacities[keep]
        rank = min(len(candidates), int(share * len(candidates)) + 1)
        keep = keep & (opacities >= candidates.kthvalue(rank).values)
    scene = take(chunk.scene, keep)
    opacities = scene.opacities.clamp(SMALLEST_OPACITY, 1 - SMALLEST_OPACITY)
    return GaussianScene(scene.means, scene.quats, scene.scales, opacities, scene.sh)


def inside_border(rows: int, columns: int, device: torch.device | None = None) -> Bool[Tensor, "rows columns"]:
    """Which Gaussians of a view are not in its border; a grid too small for a border has none (released: is lost)."""
    above, beside = int(BORDER_SHARE * rows), int(BORDER_SHARE * columns)
    inside = torch.zeros(rows, columns, dtype=torch.bool, device=device)
    inside[above : rows - above, beside : columns - beside] = True
    return inside
