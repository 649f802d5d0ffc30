"""What can a physics engine stand things on? A light mesh with a ground that has no hole where the cameras walked.

Cameras never see all of the floor, least of all what is under them, and whatever is dropped into a hole falls for ever.
So the ground around the path becomes a sheet of its own: seen heights on a grid, continued smoothly where nothing was
seen. Knows no physics engine and no file format. Heights are measured along the estimated up direction.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from lyra.errors import UserError
from lyra.reconstruction.surface import SurfaceSettings, clean_surface
from lyra.reconstruction.tsdf import Contraction
from lyra.reconstruction.tsdf_kernels import continue_smoothly, grow_ground, sample_faces
from lyra.types import Cameras, TriangleMesh

EYE_HEIGHT = 1.6
"""Height of the cameras above a ground that is never seen, in scene units (metre-like)."""
SHEET_SHARE = 0.35
"""Share of the triangles that the sheet may have."""
GROUND_COSINE = math.cos(math.radians(50))
"""Steeper surface is not ground."""
STEP = 0.08
"""Ground may rise by this share of the eye height between neighbouring points, on top of that slope: a stair."""
HEADROOM = (0.12, 1.0)
"""Surface between these heights above the ground, in eye heights, is in the way."""
WALKABLE_SLOPE = math.tan(math.radians(10))
MIN_VIEW = 0.05
"""Steradians that a surface must fill to say where up is: less is a window sill and no floor."""
BODY = 0.15
"""What walks keeps this many eye heights from what is in the way."""


@dataclass(frozen=True)
class Ground:
    """Height of the ground on a square grid around the path."""

    axes: Float[Tensor, "3 3"]
    """Rows: the grid's two horizontal directions and up, in world axes, right-handed."""
    origin: Float[Tensor, "2"]
    """Horizontal coordinates of grid point (0, 0) in scene units."""
    cell: float
    """Distance of neighbouring points."""
    heights: Float[Tensor, "r c"]
    inside: Bool[Tensor, "r c"]
    """Points of the sheet; the heights of others have no meaning."""
    seen: Bool[Tensor, "r c"]
    """Points whose height was measured and not continued from others."""
    walkable: Bool[Tensor, "r c"]
    """Nearly flat, with headroom, reached from the path and not at the sheet's border."""

    def height_at(self, points: Float[Tensor, "n 3"]) -> Float[Tensor, "n"]:
        """Height of the ground under world points, bilinear; NaN outside of the sheet."""
        at = (points.double() @ self.axes[:2].double().T - self.origin.double()) / self.cell
        low = at.floor().long()
        fits = ((low >= 0) & (low < torch.tensor(self.inside.shape) - 1)).all(1)
        r, c = torch.where(fits[:, None], low, 0).unbind(1)
        s, t = (at - low).unbind(1)
        total = torch.zeros_like(s)
        for dr, dc, share in ((0, 0, (1 - s) * (1 - t)), (0, 1, (1 - s) * t), (1, 0, s * (1 - t)), (1, 1, s * t)):
            fits = fits & self.inside[r + dr, c + dc]
            total = total + share * self.heights[r + dr, c + dc]
        return torch.where(fits, total, torch.nan).to(points.dtype)


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
        margin: reach of the sheet beyond the path, in eye heights.

    Raises:
        UserError: there are no cameras, they are not finite, or `up` has no length.
    """
    if len(cameras) == 0 or not torch.isfinite(cameras.w2c).all():
        raise UserError("A collider needs a camera path with finite poses; check the trajectory file.")
    if up is not None and not (torch.isfinite(up).all() and up.norm() > 1e-6):
        raise UserError("The up direction must be a vector of some length; leave it out to have it estimated.")
    direction = estimate_up(mesh, cameras) if up is None else up.detach().cpu().double() / up.cpu().double().norm()
    scene = _scene(mesh, cameras, direction)
    guess = _guess_ground(scene)
    eye = float(np.median(scene.path[:, 2] - guess))
    grid = _grid(np.column_stack([scene.path, guess]), margin * eye, max(SHEET_SHARE * max_faces / 2, 64))
    samples = _samples(scene, grid)
    heights, seen = _ground_heights(samples, grid, eye)
    ground = Ground(
        axes=torch.from_numpy(scene.axes).float(),
        origin=torch.from_numpy(grid.origin).float(),
        cell=grid.cell,
        heights=torch.from_numpy(heights).float(),
        inside=torch.from_numpy(grid.inside),
        seen=torch.from_numpy(seen),
        walkable=torch.from_numpy(_walkable(samples, grid, heights, eye)),
    )
    sheet = _sheet(ground)
    rest = _above(mesh, scene, ground, eye, max(max_faces - len(sheet.faces), 100), margin)
    joined = TriangleMesh(
        torch.cat([rest.vertices, sheet.vertices]),
        torch.cat([rest.faces.long(), sheet.faces + len(rest.vertices)]),
        torch.cat([rest.colours, sheet.colours]),
    )
    floor = float(np.median(heights[grid.distance <= min(0.5, margin) * eye + grid.cell]))
    return Collider(joined, direction.float(), floor, eye, ground)


def walkable(
    collider: Collider, count: int = 32, *, generator: torch.Generator | None = None, above: float | None = None
) -> Float[Tensor, "count 3"]:
    """Random world points above walkable ground, to drop things from; always the same ones without a generator.

    They are apart from each other, and `above` the ground in scene units, by default a quarter of the eye height.
    """
    ground = collider.ground
    generator = generator or torch.Generator().manual_seed(0)
    cells, chosen = ground.walkable.nonzero(), torch.empty(0, 2)
    for _ in range(count):
        # The best of some candidates (Mitchell 1991) keeps things apart that are dropped together.
        drawn = cells[torch.randint(len(cells), (32,), generator=generator)]
        drawn = drawn + 0.5 * (torch.rand(32, 2, generator=generator) - 0.5)
        best = torch.cdist(drawn, chosen).amin(1).argmax() if len(chosen) else 0
        chosen = torch.cat([chosen, drawn[best][None]])
    level = (ground.origin + chosen * ground.cell) @ ground.axes[:2]
    height = ground.height_at(level) + (0.25 * collider.eye_height if above is None else above)
    return level + height[:, None] * ground.axes[2]


@dataclass(frozen=True)
class _Scene:
    """The mesh and the path in the frame (two horizontal directions, up)."""

    axes: Float[np.ndarray, "3 3"]
    points: Float[np.ndarray, "v 3"]
    faces: Int64[np.ndarray, "f 3"]
    normals: Float[np.ndarray, "f 3"]
    areas: Float[np.ndarray, "f"]
    middles: Float[np.ndarray, "f 3"]
    path: Float[np.ndarray, "n 3"]


def _scene(mesh: TriangleMesh, cameras: Cameras, up: Float[Tensor, "3"]) -> _Scene:
    """Turn mesh and path so that height is the last coordinate."""
    z = up.double().numpy()
    # Any horizontal direction will do; the one nearest to a world axis keeps the grid straight in most worlds.
    x = np.eye(3)[int(np.abs(z).argmin())]
    x = x - (x @ z) * z
    x /= np.linalg.norm(x)
    axes = np.stack([x, np.cross(z, x), z])
    points = mesh.vertices.detach().cpu().double().numpy() @ axes.T
    faces = mesh.faces.cpu().numpy().astype(np.int64)
    corners = points[faces]
    normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    areas = 0.5 * np.linalg.norm(normals, axis=1)
    normals = normals / np.maximum(2 * areas, 1e-30)[:, None]
    path = cameras.centres.detach().cpu().double().numpy() @ axes.T
    return _Scene(axes, points, faces, normals, areas, corners.mean(1), path)


def estimate_up(mesh: TriangleMesh, cameras: Cameras) -> Float[Tensor, "3"]:
    """Unit vector against gravity in world axes, by the walls, the ground or, without both, the images' vertical.

    A camera is rarely rolled, so the mean of the images' upward directions is a first guess; its pitch is not known.
    Surface in narrowing cones about it corrects it, each triangle counting as much as it fills of the view. Walls, if
    there are straight ones, compete with the ground, which may slope; without them the ground is taken as level.
    """
    guess = -cameras.w2c[:, 1, :3].detach().cpu().double().mean(0).numpy()
    # Cameras that look up as much as down have no mean.
    guess = guess / np.linalg.norm(guess) if np.linalg.norm(guess) > 1e-6 else np.array([0.0, -1.0, 0.0])
    scene = _scene(mesh, cameras, torch.from_numpy(guess))
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


def _guess_ground(scene: _Scene) -> Float[np.ndarray, "n"]:
    """Height of the ground below each point of the path: the lowest of the levels that are seen much.

    Either the path follows the ground, so that levels relative to the nearest camera are sharp, or it rises above flat
    ground; the sharper one is taken. A triangle counts as much as it fills of the view from the nearest camera.
    """
    path = scene.path[np.linspace(0, len(scene.path) - 1, min(len(scene.path), 24)).astype(int)]
    up_facing = scene.normals[:, 2] > GROUND_COSINE
    middles, areas = scene.middles[up_facing], scene.areas[up_facing]
    squares = ((middles[:, None, :2] - path[None, :, :2]) ** 2).sum(-1)
    nearest = path[squares.argmin(1), 2] if len(middles) else np.zeros(0)
    drop = nearest - middles[:, 2]
    weights = areas * np.abs(drop) / (squares.min(1) + drop**2).clip(1e-30) ** 1.5
    best, guess = 0.0, scene.path[:, 2] - EYE_HEIGHT
    flat = np.full(len(scene.path), np.median(path[:, 2]))
    for reference, above in ((nearest, scene.path[:, 2]), (flat[:1], flat)):
        level = reference - middles[:, 2]
        below = (drop > 0) & (level > 0)
        if not below.any():
            continue
        bins = np.round(np.log(level[below]) / math.log(1.05)).astype(int)
        bins -= bins.min()
        totals = np.convolve(np.bincount(bins, weights[below]), [0.5, 1.0, 0.5], "same")
        lowest = int(np.flatnonzero(totals >= 0.5 * totals.max()).max())
        near = np.abs(bins - lowest) <= 2
        if totals[lowest] > 1.02 * best:
            best, guess = totals[lowest], above - np.average(level[below][near], weights=weights[below][near])
    return guess


@dataclass(frozen=True)
class _Grid:
    """Points of the sheet, about the path."""

    origin: Float[np.ndarray, "2"]
    cell: float
    distance: Float[np.ndarray, "r c"]
    """Horizontal distance to the path."""
    camera: Float[np.ndarray, "r c"]
    """Height of the nearest point of the path."""
    level: Float[np.ndarray, "r c"]
    """Guessed height of the ground there."""
    inside: Bool[np.ndarray, "r c"]
    margin: float


def _grid(path: Float[np.ndarray, "n 4"], margin: float, points: float) -> _Grid:
    """A grid of at most about `points` points no further than `margin` from a path of positions and ground levels."""
    low, high = path[:, :2].min(0) - margin, path[:, :2].max(0) + margin
    cell = math.sqrt(float(np.prod(high - low)) / points)
    while True:
        shape = np.ceil((high - low) / cell).astype(int) + 1
        at = low + np.stack(np.meshgrid(*[np.arange(n) for n in shape], indexing="ij"), -1) * cell
        distance, nearest = np.full(shape, np.inf), np.zeros((*shape, 2))
        for start, end in zip(path, np.concatenate([path[1:], path[-1:]]), strict=True):
            along = (end - start)[:2]
            share = ((at - start[:2]) @ along / max(float(along @ along), 1e-30)).clip(0, 1)[..., None]
            away = np.linalg.norm(at - start[:2] - share * along, axis=-1)
            nearest = np.where((away < distance)[..., None], start[2:] + share * (end - start)[2:], nearest)
            distance = np.minimum(away, distance)
        inside = distance <= margin
        # A winding path leaves most of its bounding box empty.
        finer = cell * math.sqrt(inside.sum() / points)
        if finer > 0.9 * cell:
            return _Grid(low, cell, distance, nearest[..., 0], nearest[..., 1], inside, margin)
        cell = finer


@dataclass(frozen=True)
class _Samples:
    """Points on the mesh that are closer together than the grid's."""

    cells: Int64[np.ndarray, "n"]
    """Flat number of the nearest grid point."""
    heights: Float[np.ndarray, "n"]
    ground: Float[np.ndarray, "n"]
    """Height of the sample's face at that grid point; NaN where the face is too steep to be ground."""


