"""Compiled CPU kernels: compositing of sorted Gaussians on the image, and its derivative.

Values are those of `rasterizer_reference`. One thread a view: tiles share Gaussians, so their gradients would meet.
Knows neither torch nor cameras.
"""

from __future__ import annotations

import math

import numba
import numpy as np

from lyra.reconstruction.rasterizer_kernels import LEAST_ALPHA, LEAST_TRANSMITTANCE, MOST_ALPHA

TILE = 16
"""Pixels a side of a tile; smaller than for viewing, because splats of training views are small."""


@numba.njit(cache=True, nogil=True, error_model="numpy", inline="always")
def pixel_box(
    centres: np.ndarray, conics: np.ndarray, opacities: np.ndarray, i: int, height: int, width: int
) -> tuple[int, int, int, int]:
    """First column and row and last ones, inclusive, of the pixels that Gaussian i may change."""
    a, b, c = conics[i, 0], conics[i, 1], conics[i, 2]
    determinant = a * c - b * b
    reach = 2 * math.log(opacities[i] / LEAST_ALPHA)
    if not (reach > 0 and determinant > 0):
        return 0, 0, -1, -1
    half_width, half_height = math.sqrt(reach * c / determinant) + 0.02, math.sqrt(reach * a / determinant) + 0.02
    u, v = centres[i, 0] - 0.5, centres[i, 1] - 0.5
    left, right = max(u - half_width, 0.0), min(u + half_width, width - 1.0)
    top, bottom = max(v - half_height, 0.0), min(v + half_height, height - 1.0)
    if not (left <= right and top <= bottom):
        return 0, 0, -1, -1
    return math.ceil(left), math.ceil(top), math.floor(right), math.floor(bottom)


