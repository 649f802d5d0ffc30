"""Backward warp that keeps a photo sharp: a source's depth drawn as a surface in a new view, its colours resampled.

The surface gives each target pixel the source coordinate that it sees, without the cracks of splatting; colours are
then read once with a bicubic filter. Where the surface is torn by a depth edge there is a hole. Knows neither memory
nor networks; `draw_surface_reference` is the obvious twin of the compiled kernel.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from lyra.geometry.cameras import pixel_grid, unproject

SURFACE_STRIDE = 2
"""The surface has a vertex at every second pixel, which is finer than the depth networks are."""
TEAR_RATIO = 0.10
"""A quad is torn where its depths differ by more than this share of their mean, beyond what its neighbours do."""

EDGE_TOLERANCE = 1e-5
"""Barycentric slack that lets a pixel on the edge of two triangles belong to at least one of them."""


def enlarge_depth(depth: Float[Tensor, "h w"], size: tuple[int, int]) -> Float[Tensor, "h2 w2"]:
    """Depth at a larger size; inverse depth is interpolated, because that is what varies linearly over planes."""
    inverse = F.interpolate(1 / depth[None, None].clamp(min=1e-6), size, mode="bilinear")
    return (1 / inverse)[0, 0]


@dataclass(frozen=True)
class Surface:
    """A depth map as a grid of vertices in world space."""

    points: Float[Tensor, "r c 3"]
    coordinates: Float[Tensor, "r c 3"]
    """Source pixel (x, y) and z depth in the source of each vertex."""
    quads: Bool[Tensor, "q s"]
    """Which of the (r - 1) x (c - 1) quads are whole."""


@dataclass(frozen=True)
class SurfaceView:
    """What a camera sees of a surface."""

    coordinates: Float[Tensor, "h w 2"]
    """Source pixel (x, y) seen by each target pixel."""
    depth: Float[Tensor, "h w"]
    """z depth in the target camera; infinite where nothing is seen."""


def make_surface(depth: Float[Tensor, "h w"], w2c: Float[Tensor, "4 4"], intrinsics: Float[Tensor, "3 3"]) -> Surface:
    """Vertices of a depth map and the quads that are not torn."""
    height, width = depth.shape
    rows = torch.tensor([*range(0, height - 1, SURFACE_STRIDE), height - 1])
    columns = torch.tensor([*range(0, width - 1, SURFACE_STRIDE), width - 1])
    points = unproject(depth, w2c, intrinsics)[rows][:, columns]
    corner_depth = depth[rows][:, columns]
    coordinates = torch.cat([pixel_grid(height, width)[rows][:, columns, :2], corner_depth[..., None]], dim=-1)
    return Surface(points, coordinates, whole_quads(corner_depth))


def whole_quads(depth: Float[Tensor, "r c"]) -> Bool[Tensor, "q s"]:
    """True for quads that a smooth surface explains.

    Inverse depth is linear over a plane, so a quad is torn where inverse depth bends: its second difference, relative
    to inverse depth, exceeds `TEAR_RATIO`. A ground plane stays whole up to the horizon.
    """
    inverse = 1 / depth.clamp(min=1e-6)
    bend = torch.zeros_like(inverse)
    across = (inverse[:, 2:] - 2 * inverse[:, 1:-1] + inverse[:, :-2]).abs()
    along = (inverse[2:] - 2 * inverse[1:-1] + inverse[:-2]).abs()
    bend[:, 1:-1] = across
    bend[1:-1] = torch.maximum(bend[1:-1], along)
    torn = (bend > TEAR_RATIO * inverse) | ~(depth > 0)
    corners = torch.stack([torn[:-1, :-1], torn[1:, :-1], torn[:-1, 1:], torn[1:, 1:]])
    # Only quads with two bent corners are torn: one corner bends wherever a plane meets the image's border.
    return corners.sum(0) < 2


def draw_surface(
    surface: Surface, w2c: Float[Tensor, "4 4"], intrinsics: Float[Tensor, "3 3"], height: int, width: int
) -> SurfaceView:
    """Rasterise a surface with a z-buffer.

    Over a triangle, source coordinates times source depth are linear in space, so they are interpolated
    perspective-correctly and divided by the source depth at the end: exact for planes seen from anywhere.
    """
    from lyra.geometry.resample_kernels import draw_quads

    camera = surface.points @ w2c[:3, :3].T + w2c[:3, 3]
    pixels = camera @ intrinsics.T
    vertices = torch.cat([pixels[..., :2] / pixels[..., 2:], camera[..., 2:]], dim=-1)
    uvz = draw_quads(vertices.numpy(), surface.coordinates.numpy(), surface.quads.numpy(), height, width)
    drawn = torch.from_numpy(uvz)
    return SurfaceView(drawn[..., :2], drawn[..., 2])


def draw_surface_reference(
    surface: Surface, w2c: Float[Tensor, "4 4"], intrinsics: Float[Tensor, "3 3"], height: int, width: int
) -> SurfaceView:
    """The slow twin: every pixel against every triangle, by solving for barycentric coordinates."""
    camera = surface.points.double() @ w2c[:3, :3].double().T + w2c[:3, 3].double()
    pixels = camera @ intrinsics.double().T
    xy, z = pixels[..., :2] / pixels[..., 2:], camera[..., 2]
    out = torch.full((height, width, 3), torch.inf, dtype=torch.float64)
    grid = pixel_grid(height, width)[..., :2].double()
    for r, c in surface.quads.nonzero().tolist():
        for triangle in (((r, c), (r + 1, c), (r, c + 1)), ((r + 1, c + 1), (r, c + 1), (r + 1, c))):
            corner = torch.stack([xy[i, j] for i, j in triangle])
            inverse_z = torch.stack([1 / z[i, j] for i, j in triangle])
            source = torch.stack([surface.coordinates[i, j].double() for i, j in triangle])
            if (inverse_z <= 0).any():
                continue
            edges = torch.stack([corner[1] - corner[0], corner[2] - corner[0]], dim=1)
            if edges.det().abs() < 1e-12:
                continue
            weights = (grid - corner[0]) @ torch.linalg.inv(edges).T
            share = torch.cat([1 - weights.sum(-1, keepdim=True), weights], dim=-1)
            depth = 1 / (share @ inverse_z)
            closer = (share >= -EDGE_TOLERANCE).all(-1) & (depth < out[..., 2])
            weight = share * inverse_z * source[:, 2]
            uv = weight @ source[:, :2] / weight.sum(-1, keepdim=True)
            out[closer] = torch.cat([uv, depth[..., None]], dim=-1)[closer]
    return SurfaceView(out[..., :2].float(), out[..., 2].float())


def resample(
    images: Float[Tensor, "k 3 h w"], coordinates: Float[Tensor, "h2 w2 2"], source: Int[Tensor, "h2 w2"]
) -> Float[Tensor, "3 h2 w2"]:
    """Colours of `images[source]` at the coordinates by a Catmull-Rom filter; 0 where source is negative."""
    from lyra.geometry.resample_kernels import sample_bicubic

    out = sample_bicubic(
        np.ascontiguousarray(images.movedim(1, -1).numpy()), coordinates.numpy(), source.numpy().astype(np.int32)
    )
    return torch.from_numpy(out).movedim(-1, 0)
