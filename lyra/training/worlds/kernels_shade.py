"""Which colour does a camera see?

Numba kernels that light a surface (sun and lamps with shadow rays, sky light with one occlusion ray, one mirror
bounce, fog), map radiance to sRGB and fill image rows. They know nothing about how scenes come to be.
"""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from numba import njit

from lyra.training.worlds.kernels_sample import bump, ground_colour, sky_colour, surface_colour, world_normal
from lyra.training.worlds.kernels_solids import FAR, FLAGS, noise3
from lyra.training.worlds.kernels_trace import (
    EPS,
    SLOTS,
    STACK,
    closest_hit,
    closest_solid,
    grid_value,
    is_blocked,
)
from lyra.training.worlds.layout import (
    G_BUMP,
    G_CELL,
    G_MODE,
    G_REFLECT,
    GROUND_FIELD,
    GROUND_ID,
    M_CUT,
    M_EMIT,
    M_REFLECT,
    M_SPEC,
    MAX_DEPTH,
    NOTHING_ID,
    S_AO,
    S_AO_RANGE,
    S_DOWN_B,
    S_DOWN_G,
    S_DOWN_R,
    S_EXPOSURE,
    S_FOG,
    S_HORIZON_B,
    S_HORIZON_G,
    S_HORIZON_R,
    S_SUN_B,
    S_SUN_G,
    S_SUN_R,
    S_SUN_SOFT,
    S_SUN_X,
    S_SUN_Y,
    S_SUN_Z,
    S_UP_B,
    S_UP_G,
    S_UP_R,
    SKY_DEPTH,
    SceneArrays,
)


@njit(cache=True, fastmath=FLAGS)
def _surface(
    s: SceneArrays, who: int, px: float, py: float, pz: float, footprint: float
) -> tuple[float, float, float, float, float, float, float, float, float, float, float, float]:
    """Albedo, geometric normal, shading normal, gloss, glow and mirror share at a hit point."""
    if who == GROUND_ID:
        r, g, b = ground_colour(s, px, pz, footprint)
        gx, gy, gz = 0.0, -1.0, 0.0
        if s.ground[G_MODE] == GROUND_FIELD:
            c = s.ground[G_CELL]
            e = 0.5 * c
            gx = grid_value(s.height, c, px - e, pz) - grid_value(s.height, c, px + e, pz)
            gz = grid_value(s.height, c, px, pz - e) - grid_value(s.height, c, px, pz + e)
            gy = -c
            q = 1.0 / math.sqrt(gx * gx + gy * gy + gz * gz)
            gx, gy, gz = gx * q, gy * q, gz * q
        sx, sy, sz = bump(gx, gy, gz, px, py, pz, s.ground[G_BUMP] / (1.0 + 20.0 * footprint), 6.0)
        q = 1.0 / math.sqrt(sx * sx + sy * sy + sz * sz)
        return r, g, b, gx, gy, gz, sx * q, sy * q, sz * q, 0.05, 0.0, s.ground[G_REFLECT]
    a, mat = s.to_local[who], s.material[who]
    x = a[0] * px + a[1] * py + a[2] * pz + a[3]
    y = a[4] * px + a[5] * py + a[6] * pz + a[7]
    z = a[8] * px + a[9] * py + a[10] * pz + a[11]
    gx, gy, gz, sx, sy, sz = world_normal(s, who, x, y, z, px, py, pz)
    if mat[M_REFLECT] > 0.75:
        # Water: slow ripples instead of the fine bump of solid surfaces.
        w = 0.08 / (1.0 + 15.0 * footprint)
        sx += w * (noise3(px * 1.7, 0.0, pz * 2.9) + 0.6 * noise3(px * 5.0, 1.0, pz * 7.0) - 0.8)
        sz += w * (noise3(px * 1.9, 9.0, pz * 2.3) + 0.6 * noise3(px * 5.7, 5.0, pz * 6.1) - 0.8)
    r, g, b = surface_colour(s, who, x, y, z, gx, gy, gz, footprint)
    dirt = 0.82 + 0.36 * noise3(px * 0.7, py * 0.7, pz * 0.7)
    if mat[M_CUT] == 1.0:
        dirt *= 0.8 + 1.3 * noise3(px * 5.3, py * 5.3, pz * 5.3)
    r, g, b = r * dirt, g * dirt, b * dirt
    return r, g, b, gx, gy, gz, sx, sy, sz, mat[M_SPEC], mat[M_EMIT], mat[M_REFLECT]


