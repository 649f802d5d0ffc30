"""Lifts a walkthrough to Gaussians: one for each 2x2 pixels of selected frames, from their depth and cameras.

A geometric lift without a network: a pixel block becomes a disc on the surface that its depth describes, as large as
its footprint. What an earlier frame already shows is left out, so overlapping frames leave no duplicates. The order of
frames is that of trust: the photo first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from lyra.errors import UserError
from lyra.generation.walkthrough import from_uint8
from lyra.geometry.cameras import unproject
from lyra.geometry.resample import Surface, draw_surface, enlarge_depth, make_surface
from lyra.geometry.rotations import matrix_to_quaternion
from lyra.reconstruction.base import Check, Reconstruction, Walkthrough
from lyra.types import Cameras, GaussianScene

BLOCK = 2
"""Pixels a side that one Gaussian stands for (released code: Gaussians at half size)."""
SAME_SURFACE = 0.12
"""A pixel within this share of an earlier frame's depth shows the same surface."""
OPACITY = 0.95
FOOTPRINT_SIGMA = 0.65
"""Standard deviation of a Gaussian in units of the distance between neighbouring ones; four of opacity 0.95 then cover
their common corner by 95 %."""
THINNESS = 0.15
"""Thickness along the normal, as a share of the smaller tangential deviation."""
SKY_DISTANCE = 6.0
"""Sky is placed at this many times the 90 % quantile of the other depths."""
FARTHEST = 200.0
"""Depth from which it is sky, in scene units."""
SH_C0 = 0.28209479177387814
"""Spherical harmonic of degree 0."""
LIFT_INTERVAL = 8
"""Every n-th frame whose depth was measured is lifted, besides the photo and the last one."""


@dataclass(frozen=True)
class LiftedFrame:
    """A frame to lift."""

    image: Float[Tensor, "3 h w"]
    """In [-1, 1]."""
    depth: Float[Tensor, "h w"]
    """z depth at the image's size."""
    w2c: Float[Tensor, "4 4"]
    intrinsics: Float[Tensor, "3 3"]


@dataclass(frozen=True)
class FusedFrame:
    """A frame among others, and what it alone has to add."""

    image: Float[Tensor, "3 h w"]
    """In [-1, 1]."""
    depth: Float[Tensor, "h w"]
    """z depth at the image's size, the sky at the scene's sky distance."""
    w2c: Float[Tensor, "4 4"]
    intrinsics: Float[Tensor, "3 3"]
    fresh: Bool[Tensor, "h w"]
    """Pixels that no frame of more trust shows."""
    surface: Surface


@dataclass(frozen=True)
class PixelBlocks:
    """The disc of each block of `BLOCK` x `BLOCK` pixels, before any is left out."""

    depth: Float[Tensor, "h w"]
    intrinsics: Float[Tensor, "3 3"]
    """Of the grid of blocks."""
    points: Float[Tensor, "h w 3"]
    rotation: Float[Tensor, "h w 3 3"]
    """Axes in columns: along the image's rows, across them on the surface, normal."""
    scales: Float[Tensor, "h w 3"]
    """Standard deviations along the axes."""
    colours: Float[Tensor, "h w 3"]
    """In [-1, 1]."""
    keep: Bool[Tensor, "h w"]
    """Blocks of which at least half is fresh."""


@dataclass(frozen=True)
class GeometricLift:
    """The lift without a network behind the protocol `Reconstructor`; it needs cameras and measured depth."""

    interval: int = LIFT_INTERVAL

    def __post_init__(self) -> None:
        if self.interval < 1:
            raise UserError(f"Every {self.interval}-th frame cannot be lifted; choose an interval of 1 or more.")

    def reconstruct(self, walkthrough: Walkthrough, check: Check) -> Reconstruction:
        """Lift the photo, every n-th measured frame and the last one; `check(done, all)` is called after each frame.

        Raises:
            UserError: the walkthrough has no cameras, or no depth of its photo.
        """
        chosen = chosen_frames(walkthrough, self.interval)
        scene = lift(frames_to_lift(walkthrough, chosen), check)
        assert walkthrough.cameras is not None
        return Reconstruction(scene, walkthrough.cameras.to(torch.device("cpu"))[chosen], tuple(chosen))


