"""Which large or unusual interiors are there?

Nave, museum, warehouse and station hall; a close-up table top; a stairwell; a subway or garage. Each function fills a
builder.
"""

from __future__ import annotations

import math

from lyra.training.worlds import layout as lo
from lyra.training.worlds import props_indoor as pi
from lyra.training.worlds import props_street as ps
from lyra.training.worlds.builder import Builder, Frame, Material
from lyra.training.worlds.families_indoor import Opening, _outlook, _window_wall, shell, wall


def hall(b: Builder) -> None:
    """Large hall: church, museum, warehouse, library or station."""
    r = b.rng
    b.indoor, b.axis = True, 0.0
    kind = str(r.choice(["church nave", "museum hall", "warehouse", "library", "station hall"]))
    w, length, h = r.uniform(8, 18), r.uniform(14, 36), r.uniform(4.5, 10)
    n = int(length / r.uniform(3.5, 5.5))
    openings: list[list[Opening]] = [[], [], [], []]
    for i in (1, 3):
        if r.random() < 0.75:
            openings[i] = [(a, c, h * 0.4, h * 0.85) for a, c, _, _ in _window_wall(b, length, h, n)]
    shell(b, w, length, h, openings)
    _outlook(b, w, length)
    b.place = f"a {kind}"
    b.region = (-w / 2 + 1, w / 2 - 1, -length / 2 + 1, length / 2 - 1)
    stone = b.tex(str(r.choice(["ashlar", "plaster", "concrete", "rock"])), 1.5)
    aisle = w * r.uniform(0.2, 0.32)
    step = length / n
    if kind in ("church nave", "museum hall", "station hall"):
        for i in range(n + 1):
            for s in (-1, 1):
                ps.column(b, Frame(s * aisle, i * step - length / 2), h * 0.72, r.uniform(0.28, 0.33), stone)
        for i in range(n):
            for s in (-1, 1):
                g = Frame(s * aisle, (i + 0.5) * step - length / 2, math.pi / 2, -h * 0.72)
                b.add(lo.ARCH, g, 0, h * 0.14, 0, (step / 2, h * 0.14, 0.3), stone, shape=(0.86, 1.6))
    _hall_goods(b, kind, w, length, h, aisle)
    for i in range(min(6, n)):
        z = (i + 0.5) * length / min(6, n) - length / 2
        power = 14.0 if b.regime == "night" else 5.0
        if kind == "warehouse":
            pi.panel_light(b, Frame(0, z), h, (0.15, 0.9), power, 0.1)
        else:
            pi.pendant(b, Frame(0, z), h, h * 0.35, power)


def _hall_goods(b: Builder, kind: str, w: float, length: float, h: float, aisle: float) -> None:
    """Fill a hall with what belongs there."""
    r, wood = b.rng, b.tex("wood", 1.0)
    rows = int(length / 1.6)
    if kind == "church nave":
        for i in range(rows):
            for s in (-1, 1):
                ps.bench(b, Frame(s * aisle * 0.5, -length * 0.3 + i * 1.1, math.pi)) if i < rows * 0.7 else None
        b.box(Frame(0, -length / 2 + 2.0), 0, 0.5, 0, (1.2, 0.5, 0.5), b.tex("rock", 1.0))
        pi.picture(b, Frame(0, -length / 2 + 0.05), h * 0.45, 2.5, 3.0)
    elif kind == "museum hall":
        for _ in range(8):
            ps.statue(
                b, Frame(r.uniform(-0.4, 0.4) * w, r.uniform(-0.45, 0.45) * length, r.uniform(0, 6)), b.tex("rock", 1.0)
            )
        for i in range(int(length / 3)):
            for s in (-1, 1):
                g = Frame(s * w / 2, (i + 0.5) * 3 - length / 2, -s * math.pi / 2)
                pi.picture(b, g, 1.8, r.uniform(0.6, 1.8), r.uniform(0.6, 1.4))
    elif kind == "warehouse":
        for _ in range(14):
            x, z = r.uniform(-0.45, 0.45) * w, r.uniform(-0.45, 0.45) * length
            for j in range(int(r.integers(1, 4))):
                pi.crate(b, Frame(x, z, 0, -j * 0.9), 0.9)
        for _ in range(10):
            pi.barrel(b, Frame(r.uniform(-0.45, 0.45) * w, r.uniform(-0.45, 0.45) * length), 0.9)
        for i in range(3):
            pi.shelf(b, Frame(-w / 2 + 0.3, (i - 1) * 4.0, math.pi / 2), 3.0, 2.6, b.colour("metal"))
        steel = b.colour("metal")
        for i in range(int(length / 4)):
            b.box(Frame(), 0, h - 0.4, (i + 0.5) * 4 - length / 2, (w / 2, 0.15, 0.1), steel)
    elif kind == "library":
        for i in range(int(length / 2.2)):
            for s in (-1, 1):
                g = Frame(s * w * 0.3, (i + 0.5) * 2.2 - length / 2)
                b.box(g, 0, 1.15, 0, (w * 0.16, 1.15, 0.22), b.tex("books", 0.65))
                b.box(g, 0, 2.35, 0, (w * 0.165, 0.06, 0.25), wood)
                for e in (-1, 1):
                    b.box(g, e * w * 0.16, 1.2, 0, (0.04, 1.2, 0.25), wood)
        b.note("bookcase", 8)
    else:
        for i in range(int(length / 4)):
            ps.bench(b, Frame(0, (i + 0.5) * 4 - length / 2, math.pi * (i % 2)))
        b.box(Frame(0, -length / 2 + 0.1), 0, h * 0.6, 0, (1.6, 0.6, 0.05), b.tex("sign", 1.0, stretch=True))
    for _ in range(int(r.integers(0, 9))):
        ps.person(b, Frame(r.uniform(-0.4, 0.4) * w, r.uniform(-0.45, 0.45) * length, r.uniform(0, 6)))


