"""Which natural outdoor places are there, and how are they laid out?

Forest, hills, waterside, park, canyon and an abstract heap of solids. Each function fills a builder.
"""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float
from scipy.ndimage import gaussian_filter

from lyra.training.worlds import layout as lo
from lyra.training.worlds import props_nature as pn
from lyra.training.worlds import props_street as ps
from lyra.training.worlds.builder import Builder, Frame

Grid = Float[np.ndarray, "n n"]


def _axes(n: int, cell: float) -> tuple[Grid, Grid]:
    c = (np.arange(n) - 0.5 * (n - 1)) * cell
    x, z = np.meshgrid(c, c)
    return x, z


def _fractal(rng: np.random.Generator, n: int, cycles: float, ridged: bool = False) -> Grid:
    """Noise with unit deviation and about ``cycles`` hills across the grid; ridged noise has crests like mountains."""

    def layer(low: float, power: float) -> Grid:
        fy, fx = np.fft.fftfreq(n)[:, None] * n, np.fft.rfftfreq(n)[None] * n
        amplitude = 1.0 / np.maximum(np.hypot(fx, fy), low) ** power
        phase = rng.uniform(0, 2 * np.pi, amplitude.shape)
        out = np.fft.irfft2(amplitude * np.exp(1j * phase), (n, n))
        return (out - out.mean()) / out.std()

    if not ridged:
        return layer(cycles, 2.4)
    out = 1.2 - np.abs(layer(cycles, 2.6)) + 0.12 * layer(2 * cycles, 1.8)
    return out / out.std()


def _scatter(b: Builder, count: int, radius: float, keep_off: float) -> list[Frame]:
    """Spots on the ground within a radius of the origin, denser near it, off a track along z."""
    r, out = b.rng, []
    for _ in range(count):
        a, q = r.uniform(0, 2 * math.pi), radius * r.uniform(0.03, 1.0) ** 0.8
        x, z = q * math.cos(a), q * math.sin(a)
        if abs(x) >= keep_off:
            out.append(b.spot(x, z, r.uniform(0, 6)))
    return out


def forest(b: Builder) -> None:
    """Wood with a path, undergrowth, rocks and logs."""
    r = b.rng
    n, cell = 160, 1.0
    x, _ = _axes(n, cell)
    height = _fractal(r, n, 5) * r.uniform(0.4, 2.2)
    path = r.random() < 0.7
    near = np.exp(-((x / 3.0) ** 2)) if path else np.zeros_like(x)
    height = height * (1 - 0.8 * near)
    blend = np.clip(1.5 - np.abs(x) / 0.9, 0, 1) if path else np.zeros_like(x)
    floor = b.tex(str(r.choice(["litter", "grass", "litter", "autumn"])), 1.6, bump=0.5)
    b.field_ground(height, blend, cell, floor, b.tex(str(r.choice(["soil", "gravel", "litter"])), 1.6))
    b.describe("forest floor", "leaf-strewn", floor)
    flora, kind = pn.make_flora(b), str(r.choice(["pine", "mixed", "beech", "mixed"]))
    spots = _scatter(b, int(r.integers(80, 170)), 45, 1.6 if path else 0.0)
    for f in spots:
        h = r.uniform(6, 15)
        if kind == "pine":
            pn.pine(b, f, flora, h * 1.2) if r.random() < 0.7 else pn.bare_tree(b, f, flora, h)
        elif kind == "beech":
            pn.leafy_tree(b, f, flora, h) if r.random() < 0.6 else pn.bare_tree(b, f, flora, h * 1.2)
        else:
            pn.random_tree(b, f, flora, h)
    stone = b.tex("rock", 1.2, bump=0.4)
    for f in _scatter(b, 60, 22, 1.2 if path else 0.0):
        u = r.random()
        if u < 0.4:
            pn.bush(b, f, flora, r.uniform(0.3, 0.9))
        elif u < 0.75:
            pn.tuft(b, f, flora, r.uniform(0.3, 0.8))
        elif u < 0.92:
            pn.rock(b, f, stone, r.uniform(0.2, 0.9))
        else:
            b.post(f, 0, 0.25, 0, 0.28, r.uniform(1, 3), flora.bark, top=0.8, pitch=math.pi / 2)
            b.note("fallen log")
    b.place = {"pine": "a pine forest", "beech": "a wood", "mixed": "a mixed forest"}[kind]
    b.axis = 0.0 if path else None
    b.region = (-1.5, 1.5, -22, 22) if path else (-18, 18, -18, 18)


