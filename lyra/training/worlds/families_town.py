"""Which built outdoor places are there, and how are they laid out?

Street, square, village, alley and ruins. Each function fills a builder.
"""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float
from scipy.ndimage import gaussian_filter, zoom

from lyra.training.worlds import layout as lo
from lyra.training.worlds import props_indoor as pi
from lyra.training.worlds import props_nature as pn
from lyra.training.worlds import props_street as ps
from lyra.training.worlds.builder import Builder, Frame


def _row_of_houses(b: Builder, side: int, x: float, z0: float, z1: float, gap: float, rich_radius: float) -> None:
    """Houses side by side along z on one side of a street (fronts at x = side * x)."""
    r, z = b.rng, z0
    base = int(r.integers(1, 5))
    while z < z1:
        width = float(r.uniform(5, 12))
        storeys = max(1, min(6, base + int(r.integers(-1, 2))))
        look = ps.house_look(b)
        f = Frame(side * (x + float(r.uniform(0, 0.4))), z + width / 2, -side * math.pi / 2)
        ps.house(b, f, width, float(r.uniform(7, 11)), storeys, look, abs(z + width / 2) < rich_radius)
        z += width + (0.0 if r.random() < 0.7 else gap)


def street(b: Builder) -> None:
    """Street with pavements, terraces of houses, cars, trees and lamps."""
    r = b.rng
    b.axis = 0.0
    road, walk, length = r.uniform(2.6, 4.5), r.uniform(1.5, 3.5), r.uniform(35, 60)
    wet = float(r.choice([0.0, 0.0, 0.45])) if b.regime != "clear" else 0.0
    asphalt = b.tex(str(r.choice(["asphalt", "asphalt", "cobble"])), 2.0, mirror=wet, bump=0.05)
    pavement, o = b.tex("paving", 2.2), Frame()
    b.flat_ground(asphalt, b.tex("asphalt", 3.0), 0.5)
    for s in (-1, 1):
        b.box(o, s * (road + walk / 2), 0.06, 0, (walk / 2, 0.07, length * 1.6), pavement)
        b.box(o, s * road, 0.06, 0, (0.08, 0.08, length * 1.6), b.tex("concrete", 1.0))
        _row_of_houses(b, s, road + walk, -length, length, r.uniform(1, 5), 22)
    if r.random() < 0.6 and wet == 0:
        paint = b.colour("paint")
        for i in range(int(length / 2)):
            b.box(o, 0, 0.003, -length + i * 4.0, (0.07, 0.003, 1.0), paint)
    if r.random() < 0.4:
        z = r.uniform(-6, 6)
        for i in range(int(road * 1.2)):
            b.box(o, -road + 0.8 + i * 1.6, 0.004, z, (0.35, 0.004, 1.5), b.colour("paint"))
    if r.random() < 0.6:
        look = ps.house_look(b)
        ps.house(b, Frame(0, length + 12, math.pi), 22, 10, int(r.integers(2, 5)), look, False)
    for _ in range(int(r.integers(0, 7))):
        x = float(r.choice([-1, 1])) * r.uniform(24, 60)
        ps.tower(b, Frame(x, r.uniform(-1, 1) * length), r.uniform(9, 18), r.uniform(9, 18), r.uniform(14, 45))
    flora, trees = pn.make_flora(b), r.random() < 0.55
    spacing = r.uniform(7, 13)
    for i in range(int(2 * length / spacing)):
        z = -length + (i + 0.5) * spacing
        for s in (-1, 1):
            u = r.random()
            g = Frame(s * (road + 0.5), z + r.uniform(-1, 1), -s * math.pi / 2, -0.12)
            if trees and u < 0.6:
                pn.leafy_tree(b, g, flora, r.uniform(4, 8))
            elif u < 0.75:
                ps.lamp_post(b, g.at(0, 0, math.pi), r.uniform(3.5, 5.5)) if len(b.lamps) < 8 else None
            elif u < 0.85:
                ps.bench(b, g)
            if r.random() < 0.4:
                ps.car(b, Frame(s * (road - 1.1), z + spacing / 2, r.normal(0, 0.03) + (math.pi if s > 0 else 0)))
            if r.random() < 0.35:
                ps.person(
                    b, Frame(s * (road + r.uniform(0.6, walk - 0.3)), z + r.uniform(-3, 3), r.uniform(0, 6), -0.12)
                )
            if r.random() < 0.15:
                pi.barrel(b, Frame(s * (road + 0.4), z + 2.0, 0, -0.12), 0.9)
            if r.random() < 0.2:
                pi.plant(b, Frame(s * (road + walk - 0.5), z + 1.0, 0, -0.12), 1.1)
    b.place = str(r.choice(["a town street", "a residential street", "an old street"]))
    b.region = (-road - walk + 0.8, road + walk - 0.8, -length * 0.6, length * 0.6)
    b.describe("road", "wet asphalt" if wet else "paved", asphalt)


