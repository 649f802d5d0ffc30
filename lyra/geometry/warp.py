"""Forward warp: a view with depth, splatted into other cameras with soft occlusion (released code; GEN3C).

`forward_warp` runs a compiled kernel on the CPU and torch scatter elsewhere; `forward_warp_reference` is the slow,
obvious twin that defines the numbers. Knows neither memory nor images' meaning: it warps any channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from lyra.geometry.cameras import unproject

MAX_DEPTH = 1e4
"""Depth is clamped to this before warping, and NaN becomes it (released code)."""


@dataclass(frozen=True)
class Warped:
    """A source seen from other cameras."""

    values: Float[Tensor, "n c h w"]
    """Warped channels; `hole_value` where nothing lands."""
    depth: Float[Tensor, "n h w"]
    """z depth in the target camera; 0 where nothing lands."""
    covered: Bool[Tensor, "n h w"]


def reliable_mask(depth: Float[Tensor, "h w"], ratio: float = 0.05) -> Bool[Tensor, "h w"]:
    """Pixels with depth whose 5x5 neighbourhood is flat: (max - min) / mean < ratio (released code).

    The mean counts zeros outside the image, so the border is rejected more easily, as in the released code.
    """
    d = depth[None, None]
    highest = F.max_pool2d(d, 5, stride=1, padding=2)
    lowest = -F.max_pool2d(-d, 5, stride=1, padding=2)
    mean = F.avg_pool2d(d, 5, stride=1, padding=2)
    return ((depth > 0) & (((highest - lowest) / (mean + 1e-6))[0, 0] < ratio)).bool()


def forward_warp(
    values: Float[Tensor, "c h w"],
    depth: Float[Tensor, "h w"],
    source_w2c: Float[Tensor, "4 4"],
    source_intrinsics: Float[Tensor, "3 3"],
    target_w2c: Float[Tensor, "n 4 4"],
    target_intrinsics: Float[Tensor, "n 3 3"],
    *,
    group: int = 16,
    hole_value: float = -1.0,
    clamp: bool = True,
) -> Warped:
    """Warp a view into n cameras of the same image size.

    Args:
        values: channels to warp, for instance an image in [-1, 1].
        depth: z depth of the source in scene units.
        group: targets that share the maximum of the depth weights (released: 16).
        hole_value: value where nothing lands. clamp: clamp the result to [-1, 1] (image mode).
    """
    points, mask = prepare_source(depth, source_w2c, source_intrinsics)
    source = torch.cat([values.flatten(1).T.float(), points.flatten(0, 1)], dim=1)[mask.flatten()]
    height, width = depth.shape
    results = []
    for first in range(0, len(target_w2c), group):
        w2c, intrinsics = target_w2c[first : first + group], target_intrinsics[first : first + group]
        projected = [project_for_splat(points.flatten(0, 1), w, k) for w, k in zip(w2c, intrinsics, strict=True)]
        # Masked points count for the maximum too, because the released code takes it before masking.
        highest = max(float(torch.log1p(z.clamp(min=0)).max()) for _, z in projected)
        for uv, z in projected:
            keep = mask.flatten()
            results.append(splat(source[:, : values.shape[0]], uv[keep], z[keep], height, width, highest))
    return finish_warp(results, hole_value, clamp)


def prepare_source(
    depth: Float[Tensor, "h w"], w2c: Float[Tensor, "4 4"], intrinsics: Float[Tensor, "3 3"]
) -> tuple[Float[Tensor, "h w 3"], Bool[Tensor, "h w"]]:
    """World points of the reliable pixels; the others sit at the origin (released code)."""
    depth = torch.nan_to_num(depth.float(), nan=MAX_DEPTH).clamp(0, MAX_DEPTH)
    mask = reliable_mask(depth)
    points = unproject(depth, w2c.float(), intrinsics.float())
    return torch.where(mask[..., None], points, torch.zeros_like(points)), mask


def project_for_splat(points: Tensor, w2c: Tensor, intrinsics: Tensor) -> tuple[Tensor, Tensor]:
    """Pixel coordinates and the third component of K (w2c X), which is the depth for ordinary K."""
    pixels = (points @ w2c[:3, :3].T.float() + w2c[:3, 3].float()) @ intrinsics.T.float()
    return pixels[:, :2] / (pixels[:, 2:] + 1e-7), pixels[:, 2]


def splat(
    values: Float[Tensor, "p c"],
    uv: Float[Tensor, "p 2"],
    z: Float[Tensor, "p"],
    height: int,
    width: int,
    highest_log_depth: float,
) -> Float[Tensor, "d h w"]:
    """Sums of weighted values, weighted depth and weights, (c + 2, h, w), for one target."""
    if z.device.type == "cpu":
        from lyra.geometry.warp_kernels import splat_kernel

        sums = splat_kernel(values.numpy(), uv.numpy(), z.numpy(), height, width, highest_log_depth)
        return torch.from_numpy(sums)
    return splat_reference(values, uv, z, height, width, highest_log_depth)


def splat_reference(
    values: Float[Tensor, "p c"],
    uv: Float[Tensor, "p 2"],
    z: Float[Tensor, "p"],
    height: int,
    width: int,
    highest_log_depth: float,
) -> Float[Tensor, "d h w"]:
    """The obvious twin of the kernel: scatter four bilinear corners on a canvas with a border of one pixel.

    Where a coordinate is an integer its two corners coincide and the point counts twice (released code).
    """
    front = z > 0
    values, uv, z = values[front], uv[front], z[front]
    weight = depth_weight(z, highest_log_depth)
    payload = torch.cat([values, z[:, None], torch.ones_like(z)[:, None]], dim=1)
    limit = torch.tensor([width + 1.0, height + 1.0], device=uv.device)
    shifted = uv + 1
    low, high = shifted.floor(), shifted.ceil()
    shifted, low, high = (torch.minimum(v.clamp(min=0), limit) for v in (shifted, low, high))
    canvas = torch.zeros((height + 2) * (width + 2), payload.shape[1], device=uv.device)
    for corner_x in (low[:, 0], high[:, 0]):
        for corner_y in (low[:, 1], high[:, 1]):
            share = (1 - (shifted[:, 0] - corner_x).abs()) * (1 - (shifted[:, 1] - corner_y).abs())
            index = (corner_y * (width + 2) + corner_x).long()
            canvas.index_add_(0, index, payload * (share * weight)[:, None])
    return canvas.T.reshape(-1, height + 2, width + 2)[:, 1:-1, 1:-1]


def depth_weight(z: Float[Tensor, "p"], highest_log_depth: float) -> Float[Tensor, "p"]:
    """Near points outweigh far ones: 1 / (exp(min(80, 50 L / Lmax)) + 1e-7), L = log(1 + z) (released code)."""
    exponent = (50 * torch.log1p(z.clamp(min=0)) / (highest_log_depth + 1e-7)).clamp(max=80)
    return 1 / (exponent.exp() + 1e-7)


def finish_warp(sums: list[Float[Tensor, "d h w"]], hole_value: float, clamp: bool) -> Warped:
    """Divide weighted sums by their weights and mark holes."""
    stacked = torch.stack(sums)
    weight = torch.nan_to_num(stacked[:, -1], nan=1000.0)
    covered = weight > 0
    ratio = stacked[:, :-1] / torch.where(covered, weight, torch.ones_like(weight))[:, None]
    depth = torch.where(covered, ratio[:, -1], torch.zeros_like(weight))
    values = torch.where(covered[:, None], ratio[:, :-1], torch.full_like(ratio[:, :-1], hole_value))
    return Warped(values.clamp(-1, 1) if clamp else values, depth, covered)


def forward_warp_reference(
    values: Tensor, depth: Tensor, w2c: Tensor, intrinsics: Tensor, target_w2c: Tensor, target_intrinsics: Tensor
) -> Warped:
    """The slow twin of `forward_warp` for one group of targets."""
    points, mask = prepare_source(depth, w2c, intrinsics)
    projected = [
        project_for_splat(points.flatten(0, 1), w, k) for w, k in zip(target_w2c, target_intrinsics, strict=True)
    ]
    highest = max(float(torch.log1p(z.clamp(min=0)).max()) for _, z in projected)
    keep, flat = mask.flatten(), values.flatten(1).T.float()
    height, width = depth.shape
    sums = [splat_reference(flat[keep], uv[keep], z[keep], height, width, highest) for uv, z in projected]
    return finish_warp(sums, -1.0, True)
