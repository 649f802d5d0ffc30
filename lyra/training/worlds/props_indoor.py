"""What stands in rooms?

Furniture and small things as groups of boxes, posts and balls. Each function takes the spot where the thing stands.
"""

from __future__ import annotations

import math
from dataclasses import replace

from lyra.training.worlds import layout as lo
from lyra.training.worlds.builder import Builder, Frame, Material


def table(b: Builder, f: Frame, width: float, depth: float, height: float, m: Material) -> None:
    """Top on four legs, or on one foot when small."""
    top = replace(m, bevel=0.03, spec=0.3)
    b.box(f, 0, height - 0.025, 0, (width / 2, 0.025, depth / 2), top)
    if width < 0.7:
        b.post(f, 0, height / 2, 0, 0.04, height / 2 - 0.03, m)
        b.post(f, 0, 0.02, 0, 0.24, 0.02, m)
    else:
        for sx in (-1, 1):
            for sz in (-1, 1):
                x, z, half = sx * (width / 2 - 0.06), sz * (depth / 2 - 0.06), height / 2 - 0.03
                b.box(f, x, half, z, (0.03, half, 0.03), m)
        b.box(f, 0, height - 0.1, 0, (width / 2 - 0.08, 0.05, depth / 2 - 0.07), m)
    b.note("table")


def chair(b: Builder, f: Frame, m: Material, seat: Material) -> None:
    """Four legs, seat and back (towards -z)."""
    for sx in (-1, 1):
        b.box(f, sx * 0.19, 0.22, 0.18, (0.02, 0.22, 0.02), m)
        b.box(f, sx * 0.19, 0.46, -0.19, (0.02, 0.46, 0.02), m)
    b.box(f, 0, 0.45, 0, (0.22, 0.03, 0.21), replace(seat, bevel=0.03))
    b.box(f, 0, 0.78, -0.2, (0.2, 0.12, 0.02), replace(seat, bevel=0.02))
    b.note("chair")


def sofa(b: Builder, f: Frame, width: float, m: Material) -> None:
    """Seat cushions, round back and arms (back towards -z)."""
    soft = replace(m, bevel=0.09)
    b.box(f, 0, 0.14, 0, (width / 2, 0.1, 0.42), m)
    n = max(1, round(width / 0.75))
    for i in range(n):
        x = (i + 0.5) * width / n - width / 2
        b.box(f, x, 0.34, 0.06, (width / n / 2 - 0.01, 0.1, 0.36), soft)
        b.box(f, x, 0.62, -0.3, (width / n / 2 - 0.01, 0.22, 0.11), soft, pitch=-0.15)
    b.box(f, 0, 0.45, -0.42, (width / 2 + 0.1, 0.38, 0.08), soft)
    for s in (-1, 1):
        b.box(f, s * (width / 2 + 0.1), 0.3, 0, (0.1, 0.3, 0.44), soft)
        b.post(f, s * (width / 2 + 0.1), 0.6, 0, 0.11, 0.44, m, pitch=math.pi / 2)
    if b.rng.random() < 0.6:
        cushion = b.tex("fabric", 0.6, bevel=0.1)
        b.box(f, b.rng.uniform(-0.3, 0.3) * width, 0.58, -0.12, (0.2, 0.18, 0.06), cushion, pitch=-0.3, roll=0.2)
    b.note("sofa" if width > 1.1 else "armchair")


def bed(b: Builder, f: Frame, width: float, m: Material) -> None:
    """Frame, mattress, blanket and pillows (head towards -z)."""
    b.box(f, 0, 0.16, 0, (width / 2 + 0.04, 0.12, 1.04), m)
    b.box(f, 0, 0.5, -1.04, (width / 2 + 0.05, 0.5, 0.04), m)
    b.box(f, 0, 0.38, 0, (width / 2, 0.12, 1.0), b.colour("plaster", bevel=0.1))
    b.box(f, 0, 0.42, 0.3, (width / 2 + 0.03, 0.13, 0.74), b.tex("fabric", 0.9, bevel=0.12))
    for x in (-0.25, 0.25) if width > 1.2 else (0.0,):
        b.ball(f, x * width, 0.54, -0.72, (0.32, 0.1, 0.2), b.colour("paint"))
    b.note("bed")


