"""Compiled CPU kernels of the surface reconstruction: depth maps into a block-hashed distance field, and triangles.

`lyra.reconstruction.tsdf`, `surface` and `ground` say what they mean and own every setting. Positions in the field
are relative to the centre of the space, so that its contraction needs no offset. A `view` is (5, 4): a pose, either
way, and fx, fy, cx, cy below it.
"""

from __future__ import annotations

import math

import numba
import numpy as np

Array = np.ndarray
BLOCK = 8
"""Voxels along a side of a block."""
STRAIGHT = 0.1
"""Inverse depth of a plane is linear in the image: three pixels whose steps differ by less than this share of the
larger step lie on one plane, however steep."""


@numba.njit(cache=True, nogil=True, inline="always")
def contraction_factor(r: float, radius: float) -> float:
    """Contracted over true distance from the centre: 1 inside the radius, logarithmic outside."""
    if r <= radius:
        return 1.0
    return radius * (1.0 + math.log(r / radius)) / r


@numba.njit(cache=True, nogil=True, inline="always")
def expansion_factor(g: float, radius: float) -> float:
    """True over contracted distance from the centre, for a contracted distance."""
    if g <= radius:
        return 1.0
    return radius * math.exp(g / radius - 1.0) / g


@numba.njit(cache=True, nogil=True)
def scale_points(points: Array, radius: float, expand: bool) -> Array:
    """Points moved along their rays from the centre into the contracted space, or back."""
    out = np.empty_like(points)
    for i in range(len(points)):
        x, y, z = points[i, 0], points[i, 1], points[i, 2]
        r = math.sqrt(x * x + y * y + z * z)
        factor = expansion_factor(r, radius) if expand else contraction_factor(r, radius)
        out[i, 0], out[i, 1], out[i, 2] = x * factor, y * factor, z * factor
    return out


@numba.njit(cache=True, nogil=True, inline="always")
def _straight(a: float, b: float, c: float) -> bool:
    first, second = b - a, c - b
    return abs(second - first) <= STRAIGHT * max(abs(first), abs(second))


@numba.njit(cache=True, nogil=True)
def _jumps(depth: Array, v: int, u: int, dv: int, du: int, share: float) -> bool:
    """Whether a pixel and its neighbour in a direction lie on different surfaces.

    NaN and zero are holes, which say nothing; a neighbour that is too far or infinite is the sky behind an edge.
    """
    height, width = depth.shape
    if not (0 <= v + dv < height and 0 <= u + du < width):
        return False
    here, there = depth[v, u], depth[v + dv, u + du]
    if not there > 0.0 or abs(there - here) <= share * here:
        return False
    middle, end, straight = 1.0 / here, 1.0 / there, False
    if 0 <= v - dv < height and 0 <= u - du < width and depth[v - dv, u - du] > 0.0:
        straight = _straight(1.0 / depth[v - dv, u - du], middle, end)
        if not straight:
            return True
    if 0 <= v + 2 * dv < height and 0 <= u + 2 * du < width and depth[v + 2 * dv, u + 2 * du] > 0.0:
        straight = _straight(middle, end, 1.0 / depth[v + 2 * dv, u + 2 * du])
    return not straight


@numba.njit(cache=True, nogil=True)
def inverse_depth(depth: Array, weight: Array, max_depth: float, share: float) -> Array:
    """1 / z of the pixels that can be used and are not at a jump of depth, 0 elsewhere; float32."""
    height, width = depth.shape
    out = np.zeros((height, width), np.float32)
    for v in range(height):
        for u in range(width):
            # NaN fails every comparison.
            if not (0.0 < depth[v, u] < max_depth and weight[v, u] > 0.0):
                continue
            if _jumps(depth, v, u, 0, 1, share) or _jumps(depth, v, u, 0, -1, share):
                continue
            if not (_jumps(depth, v, u, 1, 0, share) or _jumps(depth, v, u, -1, 0, share)):
                out[v, u] = 1.0 / depth[v, u]
    return out


@numba.njit(cache=True, nogil=True, inline="always")
def _slot(x: int, y: int, z: int, mask: int) -> int:
    return ((x * 73856093) ^ (y * 19349663) ^ (z * 83492791)) & mask


