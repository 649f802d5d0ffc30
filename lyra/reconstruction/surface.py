"""What are the triangles of a distance field, and which of them are worth keeping?

Marching cubes (Lorensen and Cline 1987) over blocks, without scraps and small holes, decimated (Garland and Heckbert
1997). All of it happens in the field's contracted space, where a far triangle counts as much as it fills of a view.
Knows no camera: the side of free space is in the field's sign.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import fast_simplification
import numba
import numpy as np
import torch
from jaxtyping import Float, Int, Int64

from lyra.errors import UserError
from lyra.reconstruction.tsdf import Contraction, SparseTsdf
from lyra.reconstruction.tsdf_kernels import BLOCK, joined, least_area
from lyra.types import TriangleMesh

MIN_DISTANCE = 1e-3
"""Distances nearer to 0, in voxels, are moved there: a vertex on a voxel would make triangles without area."""

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SurfaceSettings:
    """What `clean_surface` removes, closes and keeps."""

    min_component_share: float = 0.002
    """Connected pieces with less than this share of the whole area are dropped, the largest one never."""
    max_hole_edges: int = 64
    """Holes whose border has at most this many edges are closed: an edge is about as long as a voxel, so a hole may be
    wider the further away it is."""
    max_faces: int = 200_000
    """Triangles that are left at most."""


@dataclass(frozen=True)
class _Triangles:
    """A mesh while it is worked on."""

    vertices: Float[np.ndarray, "v 3"]
    faces: Int[np.ndarray, "f 3"]
    colours: Float[np.ndarray, "v 3"]
    """0 to 255."""


def extract_surface(tsdf: SparseTsdf, settings: SurfaceSettings | None = None) -> TriangleMesh:
    """The cleaned surface of a distance field, facing the cameras.

    Raises:
        UserError: the field has no surface.
    """
    triangles = march(tsdf)
    if len(triangles.faces) == 0:
        raise UserError(
            "The depth maps hold too little surface for a mesh; use a finer voxel or a photo with more to see nearby."
        )
    triangles = _clean(triangles, settings or SurfaceSettings())
    return _finish(triangles, tsdf.space)


def clean_surface(
    mesh: TriangleMesh, settings: SurfaceSettings | None = None, space: Contraction | None = None
) -> TriangleMesh:
    """A mesh without small pieces and small holes, decimated to the settings' number of triangles.

    With a `space`, areas and errors are measured in it; without one in the world, where far things weigh most.

    Raises:
        UserError: the mesh has no triangle.
    """
    if len(mesh.faces) == 0:
        raise UserError("The mesh has no triangle to clean; make the mesh from a world with visible surfaces.")
    vertices = mesh.vertices.detach().cpu().double().numpy()
    if space is not None:
        vertices = space.contract(vertices)
    colours = mesh.colours.cpu().double().numpy()
    triangles = _Triangles(vertices, mesh.faces.cpu().numpy().astype(np.int64), colours)
    return _finish(_clean(triangles, settings or SurfaceSettings()), space)


def _finish(triangles: _Triangles, space: Contraction | None) -> TriangleMesh:
    """Back to the world, as tensors."""
    vertices = triangles.vertices if space is None else space.expand(triangles.vertices)
    return TriangleMesh(
        torch.from_numpy(vertices.astype(np.float32)),
        torch.from_numpy(triangles.faces.astype(np.int64)),
        torch.from_numpy(np.rint(triangles.colours).clip(0, 255).astype(np.uint8)),
    )


def _clean(triangles: _Triangles, settings: SurfaceSettings) -> _Triangles:
    """Pieces, holes and decimation, in this order: a scrap's border is no hole, and few triangles hide small holes."""
    raw = len(triangles.faces)
    triangles = largest_pieces(triangles, settings.min_component_share)
    triangles = close_holes(triangles, settings.max_hole_edges)
    triangles = decimate(triangles, settings.max_faces)
    _logger.info("surface of %d triangles, %d before cleaning", len(triangles.faces), raw)
    return triangles


# ---- marching cubes ----------------------------------------------------------------------------------------------


