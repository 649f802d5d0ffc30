"""What colour has a surface or the sky before any light is traced?

Numba kernels for texture look-up, local shading normals and the sky dome. They trace no rays.
"""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float, UInt8
from numba import njit

from lyra.training.worlds.kernels_solids import FLAGS, hash01, noise3
from lyra.training.worlds.kernels_trace import grid_value
from lyra.training.worlds.layout import (
    ARCH,
    BALL,
    BOX,
    CONE,
    G_BA,
    G_BB,
    G_CELL,
    G_GA,
    G_GB,
    G_METRES_A,
    G_METRES_B,
    G_MIX,
    G_MODE,
    G_RA,
    G_RB,
    G_SEED,
    G_TEX_A,
    G_TEX_B,
    GABLE,
    GROUND_FIELD,
    M_B,
    M_BEVEL,
    M_BUMP,
    M_G,
    M_HX,
    M_HY,
    M_HZ,
    M_METRES,
    M_R,
    M_SEED,
    M_SHAPE_A,
    M_SHAPE_B,
    M_STRETCH,
    M_TEX,
    MIP_LEVELS,
    MIP_OFFSETS,
    S_CLOUD,
    S_CLOUD_B,
    S_CLOUD_FREQ,
    S_CLOUD_G,
    S_CLOUD_R,
    S_HORIZON_B,
    S_HORIZON_G,
    S_HORIZON_R,
    S_SEED,
    S_STARS,
    S_SUN_B,
    S_SUN_G,
    S_SUN_R,
    S_SUN_X,
    S_SUN_Y,
    S_SUN_Z,
    S_ZENITH_B,
    S_ZENITH_G,
    S_ZENITH_R,
    TEXTURE_SIZE,
    SceneArrays,
)

OFFSETS = np.array(MIP_OFFSETS, np.int64)


@njit(cache=True, fastmath=FLAGS)
def sample(
    texels: UInt8[np.ndarray, "t texels 3"], tex: int, u: float, v: float, footprint: float
) -> tuple[float, float, float]:
    """Linear colour of a texture at (u, v) in tiles; footprint is the pixel size in tiles."""
    level = 0
    f = footprint * TEXTURE_SIZE
    while f > 1.4 and level < MIP_LEVELS - 1:
        f *= 0.5
        level += 1
    n = TEXTURE_SIZE >> level
    x, y = (u - math.floor(u)) * n - 0.5, (v - math.floor(v)) * n - 0.5
    i, j = math.floor(x), math.floor(y)
    p, q = x - i, y - j
    i0, j0, i1, j1 = i & (n - 1), j & (n - 1), (i + 1) & (n - 1), (j + 1) & (n - 1)
    base = OFFSETS[level]
    a, b = texels[tex, base + j0 * n + i0], texels[tex, base + j0 * n + i1]
    c, d = texels[tex, base + j1 * n + i0], texels[tex, base + j1 * n + i1]
    wa, wb, wc, wd = (1 - p) * (1 - q), p * (1 - q), (1 - p) * q, p * q
    r = (a[0] * wa + b[0] * wb + c[0] * wc + d[0] * wd) / 255.0
    g = (a[1] * wa + b[1] * wb + c[1] * wc + d[1] * wd) / 255.0
    h = (a[2] * wa + b[2] * wb + c[2] * wc + d[2] * wd) / 255.0
    return r * r, g * g, h * h


@njit(cache=True, fastmath=FLAGS)
def local_normal(
    kind: int, mat: Float[np.ndarray, "columns"], x: float, y: float, z: float
) -> tuple[float, float, float]:
    """Outward normal of the unit solid at a surface point (not normalised)."""
    if kind == BALL:
        return x, y, z
    ax, ay, az = abs(x), abs(y), abs(z)
    sa = mat[M_SHAPE_A]
    if kind == BOX:
        if ax >= ay and ax >= az:
            return (1.0 if x > 0 else -1.0), 0.0, 0.0
        if ay >= az:
            return 0.0, (1.0 if y > 0 else -1.0), 0.0
        return 0.0, 0.0, (1.0 if z > 0 else -1.0)
    if kind == ARCH:
        px, py = x / sa, (y - 1.0) / mat[M_SHAPE_B]
        r = math.sqrt(px * px + py * py)
        if abs(r - 1.0) < 1e-4 and ax < 1 - 1e-7 and az < 1 - 1e-7:
            return -px / sa, -py / mat[M_SHAPE_B], 0.0
        if ax >= ay and ax >= az:
            return (1.0 if x > 0 else -1.0), 0.0, 0.0
        if ay >= az:
            return 0.0, (1.0 if y > 0 else -1.0), 0.0
        return 0.0, 0.0, (1.0 if z > 0 else -1.0)
    m, k = 0.5 * (1 + sa), 0.5 * (1 - sa)
    w = m + k * y
    if kind == CONE:
        r = math.sqrt(x * x + z * z)
        if abs(ay - 1.0) < abs(r - w):
            return 0.0, (1.0 if y > 0 else -1.0), 0.0
        return x / max(r, 1e-9), -k, z / max(r, 1e-9)
    cap, side = abs(ay - 1.0), abs(ax - w)
    if kind == GABLE:
        if abs(az - 1.0) < min(cap, side):
            return 0.0, 0.0, (1.0 if z > 0 else -1.0)
    elif abs(az - w) < min(cap, side):
        return 0.0, -k, (1.0 if z > 0 else -1.0)
    if cap < side:
        return 0.0, (1.0 if y > 0 else -1.0), 0.0
    return (1.0 if x > 0 else -1.0), -k, 0.0