def chosen_frames(walkthrough: Walkthrough, interval: int) -> list[int]:
    """Frames that are lifted from their measured depth, in time's order.

    Raises:
        UserError: the walkthrough has no cameras, or no depth of its photo.
    """
    if walkthrough.cameras is None:
        raise UserError(
            "Splats from measured depth need the cameras of the video; estimate them, or lift with Depth Anything 3."
        )
    if 0 not in walkthrough.depths:
        raise UserError("The depth of this video's first frame is missing; generate the walkthrough again.")
    last = len(walkthrough.frames) - 1
    return sorted(i for i in walkthrough.depths if i % interval == 0 or i == last)


def frames_to_lift(walkthrough: Walkthrough, chosen: Sequence[int]) -> list[LiftedFrame]:
    """Some frames of a walkthrough, most trusted first."""
    assert walkthrough.cameras is not None
    images = {i: from_uint8(walkthrough.frames[i].cpu()) for i in chosen}
    depths = {i: walkthrough.depths[i].cpu() for i in chosen}
    return lifted_frames(images, depths, walkthrough.cameras.to(torch.device("cpu")))


def lift(frames: Sequence[LiftedFrame], check: Callable[[int, int], None]) -> GaussianScene:
    """One scene from frames, most trusted first; `check(done, all)` is called after each frame.

    Raises:
        ValueError: there are no frames.
    """
    if not frames:
        raise ValueError("there are no frames to lift")
    parts = []
    for index, frame in enumerate(fused_frames(frames)):
        parts.append(lift_frame(frame))
        check(index + 1, len(frames))
    return join_scenes(parts)


def fused_frames(frames: Sequence[LiftedFrame]) -> Iterator[FusedFrame]:
    """Frames with what each shows that no earlier one does; the sky is put at a distance of the scene's size."""
    sky_depth = sky_distance([frame.depth for frame in frames])
    surfaces: list[Surface] = []
    for frame in frames:
        # NaN and what is not in front of the camera say nothing; infinity is as far as the sky.
        known = frame.depth > 0
        depth = torch.where(known, frame.depth, sky_depth).clamp(max=sky_depth)
        fresh = new_pixels(surfaces, depth, frame) & known
        # Unknown pixels tear the surface, or they would hide what later frames know there.
        surface = make_surface(torch.where(known, depth, -1.0), frame.w2c, frame.intrinsics)
        surfaces.append(surface)
        yield FusedFrame(frame.image, depth, frame.w2c, frame.intrinsics, fresh, surface)


def sky_distance(depths: Sequence[Float[Tensor, "h w"]]) -> float:
    """Where the sky of a scene is put, from the depth of all its frames."""
    ground = torch.cat([depth[depth < FARTHEST].flatten()[::97] for depth in depths])
    return SKY_DISTANCE * float(ground.quantile(0.9)) if len(ground) else 50.0


def new_pixels(surfaces: Sequence[Surface], depth: Float[Tensor, "h w"], frame: LiftedFrame) -> Bool[Tensor, "h w"]:
    """Pixels that no earlier surface already shows at this depth or in front of it."""
    height, width = depth.shape
    covered = torch.zeros(height, width, dtype=torch.bool)
    for surface in surfaces:
        view = draw_surface(surface, frame.w2c, frame.intrinsics, height, width)
        covered |= view.depth < depth * (1 + SAME_SURFACE)
    return ~covered


def lift_frame(frame: FusedFrame) -> GaussianScene:
    """Discs of the pixel blocks of which at least half is fresh."""
    blocks = pixel_blocks(frame)
    keep = blocks.keep
    return GaussianScene(
        means=blocks.points[keep],
        quats=matrix_to_quaternion(blocks.rotation[keep]),
        scales=blocks.scales[keep],
        opacities=torch.full((int(keep.sum()),), OPACITY),
        sh=((blocks.colours[keep] * 0.5) / SH_C0)[:, None],
    )


