"""Compiled CPU kernels of the forward warp; `lyra.geometry.warp` holds the twins that define their numbers."""

from __future__ import annotations

import math

import numba
import numpy as np


@numba.njit(cache=True, nogil=True)
def splat_kernel(
    values: np.ndarray, uv: np.ndarray, z: np.ndarray, height: int, width: int, highest_log_depth: float
) -> np.ndarray:
    """Sums of weighted values, weighted depth and weights, (c + 2, height, width) float32."""
    points, channels = values.shape
    canvas = np.zeros((height + 2, width + 2, channels + 2), np.float32)
    scale = np.float32(highest_log_depth) + np.float32(1e-7)
    for p in range(points):
        depth = z[p]
        if not depth > 0:
            continue
        exponent = min(np.float32(80.0), np.float32(50.0) * np.float32(math.log1p(depth)) / scale)
        weight = np.float32(1.0) / (np.float32(math.exp(exponent)) + np.float32(1e-7))
        x, y = uv[p, 0] + np.float32(1), uv[p, 1] + np.float32(1)
        if not (x == x and y == y):
            continue
        x_low, x_high = min(max(math.floor(x), 0), width + 1), min(max(math.ceil(x), 0), width + 1)
        y_low, y_high = min(max(math.floor(y), 0), height + 1), min(max(math.ceil(y), 0), height + 1)
        x, y = min(max(x, np.float32(0)), np.float32(width + 1)), min(max(y, np.float32(0)), np.float32(height + 1))
        for corner_x in (x_low, x_high):
            share_x = np.float32(1) - abs(x - np.float32(corner_x))
            for corner_y in (y_low, y_high):
                share = share_x * (np.float32(1) - abs(y - np.float32(corner_y))) * weight
                cell = canvas[int(corner_y), int(corner_x)]
                for c in range(channels):
                    cell[c] += values[p, c] * share
                cell[channels] += depth * share
                cell[channels + 1] += share
    return np.ascontiguousarray(canvas[1:-1, 1:-1].transpose(2, 0, 1))
