"""Pictures as the network was trained to see them: 8-bit, resized as OpenCV does, sides multiples of 14, normalised.

The released code resizes with OpenCV's INTER_AREA and INTER_CUBIC; both are written here in torch. Knows no network.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional as F

from lyra.models.depth_anything.config import PATCH

MEAN = (0.485, 0.456, 0.406)
DEVIATION = (0.229, 0.224, 0.225)
"""Of ImageNet, red, green, blue."""
SMALLEST_OVERLAP = 1e-3
"""Share of a pixel below which INTER_AREA leaves it out at the ends of a cell (OpenCV)."""


def to_bytes(images: Float[Tensor, "*batch"]) -> UInt8[Tensor, "*batch"]:
    """[-1, 1] to 8 bits, rounded half up (released code)."""
    return ((images.float() * 0.5 + 0.5).clamp(0, 1) * 255 + 0.5).clamp(max=255).to(torch.uint8)


def prepare_pixels(
    pixels: UInt8[Tensor, "n 3 h w"],
    resolution: int | None = None,
    bound: Literal["upper", "lower"] = "upper",
) -> Float[Tensor, "n 3 h2 w2"]:
    """Normalised pictures whose sides are multiples of 14.

    Args:
        pixels: RGB.
        resolution: length in pixels of the longest side (upper bound) or of the shortest (lower bound) before sides
            are rounded to multiples of 14; None keeps the size.
        bound: which side `resolution` is about.
    """
    height, width = pixels.shape[-2:]
    side = max(height, width) if bound == "upper" else min(height, width)
    if resolution is not None and resolution != side:
        scale = resolution / side
        size = (max(1, round(height * scale)), max(1, round(width * scale)))
        pixels = resize_cubic(pixels, size) if scale > 1 else resize_area(pixels, size)
    height, width = pixels.shape[-2:]
    size = (nearest_multiple(height), nearest_multiple(width))
    if size[0] > height or size[1] > width:
        pixels = resize_cubic(pixels, size)
    elif size != (height, width):
        pixels = resize_area(pixels, size)
    mean = torch.tensor(MEAN, device=pixels.device)[:, None, None]
    deviation = torch.tensor(DEVIATION, device=pixels.device)[:, None, None]
    return (pixels.float() / 255 - mean) / deviation


def nearest_multiple(side: int) -> int:
    """The nearest multiple of 14, the larger of two equally near ones; at least 14."""
    return max(PATCH, (side + PATCH // 2) // PATCH * PATCH)


def resize_cubic(pixels: UInt8[Tensor, "n 3 h w"], size: tuple[int, int]) -> UInt8[Tensor, "n 3 h2 w2"]:
    """Bicubic with a = -0.75 and no antialiasing, as INTER_CUBIC up to the rounding of its fixed-point weights."""
    resized = F.interpolate(pixels.float(), size=size, mode="bicubic", align_corners=False)
    return resized.round().clamp(0, 255).to(torch.uint8)


def resize_area(pixels: UInt8[Tensor, "n 3 h w"], size: tuple[int, int]) -> UInt8[Tensor, "n 3 h2 w2"]:
    """Mean over the part of the picture that each target pixel covers, as INTER_AREA; no side may grow."""
    down = area_weights(pixels.shape[-2], size[0]).to(pixels.device)
    across = area_weights(pixels.shape[-1], size[1]).to(pixels.device)
    mean = down @ pixels.float() @ across.T
    # OpenCV halves both sides by a path of its own, which rounds half up; elsewhere it rounds half to even.
    halved = tuple(pixels.shape[-2:]) == (2 * size[0], 2 * size[1])
    return ((mean + 0.5).floor() if halved else mean.round()).clamp(0, 255).to(torch.uint8)


def area_weights(source: int, target: int) -> Float[Tensor, "target source"]:
    """Share of each source pixel in each target pixel along one axis."""
    scale = source / target
    start = torch.arange(target, dtype=torch.float64)[:, None] * scale
    end = (start + scale).clamp(max=source)
    pixel = torch.arange(source, dtype=torch.float64)
    overlap = torch.minimum(end, pixel + 1) - torch.maximum(start, pixel)
    return (torch.where(overlap > SMALLEST_OVERLAP, overlap, 0) / (end - start)).float()
