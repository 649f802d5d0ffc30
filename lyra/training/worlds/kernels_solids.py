"""Where does a ray meet one solid?

Numba kernels for the intersection of a ray with a unit solid and its cut-outs, and the noise that cuts them. They know
neither the other solids of a scene nor its ground (see ``kernels_trace``) nor colours (see ``kernels_shade``).
"""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float
from numba import njit

from lyra.training.worlds.layout import (
    ARCH,
    BALL,
    BOX,
    CONE,
    CUT_BARS,
    CUT_GRID,
    CUT_NOISE,
    GABLE,
    M_CUT,
    M_CUT_FREQ,
    M_CUT_LEVEL,
    M_HX,
    M_HY,
    M_HZ,
    M_SEED,
    M_SHAPE_A,
    M_SHAPE_B,
    SceneArrays,
)

FLAGS = {"contract", "arcp", "nsz"}  # No "nnan"/"ninf": the slab tests rely on infinities.
FAR = 1e30


@njit(cache=True, fastmath=FLAGS, inline="always")
def hash01(ix: int, iy: int, iz: int) -> float:
    """Hash three integers to [0, 1)."""
    h = (ix * 374761393 + iy * 668265263 + iz * 1274126177) & 0xFFFFFFFF
    h = ((h ^ (h >> 13)) * 1274126177) & 0xFFFFFFFF
    h = ((h ^ (h >> 16)) * 668265263) & 0xFFFFFFFF
    return ((h ^ (h >> 15)) & 0xFFFFFF) / 16777216.0


@njit(cache=True, fastmath=FLAGS)
def noise3(x: float, y: float, z: float) -> float:
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
def _slab(o: float, d: float, lo: float, hi: float, t0: float, t1: float) -> tuple[float, float]:
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
def _half_space(value: float, slope: float, t0: float, t1: float) -> tuple[float, float]:
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
def _quadric(a: float, b: float, c: float, opens_forward: bool, t0: float, t1: float) -> tuple[float, float]:
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
def solid_interval(
    kind: int, sa: float, ox: float, oy: float, oz: float, dx: float, dy: float, dz: float
) -> tuple[float, float]:
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
def is_kept(mat: Float[np.ndarray, "columns"], x: float, y: float, z: float) -> bool:
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
def hit_primitive(
    s: SceneArrays, i: int, ox: float, oy: float, oz: float, dx: float, dy: float, dz: float, tmin: float, tmax: float
) -> float:
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
