"""Where does a ray meet the scene?

Numba kernels for the intersection of rays with the hierarchy of solids (each is left to ``kernels_solids``) and the
ground. They know geometry only; colours are the business of ``kernels_shade``.
"""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float, Int
from numba import njit

from lyra.training.worlds.kernels_solids import FAR, FLAGS, hit_primitive
from lyra.training.worlds.layout import (
    G_CELL,
    G_LEVEL,
    G_MODE,
    G_TOP,
    GROUND_FIELD,
    GROUND_FLAT,
    GROUND_ID,
    M_EMIT,
    MAX_DEPTH,
    NOTHING_ID,
    SceneArrays,
)

EPS = 1e-4
STACK = 64
SLOTS = 16


@njit(cache=True, fastmath=FLAGS)
def grid_value(grid: Float[np.ndarray, "a a"], cell: float, x: float, z: float) -> float:
    """Bilinear value of a grid centred on the origin; clamped outside."""
    n = grid.shape[0]
    u, v = x / cell + 0.5 * (n - 1), z / cell + 0.5 * (n - 1)
    u, v = min(max(u, 0.0), n - 1.001), min(max(v, 0.0), n - 1.001)
    i, j = int(u), int(v)
    u, v = u - i, v - j
    a = grid[j, i] * (1 - u) + grid[j, i + 1] * u
    b = grid[j + 1, i] * (1 - u) + grid[j + 1, i + 1] * u
    return float(a * (1 - v) + b * v)


@njit(cache=True, fastmath=FLAGS)
def hit_ground(
    s: SceneArrays,
    ox: float,
    oy: float,
    oz: float,
    dx: float,
    dy: float,
    dz: float,
    tmin: float,
    tmax: float,
    coarse: bool,
) -> float:
    """Ray parameter of the ground; the height field is marched and then bisected to a tenth of a millimetre."""
    g = s.ground
    if g[G_MODE] == GROUND_FLAT:
        if dy == 0.0:
            return FAR
        t = (g[G_LEVEL] - oy) / dy
        return t if tmin < t < tmax else FAR
    if g[G_MODE] != GROUND_FIELD:
        return FAR
    # Steps are in metres, so that the march does not depend on the length of the direction.
    metre = 1.0 / math.sqrt(dx * dx + dy * dy + dz * dz)
    t, far = tmin, min(tmax, 600.0 * metre)
    top = -g[G_TOP]
    if oy + t * dy < top:
        if dy <= 0:
            return FAR
        t = (top - oy) / dy
    cell = g[G_CELL]
    before = t
    while t < far:
        above = -(oy + t * dy) - grid_value(s.height, cell, ox + t * dx, oz + t * dz)
        if above < 0:
            if t == before:
                return t
            lo, hi = before, t
            for _ in range(5 if coarse else 18):
                mid = 0.5 * (lo + hi)
                if -(oy + mid * dy) - grid_value(s.height, cell, ox + mid * dx, oz + mid * dz) < 0:
                    hi = mid
                else:
                    lo = mid
            return hi
        if dy < 0 and oy + t * dy < top:
            return FAR
        before = t
        t += max(0.55 * above * metre, (0.06 if coarse else 0.02) * metre + (0.02 if coarse else 0.006) * t)
    return FAR


@njit(cache=True, fastmath=FLAGS, inline="always")
def _box_entry(
    box: Float[np.ndarray, "6"],
    ox: float,
    oy: float,
    oz: float,
    ix: float,
    iy: float,
    iz: float,
    tmin: float,
    tmax: float,
) -> float:
    """Entry parameter of a node box, or a huge number when the ray misses it."""
    a, b = (box[0] - ox) * ix, (box[3] - ox) * ix
    t0, t1 = min(a, b), max(a, b)
    a, b = (box[1] - oy) * iy, (box[4] - oy) * iy
    t0, t1 = max(t0, min(a, b)), min(t1, max(a, b))
    a, b = (box[2] - oz) * iz, (box[5] - oz) * iz
    t0, t1 = max(t0, min(a, b), tmin), min(t1, max(a, b), tmax)
    return t0 if t0 <= t1 else FAR


@njit(cache=True, fastmath=FLAGS, inline="always")
def _inverse(d: float) -> float:
    return 1.0 / d if abs(d) > 1e-12 else (1e12 if d >= 0 else -1e12)


@njit(cache=True, fastmath=FLAGS)
def closest_solid(
    s: SceneArrays,
    ox: float,
    oy: float,
    oz: float,
    dx: float,
    dy: float,
    dz: float,
    tmin: float,
    tmax: float,
    nodes: Int[np.ndarray, "stack"],
    entries: Float[np.ndarray, "stack"],
) -> tuple[float, int]:
    """Nearest primitive along a ray, without the ground: parameter and number (``NOTHING_ID`` when none)."""
    best, who = tmax, NOTHING_ID
    if s.kind.shape[0] > 0:
        ix, iy, iz = _inverse(dx), _inverse(dy), _inverse(dz)
        depth, node = 0, 0
        if _box_entry(s.node_box[0], ox, oy, oz, ix, iy, iz, tmin, best) >= FAR:
            node = -1
        while node >= 0:
            first, count = s.node_first[node], s.node_count[node]
            node = -1
            if count > 0:
                for i in range(first, first + count):
                    t = hit_primitive(s, i, ox, oy, oz, dx, dy, dz, tmin, best)
                    if t < best:
                        best, who = t, i
            else:
                left = _box_entry(s.node_box[first], ox, oy, oz, ix, iy, iz, tmin, best)
                right = _box_entry(s.node_box[first + 1], ox, oy, oz, ix, iy, iz, tmin, best)
                near, far, t_near, t_far = first, first + 1, left, right
                if right < left:
                    near, far, t_near, t_far = first + 1, first, right, left
                if t_far < FAR:
                    nodes[depth], entries[depth] = far, t_far
                    depth += 1
                if t_near < FAR:
                    node = near
            while node < 0 and depth > 0:
                depth -= 1
                if entries[depth] < best:
                    node = nodes[depth]
    return best, who