def shelf(b: Builder, f: Frame, width: float, height: float, m: Material) -> None:
    """Open shelf with books and boxes (back towards -z)."""
    d = 0.15
    for s in (-1, 1):
        b.box(f, s * (width / 2), height / 2, 0, (0.02, height / 2, d), m)
    b.box(f, 0, height / 2, -d, (width / 2, height / 2, 0.01), m)
    n = max(2, round(height / 0.4))
    for i in range(n + 1):
        up = 0.03 + i * (height - 0.05) / n
        b.box(f, 0, up, 0, (width / 2, 0.015, d), m)
        if i == n:
            break
        x = -width / 2 + 0.04
        while x < width / 2 - 0.12:
            w = float(b.rng.uniform(0.08, 0.4))
            w = min(w, width / 2 - x - 0.02)
            tall = float(b.rng.uniform(0.1, 0.32)) * min(1.0, height / n / 0.4)
            u = b.rng.random()
            if u < 0.5:
                b.box(f, x + w / 2, up + 0.015 + tall / 2, -0.02, (w / 2, tall / 2, 0.1), b.tex("books", 0.62))
            elif u < 0.7:
                b.box(f, x + w / 2, up + 0.015 + tall / 2, 0, (w / 2 - 0.01, tall / 2, 0.1), b.colour("fabric"))
            elif u < 0.8:
                vase(b, f.at(x + w / 2, 0, 0, up + 0.015), tall * 0.8)
            x += w + 0.02
    b.note("shelf")


def cupboard(b: Builder, f: Frame, width: float, height: float, depth: float, m: Material) -> None:
    """Closed body with doors, gaps and knobs (front towards +z)."""
    b.box(f, 0, height / 2, 0, (width / 2, height / 2, depth / 2), replace(m, bevel=0.02))
    knob = b.colour("metal", spec=0.8)
    n = max(1, round(width / 0.5))
    for i in range(n):
        x = (i + 0.5) * width / n - width / 2
        b.box(
            f,
            x,
            height / 2,
            depth / 2 + 0.008,
            (width / n / 2 - 0.012, height / 2 - 0.03, 0.01),
            replace(m, bevel=0.02),
        )
        b.ball(f, x + 0.3 * width / n, height * 0.55, depth / 2 + 0.03, (0.02, 0.02, 0.02), knob)
    b.note("cupboard")


def vase(b: Builder, f: Frame, height: float, family: str = "tile") -> None:
    """Bellied vase with a neck."""
    m = b.colour(str(b.rng.choice([family, "sign", "fabric", "brick"])), spec=0.6)
    b.ball(f, 0, height * 0.4, 0, (height * 0.3, height * 0.4, height * 0.3), m)
    b.post(f, 0, height * 0.8, 0, height * 0.14, height * 0.2, m, top=1.2)


def plant(b: Builder, f: Frame, height: float) -> None:
    """Pot with leaves."""
    b.post(
        f,
        0,
        height * 0.15,
        0,
        height * 0.13,
        height * 0.15,
        b.colour("brick"),
        top=1.25,
    )
    leaf = b.tex("leaves", 0.5, 0.25, cut=lo.CUT_NOISE, cut_level=0.47, cut_freq=9.0 / max(height, 0.4), bump=0.8)
    for _ in range(int(b.rng.integers(3, 7))):
        x, z = b.rng.normal(0, 0.13 * height, 2)
        up = height * b.rng.uniform(0.45, 0.9)
        b.ball(f, float(x), up, float(z), tuple(height * b.rng.uniform(0.1, 0.24, 3)), leaf)
    b.post(f, 0, height * 0.45, 0, 0.015, height * 0.25, b.tex("bark", 0.4))
    b.note("potted plant")


def floor_lamp(b: Builder, f: Frame, lit: bool) -> None:
    """Foot, pole and shade; the shade glows when lit."""
    metal = b.colour("metal", spec=0.6)
    b.post(f, 0, 0.015, 0, 0.15, 0.015, metal)
    b.post(f, 0, 0.75, 0, 0.014, 0.75, metal)
    shade = b.colour("plaster", emit=2.5 if lit else 0.0)
    b.post(f, 0, 1.6, 0, 0.22, 0.15, shade, top=0.6)
    if lit:
        b.lamp(f, 0, 1.6, 0, 2.2, 0.7, 0.2)
    b.note("floor lamp")