def _samples(scene: _Scene, grid: _Grid) -> _Samples:
    """Points of the mesh over and under the grid."""
    shape = np.array(grid.inside.shape)
    high = grid.origin + (shape - 1) * grid.cell
    found = sample_faces(scene.points, scene.faces, grid.origin, high, 0.5 * grid.cell)
    nearest = np.rint((found[:, :2] - grid.origin) / grid.cell).astype(np.int64)
    offsets = found[:, :2] - grid.origin - nearest * grid.cell
    normals = scene.normals[found[:, 3].astype(np.int64)]
    level = found[:, 2] + (normals[:, :2] * offsets).sum(1) / np.maximum(normals[:, 2], GROUND_COSINE)
    ground = np.where(normals[:, 2] > GROUND_COSINE, level, np.nan)
    return _Samples(nearest[:, 0] * shape[1] + nearest[:, 1], found[:, 2], ground)


def _ground_heights(
    samples: _Samples, grid: _Grid, eye: float
) -> tuple[Float[np.ndarray, "r c"], Bool[np.ndarray, "r c"]]:
    """Height of each point, and whether it was seen.

    Ground grows from surface one eye height below the path, over steps and slopes that one can walk; a table is cut off
    by its sides. The rest is the harmonic continuation of what was found, and below the cameras in any case.
    """
    low = samples.ground < grid.camera.reshape(-1)[samples.cells] - 0.3 * eye
    # Of the many samples at a point, one for each hundredth of an eye height is enough.
    layers = np.stack([samples.cells[low], np.round(samples.ground[low] / (0.01 * eye)).astype(np.int64)], 1)
    first = np.unique(layers, axis=0, return_index=True)[1]
    cells, found = samples.cells[low][first], samples.ground[low][first]
    heights = np.full(grid.inside.shape, np.nan)
    away = np.abs(found - grid.level.reshape(-1)[cells])
    # Of several values for one point, the last one stays.
    order = np.argsort(-away, kind="stable")
    order = order[away[order] <= 0.15 * eye]
    heights.reshape(-1)[cells[order]] = found[order]
    grow_ground(heights, cells, found, grid.cell * math.sqrt(1 / GROUND_COSINE**2 - 1) + STEP * eye)
    seen = np.isfinite(heights) & grid.inside
    if not seen.any():
        return np.where(grid.inside, grid.level, 0.0), seen
    heights = np.where(seen, heights, heights[seen].mean())
    continue_smoothly(heights, seen, grid.inside, 1e-5 * eye)
    under = grid.inside & ~seen & (grid.distance < 0.5 * eye)
    heights[under] = np.minimum(heights[under], (grid.camera - 0.5 * eye)[under])
    return heights, seen