def alley(b: Builder) -> None:
    """Narrow lane between high walls with arches, steps, laundry and pots."""
    r = b.rng
    b.axis = 0.0
    half, length = r.uniform(1.1, 2.2), r.uniform(18, 30)
    b.flat_ground(b.tex("cobble", 1.4, bump=0.3), b.tex("soil", 2.0), 0.4)
    for s in (-1, 1):
        _row_of_houses(b, s, half, -length, length, 0.8, 18)
    for _ in range(int(r.integers(1, 4))):
        z = r.uniform(-length * 0.7, length * 0.7)
        ps.arch(
            b, Frame(0, z), 2 * half + 0.6, r.uniform(3.4, 5), r.uniform(0.4, 2.0), 1.7 * half, b.tex("ashlar", 1.4)
        )
    cloth_up = r.uniform(3.8, 5)
    for _ in range(3):
        z = r.uniform(-length * 0.6, length * 0.6)
        b.box(Frame(0, z), 0, cloth_up, 0, (half, 0.006, 0.006), b.colour("metal"))
        for j in range(4):
            b.box(Frame(0, z), (j - 1.5) * half * 0.45, cloth_up - 0.35, 0, (0.25, 0.35, 0.01), b.tex("fabric", 0.8))
    for _ in range(16):
        side, z = float(r.choice([-1, 1])), r.uniform(-length * 0.8, length * 0.8)
        f = Frame(side * (half - 0.3), z, -side * math.pi / 2)
        u = r.random()
        if u < 0.4:
            pi.plant(b, f, r.uniform(0.5, 1.2))
        elif u < 0.55:
            pi.barrel(b, f, 0.8)
        elif u < 0.7:
            pi.crate(b, f, r.uniform(0.35, 0.6))
        elif u < 0.85 and len(b.lamps) < 6:
            b.box(f, 0, 3.0, -0.1, (0.02, 0.02, 0.25), b.colour("metal"))
            if b.regime in ("night", "golden"):
                b.bulb(f, 0, 2.85, 0.12, 0.1, 3.0 if b.regime == "night" else 0.6, 0.8)
            b.note("wall lamp")
        else:
            ps.person(b, Frame(side * half * 0.3, z, r.uniform(0, 6)))
    if r.random() < 0.5:
        ps.stairs(b, Frame(0, r.uniform(6, 10)), 2 * half, int(r.integers(4, 14)), b.tex("ashlar", 1.2))
    b.place = "a narrow alley"
    b.region = (-half + 0.5, half - 0.5, -length * 0.7, length * 0.7)