def pendant(b: Builder, f: Frame, ceiling: float, drop: float, power: float) -> None:
    """Hanging lamp with a cone shade, switched on."""
    b.post(f, 0, ceiling - drop / 2, 0, 0.006, drop / 2, b.colour("metal"))
    b.post(f, 0, ceiling - drop - 0.05, 0, 0.17, 0.09, b.colour("metal", spec=0.4), top=0.3)
    b.bulb(f, 0, ceiling - drop - 0.16, 0, 0.05, power, 0.6)
    b.note("pendant lamp")


def panel_light(b: Builder, f: Frame, ceiling: float, half: tuple[float, float], power: float, warm: float) -> None:
    """Flat glowing panel in the ceiling."""
    glow = b.colour("plaster", emit=3.0)
    b.box(
        f,
        0,
        ceiling - 0.02,
        0,
        (half[0], 0.015, half[1]),
        replace(glow, tint=(1.3, 1.25 - 0.2 * warm, 1.2 - 0.5 * warm)),
    )
    b.lamp(f, 0, ceiling - 0.12, 0, power, warm, 2 * min(half))


def picture(b: Builder, f: Frame, up: float, width: float, height: float) -> None:
    """Framed picture on a wall; f lies on the wall with +z pointing into the room."""
    b.box(f, 0, up, 0.015, (width / 2 + 0.035, height / 2 + 0.035, 0.015), b.colour("wood", bevel=0.015))
    art = b.tex("picture", 1.0, stretch=True)
    b.box(f, 0, up, 0.025, (width / 2, height / 2, 0.01), art)
    b.note("picture")


def crate(b: Builder, f: Frame, size: float) -> None:
    """Wooden crate or cardboard box."""
    m = b.tex("plank", 0.7) if b.rng.random() < 0.5 else b.colour("sand", "concrete")
    b.box(f, 0, size / 2, 0, (size / 2, size / 2, size / 2 * b.rng.uniform(0.7, 1.2)), m, yaw=b.rng.uniform(-0.4, 0.4))
    b.note("crate")


def barrel(b: Builder, f: Frame, height: float) -> None:
    """Wooden barrel or steel drum with hoops."""
    m = b.tex("wood", 0.6) if b.rng.random() < 0.6 else b.colour("sign", "metal", spec=0.3)
    hoop = b.colour("metal")
    b.post(f, 0, height / 2, 0, height * 0.33, height / 2, m)
    for q in (0.12, 0.5, 0.88):
        b.post(f, 0, height * q, 0, height * 0.34, height * 0.025, hoop)
    b.note("barrel")


def tableware(b: Builder, f: Frame, width: float, depth: float, count: int) -> None:
    """Cups, bowls, fruit, books and bottles scattered on a table top."""
    for _ in range(count):
        x, z = float(b.rng.uniform(-0.45, 0.45) * width), float(b.rng.uniform(-0.4, 0.4) * depth)
        u, g = b.rng.random(), f.at(x, z, float(b.rng.uniform(0, 6)))
        if u < 0.25:
            b.post(g, 0, 0.05, 0, 0.035, 0.05, b.colour("tile", spec=0.5), top=1.2)
        elif u < 0.45:
            b.box(g, 0, 0.02, 0, (0.08, 0.02, 0.11), b.colour("fabric"))
        elif u < 0.6:
            b.post(g, 0, 0.09, 0, 0.035, 0.09, b.colour("glass", spec=0.8))
            b.post(g, 0, 0.22, 0, 0.013, 0.05, b.colour("glass", spec=0.8))
        elif u < 0.8:
            c = b.colour("flower" if u < 0.7 else "foliage", spec=0.3)
            b.ball(g, 0, 0.04, 0, (0.04, 0.04, 0.04), c)
            b.ball(g, 0.08, 0.035, 0.02, (0.035, 0.035, 0.035), c)
        elif u < 0.9:
            vase(b, g, float(b.rng.uniform(0.12, 0.3)))
        else:
            plant(b, g, 0.35)