def pixel_blocks(frame: FusedFrame) -> PixelBlocks:
    """The disc of every pixel block of a frame."""
    height, width = (size // BLOCK * BLOCK for size in frame.depth.shape)
    depth = 1 / F.avg_pool2d(1 / frame.depth[None, None, :height, :width].clamp(min=1e-6), BLOCK)[0, 0]
    intrinsics = block_intrinsics(frame.intrinsics)
    points = unproject(depth, frame.w2c, intrinsics)
    rotation, scales = footprints(points, depth, float(intrinsics[0, 0]))
    return PixelBlocks(
        depth=depth,
        intrinsics=intrinsics,
        points=points,
        rotation=rotation,
        scales=scales,
        colours=F.avg_pool2d(frame.image[None, :, :height, :width], BLOCK)[0].movedim(0, -1),
        keep=F.avg_pool2d(frame.fresh[None, None, :height, :width].float(), BLOCK)[0, 0] >= 0.5,
    )


def block_intrinsics(intrinsics: Float[Tensor, "3 3"]) -> Float[Tensor, "3 3"]:
    """Pinhole matrix of the grid of pixel blocks, their centres at integers."""
    grid = intrinsics * torch.tensor([1 / BLOCK, 1 / BLOCK, 1.0])[:, None]
    # The centre of a block of pixels 0 and 1 is at 0.5, which is 0 on the block's grid.
    grid[:2, 2] -= (BLOCK - 1) / (2 * BLOCK)
    return grid


def footprints(
    points: Float[Tensor, "h w 3"], depth: Float[Tensor, "h w"], focal: float
) -> tuple[Float[Tensor, "h w 3 3"], Float[Tensor, "h w 3"]]:
    """Axes and deviations of the discs: along the image's rows, across them on the surface, and its normal.

    Neighbour distances are bounded by a few times that of a surface facing the camera, so that blocks at a depth edge
    do not stretch over it.
    """
    facing = (depth / focal)[..., None]
    right = bounded(one_sided_gradient(points, 1), facing)
    down = bounded(one_sided_gradient(points, 0), facing)
    axis_u = F.normalize(right, dim=-1)
    normal = F.normalize(torch.linalg.cross(right, down), dim=-1)
    axis_v = torch.linalg.cross(normal, axis_u)
    length_u = right.norm(dim=-1)
    length_v = (down * axis_v).sum(-1).abs()
    tangential = torch.stack([length_u, length_v], -1).clamp(min=facing * 0.5)
    tangential = tangential * FOOTPRINT_SIGMA
    thickness = tangential.amin(-1, keepdim=True) * THINNESS
    return torch.stack([axis_u, axis_v, normal], dim=-1), torch.cat([tangential, thickness], dim=-1)


def one_sided_gradient(points: Float[Tensor, "h w 3"], axis: int) -> Float[Tensor, "h w 3"]:
    """The shorter of the differences to both neighbours along an axis, which does not cross a depth edge."""
    forward = points.diff(dim=axis)
    ahead = torch.cat([forward, forward.narrow(axis, forward.shape[axis] - 1, 1)], dim=axis)
    behind = torch.cat([forward.narrow(axis, 0, 1), forward], dim=axis)
    return torch.where(ahead.norm(dim=-1, keepdim=True) <= behind.norm(dim=-1, keepdim=True), ahead, behind)


def bounded(gradient: Float[Tensor, "h w 3"], facing: Float[Tensor, "h w 1"]) -> Float[Tensor, "h w 3"]:
    """Limit a neighbour distance to four times that of a surface facing the camera."""
    length = gradient.norm(dim=-1, keepdim=True).clamp(min=1e-9)
    return gradient * (4 * facing / length).clamp(max=1.0)


def join_scenes(parts: Sequence[GaussianScene]) -> GaussianScene:
    """All Gaussians of several scenes."""
    return GaussianScene(
        means=torch.cat([p.means for p in parts]),
        quats=torch.cat([p.quats for p in parts]),
        scales=torch.cat([p.scales for p in parts]),
        opacities=torch.cat([p.opacities for p in parts]),
        sh=torch.cat([p.sh for p in parts]),
    )


def lifted_frames(
    images: dict[int, Float[Tensor, "3 h w"]], depths: dict[int, Float[Tensor, "h2 w2"]], cameras: Cameras
) -> list[LiftedFrame]:
    """Frames with both an image and depth, the photo first and then from the last back to the first.

    The last frames are nearest to what they show, and what was generated is sharpest where it is nearest.
    """
    ids = [0, *sorted((i for i in images if i in depths and i > 0), reverse=True)]
    frames = []
    for i in ids:
        height, width = images[i].shape[-2:]
        depth = enlarge_depth(depths[i], (height, width))
        frames.append(LiftedFrame(images[i], depth, cameras.w2c[i], cameras.intrinsics[i]))
    return frames