def _cube_loops(case: int) -> list[list[int]]:
    """The closed curves in which the surface cuts a cube's edges; bit c of the case: corner c is behind the surface.

    Corner c is at (c & 1, c >> 1 & 1, c >> 2 & 1); edge 3 c + a leaves corner c along axis a. On each face, seen from
    outside, the corners behind the surface are cut off run by run. The neighbouring cube cuts the same face in the same
    way, so no case leaves a crack, and following the runs from face to face turns every curve the same way.
    """
    follow: dict[int, int] = {}
    for axis in range(3):
        first, second = 1 << (axis + 1) % 3, 1 << (axis + 2) % 3
        for side in (0, 1):
            ring = [0, first, first | second, second]
            # Counter-clockwise seen from outside.
            ring = [corner | side << axis for corner in (ring if side else ring[::-1])]
            behind = [bool(case >> corner & 1) for corner in ring]
            for i in range(4):
                if behind[i] and not behind[i - 1]:
                    j = i
                    while behind[(j + 1) % 4]:
                        j += 1
                    follow[_edge(ring[i - 1], ring[i])] = _edge(ring[j % 4], ring[(j + 1) % 4])
    loops = []
    while follow:
        loop = [next(iter(follow))]
        while (following := follow.pop(loop[-1])) != loop[0]:
            loop.append(following)
        loops.append(loop)
    return loops


def _edge(a: int, b: int) -> int:
    return 3 * (a & b) + (a ^ b).bit_length() - 1


