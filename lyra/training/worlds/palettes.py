"""Which colours do natural and built surfaces have?

Hand-picked sRGB anchors per material, as they appear in daylight photographs, with a jitter that varies brightness much
and hue little. Also the names that captions use for colours. Knows nothing about textures or scenes.
"""

from __future__ import annotations

import colorsys

import numpy as np
from jaxtyping import Float

ANCHORS: dict[str, tuple[tuple[int, int, int], ...]] = {
    "stone": ((150, 142, 130), (120, 116, 110), (176, 164, 142), (98, 95, 92), (190, 184, 172), (138, 124, 104)),
    "sandstone": ((198, 172, 130), (182, 150, 110), (212, 190, 150), (164, 138, 104)),
    "brick": ((150, 82, 62), (128, 66, 52), (168, 104, 80), (112, 62, 50), (178, 130, 100), (140, 96, 78)),
    "plaster": (
        (226, 218, 202),
        (206, 196, 178),
        (232, 228, 220),
        (214, 190, 150),
        (196, 168, 140),
        (184, 186, 180),
        (220, 200, 170),
        (200, 140, 110),
        (176, 190, 196),
        (210, 205, 165),
        (168, 176, 160),
        (222, 180, 150),
    ),
    "paint": (
        (236, 232, 224),
        (222, 214, 200),
        (200, 206, 204),
        (190, 200, 190),
        (214, 202, 180),
        (168, 180, 188),
        (226, 214, 190),
        (150, 160, 150),
        (120, 134, 146),
        (186, 120, 100),
    ),
    "wood": ((134, 94, 60), (104, 70, 44), (160, 120, 80), (84, 58, 40), (182, 148, 106), (120, 100, 80), (66, 46, 34)),
    "bark": ((84, 70, 56), (104, 90, 74), (66, 54, 44), (120, 112, 100), (92, 74, 60)),
    "foliage": ((70, 96, 40), (54, 80, 36), (92, 116, 50), (44, 66, 34), (110, 122, 56), (78, 92, 52), (60, 84, 48)),
    "autumn": ((168, 104, 40), (150, 76, 36), (184, 140, 56), (120, 88, 40), (140, 110, 50)),
    "grass": ((98, 116, 52), (84, 104, 48), (120, 128, 66), (134, 132, 80), (74, 92, 44), (150, 144, 94)),
    "soil": ((112, 90, 66), (92, 74, 56), (134, 112, 84), (150, 130, 100), (78, 64, 50)),
    "sand": ((206, 188, 150), (192, 172, 134), (214, 200, 170), (180, 162, 128)),
    "snow": ((228, 232, 238), (214, 220, 230)),
    "asphalt": ((92, 92, 94), (74, 75, 78), (110, 108, 106), (62, 62, 64), (124, 122, 120)),
    "concrete": ((158, 156, 150), (136, 134, 130), (178, 174, 166), (116, 114, 112), (150, 142, 130)),
    "roof": ((140, 78, 58), (116, 66, 52), (90, 84, 82), (72, 70, 72), (160, 100, 70), (104, 92, 80), (128, 110, 96)),
    "fabric": (
        (120, 56, 50),
        (62, 78, 102),
        (140, 130, 112),
        (92, 98, 84),
        (186, 176, 158),
        (70, 66, 64),
        (150, 110, 70),
        (48, 60, 60),
        (168, 140, 120),
        (96, 72, 60),
        (200, 196, 188),
        (110, 122, 130),
    ),
    "metal": ((120, 124, 128), (84, 88, 92), (52, 54, 58), (150, 150, 148), (70, 74, 70), (104, 92, 80)),
    "car": (
        (190, 192, 194),
        (228, 228, 226),
        (40, 42, 46),
        (92, 98, 106),
        (132, 36, 32),
        (44, 66, 104),
        (70, 84, 74),
        (160, 148, 126),
        (110, 110, 112),
    ),
    "glass": ((58, 70, 80), (44, 52, 60), (84, 98, 108), (36, 42, 46)),
    "tile": ((206, 200, 190), (170, 160, 146), (140, 120, 100), (110, 112, 112), (188, 150, 116), (226, 224, 218)),
    "skin": ((196, 150, 122), (150, 106, 82), (104, 72, 56), (214, 172, 146)),
    "flower": ((196, 70, 60), (226, 190, 80), (214, 150, 160), (236, 230, 220), (206, 120, 60), (150, 110, 160)),
    "sign": ((176, 48, 40), (40, 84, 130), (226, 186, 70), (60, 110, 80), (230, 226, 216), (50, 50, 54)),
}

_NAMES: tuple[tuple[str, tuple[int, int, int]], ...] = (
    ("white", (232, 230, 226)),
    ("cream", (226, 212, 184)),
    ("beige", (204, 184, 152)),
    ("sand-coloured", (190, 164, 122)),
    ("light grey", (186, 186, 184)),
    ("grey", (138, 137, 134)),
    ("dark grey", (82, 82, 84)),
    ("black", (36, 36, 38)),
    ("brown", (118, 84, 58)),
    ("dark brown", (70, 50, 38)),
    ("ochre", (186, 140, 66)),
    ("terracotta", (176, 104, 76)),
    ("brick red", (142, 72, 56)),
    ("red", (164, 44, 38)),
    ("olive green", (112, 114, 66)),
    ("green", (78, 104, 54)),
    ("dark green", (46, 66, 38)),
    ("sage green", (156, 168, 146)),
    ("pale blue", (172, 188, 198)),
    ("slate blue", (96, 112, 132)),
    ("navy blue", (46, 60, 92)),
    ("pink", (214, 160, 158)),
    ("yellow", (224, 188, 84)),
)


def pick_colour(rng: np.random.Generator, family: str, spread: float = 1.0) -> Float[np.ndarray, "3"]:
    """Draw an sRGB colour in [0, 1] of a material family: two anchors mixed, brighter or darker."""
    anchors = np.array(ANCHORS[family], np.float64) / 255.0
    a, b = anchors[rng.integers(len(anchors))], anchors[rng.integers(len(anchors))]
    colour = a + (b - a) * rng.uniform(0, 0.5)
    hue, sat, val = colorsys.rgb_to_hsv(*colour)
    hue = (hue + spread * rng.normal(0, 0.012)) % 1.0
    sat = float(np.clip(sat * (1 + spread * rng.normal(0, 0.15)), 0, 0.75))
    val = float(np.clip(val * (1 + spread * rng.normal(0, 0.12)), 0.08, 0.95))
    return np.array(colorsys.hsv_to_rgb(hue, sat, val))


def colour_name(srgb: Float[np.ndarray, "3"]) -> str:
    """Nearest colour word for an sRGB colour in [0, 1]."""
    table = np.array([c for _, c in _NAMES], np.float64) / 255.0
    weights = np.array([1.0, 1.2, 0.9])
    return _NAMES[int(np.argmin((((table - np.asarray(srgb)) * weights) ** 2).sum(1)))][0]
