"""Which textures does a scene choose from?

Builds the bank once per process and seed: generated patterns plus crops of the photographs that ship inside the
scikit-image and scikit-learn packages when those are installed. It does not know how textures are placed.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image as PilImage

from lyra.training.worlds import patterns
from lyra.training.worlds.layout import MIP_LEVELS, TEXELS
from lyra.training.worlds.layout import TEXTURE_SIZE as N
from lyra.training.worlds.palettes import pick_colour

_LOG = logging.getLogger(__name__)

# (package, folder, file, crop box as fractions or None, category); only pictures of natural or everyday surfaces.
_PHOTOS: tuple[tuple[str, str, str, tuple[float, float, float, float], str], ...] = (
    ("skimage", "data", "grass.png", (0, 0, 1, 1), "grass"),
    ("skimage", "data", "gravel.png", (0, 0, 1, 1), "gravel"),
    ("skimage", "data", "brick.png", (0, 0, 1, 1), "brick"),
    ("skimage", "data", "chelsea.png", (0, 0, 1, 1), "picture"),
    ("skimage", "data", "coffee.png", (0, 0, 1, 1), "picture"),
    ("skimage", "data", "rocket.jpg", (0, 0, 1, 1), "picture"),
    ("sklearn.datasets", "images", "flower.jpg", (0, 0, 1, 1), "picture"),
    ("sklearn.datasets", "images", "china.jpg", (0, 0, 1, 1), "picture"),
)


@dataclass(frozen=True)
class TextureBank:
    """All textures of one seed: mip chains (sRGB), mean colours, and the members of each category."""

    texels: UInt8[np.ndarray, "t texels 3"]
    means: Float[np.ndarray, "t 3"]
    members: dict[str, tuple[int, ...]]

    def pick(self, rng: np.random.Generator, category: str) -> int:
        """Draw a texture index of a category."""
        return int(rng.choice(self.members[category]))


def _recipes(rng: np.random.Generator) -> list[tuple[str, int, Callable[[np.random.Generator], np.ndarray]]]:
    """Category, how many, and generator of every synthetic texture."""
    p = patterns
    return [
        ("plain", 4, lambda r: np.full((N, N, 3), 0.85) * (1 + 0.012 * p.spectral_noise(r, 0.6))[..., None]),
        ("plaster", 14, lambda r: p.cloudy(r, "plaster", r.uniform(0.05, 0.3))),
        ("paint", 10, lambda r: p.cloudy(r, "paint", r.uniform(0.02, 0.1))),
        ("concrete", 8, lambda r: p.cloudy(r, "concrete", r.uniform(0.1, 0.35))),
        ("asphalt", 6, lambda r: p.cloudy(r, "asphalt", r.uniform(0.15, 0.4), 0.6)),
        ("soil", 8, lambda r: p.cloudy(r, "soil", r.uniform(0.3, 0.6), 0.9)),
        ("sand", 5, lambda r: p.cloudy(r, "sand", r.uniform(0.1, 0.3), 1.0)),
        ("snow", 3, lambda r: p.cloudy(r, "snow", 0.12)),
        ("rock", 10, lambda r: p.cloudy(r, "stone", r.uniform(0.4, 0.8), 1.0)),
        ("rock", 4, lambda r: p.cloudy(r, "sandstone", r.uniform(0.3, 0.6), 1.0)),
        ("grass", 10, lambda r: p.grassy(r, "grass")),
        ("grass", 4, lambda r: p.dead_leaves(r, "grass", 8, 3.0)),
        ("leaves", 8, lambda r: p.dead_leaves(r, "foliage", 12, 1.7)),
        ("leaves", 4, lambda r: p.grassy(r, "foliage")),
        ("autumn", 5, lambda r: p.dead_leaves(r, "autumn", 12, 1.6)),
        ("litter", 5, lambda r: p.dead_leaves(r, ("soil", "autumn", "bark")[r.integers(3)], 10, 2.0)),
        ("gravel", 6, lambda r: p.dead_leaves(r, ("stone", "concrete", "sand")[r.integers(3)], 14)),
        ("bark", 6, lambda r: p.ramp(p.spectral_noise(r, 0.9, (0.4, 0.12)), p.shades(r, "bark", 4, 0.6))),
        ("brick", 8, lambda r: p.courses(r, "brick", 16, 4, 0.5, int(r.integers(1, 3)))),
        ("ashlar", 5, lambda r: p.courses(r, "stone", 8, 3, 0.5, 1)),
        ("ashlar", 5, lambda r: p.courses(r, "sandstone", 6, 3, 0.5, 1)),
        ("rubble", 8, lambda r: p.cells(r, ("stone", "sandstone")[r.integers(2)], int(r.integers(30, 90)), 3.0)),
        ("cobble", 6, lambda r: p.cells(r, ("stone", "concrete")[r.integers(2)], int(r.integers(60, 150)), 3.0)),
        ("paving", 6, lambda r: p.courses(r, ("concrete", "stone", "sandstone")[r.integers(3)], 4, 3, 0.5, 1)),
        ("tile", 8, lambda r: p.courses(r, "tile", int(2 ** r.integers(1, 4)), int(2 ** r.integers(1, 4)), 0.0, 1)),
        ("plank", 9, lambda r: p.planks(r, "wood", int(r.integers(4, 10)))),
        ("wood", 7, lambda r: p.planks(r, "wood", 1)),
        ("roof", 8, lambda r: p.courses(r, "roof", 12, 10, 0.5, 2)),
        ("fabric", 14, p.fabric),
        ("metal", 5, lambda r: p.cloudy(r, "metal", r.uniform(0.05, 0.2), 1.2)),
        ("facade", 14, partial(p.facade, lit=False)),
        ("facade_lit", 6, partial(p.facade, lit=True)),
        ("sign", 8, p.lettering),
        ("books", 4, p.books),
        ("picture", 5, p.painting),
        ("foam", 2, lambda r: p.cloudy(r, "glass", 0.3)),
    ]


def _load_photo(package: str, folder: str, name: str) -> np.ndarray | None:
    """sRGB picture in [0, 1] that ships inside an installed package, or None."""
    try:
        module = importlib.import_module(package)
        path = Path(str(module.__file__)).parent / folder / name
        return np.asarray(PilImage.open(path).convert("RGB"), np.float64) / 255.0
    except (ImportError, OSError):
        _LOG.debug("no %s in %s; the bank goes without it", name, package)
        return None


def _seamless(img: np.ndarray) -> np.ndarray:
    """Blend a picture with its half-shifted self so that its borders meet."""
    w = np.minimum(np.arange(N), np.arange(N)[::-1]) / (N / 6.0)
    w = np.clip(w, 0, 1)
    w = (w[:, None] * w[None])[..., None]
    return img * w + np.roll(img, (N // 2, N // 2), (0, 1)) * (1 - w)


def _photo_crops(rng: np.random.Generator) -> list[tuple[str, np.ndarray]]:
    """Crops of the bundled photographs; grey ones are tinted with the palette of their category."""
    out: list[tuple[str, np.ndarray]] = []
    for package, folder, name, box, category in _PHOTOS:
        img = _load_photo(package, folder, name)
        if img is None:
            continue
        h, w = img.shape[:2]
        img = img[int(box[1] * h) : int(box[3] * h), int(box[0] * w) : int(box[2] * w)]
        h, w = img.shape[:2]
        for _ in range(3):
            side = int(min(h, w) * rng.uniform(0.45, 1.0))
            y, x = int(rng.integers(h - side + 1)), int(rng.integers(w - side + 1))
            piece = PilImage.fromarray((img[y : y + side, x : x + side] * 255).astype(np.uint8))
            crop = np.asarray(piece.resize((N, N), PilImage.Resampling.LANCZOS), np.float64) / 255.0
            if category in ("grass", "gravel", "brick"):
                tint = pick_colour(rng, {"gravel": "stone"}.get(category, category))
                crop = (0.5 + 0.5 * crop / crop.mean()) * tint * 0.9
            out.append((category, crop if category == "picture" else _seamless(crop)))
    return out


def _mip_chain(img: np.ndarray) -> np.ndarray:
    """All mip levels of an sRGB picture, averaged in the squared (about linear) domain, as one list of texels."""
    levels, linear = [], np.clip(img, 0, 1) ** 2
    for _ in range(MIP_LEVELS):
        levels.append(np.sqrt(linear).reshape(-1, 3))
        linear = 0.25 * (linear[::2, ::2] + linear[1::2, ::2] + linear[::2, 1::2] + linear[1::2, 1::2])
    return (np.concatenate(levels) * 255 + 0.5).astype(np.uint8)


@lru_cache(maxsize=2)
def texture_bank(seed: int = 0) -> TextureBank:
    """Build (once per process and seed) the texture bank; takes a few seconds."""
    rng = np.random.default_rng([771, seed])
    items = [(name, make(rng)) for name, count, make in _recipes(rng) for _ in range(count)] + _photo_crops(rng)
    texels = np.empty((len(items), TEXELS, 3), np.uint8)
    members: dict[str, list[int]] = {}
    for i, (name, img) in enumerate(items):
        texels[i] = _mip_chain(img)
        members.setdefault(name, []).append(i)
    means = texels[:, -16:].astype(np.float64).mean(1) / 255.0
    return TextureBank(texels, means, {k: tuple(v) for k, v in members.items()})
