"""Renders Gaussians on the CPU so that a loss on the picture reaches them: what trains a network that makes them.

Projection is plain tensors, compositing is compiled with its derivative written out (3D Gaussian Splatting, appendix A,
in gsplat's form). `rasterizer_reference.render_slowly` is the twin of values and gradients. Slower than
`rasterizer` where no gradient is wanted. Knows no network and no loss.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lyra.reconstruction.rasterizer import RenderedGaussians
from lyra.reconstruction.rasterizer_gradient_kernels import composite_backward, composite_forward, tile_lists
from lyra.reconstruction.rasterizer_reference import project_gaussians
from lyra.types import GaussianScene


class CompositeGaussians(torch.autograd.Function):
    """Front-to-back compositing of features of Gaussians on the image, nearest first."""

    @staticmethod
    def forward(
        ctx: Any,
        centres: Float[Tensor, "n 2"],
        conics: Float[Tensor, "n 3"],
        opacities: Float[Tensor, "n"],
        features: Float[Tensor, "n f"],
        height: int,
        width: int,
    ) -> Float[Tensor, "f h w"]:
        """Weighted sums of the features; a feature that is 1 everywhere gives alpha."""
        u, p, o, f = (x.detach().contiguous().numpy() for x in (centres, conics, opacities, features))
        starts, entries, boxes = tile_lists(u, p, o, height, width)
        image, transmittance, last = composite_forward(u, p, o, f, starts, entries, boxes, height, width)
        ctx.kept = (u, p, o, f, starts, entries, boxes, transmittance, last)
        return torch.from_numpy(image)

    @staticmethod
    def backward(ctx: Any, *gradients: Float[Tensor, "f h w"]) -> tuple[Tensor | None, ...]:
        """Gradients of centres, conics, opacities and features."""
        kept: Any = (*ctx.kept, gradients[0].contiguous().numpy())
        backward: Any = composite_backward  # Its compiled type counts no starred arguments.
        out = backward(*kept)
        return (*(torch.from_numpy(x) for x in out), None, None)


def render_with_gradients(
    scene: GaussianScene,
    w2c: Float[Tensor, "4 4"],
    intrinsics: Float[Tensor, "3 3"],
    height: int,
    width: int,
) -> RenderedGaussians:
    """One view on black with the expected depth, differentiable in the scene; arguments as of `rasterizer.render`.

    Colours are not bounded above, so that their gradients survive where the view is too bright.
    """
    gaussians = project_gaussians(scene, w2c, intrinsics, height, width)
    p = gaussians.precisions
    conics = torch.stack([p[:, 0, 0], p[:, 0, 1], p[:, 1, 1]], dim=-1)
    ones = torch.ones_like(gaussians.depths)[:, None]
    features = torch.cat([gaussians.colours, gaussians.depths[:, None], ones], dim=-1)
    image = CompositeGaussians.apply(gaussians.centres, conics, gaussians.opacities, features, height, width)
    assert isinstance(image, Tensor)
    return RenderedGaussians(image[:3], image[3] / image[4].clamp(min=1e-10), image[4])
