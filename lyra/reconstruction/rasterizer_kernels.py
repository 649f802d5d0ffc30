"""Compiled CPU kernels of the Gaussian rasteriser; `rasterizer_reference` holds the twin that defines their numbers.

Three steps: project the Gaussians and count the tiles that each touches, fill the tiles' lists, sort and composite
each tile. A kernel does one part of its step and lets other threads run. All in one file, because numba's cache does
not see changes of another one. Knows neither torch nor scenes.
Conditions are written so that NaN fails them.
"""

from __future__ import annotations

import math

import numba
import numpy as np

TILE = 32
"""Pixels a side of a tile; at most 63, because the pixels of a row are the bits of a word."""
NEAR, FAR = 0.01, 1e10
"""Gaussians whose centre has a z depth outside are not drawn (gsplat)."""
LOW_PASS = 0.3
"""Added to the variances on the image, in square pixels (gsplat)."""
LEAST_ALPHA = 1 / 255
"""Fainter contributions to a pixel are skipped (gsplat)."""
MOST_ALPHA = 0.999
LEAST_TRANSMITTANCE = 1e-4
"""A pixel is finished by the Gaussian that would take it to this or below, which itself is not drawn (gsplat)."""
VIEW_MARGIN = 0.3
"""How far outside the image the perspective's derivative still follows a centre, as a share of half the image
(gsplat)."""

U, V, U_REST, V_REST, P, Q, R, OPACITY, REACH, Z, RED, GREEN, BLUE, HALF_WIDTH, HALF_HEIGHT, FIELDS = range(16)
"""Columns of a projected splat. Its centre is at whole pixels (U, V) and the rest, because float32 alone places it to
a ten-thousandth of a pixel only. On the image it is where p (dx + q dy)^2 + r dy^2 is below `REACH`, which is twice
ln(opacity / LEAST_ALPHA); p, q and r are a factorisation of the inverse covariance that float32 holds well, however
thin the splat is."""
FARTHEST = 1e9
"""Splats that reach farther than this many pixels are dropped, because their numbers leave float32."""
SLACK = 0.02
"""Pixels that bounds are widened by, so that rounding loses no pixel; each pixel is tested again."""


@numba.njit(cache=True, nogil=True, error_model="numpy")
def spherical_harmonics(sh: np.ndarray, i: int, c: int, x: float, y: float, z: float) -> float:
    """Colour channel c of Gaussian i seen along the unit direction (x, y, z), degrees 0 to 3, at least 0 (gsplat).

    NaN where a coefficient is not finite.
    """
    count = sh.shape[1]
    value = 0.5 + 0.28209479177387814 * sh[i, 0, c]
    if count >= 4:
        value += 0.4886025119029199 * (z * sh[i, 2, c] - y * sh[i, 1, c] - x * sh[i, 3, c])
    if count >= 9:
        value += 1.0925484305920792 * (x * y * sh[i, 4, c] - y * z * sh[i, 5, c] - x * z * sh[i, 7, c])
        value += 0.31539156525252005 * (3 * z * z - 1) * sh[i, 6, c]
        value += 0.5462742152960396 * (x * x - y * y) * sh[i, 8, c]
    if count >= 16:
        value -= 0.5900435899266435 * y * (3 * x * x - y * y) * sh[i, 9, c]
        value += 2.890611442640554 * x * y * z * sh[i, 10, c]
        value -= 0.4570457994644658 * y * (5 * z * z - 1) * sh[i, 11, c]
        value += 0.3731763325901154 * z * (5 * z * z - 3) * sh[i, 12, c]
        value -= 0.4570457994644658 * x * (5 * z * z - 1) * sh[i, 13, c]
        value += 1.445305721320277 * z * (x * x - y * y) * sh[i, 14, c]
        value -= 0.5900435899266435 * x * (x * x - 3 * y * y) * sh[i, 15, c]
    return max(value, 0.0) if abs(value) < math.inf else math.nan


