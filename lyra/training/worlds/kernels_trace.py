"""Where does a ray meet the scene?

Numba kernels for the intersection of rays with the primitives, the hierarchy and the ground. They know geometry and
cut-outs only; colours are the business of ``kernels_shade``.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from lyra.training.worlds.layout import (
    ARCH,
    BALL,
    BOX,
    CONE,
    CUT_BARS,
    CUT_GRID,
    CUT_NOISE,
    G_CELL,
    G_LEVEL,
    G_MODE,
    G_TOP,
    GABLE,
    GROUND_FIELD,
    GROUND_FLAT,
    GROUND_ID,
    M_CUT,
    M_CUT_FREQ,
    M_CUT_LEVEL,
    M_EMIT,
    M_HX,
    M_HY,
    M_HZ,
    M_SEED,
    M_SHAPE_A,
    M_SHAPE_B,
    MAX_DEPTH,
    NOTHING_ID,
)

FLAGS = {"contract", "arcp", "nsz"}  # No "nnan"/"ninf": the slab tests rely on infinities.
FAR = 1e30
EPS = 1e-4
STACK = 64
SLOTS = 16


@njit(cache=True, fastmath=FLAGS, inline="always")
def hash01(ix, iy, iz):
    """Hash three integers to [0, 1)."""
    h = (ix * 374761393 + iy * 668265263 + iz * 1274126177) & 0xFFFFFFFF
    h = ((h ^ (h >> 13)) * 1274126177) & 0xFFFFFFFF
    h = ((h ^ (h >> 16)) * 668265263) & 0xFFFFFFFF
    return ((h ^ (h >> 15)) & 0xFFFFFF) / 16777216.0


@njit(cache=True, fastmath=FLAGS)
def noise3(x, y, z):
    """Smooth value noise in [0, 1) with one cell per unit."""
    fx, fy, fz = math.floor(x), math.floor(y), math.floor(z)
    ix, iy, iz = int(fx), int(fy), int(fz)
    u, v, w = x - fx, y - fy, z - fz
    u, v, w = u * u * (3 - 2 * u), v * v * (3 - 2 * v), w * w * (3 - 2 * w)
    a = hash01(ix, iy, iz) * (1 - u) + hash01(ix + 1, iy, iz) * u
    b = hash01(ix, iy + 1, iz) * (1 - u) + hash01(ix + 1, iy + 1, iz) * u
    c = hash01(ix, iy, iz + 1) * (1 - u) + hash01(ix + 1, iy, iz + 1) * u
    d = hash01(ix, iy + 1, iz + 1) * (1 - u) + hash01(ix + 1, iy + 1, iz + 1) * u
    return (a * (1 - v) + b * v) * (1 - w) + (c * (1 - v) + d * v) * w


@njit(cache=True, fastmath=FLAGS, inline="always")
def _slab(o, d, lo, hi, t0, t1):
    """Clip the interval [t0, t1] to lo <= o + t d <= hi."""
    if abs(d) < 1e-14:
        if o < lo or o > hi:
            return FAR, -FAR
        return t0, t1
    inv = 1.0 / d
    a, b = (lo - o) * inv, (hi - o) * inv
    if a > b:
        a, b = b, a
    return max(t0, a), min(t1, b)


@njit(cache=True, fastmath=FLAGS, inline="always")
def _half_space(value, slope, t0, t1):
    """Clip the interval [t0, t1] to value + t slope <= 0."""
    if abs(slope) < 1e-14:
        if value > 0:
            return FAR, -FAR
        return t0, t1
    t = -value / slope
    if slope > 0:
        return t0, min(t1, t)
    return max(t0, t), t1


@njit(cache=True, fastmath=FLAGS)
def _quadric(a, b, c, opens_forward, t0, t1):
    """Clip [t0, t1] to a t^2 + 2 b t + c <= 0; for a < 0 only one of the two branches is wanted."""
    if abs(a) < 1e-12:
        return _half_space(c, 2 * b, t0, t1)
    disc = b * b - a * c
    if disc <= 0:
        if a > 0:
            return FAR, -FAR
        return t0, t1
    root = math.sqrt(disc)
    q = -(b + root) if b > 0 else -(b - root)
    r0 = q / a
    r1 = c / q if abs(q) > 1e-300 else r0
    if r0 > r1:
        r0, r1 = r1, r0
    if a > 0:
        return max(t0, r0), min(t1, r1)
    if opens_forward:
        return max(t0, r1), t1
    return t0, min(t1, r0)


@njit(cache=True, fastmath=FLAGS)
def solid_interval(kind, sa, ox, oy, oz, dx, dy, dz):
    """Interval of ray parameters inside a convex unit solid; empty when the first value exceeds the second."""
    t0, t1 = -FAR, FAR
    if kind == BALL:
        return _quadric(
            dx * dx + dy * dy + dz * dz, ox * dx + oy * dy + oz * dz, ox * ox + oy * oy + oz * oz - 1.0, True, t0, t1
        )
    t0, t1 = _slab(oy, dy, -1.0, 1.0, t0, t1)
    if t0 > t1:
        return t0, t1
    if kind in (BOX, ARCH):
        t0, t1 = _slab(ox, dx, -1.0, 1.0, t0, t1)
        return _slab(oz, dz, -1.0, 1.0, t0, t1)
    # The half width of the other solids grows linearly from ``sa`` at the top to 1 at the bottom.
    m, k = 0.5 * (1 + sa), 0.5 * (1 - sa)
    if kind == CONE:
        r, s = m + k * oy, k * dy
        return _quadric(dx * dx + dz * dz - s * s, ox * dx + oz * dz - r * s, ox * ox + oz * oz - r * r, dy > 0, t0, t1)
    t0, t1 = _half_space(ox - m - k * oy, dx - k * dy, t0, t1)
    t0, t1 = _half_space(-ox - m - k * oy, -dx - k * dy, t0, t1)
    if kind == GABLE:
        return _slab(oz, dz, -1.0, 1.0, t0, t1)
    t0, t1 = _half_space(oz - m - k * oy, dz - k * dy, t0, t1)
    return _half_space(-oz - m - k * oy, -dz - k * dy, t0, t1)


@njit(cache=True, fastmath=FLAGS)
def is_kept(mat, x, y, z):
    """Say whether the cut-out pattern of a material keeps the surface at a point of the unit solid."""
    cut = int(mat[M_CUT])
    x, y, z = x * mat[M_HX], y * mat[M_HY], z * mat[M_HZ]
    f, seed = mat[M_CUT_FREQ], mat[M_SEED] * 57.0
    if cut == CUT_NOISE:
        n = 0.6 * noise3(x * f + seed, y * f, z * f) + 0.4 * noise3(x * f * 2.7, y * f * 2.7 + seed, z * f * 2.7)
        return n > mat[M_CUT_LEVEL]
    u = (x + z) * f + 1000.0
    if cut == CUT_BARS:
        return u - math.floor(u) > mat[M_CUT_LEVEL]
    if cut == CUT_GRID:
        v = y * f + 1000.0
        return u - math.floor(u) > mat[M_CUT_LEVEL] or v - math.floor(v) > mat[M_CUT_LEVEL]
    return True


@njit(cache=True, fastmath=FLAGS)
def hit_primitive(s, i, ox, oy, oz, dx, dy, dz, tmin, tmax):
    """Ray parameter of the first kept surface of a primitive in (tmin, tmax), or a huge number."""
    a = s.to_local[i]
    lx = a[0] * ox + a[1] * oy + a[2] * oz + a[3]
    ly = a[4] * ox + a[5] * oy + a[6] * oz + a[7]
    lz = a[8] * ox + a[9] * oy + a[10] * oz + a[11]
    kx = a[0] * dx + a[1] * dy + a[2] * dz
    ky = a[4] * dx + a[5] * dy + a[6] * dz
    kz = a[8] * dx + a[9] * dy + a[10] * dz
    kind = s.kind[i]
    mat = s.material[i]
    t0, t1 = solid_interval(kind, mat[M_SHAPE_A], lx, ly, lz, kx, ky, kz)
    if t0 >= t1 or t1 <= tmin or t0 >= tmax:
        return FAR
    if kind == ARCH:
        # A block with an elliptic tunnel along z whose axis runs through the middle of the lower face.
        ia, ib = 1.0 / mat[M_SHAPE_A], 1.0 / mat[M_SHAPE_B]
        px, py, qx, qy = lx * ia, (ly - 1.0) * ib, kx * ia, ky * ib
        c0, c1 = _quadric(qx * qx + qy * qy, px * qx + py * qy, px * px + py * py - 1.0, True, -FAR, FAR)
        if c0 < t0 and t0 < c1:
            t0 = c1
        elif t0 <= tmin and c0 < c1 and c0 > tmin:
            return c0
        elif t0 <= tmin and c0 < tmin and c1 > tmin:
            t0 = c1
        return t0 if tmin < t0 < min(t1, tmax) else FAR
    if mat[M_CUT] == 0.0:
        if t0 > tmin:
            return t0
        return t1 if t1 < tmax else FAR
    if t0 > tmin and is_kept(mat, lx + t0 * kx, ly + t0 * ky, lz + t0 * kz):
        return t0
    if t1 < tmax and is_kept(mat, lx + t1 * kx, ly + t1 * ky, lz + t1 * kz):
        return t1
    return FAR


@njit(cache=True, fastmath=FLAGS)
def grid_value(grid, cell, x, z):
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
def hit_ground(s, ox, oy, oz, dx, dy, dz, tmin, tmax, coarse):
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
def _box_entry(box, ox, oy, oz, ix, iy, iz, tmin, tmax):
    """Entry parameter of a node box, or a huge number when the ray misses it."""
    a, b = (box[0] - ox) * ix, (box[3] - ox) * ix
    t0, t1 = min(a, b), max(a, b)
    a, b = (box[1] - oy) * iy, (box[4] - oy) * iy
    t0, t1 = max(t0, min(a, b)), min(t1, max(a, b))
    a, b = (box[2] - oz) * iz, (box[5] - oz) * iz
    t0, t1 = max(t0, min(a, b), tmin), min(t1, max(a, b), tmax)
    return t0 if t0 <= t1 else FAR


@njit(cache=True, fastmath=FLAGS, inline="always")
def _inverse(d):
    return 1.0 / d if abs(d) > 1e-12 else (1e12 if d >= 0 else -1e12)


@njit(cache=True, fastmath=FLAGS)
def closest_solid(s, ox, oy, oz, dx, dy, dz, tmin, tmax, nodes, entries):
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
def closest_hit(s, ox, oy, oz, dx, dy, dz, tmin, tmax, nodes, entries):
    """Nearest surface along a ray: parameter and primitive (``GROUND_ID``, ``NOTHING_ID`` for ground and sky)."""
    best, who = closest_solid(s, ox, oy, oz, dx, dy, dz, tmin, tmax, nodes, entries)
    t = hit_ground(s, ox, oy, oz, dx, dy, dz, tmin, best, False)
    if t < best:
        return t, GROUND_ID
    return best, who


@njit(cache=True, fastmath=FLAGS)
def is_blocked(s, ox, oy, oz, dx, dy, dz, tmax, nodes, slot, with_ground):
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
def cast(s, origins, directions, tmax, t_out, id_out):
    """Nearest hit of many rays; parameters are in units of the given directions."""
    nodes, entries = np.empty(STACK, np.int32), np.empty(STACK)
    for i in range(origins.shape[0]):
        o, d = origins[i], directions[i]
        t_out[i], id_out[i] = closest_hit(s, o[0], o[1], o[2], d[0], d[1], d[2], EPS, tmax, nodes, entries)


@njit(cache=True, nogil=True)
def cast_depth(s, c2w, k_inverse, height, width, depth, ids):
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
