"""Which walkthroughs are made of several paths from the same photo, and in which order are their frames shown?

A recipe has legs. Each leg is generated on its own from the photo, in whole chunks; its frames can be shown backwards,
so that a walk away from the photo becomes a walk towards it. The one released recipe, zoom-in-zoom-out, shows a zoom
out of the photo backwards and then a zoom into it: one long move ahead, with the photo on the way.

Corrected defect of the released code: its joined video has the photo twice where the legs meet (322 frames); here the
photo is shown once (321 frames, which is 1 + 4 * 80).

Pure camera geometry: knows no model, and not how the frames of a leg are made.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from lyra.config import CHUNK_FRAMES
from lyra.errors import UserError
from lyra.geometry.cameras import unproject
from lyra.geometry.rotations import world_to_camera
from lyra.trajectory.presets import MAX_STRENGTH, centre_depth
from lyra.trajectory.released_presets import released_cameras
from lyra.types import Cameras, DepthMap

_OUT_STRENGTH, _OUT_CHUNKS = 1.5, 3
_IN_STRENGTH, _IN_CHUNKS = 0.5, 1
_RISE = 0.15
"""The zoom out rises by this share of the way back (released code)."""
_GROUND_RISE = 0.05
"""With a ground plane the zoom out ends this much higher, in scene units (released code)."""
_GROUND_ROWS = 0.4
"""Share of the photo, from its bottom edge, in which the ground is looked for (released code)."""
_GROUND_TRIES = 200
_GROUND_TOLERANCE = 0.05
"""Distance from the plane of a point on it, as a share of its depth (released code)."""
_GROUND_NEAREST, _GROUND_FARTHEST = 0.01, 500.0
_GROUND_POINTS = 50


@dataclass(frozen=True)
class Leg:
    """One path from the photo, generated on its own."""

    name: str
    """Shown to users and used in file names."""
    cameras: Cameras
    """Frame 0 is the photo's camera (identity); 1 + 80 k frames."""
    reversed: bool
    """True if its frames are shown from the last one back to the photo."""

    def __post_init__(self) -> None:
        if len(self.cameras) <= 1 or len(self.cameras) % CHUNK_FRAMES != 1:
            raise ValueError(f"a leg has 1 + {CHUNK_FRAMES} k frames, not {len(self.cameras)}")

    @property
    def chunks(self) -> int:
        """Number of chunks to generate."""
        return (len(self.cameras) - 1) // CHUNK_FRAMES


@dataclass(frozen=True)
class Recipe:
    """Legs in the order in which they are shown."""

    legs: tuple[Leg, ...]

    @property
    def chunks(self) -> int:
        """Number of chunks to generate over all legs."""
        return sum(leg.chunks for leg in self.legs)


class ShownFrame(NamedTuple):
    """Where a frame of the finished video comes from."""

    leg: int
    frame: int


@dataclass(frozen=True)
class RecipePreset:
    """A recipe that a user can choose."""

    description: str
    """One sentence for the user."""
    make: Callable[..., Recipe]
    """Called like `zoom_in_zoom_out`."""


def shown_order(recipe: Recipe) -> list[ShownFrame]:
    """The frames of the finished video; where two legs meet in the photo, it is shown once."""
    shown: list[ShownFrame] = []
    for number, leg in enumerate(recipe.legs):
        frames = [ShownFrame(number, frame) for frame in range(len(leg.cameras))]
        if leg.reversed:
            frames.reverse()
        if shown and shown[-1].frame == 0 and frames[0].frame == 0:
            frames = frames[1:]
        shown += frames
    return shown


def joined_cameras(recipe: Recipe) -> Cameras:
    """The cameras of the finished video, in the world of the photo's camera; the first is not the photo's."""
    order = shown_order(recipe)
    parts = [leg.cameras[[s.frame for s in order if s.leg == number]] for number, leg in enumerate(recipe.legs)]
    return Cameras.concatenate(parts)