@njit(cache=True, fastmath=FLAGS)
def _jitter(h1: float, h2: float, nx: float, ny: float, nz: float, spread: float) -> tuple[float, float, float]:
    """Unit vector near a normal; spread 1 gives cosine-like directions."""
    phi, c = 6.2831853 * h1, 1.0 - 2.0 * h2
    q = spread * math.sqrt(max(0.0, 1 - c * c))
    x, y, z = nx + q * math.cos(phi), ny + spread * c, nz + q * math.sin(phi)
    n = 1.0 / math.sqrt(x * x + y * y + z * z + 1e-12)
    return x * n, y * n, z * n


@njit(cache=True, fastmath=FLAGS)
def _lamps(
    s: SceneArrays,
    ox: float,
    oy: float,
    oz: float,
    nx: float,
    ny: float,
    nz: float,
    h1: float,
    h2: float,
    full: bool,
    nodes: Int[np.ndarray, "stack"],
) -> tuple[float, float, float]:
    """Light of the point lamps arriving at a point, with one shadow ray for each lamp that matters."""
    r = g = b = 0.0
    expo = s.sky[S_EXPOSURE]
    for j in range(s.lights.shape[0]):
        lamp = s.lights[j]
        vx, vy, vz = lamp[0] - ox, lamp[1] - oy, lamp[2] - oz
        vx, vy, vz = vx + lamp[6] * (h1 - 0.5), vy + lamp[6] * (h2 - 0.5), vz + lamp[6] * (h1 + h2 - 1.0) * 0.5
        d2 = vx * vx + vy * vy + vz * vz
        cos = vx * nx + vy * ny + vz * nz
        if cos <= 0:
            continue
        d = math.sqrt(d2)
        w = cos / d / (d2 + 0.15)
        strength = w * max(lamp[3], lamp[4], lamp[5]) * expo
        if strength < 0.015:
            continue
        if full and strength > 0.04 and is_blocked(s, ox, oy, oz, vx, vy, vz, 0.985, nodes, 1 + j % (SLOTS - 1), False):
            continue
        r, g, b = r + w * lamp[3], g + w * lamp[4], b + w * lamp[5]
    return r, g, b


