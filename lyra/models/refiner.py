"""lyra-tiny's seam refiner: joins generated pixels to seen ones at output size.

Seen pixels away from a border are never touched, so what the photo shows stays as sharp as the warp left it. Near a
border the network chooses the mixture, and in generated areas it may correct colour and add what upsampling lost.
Knows no memory and no camera.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from lyra.geometry.fill import fill_unseen


class SeamRefiner(ModelMixin, ConfigMixin):
    """A small convolutional network at a quarter of the output's resolution; sizes must divide by 4.

    Args:
        channels: width. num_layers: dilated 3x3 convolutions between the first and the last.
        border: half-size pixels around a border of the seen area within which seen pixels may be mixed; odd.
    """

    @register_to_config
    def __init__(self, channels: int = 48, num_layers: int = 3, border: int = 5) -> None:
        super().__init__()
        self.first = nn.Conv2d(7 * 16, channels, 3, padding=1)
        self.body = nn.ModuleList(
            nn.Conv2d(channels, channels, 3, padding=1 + i, dilation=1 + i) for i in range(num_layers)
        )
        self.last = nn.Conv2d(channels, 4 * 16, 3, padding=1)
        for parameter in self.last.parameters():
            nn.init.zeros_(parameter)

    def forward(
        self, generated: Float[Tensor, "n 3 h w"], seen: Float[Tensor, "n 3 h w"], where: Float[Tensor, "n h w"]
    ) -> Float[Tensor, "n 3 h w"]:
        """Joined frames; `seen` counts only where `where` is 1."""
        inside, deep = self.border_distance(where)
        continued = continue_colours(seen, where)
        x = F.pixel_unshuffle(torch.cat([generated, continued, inside], dim=1), 4)
        x = F.silu(self.first(x.contiguous(memory_format=torch.channels_last)))
        for layer in self.body:
            x = x + F.silu(layer(x))
        out = F.pixel_shuffle(self.last(x), 4)
        # Feathered by distance before the network has learnt anything; it can shift the mixture either way.
        ramp = ((inside - 0.5) * 2).clamp(0, 1)
        share = torch.sigmoid(torch.logit(ramp, eps=1e-3) + 4 * out[:, 3:])
        share = torch.where(deep, torch.ones_like(share), share) * where[:, None]
        return torch.lerp(generated + out[:, :3], seen, share)

    def border_distance(self, where: Float[Tensor, "n h w"]) -> tuple[Tensor, Tensor]:
        """How far inside the seen area a pixel is (1 deep inside, 0.5 at its border), and whether no border is near."""
        border = self.config.border
        half = -F.max_pool2d(-where[:, None], 2)
        inside = F.avg_pool2d(F.pad(half, [border // 2] * 4, mode="replicate"), border, stride=1)
        lowest = -F.max_pool2d(-inside, border, stride=1, padding=border // 2)
        smooth = F.interpolate(inside, scale_factor=2.0, mode="bilinear")
        return smooth, F.interpolate((lowest > 0.999).float(), scale_factor=2.0) > 0.5

    @torch.no_grad()
    def blend(
        self,
        generated: Float[Tensor, "n 3 h w"],
        seen: Float[Tensor, "n 3 h w"],
        where: Float[Tensor, "n h w"],
        check: Callable[[int, int], None],
    ) -> Float[Tensor, "n 3 h w"]:
        """Join many frames, a few at a time; `check(done, all)` is called between."""
        parts, step = [], 8
        generated, seen, where = (x.to(self.dtype) for x in (generated, seen, where))
        for start in range(0, len(generated), step):
            piece = slice(start, start + step)
            parts.append(self(generated[piece], seen[piece], where[piece]).clamp(-1, 1))
            check(min(start + step, len(generated)), len(generated))
        return torch.cat(parts)


def continue_colours(seen: Float[Tensor, "n 3 h w"], where: Float[Tensor, "n h w"]) -> Float[Tensor, "n 3 h w"]:
    """Seen colours, continued smoothly into the rest at half resolution."""
    mass = F.avg_pool2d(where[:, None], 2)
    colour = F.avg_pool2d(seen * where[:, None], 2) / mass.clamp(min=1e-6)
    filled = F.interpolate(fill_unseen(colour, mass[:, 0] > 0), scale_factor=2.0, mode="bilinear")
    return torch.where(where[:, None] > 0.5, seen, filled)
