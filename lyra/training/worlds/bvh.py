"""How are primitives sorted so that a ray meets few of them?

Builds a binary bounding volume hierarchy with the surface area heuristic (a full sweep over sorted centroids, which is
fast enough for the few thousand boxes of a scene). It only sees axis-aligned boxes and does not know what is in them.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int
from numba import njit

LEAF = 2


@njit(cache=True)
def _area(lo: Float[np.ndarray, "3"], hi: Float[np.ndarray, "3"]) -> float:
    x, y, z = hi[0] - lo[0], hi[1] - lo[1], hi[2] - lo[2]
    return x * y + y * z + z * x


@njit(cache=True)
def _best_split(
    boxes: Float[np.ndarray, "n 6"],
    order: Int[np.ndarray, "n"],
    first: int,
    count: int,
    sorted_best: Int[np.ndarray, "n"],
) -> int:
    """Find the cheapest split of ``order[first:first+count]`` and leave the winning order in ``sorted_best``."""
    best_cost, best_at = np.inf, 0
    right = np.empty(count)
    for axis in range(3):
        keys = np.empty(count)
        for k in range(count):
            i = order[first + k]
            keys[k] = boxes[i, axis] + boxes[i, axis + 3]
        perm = np.argsort(keys)
        lo, hi = np.full(3, np.inf), np.full(3, -np.inf)
        for k in range(count - 1, 0, -1):
            i = order[first + perm[k]]
            for c in range(3):
                lo[c], hi[c] = min(lo[c], boxes[i, c]), max(hi[c], boxes[i, c + 3])
            right[k] = _area(lo, hi) * (count - k)
        lo[:], hi[:] = np.inf, -np.inf
        axis_best, axis_at = np.inf, 0
        for k in range(1, count):
            i = order[first + perm[k - 1]]
            for c in range(3):
                lo[c], hi[c] = min(lo[c], boxes[i, c]), max(hi[c], boxes[i, c + 3])
            cost = _area(lo, hi) * k + right[k]
            if cost < axis_best:
                axis_best, axis_at = cost, k
        if axis_best < best_cost:
            best_cost, best_at = axis_best, axis_at
            for k in range(count):
                sorted_best[k] = order[first + perm[k]]
    return best_at


@njit(cache=True)
def _build(
    boxes: Float[np.ndarray, "n 6"],
    order: Int[np.ndarray, "n"],
    node_box: Float[np.ndarray, "m 6"],
    node_first: Int[np.ndarray, "m"],
    node_count: Int[np.ndarray, "m"],
) -> int:
    """Fill the node arrays from the root down; children of a node are stored next to each other."""
    n = boxes.shape[0]
    node_first[0], node_count[0] = 0, n
    used = 1
    scratch = np.empty(max(n, 1), np.int32)
    todo = np.empty(2 * max(n, 1) + 2, np.int32)
    todo[0] = 0
    waiting = 1
    while waiting > 0:
        waiting -= 1
        node = todo[waiting]
        first, count = node_first[node], node_count[node]
        for c in range(3):
            node_box[node, c], node_box[node, c + 3] = np.inf, -np.inf
        for k in range(first, first + count):
            for c in range(3):
                node_box[node, c] = min(node_box[node, c], boxes[order[k], c])
                node_box[node, c + 3] = max(node_box[node, c + 3], boxes[order[k], c + 3])
        if count <= LEAF:
            continue
        at = _best_split(boxes, order, first, count, scratch)
        for k in range(count):
            order[first + k] = scratch[k]
        node_first[used], node_count[used] = first, at
        node_first[used + 1], node_count[used + 1] = first + at, count - at
        node_first[node], node_count[node] = used, 0
        todo[waiting], todo[waiting + 1] = used, used + 1
        waiting += 2
        used += 2
    return used


def build_bvh(
    boxes: Float[np.ndarray, "n 6"],
) -> tuple[Int[np.ndarray, "n"], Float[np.ndarray, "m 6"], Int[np.ndarray, "m"], Int[np.ndarray, "m"]]:
    """Sort boxes (lower corner, upper corner; metres) into a hierarchy.

    Returns the primitive order, the node boxes, the first primitive or child of each node, and its primitive count.
    """
    n = len(boxes)
    order = np.arange(n, dtype=np.int32)
    size = max(2 * n, 1)
    node_box, first, count = np.zeros((size, 6)), np.zeros(size, np.int32), np.zeros(size, np.int32)
    used = _build(np.ascontiguousarray(boxes, np.float64), order, node_box, first, count)
    return order, node_box[:used].copy(), first[:used].copy(), count[:used].copy()
