"""How does a photo look to the model before anything is generated: its depth as a picture and as a cloud of points.

Writes small files for the page. Knows no component and no tab; the geometry is the library's.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from lyra.export.ply import write_point_ply
from lyra.generation.walkthrough import to_uint8
from lyra.geometry.cameras import unproject
from lyra.pipeline import SeenPhoto
from lyra.types import Cameras

POINT_STRIDE = 2
"""Every n-th pixel of both sides becomes a point: 100,000 points, 1.5 MB, of a walkthrough's first frame."""
THUMBNAIL = (320, 240)
SKY_GREY = 150

_NEAR_TO_FAR = np.array(
    [(253, 231, 149), (251, 178, 97), (238, 110, 92), (183, 55, 121), (106, 33, 126), (42, 20, 88)], np.float32
)
"""Colours from near to far: light is near, equal steps of lightness, also in grey."""


def depth_picture(seen: SeenPhoto) -> Image.Image:
    """The depth map in colours, light near and dark far, with the sky in grey.

    Colours are spread over the logarithm of the depth between its 2 % and 98 % quantiles.
    """
    depth, sky = seen.depth.depth.numpy(), seen.depth.sky.numpy()
    logarithm = np.log(np.maximum(depth, 1e-6))
    ground = logarithm[~sky] if not sky.all() else logarithm.ravel()
    low, high = np.quantile(ground, (0.02, 0.98))
    share = np.clip((logarithm - low) / max(high - low, 1e-6), 0, 1)
    stops = np.linspace(0, 1, len(_NEAR_TO_FAR))
    colours = np.stack([np.interp(share, stops, channel) for channel in _NEAR_TO_FAR.T], axis=-1)
    colours[sky] = SKY_GREY
    return Image.fromarray(colours.round().astype(np.uint8))


def write_depth_picture(path: Path, seen: SeenPhoto) -> Path:
    """Write `depth_picture` as a PNG."""
    depth_picture(seen).save(path)
    return path


def write_photo_points(path: Path, seen: SeenPhoto) -> Path:
    """Write what the photo shows as coloured points, without the sky, which is nowhere."""
    points = unproject(seen.depth.depth, torch.eye(4), seen.depth.intrinsics)
    colours = to_uint8(seen.image).movedim(0, -1)
    thinned = slice(POINT_STRIDE // 2, None, POINT_STRIDE)
    solid = ~seen.depth.sky[thinned, thinned]
    write_point_ply(path, points[thinned, thinned][solid], colours[thinned, thinned][solid])
    return path


def photo_camera(seen: SeenPhoto) -> Cameras:
    """The camera that took the photo, as a path of one pose."""
    height, width = seen.image.shape[-2:]
    return Cameras(torch.eye(4)[None], seen.depth.intrinsics[None].float(), height, width)


def thumbnail(photo: Path) -> Image.Image:
    """A small copy of an example photo for the gallery."""
    with Image.open(photo) as image:
        image.draft("RGB", THUMBNAIL)
        image.thumbnail((2 * THUMBNAIL[0], 2 * THUMBNAIL[1]))
        return image.convert("RGB")
