"""What is a world, and how does one look into it?

Ties a family's scene to rendering, random cameras and a caption, all from one seed. Layouts live in the families,
cameras in ``camera_paths``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from lyra.training.worlds import camera_paths, kernels_shade, kernels_trace
from lyra.training.worlds import families_halls as fh
from lyra.training.worlds import families_indoor as fi
from lyra.training.worlds import families_nature as fn
from lyra.training.worlds import families_town as ft
from lyra.training.worlds import layout as lo
from lyra.training.worlds.builder import Builder
from lyra.training.worlds.captions import write_caption
from lyra.training.worlds.lighting import light_scene, pick_regime
from lyra.training.worlds.textures import texture_bank

_MAKERS: dict[str, Callable[[Builder], None]] = {
    "room": fi.room,
    "corridor": fi.corridor,
    "hall": fh.hall,
    "tabletop": fh.tabletop,
    "stairwell": fh.stairwell,
    "garage": fh.garage,
    "street": ft.street,
    "alley": ft.alley,
    "square": ft.square,
    "village": ft.village,
    "ruins": ft.ruins,
    "forest": fn.forest,
    "hills": fn.hills,
    "waterside": fn.waterside,
    "park": fn.park,
    "canyon": fn.canyon,
    "solids": fn.solids,
}
FAMILIES: tuple[str, ...] = tuple(_MAKERS)
HELD_OUT_FAMILIES: tuple[str, ...] = ("ruins",)


@dataclass(frozen=True)
class RenderedView:
    """One picture: sRGB, z-depth in metres (sky: ``SKY_DEPTH``) of the pixel centres, and the sky mask."""

    rgb: UInt8[np.ndarray, "h w 3"]
    depth: Float[np.ndarray, "h w"]
    sky: Bool[np.ndarray, "h w"]


class World:
    """A procedural place that can be photographed; build it with ``build_world``."""

    def __init__(self, family: str, seed: int, builder: Builder) -> None:
        self.family, self.seed = family, seed
        self.region, self.axis, self.indoor = builder.region, builder.axis, builder.indoor
        self._builder = builder
        self.arrays = builder.arrays()
        self._set_exposure()

    def _set_exposure(self) -> None:
        """Choose one exposure for the whole world from a few tiny probe renders, as a camera's meter would."""
        rng = np.random.default_rng([self.seed, 11])
        k = self.random_intrinsics(rng, 10, 18)
        night = self._builder.regime == "night"
        target = 0.1 if night else 0.18
        for _ in range(2):
            values = []
            for _ in range(3):
                w2c, _ = camera_paths.any_view(self, rng)
                values.append((self.render(w2c, k, 10, 18).rgb / 255.0) ** 2)
            lum = np.concatenate([v.reshape(-1, 3) for v in values]) @ np.array([0.25, 0.65, 0.1])
            level = 0.7 * np.exp(np.log(lum + 0.01).mean()) + 0.3 * lum.mean()
            self.arrays.sky[lo.S_EXPOSURE] *= float(np.clip(target / level, 0.2, 5.0)) ** 0.85
        self.arrays.sky[lo.S_EXPOSURE] *= float(np.exp(rng.normal(0, 0.15)))

    def render(
        self,
        w2c: Float[np.ndarray, "4 4"],
        K: Float[np.ndarray, "3 3"],
        height: int,
        width: int,
        *,
        supersample: int = 1,
        shading: bool = True,
    ) -> RenderedView:
        """Photograph the world: colours averaged over ``supersample``^2 rays, depth of the pixel centres.

        With ``shading=False`` only depth and sky are computed and the picture stays black.
        """
        rgb = np.zeros((height, width, 3), np.uint8)
        depth, sky = np.zeros((height, width), np.float32), np.zeros((height, width), np.bool_)
        c2w, k_inverse = np.linalg.inv(np.asarray(w2c, np.float64)), np.linalg.inv(np.asarray(K, np.float64))
        kernels_shade.render_rows(self.arrays, c2w, k_inverse, 0, height, width, supersample, shading, rgb, depth, sky)
        return RenderedView(rgb, depth, sky)

    def probe(
        self, w2c: Float[np.ndarray, "4 4"], hfov_deg: float = 65.0, height: int = 16, width: int = 28
    ) -> tuple[Float[np.ndarray, "h w"], Int[np.ndarray, "h w"]]:
        """Low-resolution z-depth (metres) and primitive numbers (-1 ground, -2 sky) of a view."""
        f = 0.5 * width / np.tan(np.radians(hfov_deg) / 2)
        k = np.array([[f, 0, (width - 1) / 2], [0, f, (height - 1) / 2], [0, 0, 1.0]])
        depth, ids = np.zeros((height, width)), np.zeros((height, width), np.int64)
        c2w = np.linalg.inv(w2c)
        kernels_trace.cast_depth(self.arrays, c2w, np.linalg.inv(k), height, width, depth, ids)
        return depth, ids

    def cast_rays(
        self, origins: Float[np.ndarray, "n 3"], directions: Float[np.ndarray, "n 3"], limit: float
    ) -> tuple[Float[np.ndarray, "n"], Int[np.ndarray, "n"]]:
        """Nearest hits: ray parameters (at most ``limit``) and primitive numbers (-1 ground, -2 nothing)."""
        t, ids = np.zeros(len(origins)), np.zeros(len(origins), np.int64)
        o, d = (np.ascontiguousarray(a, np.float64) for a in (origins, directions))
        kernels_trace.cast(self.arrays, o, d, float(limit), t, ids)
        return t, ids

    def clearance(self, points: Float[np.ndarray, "n 3"], limit: float = 1.0) -> Float[np.ndarray, "n"]:
        """Distance (metres, at most ``limit``) from each point to the nearest surface, probed with 42 rays."""
        n = len(points)
        rays = camera_paths.SPHERE
        t, _ = self.cast_rays(np.repeat(points, len(rays), 0), np.tile(rays, (n, 1)), limit)
        return t.reshape(n, len(rays)).min(1)

    def ground_height(self, x: float, z: float) -> float:
        """Height of the ground in metres above y=0 (upwards positive) at a position."""
        return 0.0 if self.indoor else self._builder.ground_height(x, z)

    def random_intrinsics(self, rng: np.random.Generator, height: int, width: int) -> Float[np.ndarray, "3 3"]:
        """Pinhole matrix in pixels with a horizontal field of view of 45..95 degrees and a centred principal point."""
        fov = np.radians(45.0 + 50.0 * rng.beta(1.6, 2.2))
        f = 0.5 * width / np.tan(fov / 2)
        return np.array([[f, 0, (width - 1) / 2], [0, f, (height - 1) / 2], [0, 0, 1.0]])

    def random_view(self, rng: np.random.Generator) -> Float[np.ndarray, "4 4"]:
        """World-to-camera pose worth looking from; see ``camera_paths.random_view``."""
        return camera_paths.random_view(self, rng)

    def random_walk(self, rng: np.random.Generator, frames: int) -> Float[np.ndarray, "frames 4 4"]:
        """Smooth world-to-camera path through free space; see ``camera_paths.random_walk``."""
        return camera_paths.random_walk(self, rng, frames)

    def caption(self) -> str:
        """English description of the place, light, materials and objects."""
        return write_caption(self._builder, self.seed)


def build_world(family: str, seed: int, *, texture_seed: int = 0) -> World:
    """Build a world of a family from a seed; the same arguments give the same world bit for bit.

    ``texture_seed`` chooses the texture bank, so that held-out worlds can wear textures never trained on.
    """
    if family not in _MAKERS:
        raise ValueError(f"family must be one of {', '.join(FAMILIES)}, not {family!r}")
    rng = np.random.default_rng([FAMILIES.index(family), seed])
    b = Builder(rng, texture_bank(texture_seed), pick_regime(rng))
    _MAKERS[family](b)
    light_scene(b)
    return World(family, seed, b)
