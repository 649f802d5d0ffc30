"""What can a physics engine stand things on? A light mesh with a ground that has no hole where the cameras walked.

Cameras never see all of the floor, least of all what is under them, and whatever is dropped into a hole falls for ever.
So the ground becomes a sheet of its own (`ground`): where it was seen as it was seen, elsewhere continued. Knows no
physics engine and no file format.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from scipy.spatial import Delaunay
from torch import Tensor

from lyra.errors import UserError
from lyra.reconstruction.ground import GROUND_COSINE, Ground, LevelScene, find_ground, guess_levels, level_scene
from lyra.reconstruction.surface import SurfaceSettings, clean_surface
from lyra.reconstruction.tsdf import Contraction
from lyra.types import Cameras, TriangleMesh

SHEET_SHARE = 0.45
"""Share of the triangles that the sheet may have."""
MIN_VIEW = 0.05
"""Steradians that a surface must fill to say where up is: less is a window sill and no floor."""
APART = 0.25
"""Places to drop things are on seen ground as long as they are so many eye heights from each other."""


@dataclass(frozen=True)
class Collider:
    """A static triangle mesh for a physics engine, with what is known of its ground."""

    mesh: TriangleMesh
    """In world axes; the ground's sheet has no hole, everything else is as open as it was seen."""
    up: Float[Tensor, "3"]
    """Unit vector against gravity in world axes."""
    floor_height: float
    """Median height of the ground below the path, along `up`."""
    eye_height: float
    """Of the cameras above the ground, in scene units: the size of whoever walks."""
    ground: Ground


def make_collider(
    mesh: TriangleMesh,
    cameras: Cameras,
    *,
    up: Float[Tensor, "3"] | None = None,
    max_faces: int = 20_000,
    margin: float = 2.5,
) -> Collider:
    """A collider from the visible surface and the cameras that saw it.

    Args:
        mesh: the surface in world axes; without a triangle, a flat floor below the cameras is all there is.
        cameras: the path; its positions are the walked area.
        up: direction against gravity in world axes; estimated when there is none.
        max_faces: triangles in all, at least 1,000.
        margin: reach beyond the path within which the ground is fine and unbroken, seen or not, in eye heights.

    Raises:
        UserError: there are no cameras, they are not finite, or `up` has no length.
    """
    if len(cameras) == 0 or not torch.isfinite(cameras.w2c).all():
        raise UserError("A collider needs a camera path with finite poses; check the trajectory file.")
    if up is not None and not (torch.isfinite(up).all() and up.norm() > 1e-6):
        raise UserError("The up direction must be a vector of some length; leave it out to have it estimated.")
    direction = estimate_up(mesh, cameras) if up is None else up.detach().cpu().double() / up.cpu().double().norm()
    scene = level_scene(mesh, cameras, direction)
    levels = guess_levels(scene)
    eye = float(np.median(scene.path[:, 2] - levels))
    points = max(SHEET_SHARE * max_faces / 2, 64)
    ground = find_ground(scene, levels, eye, margin=margin, points=points)
    sheet = _sheet(ground)
    rest = _above(mesh, scene, ground, eye, max(max_faces - len(sheet.faces), 100), margin)
    joined = TriangleMesh(
        torch.cat([rest.vertices, sheet.vertices]),
        torch.cat([rest.faces.long(), sheet.faces + len(rest.vertices)]),
        torch.cat([rest.colours, sheet.colours]),
    )
    return Collider(joined, direction.float(), _floor_height(scene, ground, eye), eye, ground)


def _floor_height(scene: LevelScene, ground: Ground, eye: float) -> float:
    """Median height of the ground within half an eye height of the path."""
    side = np.arange(-4, 5) * (0.125 * eye)
    around = np.stack(np.meshgrid(side, side, indexing="ij"), -1).reshape(-1, 2)
    around = around[np.linalg.norm(around, axis=1) <= 0.5 * eye]
    level = (scene.path[:, None, :2] + around).reshape(-1, 2) @ scene.axes[:2]
    return float(ground.height_at(torch.from_numpy(level)).nanmedian())


def walkable(
    collider: Collider, count: int = 32, *, generator: torch.Generator | None = None, above: float | None = None
) -> Float[Tensor, "count 3"]:
    """Random world points above walkable ground, to drop things from; always the same ones without a generator.

    They are apart from each other, on ground that was seen as long as there is room on it, and `above` the ground in
    scene units, by default a quarter of the eye height.
    """
    ground = collider.ground
    generator = generator or torch.Generator().manual_seed(0)
    everywhere, seen = ground.walkable.nonzero(), (ground.walkable & ground.seen).nonzero()
    chosen = torch.empty(0, 2)
    for _ in range(count):
        best = torch.empty(0, 2)
        for cells in (seen, everywhere):
            # The best of some candidates (Mitchell 1991) keeps things apart that are dropped together.
            if len(cells):
                drawn = cells[torch.randint(len(cells), (32,), generator=generator)]
                drawn = drawn + 0.5 * (torch.rand(32, 2, generator=generator) - 0.5)
                apart = (
                    torch.cdist(drawn, chosen).amin(1) * ground.cell if len(chosen) else torch.full((32,), torch.inf)
                )
                best = drawn[apart.argmax()][None]
                if apart.max() >= APART * collider.eye_height:
                    break
        chosen = torch.cat([chosen, best])
    level = (ground.origin + chosen * ground.cell) @ ground.axes[:2]
    height = ground.height_at(level) + (0.25 * collider.eye_height if above is None else above)
    return level + height[:, None] * ground.axes[2]


