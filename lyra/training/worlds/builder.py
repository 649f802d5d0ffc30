"""How are solids collected into a scene?

The builder turns "a box here, of that material" into the flat arrays of ``layout`` and keeps the notes from which a
caption is written. It knows no furniture, houses or trees (see ``props``) and traces no rays.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypedDict

import numpy as np
from jaxtyping import Float

from lyra.training.worlds import layout as lo
from lyra.training.worlds.bvh import build_bvh
from lyra.training.worlds.palettes import pick_colour
from lyra.training.worlds.textures import TextureBank

if TYPE_CHECKING:
    from typing import Unpack  # Python 3.10 lacks it, and only annotations need it.


@dataclass(frozen=True)
class Material:
    """Look of a surface; ``metres`` is the side of one texture tile, ``tint`` multiplies the linear texture colour."""

    tex: int
    metres: float = 1.0
    tint: tuple[float, float, float] = (1.0, 1.0, 1.0)
    spec: float = 0.0
    emit: float = 0.0
    mirror: float = 0.0
    bump: float = 0.0
    bevel: float = 0.0
    cut: int = lo.CUT_NONE
    cut_level: float = 0.0
    cut_freq: float = 1.0
    stretch: bool = False


class Finish(TypedDict, total=False):
    """Parts of a ``Material`` besides its texture, tile size and tint; what is left out keeps its default."""

    spec: float
    emit: float
    mirror: float
    bump: float
    bevel: float
    cut: int
    cut_level: float
    cut_freq: float
    stretch: bool


@dataclass(frozen=True)
class Frame:
    """A spot on the ground: origin in world metres (y down) and heading in radians about the vertical."""

    x: float = 0.0
    z: float = 0.0
    yaw: float = 0.0
    y: float = 0.0

    def at(self, x: float, z: float, yaw: float = 0.0, up: float = 0.0) -> Frame:
        """Frame at a local offset (right, forward, up; metres) with an extra turn."""
        c, s = math.cos(self.yaw), math.sin(self.yaw)
        return Frame(self.x + c * x + s * z, self.z - s * x + c * z, self.yaw + yaw, self.y - up)


def rotation(yaw: float, pitch: float = 0.0, roll: float = 0.0) -> Float[np.ndarray, "3 3"]:
    """Local-to-world rotation (radians): roll about z, then pitch about x, then yaw about the vertical."""
    cy, sy, cp, sp, cr, sr = (*(f(a) for a in (yaw, pitch, roll) for f in (math.cos, math.sin)),)
    ry = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    rx = np.array([[1, 0, 0], [0, cp, -sp], [0, sp, cp]])
    rz = np.array([[cr, -sr, 0], [sr, cr, 0], [0, 0, 1]])
    return ry @ rx @ rz


class Turn(TypedDict, total=False):
    """Turn of a solid in radians; what is left out is 0."""

    yaw: float
    pitch: float
    roll: float


@dataclass
class Builder:
    """Collects solids, lamps, ground and notes of one scene."""

    rng: np.random.Generator
    bank: TextureBank
    regime: str
    kinds: list[int] = field(default_factory=list)
    affine: list[np.ndarray] = field(default_factory=list)
    boxes: list[np.ndarray] = field(default_factory=list)
    rows: list[list[float]] = field(default_factory=list)
    lamps: list[tuple[float, ...]] = field(default_factory=list)
    ground: np.ndarray = field(default_factory=lambda: np.zeros(lo.GROUND_COLUMNS))
    height: np.ndarray = field(default_factory=lambda: np.zeros((2, 2), np.float32))
    blend: np.ndarray = field(default_factory=lambda: np.zeros((2, 2), np.float32))
    sky: np.ndarray = field(default_factory=lambda: np.zeros(lo.SKY_COLUMNS))
    objects: Counter[str] = field(default_factory=Counter)
    surfaces: list[tuple[str, str, tuple[float, float, float]]] = field(default_factory=list)
    place: str = "a place"
    indoor: bool = False
    region: tuple[float, float, float, float] = (-5.0, 5.0, -5.0, 5.0)
    axis: float | None = None

    def tex(self, category: str, metres: float = 1.0, vary: float = 0.12, **more: Unpack[Finish]) -> Material:
        """Material from a texture category with a slight random tint."""
        tint = np.exp(self.rng.normal(0, vary)) * (1 + self.rng.normal(0, 0.03, 3))
        return Material(self.bank.pick(self.rng, category), metres, tuple(np.clip(tint, 0.3, 1.4)), **more)

    def colour(self, family: str, category: str = "plain", metres: float = 1.0, **more: Unpack[Finish]) -> Material:
        """Material with the pattern of a category (default: plain) in a colour of a palette."""
        tex = self.bank.pick(self.rng, category)
        mean = np.maximum(self.bank.means[tex], 0.05)
        tint = (pick_colour(self.rng, family) / mean) ** 2
        return Material(tex, metres, tuple(np.clip(tint, 0.0, 3.0)), **more)

    def seen_colour(self, m: Material) -> tuple[float, float, float]:
        """Mean sRGB colour of a material in [0, 1]."""
        c = np.clip(self.bank.means[m.tex] * np.sqrt(np.asarray(m.tint)), 0, 1)
        return (float(c[0]), float(c[1]), float(c[2]))

    def note(self, thing: str, count: int = 1) -> None:
        """Count an object for the caption."""
        self.objects[thing] += count

    def describe(self, part: str, substance: str, m: Material) -> None:
        """Remember a large surface (for example: walls, brick) with its colour for the caption."""
        self.surfaces.append((part, substance, self.seen_colour(m)))

    def add(
        self,
        kind: int,
        f: Frame,
        x: float,
        up: float,
        z: float,
        half: tuple[float, float, float],
        m: Material,
        *,
        yaw: float = 0.0,
        pitch: float = 0.0,
        roll: float = 0.0,
        shape: tuple[float, float] = (1.0, 1.0),
    ) -> None:
        """Add a solid centred at (x right, up, z forward) of a frame with half sizes (right, height, forward)."""
        hx, hy, hz = (max(float(h), 1e-3) for h in half)
        spot = f.at(x, z)
        centre = np.array([spot.x, f.y - up, spot.z])
        rot = rotation(f.yaw + yaw, pitch, roll)
        size = np.array([hx, hy, hz])
        linear = rot.T / size[:, None]
        self.kinds.append(kind)
        self.affine.append(np.concatenate([linear, -(linear @ centre)[:, None]], 1).ravel())
        scaled = rot * size
        reach = np.sqrt((scaled**2).sum(1)) if kind == lo.BALL else np.abs(scaled).sum(1)
        self.boxes.append(np.concatenate([centre - reach, centre + reach]))
        self.rows.append(
            [
                *(m.tex, m.metres, *m.tint, m.spec, m.emit, m.mirror, m.cut, m.cut_level, m.cut_freq, m.bump),
                *(min(m.bevel, hx, hy, hz), float(m.stretch), *shape, hx, hy, hz, float(self.rng.random())),
            ]
        )

    def box(
        self,
        f: Frame,
        x: float,
        up: float,
        z: float,
        half: tuple[float, float, float],
        m: Material,
        **turn: Unpack[Turn],
    ) -> None:
        """Add a box; see ``add``."""
        self.add(lo.BOX, f, x, up, z, half, m, **turn)

    def ball(
        self,
        f: Frame,
        x: float,
        up: float,
        z: float,
        half: tuple[float, float, float],
        m: Material,
        **turn: Unpack[Turn],
    ) -> None:
        """Add an ellipsoid; see ``add``."""
        self.add(lo.BALL, f, x, up, z, half, m, **turn)

    def post(
        self,
        f: Frame,
        x: float,
        up: float,
        z: float,
        radius: float,
        half: float,
        m: Material,
        top: float = 1.0,
        **turn: Unpack[Turn],
    ) -> None:
        """Add a round post of half height ``half``; ``top`` is the radius at the top as a share of the base."""
        self.add(lo.CONE, f, x, up, z, (radius, half, radius), m, shape=(top, 1.0), **turn)

    def lamp(self, f: Frame, x: float, up: float, z: float, power: float, warm: float, radius: float = 0.06) -> None:
        """Add a point light; power is the radiance at one metre, warm 0..1 goes from daylight to candle."""
        spot = f.at(x, z)
        colour = power * np.array([1.0, 0.92 - 0.25 * warm, 0.86 - 0.6 * warm])
        self.lamps.append((spot.x, f.y - up, spot.z, *colour, radius))

    def bulb(self, f: Frame, x: float, up: float, z: float, radius: float, power: float, warm: float = 0.6) -> None:
        """Add a glowing ball with its light."""
        m = Material(self.bank.members["plain"][0], 1.0, (1.3, 1.3 * (0.92 - 0.2 * warm), 1.3 * (0.86 - 0.5 * warm)))
        glow = max(2.0, min(power, 12.0)) * (0.5 if self.regime == "night" else 1.0)
        self.ball(f, x, up, z, (radius, radius, radius), replace(m, emit=glow))
        self.lamp(f, x, up, z, power, warm, radius)

    def flat_ground(self, a: Material, b: Material | None = None, mix: float = 0.0, level: float = 0.0) -> None:
        """Lay an endless plane at a height (metres upwards) that mixes two materials by noise."""
        b = b or a
        g = self.ground
        g[lo.G_MODE], g[lo.G_LEVEL] = lo.GROUND_FLAT, -level
        self._ground_look(a, b, mix)

    def field_ground(self, height: np.ndarray, blend: np.ndarray, cell: float, a: Material, b: Material) -> None:
        """Lay a square height field (metres upwards, centred on the origin) that mixes two materials by a map."""
        self.height, self.blend = height.astype(np.float32), blend.astype(np.float32)
        g = self.ground
        g[lo.G_MODE], g[lo.G_CELL], g[lo.G_TOP] = lo.GROUND_FIELD, cell, float(height.max()) + 0.01
        self._ground_look(a, b, 1.0)

    def _ground_look(self, a: Material, b: Material, mix: float) -> None:
        g = self.ground
        g[lo.G_TEX_A], g[lo.G_METRES_A], g[lo.G_TEX_B], g[lo.G_METRES_B] = a.tex, a.metres, b.tex, b.metres
        g[lo.G_RA : lo.G_BA + 1], g[lo.G_RB : lo.G_BB + 1] = a.tint, b.tint
        g[lo.G_MIX], g[lo.G_REFLECT], g[lo.G_BUMP], g[lo.G_SEED] = mix, a.mirror, a.bump, self.rng.uniform(0, 50)

    def ground_height(self, x: float, z: float) -> float:
        """Height of the ground (metres upwards) at a world position."""
        if self.ground[lo.G_MODE] != lo.GROUND_FIELD:
            return float(-self.ground[lo.G_LEVEL])
        n, cell = self.height.shape[0], self.ground[lo.G_CELL]
        u, v = (np.clip(c / cell + 0.5 * (n - 1), 0, n - 1.001) for c in (x, z))
        i, j = int(u), int(v)
        p, q = u - i, v - j
        h = self.height
        return float(
            (h[j, i] * (1 - p) + h[j, i + 1] * p) * (1 - q) + (h[j + 1, i] * (1 - p) + h[j + 1, i + 1] * p) * q
        )

    def spot(self, x: float, z: float, yaw: float = 0.0) -> Frame:
        """Frame standing on the ground at a world position."""
        return Frame(x, z, yaw, -self.ground_height(x, z))

    def arrays(self) -> lo.SceneArrays:
        """Pack everything, sorted into a hierarchy."""
        n = len(self.kinds)
        boxes = np.array(self.boxes).reshape(n, 6)
        order, node_box, first, count = build_bvh(boxes)
        return lo.SceneArrays(
            np.array(self.kinds, np.int32)[order],
            np.array(self.affine).reshape(n, 12)[order],
            np.array(self.rows, np.float64).reshape(n, lo.MATERIAL_COLUMNS)[order],
            node_box,
            first,
            count,
            self.ground,
            self.height,
            self.blend,
            np.array(self.lamps, np.float64).reshape(-1, lo.LIGHT_COLUMNS),
            self.sky,
            self.bank.texels,
        )
