"""Photos that training may look at: those that scikit-image ships, all public domain or CC0.

They add natural texture and colour to what the autoencoder sees; nothing is downloaded. The photos under `examples/`
and scikit-learn's two are kept for judging and never trained on.
"""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

logger = logging.getLogger(__name__)

TRAINING_PHOTOS = (
    "astronaut.png",
    "brick.png",
    "chelsea.png",
    "coffee.png",
    "grass.png",
    "gravel.png",
    "motorcycle_left.png",
    "rocket.jpg",
)


def training_photos() -> list[UInt8[np.ndarray, "h w 3"]]:
    """The photos as arrays; an empty list where scikit-image is not installed."""
    try:
        import skimage
    except ImportError:
        logger.warning("scikit-image is not installed, so no photos are used; pip install scikit-image adds them")
        return []
    folder = Path(skimage.__file__).parent / "data"
    return [
        np.asarray(Image.open(folder / name).convert("RGB")) for name in TRAINING_PHOTOS if (folder / name).exists()
    ]
