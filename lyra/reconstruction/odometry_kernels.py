"""Compiled CPU kernel of the visual odometry: points seen in an image, and how their brightness answers to a motion.

`lyra.reconstruction.odometry_alignment` says what the numbers mean and owns every other setting.
"""

from __future__ import annotations

import numba
import numpy as np

NEAREST = 1e-3
"""Points nearer to the camera plane than this are not seen, in scene units."""


@numba.njit(cache=True, nogil=True, inline="always")
def _sample(image: np.ndarray, row: int, column: int, right: float, down: float) -> float:
    """Bilinear value between a pixel, the one to its right and the two below."""
    above = (1.0 - right) * image[row, column] + right * image[row, column + 1]
    below = (1.0 - right) * image[row + 1, column] + right * image[row + 1, column + 1]
    return (1.0 - down) * above + down * below


@numba.njit(cache=True, nogil=True)
def warp_residuals(
    points: np.ndarray,
    values: np.ndarray,
    pose: np.ndarray,
    pinhole: np.ndarray,
    image: np.ndarray,
    gradient_x: np.ndarray,
    gradient_y: np.ndarray,
    gain: float,
    bias: float,
    seen: np.ndarray,
    residuals: np.ndarray,
    jacobian: np.ndarray,
) -> int:
    """Fill index, residual and Jacobian of each point that falls into the image, in order; return how many do.

    The residual is brightness in the image minus gain times own brightness minus bias. Columns of the Jacobian: a
    translation and a rotation applied after `pose`, gain, bias. `pinhole` is (fx, fy, cx, cy), pixel centres at
    integers.
    """
    height, width = image.shape
    fx, fy, cx, cy = pinhole[0], pinhole[1], pinhole[2], pinhole[3]
    count = 0
    for p in range(len(points)):
        px, py, pz = points[p, 0], points[p, 1], points[p, 2]
        x = pose[0, 0] * px + pose[0, 1] * py + pose[0, 2] * pz + pose[0, 3]
        y = pose[1, 0] * px + pose[1, 1] * py + pose[1, 2] * pz + pose[1, 3]
        z = pose[2, 0] * px + pose[2, 1] * py + pose[2, 2] * pz + pose[2, 3]
        if not z > NEAREST:
            continue
        u, v = fx * x / z + cx, fy * y / z + cy
        # The outermost pixels have no gradient of their own, so they do not count as inside.
        if not (u >= 1.0 and v >= 1.0 and u < width - 2 and v < height - 2):
            continue
        column, row = int(u), int(v)
        right, down = u - column, v - row
        gx = _sample(gradient_x, row, column, right, down)
        gy = _sample(gradient_y, row, column, right, down)
        a, b = gx * fx / z, gy * fy / z
        c = -(a * x + b * y) / z
        seen[count] = p
        residuals[count] = _sample(image, row, column, right, down) - gain * values[p] - bias
        jacobian[count, 0], jacobian[count, 1], jacobian[count, 2] = a, b, c
        jacobian[count, 3], jacobian[count, 4], jacobian[count, 5] = y * c - z * b, z * a - x * c, x * b - y * a
        jacobian[count, 6], jacobian[count, 7] = -values[p], -1.0
        count += 1
    return count