def _on_one_face(edge: int, other: int) -> bool:
    """Whether two edges of a cube bound the same face of it."""
    corners = [c for e in (edge, other) for c in (e // 3, e // 3 | 1 << e % 3)]
    return any(len({corner >> axis & 1 for corner in corners}) == 1 for axis in range(3))


def _triangulate(loop: list[int]) -> list[tuple[int, int, int]]:
    """Triangles of a curve without an inner edge on a face of the cube, where the neighbour could have the same."""
    if len(loop) == 3:
        return [(loop[0], loop[1], loop[2])]
    for i in range(len(loop)):
        before, tip, after = loop[i - 1], loop[i], loop[(i + 1) % len(loop)]
        if not _on_one_face(before, after):
            rest = _triangulate([edge for edge in loop if edge != tip])
            if rest:
                return [(before, tip, after), *rest]
    return []


def _case_table() -> Int64[np.ndarray, "256 n"]:
    """Edges of the triangles of each case, three by three, ended by -1."""
    rows = [[edge for loop in _cube_loops(case) for t in _triangulate(loop) for edge in t] for case in range(256)]
    table = np.full((256, max(map(len, rows)) + 1), -1, np.int64)
    for case, row in enumerate(rows):
        table[case, : len(row)] = row
    return table


_TRIANGLES = _case_table()


@numba.njit(cache=True, nogil=True)
def _march(
    neighbours: np.ndarray, distance: np.ndarray, weight: np.ndarray, triangles: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The two voxels between which each vertex lies, and the faces, of all cubes whose eight corners are measured.

    Voxels have flat numbers, block after block.
    """
    side, cells = BLOCK, BLOCK**3
    numbers = np.full((len(distance), 3), -1, np.int32)
    ends, faces = np.empty((1 << 16, 2), np.int64), np.empty((1 << 17, 3), np.int64)
    end_count = face_count = 0
    corner = np.empty(8, np.int64)
    for at in range(len(distance)):
        b, i = at // cells, at % cells
        x, y, z = i // (side * side), i // side % side, i % side
        case, whole = 0, True
        for c in range(8):
            cx, cy, cz = x + (c & 1), y + (c >> 1 & 1), z + (c >> 2 & 1)
            block = neighbours[b, (cx // side) | (cy // side) << 1 | (cz // side) << 2]
            corner[c] = block * cells + (cx % side) * side * side + (cy % side) * side + cz % side
            if block < 0 or weight[corner[c]] <= 0.0:
                whole = False
                break
            if distance[corner[c]] < 0.0:
                case |= 1 << c
        k = 0
        while whole and triangles[case, k] >= 0:
            if face_count == len(faces):
                faces = np.concatenate((faces, np.empty_like(faces)))
            for t in range(3):
                low, axis = triangles[case, k + t] // 3, triangles[case, k + t] % 3
                if numbers[corner[low], axis] < 0:
                    if end_count == len(ends):
                        ends = np.concatenate((ends, np.empty_like(ends)))
                    ends[end_count, 0], ends[end_count, 1] = corner[low], corner[low | 1 << axis]
                    numbers[corner[low], axis] = end_count
                    end_count += 1
                faces[face_count, t] = numbers[corner[low], axis]
            face_count += 1
            k += 3
    return ends[:end_count], faces[:face_count]


def march(tsdf: SparseTsdf) -> _Triangles:
    """All triangles of the zero level, in contracted space; cubes with an unmeasured corner have none."""
    distance = tsdf.distance.reshape(-1)
    ends, faces = _march(tsdf.neighbours(), distance, tsdf.weight.reshape(-1), _TRIANGLES)
    value = distance[ends].astype(np.float64)
    value = np.where(value < 0, np.minimum(value, -MIN_DISTANCE), np.maximum(value, MIN_DISTANCE))
    share = value[:, :1] / (value[:, :1] - value[:, 1:])
    inside = np.stack(np.unravel_index(ends % BLOCK**3, (BLOCK, BLOCK, BLOCK)), -1)
    places = tsdf.blocks[ends // BLOCK**3] * BLOCK + inside
    colours = tsdf.colour.reshape(-1, 3)[ends].astype(np.float64)
    vertices, colours = (x[:, 0] * (1 - share) + x[:, 1] * share for x in (places, colours))
    return _Triangles(vertices * tsdf.voxel, faces, colours)


# ---- cleaning ----------------------------------------------------------------------------------------------------


def opposite_half_edges(faces: Int64[np.ndarray, "f 3"]) -> Int64[np.ndarray, "3*f"]:
    """For half-edge 3 f + i, from corner i of face f to the next one, that of the neighbouring face.

    -1 at a border, and where an edge has three faces or two that are turned against each other.
    """
    start, end = faces.reshape(-1), np.roll(faces, -1, axis=1).reshape(-1)
    key = np.minimum(start, end) * (int(faces.max()) + 1) + np.maximum(start, end)
    order = np.argsort(key, kind="stable")
    ordered = key[order]
    same = ordered[1:] == ordered[:-1]
    alone_before = np.concatenate([[True], ~same[:-1]])
    alone_after = np.concatenate([~same[1:], [True]])
    pair = np.flatnonzero(same & alone_before & alone_after)
    one, other = order[pair], order[pair + 1]
    turned = start[one] != start[other]
    opposite = np.full(len(start), -1, np.int64)
    opposite[one[turned]], opposite[other[turned]] = other[turned], one[turned]
    return opposite


def _areas(triangles: _Triangles) -> Float[np.ndarray, "f"]:
    """Area of each face."""
    corners = triangles.vertices[triangles.faces]
    return 0.5 * np.linalg.norm(np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]), axis=1)


def largest_pieces(triangles: _Triangles, share: float) -> _Triangles:
    """Connected pieces of at least a share of the whole area, and the largest one in any case."""
    faces = triangles.faces
    root = joined(np.concatenate([faces[:, :2], faces[:, 1:]]), len(triangles.vertices))[faces[:, 0]]
    sums = np.bincount(root, _areas(triangles))
    return _keep_faces(triangles, sums[root] >= min(share * sums.sum(), sums.max()))


def _keep_faces(triangles: _Triangles, keep: np.ndarray) -> _Triangles:
    """Some of the faces, and the vertices that they use."""
    used, faces = np.unique(triangles.faces[keep], return_inverse=True)
    return _Triangles(triangles.vertices[used], faces.reshape(-1, 3).astype(np.int64), triangles.colours[used])


def close_holes(triangles: _Triangles, max_edges: int) -> _Triangles:
    """Holes with a border of at most `max_edges` edges closed by the triangles of least area between its vertices.

    The outer border of an open piece is not one: triangles inside it would face against their neighbours.
    """
    faces, vertices = triangles.faces, triangles.vertices
    known = np.sort(_pair_keys(faces, np.roll(faces, -1, axis=1), len(vertices)).reshape(-1))
    corners = vertices[faces]
    normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    added = [faces]
    for half_edges in _border_loops(faces, max_edges):
        # A face beyond the border runs along it the other way.
        loop = faces.reshape(-1)[half_edges][::-1]
        points = vertices[loop] - vertices[loop].mean(0)
        facing = np.cross(points, np.roll(points, -1, axis=0)).sum(0)
        if facing @ normals[half_edges // 3].sum(0) <= 0:
            continue
        chords = _pair_keys(loop[:, None], loop[None], len(vertices))
        taken = known[np.searchsorted(known, chords).clip(max=len(known) - 1)] == chords
        patch = least_area(points, taken)
        if len(patch):
            added.append(loop[patch])
    return _Triangles(vertices, np.concatenate(added), triangles.colours)


def _pair_keys(a: np.ndarray, b: np.ndarray, count: int) -> np.ndarray:
    """One number for each pair of vertices, whichever comes first."""
    return np.minimum(a, b) * count + np.maximum(a, b)


def _border_loops(faces: Int64[np.ndarray, "f 3"], max_edges: int) -> list[Int64[np.ndarray, "n"]]:
    """Half-edges of each border of 3 to `max_edges` edges that passes no vertex twice, in order.

    Where holes touch in a vertex, its faces are several fans; a hole lies between the end of one and the start of the
    next, which for two fans is the other one.
    """
    opposite = opposite_half_edges(faces)
    one = np.flatnonzero(opposite > np.arange(len(opposite)))
    other = opposite[one]
    ahead = np.arange(len(opposite)).reshape(-1, 3)[:, [1, 2, 0]].reshape(-1)
    fan = joined(np.concatenate([np.stack([one, ahead[other]], 1), np.stack([ahead[one], other], 1)]), len(opposite))
    vertex, border = faces.reshape(-1), np.flatnonzero(opposite < 0)
    leaving: dict[int, list[int]] = {}
    for half_edge in border.tolist():
        leaving.setdefault(int(vertex[half_edge]), []).append(half_edge)
    following: dict[int, int] = {}
    for half_edge in border.tolist():
        out = leaving.get(int(vertex[ahead[half_edge]]), [])
        own = [i for i, candidate in enumerate(out) if fan[candidate] == fan[ahead[half_edge]]]
        if own:
            following[half_edge] = out[(own[0] + 1) % len(out)]
    loops = []
    while following:
        first, half_edge = following.popitem()
        loop = [first]
        while half_edge in following:
            loop.append(half_edge)
            half_edge = following.pop(half_edge)
        if half_edge == first and 3 <= len(loop) <= max_edges and len(np.unique(vertex[loop])) == len(loop):
            loops.append(np.array(loop))
    return loops


def decimate(triangles: _Triangles, max_faces: int) -> _Triangles:
    """At most `max_faces` triangles by quadric error; a vertex gets the mean colour of those that it replaces.

    Of a tangle that cannot be made that light, the largest triangles are left.
    """
    for aggression in (7.0, 10.0, 14.0):
        if len(triangles.faces) <= max_faces:
            break
        vertices, faces, collapses = fast_simplification.simplify(
            triangles.vertices,
            triangles.faces.astype(np.int32),
            target_count=max_faces,
            agg=aggression,
            return_collapses=True,
        )
        replacement = np.arange(len(triangles.vertices))
        replacement[collapses[:, 1]] = collapses[:, 0]
        while not np.array_equal(further := replacement[replacement], replacement):
            replacement = further
        # Vertices keep their order; those without a triangle are left out.
        old = replacement[triangles.faces]
        alive = (old[:, 0] != old[:, 1]) & (old[:, 1] != old[:, 2]) & (old[:, 2] != old[:, 0])
        used = np.zeros(len(replacement), bool)
        used[old[alive]] = True
        number = np.where(used, np.cumsum(used) - 1, -1)[replacement]
        kept = number >= 0
        count = np.bincount(number[kept], minlength=len(vertices))
        colours = np.stack(
            [np.bincount(number[kept], triangles.colours[kept, i], len(vertices)) / count for i in range(3)], axis=1
        )
        triangles = _Triangles(vertices, faces.astype(np.int64), colours)
    if len(triangles.faces) > max_faces:
        triangles = _keep_faces(triangles, np.argsort(-_areas(triangles), kind="stable")[:max_faces])
    return triangles
