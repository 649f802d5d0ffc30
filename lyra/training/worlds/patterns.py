"""How does the surface of a material look close up?

Generators of tileable 128x128 sRGB pictures, one per kind of material, drawn from a random generator. They know nothing
about mip levels, banks or scenes (see ``textures``).
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int
from numba import njit

from lyra.training.worlds.layout import TEXTURE_SIZE as N
from lyra.training.worlds.palettes import pick_colour

Image = Float[np.ndarray, "n n 3"]


def spectral_noise(rng: np.random.Generator, power: float, anisotropy: tuple[float, float] = (1.0, 1.0)) -> np.ndarray:
    """Periodic 1/f^power noise with zero mean and unit deviation; anisotropy stretches the frequencies of (v, u)."""
    fy = np.fft.fftfreq(N)[:, None] * N * anisotropy[0]
    fx = np.fft.rfftfreq(N)[None] * N * anisotropy[1]
    amplitude = 1.0 / np.maximum(np.sqrt(fx * fx + fy * fy), 1.0) ** power
    amplitude[0, 0] = 0
    phase = rng.uniform(0, 2 * np.pi, amplitude.shape)
    out = np.fft.irfft2(amplitude * np.exp(1j * phase), (N, N))
    return out / out.std()


def ramp(values: np.ndarray, colours: np.ndarray) -> Image:
    """Map values (unit deviation) through a list of colours sorted by brightness."""
    colours = colours[np.argsort(colours.sum(1))]
    x = np.clip((values + 2.0) / 4.0, 0, 1) * (len(colours) - 1)
    i = np.minimum(x.astype(int), len(colours) - 2)
    f = (x - i)[..., None]
    return colours[i] * (1 - f) + colours[i + 1] * f


def shades(rng: np.random.Generator, family: str, count: int, spread: float) -> np.ndarray:
    """Draw colours of one palette from dark to bright; spread says how much they differ."""
    base = pick_colour(rng, family)
    out = np.array([base * (1 - spread) + spread * pick_colour(rng, family) for _ in range(count)])
    return np.clip(out * np.linspace(1 - 0.6 * spread, 1 + 0.4 * spread, count)[:, None], 0, 1)


def cloudy(rng: np.random.Generator, family: str, contrast: float, power: float = 1.2) -> Image:
    """Noise between a few colours of a palette: plaster, soil, sand, concrete, snow."""
    noise = spectral_noise(rng, power + rng.uniform(-0.2, 0.3)) * 0.7 + spectral_noise(rng, 0.5) * 0.4
    return ramp(noise, shades(rng, family, 4, contrast))


def grassy(rng: np.random.Generator, family: str) -> Image:
    """Short dark and bright strokes: grass, moss, hedge leaves."""
    fine = spectral_noise(rng, 0.35, (0.6, 1.6)) * 0.8 + spectral_noise(rng, 1.3) * 0.7
    return ramp(fine, shades(rng, family, 5, 0.75))


@njit(cache=True)
def _paint_discs(
    index: Int[np.ndarray, "n n"],
    radii: Float[np.ndarray, "k"],
    xs: Float[np.ndarray, "k"],
    ys: Float[np.ndarray, "k"],
    stretch: float,
    angle: Float[np.ndarray, "k"],
) -> None:
    n = index.shape[0]
    for k in range(len(radii)):
        r, c, s = radii[k], np.cos(angle[k]), np.sin(angle[k])
        reach = int(r * stretch) + 1
        for j in range(-reach, reach + 1):
            for i in range(-reach, reach + 1):
                u, v = (i * c + j * s) / stretch, -i * s + j * c
                if u * u + v * v <= r * r:
                    y, x = (int(ys[k]) + j) % n, (int(xs[k]) + i) % n
                    if index[y, x] < 0:
                        index[y, x] = k


def dead_leaves(rng: np.random.Generator, family: str, biggest: float, stretch: float = 1.0) -> Image:
    """Overlapping discs with the r^-3 law of natural images: litter, gravel, pebbles, foliage."""
    count, r_min = 3500, 1.0
    u = rng.uniform(0, 1, count)
    radii = 1.0 / np.sqrt((1 - u) / r_min**2 + u / biggest**2)
    index = np.full((N, N), -1, np.int32)
    xs, ys = rng.uniform(0, N, (2, count))
    _paint_discs(index, radii, xs, ys, stretch, rng.uniform(0, np.pi, count))
    palette = np.array([pick_colour(rng, family) for _ in range(6)])
    base = palette.mean(0)
    colours = base + 0.8 * (palette[rng.integers(6, size=count + 1)] - base)
    colours *= rng.uniform(0.6, 1.25, (count + 1, 1))
    shade = 1 + 0.08 * spectral_noise(rng, 0.8)[..., None]
    return colours[index] * shade


@njit(cache=True)
def _voronoi(
    xs: Float[np.ndarray, "k"], ys: Float[np.ndarray, "k"], n: int
) -> tuple[Int[np.ndarray, "n n"], Float[np.ndarray, "n n"]]:
    ids, edge = np.zeros((n, n), np.int32), np.zeros((n, n))
    for y in range(n):
        for x in range(n):
            d0 = d1 = 1e9
            for k in range(len(xs)):
                dx, dy = abs(x - xs[k]), abs(y - ys[k])
                dx, dy = min(dx, n - dx), min(dy, n - dy)
                d = np.sqrt(dx * dx + dy * dy)
                if d < d0:
                    d1, d0 = d0, d
                    ids[y, x] = k
                elif d < d1:
                    d1 = d
            edge[y, x] = d1 - d0
    return ids, edge


def cells(rng: np.random.Generator, family: str, count: int, joint: float) -> Image:
    """Irregular stones with dark joints: rubble walls, crazy paving, cobbles."""
    side = int(np.ceil(np.sqrt(count)))
    gy, gx = np.divmod(np.arange(side * side), side)
    xs = (gx + rng.uniform(0.1, 0.9, side * side)) * N / side % N
    ys = (gy + rng.uniform(0.1, 0.9, side * side)) * N / side % N
    ids, edge = _voronoi(xs, ys, N)
    colours = np.array([pick_colour(rng, family) for _ in range(5)])
    colours = colours.mean(0) + 0.5 * (colours[rng.integers(5, size=side * side)] - colours.mean(0))
    stone = colours[ids] * (rng.uniform(0.8, 1.15, side * side)[ids] + 0.08 * spectral_noise(rng, 1.0))[..., None]
    w = np.clip(edge / joint, 0.0, 1.0)[..., None]
    return stone * (0.45 + 0.55 * w)


def courses(rng: np.random.Generator, family: str, rows: int, columns: int, offset: float, joint: int) -> Image:
    """Rows of blocks with joints: brick, ashlar, roof tiles, floor tiles, planks (one column), parquet."""
    y, x = np.mgrid[0:N, 0:N]
    row = y * rows // N
    shift = (row * offset % 1.0) * N / columns
    col = ((x + shift) % N) * columns / N
    block = row * columns + col.astype(int)
    v, u = (y * rows % N) / rows, (col % 1.0) * N / columns
    colours = np.array([pick_colour(rng, family) for _ in range(4)])
    base, vary = colours.mean(0), rng.uniform(0.1, 0.4)
    colours = base + vary * (colours[rng.integers(4, size=rows * columns)] - base)
    out = colours[block] * (1 + vary * 0.35 * rng.normal(0, 1, rows * columns)[block])[..., None]
    out *= 1 + 0.07 * spectral_noise(rng, 0.9)[..., None]
    mortar = pick_colour(rng, "concrete") * rng.uniform(0.6, 1.15)
    gap = (v < joint) | ((u < joint) & (columns > 1))
    out[gap] = 0.4 * out[gap] + 0.6 * mortar
    out[(v >= joint) & (v < joint + 1)] *= 1.1
    return out


def planks(rng: np.random.Generator, family: str, boards: int) -> Image:
    """Boards along u with grain, end joints and dark gaps."""
    grain = spectral_noise(rng, 0.9, (0.35, 5.0))
    y, x = np.mgrid[0:N, 0:N]
    board = y * boards // N
    ends = rng.integers(0, N, boards)
    tone = rng.normal(0, 1, (boards, 2))
    half = (((x - ends[board]) % N) > N * 0.55).astype(int)
    colours = np.array([pick_colour(rng, family, 0.5) for _ in range(2)])
    base = colours[0] * 0.8 + colours[1] * 0.2
    out = base * (1 + 0.12 * grain + 0.1 * tone[board, half])[..., None]
    gap = ((y * boards % N) < boards * 1.2) | (((x - ends[board]) % N) < 1)
    out[gap] *= 0.5
    return out


def fabric(rng: np.random.Generator) -> Image:
    """Woven cloth: plain, striped or checked."""
    a, b = pick_colour(rng, "fabric"), pick_colour(rng, "fabric")
    y, x = np.mgrid[0:N, 0:N]
    style, period = rng.integers(4), 2 ** rng.integers(3, 6)
    w = np.zeros((N, N))
    if style == 1:
        w = (x % period < period * 0.4).astype(float)
    elif style == 2:
        w = 0.5 * (x % period < period // 2) + 0.5 * (y % period < period // 2)
    elif style == 3:
        w = np.clip(spectral_noise(rng, 1.6) * 3, 0, 1)
    out = a + 0.6 * w[..., None] * (b - a)
    weave = 0.06 * (((x // 2 + y // 2) % 2) - 0.5) + 0.05 * spectral_noise(rng, 0.3)
    return out * (1 + weave)[..., None]


def facade(rng: np.random.Generator, lit: bool) -> Image:
    """A storey with two windows: wall, frames, sills, glass that mirrors the sky or is lit from inside."""
    wall_kind = ("plaster", "brick", "concrete", "stone", "plaster")[rng.integers(5)]
    img = courses(rng, "brick", 32, 8, 0.5, 1) if wall_kind == "brick" else cloudy(rng, wall_kind, 0.18)
    columns = int(rng.integers(1, 4))
    frame = pick_colour(rng, "paint") if rng.random() < 0.6 else pick_colour(rng, "wood")
    width = rng.uniform(0.32, 0.75)
    top, bottom = int(N * rng.uniform(0.14, 0.26)), int(N * rng.uniform(0.66, 0.9))
    glass = pick_colour(rng, "glass")
    for c in range(columns):
        x0 = int((c + 0.5 - width / 2) * N / columns)
        x1 = int((c + 0.5 + width / 2) * N / columns)
        img[top - 3 : bottom + 4, x0 - 2 : x1 + 3] = img[top - 3 : bottom + 4, x0 - 2 : x1 + 3] * 0.4 + 0.6 * frame
        pane = glass * np.linspace(1.5, 0.7, bottom - top)[:, None, None] * rng.uniform(0.7, 1.3)
        if lit and rng.random() < 0.5:
            pane = np.array([0.95, 0.78, 0.5]) * np.linspace(0.9, 1.0, bottom - top)[:, None, None]
        img[top:bottom, x0:x1] = np.clip(pane, 0, 1)
        if rng.random() < 0.7:
            img[top:bottom, (x0 + x1) // 2 - 1 : (x0 + x1) // 2 + 1] = frame
            img[(2 * top + bottom) // 3, x0:x1] = frame
        img[bottom + 3 : bottom + 6, x0 - 4 : x1 + 4] *= 0.7
    img[:3] *= rng.uniform(0.7, 1.1)
    return img


def lettering(rng: np.random.Generator) -> Image:
    """A sign board or poster: blocks of strokes on a plain ground, framed."""
    ground, ink = pick_colour(rng, "sign"), pick_colour(rng, "sign")
    if abs(ground.sum() - ink.sum()) < 0.6:
        ink = np.full(3, 0.92) if ground.sum() < 1.5 else np.full(3, 0.12)
    img = np.broadcast_to(ground, (N, N, 3)).copy()
    rows = int(rng.integers(1, 5))
    for r in range(rows):
        y0, y1 = int(N * (0.15 + 0.7 * r / rows)), int(N * (0.15 + 0.7 * (r + 0.65) / rows))
        x = int(N * rng.uniform(0.08, 0.2))
        while x < N * 0.85:
            w = int(rng.uniform(0.3, 0.8) * (y1 - y0)) + 2
            glyph = rng.random((5, 3)) < 0.55
            patch = np.kron(glyph, np.ones(((y1 - y0) // 5 + 1, w // 3 + 1)))[: y1 - y0, :w].astype(bool)
            region = img[y0:y1, x : x + w]
            region[patch[:, : region.shape[1]]] = ink
            x += w + 2 + int(rng.random() < 0.15) * w
    return img


def books(rng: np.random.Generator) -> Image:
    """A row of book spines, for shelves."""
    img = np.zeros((N, N, 3)) + 0.06
    for shelf in range(2):
        x, floor = 0, (shelf + 1) * 64 - 4
        while x < N - 3:
            w, h = int(rng.integers(4, 13)), int(rng.integers(38, 58))
            colour = pick_colour(rng, "fabric" if rng.random() < 0.7 else "sign")
            img[floor - h : floor, x : x + w - 1] = colour
            img[floor - h + 8 : floor - h + 12, x : x + w - 1] = colour * 0.6 + 0.3
            x += w
        img[floor : floor + 4] = pick_colour(rng, "wood")
    return img


def painting(rng: np.random.Generator) -> Image:
    """A small landscape or abstract picture for a wall."""
    v = np.linspace(0, 1, N)[:, None, None]
    sky = pick_colour(rng, "glass") * 0.4 + 0.5
    land = pick_colour(rng, ("grass", "autumn", "sand", "stone")[rng.integers(4)])
    ridge = 0.5 + 0.07 * np.cumsum(spectral_noise(rng, 1.2)[0])[None, :, None] / 12
    img = np.where(v < ridge, sky * (0.8 + 0.3 * v), land * (1.1 - 0.3 * v))
    return img * (1 + 0.12 * spectral_noise(rng, 1.0))[..., None]
