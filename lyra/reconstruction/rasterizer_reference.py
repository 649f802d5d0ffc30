"""The slow, obvious rasteriser that defines the numbers of the fast ones, and the only differentiable one.

Every Gaussian is evaluated at every pixel, front to back, with plain tensors in the scene's own precision. For tests
and small scenes: time and memory for gradients grow as Gaussians times pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lyra.geometry.cameras import pixel_grid
from lyra.geometry.rotations import quaternion_to_matrix
from lyra.reconstruction.rasterizer import DepthMode, RenderedGaussians, drawable, sh_degree
from lyra.reconstruction.rasterizer_kernels import (
    FAR,
    FARTHEST,
    LEAST_ALPHA,
    LEAST_TRANSMITTANCE,
    LOW_PASS,
    MOST_ALPHA,
    NEAR,
    VIEW_MARGIN,
)
from lyra.types import GaussianScene


@dataclass(frozen=True)
class ImageGaussians:
    """Gaussians on the image, nearest first."""

    centres: Float[Tensor, "n 2"]
    """In pixels, pixel centres at +0.5."""
    precisions: Float[Tensor, "n 2 2"]
    """Inverse covariances in 1/pixel^2, low-pass included."""
    depths: Float[Tensor, "n"]
    """z depth of the centres in scene units."""
    colours: Float[Tensor, "n 3"]
    """At least 0."""
    opacities: Float[Tensor, "n"]


def render_slowly(
    scene: GaussianScene,
    w2c: Float[Tensor, "4 4"],
    intrinsics: Float[Tensor, "3 3"],
    height: int,
    width: int,
    *,
    background: Float[Tensor, "3"] | None = None,
    depth_mode: DepthMode = "expected",
) -> RenderedGaussians:
    """What `lyra.reconstruction.rasterizer.render` returns, differentiable in the scene and the camera.

    Weights are alpha times what earlier Gaussians let through, alpha = min(0.999, opacity * exp(-d^T P d / 2)) with P
    the inverse covariance; fainter ones than 1/255 are skipped and a pixel ends before its transmittance would reach
    1e-4 (gsplat).
    """
    gaussians = project_gaussians(scene, w2c.to(scene.means), intrinsics.to(scene.means), height, width)
    pixels = pixel_grid(height, width, scene.means.device)[..., :2].to(scene.means.dtype) + 0.5
    behind = torch.zeros(3).to(pixels) if background is None else background.to(pixels)
    transmittance = torch.ones_like(pixels[..., 0])
    active = torch.ones_like(transmittance, dtype=torch.bool)
    colours, summed, alpha, median = torch.zeros(3, height, width).to(pixels), *[torch.zeros_like(transmittance)] * 3
    for i in range(len(gaussians.depths)):
        offset = pixels - gaussians.centres[i]
        distance = (offset @ gaussians.precisions[i] * offset).sum(dim=-1)
        opacity = (gaussians.opacities[i] * (-0.5 * distance).exp()).clamp(max=MOST_ALPHA)
        remaining = transmittance * (1 - opacity)
        seen = opacity >= LEAST_ALPHA
        active = active & ~(seen & (remaining <= LEAST_TRANSMITTANCE))
        drawn = active & seen
        weight = torch.where(drawn, transmittance * opacity, 0)
        colours = colours + weight * gaussians.colours[i, :, None, None]
        summed = summed + weight * gaussians.depths[i]
        alpha = alpha + weight
        median = torch.where(drawn & (transmittance >= 0.5) & (remaining < 0.5), gaussians.depths[i], median)
        transmittance = torch.where(drawn, remaining, transmittance)
    colours = (colours + transmittance * behind[:, None, None]).clamp(0, 1)
    return RenderedGaussians(colours, summed / alpha.clamp(min=1e-10) if depth_mode == "expected" else median, alpha)


def project_gaussians(
    scene: GaussianScene, w2c: Float[Tensor, "4 4"], intrinsics: Float[Tensor, "3 3"], height: int, width: int
) -> ImageGaussians:
    """Gaussians in front of the camera on its image, by the perspective's derivative at their centres.

    The derivative is taken no further than 15 % of the image's size outside of it, where it stops being of use
    (gsplat).
    """
    with torch.no_grad():
        z = scene.means @ w2c[2, :3] + w2c[2, 3]
        keep = drawable(scene) & (z >= NEAR) & (z <= FAR)
        order = torch.arange(len(z), device=z.device)[keep][z[keep].argsort(stable=True)]
    means = scene.means[order]
    x, y, z = (means @ w2c[:3, :3].T + w2c[:3, 3]).unbind(-1)
    size = torch.tensor([width, height]).to(means)
    focal = intrinsics.diagonal()[:2]
    principal = intrinsics[:2, 2] + 0.5
    slopes = torch.stack([x / z, y / z], dim=-1)
    margin = VIEW_MARGIN * 0.5 * size / focal
    bounded = slopes.clamp(-principal / focal - margin, (size - principal) / focal + margin)
    zero = torch.zeros_like(z)
    jacobian = torch.stack(
        [focal[0] / z, zero, -focal[0] * bounded[:, 0] / z, zero, focal[1] / z, -focal[1] * bounded[:, 1] / z], dim=-1
    ).reshape(-1, 2, 3)
    axes = quaternion_to_matrix(scene.quats[order]) * scene.scales[order][:, None, :]
    on_image = jacobian @ w2c[:3, :3] @ axes
    covariances = on_image @ on_image.mT + LOW_PASS * torch.eye(2).to(means)
    colours = evaluate_harmonics(scene.sh[order], means - torch.linalg.inv(w2c)[:3, 3], sh_degree(scene))
    opacities = scene.opacities[order]
    with torch.no_grad():
        reach = 2 * (opacities / LEAST_ALPHA).clamp(min=1).log()
        near = (reach[:, None] * covariances.diagonal(dim1=1, dim2=2)).sqrt().amax(-1) <= FARTHEST
    centres = slopes * focal + principal
    precisions = torch.linalg.inv(covariances[near])
    return ImageGaussians(centres[near], precisions, z[near], colours[near], opacities[near])


def evaluate_harmonics(
    sh: Float[Tensor, "n k 3"], directions: Float[Tensor, "n 3"], degree: int
) -> Float[Tensor, "n 3"]:
    """Colours seen along directions of any length from the camera, at least 0; 0.5 is added to the series (INRIA)."""
    x, y, z = torch.nn.functional.normalize(directions, dim=-1).unbind(-1)
    return ((harmonics(x, y, z, degree)[..., None] * sh).sum(dim=1) + 0.5).clamp(min=0)


def harmonics(x: Float[Tensor, "n"], y: Float[Tensor, "n"], z: Float[Tensor, "n"], degree: int) -> Float[Tensor, "n k"]:
    """Real spherical harmonics with the Condon-Shortley sign, orders -l to l of each degree l, as Gaussian splats
    store them."""
    basis = [torch.full_like(x, 0.5 * math.sqrt(1 / math.pi))]
    if degree >= 1:
        scale = math.sqrt(3 / (4 * math.pi))
        basis += [-scale * y, scale * z, -scale * x]
    if degree >= 2:
        scale = 0.5 * math.sqrt(15 / math.pi)
        basis += [scale * x * y, -scale * y * z, math.sqrt(5 / math.pi) / 4 * (3 * z * z - 1)]
        basis += [-scale * x * z, scale / 2 * (x * x - y * y)]
    if degree >= 3:
        third, first, second = (math.sqrt(n / math.pi) / 4 for n in (35 / 2, 21 / 2, 105))
        basis += [-third * y * (3 * x * x - y * y), 2 * second * x * y * z, -first * y * (5 * z * z - 1)]
        basis += [math.sqrt(7 / math.pi) / 4 * z * (5 * z * z - 3), -first * x * (5 * z * z - 1)]
        basis += [second * z * (x * x - y * y), -third * x * (x * x - 3 * y * y)]
    return torch.stack(basis, dim=-1)
