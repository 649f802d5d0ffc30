"""What grows or lies about outdoors?

Trees, bushes, rocks, grass tufts and flowers as groups of solids. They know where they stand, not in which scene.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from lyra.training.worlds import layout as lo
from lyra.training.worlds.builder import Builder, Finish, Frame, Material


@dataclass(frozen=True)
class Flora:
    """Materials shared by the plants of one scene, so that a wood looks like one wood."""

    bark: Material
    crowns: tuple[Material, ...]
    needles: Material
    bushes: Material
    tufts: Material
    season: str


def _leafy(level: float, frequency: float) -> Finish:
    """Finish of a surface cut into leaves: share that is cut away, and leaves per metre."""
    return {"cut": lo.CUT_NOISE, "bump": 0.9, "cut_level": level, "cut_freq": frequency}


def make_flora(b: Builder) -> Flora:
    """Draw the plant materials of a scene."""
    season = str(b.rng.choice(["summer", "autumn", "spring"], p=[0.65, 0.2, 0.15]))
    kind = "autumn" if season == "autumn" else "leaves"
    crowns = tuple(
        b.tex(kind, 1.2, 0.25, **_leafy(float(b.rng.uniform(0.5, 0.6)), float(b.rng.uniform(3.5, 8.0))))
        for _ in range(3)
    )
    return Flora(
        b.tex("bark", 0.8),
        crowns,
        b.colour("foliage", "leaves", 0.8, **_leafy(0.5, 10.0)),
        b.tex("leaves", 0.9, 0.25, **_leafy(0.48, 9.0)),
        b.tex("grass", 0.6, 0.2, **_leafy(0.5, 16.0)),
        season,
    )


def leafy_tree(b: Builder, f: Frame, flora: Flora, height: float) -> None:
    """Trunk with branches and a crown of ragged ellipsoids."""
    r = b.rng
    trunk = height * r.uniform(0.28, 0.5)
    radius = height * r.uniform(0.018, 0.035)
    lean = float(r.normal(0, 0.04))
    b.post(f, 0, trunk * 0.6, 0, radius, trunk * 0.75, flora.bark, top=0.6, roll=lean)
    crown = flora.crowns[r.integers(len(flora.crowns))]
    spread = height * r.uniform(0.18, 0.34)
    count = int(r.integers(6, 13))
    for i in range(count):
        a, q = r.uniform(0, 2 * np.pi), spread * math.sqrt(r.uniform(0.02, 1.0))
        reach = 1.0 - 0.45 * (q / spread) ** 2
        x, z, up = q * math.cos(a), q * math.sin(a), trunk + (height - trunk) * r.uniform(0.1, 0.88) * reach
        size = spread * r.uniform(0.35, 0.65)
        b.ball(f, x, up, z, (size, size * r.uniform(0.6, 0.9), size), crown, yaw=a)
        if i > 3:
            continue
        b.post(
            f,
            x / 2,
            (trunk + up) / 2,
            z / 2,
            radius * 0.4,
            0.55 * math.hypot(q, up - trunk),
            flora.bark,
            top=0.5,
            yaw=-a,
            roll=math.atan2(q, max(up - trunk, 0.1)),
        )
    b.note("tree")


def pine(b: Builder, f: Frame, flora: Flora, height: float) -> None:
    """Conifer: trunk with stacked ragged cones."""
    r = b.rng
    base = height * r.uniform(0.06, 0.2)
    b.post(f, 0, height * 0.45, 0, height * 0.018, height * 0.45, flora.bark, top=0.3)
    layers = int(r.integers(3, 6))
    width = height * r.uniform(0.13, 0.22)
    step = (height - base) / layers
    for i in range(layers):
        w = width * (1 - 0.75 * i / layers) * r.uniform(0.9, 1.1)
        b.add(lo.CONE, f, 0, base + step * (i + 0.65), 0, (w, step * 0.8, w), flora.needles, shape=(0.08, 1.0))
    b.note("pine")


def bare_tree(b: Builder, f: Frame, flora: Flora, height: float) -> None:
    """Tall trunk with a few dead limbs; the crown is out of sight."""
    r = b.rng
    radius = height * r.uniform(0.012, 0.03)
    b.post(f, 0, height / 2, 0, radius, height / 2, flora.bark, top=0.5, roll=float(r.normal(0, 0.03)))
    for _ in range(int(r.integers(2, 6))):
        a, tilt = r.uniform(0, 2 * np.pi), r.uniform(0.6, 1.2)
        n, up = height * r.uniform(0.06, 0.16), height * r.uniform(0.3, 0.9)
        g = f.at(0, 0, a)
        b.post(g, n * math.sin(tilt), up + n * math.cos(tilt), 0, radius * 0.3, n, flora.bark, top=0.3, roll=tilt)
    b.note("bare tree")


def palm(b: Builder, f: Frame, flora: Flora, height: float) -> None:
    """Slim trunk with drooping flat leaves."""
    b.post(f, 0, height / 2, 0, 0.16, height / 2, flora.bark, top=0.7)
    for i in range(9):
        g = f.at(0, 0, i * 0.7)
        b.ball(g, 1.0, height - 0.25, 0, (1.3, 0.08, 0.32), flora.needles, roll=0.25 + 0.3 * float(b.rng.random()))
    b.note("palm tree")


def bush(b: Builder, f: Frame, flora: Flora, size: float) -> None:
    """A few ragged ellipsoids on the ground."""
    for _ in range(int(b.rng.integers(1, 4))):
        x, z = b.rng.normal(0, 0.4 * size, 2)
        s = size * b.rng.uniform(0.6, 1.0)
        b.ball(f, float(x), 0.5 * s, float(z), (s, s * 0.8, s), flora.bushes)
    b.note("bush")


def tuft(b: Builder, f: Frame, flora: Flora, size: float) -> None:
    """Tall grass or ferns."""
    b.add(
        lo.CONE, f, 0, 0.35 * size, 0, (0.6 * size, 0.5 * size, 0.6 * size), flora.tufts, pitch=math.pi, shape=(0.3, 1)
    )


def rock(b: Builder, f: Frame, m: Material, size: float) -> None:
    """A boulder from two or three tilted solids."""
    r = b.rng
    for _ in range(int(r.integers(1, 4))):
        x, z = r.normal(0, 0.35 * size, 2)
        half = tuple(size * r.uniform(0.4, 0.8, 3) * (1, 0.75, 1))
        kind = lo.BALL if r.random() < 0.6 else lo.BOX
        b.add(
            kind,
            f,
            float(x),
            0.25 * size,
            float(z),
            half,
            m,
            yaw=r.uniform(0, 6),
            pitch=r.normal(0, 0.3),
            roll=r.normal(0, 0.3),
        )
    b.note("rock")


def flower_bed(b: Builder, f: Frame, flora: Flora, length: float, edge: Material) -> None:
    """Low kerb with soil, leaves and blossoms."""
    b.box(f, 0, 0.12, 0, (0.5, 0.12, length / 2), edge)
    blossom = b.colour("flower", bump=0.5)
    for _ in range(int(length * 3)):
        x, z = float(b.rng.uniform(-0.4, 0.4)), float(b.rng.uniform(-length / 2, length / 2))
        b.ball(f, x, 0.3, z, (0.2, 0.2, 0.2), flora.bushes)
        b.ball(f, x, 0.48, z, (0.06, 0.05, 0.06), blossom)
    b.note("flower bed")


def random_tree(b: Builder, f: Frame, flora: Flora, height: float) -> None:
    """Any kind of tree of about the given height."""
    u = b.rng.random()
    if u < 0.62:
        leafy_tree(b, f, flora, height)
    elif u < 0.92:
        pine(b, f, flora, height * 1.2)
    else:
        bare_tree(b, f, flora, height)
