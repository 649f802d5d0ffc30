"""Where is the ground that someone on the path could walk on, and where does it go on unseen?

Seen heights on a grid, continued smoothly where nothing was seen: around the path, and as far ahead as ground was seen.
Beyond that a wide and coarse rim goes on below whatever was seen, so that what rolls off comes to rest instead of
falling for ever. Knows no triangle budget and no physics engine. Heights are measured along a given up direction.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from lyra.reconstruction.tsdf_kernels import continue_smoothly, grow_ground, sample_faces
from lyra.types import Cameras, TriangleMesh

EYE_HEIGHT = 1.6
"""Height of the cameras above a ground that is never seen, in scene units (metre-like)."""
GROUND_COSINE = math.cos(math.radians(50))
"""Steeper surface is not ground."""
STEP = 0.08
"""Ground may rise by this share of the eye height between neighbouring points, on top of that slope: a stair."""
UNEVEN = 0.03
"""Lower bumps than this share of the eye height are errors of depth, whose share is about as large."""
HEADROOM = (0.12, 1.0)
"""Surface between these heights above the ground, in eye heights, is in the way."""
WALKABLE_SLOPE = math.tan(math.radians(10))
BODY = 0.15
"""What walks keeps this many eye heights from what is in the way."""
SEEN_REACH = 5.0
"""Ground that was seen belongs to the grid up to this many eye heights from the path ..."""
RIM_REACH = 12.0
"""... and the rim ends this far from it: farther than anything that is dropped rolls."""
RIM_SHARE = 0.1
"""Share of the points that the rim may have."""
RIM_QUANTILE = 0.05
"""The rim lies below what was seen, but for this share of it, which may be stray surface under the ground."""
SURVEY_POINTS = 16_000
"""Points of the grid on which the extent of the ground is found."""


@dataclass(frozen=True)
class Ground:
    """Height of the ground on a square grid."""

    axes: Float[Tensor, "3 3"]
    """Rows: the grid's two horizontal directions and up, in world axes, right-handed."""
    origin: Float[Tensor, "2"]
    """Horizontal coordinates of grid point (0, 0) in scene units."""
    cell: float
    """Distance of neighbouring points."""
    heights: Float[Tensor, "r c"]
    inside: Bool[Tensor, "r c"]
    """Points of the ground; the heights of others have no meaning."""
    seen: Bool[Tensor, "r c"]
    """Points whose height was measured and not continued from others."""
    walkable: Bool[Tensor, "r c"]
    """Nearly flat, with headroom, reached from the path and not at the border."""
    rim: Float[Tensor, "n 3"]
    """Points about the grid, two horizontal coordinates and a height, on which the ground goes on."""

    def height_at(self, points: Float[Tensor, "n 3"]) -> Float[Tensor, "n"]:
        """Height of the ground under world points, bilinear; NaN outside of the grid."""
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
class LevelScene:
    """The mesh and the path in the frame (two horizontal directions, up)."""

    axes: Float[np.ndarray, "3 3"]
    points: Float[np.ndarray, "v 3"]
    faces: Int64[np.ndarray, "f 3"]
    normals: Float[np.ndarray, "f 3"]
    areas: Float[np.ndarray, "f"]
    middles: Float[np.ndarray, "f 3"]
    path: Float[np.ndarray, "n 3"]


def level_scene(mesh: TriangleMesh, cameras: Cameras, up: Float[Tensor, "3"]) -> LevelScene:
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
    return LevelScene(axes, points, faces, normals, areas, corners.mean(1), path)


def guess_levels(scene: LevelScene) -> Float[np.ndarray, "n"]:
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


def find_ground(
    scene: LevelScene, levels: Float[np.ndarray, "n"], eye: float, *, margin: float, points: float
) -> Ground:
    """The ground of a scene on about `points` points, rim included.

    Args:
        scene: the surface and the path.
        levels: guessed height of the ground below each point of the path.
        eye: height of the cameras above the ground.
        margin: reach about the path within which the ground has no hole, seen or not, in eye heights.
        points: bound of the points.
    """
    path = _thinned(np.column_stack([scene.path, levels]), 0.05 * eye)
    survey = _survey(path, max(RIM_REACH, margin) * eye)
    samples = _samples(scene, survey)
    heights, seen = _ground_heights(samples, survey, eye)
    covered = _covered(survey, path, seen, eye, margin)
    rim = _rim(samples, survey, heights, _grown(covered), RIM_SHARE * points)
    grid = _resampled(survey, path, covered, points - len(rim))
    samples = _samples(scene, grid)
    heights, seen = _ground_heights(samples, grid, eye)
    return Ground(
        axes=torch.from_numpy(scene.axes).float(),
        origin=torch.from_numpy(grid.origin).float(),
        cell=grid.cell,
        heights=torch.from_numpy(heights).float(),
        inside=torch.from_numpy(grid.inside),
        seen=torch.from_numpy(seen),
        walkable=torch.from_numpy(_walkable(samples, grid, heights, eye)),
        rim=torch.from_numpy(rim).float(),
    )