def estimate_up(mesh: TriangleMesh, cameras: Cameras) -> Float[Tensor, "3"]:
    """Unit vector against gravity in world axes, by the walls, the ground or, without both, the images' vertical.

    A camera is rarely rolled, so the mean of the images' upward directions is a first guess; its pitch is not known.
    Surface in narrowing cones about it corrects it, each triangle counting as much as it fills of the view. Walls, if
    there are straight ones, compete with the ground, which may slope; without them the ground is taken as level.
    """
    guess = -cameras.w2c[:, 1, :3].detach().cpu().double().mean(0).numpy()
    # Cameras that look up as much as down have no mean.
    guess = guess / np.linalg.norm(guess) if np.linalg.norm(guess) > 1e-6 else np.array([0.0, -1.0, 0.0])
    scene = level_scene(mesh, cameras, torch.from_numpy(guess))
    normals, offsets = scene.normals @ scene.axes, (scene.middles - scene.path.mean(0)) @ scene.axes
    weights = scene.areas / np.maximum((offsets**2).sum(1), 1e-30)

    def ground(up: Float[np.ndarray, "3"], degrees: float) -> Float[np.ndarray, "f"]:
        return weights * ((normals @ up > math.cos(math.radians(degrees))) & (offsets @ up < 0))

    def walls(up: Float[np.ndarray, "3"], degrees: float) -> Float[np.ndarray, "f"]:
        return weights * (np.abs(normals @ up) < math.sin(math.radians(degrees)))

    by_ground = by_walls = guess
    for degrees in (40.0, 25.0, 12.0, 6.0):
        mean = ground(by_ground, degrees) @ normals
        by_ground = mean / max(float(np.linalg.norm(mean)), 1e-30)
        # Walls of one direction leave a turn about their normal open: there the last estimate stays.
        spread = (walls(by_walls, degrees)[:, None] * normals).T @ normals
        by_walls = np.linalg.solve(spread + (0.05 * np.trace(spread) + 1e-9) * np.eye(3), by_walls)
        by_walls /= np.linalg.norm(by_walls)
    if ground(by_ground, 40.0).sum() < MIN_VIEW:
        by_ground = guess
    standing = walls(by_walls, 2.0).sum()
    straight = standing > max(3 * MIN_VIEW, 0.5 * walls(by_walls, 10.0).sum()) and by_walls @ guess > 0.8
    agreement = [ground(up, 2.0).sum() + 2 * walls(up, 2.0).sum() for up in (by_walls, by_ground)]
    return torch.from_numpy(by_walls if straight and agreement[0] >= agreement[1] else by_ground)


def _sheet(ground: Ground) -> TriangleMesh:
    """The ground's points and its rim joined to one surface without a hole, facing up."""
    cells = ground.inside.nonzero()
    fine = torch.cat([ground.origin + cells * ground.cell, ground.heights[ground.inside][:, None]], 1)
    points = torch.cat([fine, ground.rim]).double().numpy()
    faces = Delaunay(points[:, :2] - points[:, :2].mean(0)).simplices.astype(np.int64)
    a, b, c = np.moveaxis(points[faces, :2], 1, 0)
    turned = (b - a)[:, 0] * (c - a)[:, 1] - (b - a)[:, 1] * (c - a)[:, 0] < 0
    faces[turned] = faces[turned][:, ::-1]
    vertices = torch.from_numpy(points @ ground.axes.double().numpy()).float()
    return TriangleMesh(vertices, torch.from_numpy(faces), torch.full(vertices.shape, 128, dtype=torch.uint8))


def _above(
    mesh: TriangleMesh, scene: LevelScene, ground: Ground, eye: float, max_faces: int, margin: float
) -> TriangleMesh:
    """The mesh without what the sheet stands for or covers, decimated most where it is far from the path."""
    vertices = mesh.vertices.detach().cpu().float()
    above = torch.from_numpy(scene.points[:, 2]) - ground.height_at(vertices)
    highest = above.numpy()[scene.faces].max(1)
    near = 0.03 * eye + 0.3 * ground.cell
    # Heights outside of the sheet are NaN, which fails every comparison.
    covered = (highest <= near) & ((scene.normals[:, 2] > GROUND_COSINE) | (highest <= -near))
    rest = TriangleMesh(vertices, mesh.faces.cpu()[torch.from_numpy(~covered)], mesh.colours.cpu())
    if len(rest.faces) == 0:
        return TriangleMesh(vertices[:0], rest.faces, rest.colours[:0])
    path = scene.path @ scene.axes
    reach = float(np.linalg.norm(path - path.mean(0), axis=1).max()) + 2 * margin * eye
    settings = SurfaceSettings(min_component_share=0.0, max_hole_edges=0, max_faces=max_faces)
    return clean_surface(rest, settings, Contraction(path.mean(0), reach))
