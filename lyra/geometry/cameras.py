"""Rays of pinhole cameras: pixel directions and the ray maps that the transformer reads.

Two pixel conventions live side by side because the released code has both: rays for the network go through pixel
centres at +0.5, warping and memory use integer pixel coordinates.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def pixel_grid(height: int, width: int, device: torch.device | None = None) -> Float[Tensor, "h w 3"]:
    """Homogeneous pixel coordinates (x, y, 1) at integers."""
    y, x = torch.meshgrid(
        torch.arange(height, dtype=torch.float32, device=device),
        torch.arange(width, dtype=torch.float32, device=device),
        indexing="ij",
    )
    return torch.stack([x, y, torch.ones_like(x)], dim=-1)


def ray_maps(
    c2w: Float[Tensor, "n 4 4"], intrinsics: Float[Tensor, "n 3 3"], height: int, width: int
) -> Float[Tensor, "n h w 6"]:
    """Origin and unit direction of each pixel's ray, pixel centres at +0.5.

    The origin is the raw camera centre and not the moment o x d, unlike the paper's text (released code).
    """
    pixels = pixel_grid(height, width, c2w.device)
    fx, fy = intrinsics[:, 0, 0, None, None], intrinsics[:, 1, 1, None, None]
    cx, cy = intrinsics[:, 0, 2, None, None], intrinsics[:, 1, 2, None, None]
    x, y = pixels[None, ..., 0], pixels[None, ..., 1]
    directions = torch.stack([(x + 0.5 - cx) / fx, (y + 0.5 - cy) / fy, torch.ones_like(x - cx)], dim=-1)
    directions = directions / directions.norm(dim=-1, keepdim=True)
    directions = torch.einsum("nij,nhwj->nhwi", c2w[:, :3, :3], directions)
    origins = c2w[:, None, None, :3, 3].expand_as(directions)
    return torch.cat([origins, directions], dim=-1)


def unproject(
    depth: Float[Tensor, "h w"], w2c: Float[Tensor, "4 4"], intrinsics: Float[Tensor, "3 3"]
) -> Float[Tensor, "h w 3"]:
    """World points of a depth map, integer pixel coordinates."""
    height, width = depth.shape
    rays = pixel_grid(height, width, depth.device) @ torch.linalg.inv(intrinsics).T
    points = rays * depth[..., None]
    c2w = torch.linalg.inv(w2c)
    return points @ c2w[:3, :3].T + c2w[:3, 3]


def project(
    points: Float[Tensor, "*batch 3"], w2c: Float[Tensor, "4 4"], intrinsics: Float[Tensor, "3 3"]
) -> tuple[Float[Tensor, "*batch 2"], Float[Tensor, "*batch"]]:
    """Pixel coordinates and z depth of world points; behind the camera the coordinates mean nothing."""
    camera = points @ w2c[:3, :3].T + w2c[:3, 3]
    pixels = camera @ intrinsics.T
    return pixels[..., :2] / (pixels[..., 2:] + 1e-7), camera[..., 2]