def square(b: Builder) -> None:
    """Paved square with houses around, an arcade, a fountain or statue, stalls, benches and people."""
    r = b.rng
    half = r.uniform(12, 24)
    paving = b.tex(str(r.choice(["paving", "cobble", "paving"])), r.uniform(1.5, 3.5))
    b.flat_ground(paving, b.tex("concrete", 3.0), 0.4)
    b.describe("ground", "paved", paving)
    storeys = int(r.integers(2, 5))
    for i in range(4):
        yaw = i * math.pi / 2
        side = Frame(-half * math.sin(yaw), -half * math.cos(yaw), yaw)
        x, arcade = -half, r.random() < 0.25
        open_side = r.random() < 0.15
        while x < half - 4 and not open_side:
            width = float(r.uniform(6, 13))
            look = ps.house_look(b)
            levels = max(1, storeys + int(r.integers(-1, 2)))
            ps.house(b, side.at(x + width / 2, 0), width, r.uniform(8, 12), levels, look, half < 20)
            x += width + (0.0 if r.random() < 0.7 else r.uniform(2, 6))
        if arcade and not open_side:
            m = b.tex("ashlar", 1.5)
            for k in range(int(2 * half / 3.2)):
                ps.arch(b, side.at(-half + 1.6 + k * 3.2, 2.6), 3.2, 4.0, 0.5, 2.5, m)
            b.box(side, 0, 4.1, 1.4, (half, 0.12, 1.6), m)
    for _ in range(int(r.integers(0, 6))):
        a, q = r.uniform(0, 2 * math.pi), half * r.uniform(2.3, 3.5)
        ps.tower(b, Frame(q * math.cos(a), q * math.sin(a), a), r.uniform(9, 16), r.uniform(9, 16), r.uniform(12, 40))
    stone, flora = b.tex("ashlar", 1.4), pn.make_flora(b)
    if r.random() < 0.5:
        ps.fountain(
            b, Frame(r.uniform(-3, 3), r.uniform(-3, 3)), stone, b.colour("glass", "foam", 2.0, mirror=0.9), 2.4
        )
    else:
        ps.statue(b, Frame(r.uniform(-3, 3), r.uniform(-3, 3), r.uniform(0, 6)), stone)
    if r.random() < 0.3:
        ps.stairs(b, Frame(0, half * 0.6, 0), half, 5, stone)
    for _ in range(int(r.integers(14, 34))):
        a, q = r.uniform(0, 2 * math.pi), half * math.sqrt(r.uniform(0.05, 0.85))
        f = Frame(q * math.cos(a), q * math.sin(a), r.uniform(0, 6))
        u = r.random()
        if u < 0.35:
            ps.person(b, f)
        elif u < 0.5:
            ps.bench(b, f)
        elif u < 0.66:
            pn.leafy_tree(b, f, flora, r.uniform(4, 8))
        elif u < 0.76 and len(b.lamps) < 7:
            ps.lamp_post(b, f, r.uniform(3.5, 5))
        elif u < 0.9:
            ps.market_stall(b, f, flora)
        else:
            pn.flower_bed(b, f, flora, 2.5, stone)
    b.place = str(r.choice(["a town square", "a market square", "a plaza"]))
    b.region = (-half * 0.8, half * 0.8, -half * 0.8, half * 0.8)


