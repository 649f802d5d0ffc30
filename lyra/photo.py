"""How does whatever the user uploads become the upright 8-bit RGB picture, and the tensor, that the world begins with?

Knows files and pixels, no depth, camera or model. Colour profiles are not applied: a photo in a wide-gamut space keeps
its numbers. Metadata (place, time, camera) is dropped and never reaches the world folder.
"""

from __future__ import annotations

import io
import logging
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from lyra.errors import UserError

logger = logging.getLogger(__name__)

MAX_PIXELS = 80_000_000
"""Largest photo that is decoded: 240 MB as RGB."""
MIN_SIDE = 64
"""Shortest side in pixels from which a world can be guessed."""
LANDSCAPE = {"480x832": (480, 832), "448x768": (448, 768)}
"""Height and width of the released command line and of its graphical interface; portrait is the transpose."""
SQUARE = {"480x832": (640, 640), "448x768": (592, 592)}
"""About as many pixels as `LANDSCAPE`, and multiples of 16 like it."""

_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")
"""What people have photos in; left out are formats that run programs (EPS) or hold anything but a picture."""
_SUGGESTION = "save the photo as JPEG or PNG and try again"
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, KeyError, struct.error, zlib.error)
"""What Pillow's decoders raise on damaged files, each its own way."""


def load_photo(source: str | Path | bytes) -> Image.Image:
    """The photo of a file, or of the bytes of one, as an upright RGB image with 8 bits per channel and no metadata.

    EXIF orientation is applied. 16 bits are scaled to 8. Transparent parts are filled with the mean colour of the
    visible ones, which the video model continues more naturally than a white or black sheet. Of an animation or a file
    of several pages the first picture is used, with a warning in the log.

    Raises:
        UserError: the file is missing, is no picture, is damaged, has over `MAX_PIXELS` pixels or a side under
            `MIN_SIDE`, or is wholly transparent.
    """
    name = "The photo" if isinstance(source, bytes) else Path(source).name
    data = source if isinstance(source, bytes) else _read_bytes(Path(source))
    with _open(data, name) as image:
        width, height = image.size
        # The header tells the size before anything is decoded, so a small file that unpacks to gigabytes stops here.
        if width * height > MAX_PIXELS:
            raise UserError(_too_large(name, f"{width} x {height} pixels"))
        if min(width, height) < MIN_SIDE:
            raise UserError(
                f"{name} has {width} x {height} pixels; use a photo with at least {MIN_SIDE} pixels on each side."
            )
        try:
            _warn_of_more_pictures(image, name)
            image.load()
        except (Image.DecompressionBombError, MemoryError) as error:
            raise UserError(_too_large(name, "too many pixels")) from error
        except _BROKEN as error:
            raise UserError(f"{name} is damaged or cut short; {_SUGGESTION}.") from error
        return _without_metadata(_to_rgb(_upright(image, name), name))


def output_size(image: Image.Image, resolution: str = "480x832") -> tuple[int, int]:
    """Height and width in pixels of the walkthrough of a photo: landscape, portrait, or square from 4:5 to 5:4.

    Args:
        resolution: a key of `LANDSCAPE`.
    """
    aspect = image.width / image.height
    if 0.8 <= aspect <= 1.25:
        return SQUARE[resolution]
    height, width = LANDSCAPE[resolution]
    return (height, width) if aspect > 1.25 else (width, height)


def fit_photo(image: Image.Image, height: int, width: int) -> Float[Tensor, "3 h w"]:
    """The largest centred part of an RGB image with the aspect of height x width, resized to it, in [-1, 1].

    Shrinking uses Lanczos with antialiasing, enlarging bicubic, which rings less. (The released code stretches the
    whole photo instead, which distorts it and its intrinsics.)
    """
    scale = min(image.width / width, image.height / height)
    crop_width, crop_height = scale * width, scale * height
    # Division and multiplication may leave the box a rounding error outside of the image, which Pillow refuses.
    left, top = max((image.width - crop_width) / 2, 0.0), max((image.height - crop_height) / 2, 0.0)
    box = (left, top, min(left + crop_width, image.width), min(top + crop_height, image.height))
    resample = Image.Resampling.LANCZOS if scale > 1 else Image.Resampling.BICUBIC
    resized = image.resize((width, height), resample, box=box)
    pixels = torch.from_numpy(np.array(resized, dtype=np.float32))
    return (pixels / 127.5 - 1.0).permute(2, 0, 1).contiguous()