@njit(cache=True, fastmath=FLAGS)
def bevel(
    kind: int, mat: Float[np.ndarray, "columns"], x: float, y: float, z: float, nx: float, ny: float, nz: float
) -> tuple[float, float, float]:
    """Bend the normal of a box near its edges so that they catch light like rounded ones."""
    radius = mat[M_BEVEL]
    if kind != BOX or radius <= 0:
        return nx, ny, nz
    ex = 1 - (1 - abs(x)) * mat[M_HX] / radius
    ey = 1 - (1 - abs(y)) * mat[M_HY] / radius
    ez = 1 - (1 - abs(z)) * mat[M_HZ] / radius
    if nx == 0.0 and ex > 0:
        nx = math.copysign(0.8 * ex * ex, x)
    if ny == 0.0 and ey > 0:
        ny = math.copysign(0.8 * ey * ey, y)
    if nz == 0.0 and ez > 0:
        nz = math.copysign(0.8 * ez * ez, z)
    return nx, ny, nz


@njit(cache=True, fastmath=FLAGS)
def surface_colour(
    s: SceneArrays, i: int, x: float, y: float, z: float, nx: float, ny: float, nz: float, footprint: float
) -> tuple[float, float, float]:
    """Linear albedo of a primitive at a point of its unit solid with the given unit normal."""
    mat = s.material[i]
    kind = s.kind[i]
    hx, hy, hz = mat[M_HX], mat[M_HY], mat[M_HZ]
    ax, ay, az = abs(nx), abs(ny), abs(nz)
    if mat[M_STRETCH] > 0:
        tile_u, tile_v = 0.5, 0.5
        size = min(hx, hy) if az >= ax else min(hz, hy)
        footprint = 0.5 * footprint / max(size, 1e-3)
    else:
        tile_u = tile_v = 1.0 / mat[M_METRES]
        footprint = footprint * tile_u
        x, y, z = x * hx, y * hy, z * hz
    if kind == CONE and ay < 0.8 and mat[M_STRETCH] == 0:
        turns = math.floor(max(1.0, 6.2832 * max(hx, hz) * tile_u) + 0.5)
        u, v = math.atan2(x, z) / 6.2832 * turns, y * tile_v
    elif ay >= ax and ay >= az:
        u, v = x * tile_u, z * tile_v
    elif ax >= az:
        u, v = z * tile_u, y * tile_v
    else:
        u, v = x * tile_u, y * tile_v
    if mat[M_STRETCH] > 0:
        u, v = u + 0.5, v + 0.5
    else:
        u, v = u + mat[M_SEED], v + 0.37 * mat[M_SEED]
    r, g, b = sample(s.texels, int(mat[M_TEX]), u, v, footprint)
    return r * mat[M_R], g * mat[M_G], b * mat[M_B]


@njit(cache=True, fastmath=FLAGS)
def ground_colour(s: SceneArrays, x: float, z: float, footprint: float) -> tuple[float, float, float]:
    """Linear albedo of the ground: two textures mixed by the blend map or by noise."""
    g = s.ground
    ua, ub = 1.0 / g[G_METRES_A], 1.0 / g[G_METRES_B]
    r, h, b = sample(s.texels, int(g[G_TEX_A]), x * ua, z * ua, footprint * ua)
    # A second, rotated and larger layer breaks the visible repetition of the tile.
    r2, h2, b2 = sample(
        s.texels, int(g[G_TEX_A]), (0.8 * x + 0.6 * z) * ua * 0.23, (0.8 * z - 0.6 * x) * ua * 0.23, 0.02
    )
    r, h, b = 0.65 * r + 0.35 * r2, 0.65 * h + 0.35 * h2, 0.65 * b + 0.35 * b2
    r, h, b = r * g[G_RA], h * g[G_GA], b * g[G_BA]
    n = noise3(x * 0.23 + g[G_SEED], 0.5, z * 0.23) * 0.6 + 0.4 * noise3(x * 1.1, 7.5 + g[G_SEED], z * 1.1)
    w = g[G_MIX] * min(max((n - 0.45) * 5.0, 0.0), 1.0)
    if g[G_MODE] == GROUND_FIELD:
        w = min(max(grid_value(s.blend, g[G_CELL], x, z) + 0.5 * (n - 0.5), 0.0), 1.0)
    if w > 0.0:
        r2, h2, b2 = sample(s.texels, int(g[G_TEX_B]), x * ub, z * ub, footprint * ub)
        r += w * (r2 * g[G_RB] - r)
        h += w * (h2 * g[G_GB] - h)
        b += w * (b2 * g[G_BB] - b)
    shade = 0.8 + 0.4 * noise3(x * 0.11, 3.5, z * 0.11 + g[G_SEED])
    return r * shade, h * shade, b * shade