def tabletop(b: Builder) -> None:
    """Close view of things on a table in a room."""
    r = b.rng
    b.indoor = True
    w, d = r.uniform(3.5, 6), r.uniform(3.5, 6)
    shell(b, w, d, 2.7, [_window_wall(b, w, 2.7, 2), [], _window_wall(b, w, 2.7, 1), []])
    _outlook(b, w, d)
    o = Frame(r.uniform(-0.4, 0.4), r.uniform(-0.4, 0.4), r.uniform(0, 6))
    tw, td = r.uniform(1.2, 2.0), r.uniform(0.8, 1.2)
    pi.table(b, o, tw, td, 0.75, b.tex("plank" if r.random() < 0.5 else "wood", 0.9))
    top = o.at(0, 0, 0, 0.75)
    if r.random() < 0.4:
        b.box(top, 0, 0.006, 0, (tw * 0.3, 0.006, td * 0.52), b.tex("fabric", 0.5))
    pi.tableware(b, top, tw, td, int(r.integers(10, 22)))
    for _ in range(int(r.integers(1, 4))):
        g = top.at(r.uniform(-0.4, 0.4) * tw, r.uniform(-0.3, 0.3) * td, r.uniform(0, 6))
        pi.vase(b, g, r.uniform(0.2, 0.4))
        for _ in range(5):
            x, z = r.normal(0, 0.06, 2)
            b.ball(g, x, r.uniform(0.4, 0.55), z, (0.04, 0.035, 0.04), b.colour("flower", bump=0.6))
    m = b.tex("fabric", 0.4)
    for _ in range(3):
        g = top.at(r.uniform(-0.4, 0.4) * tw, r.uniform(-0.3, 0.3) * td, r.uniform(0, 6))
        for j in range(int(r.integers(1, 5))):
            b.box(g, 0, 0.02 + 0.04 * j, 0, (0.1, 0.018, 0.14), b.colour("fabric"), yaw=r.normal(0, 0.2))
    b.note("book", 6)
    for i in range(3):
        pi.chair(b, o.at((i - 1) * 0.7, -td / 2 - 0.2), b.tex("wood", 0.8), m)
    pi.cupboard(b, Frame(0, -d / 2 + 0.25), 1.8, 1.1, 0.45, b.tex("wood", 1.0))
    pi.plant(b, Frame(w / 2 - 0.5, -d / 2 + 0.5), 1.3)
    pi.shelf(b, Frame(-w / 2 + 0.2, 0.0, math.pi / 2), 1.4, 1.9, b.tex("wood", 1.0))
    pi.pendant(b, o, 2.7, 0.7, 4.0 if b.regime == "night" else 1.0)
    b.place = "a table top"
    b.region = (o.x - 1.1, o.x + 1.1, o.z - 1.1, o.z + 1.1)