@dataclass(frozen=True)
class _Grid:
    """Points in the ground plane, about the path."""

    origin: Float[np.ndarray, "2"]
    cell: float
    distance: Float[np.ndarray, "r c"]
    """Horizontal distance to the path."""
    nearest: Float[np.ndarray, "r c 4"]
    """Nearest point of the path: position, and guessed height of the ground there."""
    inside: Bool[np.ndarray, "r c"]

    @property
    def places(self) -> Float[np.ndarray, "r c 2"]:
        """Horizontal coordinates of the points."""
        return self.origin + np.stack(np.meshgrid(*map(np.arange, self.inside.shape), indexing="ij"), -1) * self.cell


def _thinned(path: Float[np.ndarray, "n 4"], step: float) -> Float[np.ndarray, "m 4"]:
    """A path without the points that hardly move; both ends stay."""
    travelled = np.concatenate([[0.0], np.cumsum(np.linalg.norm(np.diff(path, axis=0), axis=1))])
    first = np.unique(np.floor(travelled / step), return_index=True)[1]
    return path[np.unique(np.append(first, len(path) - 1))]


def _near_path(
    low: Float[np.ndarray, "2"], shape: tuple[int, int], cell: float, path: Float[np.ndarray, "n 4"]
) -> _Grid:
    """A grid with all points inside, that knows its distance to a path of positions and ground levels."""
    grid = _Grid(low, cell, np.full(shape, np.inf), np.zeros((*shape, 4)), np.ones(shape, bool))
    at, distance, nearest = grid.places, grid.distance, grid.nearest
    for start, end in zip(path, np.concatenate([path[1:], path[-1:]]), strict=True):
        along = (end - start)[:2]
        share = ((at - start[:2]) @ along / max(float(along @ along), 1e-30)).clip(0, 1)
        away = np.linalg.norm(at - start[:2] - share[..., None] * along, axis=-1)
        nearer = away < distance
        nearest[nearer] = start + share[nearer][:, None] * (end - start)
        distance[nearer] = away[nearer]
    return grid


def _survey(path: Float[np.ndarray, "n 4"], reach: float) -> _Grid:
    """A grid of about `SURVEY_POINTS` points no further than `reach` from the path."""
    low, high = path[:, :2].min(0) - reach, path[:, :2].max(0) + reach
    cell = math.sqrt(float(np.prod(high - low)) / SURVEY_POINTS)
    rows, columns = (int(n) for n in np.ceil((high - low) / cell) + 1)
    grid = _near_path(low, (rows, columns), cell, path)
    return _Grid(low, cell, grid.distance, grid.nearest, grid.distance <= reach)


def _covered(
    survey: _Grid, path: Float[np.ndarray, "n 4"], seen: Bool[np.ndarray, "r c"], eye: float, margin: float
) -> Bool[np.ndarray, "r c"]:
    """Points that get a fine grid: all near the path, ground that was seen further away, and what lies between.

    Whoever saw the ground looked over all that lies between it and the path.
    """
    around = survey.distance <= margin * eye
    ahead = seen & ~around & (survey.distance <= SEEN_REACH * eye)
    covered = around | ahead
    far = survey.places[ahead]
    near = survey.nearest[ahead][:, :2]
    for share in np.linspace(0, 1, max(2, math.ceil(2 * SEEN_REACH * eye / survey.cell))):
        at = np.rint((near + share * (far - near) - survey.origin) / survey.cell).astype(int)
        covered[at[:, 0], at[:, 1]] = True
    return _grown(covered) & survey.inside


def _resampled(survey: _Grid, path: Float[np.ndarray, "n 4"], covered: Bool[np.ndarray, "r c"], points: float) -> _Grid:
    """A grid of about `points` points on the covered ones of the survey."""
    rows, columns = (np.flatnonzero(covered.any(axis)) for axis in (1, 0))
    first, last = np.array([rows[0], columns[0]]), np.array([rows[-1], columns[-1]])
    low, extent = survey.origin + first * survey.cell, (last - first) * survey.cell
    cell = survey.cell * math.sqrt(covered.sum() / max(points, 1.0))
    while True:
        shape = (math.floor(extent[0] / cell) + 1, math.floor(extent[1] / cell) + 1)
        at = first + np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1) * cell / survey.cell
        at = np.rint(at).astype(int)
        inside = covered[at[..., 0], at[..., 1]]
        if inside.sum() <= points:
            break
        cell *= 1.01
    grid = _near_path(low, shape, cell, path)
    return _Grid(low, cell, grid.distance, grid.nearest, inside)