def hills(b: Builder) -> None:
    """Open country: meadows, dunes or snow with mountains, a trail, fences and lone trees."""
    r = b.rng
    n, cell = 256, 2.2
    x, z = _axes(n, cell)
    q = np.hypot(x, z)
    kind = str(r.choice(["meadows", "moorland", "dunes", "snowfields"], p=[0.5, 0.2, 0.15, 0.15]))
    mountains = _fractal(r, n, 5, ridged=True) * r.uniform(6, 26) * np.clip((q - 50) / 150, 0, 1)
    height = _fractal(r, n, 4) * r.uniform(1.0, 3.5) * np.clip(q / 20, 0.15, 1.0) + np.maximum(mountains, 0)
    bend = 5 * np.sin(z * 0.03 + r.uniform(0, 6))
    trail = r.random() < 0.6
    blend = np.clip(1.5 - np.abs(x - bend) / 1.0, 0, 1) if trail else np.clip((_fractal(r, n, 3) - 1.2), 0, 1)
    rocky = np.clip(np.hypot(*np.gradient(height, cell)) * 2.2 - 0.9, 0, 1)
    ground = {"meadows": "grass", "moorland": "grass", "dunes": "sand", "snowfields": "snow"}[kind]
    second = {"dunes": "sand", "snowfields": "rock"}.get(
        kind, "rock" if not trail else str(r.choice(["soil", "gravel"]))
    )
    a = b.tex(ground, 3.0, 0.2, bump=0.35)
    b.field_ground(height, np.maximum(blend, rocky), cell, a, b.tex(second, 3.0))
    b.describe("ground", {"grass": "grassy", "sand": "sandy", "snow": "snowy"}[ground], a)
    flora, stone = pn.make_flora(b), b.tex("rock", 1.5, bump=0.5)
    trees = int(r.integers(5, 60)) if kind != "dunes" else 4
    for f in _scatter(b, trees, 90, 3.0):
        pn.random_tree(b, f, flora, r.uniform(3, 10))
    for f in _scatter(b, 45, 25, 1.2):
        u = r.random()
        if u < 0.3:
            pn.bush(b, f, flora, r.uniform(0.3, 0.9))
        elif u < 0.6:
            pn.tuft(b, f, flora, r.uniform(0.3, 0.7))
        else:
            pn.rock(b, f, stone, r.uniform(0.2, 1.6))
    if r.random() < 0.5:
        style, side = int(r.integers(0, 5)), float(r.choice([-1, 1])) * r.uniform(2.5, 6)
        for i in range(10):
            ps.fence(b, b.spot(side, (i - 5) * 4.0, math.pi / 2), 4.0, r.uniform(0.9, 1.3), style)
    for _ in range(int(r.integers(0, 3))):
        f = b.spot(r.uniform(-45, 45), r.uniform(20, 60) * float(r.choice([-1, 1])), r.uniform(0, 6))
        ps.house(b, f.at(0, 0, 0, -0.5), 8, 6, int(r.integers(1, 3)), ps.house_look(b), False)
    b.place = f"{kind} in hilly country"
    b.region = (-14, 14, -14, 14)


