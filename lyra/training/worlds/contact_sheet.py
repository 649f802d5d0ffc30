"""What do the worlds look like at a glance?

Tiles RGB over inverse depth for a person to look at; nothing in training depends on it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, UInt8

from lyra.training.worlds.world import build_world

_RAMP = np.array([(20, 11, 52), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164)], np.float64)


def depth_colours(depth: Float[np.ndarray, "h w"]) -> UInt8[np.ndarray, "h w 3"]:
    """Colour map of inverse depth (near is bright), scaled by the nearest two percent."""
    inverse = 1.0 / np.maximum(depth, 1e-3)
    x = np.clip(inverse / np.quantile(inverse, 0.98), 0, 1) ** 0.6 * (len(_RAMP) - 1)
    i = np.minimum(x.astype(int), len(_RAMP) - 2)
    f = (x - i)[..., None]
    return (_RAMP[i] * (1 - f) + _RAMP[i + 1] * f).astype(np.uint8)


def contact_sheet(
    families: Sequence[str], seeds: Sequence[int], height: int, width: int, *, supersample: int = 1
) -> UInt8[np.ndarray, "rows cols 3"]:
    """One row of RGB over one row of inverse depth per family, one column per seed; sizes in pixels."""
    rows = []
    for family in families:
        pictures, depths = [], []
        for seed in seeds:
            world, rng = build_world(family, seed), np.random.default_rng([seed, 99])
            k = world.random_intrinsics(rng, height, width)
            view = world.render(world.random_view(rng), k, height, width, supersample=supersample)
            pictures.append(view.rgb)
            depths.append(depth_colours(view.depth))
        rows += [np.concatenate(pictures, 1), np.concatenate(depths, 1)]
    return np.concatenate(rows, 0)