@numba.njit(cache=True, nogil=True, error_model="numpy")
def tile_lists(
    centres: np.ndarray, conics: np.ndarray, opacities: np.ndarray, height: int, width: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where each tile's list starts, one more than tiles, the Gaussians of all lists, nearest first, and all boxes."""
    rows, columns = (height + TILE - 1) // TILE, (width + TILE - 1) // TILE
    starts = np.zeros(rows * columns + 1, np.int64)
    boxes = np.empty((len(centres), 4), np.int32)
    for i in range(len(centres)):
        x0, y0, x1, y1 = pixel_box(centres, conics, opacities, i, height, width)
        boxes[i, 0], boxes[i, 1], boxes[i, 2], boxes[i, 3] = x0, y0, x1, y1
        if x1 < x0 or y1 < y0:
            continue
        for row in range(y0 // TILE, y1 // TILE + 1):
            for column in range(x0 // TILE, x1 // TILE + 1):
                starts[row * columns + column + 1] += 1
    for tile in range(rows * columns):
        starts[tile + 1] += starts[tile]
    entries, ends = np.empty(starts[-1], np.int32), starts[:-1].copy()
    for i in range(len(centres)):
        if boxes[i, 2] < boxes[i, 0] or boxes[i, 3] < boxes[i, 1]:
            continue
        for row in range(boxes[i, 1] // TILE, boxes[i, 3] // TILE + 1):
            for column in range(boxes[i, 0] // TILE, boxes[i, 2] // TILE + 1):
                entries[ends[row * columns + column]] = i
                ends[row * columns + column] += 1
    return starts, entries, boxes


@numba.njit(cache=True, nogil=True, error_model="numpy")
def composite_forward(
    centres: np.ndarray,
    conics: np.ndarray,
    opacities: np.ndarray,
    features: np.ndarray,
    starts: np.ndarray,
    entries: np.ndarray,
    boxes: np.ndarray,
    height: int,
    width: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Composited features (f, h, w), what light is left (h, w), and the end of each pixel's list (h, w)."""
    count = features.shape[1]
    image = np.zeros((count, height, width), np.float32)
    transmittance = np.ones((height, width), np.float32)
    last = np.full((height, width), np.iinfo(np.int64).max, np.int64)
    columns = (width + TILE - 1) // TILE
    for tile in range(len(starts) - 1):
        left, top = tile % columns * TILE, tile // columns * TILE
        for position in range(starts[tile], starts[tile + 1]):
            i = entries[position]
            x0, y0, x1, y1 = boxes[i, 0], boxes[i, 1], boxes[i, 2], boxes[i, 3]
            a, b, c = conics[i, 0], conics[i, 1], conics[i, 2]
            for y in range(max(y0, top), min(y1, top + TILE - 1) + 1):
                dy = np.float32(y + 0.5) - centres[i, 1]
                for x in range(max(x0, left), min(x1, left + TILE - 1) + 1):
                    if position >= last[y, x]:
                        continue
                    dx = np.float32(x + 0.5) - centres[i, 0]
                    distance = a * dx * dx + 2 * b * dx * dy + c * dy * dy
                    alpha = min(np.float32(MOST_ALPHA), opacities[i] * math.exp(np.float32(-0.5) * distance))
                    if alpha < LEAST_ALPHA:
                        continue
                    remaining = transmittance[y, x] * (1 - alpha)
                    if remaining <= LEAST_TRANSMITTANCE:
                        last[y, x] = position
                        continue
                    weight = alpha * transmittance[y, x]
                    for f in range(count):
                        image[f, y, x] += weight * features[i, f]
                    transmittance[y, x] = remaining
    return image, transmittance, last


@numba.njit(cache=True, nogil=True, error_model="numpy")
def composite_backward(
    centres: np.ndarray,
    conics: np.ndarray,
    opacities: np.ndarray,
    features: np.ndarray,
    starts: np.ndarray,
    entries: np.ndarray,
    boxes: np.ndarray,
    transmittance: np.ndarray,
    last: np.ndarray,
    gradient: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Gradients of centres, conics, opacities and features, from that of the composited features (f, h, w).

    Goes back to front: the light in front of a Gaussian is what is left behind it over 1 - alpha, and `later` holds
    what the Gaussians behind it add to the loss.
    """
    count, (height, width) = features.shape[1], transmittance.shape
    d_centres, d_conics = np.zeros_like(centres), np.zeros_like(conics)
    d_opacities, d_features = np.zeros_like(opacities), np.zeros_like(features)
    light, later = transmittance.copy(), np.zeros((height, width), np.float32)
    columns = (width + TILE - 1) // TILE
    for tile in range(len(starts) - 1):
        left, top = tile % columns * TILE, tile // columns * TILE
        for position in range(starts[tile + 1] - 1, starts[tile] - 1, -1):
            i = entries[position]
            x0, y0, x1, y1 = boxes[i, 0], boxes[i, 1], boxes[i, 2], boxes[i, 3]
            a, b, c = conics[i, 0], conics[i, 1], conics[i, 2]
            for y in range(max(y0, top), min(y1, top + TILE - 1) + 1):
                dy = np.float32(y + 0.5) - centres[i, 1]
                for x in range(max(x0, left), min(x1, left + TILE - 1) + 1):
                    if position >= last[y, x]:
                        continue
                    dx = np.float32(x + 0.5) - centres[i, 0]
                    falloff = math.exp(np.float32(-0.5) * (a * dx * dx + 2 * b * dx * dy + c * dy * dy))
                    alpha = min(np.float32(MOST_ALPHA), opacities[i] * falloff)
                    if alpha < LEAST_ALPHA:
                        continue
                    before = light[y, x] / (1 - alpha)
                    own = np.float32(0)
                    for f in range(count):
                        d_features[i, f] += alpha * before * gradient[f, y, x]
                        own += features[i, f] * gradient[f, y, x]
                    d_alpha = before * own - later[y, x] / (1 - alpha)
                    later[y, x] += alpha * before * own
                    light[y, x] = before
                    if opacities[i] * falloff >= MOST_ALPHA:
                        continue
                    d_opacities[i] += d_alpha * falloff
                    d_distance = np.float32(-0.5) * alpha * d_alpha
                    d_conics[i, 0] += d_distance * dx * dx
                    d_conics[i, 1] += d_distance * 2 * dx * dy
                    d_conics[i, 2] += d_distance * dy * dy
                    d_centres[i, 0] -= d_distance * 2 * (a * dx + b * dy)
                    d_centres[i, 1] -= d_distance * 2 * (b * dx + c * dy)
    return d_centres, d_conics, d_opacities, d_features