@numba.njit(cache=True, nogil=True, error_model="numpy")
def image_covariance(
    quats: np.ndarray, scales: np.ndarray, i: int, w2c: np.ndarray, jacobian: tuple[float, float, float, float]
) -> tuple[float, float, float, float]:
    """Variances (xx, xy, yy) on the image in square pixels and their determinant, low-pass included.

    Sums over the splat's three axes as they appear on the image; the determinant comes from the axes' cross products,
    because the difference of products is lost to rounding for thin splats.
    """
    qw, qx, qy, qz = float(quats[i, 0]), float(quats[i, 1]), float(quats[i, 2]), float(quats[i, 3])
    double = 2 / (qw * qw + qx * qx + qy * qy + qz * qz)
    rotation = (
        (1 - double * (qy * qy + qz * qz), double * (qx * qy + qw * qz), double * (qx * qz - qw * qy)),
        (double * (qx * qy - qw * qz), 1 - double * (qx * qx + qz * qz), double * (qy * qz + qw * qx)),
        (double * (qx * qz + qw * qy), double * (qy * qz - qw * qx), 1 - double * (qx * qx + qy * qy)),
    )
    x_z, y_z, z_x, z_y = jacobian
    s0, s1, s2 = float(scales[i, 0]), float(scales[i, 1]), float(scales[i, 2])
    u0, v0 = project_axis(rotation[0], s0, w2c, x_z, y_z, z_x, z_y)
    u1, v1 = project_axis(rotation[1], s1, w2c, x_z, y_z, z_x, z_y)
    u2, v2 = project_axis(rotation[2], s2, w2c, x_z, y_z, z_x, z_y)
    xx, yy, xy = u0 * u0 + u1 * u1 + u2 * u2, v0 * v0 + v1 * v1 + v2 * v2, u0 * v0 + u1 * v1 + u2 * v2
    c0, c1, c2 = u1 * v2 - u2 * v1, u2 * v0 - u0 * v2, u0 * v1 - u1 * v0
    determinant = c0 * c0 + c1 * c1 + c2 * c2 + LOW_PASS * (xx + yy) + LOW_PASS * LOW_PASS
    return xx + LOW_PASS, xy, yy + LOW_PASS, determinant


@numba.njit(cache=True, nogil=True, error_model="numpy", inline="always")
def project_axis(
    axis: tuple[float, float, float], scale: float, w2c: np.ndarray, x_z: float, y_z: float, z_x: float, z_y: float
) -> tuple[float, float]:
    """A world axis of some length on the image, in pixels: its first-order change of (u, v)."""
    x = (w2c[0, 0] * axis[0] + w2c[0, 1] * axis[1] + w2c[0, 2] * axis[2]) * scale
    y = (w2c[1, 0] * axis[0] + w2c[1, 1] * axis[1] + w2c[1, 2] * axis[2]) * scale
    z = (w2c[2, 0] * axis[0] + w2c[2, 1] * axis[1] + w2c[2, 2] * axis[2]) * scale
    return x_z * x + z_x * z, y_z * y + z_y * z