@numba.njit(cache=True, nogil=True)
def _find_block(table: Array, blocks: Array, x: int, y: int, z: int) -> int:
    """Index of a block, or -1."""
    mask = len(table) - 1
    slot = _slot(x, y, z, mask)
    while table[slot] >= 0:
        index = table[slot]
        if blocks[index, 0] == x and blocks[index, 1] == y and blocks[index, 2] == z:
            return index
        slot = (slot + 1) & mask
    return -1


@numba.njit(cache=True, nogil=True)
def _add_around(table: Array, blocks: Array, count: int, low: Array, high: Array) -> int:
    """Add all blocks of a box of block coordinates; the new count, or -1 when there is no room."""
    mask = len(table) - 1
    for x in range(low[0], high[0] + 1):
        for y in range(low[1], high[1] + 1):
            for z in range(low[2], high[2] + 1):
                if _find_block(table, blocks, x, y, z) >= 0:
                    continue
                if count == len(blocks):
                    return -1
                blocks[count, 0], blocks[count, 1], blocks[count, 2] = x, y, z
                slot = _slot(x, y, z, mask)
                while table[slot] >= 0:
                    slot = (slot + 1) & mask
                table[slot] = count
                count += 1
    return count


@numba.njit(cache=True, nogil=True, inline="always")
def _contracted(u: int, v: int, inverse: float, view: Array, radius: float, out: Array) -> None:
    """Contracted position of a pixel's surface point."""
    z = 1.0 / inverse
    x, y = (u - view[4, 2]) / view[4, 0] * z, (v - view[4, 3]) / view[4, 1] * z
    square = 0.0
    for i in range(3):
        out[i] = view[i, 0] * x + view[i, 1] * y + view[i, 2] * z + view[i, 3]
        square += out[i] * out[i]
    factor = contraction_factor(math.sqrt(square), radius)
    for i in range(3):
        out[i] *= factor


@numba.njit(cache=True, nogil=True)
def allocate_blocks(
    measured: Array, view: Array, radius: float, voxel: float, reach: float, table: Array, blocks: Array, count: int
) -> int:
    """Add every block within `reach` of the surface between a frame's neighbouring pixels; the new count, or -1.

    `view` holds c2w. A floor seen at a grazing angle has pixels further apart than a block, hence the steps in between.
    """
    height, width = measured.shape[:2]
    here, there = np.empty(3), np.empty(3)
    low, high = np.empty(3, np.int64), np.empty(3, np.int64)
    last_low, last_high = np.full(3, 2**40, np.int64), np.full(3, 2**40, np.int64)
    side = BLOCK * voxel
    for v in range(height):
        for u in range(width):
            if measured[v, u, 0] == 0.0:
                continue
            _contracted(u, v, measured[v, u, 0], view, radius, here)
            for direction in range(2):
                v2, u2 = v + direction, u + 1 - direction
                steps = 1
                if v2 < height and u2 < width and measured[v2, u2, 0] > 0.0:
                    _contracted(u2, v2, measured[v2, u2, 0], view, radius, there)
                    length = math.sqrt(
                        (there[0] - here[0]) ** 2 + (there[1] - here[1]) ** 2 + (there[2] - here[2]) ** 2
                    )
                    steps = max(1, math.ceil(length / (2.0 * voxel)))
                elif direction == 1:
                    continue
                else:
                    there[:] = here
                for step in range(steps):
                    share = step / steps
                    same = True
                    for i in range(3):
                        position = here[i] + share * (there[i] - here[i])
                        low[i] = math.floor((position - reach) / side)
                        high[i] = math.floor((position + reach) / side)
                        same = same and low[i] == last_low[i] and high[i] == last_high[i]
                    if same:
                        continue
                    last_low[:] = low
                    last_high[:] = high
                    count = _add_around(table, blocks, count, low, high)
                    if count < 0:
                        return -1
    return count