def zoom_in_zoom_out(
    *,
    depth: DepthMap | float,
    intrinsics: Float[Tensor, "3 3"],
    image_height: int,
    image_width: int,
    strength: float = 1.0,
    ground: Float[Tensor, "3"] | None = None,
) -> Recipe:
    """The released recipe: 3 chunks of zooming out, shown backwards, and 1 chunk of zooming in.

    The zoom out goes back by 1.5 d and rises by 0.15 of that, the zoom in goes ahead by 0.5 d; the view never turns.

    Args:
        depth: the photo's depth map, or its centre depth d in scene units.
        intrinsics: K of the photo in pixels of the image size given.
        image_height: pixels.
        image_width: pixels.
        strength: scales the way of both legs; 1 is the released one. Over 0 and at most `MAX_STRENGTH`.
        ground: unit normal of the ground (`ground_normal`), which both legs then follow, the zoom out while rising
            by up to 0.05 scene units more (off in the released script).

    Raises:
        UserError: a strength out of range, or a depth map that shows no scene.
        ValueError: a centre depth that is not a positive number.
    """
    if not (math.isfinite(strength) and 0 < strength <= MAX_STRENGTH):
        raise UserError(
            f"A strength of {strength:g} is out of range; choose one over 0 and at most {MAX_STRENGTH:g}, "
            "where 1 is the released zoom."
        )
    distance = centre_depth(depth) if isinstance(depth, DepthMap) else float(depth)
    if not (math.isfinite(distance) and distance > 0):
        raise ValueError(f"the centre depth must be a positive number, not {distance}")

    def zoom(direction: str, share: float, chunks: int) -> Cameras:
        return released_cameras(
            "horizontal_zoom",
            frames=1 + CHUNK_FRAMES * chunks,
            centre_depth=distance,
            intrinsics=intrinsics,
            image_height=image_height,
            image_width=image_width,
            direction=direction,
            strength=share * strength,
        )

    out = rising_backwards(zoom("left", _OUT_STRENGTH, _OUT_CHUNKS), _RISE)
    ahead = zoom("right", _IN_STRENGTH, _IN_CHUNKS)
    if ground is not None:
        out = _moved(parallel_to_ground(out, ground), -_GROUND_RISE * ground)
        ahead = parallel_to_ground(ahead, ground)
    return Recipe((Leg("zoom-out", out, reversed=True), Leg("zoom-in", ahead, reversed=False)))


def rising_backwards(cameras: Cameras, ratio: float) -> Cameras:
    """The same path, raised by `ratio` of how far behind its first camera each camera is; views unchanged.

    Released code: C_y is lowered, which is up, by ratio * max(0, -(C_z - C_z of the first camera)).
    """
    rotation, translation = cameras.w2c[:, :3, :3].double(), cameras.w2c[:, :3, 3].double()
    centres = -(rotation.transpose(-1, -2) @ translation[..., None])[..., 0]
    behind = (centres[0, 2] - centres[:, 2]).clamp(min=0.0)
    raised = torch.stack([centres[:, 0], centres[:, 1] - ratio * behind, centres[:, 2]], dim=-1)
    return _with_poses(cameras, world_to_camera(rotation, raised))


def parallel_to_ground(cameras: Cameras, ground: Float[Tensor, "3"]) -> Cameras:
    """The same path along a ground plane: each w2c translation, counted from the first, is turned into the plane.

    Lengths and views are kept (released code). For a view that never turns, this turns the camera centres alike.

    Args:
        cameras: a path.
        ground: unit normal of the ground in the first camera's axes.
    """
    normal = ground.double().to(cameras.w2c.device)
    w2c = cameras.w2c.double().clone()
    way = w2c[:, :3, 3] - w2c[0, :3, 3]
    along = way - (way @ normal)[:, None] * normal
    along = along * way.norm(dim=-1, keepdim=True) / along.norm(dim=-1, keepdim=True).clamp_min(1e-8)
    w2c[:, :3, 3] = w2c[0, :3, 3] + along
    return _with_poses(cameras, w2c)