@njit(cache=True, fastmath=FLAGS)
def closest_hit(
    s: SceneArrays,
    ox: float,
    oy: float,
    oz: float,
    dx: float,
    dy: float,
    dz: float,
    tmin: float,
    tmax: float,
    nodes: Int[np.ndarray, "stack"],
    entries: Float[np.ndarray, "stack"],
) -> tuple[float, int]:
    """Nearest surface along a ray: parameter and primitive (``GROUND_ID``, ``NOTHING_ID`` for ground and sky)."""
    best, who = closest_solid(s, ox, oy, oz, dx, dy, dz, tmin, tmax, nodes, entries)
    t = hit_ground(s, ox, oy, oz, dx, dy, dz, tmin, best, False)
    if t < best:
        return t, GROUND_ID
    return best, who


@njit(cache=True, fastmath=FLAGS)
def is_blocked(
    s: SceneArrays,
    ox: float,
    oy: float,
    oz: float,
    dx: float,
    dy: float,
    dz: float,
    tmax: float,
    nodes: Int[np.ndarray, "stack"],
    slot: int,
    with_ground: bool,
) -> bool:
    """Say whether anything that casts shadows lies on a ray before tmax; glowing bulbs cast none.

    The last slots of ``nodes`` remember the latest blocker of each light, which neighbouring pixels mostly share.
    """
    last = nodes[STACK + slot]
    if last >= 0 and hit_primitive(s, last, ox, oy, oz, dx, dy, dz, EPS, tmax) < tmax:
        return True
    if with_ground and hit_ground(s, ox, oy, oz, dx, dy, dz, 0.02, min(tmax, 120.0), True) < tmax:
        return True
    if s.kind.shape[0] == 0:
        return False
    ix, iy, iz = _inverse(dx), _inverse(dy), _inverse(dz)
    nodes[0] = 0
    depth = 1
    while depth > 0:
        depth -= 1
        node = nodes[depth]
        if _box_entry(s.node_box[node], ox, oy, oz, ix, iy, iz, EPS, tmax) >= FAR:
            continue
        first, count = s.node_first[node], s.node_count[node]
        if count == 0:
            nodes[depth], nodes[depth + 1] = first, first + 1
            depth += 2
            continue
        for i in range(first, first + count):
            if s.material[i, M_EMIT] <= 0 and hit_primitive(s, i, ox, oy, oz, dx, dy, dz, EPS, tmax) < tmax:
                nodes[STACK + slot] = i
                return True
    return False


@njit(cache=True, nogil=True)
def cast(
    s: SceneArrays,
    origins: Float[np.ndarray, "n 3"],
    directions: Float[np.ndarray, "n 3"],
    tmax: float,
    t_out: Float[np.ndarray, "n"],
    id_out: Int[np.ndarray, "n"],
) -> None:
    """Nearest hit of many rays; parameters are in units of the given directions."""
    nodes, entries = np.empty(STACK, np.int32), np.empty(STACK)
    for i in range(origins.shape[0]):
        o, d = origins[i], directions[i]
        t_out[i], id_out[i] = closest_hit(s, o[0], o[1], o[2], d[0], d[1], d[2], EPS, tmax, nodes, entries)


@njit(cache=True, nogil=True)
def cast_depth(
    s: SceneArrays,
    c2w: Float[np.ndarray, "4 4"],
    k_inverse: Float[np.ndarray, "3 3"],
    height: int,
    width: int,
    depth: Float[np.ndarray, "h w"],
    ids: Int[np.ndarray, "h w"],
) -> None:
    """z-depth (clamped) and primitive of every pixel of a pinhole view."""
    nodes, entries = np.empty(STACK, np.int32), np.empty(STACK)
    for y in range(height):
        for x in range(width):
            rx = k_inverse[0, 0] * x + k_inverse[0, 1] * y + k_inverse[0, 2]
            ry = k_inverse[1, 1] * y + k_inverse[1, 2]
            dx = c2w[0, 0] * rx + c2w[0, 1] * ry + c2w[0, 2]
            dy = c2w[1, 0] * rx + c2w[1, 1] * ry + c2w[1, 2]
            dz = c2w[2, 0] * rx + c2w[2, 1] * ry + c2w[2, 2]
            t, who = closest_hit(s, c2w[0, 3], c2w[1, 3], c2w[2, 3], dx, dy, dz, EPS, FAR, nodes, entries)
            depth[y, x], ids[y, x] = min(t, MAX_DEPTH), who
