"""How close images are: PSNR, and how much fine detail is kept (Laplacian energy)."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from lyra.geometry.resample import draw_surface, enlarge_depth, make_surface, resample
from lyra.types import Cameras


def psnr_db(a: Float[Tensor, "*batch"], b: Float[Tensor, "*batch"], peak: float) -> float:
    """Peak signal-to-noise ratio in dB; infinite for equal images."""
    mse = (a.float() - b.float()).pow(2).mean().item()
    return math.inf if mse == 0 else 10 * math.log10(peak**2 / mse)


def laplacian_energy(image: Float[Tensor, "3 h w"], where: Bool[Tensor, "h w"]) -> float:
    """Mean square of the Laplacian of the luma over the marked pixels."""
    luma = image.float().mean(0)[None, None]
    kernel = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]])[None, None]
    response = F.conv2d(F.pad(luma, (1, 1, 1, 1), mode="replicate"), kernel)[0, 0]
    return float(response[where].pow(2).mean())


def kept_detail(
    photo: Float[Tensor, "3 h w"], frame: Float[Tensor, "3 h w"], depth: Float[Tensor, "h2 w2"], cameras: Cameras
) -> float:
    """Laplacian energy of a frame over that of a bicubic warp of the photo, away from what the photo does not show.

    Args:
        photo: what the first camera sees. frame: what the last camera sees. depth: of the photo, at any size.
    """
    height, width = photo.shape[-2:]
    surface = make_surface(enlarge_depth(depth, (height, width)), cameras.w2c[0], cameras.intrinsics[0])
    view = draw_surface(surface, cameras.w2c[-1], cameras.intrinsics[-1], height, width)
    source = torch.where(view.depth.isfinite(), 0, -1).to(torch.int32)
    exact = resample(photo[None], view.coordinates, source)
    where = F.max_pool2d((source < 0)[None].float(), 17, stride=1, padding=8)[0] < 0.5
    return laplacian_energy(frame, where) / laplacian_energy(exact, where)