def waterside(b: Builder) -> None:
    """Lake, sea shore, river bank or quay with boats, reeds and far hills."""
    r = b.rng
    n, cell = 200, 2.0
    x, z = _axes(n, cell)
    shore = 3.0 * np.sin(z * 0.06 + r.uniform(0, 6)) + 1.5 * np.sin(z * 0.17)
    width = float(r.choice([12, 30, 120]))
    inside = x - shore
    bank = np.where(inside < 0, -0.16 * inside, -0.25 * np.minimum(inside, 6))
    far = np.where(inside > width, 0.3 * (inside - width) - 1.5, bank)
    hills_ = (
        np.maximum(_fractal(r, n, 5, ridged=True), 0) * r.uniform(3, 16) * np.clip((np.hypot(x, z) - 60) / 90, 0, 1)
    )
    base = np.clip(np.where(inside > width, np.minimum(far, 3.0), bank), -1.5, 3.5)
    height = gaussian_filter(base, 1.0) + 0.1 * _fractal(r, n, 6) + np.where(inside < width, 0, hills_)
    height += np.where(inside < -25, hills_, 0)
    sandy = r.random() < 0.5
    beach = b.tex("sand" if sandy else "gravel", 2.0, bump=0.2)
    blend = np.clip(1.2 - np.maximum(height - 0.5, 0) / 0.5, 0, 1)
    b.field_ground(height, blend, cell, b.tex("grass", 2.5, bump=0.4), beach)
    water = b.colour("glass", "foam", 4.0, mirror=0.92, spec=0.8)
    b.box(Frame(), 180, -0.55, 0, (260, 0.45, 380), water)
    b.describe("shore", "sandy" if sandy else "pebbly", beach)
    flora, stone, wood = pn.make_flora(b), b.tex("rock", 1.2, bump=0.4), b.tex("plank", 1.2)
    for _ in range(70):
        px, pz = r.uniform(-35, 5), r.uniform(-40, 40)
        f = b.spot(px, pz, r.uniform(0, 6))
        u = r.random()
        if -f.y < -0.05 and u > 0.3:
            continue
        if u < 0.3:
            pn.rock(b, f, stone, r.uniform(0.2, 1.2))
        elif u < 0.5:
            pn.tuft(b, f, flora, r.uniform(0.4, 1.0))
        elif u < 0.6:
            pn.bush(b, f, flora, r.uniform(0.4, 1.0))
        elif px < -6:
            pn.random_tree(b, f, flora, r.uniform(4, 11)) if r.random() < 0.8 else pn.palm(b, f, flora, 6.0)
    for _ in range(18):
        px, pz = width + r.uniform(4, 30), r.uniform(-60, 60)
        if width < 60:
            pn.random_tree(b, b.spot(px, pz, r.uniform(0, 6)), flora, r.uniform(4, 10))
    if r.random() < 0.6:
        g = Frame(2.0, r.uniform(-8, 8), math.pi / 2)
        b.box(g, 0, 0.25, 6, (0.9, 0.05, 7), wood)
        for i in range(8):
            for s in (-0.85, 0.85):
                b.post(g, s, -0.1, i * 1.8, 0.08, 0.9, flora.bark)
        b.note("jetty")
    for _ in range(int(r.integers(0, 5))):
        boat(b, Frame(r.uniform(4, 25), r.uniform(-25, 25), r.uniform(0, 6), 0.1))
    if r.random() < 0.4:
        for i in range(4):
            f = b.spot(-r.uniform(9, 16), (i - 1.5) * 12.0, math.pi / 2)
            ps.house(b, f.at(0, 0, 0, -0.6), r.uniform(6, 10), 6, int(r.integers(1, 4)), ps.house_look(b))
    for _ in range(4):
        f = b.spot(r.uniform(-8, -2), r.uniform(-15, 15), r.uniform(0, 6))
        ps.bench(b, b.spot(f.x, f.z, math.pi / 2)) if r.random() < 0.5 else ps.person(b, f)
    b.place = "a lake shore" if width > 60 else "a river bank" if width < 20 else "the shore of a pond"
    b.region, b.axis = (-9, -0.5, -20, 20), math.pi / 2


