"""How history latents are packed into few tokens: the layout string, patch sizes and slot positions (FramePack).

A layout such as ``f1k1f4s2f1s1f16k4f2k2f1k1_g20`` reads: one latent at kernel 1, four at spatial kernel 2, and so on,
then 20 latents to generate. Kind ``k`` packs time and space, kind ``s`` packs space only and holds retrieved frames.
Knows no network and no camera; `lyra.memory.history` chooses which latents fill the slots.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn

RELEASED_LAYOUT = "f1k1f4s2f1s1f16k4f2k2f1k1_g20"
"""The released model's layout (released code): 25 history latents, 20 new ones."""


@dataclass(frozen=True)
class Segment:
    """Consecutive slots that share one packing kernel."""

    start: int
    """First slot, counted over the packed sequence."""
    count: int
    """Slots (latents)."""
    kernel: tuple[int, int, int]
    """Base tokens that one packed token covers: time, height, width."""
    spatial: bool
    """True where retrieved frames sit (kind ``s``)."""

    @property
    def stop(self) -> int:
        """One past the last slot."""
        return self.start + self.count


@dataclass(frozen=True)
class FramePackLayout:
    """The parsed layout: history segments in slot order, then the latents to generate."""

    history: tuple[Segment, ...]
    targets: Segment

    @classmethod
    def parse(cls, text: str) -> FramePackLayout:
        """Read a layout string.

        Raises:
            ValueError: the text is not a layout.
        """
        match = re.fullmatch(r"((?:f\d+[ks]\d+)+)_g(\d+)", text)
        if match is None:
            raise ValueError(f"'{text}' is not a FramePack layout such as '{RELEASED_LAYOUT}'")
        segments, start = [], 0
        for count, kind, kernel in re.findall(r"f(\d+)([ks])(\d+)", match.group(1)):
            k = int(kernel)
            segments.append(Segment(start, int(count), (1 if kind == "s" else k, k, k), kind == "s"))
            start += int(count)
        return cls(tuple(segments), Segment(start, int(match.group(2)), (1, 1, 1), False))

    @property
    def history_slots(self) -> int:
        """Number of history latents."""
        return self.targets.start

    @property
    def slots(self) -> int:
        """Number of all latents, history and targets."""
        return self.targets.stop

    @property
    def spatial_slots(self) -> tuple[int, ...]:
        """Slots of retrieved frames."""
        return tuple(slot for s in self.history if s.spatial for slot in range(s.start, s.stop))

    @property
    def temporal_slots(self) -> tuple[int, ...]:
        """Slots of the temporal history; the first is the anchor, the last the newest latent."""
        return tuple(slot for s in self.history if not s.spatial for slot in range(s.start, s.stop))


def pad_to_multiple(x: Float[Tensor, "b c t h w"], kernel: tuple[int, int, int]) -> Float[Tensor, "b c t2 h2 w2"]:
    """Replicate the last slice of each axis until its size divides by the kernel (released code)."""
    pad_t, pad_h, pad_w = (-size % k for size, k in zip(x.shape[2:], kernel, strict=True))
    if pad_t == pad_h == pad_w == 0:
        return x
    return nn.functional.pad(x, (0, pad_w, 0, pad_h, 0, pad_t), mode="replicate")


def patchify(x: Float[Tensor, "b c t h w"], patch: tuple[int, int, int]) -> Float[Tensor, "b n d"]:
    """Flatten patches into tokens in (t, h, w) raster order; channel is the slowest index inside a token."""
    x = pad_to_multiple(x, patch)
    b, c, t, h, w = x.shape
    pt, ph, pw = patch
    x = x.reshape(b, c, t // pt, pt, h // ph, ph, w // pw, pw)
    x = x.permute(0, 2, 4, 6, 1, 3, 5, 7)
    return x.reshape(b, (t // pt) * (h // ph) * (w // pw), c * pt * ph * pw)


def fold_base_tokens(x: Float[Tensor, "b c t h w"]) -> Float[Tensor, "b d t h2 w2"]:
    """Fold each 2x2 of latent cells into channels, index channel * 4 + y * 2 + x (released code)."""
    x = pad_to_multiple(x, (1, 2, 2))
    b, c, t, h, w = x.shape
    x = x.reshape(b, c, t, h // 2, 2, w // 2, 2).permute(0, 1, 4, 6, 2, 3, 5)
    return x.reshape(b, c * 4, t, h // 2, w // 2)


def pool_tokens(x: Float[Tensor, "b c t h w"], kernel: tuple[int, int, int]) -> Float[Tensor, "b n c"]:
    """Average base tokens over the kernel, after replicate padding, and list them in raster order."""
    if kernel != (1, 1, 1):
        x = nn.functional.avg_pool3d(pad_to_multiple(x, kernel).float(), kernel).to(x.dtype)
    return x.flatten(2).transpose(1, 2)