@njit(cache=True, fastmath=FLAGS)
def shade(
    s: SceneArrays, who: int, ox: float, oy: float, oz: float, dx: float, dy: float, dz: float, t: float,
    footprint: float, h1: float, h2: float, full: bool,
    nodes: Int[np.ndarray, "stack"], entries: Float[np.ndarray, "stack"],
) -> tuple[float, float, float, float, float, float, float]:  # fmt: skip
    """Linear radiance leaving a hit point towards the eye, and the mirror ray's share and direction."""
    k = s.sky
    px, py, pz = ox + t * dx, oy + t * dy, oz + t * dz
    r, g, b, gx, gy, gz, nx, ny, nz, spec, emit, mirror = _surface(s, who, px, py, pz, footprint)
    if gx * dx + gy * dy + gz * dz > 0:
        gx, gy, gz, nx, ny, nz = -gx, -gy, -gz, -nx, -ny, -nz
    dot = nx * dx + ny * dy + nz * dz
    mx, my, mz = dx - 2 * dot * nx, dy - 2 * dot * ny, dz - 2 * dot * nz
    if emit > 0:
        return r * emit, g * emit, b * emit, 0.0, mx, my, mz
    lift = 1e-3 + 1e-4 * t
    qx, qy, qz = px + gx * lift, py + gy * lift, pz + gz * lift
    sky = 1.0
    if full and k[S_AO] > 0:
        ax, ay, az = _jitter(h1, h2, gx, gy - 0.25, gz, 0.75)
        if ax * gx + ay * gy + az * gz > 0.05:
            reach = k[S_AO_RANGE]
            u, other = closest_solid(s, qx, qy, qz, ax, ay, az, EPS, reach, nodes, entries)
            if other >= 0 and s.material[other, M_EMIT] <= 0:
                sky = 1.0 - k[S_AO] * (1.0 - u / reach)
    w = 0.5 - 0.5 * ny
    lr = sky * (k[S_DOWN_R] + (k[S_UP_R] - k[S_DOWN_R]) * w)
    lg = sky * (k[S_DOWN_G] + (k[S_UP_G] - k[S_DOWN_G]) * w)
    lb = sky * (k[S_DOWN_B] + (k[S_UP_B] - k[S_DOWN_B]) * w)
    shine = 0.0
    if k[S_SUN_R] > 0:
        sx, sy, sz = k[S_SUN_X], k[S_SUN_Y], k[S_SUN_Z]
        cos = nx * sx + ny * sy + nz * sz
        soft = who >= 0 and s.material[who, M_CUT] == 1.0
        if soft:
            # Leaves let light through, so a crown has no dark side.
            cos = 0.35 + 0.65 * max(cos, 0.0)
        if soft or (cos > 0 and gx * sx + gy * sy + gz * sz > 0):
            lit = True
            if full:
                ax, ay, az = _jitter(h2, h1, sx, sy, sz, k[S_SUN_SOFT])
                lit = not is_blocked(s, qx, qy, qz, ax, ay, az, 150.0, nodes, 0, True)
            if lit:
                lr, lg, lb = lr + cos * k[S_SUN_R], lg + cos * k[S_SUN_G], lb + cos * k[S_SUN_B]
                shine = max(mx * sx + my * sy + mz * sz, 0.0)
    if s.lights.shape[0] > 0:
        ar, ag, ab = _lamps(s, qx, qy, qz, nx, ny, nz, h1, h2, full, nodes)
        lr, lg, lb = lr + ar, lg + ag, lb + ab
    r, g, b = r * lr, g * lg, b * lb
    if spec > 0 and shine > 0:
        gloss = 0.8 * spec * shine**24
        r, g, b = r + gloss * k[S_SUN_R], g + gloss * k[S_SUN_G], b + gloss * k[S_SUN_B]
    if mirror > 0:
        f = 1.0 - min(max(-dot, 0.0), 1.0)
        f2 = f * f
        mirror = mirror * (0.15 + 0.85 * f2 * f2)
    return r, g, b, mirror, mx, my, mz


@njit(cache=True, fastmath=FLAGS)
def _fog(
    s: SceneArrays, r: float, g: float, b: float, dx: float, dy: float, dz: float, distance: float
) -> tuple[float, float, float]:
    """Mix in the colour of the horizon with distance."""
    k = s.sky
    if k[S_FOG] <= 0:
        return r, g, b
    w = math.exp(-k[S_FOG] * distance)
    return (
        r * w + (1 - w) * k[S_HORIZON_R],
        g * w + (1 - w) * k[S_HORIZON_G],
        b * w + (1 - w) * k[S_HORIZON_B],
    )


@njit(cache=True, fastmath=FLAGS)
def radiance(
    s: SceneArrays,
    ox: float,
    oy: float,
    oz: float,
    dx: float,
    dy: float,
    dz: float,
    cone: float,
    h1: float,
    h2: float,
    nodes: Int[np.ndarray, "stack"],
    entries: Float[np.ndarray, "stack"],
) -> tuple[float, float, float, float, int]:
    """Linear colour along a unit ray; cone is the width of a pixel per metre of distance. Also the hit distance."""
    t, who = closest_hit(s, ox, oy, oz, dx, dy, dz, EPS, FAR, nodes, entries)
    if who == NOTHING_ID:
        r, g, b = sky_colour(s.sky, dx, dy, dz)
        return r, g, b, t, who
    r, g, b, mirror, mx, my, mz = shade(s, who, ox, oy, oz, dx, dy, dz, t, cone * t, h1, h2, True, nodes, entries)
    if mirror > 0.02:
        lift = 1e-3 + 1e-4 * t
        px, py, pz = ox + t * dx + lift * mx, oy + t * dy + lift * my, oz + t * dz + lift * mz
        if who == GROUND_ID or my < 0:
            py -= 2e-3
        u, other = closest_hit(s, px, py, pz, mx, my, mz, EPS, FAR, nodes, entries)
        if other == NOTHING_ID:
            r2, g2, b2 = sky_colour(s.sky, mx, my, mz)
        else:
            r2, g2, b2, _, _, _, _ = shade(
                s, other, px, py, pz, mx, my, mz, u, cone * (t + u), h1, h2, False, nodes, entries
            )
            r2, g2, b2 = _fog(s, r2, g2, b2, mx, my, mz, min(u, MAX_DEPTH))
        r, g, b = r + mirror * (r2 - r), g + mirror * (g2 - g), b + mirror * (b2 - b)
    r, g, b = _fog(s, r, g, b, dx, dy, dz, t)
    return r, g, b, t, who


