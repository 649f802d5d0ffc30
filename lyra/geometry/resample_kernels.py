"""Compiled CPU kernels of the backward warp; `lyra.geometry.resample` holds the twins that define their numbers."""

from __future__ import annotations

import math

import numba
import numpy as np

from lyra.geometry.resample import EDGE_TOLERANCE


@numba.njit(cache=True, nogil=True, fastmath=False)
def draw_quads(vertices: np.ndarray, coordinates: np.ndarray, quads: np.ndarray, height: int, width: int) -> np.ndarray:
    """(height, width, 3) source x, source y and depth; infinite where no quad is seen."""
    out = np.full((height, width, 3), np.inf, np.float32)
    rows, columns = quads.shape
    triangle_rows = np.array([[0, 1, 0], [1, 0, 1]])
    triangle_columns = np.array([[0, 0, 1], [1, 1, 0]])
    for r in range(rows):
        for c in range(columns):
            if not quads[r, c]:
                continue
            for t in range(2):
                r0, c0 = r + triangle_rows[t, 0], c + triangle_columns[t, 0]
                r1, c1 = r + triangle_rows[t, 1], c + triangle_columns[t, 1]
                r2, c2 = r + triangle_rows[t, 2], c + triangle_columns[t, 2]
                z0, z1, z2 = vertices[r0, c0, 2], vertices[r1, c1, 2], vertices[r2, c2, 2]
                if z0 <= 1e-3 or z1 <= 1e-3 or z2 <= 1e-3:
                    continue
                x0, y0 = vertices[r0, c0, 0], vertices[r0, c0, 1]
                x1, y1 = vertices[r1, c1, 0], vertices[r1, c1, 1]
                x2, y2 = vertices[r2, c2, 0], vertices[r2, c2, 1]
                area = (x1 - x0) * (y2 - y0) - (x2 - x0) * (y1 - y0)
                if abs(area) < 1e-9:
                    continue
                # As much slack as the test of the edges below has, or rounding costs a whole row of pixels.
                least_x, most_x = min(x0, x1, x2), max(x0, x1, x2)
                least_y, most_y = min(y0, y1, y2), max(y0, y1, y2)
                slack_x = EDGE_TOLERANCE * (most_x - least_x)
                slack_y = EDGE_TOLERANCE * (most_y - least_y)
                left = max(0, math.ceil(least_x - slack_x))
                right = min(width - 1, math.floor(most_x + slack_x))
                top = max(0, math.ceil(least_y - slack_y))
                bottom = min(height - 1, math.floor(most_y + slack_y))
                if left > right or top > bottom:
                    continue
                scale = 1.0 / area
                i0, i1, i2 = 1.0 / z0, 1.0 / z1, 1.0 / z2
                for y in range(top, bottom + 1):
                    for x in range(left, right + 1):
                        s1 = ((x - x0) * (y2 - y0) - (x2 - x0) * (y - y0)) * scale
                        s2 = ((x1 - x0) * (y - y0) - (x - x0) * (y1 - y0)) * scale
                        s0 = 1.0 - s1 - s2
                        if s0 < -EDGE_TOLERANCE or s1 < -EDGE_TOLERANCE or s2 < -EDGE_TOLERANCE:
                            continue
                        depth = 1.0 / (s0 * i0 + s1 * i1 + s2 * i2)
                        if depth < out[y, x, 2]:
                            w0 = s0 * i0 * coordinates[r0, c0, 2]
                            w1 = s1 * i1 * coordinates[r1, c1, 2]
                            w2 = s2 * i2 * coordinates[r2, c2, 2]
                            scale_w = 1.0 / (w0 + w1 + w2)
                            w0, w1, w2 = w0 * scale_w, w1 * scale_w, w2 * scale_w
                            out[y, x, 0] = (
                                w0 * coordinates[r0, c0, 0] + w1 * coordinates[r1, c1, 0] + w2 * coordinates[r2, c2, 0]
                            )
                            out[y, x, 1] = (
                                w0 * coordinates[r0, c0, 1] + w1 * coordinates[r1, c1, 1] + w2 * coordinates[r2, c2, 1]
                            )
                            out[y, x, 2] = depth
    return out


@numba.njit(cache=True, nogil=True)
def cubic_weights(t: float, weights: np.ndarray) -> None:
    """Catmull-Rom weights of the four neighbours for a fraction t."""
    weights[0] = ((-0.5 * t + 1.0) * t - 0.5) * t
    weights[1] = (1.5 * t - 2.5) * t * t + 1.0
    weights[2] = ((-1.5 * t + 2.0) * t + 0.5) * t
    weights[3] = (0.5 * t - 0.5) * t * t


@numba.njit(cache=True, nogil=True)
def sample_bicubic(images: np.ndarray, coordinates: np.ndarray, source: np.ndarray) -> np.ndarray:
    """(height, width, 3) colours of images (k, h, w, 3) at coordinates; 0 where source is negative."""
    height, width = source.shape
    _, source_height, source_width, _ = images.shape
    out = np.zeros((height, width, 3), np.float32)
    wx, wy = np.empty(4, np.float32), np.empty(4, np.float32)
    for y in range(height):
        for x in range(width):
            k = source[y, x]
            if k < 0:
                continue
            u = min(max(coordinates[y, x, 0], 0.0), source_width - 1.0)
            v = min(max(coordinates[y, x, 1], 0.0), source_height - 1.0)
            iu, iv = math.floor(u), math.floor(v)
            cubic_weights(u - iu, wx)
            cubic_weights(v - iv, wy)
            r, g, b = np.float32(0), np.float32(0), np.float32(0)
            for j in range(4):
                row = min(max(iv + j - 1, 0), source_height - 1)
                for i in range(4):
                    column = min(max(iu + i - 1, 0), source_width - 1)
                    w = wx[i] * wy[j]
                    r += w * images[k, row, column, 0]
                    g += w * images[k, row, column, 1]
                    b += w * images[k, row, column, 2]
            out[y, x, 0], out[y, x, 1], out[y, x, 2] = r, g, b
    return out