def _read_bytes(path: Path) -> bytes:
    if not path.exists():
        raise UserError(f"There is no photo at {path}; check the name.")
    try:
        return path.read_bytes()
    except OSError as error:
        reason = "is a folder" if path.is_dir() else "cannot be read"
        raise UserError(f"{path.name} {reason}; choose a photo you can open.") from error


def _open(data: bytes, name: str) -> Image.Image:
    """Read the header only."""
    Image.init()
    formats = [known for known in _FORMATS if known in Image.OPEN]
    try:
        return Image.open(io.BytesIO(data), formats=formats)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        # Pillow's own limit, which applications may raise or lower, stopped it first.
        raise UserError(_too_large(name, "too many pixels")) from error
    except UnidentifiedImageError as error:
        raise UserError(f"{name} is not a picture in a known format; {_SUGGESTION}.") from error
    except _BROKEN as error:
        raise UserError(f"{name} is damaged or cut short; {_SUGGESTION}.") from error


def _too_large(name: str, size: str) -> str:
    return f"{name} has {size}; scale it down to at most {MAX_PIXELS // 1_000_000} megapixels."


def _warn_of_more_pictures(image: Image.Image, name: str) -> None:
    # Phones store a preview or a depth map behind the photo as a second picture (MPO); that is no news to anybody.
    if getattr(image, "is_animated", False) and image.format != "MPO":
        logger.warning("%s holds more than one picture; only the first one is used.", name)


def _upright(image: Image.Image, name: str) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except _BROKEN:
        logger.warning("%s has unreadable EXIF data; its orientation is taken as stored.", name)
        return image


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    """RGB from every mode Pillow decodes to."""
    if image.mode == "F" or image.mode.startswith("I"):
        return _from_wide_values(np.asarray(image, dtype=np.float64), white=1.0 if image.mode == "F" else 65535.0)
    # "transparency" is the one transparent colour or palette entry of a PNG or GIF without an alpha channel.
    if "transparency" in image.info or image.mode in ("RGBA", "RGBa", "LA", "La", "PA"):
        return _over_mean_colour(image.convert("RGBA"), name)
    return image.convert("RGB")


def _from_wide_values(values: np.ndarray, white: float) -> Image.Image:
    """8-bit grey from 16-bit or floating-point values; the larger of `white` and the largest value becomes white."""
    values = np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0).clip(min=0.0)
    grey = (values * (255.0 / max(white, float(values.max())))).round().astype(np.uint8)
    return Image.fromarray(grey).convert("RGB")


def _over_mean_colour(image: Image.Image, name: str) -> Image.Image:
    """An RGBA image over the mean colour of what is visible, weighted by how visible it is."""
    weight = np.asarray(image.getchannel("A"), dtype=np.float64)
    total = weight.sum()
    if total == 0:
        raise UserError(f"{name} is wholly transparent; use a photo that shows something.")
    means = [
        round(float((np.asarray(image.getchannel(channel), dtype=np.float64) * weight).sum() / total))
        for channel in "RGB"
    ]
    sheet = Image.new("RGBA", image.size, (means[0], means[1], means[2], 255))
    return Image.alpha_composite(sheet, image).convert("RGB")


def _without_metadata(image: Image.Image) -> Image.Image:
    # An image from bare pixels cannot carry over anything, whatever Pillow keeps beside them.
    return Image.fromarray(np.asarray(image))