@numba.njit(cache=True, nogil=True)
def expansion_factors(blocks: Array, voxel: float, radius: float) -> Array:
    """True over contracted distance of every voxel, (b, 512) float32."""
    factors = np.empty((len(blocks), BLOCK**3), np.float32)
    for b in range(len(blocks)):
        for i in range(BLOCK**3):
            x = voxel * (blocks[b, 0] * BLOCK + i // (BLOCK * BLOCK))
            y = voxel * (blocks[b, 1] * BLOCK + i // BLOCK % BLOCK)
            z = voxel * (blocks[b, 2] * BLOCK + i % BLOCK)
            factors[b, i] = expansion_factor(math.sqrt(x * x + y * y + z * z), radius)
    return factors


@numba.njit(cache=True, nogil=True)
def integrate_frame(
    blocks: Array, factors: Array, voxel: float, truncation: float, view: Array, seen: Array, image: Array, field: Array
) -> None:
    """Average one frame into the voxels near its surface: distance (voxels, positive in front), weight, colour.

    Inverse depth is interpolated between four measured pixels, else the nearest pixel counts. Behind the surface the
    weight falls to zero, so that the two sides of a thin thing do not erase each other.
    """
    height, width = seen.shape[:2]
    for b in range(len(blocks)):
        for i in range(BLOCK**3):
            scale = voxel * factors[b, i]
            x = scale * (blocks[b, 0] * BLOCK + i // (BLOCK * BLOCK))
            y = scale * (blocks[b, 1] * BLOCK + i // BLOCK % BLOCK)
            z = scale * (blocks[b, 2] * BLOCK + i % BLOCK)
            depth = view[2, 0] * x + view[2, 1] * y + view[2, 2] * z + view[2, 3]
            if depth <= 1e-9:
                continue
            u = view[4, 0] * (view[0, 0] * x + view[0, 1] * y + view[0, 2] * z + view[0, 3]) / depth + view[4, 2]
            v = view[4, 1] * (view[1, 0] * x + view[1, 1] * y + view[1, 2] * z + view[1, 3]) / depth + view[4, 3]
            if not (-0.5 < u < width - 0.5 and -0.5 < v < height - 0.5):
                continue
            nearest_u, nearest_v = math.floor(u + 0.5), math.floor(v + 0.5)
            inverse = seen[nearest_v, nearest_u, 0]
            if inverse == 0.0:
                continue
            u0, v0 = math.floor(u), math.floor(v)
            if 0 <= u0 < width - 1 and 0 <= v0 < height - 1:
                a, c = seen[v0, u0, 0], seen[v0, u0 + 1, 0]
                d, e = seen[v0 + 1, u0, 0], seen[v0 + 1, u0 + 1, 0]
                if a > 0.0 and c > 0.0 and d > 0.0 and e > 0.0:
                    s, t = u - u0, v - v0
                    inverse = (1.0 - t) * ((1.0 - s) * a + s * c) + t * ((1.0 - s) * d + s * e)
            signed = (1.0 / inverse - depth) * seen[nearest_v, nearest_u, 1] / voxel
            if abs(signed) > truncation:
                continue
            weight = seen[nearest_v, nearest_u, 2]
            if signed < 0.0:
                weight *= 1.0 + signed / truncation
            total = field[b, i, 1] + weight
            if total <= 0.0:
                continue
            share = weight / total
            field[b, i, 0] += share * (signed - field[b, i, 0])
            field[b, i, 1] = total
            for channel in range(3):
                pixel = image[nearest_v, nearest_u, channel]
                field[b, i, 2 + channel] += share * (pixel - field[b, i, 2 + channel])


@numba.njit(cache=True, nogil=True)
def _union(parent: Array, a: int, b: int) -> None:
    """Join two sets; the smaller root stays."""
    while parent[a] != a:
        parent[a] = parent[parent[a]]
        a = parent[a]
    while parent[b] != b:
        parent[b] = parent[parent[b]]
        b = parent[b]
    if a != b:
        parent[max(a, b)] = min(a, b)


@numba.njit(cache=True, nogil=True)
def joined(pairs: Array, count: int) -> Array:
    """The root of each of `count` items once all pairs are joined."""
    parent = np.arange(count)
    for i in range(len(pairs)):
        _union(parent, pairs[i, 0], pairs[i, 1])
    for i in range(count):
        # Roots come before their members.
        parent[i] = parent[parent[i]]
    return parent


@numba.njit(cache=True, nogil=True)
def least_area(points: Array, taken: Array) -> Array:
    """Triangles of least total area between the points of a closed curve (Barequet and Sharir 1995); none if all
    triangulations need an inner edge that is taken."""
    n = len(points)
    cost = np.full((n, n), np.inf)
    middle = np.full((n, n), -1, np.int64)
    for i in range(n - 1):
        cost[i, i + 1] = 0.0
    for length in range(2, n):
        for i in range(n - length):
            j = i + length
            if taken[i, j] and length < n - 1:
                continue
            for k in range(i + 1, j):
                area = 0.5 * np.linalg.norm(np.cross(points[k] - points[i], points[j] - points[i]))
                total = cost[i, k] + cost[k, j] + area
                if total < cost[i, j]:
                    cost[i, j], middle[i, j] = total, k
    out = np.empty((n - 2, 3), np.int64)
    if not np.isfinite(cost[0, n - 1]):
        return out[:0]
    count, stack = 0, [(0, n - 1)]
    while len(stack) > 0:
        i, j = stack.pop()
        if j - i < 2:
            continue
        k = middle[i, j]
        out[count, 0], out[count, 1], out[count, 2] = i, k, j
        count += 1
        stack.append((i, k))
        stack.append((k, j))
    return out


@numba.njit(cache=True, nogil=True)
def sample_faces(points: Array, faces: Array, low: Array, high: Array, step: float) -> Array:
    """(n, 4): points on the faces at most `step` apart, in a horizontal box, and the number of the face."""
    out, count = np.empty((1 << 16, 4)), 0
    for f in range(len(faces)):
        a, b, c = points[faces[f, 0]], points[faces[f, 1]], points[faces[f, 2]]
        outside = False
        for i in range(2):
            outside |= min(a[i], b[i], c[i]) > high[i] or max(a[i], b[i], c[i]) < low[i]
        if outside:
            continue
        longest = max(np.abs(b - a).max(), np.abs(c - a).max(), np.abs(c - b).max())
        steps = max(1, min(math.ceil(longest / step), 2000))
        for i in range(steps + 1):
            for j in range(steps + 1 - i):
                p = a + (b - a) * (i / steps) + (c - a) * (j / steps)
                if low[0] <= p[0] <= high[0] and low[1] <= p[1] <= high[1]:
                    if count == len(out):
                        out = np.concatenate((out, np.empty_like(out)))
                    out[count, :3], out[count, 3] = p, f
                    count += 1
    return out[:count]


@numba.njit(cache=True, nogil=True)
def grow_ground(heights: Array, cells: Array, found: Array, step: float) -> None:
    """Give grid points without a height (NaN) one that was found there and is within a step of a neighbour's.

    `cells` are flat numbers of grid points in rising order, `found` are heights there.
    """
    rows, columns = heights.shape
    grown = True
    while grown:
        grown = False
        for n in range(len(cells)):
            r, c = cells[n] // columns, cells[n] % columns
            if not math.isnan(heights[r, c]):
                continue
            for dr, dc in ((0, 1), (0, -1), (1, 0), (-1, 0)):
                if not (0 <= r + dr < rows and 0 <= c + dc < columns):
                    continue
                best, m = step, n
                while m < len(cells) and cells[m] == cells[n]:
                    # NaN, no height yet, fails the comparison.
                    away = abs(found[m] - heights[r + dr, c + dc])
                    if away <= best:
                        best = away
                        heights[r, c] = found[m]
                        grown = True
                    m += 1
                if not math.isnan(heights[r, c]):
                    break


@numba.njit(cache=True, nogil=True)
def continue_smoothly(heights: Array, known: Array, inside: Array, tolerance: float) -> None:
    """Solve Laplace's equation for the unknown heights by over-relaxation; nothing flows over the border."""
    rows, columns = heights.shape
    change = tolerance
    while change >= tolerance:
        change = 0.0
        for r in range(rows):
            for c in range(columns):
                if known[r, c] or not inside[r, c]:
                    continue
                total, count = 0.0, 0
                for dr, dc in ((0, 1), (0, -1), (1, 0), (-1, 0)):
                    if 0 <= r + dr < rows and 0 <= c + dc < columns and inside[r + dr, c + dc]:
                        total += heights[r + dr, c + dc]
                        count += 1
                if count > 0:
                    step = 1.8 * (total / count - heights[r, c])
                    heights[r, c] += step
                    change = max(change, abs(step))