def _rim(
    samples: _Samples,
    survey: _Grid,
    heights: Float[np.ndarray, "r c"],
    covered: Bool[np.ndarray, "r c"],
    points: float,
) -> Float[np.ndarray, "n 3"]:
    """Points of the survey outside of the covered ones, at most about `points`, each as low as what is about it.

    Where lower ground was seen that cannot be reached, the rim goes down to it: a balcony ends where it ends.
    """
    outside = survey.inside & ~covered
    step = max(1, math.ceil(math.sqrt(outside.sum() / max(points, 1.0))))
    columns, block = survey.inside.shape[1], -(-survey.inside.shape[1] // step)
    flat = np.flatnonzero(outside)
    faces_up = np.isfinite(samples.ground) & outside.reshape(-1)[samples.cells]
    cells = np.concatenate([flat, samples.cells[faces_up]])
    found = np.concatenate([heights.reshape(-1)[flat], samples.heights[faces_up]])
    # Continued heights bound the rim only from above, measured ones decide by their quantile.
    blocks = cells // columns // step * block + cells % columns // step
    order = np.lexsort((found, blocks))
    numbers, starts, counts = np.unique(blocks[order], return_index=True, return_counts=True)
    lowest = found[order][starts + (RIM_QUANTILE * (counts - 1)).astype(int)]
    middle = np.stack([numbers // block, numbers % block], 1) * step + 0.5 * (step - 1)
    at = np.rint(middle).astype(int).clip(max=np.array(outside.shape) - 1)
    kept = ~covered[at[:, 0], at[:, 1]]
    return np.column_stack([survey.origin + at * survey.cell, lowest])[kept]


@dataclass(frozen=True)
class _Samples:
    """Points on the mesh that are closer together than the grid's."""

    cells: Int64[np.ndarray, "n"]
    """Flat number of the nearest grid point."""
    heights: Float[np.ndarray, "n"]
    ground: Float[np.ndarray, "n"]
    """Height of the sample's face at that grid point; NaN where the face is too steep to be ground."""


def _samples(scene: LevelScene, grid: _Grid) -> _Samples:
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
    camera, level = grid.nearest[..., 2], grid.nearest[..., 3]
    low = samples.ground < camera.reshape(-1)[samples.cells] - 0.3 * eye
    # Of the many samples at a point, one for each hundredth of an eye height is enough.
    layers = np.stack([samples.cells[low], np.round(samples.ground[low] / (0.01 * eye)).astype(np.int64)], 1)
    first = np.unique(layers, axis=0, return_index=True)[1]
    cells, found = samples.cells[low][first], samples.ground[low][first]
    heights = np.full(grid.inside.shape, np.nan)
    away = np.abs(found - level.reshape(-1)[cells])
    # Of several values for one point, the last one stays.
    order = np.argsort(-away, kind="stable")
    order = order[away[order] <= 0.15 * eye]
    heights.reshape(-1)[cells[order]] = found[order]
    grow_ground(heights, cells, found, grid.cell * math.sqrt(1 / GROUND_COSINE**2 - 1) + STEP * eye)
    seen = np.isfinite(heights) & grid.inside
    if not seen.any():
        return np.where(grid.inside, level, 0.0), seen
    # The value that was taken is at one end of what was found there; the mean of those near it is not.
    away = samples.ground - heights.reshape(-1)[samples.cells]
    close = np.abs(away) <= 2 * UNEVEN * eye
    sums, counts = (np.bincount(samples.cells[close], w, heights.size) for w in (away[close], None))
    heights = heights + (sums / np.maximum(counts, 1)).reshape(heights.shape)
    heights = np.where(seen, _evened(np.where(seen, heights, np.nan), UNEVEN * eye), heights[seen].mean())
    continue_smoothly(heights, seen, grid.inside, 1e-5 * eye)
    under = grid.inside & ~seen & (grid.distance < 0.5 * eye)
    heights[under] = np.minimum(heights[under], (camera - 0.5 * eye)[under])
    return heights, seen


def _evened(heights: Float[np.ndarray, "r c"], scale: float) -> Float[np.ndarray, "r c"]:
    """Heights without bumps that are smaller than a scale and no wider than a few points; NaN is left out and stays.

    A bilateral filter (Tomasi and Manduchi 1998), so that kerbs and stairs stay where they are.
    """
    for _ in range(3):
        padded = np.pad(heights, 1, constant_values=np.nan)
        rows, columns = heights.shape
        near = np.stack([padded[r : r + rows, c : c + columns] for r in range(3) for c in range(3)])
        weights = np.where(np.isfinite(near), np.exp(-(((near - heights) / scale) ** 2)), 0.0)
        total = (weights * np.nan_to_num(near)).sum(0) / np.maximum(weights.sum(0), 1e-30)
        heights = np.where(np.isfinite(heights), total, np.nan)
    return heights


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
    # The array ends where the ground does.
    border = _grown(_grown(np.pad(~grid.inside, 1, constant_values=True)))[1:-1, 1:-1]
    rise = np.maximum(_steepest(heights), _steepest(heights.T).T) / grid.cell
    flat = reached & ~border & (rise <= WALKABLE_SLOPE)
    return flat if flat.any() else below_path


def _steepest(heights: Float[np.ndarray, "r c"]) -> Float[np.ndarray, "r c"]:
    """Larger difference to the two neighbours along the columns: on a crest, the mean of both would be none."""
    steps = np.pad(np.abs(np.diff(heights, axis=0)), ((1, 1), (0, 0)))
    return np.maximum(steps[:-1], steps[1:])