@njit(cache=True, fastmath=FLAGS)
def bump(
    nx: float, ny: float, nz: float, x: float, y: float, z: float, amount: float, scale: float
) -> tuple[float, float, float]:
    """Tilt a normal by three values of noise."""
    x, y, z = x * scale, y * scale, z * scale
    nx += amount * (noise3(x, y, z) - 0.5)
    ny += amount * (noise3(x + 31.7, y, z) - 0.5)
    nz += amount * (noise3(x, y + 47.1, z) - 0.5)
    return nx, ny, nz


@njit(cache=True, fastmath=FLAGS)
def sky_colour(k: Float[np.ndarray, "columns"], dx: float, dy: float, dz: float) -> tuple[float, float, float]:
    """Linear radiance of the sky in a unit direction (y down)."""
    up = max(-dy, 0.0)
    w = math.sqrt(up)
    r = k[S_HORIZON_R] + (k[S_ZENITH_R] - k[S_HORIZON_R]) * w
    g = k[S_HORIZON_G] + (k[S_ZENITH_G] - k[S_HORIZON_G]) * w
    b = k[S_HORIZON_B] + (k[S_ZENITH_B] - k[S_HORIZON_B]) * w
    c = max(dx * k[S_SUN_X] + dy * k[S_SUN_Y] + dz * k[S_SUN_Z], 0.0)
    c8 = c * c
    c8 = c8 * c8 * c8
    glow = 0.04 * c8 + 0.12 * c8**8 + (2.5 if c > 0.9994 else 0.0)
    if k[S_STARS] > 0 and up > 0.02:
        ix, iy, iz = math.floor(dx * 110), math.floor(dy * 110), math.floor(dz * 110)
        if hash01(ix, iy, iz) > 0.996:
            r, g, b = r + 0.15 * k[S_STARS], g + 0.15 * k[S_STARS], b + 0.15 * k[S_STARS]
    if k[S_CLOUD] > 0:
        p = k[S_CLOUD_FREQ] / (up + 0.12)
        x, z, seed = dx * p + k[S_SEED], dz * p, k[S_SEED]
        n = 0.5 * noise3(x, seed, z) + 0.25 * noise3(2.1 * x, seed, 2.1 * z) + 0.13 * noise3(4.3 * x, seed, 4.3 * z)
        n += 0.08 * noise3(8.9 * x, seed, 8.9 * z) + 0.04 * noise3(17.9 * x, seed, 17.9 * z)
        a = min(max((n - 0.72 + 0.5 * k[S_CLOUD]) * 4.0, 0.0), 1.0)
        a = a * a * (3 - 2 * a) * min(1.0, up * 6.0 + 0.25)
        lit = 0.65 + 0.7 * (0.75 - n) + 0.6 * glow
        r += a * (k[S_CLOUD_R] * lit - r)
        g += a * (k[S_CLOUD_G] * lit - g)
        b += a * (k[S_CLOUD_B] * lit - b)
        glow *= 1 - 0.7 * a
    return r + k[S_SUN_R] * glow, g + k[S_SUN_G] * glow, b + k[S_SUN_B] * glow


@njit(cache=True, fastmath=FLAGS)
def world_normal(
    s: SceneArrays, i: int, x: float, y: float, z: float, wx: float, wy: float, wz: float
) -> tuple[float, float, float, float, float, float]:
    """Unit normals of a primitive at a local point: geometric and shading, in world axes.

    (wx, wy, wz) is the world point, which drives the bump noise.
    """
    a, mat, kind = s.to_local[i], s.material[i], s.kind[i]
    nx, ny, nz = local_normal(kind, mat, x, y, z)
    gx = a[0] * nx + a[4] * ny + a[8] * nz
    gy = a[1] * nx + a[5] * ny + a[9] * nz
    gz = a[2] * nx + a[6] * ny + a[10] * nz
    q = 1.0 / math.sqrt(gx * gx + gy * gy + gz * gz + 1e-30)
    gx, gy, gz = gx * q, gy * q, gz * q
    sx, sy, sz = gx, gy, gz
    if mat[M_BEVEL] > 0 and kind == BOX:
        bx, by, bz = bevel(kind, mat, x, y, z, nx, ny, nz)
        # Boxes only rotate and scale, so multiplying by the half size undoes the scale of the map.
        bx, by, bz = bx * mat[M_HX], by * mat[M_HY], bz * mat[M_HZ]
        sx = a[0] * bx + a[4] * by + a[8] * bz
        sy = a[1] * bx + a[5] * by + a[9] * bz
        sz = a[2] * bx + a[6] * by + a[10] * bz
    if mat[M_BUMP] > 0:
        sx, sy, sz = bump(sx, sy, sz, wx, wy, wz, mat[M_BUMP], 9.0)
    q = 1.0 / math.sqrt(sx * sx + sy * sy + sz * sz + 1e-30)
    return gx, gy, gz, sx * q, sy * q, sz * q
