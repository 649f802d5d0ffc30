"""Which indoor places are there, and how are they laid out?

Room, corridor, hall, tabletop and stairwell. Each function fills a builder; light regimes and cameras are decided
elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from lyra.training.worlds import layout as lo
from lyra.training.worlds import props_indoor as pi
from lyra.training.worlds import props_street as ps
from lyra.training.worlds.builder import Builder, Frame, Material
from lyra.training.worlds.props_nature import leafy_tree, make_flora

Opening = tuple[float, float, float, float]


def wall(b: Builder, f: Frame, length: float, height: float, openings: Sequence[Opening], m: Material) -> None:
    """Wall along x with its inner face in z=0 of f (room towards +z) and openings (x0, x1, up0, up1)."""
    t, x = 0.12, -length / 2
    for x0, x1, up0, up1 in sorted(openings):
        if x0 > x:
            b.box(f, (x + x0) / 2, height / 2, -t, ((x0 - x) / 2, height / 2, t), m)
        if up0 > 0.01:
            b.box(f, (x0 + x1) / 2, up0 / 2, -t, ((x1 - x0) / 2, up0 / 2, t), m)
        if up1 < height - 0.01:
            b.box(f, (x0 + x1) / 2, (up1 + height) / 2, -t, ((x1 - x0) / 2, (height - up1) / 2, t), m)
        x = x1
    if x < length / 2:
        b.box(f, (x + length / 2) / 2, height / 2, -t, ((length / 2 - x) / 2, height / 2, t), m)


def glazing(b: Builder, f: Frame, o: Opening, m: Material) -> None:
    """Window frame with glazing bars, a sill, and daylight that enters through it."""
    x, up, w, h = (o[0] + o[1]) / 2, (o[2] + o[3]) / 2, (o[1] - o[0]) / 2, (o[3] - o[2]) / 2
    for s in (-1, 1):
        b.box(f, x + s * w, up, -0.1, (0.035, h, 0.05), m)
        b.box(f, x, up + s * h, -0.1, (w, 0.035, 0.05), m)
    b.box(f, x, up, -0.1, (0.022, h, 0.03), m)
    b.box(f, x, up + h * 0.3, -0.1, (w, 0.018, 0.03), m)
    b.box(f, x, o[2] - 0.03, 0.05, (w + 0.08, 0.02, 0.12), m)
    day = {"clear": 2.4, "overcast": 2.6, "golden": 1.8, "night": 0.0}[b.regime]
    if day > 0 and len(b.lamps) < 4:
        b.lamp(f, x, up, 0.15, day * w * h * 2.0, 0.25 if b.regime == "golden" else 0.05, 0.5 * w)
    if b.rng.random() < 0.4:
        cloth = b.tex("fabric", 0.7)
        for s in (-1, 1):
            for i in range(3):
                b.post(f, x + s * (w + 0.06 + 0.08 * i), up - 0.1, 0.08, 0.05, h + 0.3, cloth)
        b.box(f, x, o[3] + 0.22, 0.08, (w + 0.35, 0.015, 0.015), b.colour("metal"))
        b.note("curtain")
    b.note("window")


def door(b: Builder, f: Frame, x: float, m: Material, frame: Material) -> None:
    """Closed door on a wall face."""
    b.box(f, x, 1.04, 0.0, (0.52, 1.06, 0.03), frame)
    b.box(f, x, 1.0, 0.02, (0.43, 1.0, 0.03), replace(m, bevel=0.02))
    for up in (0.5, 1.5):
        b.box(f, x, up, 0.035, (0.3, 0.36, 0.025), replace(m, bevel=0.03))
    b.ball(f, x + 0.36, 1.0, 0.08, (0.03, 0.03, 0.03), b.colour("metal", spec=0.8))
    b.note("door")


def _finishes(b: Builder) -> tuple[Material, Material, Material]:
    """Wall, floor and ceiling of a dwelling."""
    r = b.rng
    u = r.random()
    if u < 0.62:
        walls, word = b.tex("paint" if u < 0.4 else "plaster", 2.5), "painted"
    elif u < 0.74:
        walls, word = b.tex("brick", 1.1, bump=0.15), "brick"
    elif u < 0.84:
        walls, word = b.tex("plank", 1.6), "timber"
    elif u < 0.92:
        walls, word = b.tex("fabric", 0.5), "papered"
    else:
        walls, word = b.tex("concrete", 2.5), "concrete"
    v = r.random()
    if v < 0.5:
        floor, what = b.tex("plank", r.uniform(0.9, 1.8), mirror=float(r.choice([0.0, 0.25]))), "wooden"
    elif v < 0.75:
        floor, what = b.tex("tile", r.uniform(0.6, 1.6), mirror=float(r.choice([0.0, 0.3]))), "tiled"
    elif v < 0.9:
        floor, what = b.tex("fabric", 1.0), "carpeted"
    else:
        floor, what = b.tex("concrete", 2.0, mirror=0.2), "concrete"
    b.describe("walls", word, walls)
    b.describe("floor", what, floor)
    ceiling = b.tex("paint", 3.0) if r.random() < 0.8 else b.tex("plank", 1.6)
    return walls, floor, ceiling


def shell(b: Builder, w: float, d: float, h: float, openings: list[list[Opening]]) -> list[Frame]:
    """Floor, ceiling, skirting and four walls; returns wall frames (z towards the room): back, right, front, left."""
    walls, floor, ceiling = _finishes(b)
    trim = b.colour("paint") if b.rng.random() < 0.7 else b.tex("wood", 0.8)
    origin = Frame()
    b.box(origin, 0, -0.1, 0, (w / 2 + 0.3, 0.1, d / 2 + 0.3), floor)
    b.box(origin, 0, h + 0.1, 0, (w / 2 + 0.3, 0.1, d / 2 + 0.3), ceiling)
    accent = b.tex("paint", 2.5) if b.rng.random() < 0.25 else walls
    frames = []
    for i, (dist, length) in enumerate(((d / 2, w), (w / 2, d), (d / 2, w), (w / 2, d))):
        yaw = i * math.pi / 2
        f = origin.at(-dist * math.sin(yaw), -dist * math.cos(yaw), yaw)
        frames.append(f)
        wall(b, f, length + 0.24, h, openings[i], accent if i == 0 else walls)
        for o in openings[i]:
            glazing(b, f, o, trim)
        if not any(o[2] < 0.1 for o in openings[i]):
            b.box(f, 0, 0.05, 0.005, (length / 2, 0.05, 0.012), trim)
    if b.rng.random() < 0.25:
        beam = b.tex("wood", 1.0)
        for i in range(int(d / 1.2)):
            b.box(origin, 0, h - 0.08, -d / 2 + 0.6 + 1.2 * i, (w / 2, 0.09, 0.08), beam)
    b.flat_ground(b.tex("grass", 2.0), b.tex("soil", 2.0), 1.0, -0.6)
    return frames


def _outlook(b: Builder, w: float, d: float) -> None:
    """Trees and a house outside the windows."""
    flora = make_flora(b)
    for _ in range(5):
        a, q = b.rng.uniform(0, 2 * math.pi), max(w, d) + b.rng.uniform(3, 14)
        leafy_tree(b, Frame(q * math.cos(a), q * math.sin(a), 0, 0.6), flora, float(b.rng.uniform(4, 9)))


def _window_wall(b: Builder, length: float, height: float, count: int) -> list[Opening]:
    w = min(float(b.rng.uniform(0.8, 2.0)), length / count * 0.7)
    low, high = float(b.rng.uniform(0.3, 1.0)), min(height - 0.25, 2.4)
    centres = [(i + 0.5) * length / count - length / 2 for i in range(count)]
    return [(c - w / 2, c + w / 2, low, high) for c in centres]


def room(b: Builder) -> None:
    """Living room, bedroom, kitchen, dining room or study."""
    r = b.rng
    b.indoor = True
    kind = str(r.choice(["living room", "bedroom", "kitchen", "dining room", "study"]))
    w, d, h = r.uniform(3.2, 7.5), r.uniform(3.2, 7.5), r.uniform(2.4, 3.3)
    openings: list[list[Opening]] = [[], [], [], []]
    for i in r.choice(4, size=int(r.integers(1, 3)), replace=False):
        openings[i] = _window_wall(b, w if i % 2 == 0 else d, h, int(r.integers(1, 3)))
    frames = shell(b, w, d, h, openings)
    _outlook(b, w, d)
    b.place = f"a {kind}"
    b.region = (-w / 2 + 0.4, w / 2 - 0.4, -d / 2 + 0.4, d / 2 - 0.4)
    lengths = (w, d, w, d)
    free = [i for i in range(4) if not openings[i]] or [0]
    wood, o = b.tex("wood", 1.0), Frame()
    door(b, frames[free[-1]], 0.3 * lengths[free[-1]], b.colour("paint", "wood") if r.random() < 0.5 else wood, wood)
    if r.random() < 0.6:
        rug = b.tex("fabric", 1.5)
        b.box(o, r.uniform(-0.5, 0.5), 0.008, r.uniform(-0.5, 0.5), (w * 0.28, 0.01, d * 0.24), rug)
        b.note("rug")
    {"living room": _living, "bedroom": _bedroom, "kitchen": _kitchen, "dining room": _dining, "study": _dining}[kind](
        b, frames, lengths, wood
    )
    for i in range(4):
        g, n = frames[i], lengths[i]
        for x in (-0.3 * n, 0.05 * n, 0.3 * n):
            if any(a - 0.5 < x < c + 0.5 for a, c, _, _ in openings[i]):
                continue
            u = r.random()
            if u < 0.22:
                pi.picture(b, g.at(x, 0), r.uniform(1.45, 1.75), r.uniform(0.3, 1.0), r.uniform(0.3, 0.8))
            elif u < 0.34:
                pi.shelf(b, g.at(x, 0.18), min(1.2, n * 0.22), r.uniform(1.0, 2.1), wood)
            elif u < 0.46:
                pi.cupboard(b, g.at(x, 0.25), min(1.1, n * 0.22), r.uniform(0.8, 2.0), 0.45, wood)
            elif u < 0.54:
                pi.plant(b, g.at(x, 0.4), r.uniform(0.5, 1.5))
            elif u < 0.62:
                pi.floor_lamp(b, g.at(x, 0.35), b.regime != "clear")
    if b.regime == "night" or r.random() < 0.5:
        power = 5.0 if b.regime == "night" else 1.5
        pi.pendant(b, o.at(r.uniform(-0.3, 0.3), 0), h, r.uniform(0.4, 0.9), power)


def _living(b: Builder, frames: list[Frame], lengths: tuple[float, ...], wood: Material) -> None:
    sofa, i = b.tex("fabric", 1.0), int(b.rng.integers(4))
    g = frames[i]
    pi.sofa(b, g.at(0, 0.6), min(2.1, lengths[i] * 0.5), sofa)
    low = g.at(0, 1.55)
    pi.table(b, low, 1.0, 0.6, 0.42, wood)
    pi.tableware(b, low.at(0, 0, 0, 0.42), 1.0, 0.6, 4)
    pi.sofa(b, g.at(min(1.6, lengths[i] * 0.3), 1.6, -math.pi / 2), 0.8, b.tex("fabric", 1.0))
    other = frames[(i + 2) % 4]
    pi.cupboard(b, other.at(0, 0.25), min(1.8, lengths[i] * 0.4), 0.55, 0.4, wood)
    screen = b.colour("asphalt", spec=0.9, mirror=0.4)
    b.box(other, 0, 0.95, 0.2, (0.55, 0.32, 0.02), screen)
    b.note("television")


def _bedroom(b: Builder, frames: list[Frame], lengths: tuple[float, ...], wood: Material) -> None:
    i = int(b.rng.integers(4))
    pi.bed(b, frames[i].at(0, 1.15), float(b.rng.uniform(1.0, 1.8)), wood)
    for s in (-1.25, 1.25):
        g = frames[i].at(s, 0.3)
        pi.cupboard(b, g, 0.45, 0.5, 0.4, wood)
        if b.regime == "night" or b.rng.random() < 0.4:
            b.post(g, 0, 0.6, 0, 0.05, 0.1, b.colour("tile"))
            b.post(g, 0, 0.82, 0, 0.14, 0.1, b.colour("plaster", emit=2.2), top=0.7)
            b.lamp(g, 0, 0.82, 0, 1.2, 0.7, 0.12)
            b.note("bedside lamp")
    n = lengths[(i + 1) % 4]
    pi.cupboard(b, frames[(i + 1) % 4].at(-0.2 * n, 0.32), min(1.8, n * 0.4), 2.1, 0.6, b.colour("paint"))


def _kitchen(b: Builder, frames: list[Frame], lengths: tuple[float, ...], wood: Material) -> None:
    front = b.colour("paint") if b.rng.random() < 0.6 else wood
    top = b.tex("rock" if b.rng.random() < 0.5 else "wood", 0.8, spec=0.4)
    for i in (0, int(b.rng.choice([1, 3]))):
        g, n = frames[i], lengths[i] * 0.9
        pi.cupboard(b, g.at(0, 0.3), n, 0.86, 0.6, front)
        b.box(g, 0, 0.88, 0.31, (n / 2, 0.02, 0.33), top)
        b.box(g, 0, 1.15, 0.008, (n / 2, 0.26, 0.006), b.tex("tile", 0.6, spec=0.4))
        pi.tableware(b, g.at(0, 0.32, 0, 0.9), n, 0.4, 8)
        if b.rng.random() < 0.7:
            pi.cupboard(b, g.at(-n * 0.22, 0.17, 0, 1.5), n * 0.45, 0.7, 0.34, front)
    pi.cupboard(b, frames[2].at(0.35 * lengths[2], 0.34), 0.65, 1.9, 0.62, b.colour("plaster", spec=0.5))
    pi.table(b, Frame(0.2, 0.4), 1.2, 0.8, 0.75, wood)
    pi.tableware(b, Frame(0.2, 0.4, 0, -0.75), 1.2, 0.8, 5)
    seat = b.tex("fabric", 0.5)
    for s in (0, 1):
        pi.chair(b, Frame(0.2, 0.4).at((2 * s - 1) * 0.35, (2 * s - 1) * 0.65, math.pi * s), wood, seat)
    b.note("kitchen counter")


def _dining(b: Builder, frames: list[Frame], lengths: tuple[float, ...], wood: Material) -> None:
    r = b.rng
    length, o = min(1.4 + r.random(), lengths[0] * 0.45), Frame(0, 0, float(r.uniform(-0.3, 0.3)))
    pi.table(b, o, length, 0.9, 0.75, wood)
    pi.tableware(b, o.at(0, 0, 0, 0.75), length, 0.9, 7)
    seat = b.tex("fabric", 0.5)
    n = max(1, int(length / 0.65))
    for s in (0, 1):
        for i in range(n):
            x = ((i + 0.5) / n - 0.5) * length
            pi.chair(b, o.at(x, (2 * s - 1) * (0.62 + r.uniform(0, 0.25)), math.pi * s + r.normal(0, 0.15)), wood, seat)
    pi.cupboard(b, frames[0].at(0, 0.25), min(1.6, lengths[0] * 0.4), 0.9, 0.45, wood)


def corridor(b: Builder) -> None:
    """Hotel, school, hospital, cellar or museum corridor, with doors and lights at intervals."""
    r = b.rng
    b.indoor, b.axis = True, 0.0
    w, length, h = r.uniform(1.5, 3.2), r.uniform(10, 32), r.uniform(2.3, 3.4)
    vaulted = r.random() < 0.3
    windows = r.random() < 0.4 and not vaulted
    side = [] if not windows else _window_wall(b, length, h, int(length / 2.5))
    frames = shell(b, w, length, h, [[], side, [], []])
    b.place = str(r.choice(["a long corridor", "a hallway", "a passage"])) + (
        " with a vaulted ceiling" if vaulted else ""
    )
    b.region = (-w / 2 + 0.45, w / 2 - 0.45, -length / 2 + 0.5, length / 2 - 0.5)
    wood = b.colour("paint", "wood") if r.random() < 0.4 else b.tex("wood", 1.0)
    spacing = r.uniform(1.8, 3.5)
    for i in range(int(length / spacing)):
        z = (i + 0.5) * spacing - length / 2
        for f, sign in ((frames[1], 1), (frames[3], -1)):
            if f is frames[1] and windows:
                continue
            u = r.random()
            if u < 0.5:
                door(b, f, sign * z, wood, wood)
            elif u < 0.62:
                pi.picture(b, f.at(sign * z, 0), 1.55, r.uniform(0.4, 0.9), r.uniform(0.4, 0.7))
            elif u < 0.7:
                ps.bench(b, f.at(sign * z, 0.3))
            elif u < 0.76:
                pi.plant(b, f.at(sign * z, 0.3), r.uniform(0.6, 1.3))
            elif u < 0.82:
                pi.cupboard(b, f.at(sign * z, 0.18), 0.9, r.uniform(0.8, 1.9), 0.34, wood)
    if vaulted:
        m = b.tex("brick" if r.random() < 0.5 else "plaster", 1.2)
        step = r.uniform(1.5, 3.0)
        for i in range(int(length / step)):
            rise = min(w * 0.3, 0.9)
            b.add(
                lo.ARCH,
                Frame(),
                0,
                h - rise * 0.55,
                i * step - length / 2 + 0.5,
                (w / 2, rise * 0.55, 0.2),
                m,
                shape=(0.92, 0.9),
            )
    lights = int(min(max(length / r.uniform(3, 6), 1), 6))
    for i in range(lights):
        z = (i + 0.5) * length / lights - length / 2
        power = (2.4 if b.regime == "night" else 1.6) * (0.4 if windows and b.regime != "night" else 1.0)
        if r.random() < 0.5:
            pi.panel_light(b, Frame(0, z), h, (0.3, 0.3), power, 0.2)
        else:
            pi.pendant(b, Frame(0, z), h, 0.3, power)
    door(b, frames[0], 0.0, wood, wood)
    door(b, frames[2], 0.0, wood, wood)