def boat(b: Builder, f: Frame) -> None:
    """Rowing boat or small sailing boat afloat at the level of f."""
    hull = b.colour("car") if b.rng.random() < 0.5 else b.tex("plank", 1.0)
    b.add(lo.PYRAMID, f, 0, 0.1, 0, (0.75, 0.35, 2.2), hull, roll=math.pi, shape=(0.6, 1.0))
    b.box(f, 0, 0.47, 0, (0.5, 0.02, 1.6), b.tex("wood", 0.8))
    if b.rng.random() < 0.5:
        b.post(f, 0, 2.6, 0.2, 0.05, 2.4, b.colour("paint"))
        b.add(lo.GABLE, f, 0, 2.8, -0.6, (0.9, 1.9, 0.02), b.colour("plaster"), yaw=math.pi / 2, shape=(0.0, 1.0))
    b.note("boat")


def park(b: Builder) -> None:
    """Lawns with paths, flower beds, hedges, benches, trees and a pond or pavilion."""
    r = b.rng
    path = b.tex(str(r.choice(["gravel", "paving", "sand"])), 1.8)
    lawn = b.tex("grass", 2.2, bump=0.5)
    b.flat_ground(lawn, b.tex("grass", 2.0), 0.7)
    b.describe("lawn", "mown", lawn)
    flora, o, stone = pn.make_flora(b), Frame(), b.tex("ashlar", 1.2)
    w = r.uniform(1.2, 2.4)
    b.box(o, 0, 0.01, 0, (w, 0.015, 45), path)
    b.box(o, 0, 0.012, r.uniform(-6, 6), (45, 0.015, w * 0.8), path)
    b.post(o, 0, 0.014, 0, w * 2.4, 0.016, path)
    if r.random() < 0.5:
        ps.fountain(b, o, stone, b.colour("glass", "foam", 2.0, mirror=0.9), 1.8)
    else:
        ps.statue(b, o, stone)
    hedge = r.random() < 0.5
    for i in range(12):
        for s in (-1, 1):
            z = (i - 5.5) * 5.0
            f = Frame(s * (w + 0.7), z, -s * math.pi / 2)
            u = r.random()
            if hedge and abs(z) > 6:
                ps.fence(b, f.at(0, -1.2), 5.0, r.uniform(0.7, 1.6), 4)
            if u < 0.25:
                ps.bench(b, f)
            elif u < 0.45:
                pn.flower_bed(b, f.at(0, -0.2, math.pi / 2), flora, 2.5, stone)
            elif u < 0.6 and len(b.lamps) < 7:
                ps.lamp_post(b, f, 3.4)
            elif u < 0.7:
                ps.person(b, Frame(s * r.uniform(0, w), z, r.uniform(0, 6)))
    avenue = r.random() < 0.4
    for f in _scatter(b, 45, 42, w + 2.5):
        pn.random_tree(b, f, flora, r.uniform(4, 11)) if r.random() < 0.75 else pn.bush(
            b, f, flora, r.uniform(0.5, 1.2)
        )
    for i in range(12 if avenue else 0):
        for s in (-1, 1):
            pn.leafy_tree(b, Frame(s * (w + 2.6), (i - 5.5) * 6.0), flora, r.uniform(6, 9))
    if r.random() < 0.5:
        g = Frame(r.uniform(8, 14), r.uniform(-10, 10), -math.pi / 2)
        for i in range(6):
            a = i * math.pi / 3
            ps.column(b, g.at(2.2 * math.cos(a), 2.2 * math.sin(a)), 3.0, 0.16, stone)
        b.add(lo.CONE, g, 0, 3.6, 0, (2.9, 0.6, 2.9), b.tex("roof", 1.5), shape=(0.05, 1.0))
        b.note("pavilion")
    b.place, b.axis = str(r.choice(["a park", "a formal garden", "a public garden"])), 0.0
    b.region = (-w - 5, w + 5, -25, 25)


