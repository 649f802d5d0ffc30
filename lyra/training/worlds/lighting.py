"""Which light falls on a scene?

Four regimes (clear, overcast, golden, night) for outdoor and indoor scenes, written into the sky row of the scene. It
does not place lamps; the families do.
"""

from __future__ import annotations

import numpy as np

from lyra.training.worlds import layout as lo
from lyra.training.worlds.builder import Builder

REGIMES = ("clear", "overcast", "golden", "night")


def pick_regime(rng: np.random.Generator) -> str:
    """Draw a light regime; night is rarer because most photographs are taken by day."""
    return str(rng.choice(REGIMES, p=(0.4, 0.28, 0.2, 0.12)))


def light_scene(b: Builder) -> None:
    """Fill the sky row of a builder for its regime; call after ``b.indoor`` is set."""
    rng, k = b.rng, b.sky
    elevation = {"clear": rng.uniform(25, 70), "golden": rng.uniform(6, 20)}.get(b.regime, 50.0)
    azimuth, e = rng.uniform(0, 2 * np.pi), np.radians(elevation)
    k[lo.S_SUN_X : lo.S_SUN_Z + 1] = np.cos(e) * np.cos(azimuth), -np.sin(e), np.cos(e) * np.sin(azimuth)
    k[lo.S_SUN_SOFT], k[lo.S_SEED] = 0.012, rng.uniform(0, 90)
    k[lo.S_CLOUD_FREQ] = rng.uniform(0.3, 0.9)
    k[lo.S_FOG] = rng.choice([0.0006, 0.002, 0.006, 0.02], p=[0.4, 0.35, 0.2, 0.05])
    k[lo.S_AO], k[lo.S_AO_RANGE] = 0.6, 2.5
    if b.regime == "clear":
        deep = rng.uniform(0.7, 1.2)
        sun, up = np.array([2.6, 2.45, 2.2]), np.array([0.5, 0.62, 0.8]) * rng.uniform(0.7, 1.1)
        zenith, horizon = np.array([0.16, 0.32, 0.66]) * deep, np.array([0.68, 0.8, 0.95]) * rng.uniform(0.8, 1.1)
        k[lo.S_CLOUD], cloud = rng.choice([0.0, 0.25, 0.5]), np.array([1.25, 1.25, 1.27])
    elif b.regime == "overcast":
        sun, up = np.zeros(3), np.array([1.0, 1.02, 1.06]) * rng.uniform(0.9, 1.1)
        grey = rng.uniform(0.75, 1.1)
        zenith, horizon = np.array([0.62, 0.66, 0.72]) * grey, np.array([0.86, 0.88, 0.9]) * grey
        k[lo.S_CLOUD], cloud = rng.uniform(0.5, 0.9), np.array([0.92, 0.94, 0.98]) * grey
        k[lo.S_FOG] *= 1.8
    elif b.regime == "golden":
        sun = np.array([2.6, 1.6, 0.8]) * rng.uniform(0.8, 1.1)
        up = np.array([0.42, 0.42, 0.52])
        zenith, horizon = np.array([0.24, 0.34, 0.56]), np.array([1.0, 0.66, 0.42]) * rng.uniform(0.7, 1.1)
        k[lo.S_CLOUD], cloud = rng.choice([0.0, 0.3, 0.6]), np.array([1.1, 0.8, 0.66])
        k[lo.S_SUN_SOFT] = 0.02
    else:
        sun, up = np.zeros(3), np.array([0.05, 0.065, 0.1]) * rng.uniform(0.6, 1.4)
        zenith, horizon = np.array([0.01, 0.016, 0.035]), np.array([0.05, 0.05, 0.07]) * rng.uniform(0.5, 2.0)
        k[lo.S_CLOUD], cloud = rng.choice([0.0, 0.4]), np.array([0.05, 0.055, 0.07])
        k[lo.S_STARS] = float(k[lo.S_CLOUD] == 0.0)
    bounce = np.array([0.42, 0.38, 0.33])
    down = bounce * (0.45 * up + 0.18 * sun)
    if b.indoor:
        # Walls send light back from all sides: the ambient term is nearly even and takes the colour of paint or wood.
        day = {"clear": 1.0, "overcast": 0.8, "golden": 0.75, "night": 0.14}[b.regime]
        warm = np.array([1.0, rng.uniform(0.88, 0.97), rng.uniform(0.72, 0.92)])
        up, down = 0.34 * day * warm, 0.24 * day * warm
        k[lo.S_FOG], k[lo.S_AO], k[lo.S_AO_RANGE] = 0.0, 0.5, 1.6
        sun = sun * 2.0
        zenith, horizon = zenith * 1.6, horizon * 1.6
    k[lo.S_SUN_R : lo.S_SUN_B + 1], k[lo.S_UP_R : lo.S_UP_B + 1], k[lo.S_DOWN_R : lo.S_DOWN_B + 1] = sun, up, down
    k[lo.S_ZENITH_R : lo.S_ZENITH_B + 1], k[lo.S_HORIZON_R : lo.S_HORIZON_B + 1] = zenith, horizon
    k[lo.S_CLOUD_R : lo.S_CLOUD_B + 1] = cloud
    k[lo.S_EXPOSURE] = 1.0