@njit(cache=True, fastmath=FLAGS, inline="always")
def _tone(x: float) -> float:
    """Film-like curve to sRGB in [0, 255]."""
    x = max(x, 0.0)
    x = x * (2.51 * x + 0.03) / (x * (2.43 * x + 0.59) + 0.14)
    return 255.0 * math.sqrt(min(x, 1.0))


@njit(cache=True, nogil=True, fastmath=FLAGS)
def render_rows(
    s: SceneArrays,
    c2w: Float[np.ndarray, "4 4"],
    k_inverse: Float[np.ndarray, "3 3"],
    y0: int,
    y1: int,
    width: int,
    samples: int,
    shading: bool,
    rgb: UInt8[np.ndarray, "h w 3"],
    depth: Float[np.ndarray, "h w"],
    sky: Bool[np.ndarray, "h w"],
) -> None:
    """Fill rows y0..y1-1 of the image, the z-depth of the centre rays and the sky mask."""
    nodes, entries = np.full(STACK + SLOTS, -1, np.int32), np.empty(STACK)
    ox, oy, oz = c2w[0, 3], c2w[1, 3], c2w[2, 3]
    expo = s.sky[S_EXPOSURE]
    cone = k_inverse[0, 0] / samples
    for y in range(y0, y1):
        for x in range(width):
            r = g = b = 0.0
            centre_t, centre_who = 0.0, NOTHING_ID
            have_centre = False
            for j in range(samples if shading else 0):
                for i in range(samples):
                    u, v = x + (i + 0.5) / samples - 0.5, y + (j + 0.5) / samples - 0.5
                    rx = k_inverse[0, 0] * u + k_inverse[0, 1] * v + k_inverse[0, 2]
                    ry = k_inverse[1, 1] * v + k_inverse[1, 2]
                    n = math.sqrt(rx * rx + ry * ry + 1.0)
                    dx = (c2w[0, 0] * rx + c2w[0, 1] * ry + c2w[0, 2]) / n
                    dy = (c2w[1, 0] * rx + c2w[1, 1] * ry + c2w[1, 2]) / n
                    dz = (c2w[2, 0] * rx + c2w[2, 1] * ry + c2w[2, 2]) / n
                    q = j * samples + i
                    # Fixed patterns instead of noise: one sample per pixel must not show grain.
                    h1 = (q + 0.5) / (samples * samples)
                    h2 = 0.5 if samples == 1 else (0.25, 0.75, 0.6, 0.4)[q & 3]
                    r1, g1, b1, t, who = radiance(s, ox, oy, oz, dx, dy, dz, cone, h1, h2, nodes, entries)
                    r, g, b = r + _tone(r1 * expo), g + _tone(g1 * expo), b + _tone(b1 * expo)
                    if 2 * i + 1 == samples and 2 * j + 1 == samples:
                        centre_t, centre_who, have_centre = t / n, who, True
            if not have_centre:
                rx = k_inverse[0, 0] * x + k_inverse[0, 1] * y + k_inverse[0, 2]
                ry = k_inverse[1, 1] * y + k_inverse[1, 2]
                dx = c2w[0, 0] * rx + c2w[0, 1] * ry + c2w[0, 2]
                dy = c2w[1, 0] * rx + c2w[1, 1] * ry + c2w[1, 2]
                dz = c2w[2, 0] * rx + c2w[2, 1] * ry + c2w[2, 2]
                centre_t, centre_who = closest_hit(s, ox, oy, oz, dx, dy, dz, EPS, FAR, nodes, entries)
            w = 1.0 / (samples * samples)
            rgb[y, x, 0], rgb[y, x, 1], rgb[y, x, 2] = int(r * w + 0.5), int(g * w + 0.5), int(b * w + 0.5)
            sky[y, x] = centre_who == NOTHING_ID
            depth[y, x] = SKY_DEPTH if centre_who == NOTHING_ID else min(centre_t, MAX_DEPTH)