@numba.njit(cache=True, nogil=True, error_model="numpy")
def project_gaussian(
    means: np.ndarray,
    quats: np.ndarray,
    scales: np.ndarray,
    opacities: np.ndarray,
    sh: np.ndarray,
    i: int,
    w2c: np.ndarray,
    centre: np.ndarray,
    camera: np.ndarray,
    height: int,
    width: int,
    splats: np.ndarray,
    boxes: np.ndarray,
    k: int,
) -> bool:
    """Write Gaussian i as splat k with its inclusive box of tiles; False if it adds nothing to the image."""
    mx, my, mz = float(means[i, 0]), float(means[i, 1]), float(means[i, 2])
    z = w2c[2, 0] * mx + w2c[2, 1] * my + w2c[2, 2] * mz + w2c[2, 3]
    opacity = float(opacities[i])
    if not (z >= NEAR and z <= FAR and opacity >= LEAST_ALPHA):
        return False
    x = (w2c[0, 0] * mx + w2c[0, 1] * my + w2c[0, 2] * mz + w2c[0, 3]) / z
    y = (w2c[1, 0] * mx + w2c[1, 1] * my + w2c[1, 2] * mz + w2c[1, 3]) / z
    fx, fy, cx, cy = camera[0], camera[1], camera[2], camera[3]
    margin_x, margin_y = VIEW_MARGIN * 0.5 * width / fx, VIEW_MARGIN * 0.5 * height / fy
    x_bound = min(max(x, -cx / fx - margin_x), (width - cx) / fx + margin_x)
    y_bound = min(max(y, -cy / fy - margin_y), (height - cy) / fy + margin_y)
    jacobian = (fx / z, fy / z, -fx * x_bound / z, -fy * y_bound / z)
    xx, xy, yy, determinant = image_covariance(quats, scales, i, w2c, jacobian)
    u, v = fx * x + cx, fy * y + cy
    reach = 2 * math.log(opacity / LEAST_ALPHA)
    half_width, half_height = math.sqrt(reach * xx) + SLACK, math.sqrt(reach * yy) + SLACK
    # Pixel centres are at +0.5. These comparisons also reject what is not finite.
    if not (half_width <= FARTHEST and half_height <= FARTHEST and determinant < math.inf):
        return False
    if not (u + half_width >= 0.5 and u - half_width <= width - 0.5):
        return False
    if not (v + half_height >= 0.5 and v - half_height <= height - 0.5):
        return False
    dx, dy, dz = mx - centre[0], my - centre[1], mz - centre[2]
    far = 1 / math.sqrt(dx * dx + dy * dy + dz * dz)
    total = 0.0
    for c in range(3):
        value = spherical_harmonics(sh, i, c, dx * far, dy * far, dz * far)
        splats[k, RED + c] = value
        total += value
    if not total < math.inf:
        return False
    splats[k, U], splats[k, V], splats[k, Z] = math.floor(u), math.floor(v), z
    splats[k, U_REST], splats[k, V_REST] = u - float(splats[k, U]), v - float(splats[k, V])
    splats[k, P], splats[k, Q], splats[k, R] = yy / determinant, -xy / yy, 1 / yy
    splats[k, OPACITY], splats[k, REACH] = opacity, reach
    splats[k, HALF_WIDTH], splats[k, HALF_HEIGHT] = half_width, half_height
    boxes[k, 0] = int(max(u - half_width - 0.5, 0.0)) // TILE
    boxes[k, 1] = int(min(u + half_width - 0.5, width - 1.0)) // TILE
    boxes[k, 2] = int(max(v - half_height - 0.5, 0.0)) // TILE
    boxes[k, 3] = int(min(v + half_height - 0.5, height - 1.0)) // TILE
    return True