def _grown(mask: Bool[np.ndarray, "r c"]) -> Bool[np.ndarray, "r c"]:
    """A mask and the four neighbours of its points."""
    padded = np.pad(mask, 1)
    return mask | padded[:-2, 1:-1] | padded[2:, 1:-1] | padded[1:-1, :-2] | padded[1:-1, 2:]


def _walkable(samples: _Samples, grid: _Grid, heights: Float[np.ndarray, "r c"], eye: float) -> Bool[np.ndarray, "r c"]:
    """Nearly flat points with headroom that can be reached from the path; below the path itself if there are none."""
    above = (samples.heights - heights.reshape(-1)[samples.cells]) / eye
    blocked = np.zeros(heights.shape, bool)
    blocked.reshape(-1)[samples.cells[(above > HEADROOM[0]) & (above < HEADROOM[1])]] = True
    for _ in range(math.ceil(BODY * eye / grid.cell)):
        blocked = _grown(blocked)
    below_path = grid.inside & (grid.distance <= max(BODY * eye, grid.cell))
    free = grid.inside & ~blocked
    reached, before = below_path & free, -1
    while before != (before := int(reached.sum())):
        reached = _grown(reached) & free
    rise = np.hypot(*np.gradient(heights, grid.cell))
    flat = reached & (grid.distance <= grid.margin - 2 * grid.cell) & (rise <= WALKABLE_SLOPE)
    return flat if flat.any() else below_path


def _sheet(ground: Ground) -> TriangleMesh:
    """Two triangles for each grid cell whose four corners are inside, facing up."""
    inside, columns = ground.inside, ground.inside.shape[1]
    cells = (inside[:-1, :-1] & inside[1:, :-1] & inside[:-1, 1:] & inside[1:, 1:]).nonzero()
    corner = cells[:, 0] * columns + cells[:, 1]
    quads = torch.stack([corner, corner + columns, corner + columns + 1, corner + 1], 1)
    used, faces = torch.cat([quads[:, [0, 1, 2]], quads[:, [0, 2, 3]]]).unique(return_inverse=True)
    plane = ground.origin + torch.stack([used // columns, used % columns], 1) * ground.cell
    vertices = plane @ ground.axes[:2] + ground.heights.reshape(-1)[used, None] * ground.axes[2]
    return TriangleMesh(vertices, faces, torch.full((len(used), 3), 128, dtype=torch.uint8))


def _above(
    mesh: TriangleMesh, scene: _Scene, ground: Ground, eye: float, max_faces: int, margin: float
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