def stairwell(b: Builder) -> None:
    """Entrance hall with a staircase and a gallery."""
    r = b.rng
    b.indoor = True
    w, d, h = r.uniform(4.5, 8), r.uniform(7, 12), r.uniform(5.2, 6.5)
    frames = shell(b, w, d, h, [_window_wall(b, w, 5.0, 2), [], [], []])
    _outlook(b, w, d)
    m = b.tex(str(r.choice(["plank", "ashlar", "concrete"])), 1.2)
    n, width = 16, min(1.6, w * 0.3)
    s = float(r.choice([-1, 1]))
    start = Frame(s * (w / 2 - width / 2 - 0.02), d / 2 - 2.2, math.pi)
    ps.stairs(b, start, width, n, m)
    gallery = n * 0.17
    run = d - 2.2 - n * 0.3
    b.box(Frame(), 0, gallery - 0.12, -d / 2 + run / 2, (w / 2, 0.12, max(run / 2, 0.6)), m)
    rail = b.colour("metal", cut=lo.CUT_BARS, cut_level=0.82, cut_freq=8.0)
    hand = b.tex("wood", 0.8)
    edge = -d / 2 + max(run, 1.2)
    b.box(Frame(0, edge), -s * width / 2, gallery + 0.45, 0, (w / 2 - width / 2, 0.45, 0.012), rail)
    b.box(Frame(0, edge), -s * width / 2, gallery + 0.92, 0, (w / 2 - width / 2, 0.03, 0.04), hand)
    slope = math.atan2(0.17, 0.3)
    x = -width / 2 if s < 0 else width / 2
    b.box(start, -x * 0.96, n * 0.085 + 0.85, n * 0.15, (0.03, 0.03, n * 0.17), hand, pitch=slope)
    for i in range(n):
        b.box(start, -x * 0.96, (i + 1) * 0.17 + 0.4, (i + 0.5) * 0.3, (0.012, 0.42, 0.012), b.colour("metal"))
    for i in (1, 3):
        for _ in range(2):
            pi.picture(b, frames[i].at(r.uniform(-0.3, 0.3) * d, 0), r.uniform(1.5, 3.8), r.uniform(0.5, 1), 0.7)
    pi.plant(b, frames[1].at(-0.4 * d * s, 0.5), 1.5)
    pi.cupboard(b, frames[2].at(0, 0.25), 1.4, 0.9, 0.4, b.tex("wood", 1.0))
    pi.pendant(b, Frame(0, d * 0.15), h, r.uniform(1, 2), 9.0 if b.regime == "night" else 3.0)
    b.place = "an entrance hall with a staircase"
    b.region = (-w / 2 + 0.7, w / 2 - 0.7, -d * 0.1, d / 2 - 0.6)


def garage(b: Builder) -> None:
    """Underground car park or subway: pillars, low ceiling, rows of lights."""
    r = b.rng
    b.indoor, b.axis = True, 0.0
    w, d, h = r.uniform(12, 24), r.uniform(16, 40), r.uniform(2.5, 3.6)
    concrete: Material = b.tex("concrete", 2.5)
    floor = b.tex(str(r.choice(["asphalt", "concrete", "tile"])), 2.0, mirror=float(r.choice([0.0, 0.3])))
    o = Frame()
    b.box(o, 0, -0.1, 0, (w / 2, 0.1, d / 2), floor)
    b.box(o, 0, h + 0.1, 0, (w / 2, 0.1, d / 2), concrete)
    paint = b.tex("paint", 2.0) if r.random() < 0.5 else concrete
    for i, (dist, length) in enumerate(((d / 2, w), (w / 2, d), (d / 2, w), (w / 2, d))):
        yaw = i * math.pi / 2
        wall(b, o.at(-dist * math.sin(yaw), -dist * math.cos(yaw), yaw), length + 0.2, h, [], paint)
    b.describe("walls", "concrete", paint)
    n = int(d / 5)
    band = b.colour("sign")
    for i in range(n):
        for s in (-1, 1):
            g = Frame(s * w * 0.18, (i + 0.5) * d / n - d / 2)
            b.box(g, 0, h / 2, 0, (0.22, h / 2, 0.22), concrete)
            b.box(g, 0, 0.9, 0, (0.225, 0.3, 0.225), band)
            for k in range(2):
                if r.random() < 0.55:
                    ps.car(b, g.at(s * w * 0.18, -1.4 + k * 2.6, math.pi / 2 + r.normal(0, 0.03)))
            b.box(g, s * w * 0.18, 0.004, 0, (2.4, 0.004, 0.06), b.colour("paint"))
        b.box(o, 0, h - 0.15, (i + 0.5) * d / n - d / 2, (w / 2, 0.16, 0.18), concrete)
    pipe = b.colour("metal", spec=0.4)
    for x in (-0.05 * w, 0.08 * w):
        b.post(o, x, h - 0.4, 0, 0.07, d / 2, pipe, pitch=math.pi / 2)
    for i in range(6):
        panel = Frame(0, (i + 0.5) * d / 6 - d / 2)
        pi.panel_light(b, panel, h - 0.02, (0.08, 0.7), r.uniform(3.5, 6), r.uniform(0, 0.4))
    for _ in range(int(r.integers(0, 4))):
        ps.person(b, Frame(r.uniform(-0.12, 0.12) * w, r.uniform(-0.45, 0.45) * d, r.uniform(0, 6)))
    b.box(Frame(0, -d / 2 + 0.1), 0, 1.8, 0, (0.9, 0.35, 0.04), b.tex("sign", 1.0, stretch=True))
    b.place = "an underground car park"
    b.region = (-w * 0.15, w * 0.15, -d / 2 + 1, d / 2 - 1)