@numba.njit(cache=True, nogil=True, error_model="numpy")
def tile_columns(splats: np.ndarray, boxes: np.ndarray, k: int, row: int) -> tuple[int, int]:
    """First and last tile that splat k touches in a row of tiles; none if the last is before the first.

    The ellipse's right edge over a band of dy is furthest right at its summit, or at the end of the band nearest to
    it; its left edge mirrors that.
    """
    first, last = int(boxes[k, 0]), int(boxes[k, 1])
    if first == last or boxes[k, 2] == boxes[k, 3]:
        return first, last
    p, q, r, reach = float(splats[k, P]), float(splats[k, Q]), float(splats[k, R]), float(splats[k, REACH])
    u, v = float(splats[k, U]) + splats[k, U_REST], float(splats[k, V]) + splats[k, V_REST]
    end = math.sqrt(reach / r)
    top = min(max(row * TILE + 0.5 - v - SLACK, -end), end)
    bottom = min(max((row + 1) * TILE - 0.5 - v + SLACK, -end), end)
    summit = -q / r * math.sqrt(reach / (1 / p + q * q / r))
    at_right, at_left = min(max(summit, top), bottom), min(max(-summit, top), bottom)
    slack = SLACK + 1e-6 * abs(q) * end
    right = u - q * at_right + math.sqrt(max(reach - r * at_right * at_right, 0.0) / p) + slack
    left = u - q * at_left - math.sqrt(max(reach - r * at_left * at_left, 0.0) / p) - slack
    first = max(first, int(min(max(left - 0.5, 0.0), 1e9)) // TILE)
    last = min(last, int(min(max(right - 0.5, -1.0), 1e9) // TILE))
    return first, last


@numba.njit(cache=True, nogil=True, error_model="numpy")
def project_kernel(
    means: np.ndarray,
    quats: np.ndarray,
    scales: np.ndarray,
    opacities: np.ndarray,
    sh: np.ndarray,
    w2c: np.ndarray,
    centre: np.ndarray,
    camera: np.ndarray,
    height: int,
    width: int,
    chunk_size: int,
    splats: np.ndarray,
    boxes: np.ndarray,
    visible: np.ndarray,
    counts: np.ndarray,
    chunk: int,
) -> None:
    """Project the Gaussians of a chunk, packing what is visible at the chunk's start, and count each tile's entries.

    Args:
        centre: the camera's centre in the world. camera: fx, fy, cx, cy in pixels, pixel centres at +0.5.
        splats: (n, FIELDS) float32, boxes: (n, 4) int16, visible: (chunks,), counts: (chunks, rows, columns); written.
    """
    k = chunk * chunk_size
    for i in range(chunk * chunk_size, min((chunk + 1) * chunk_size, means.shape[0])):
        if project_gaussian(
            means, quats, scales, opacities, sh, i, w2c, centre, camera, height, width, splats, boxes, k
        ):
            for row in range(boxes[k, 2], boxes[k, 3] + 1):
                first, last = tile_columns(splats, boxes, k, row)
                for column in range(first, last + 1):
                    counts[chunk, row, column] += 1
            k += 1
    visible[chunk] = k - chunk * chunk_size


@numba.njit(cache=True, nogil=True, error_model="numpy")
def fill_kernel(
    splats: np.ndarray,
    depth_bits: np.ndarray,
    boxes: np.ndarray,
    visible: np.ndarray,
    chunk_size: int,
    first_row: int,
    offsets: np.ndarray,
    entries: np.ndarray,
    chunk: int,
) -> None:
    """Write a chunk's share of the lists of the tile rows from `first_row`, as many as `offsets` has, in order.

    Args:
        depth_bits: the splats read as uint32; positive floats sort as their bits do.
        offsets: (chunks, rows, columns) where each chunk writes in each of these tiles' lists; moved on.
        entries: depth bits << 32 | splat; written.
    """
    end_row = first_row + offsets.shape[1]
    for k in range(chunk * chunk_size, chunk * chunk_size + visible[chunk]):
        entry = np.uint64(depth_bits[k, Z]) << np.uint64(32) | np.uint64(k)
        for row in range(max(first_row, boxes[k, 2]), min(end_row, boxes[k, 3] + 1)):
            first, last = tile_columns(splats, boxes, k, row)
            for column in range(first, last + 1):
                entries[offsets[chunk, row - first_row, column]] = entry
                offsets[chunk, row - first_row, column] += 1


@numba.njit(cache=True, nogil=True, error_model="numpy")
def sort_by_depth(entries: np.ndarray) -> np.ndarray:
    """Entries in the order of their upper 32 bits, equal ones as they were; a radix sort of 11 bits at a time."""
    count = len(entries)
    spare = np.empty_like(entries)
    if count < 2:
        return entries
    places = np.empty(2048, np.int64)
    for shift in (32, 43, 54):
        places[:] = 0
        for i in range(count):
            places[np.int64((entries[i] >> np.uint64(shift)) & np.uint64(2047))] += 1
        if places[np.int64((entries[0] >> np.uint64(shift)) & np.uint64(2047))] == count:
            continue
        start = 0
        for digit in range(2048):
            start, places[digit] = start + places[digit], start
        for i in range(count):
            place = np.int64((entries[i] >> np.uint64(shift)) & np.uint64(2047))
            spare[places[place]] = entries[i]
            places[place] += 1
        entries, spare = spare, entries
    return entries


@numba.njit(cache=True, nogil=True, error_model="numpy", inline="always")
def blend(pixel: np.ndarray, splats: np.ndarray, k: np.int64, alpha: float) -> bool:
    """Add splat k to a pixel; True, with nothing added, if that would take all of its light (gsplat)."""
    half, transmittance = np.float32(0.5), pixel[0]
    remaining = transmittance * (np.float32(1) - alpha)
    if remaining <= np.float32(LEAST_TRANSMITTANCE):
        return True
    weight = alpha * transmittance
    pixel[0] = remaining
    pixel[1] += weight * splats[k, RED]
    pixel[2] += weight * splats[k, GREEN]
    pixel[3] += weight * splats[k, BLUE]
    pixel[4] += weight * splats[k, Z]
    pixel[5] += weight
    if transmittance >= half and remaining < half:
        pixel[6] = splats[k, Z]
    return False


@numba.njit(cache=True, nogil=True, error_model="numpy")
def composite_splat(
    splats: np.ndarray,
    k: np.int64,
    left: int,
    top: int,
    right: int,
    bottom: int,
    pixels: np.ndarray,
    unfinished: np.ndarray,
) -> int:
    """Blend splat k under what a tile already shows; returns how many pixels it finished.

    Args:
        left, top, right, bottom: the tile's pixels, the latter two exclusive.
        pixels: (TILE * TILE, 8) transmittance, weighted colour and z, sum of the weights, median depth; changed.
        unfinished: (TILE,) a bit for each pixel of a row; changed.
    """
    p, q, r, opacity, reach = splats[k, P], splats[k, Q], splats[k, R], splats[k, OPACITY], splats[k, REACH]
    half, one, bit = np.float32(0.5), np.float32(1), np.uint64(1)
    u, v = splats[k, U] + splats[k, U_REST] - half, splats[k, V] + splats[k, V_REST] - half
    leftmost = np.int64(max(u - splats[k, HALF_WIDTH], np.float32(left))) - left
    rightmost = np.int64(max(min(u + splats[k, HALF_WIDTH], np.float32(right - 1)), np.float32(left))) - left
    if leftmost > rightmost:
        return 0
    touched = (np.uint64(2) << np.uint64(rightmost)) - (bit << np.uint64(leftmost))
    first_row = np.int64(max(v - splats[k, HALF_HEIGHT], np.float32(top)))
    last_row = np.int64(min(v + splats[k, HALF_HEIGHT], np.float32(bottom - 1)))
    whole_u, whole_v = np.int64(splats[k, U]), np.int64(splats[k, V])
    finished = 0
    for y in range(first_row, last_row + 1):
        if unfinished[y - top] & touched == 0:
            continue
        dy = np.float32(y - whole_v) + (half - splats[k, V_REST])
        across = r * dy * dy
        span = math.sqrt(max(reach - across, np.float32(0)) / p) + np.float32(SLACK)
        first = np.int64(min(max(u - q * dy + one - span, np.float32(left)), np.float32(right)))
        last = np.int64(max(min(u - q * dy + span, np.float32(right - 1)), np.float32(left - 1)))
        shift = (half - splats[k, U_REST]) + q * dy
        for x in range(first, last + 1):
            if not (unfinished[y - top] >> np.uint64(x - left)) & bit:
                continue
            along = np.float32(x - whole_u) + shift
            alpha = min(np.float32(MOST_ALPHA), opacity * math.exp(-half * (p * along * along + across)))
            if alpha < np.float32(LEAST_ALPHA):
                continue
            if blend(pixels[(y - top) * TILE + x - left], splats, k, alpha):
                unfinished[y - top] ^= bit << np.uint64(x - left)
                finished += 1
    return finished


@numba.njit(cache=True, nogil=True, error_model="numpy")
def composite_kernel(
    splats: np.ndarray,
    entries: np.ndarray,
    starts: np.ndarray,
    first_row: int,
    background: np.ndarray,
    colours: np.ndarray,
    depth: np.ndarray,
    median: np.ndarray,
    alpha: np.ndarray,
    row: int,
) -> None:
    """Composite a row of tiles, front to back.

    Args:
        starts: where the lists of the tiles from `first_row` start in `entries`, one after another.
        colours: (3, h, w), depth, median and alpha: (h, w), float32; written.
    """
    height, width = alpha.shape
    top, bottom = row * TILE, min((row + 1) * TILE, height)
    columns = (width + TILE - 1) // TILE
    for column in range(columns):
        tile = (row - first_row) * columns + column
        left, right = column * TILE, min((column + 1) * TILE, width)
        pixels = np.zeros((TILE * TILE, 8), np.float32)
        pixels[:, 0] = 1
        unfinished = np.full(TILE, (np.uint64(2) << np.uint64(right - left - 1)) - np.uint64(1), np.uint64)
        left_over = (bottom - top) * (right - left)
        for entry in sort_by_depth(entries[starts[tile] : starts[tile + 1]]):
            k = np.int64(entry & np.uint64(0xFFFFFFFF))
            left_over -= composite_splat(splats, k, left, top, right, bottom, pixels, unfinished)
            if left_over == 0:
                break
        for y in range(top, bottom):
            for x in range(left, right):
                pixel = pixels[(y - top) * TILE + x - left]
                for c in range(3):
                    value = pixel[1 + c] + pixel[0] * background[c]
                    colours[c, y, x] = min(max(value, np.float32(0)), np.float32(1))
                depth[y, x] = pixel[4] / max(pixel[5], np.float32(1e-10))
                median[y, x] = pixel[6]
                alpha[y, x] = pixel[5]
