"""What stands in streets?

Houses, cars, lamp posts, benches, fences, stairs, people and columns as groups of solids.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from lyra.training.worlds import layout as lo
from lyra.training.worlds.builder import Builder, Frame, Material
from lyra.training.worlds.props_nature import Flora


@dataclass(frozen=True)
class HouseLook:
    """Materials and window rhythm of one house."""

    wall: Material
    base: Material
    roof: Material
    frame: Material
    glass: tuple[Material, ...]
    storey: float
    bay: float
    substance: str


def house_look(b: Builder) -> HouseLook:
    """Draw the look of a house."""
    r = b.rng
    substance = str(r.choice(["plaster", "brick", "stone", "timber", "concrete"], p=[0.45, 0.22, 0.14, 0.1, 0.09]))
    category = {"plaster": "plaster", "brick": "brick", "stone": "ashlar", "timber": "plank", "concrete": "concrete"}
    metres = {"plaster": 3.0, "brick": 1.2, "stone": 1.6, "timber": 1.4, "concrete": 3.0}[substance]
    wall = b.tex(category[substance], metres, bump=0.08)
    glass = [b.colour("glass", spec=0.9, mirror=0.5)]
    if b.regime == "night" or (b.regime == "golden" and r.random() < 0.4):
        lit = Material(glass[0].tex, 1.0, (1.3, 0.95, 0.55), emit=0.3 if b.regime == "night" else 1.0)
        glass.append(lit)
    frame = b.colour("paint") if r.random() < 0.7 else b.colour("wood")
    base = b.tex("ashlar", 1.2) if r.random() < 0.5 else b.tex("concrete", 2.0)
    return HouseLook(
        wall, base, b.tex("roof", 1.6), frame, tuple(glass), r.uniform(2.8, 3.5), r.uniform(1.6, 2.8), substance
    )


def window(b: Builder, f: Frame, up: float, width: float, height: float, look: HouseLook, rich: bool) -> None:
    """Glass, frame and sill on a wall; f lies on the wall with +z pointing outwards."""
    pane = look.glass[b.rng.integers(len(look.glass))]
    b.box(f, 0, up, 0.0, (width / 2 + 0.07, height / 2 + 0.07, 0.05), look.frame)
    b.box(f, 0, up, 0.02, (width / 2, height / 2, 0.05), pane)
    if rich:
        b.box(f, 0, up, 0.03, (0.025, height / 2, 0.05), look.frame)
        b.box(f, 0, up - height / 2 - 0.1, 0.06, (width / 2 + 0.12, 0.04, 0.12), look.base)
        if b.rng.random() < 0.25:
            red, green, blue = look.frame.tint
            shutter = replace(look.frame, tint=(0.5 * red, 0.5 * green, 0.5 * blue))
            for s in (-1, 1):
                b.box(f, s * (width * 0.75 + 0.08), up, 0.03, (width / 4, height / 2, 0.03), shutter)


def facade_windows(b: Builder, f: Frame, width: float, storeys: int, look: HouseLook, rich: bool, door: bool) -> None:
    """A grid of windows on a wall of the given width; the ground floor may get a door or a shop."""
    n = max(1, int(width / look.bay))
    w, h = look.bay * 0.48, look.storey * 0.5
    at = int(b.rng.integers(n)) if door else -1
    shop = door and b.rng.random() < 0.35
    for i in range(storeys):
        for j in range(n):
            x = (j + 0.5) * width / n - width / 2
            up = i * look.storey + look.storey * 0.55
            if i == 0 and j == at:
                b.box(f, x, 1.1, 0, (0.6, 1.15, 0.06), look.frame)
                b.box(
                    f,
                    x,
                    1.05,
                    0.03,
                    (0.5, 1.05, 0.06),
                    b.colour("wood" if b.rng.random() < 0.6 else "sign", "wood", 0.8),
                )
                b.box(f, x, 0.08, 0.35, (0.8, 0.08, 0.35), look.base)
                b.note("door")
            elif i == 0 and shop:
                b.box(f, x, 1.35, 0.01, (look.bay * 0.42, 1.0, 0.06), look.glass[-1])
            else:
                window(b, f.at(x, 0), up, w, h, look, rich)
    if shop:
        awning = b.tex("fabric", 0.8)
        b.box(f, 0, 2.75, 0.6, (width * 0.42, 0.03, 0.65), awning, pitch=0.35)
        b.box(f, 0, 3.1, 0.05, (width * 0.3, 0.25, 0.05), b.tex("sign", 1.0, stretch=True))
        b.note("shop")


def house(b: Builder, f: Frame, width: float, depth: float, storeys: int, look: HouseLook, rich: bool = True) -> None:
    """House with roof, chimney and windows; its front wall lies in the plane z=0 of f and faces +z."""
    r = b.rng
    wall_height = storeys * look.storey
    b.box(f, 0, wall_height / 2, -depth / 2, (width / 2, wall_height / 2, depth / 2), look.wall)
    b.box(f, 0, 0.25, -depth / 2, (width / 2 + 0.04, 0.25, depth / 2 + 0.04), look.base)
    u = r.random()
    if u < 0.55:
        rise = r.uniform(0.25, 0.5) * (depth if u < 0.3 else width)
        if u < 0.3:
            b.add(
                lo.GABLE,
                f,
                0,
                wall_height + rise / 2,
                -depth / 2,
                (depth / 2 + 0.4, rise / 2, width / 2 + 0.15),
                look.roof,
                yaw=math.pi / 2,
                shape=(0.0, 1.0),
            )
        else:
            b.add(
                lo.GABLE,
                f,
                0,
                wall_height + rise / 2,
                -depth / 2,
                (width / 2 + 0.3, rise / 2, depth / 2 + 0.3),
                look.roof,
                shape=(0.0, 1.0),
            )
        b.box(
            f, r.uniform(-0.3, 0.3) * width, wall_height + rise * 0.8, -depth * 0.4, (0.3, rise * 0.5, 0.3), look.base
        )
    elif u < 0.7:
        rise = 0.3 * min(width, depth)
        b.add(
            lo.PYRAMID,
            f,
            0,
            wall_height + rise / 2,
            -depth / 2,
            (width / 2 + 0.3, rise / 2, depth / 2 + 0.3),
            look.roof,
            shape=(0.05, 1.0),
        )
    else:
        b.box(f, 0, wall_height + 0.15, -depth / 2, (width / 2 + 0.15, 0.15, depth / 2 + 0.15), look.base)
    facade_windows(b, f, width, storeys, look, rich, True)
    for s in (-1, 1):
        g = f.at(s * width / 2, -depth / 2, s * math.pi / 2)
        if rich and r.random() < 0.8:
            facade_windows(b, g, depth * 0.9, storeys, look, False, False)
    if r.random() < 0.3 and storeys > 1:
        rail = b.colour("metal", cut=lo.CUT_BARS, cut_level=0.75, cut_freq=8.0)
        b.box(f, 0, look.storey + 0.05, 0.5, (width * 0.25, 0.06, 0.5), look.base)
        b.box(f, 0, look.storey + 0.6, 0.97, (width * 0.25, 0.5, 0.02), rail)
        b.note("balcony")
    b.note("house")
    b.describe("houses", look.substance, look.wall)


def tower(b: Builder, f: Frame, width: float, depth: float, height: float) -> None:
    """Plain tall building whose windows are painted on, for the skyline."""
    m = b.tex("facade_lit" if b.regime == "night" else "facade", float(b.rng.uniform(3, 4)))
    b.box(f, 0, height / 2, 0, (width / 2, height / 2, depth / 2), m)
    b.box(f, 0, height + 0.3, 0, (width / 2 + 0.2, 0.4, depth / 2 + 0.2), b.tex("concrete", 2.0))
    b.box(f, width * 0.2, height + 1.4, 0, (1.5, 1.2, 1.5), b.tex("concrete", 2.0))
    b.note("tall building")


def car(b: Builder, f: Frame) -> None:
    """Parked car along z."""
    r = b.rng
    paint = b.colour("car", spec=0.9, mirror=0.35, bevel=0.18)
    glass, tyre = b.colour("glass", spec=1.0, mirror=0.5, bevel=0.1), b.colour("asphalt")
    length, width, height = r.uniform(3.6, 4.8), r.uniform(1.65, 1.9), r.uniform(1.4, 1.75)
    b.box(f, 0, 0.52, 0, (width / 2, 0.27, length / 2), paint)
    cabin = (width / 2 - 0.03, (height - 0.75) / 2, length * 0.3)
    b.add(lo.PYRAMID, f, 0, 0.75 + (height - 0.8) / 2, -0.1, cabin, glass, shape=(0.68, 1.0))
    b.box(f, 0, height - 0.03, -0.1, (width * 0.34, 0.03, length * 0.2), paint)
    for sx in (-1, 1):
        for sz in (-0.31, 0.31):
            b.post(f, sx * (width / 2 - 0.1), 0.32, sz * length, 0.32, 0.11, tyre, roll=math.pi / 2)
            b.post(
                f, sx * (width / 2 - 0.09), 0.32, sz * length, 0.2, 0.115, b.colour("metal", spec=0.5), roll=math.pi / 2
            )
        b.box(f, sx * width * 0.36, 0.6, length / 2, (0.15, 0.06, 0.02), b.colour("plaster", spec=1.0))
        b.box(f, sx * width * 0.36, 0.6, -length / 2, (0.15, 0.06, 0.02), b.colour("sign"))
    b.note("parked car")


def lamp_post(b: Builder, f: Frame, height: float) -> None:
    """Street lamp; it burns at night and glows at dusk."""
    metal = b.colour("metal")
    b.post(f, 0, height / 2, 0, 0.06, height / 2, metal, top=0.6)
    b.post(f, 0, 0.3, 0, 0.11, 0.3, metal)
    b.box(f, 0, height, 0.35, (0.03, 0.03, 0.4), metal)
    if b.regime == "night":
        b.bulb(f, 0, height - 0.12, 0.7, 0.13, 9.0, 0.7)
    else:
        b.ball(f, 0, height - 0.12, 0.7, (0.14, 0.12, 0.14), b.colour("plaster"))
    b.post(f, 0, height, 0.7, 0.2, 0.06, metal, top=0.4)
    b.note("street lamp")


def bench(b: Builder, f: Frame) -> None:
    """Bench of slats looking towards +z."""
    wood, metal = b.tex("wood", 0.8), b.colour("metal")
    for i in range(3):
        b.box(f, 0, 0.44, -0.12 + 0.15 * i, (0.8, 0.02, 0.06), wood)
    for i in range(2):
        b.box(f, 0, 0.62 + 0.18 * i, -0.24, (0.8, 0.07, 0.02), wood)
    for s in (-0.7, 0.7):
        b.box(f, s, 0.21, 0, (0.03, 0.21, 0.2), metal)
        b.box(f, s, 0.6, -0.26, (0.03, 0.25, 0.02), metal)
    b.note("bench")


def fence(b: Builder, f: Frame, length: float, height: float, style: int) -> None:
    """Fence along x: pickets, rails, iron bars, low wall or hedge."""
    half = length / 2
    if style == 0:
        m = b.colour("paint", "wood", 1.0) if b.rng.random() < 0.5 else b.tex("wood", 1.0)
        b.box(f, 0, height / 2, 0, (half, height / 2, 0.015), replace(m, cut=lo.CUT_BARS, cut_level=0.4, cut_freq=6.0))
        b.box(f, 0, height * 0.75, -0.03, (half, 0.04, 0.02), m)
        b.box(f, 0, height * 0.25, -0.03, (half, 0.04, 0.02), m)
    elif style == 1:
        m = b.tex("wood", 1.0)
        for up in (0.35, 0.65, 0.92):
            b.box(f, 0, height * up, 0, (half, 0.05, 0.03), m)
        for i in range(int(length / 2) + 1):
            b.box(f, -half + i * 2.0, height / 2, 0, (0.06, height / 2, 0.06), m)
    elif style == 2:
        m = b.colour("metal", cut=lo.CUT_BARS, cut_level=0.8, cut_freq=7.0)
        b.box(f, 0, height / 2 + 0.1, 0, (half, height / 2, 0.012), m)
        b.box(f, 0, 0.1, 0, (half, 0.12, 0.12), b.tex("ashlar", 1.0))
        b.box(f, 0, height, 0, (half, 0.02, 0.025), replace(m, cut=lo.CUT_NONE))
    elif style == 3:
        m = b.tex("rubble" if b.rng.random() < 0.6 else "brick", 1.2, bump=0.3)
        b.box(f, 0, height / 2, 0, (half, height / 2, 0.2), m)
        b.box(f, 0, height, 0, (half, 0.05, 0.24), b.tex("concrete", 1.0))
    else:
        m = b.tex("leaves", 0.9, cut=lo.CUT_NOISE, cut_level=0.36, cut_freq=5.0, bump=0.9)
        b.box(f, 0, height / 2, 0, (half, height / 2, 0.4), m)
        b.box(f, 0, height / 2 - 0.04, 0, (half - 0.05, height / 2 - 0.05, 0.33), replace(m, cut=lo.CUT_NONE))
    b.note(("picket fence", "wooden fence", "iron fence", "low wall", "hedge")[style])


def person(b: Builder, f: Frame) -> None:
    """Standing figure: legs, coat, arms and head."""
    r = b.rng
    s = r.uniform(0.92, 1.08)
    legs, coat, skin = b.colour("fabric"), b.colour("fabric"), b.colour("skin")
    for x in (-0.09, 0.09):
        b.post(f, x, 0.42 * s, r.uniform(-0.08, 0.08), 0.075, 0.42 * s, legs, top=1.2)
    b.ball(f, 0, 1.12 * s, 0, (0.21, 0.36 * s, 0.14), coat)
    b.post(f, 0, 0.95 * s, 0, 0.18, 0.22 * s, coat, top=0.95)
    for x in (-1, 1):
        b.post(f, x * 0.23, 1.08 * s, 0, 0.05, 0.3 * s, coat, top=1.2, roll=-0.12 * x)
    b.ball(f, 0, 1.6 * s, 0, (0.09, 0.12, 0.1), skin)
    b.ball(f, 0, 1.65 * s, -0.02, (0.1, 0.1, 0.11), b.colour("bark"))
    b.note("person")


def stairs(b: Builder, f: Frame, width: float, steps: int, m: Material, rise: float = 0.17, tread: float = 0.3) -> None:
    """Steps that climb towards +z from the origin of f."""
    for i in range(steps):
        h = (i + 1) * rise / 2
        b.box(f, 0, h, (i + 0.5) * tread, (width / 2, h, tread / 2), replace(m, bevel=0.015))
    b.note("staircase")


def column(b: Builder, f: Frame, height: float, radius: float, m: Material) -> None:
    """Round column with base and capital."""
    b.box(f, 0, 0.1, 0, (radius * 1.5, 0.1, radius * 1.5), m)
    b.post(f, 0, 0.3, 0, radius * 1.3, 0.12, m, top=0.85)
    b.post(f, 0, height / 2, 0, radius, height / 2 - 0.2, m, top=0.85)
    b.post(f, 0, height - 0.3, 0, radius * 0.85, 0.14, m, top=1.6)
    b.box(f, 0, height - 0.1, 0, (radius * 1.5, 0.1, radius * 1.5), m)
    b.note("column")


def arch(b: Builder, f: Frame, width: float, height: float, depth: float, span: float, m: Material) -> None:
    """Wall piece with a round-headed passage of the given span along z."""
    spring = max(height * 0.35, 0.5)
    side = (width - span) / 4
    for s in (-1, 1):
        b.box(f, s * (span / 2 + side), spring / 2, 0, (side, spring / 2, depth / 2), m)
    top = (height - spring) / 2
    rise = min(span / 2, 2 * top * 0.85)
    b.add(lo.ARCH, f, 0, spring + top, 0, (width / 2, top, depth / 2), m, shape=(span / width, rise / top))
    b.note("arch")


def statue(b: Builder, f: Frame, m: Material) -> None:
    """Figure or ball on a plinth."""
    b.box(f, 0, 0.15, 0, (0.8, 0.15, 0.8), m)
    b.box(f, 0, 1.0, 0, (0.5, 0.75, 0.5), m)
    b.box(f, 0, 1.8, 0, (0.6, 0.06, 0.6), m)
    g = f.at(0, 0, 0, 1.85)
    if b.rng.random() < 0.5:
        b.ball(g, 0, 0.5, 0, (0.5, 0.5, 0.5), m)
    else:
        b.post(g, 0, 0.6, 0, 0.3, 0.6, m, top=0.8)
        b.ball(g, 0, 1.4, 0, (0.32, 0.45, 0.24), m)
        b.ball(g, 0, 2.0, 0, (0.15, 0.19, 0.16), m)
    b.note("statue")


def fountain(b: Builder, f: Frame, m: Material, water: Material, radius: float) -> None:
    """Round basin with water and a bowl on a post."""
    b.post(f, 0, 0.3, 0, radius, 0.3, m)
    b.post(f, 0, 0.52, 0, radius * 0.88, 0.1, water)
    b.post(f, 0, 0.9, 0, 0.18, 0.9, m)
    b.post(f, 0, 1.5, 0, 0.3, 0.16, m, top=2.6)
    b.ball(f, 0, 1.85, 0, (0.2, 0.3, 0.2), m)
    b.note("fountain")


def market_stall(b: Builder, f: Frame, flora: Flora | None) -> None:
    """Table under a striped canopy with goods."""
    wood, cloth = b.tex("wood", 0.8), b.tex("fabric", 1.2)
    b.box(f, 0, 0.85, 0, (1.1, 0.04, 0.5), wood)
    b.box(f, 0, 0.42, 0.4, (1.05, 0.42, 0.03), cloth)
    for sx in (-1, 1):
        for sz in (-1, 1):
            b.post(f, sx * 1.1, 1.15, sz * 0.55, 0.03, 1.15, wood)
    b.add(lo.GABLE, f, 0, 2.5, 0, (1.35, 0.28, 0.8), cloth, shape=(0.0, 1.0))
    for _ in range(14):
        x, z, s = float(b.rng.uniform(-1, 1)), float(b.rng.uniform(-0.4, 0.4)), float(b.rng.uniform(0.05, 0.13))
        b.ball(f, x, 0.89 + s, z, (s, s, s), b.colour("flower" if b.rng.random() < 0.6 else "foliage"))
    b.note("market stall")