def canyon(b: Builder) -> None:
    """Gorge between rock walls, with boulders and dry shrubs."""
    r = b.rng
    n, cell = 160, 1.3
    x, z = _axes(n, cell)
    bend = r.uniform(-8, 8) * (np.cos(z * 0.055) - 1.0) + 2.0 * np.sin(z * 0.09)
    half = r.uniform(3.5, 8)
    side = np.clip((np.abs(x - bend) - half) / r.uniform(2, 8), 0, 1)
    strata = np.floor(side * 5) / 5 * 0.35 + side * 0.65
    height = strata * r.uniform(6, 18) * (1 + 0.2 * _fractal(r, n, 3)) + 0.25 * _fractal(r, n, 5)
    kind = str(r.choice(["rock", "sand", "soil"]))
    a = b.tex(kind, 2.5, bump=0.4)
    b.field_ground(height, np.clip(side * 3, 0, 1), cell, a, b.tex("rock", 3.5, 0.2, bump=0.5))
    b.describe("rock walls", "stone", b.tex("rock", 3.0))
    flora, stone = pn.make_flora(b), b.tex("rock", 1.4, bump=0.5)
    for _ in range(70):
        pz = r.uniform(-45, 45)
        centre = float(np.interp(pz, z[:, 0], bend[:, 0]))
        f = b.spot(centre + r.uniform(-1, 1) * half * 1.1, pz, r.uniform(0, 6))
        u = r.random()
        if u < 0.6:
            pn.rock(b, f, stone, r.uniform(0.2, 1.5))
        elif u < 0.8:
            pn.bush(b, f, flora, r.uniform(0.3, 0.8))
        elif u < 0.93:
            pn.tuft(b, f, flora, r.uniform(0.3, 0.8))
        else:
            pn.random_tree(b, f, flora, r.uniform(3, 6))
    b.place, b.axis = "a rocky canyon", 0.0
    b.region = (-half, half, -9, 9)


def solids(b: Builder) -> None:
    """Heap of random solids with random materials, for shapes and layouts that no other family has."""
    r = b.rng
    looks = [
        "plaster",
        "brick",
        "rubble",
        "wood",
        "fabric",
        "metal",
        "tile",
        "rock",
        "concrete",
        "picture",
        "leaves",
        "sign",
    ]
    ground = b.tex(str(r.choice(["soil", "concrete", "plank", "grass", "tile", "sand", "paving"])), 2.0, bump=0.2)
    b.flat_ground(ground, b.tex("soil", 2.0), 0.5)
    b.describe("ground", "plain", ground)
    scale = r.uniform(0.5, 1.5)
    for _ in range(int(r.integers(25, 90))):
        a, q = r.uniform(0, 2 * math.pi), 16 * scale * math.sqrt(r.uniform(0.01, 1))
        half = tuple(scale * np.exp(r.normal(-0.6, 0.6, 3)))
        m = b.tex(
            str(r.choice(looks)),
            scale * r.uniform(0.5, 2),
            0.25,
            spec=r.uniform(0, 0.6),
            bump=r.uniform(0, 0.4),
            bevel=0.1,
            mirror=0.4 * float(r.random() < 0.15),
        )
        kind = int(r.choice([lo.BOX, lo.BOX, lo.BALL, lo.CONE, lo.CONE, lo.GABLE, lo.PYRAMID, lo.ARCH]))
        shape = (
            (r.uniform(0.4, 0.85), r.uniform(0.6, 1.8)) if kind == lo.ARCH else (float(r.choice([0.0, 0.5, 1.0])), 1)
        )
        up = half[1] * r.uniform(0.6, 1.0) if r.random() < 0.8 else r.uniform(1, 5) * scale
        tilt = r.normal(0, 0.5, 2) if r.random() < 0.3 else (0.0, 0.0)
        f = Frame(q * math.cos(a), q * math.sin(a), r.uniform(0, 6))
        b.add(kind, f, 0, up, 0, half, m, shape=shape, pitch=tilt[0], roll=tilt[1])
    b.note("geometric solid", 30)
    if b.regime == "night":
        for _ in range(5):
            b.bulb(Frame(*r.uniform(-8, 8, 2)), 0, r.uniform(1.5, 4), 0, 0.15, 8.0, 0.5)
    b.place = "an open yard"
    b.region = (-10 * scale, 10 * scale, -10 * scale, 10 * scale)