def ground_normal(depth: DepthMap, *, generator: torch.Generator | None = None) -> Float[Tensor, "3"] | None:
    """Unit normal, pointing up, of the plane that most points in the lower part of a photo lie near (RANSAC).

    Released code: planes through three random points, 200 times; a point is near within 0.05 of its depth.

    Args:
        depth: the photo's depth map.
        generator: where the points are drawn from; by default one seeded with 0.

    Returns:
        The normal in the photo's camera axes, or None where too few points are known.
    """
    height = depth.depth.shape[0]
    rows = slice(int(height * (1.0 - _GROUND_ROWS)), height)
    z = depth.depth[rows]
    known = depth.valid[rows] & ~depth.sky[rows] & (z > _GROUND_NEAREST) & (z < _GROUND_FARTHEST)
    if int(known.sum()) < _GROUND_POINTS:
        return None
    eye = torch.eye(4, device=depth.depth.device)
    points = unproject(depth.depth.float(), eye, depth.intrinsics.float())[rows][known]
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    chosen = points[torch.randint(len(points), (_GROUND_TRIES, 3), generator=generator).to(points.device)]
    normals = torch.linalg.cross(chosen[:, 1] - chosen[:, 0], chosen[:, 2] - chosen[:, 0])
    lengths = normals.norm(dim=-1)
    tolerance = _GROUND_TOLERANCE * points[:, 2].clamp(min=0.1)
    best, most = None, 0
    for anchor, normal, length in zip(chosen[:, 0], normals, lengths, strict=True):
        if length < 1e-8:
            continue  # The three points lie on a line.
        unit = normal / length
        near = int((((points - anchor) @ unit).abs() < tolerance).sum())
        if near > most:
            best, most = unit, near
    if best is None:
        return None
    return -best if best[1] > 0 else best


def scaled_path(cameras: Cameras, pose_scale: float) -> Cameras:
    """The same path with all w2c translations multiplied, so that the camera goes `pose_scale` times as far.

    The released script for trajectory files multiplies by 1.1.

    Raises:
        UserError: the scale is not a positive number.
    """
    if not (math.isfinite(pose_scale) and pose_scale > 0):
        raise UserError(f"A pose scale of {pose_scale:g} is not possible; choose a positive number such as 1.1.")
    w2c = cameras.w2c.clone()
    w2c[:, :3, 3] *= pose_scale
    return _with_poses(cameras, w2c)


def find_recipe(name: str) -> RecipePreset:
    """The recipe of a name.

    Raises:
        UserError: there is none of that name.
    """
    if name not in RECIPES:
        raise UserError(f'There is no recipe "{name}"; choose one of {", ".join(RECIPES)}.')
    return RECIPES[name]


def _moved(cameras: Cameras, shift: Float[Tensor, "3"]) -> Cameras:
    """w2c translations plus a growing part of `shift`: nothing in the first frame, all of it in the last."""
    w2c = cameras.w2c.double().clone()
    w2c[:, :3, 3] += torch.linspace(0, 1, len(cameras), dtype=w2c.dtype, device=w2c.device)[:, None] * shift.to(w2c)
    return _with_poses(cameras, w2c)


def _with_poses(cameras: Cameras, w2c: Float[Tensor, "n 4 4"]) -> Cameras:
    # Adding zero turns -0.0 into 0.0, so that equal paths have equal bytes.
    w2c = w2c.to(cameras.w2c.dtype) + 0.0
    return Cameras(w2c, cameras.intrinsics, cameras.image_height, cameras.image_width)


RECIPES: dict[str, RecipePreset] = {
    "zoom-in-zoom-out": RecipePreset(
        "Start far behind the photo, come down to it and go on into it: 3 chunks out, 1 chunk in.", zoom_in_zoom_out
    ),
}
"""All recipes by name."""
