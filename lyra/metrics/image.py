"""How close images are: PSNR, and how much fine detail is kept (Laplacian energy)."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F


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