def village(b: Builder) -> None:
    """Loose cottages with gardens along a track."""
    r = b.rng
    n, cell = 160, 1.5
    height, blend = rolling(b, n, cell, float(r.uniform(0.5, 2.5)), track=True)
    b.field_ground(height, blend, cell, b.tex("grass", 2.0, bump=0.4), b.tex(str(r.choice(["soil", "gravel"])), 2.0))
    flora = pn.make_flora(b)
    wall_style = int(r.integers(5))
    for i in range(int(r.integers(7, 12))):
        s = 1 if i % 2 else -1
        z = (i // 2 - 2.5) * r.uniform(9, 13)
        f = b.spot(s * r.uniform(5.5, 9), z, -s * math.pi / 2 + r.normal(0, 0.2))
        f = f.at(0, 0, 0, -0.3)
        look = ps.house_look(b)
        width = float(r.uniform(5, 9))
        ps.house(b, f, width, float(r.uniform(5, 7)), int(r.integers(1, 3)), look, abs(z) < 30)
        for side in (-1, 1):
            g = f.at(side * (width / 4 + 1.2), 2.6)
            ps.fence(b, b.spot(g.x, g.z, g.yaw), width / 2, r.uniform(0.7, 1.2), wall_style)
        for _ in range(int(r.integers(1, 5))):
            g = f.at(r.uniform(-6, 6), r.uniform(0.7, 2.2))
            pn.bush(b, b.spot(g.x, g.z), flora, r.uniform(0.4, 0.9))
    for _ in range(int(r.integers(15, 32))):
        x, z = r.uniform(-45, 45), r.uniform(-50, 50)
        if abs(x) > 3.5 and not (4 < abs(x) < 14 and r.random() < 0.8):
            pn.random_tree(b, b.spot(x, z, r.uniform(0, 6)), flora, r.uniform(4, 9))
    for _ in range(12):
        f = b.spot(float(r.choice([-1, 1])) * r.uniform(1.8, 3.5), r.uniform(-30, 30), r.uniform(0, 6))
        u = r.random()
        if u < 0.25:
            ps.person(b, f)
        elif u < 0.45:
            pi.barrel(b, f, 0.9)
        elif u < 0.6:
            pn.rock(b, f, b.tex("rock", 1.0), r.uniform(0.3, 0.7))
        elif u < 0.75 and len(b.lamps) < 6:
            ps.lamp_post(b, f, 3.5)
        elif u < 0.85:
            ps.car(b, b.spot(f.x, f.z, r.normal(0, 0.1)))
    b.place, b.axis = "a village", 0.0
    b.region = (-3.5, 3.5, -30, 30)


def rolling(
    b: Builder, n: int, cell: float, rise: float, *, track: bool
) -> tuple[Float[np.ndarray, "n n"], Float[np.ndarray, "n n"]]:
    """Smooth random hills (metres) and a blend map whose second material marks a track along z when asked for."""
    r = b.rng
    coarse = zoom(r.normal(0, 1, (9, 9)), n / 9, order=3)[:n, :n]
    fine = gaussian_filter(r.normal(0, 1, (n, n)), 1.5)
    c = (np.arange(n) - 0.5 * (n - 1)) * cell
    x, z = np.meshgrid(c, c)
    bend = 4.0 * np.sin(z * 0.05 + r.uniform(0, 6)) * (np.abs(z) > 25)
    near = np.exp(-(((x - bend) / 6.0) ** 2))
    height = rise * coarse * (1 - (0.9 * near if track else 0)) + 0.12 * fine * (1 - 0.7 * near)
    blend = np.clip(1.6 - np.abs(x - bend) / 1.1, 0, 1) if track else np.clip(0.5 * coarse, 0, 1)
    return height, blend


def ruins(b: Builder) -> None:
    """Broken walls, columns, arches and fallen blocks on grass; the held-out family."""
    r = b.rng
    n, cell = 128, 1.2
    height, blend = rolling(b, n, cell, 0.8, track=False)
    stone = b.tex(str(r.choice(["ashlar", "rubble", "ashlar", "brick"])), 1.5, bump=0.35)
    b.field_ground(
        height, blend, cell, b.tex(str(r.choice(["grass", "sand", "soil"])), 2.0, bump=0.3), b.tex("gravel", 2.0)
    )
    b.describe("walls", "stone", stone)
    flora = pn.make_flora(b)
    half = r.uniform(9, 16)
    for i in range(4):
        yaw = i * math.pi / 2
        side = Frame(-half * math.sin(yaw), -half * math.cos(yaw), yaw)
        x = -half
        while x < half:
            u, w = r.random(), r.uniform(1.5, 3.5)
            f = side.at(x + w / 2, r.normal(0, 0.1))
            f = b.spot(f.x, f.z, f.yaw)
            if u < 0.4:
                for k in range(3):
                    up = r.uniform(0.5, 4.5)
                    b.box(f, (k - 1) * w / 3, up / 2, 0, (w / 6 + 0.02, up / 2, 0.4), stone)
            elif u < 0.6:
                ps.arch(b, f, 3.4, r.uniform(3.4, 5), 0.8, 2.2, stone)
                w = 3.4
            elif u < 0.8:
                up = r.uniform(1, 4.5)
                b.post(f, 0, up / 2, 0, 0.4, up / 2, stone, top=0.9)
                b.box(f, 0, 0.2, 0, (0.6, 0.25, 0.6), stone)
            x += w
    for _ in range(int(r.integers(4, 12))):
        f = b.spot(r.uniform(-1, 1) * half * 0.8, r.uniform(-1, 1) * half * 0.8, r.uniform(0, 6))
        ps.column(b, f, r.uniform(2, 5), r.uniform(0.25, 0.45), stone)
    for _ in range(40):
        x, z = r.uniform(-1.3, 1.3, 2) * half
        f = b.spot(x, z, r.uniform(0, 6))
        u, s = r.random(), r.uniform(0.2, 0.7)
        if u < 0.4:
            b.add(lo.BOX, f, 0, s * 0.4, 0, (s, s * 0.6, s * 0.8), stone, pitch=r.normal(0, 0.3), roll=r.normal(0, 0.3))
        elif u < 0.55:
            b.post(f, 0, 0.35, 0, 0.38, s, stone, pitch=math.pi / 2)
        elif u < 0.8:
            pn.bush(b, f, flora, s * 1.2)
        else:
            pn.rock(b, f, stone, s)
    for _ in range(22):
        a, q = r.uniform(0, 2 * math.pi), half * r.uniform(1.3, 3.2)
        pn.random_tree(b, b.spot(q * math.cos(a), q * math.sin(a)), flora, r.uniform(4, 11))
    ps.stairs(b, b.spot(0, half * 0.4), 4.0, 6, stone)
    b.place = "ancient ruins"
    b.region = (-half * 1.1, half * 1.1, -half * 1.1, half * 1.1)
