"""The backbone: a DINOv2 vision transformer whose later blocks alternate between one view and all views.

Without given cameras and with three views or more, a reference view is chosen and put first while views attend to each
other (released rule `saddle_balanced`). Knows no head; camera tokens come from `camera.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from lyra.models.depth_anything.config import PATCH, BackboneConfig
from lyra.models.depth_anything.layers import Block, Rotation

BLOCK_NORM_EPS = 1e-6
"""Of the norms inside blocks; the final norm and the query and key norms have 1e-5 (released code)."""
REFERENCE_VIEWS = 3
"""Fewest views for which a reference view is chosen (released code)."""


@dataclass(frozen=True)
class Features:
    """What the heads read."""

    levels: tuple[Float[Tensor, "b s n c"], ...]
    """Patch tokens after the four output layers, in raster order."""
    camera: Float[Tensor, "b s c"]
    """The special token after the last output layer, before the final norm."""
    rows: int
    columns: int


class PatchEmbedding(nn.Module):
    """Linear embedding of non-overlapping patches."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, PATCH, stride=PATCH)

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b n c"]:
        """Tokens in raster order, float32."""
        return self.proj(images.to(self.proj.weight.dtype)).float().flatten(2).transpose(1, 2)


class VisionTransformer(nn.Module):
    """DINOv2 tokens and blocks, with the released alternation from `alternation_start` on."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.config = config
        start = config.depth if config.alternation_start is None else config.alternation_start
        self.patch_embed = PatchEmbedding(config.dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.dim))
        if config.alternation_start is not None:
            self.camera_token = nn.Parameter(torch.zeros(1, 2, config.dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, config.table_side**2 + 1, config.dim))
        self.blocks = nn.ModuleList(
            Block(
                config.dim,
                config.heads,
                norm_eps=BLOCK_NORM_EPS,
                query_key_norm=index >= start,
                swiglu=config.feed_forward == "swiglu",
            )
            for index in range(config.depth)
        )
        self.norm = nn.LayerNorm(config.dim)

    def positions(self, rows: int, columns: int) -> Float[Tensor, "1 n c"]:
        """The learned table at rows x columns patches, the special token's entry first.

        Bicubic with scale factors (n + 0.1) / table side and not with a target size, because DINOv2 was trained so.
        """
        side = self.config.table_side
        table = self.pos_embed.float()
        if rows == columns == side:
            return table
        grid = table[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
        scale = ((rows + 0.1) / side, (columns + 0.1) / side)
        grid = F.interpolate(grid, scale_factor=scale, mode="bicubic")
        return torch.cat([table[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)

    def tokens(self, images: Float[Tensor, "b s 3 h w"]) -> Float[Tensor, "b s n c"]:
        """The special token and the patch tokens of each view with their positions, float32."""
        patches = self.patch_embed(images.flatten(0, 1))
        special = self.cls_token.float().expand(len(patches), -1, -1)
        tokens = torch.cat([special, patches], dim=1)
        tokens = tokens + self.positions(images.shape[-2] // PATCH, images.shape[-1] // PATCH)
        return tokens.unflatten(0, images.shape[:2])

    def default_camera_tokens(self, batch: int, views: int) -> Float[Tensor, "b s c"]:
        """Learned tokens where no cameras are given: one for the first view, one for all others."""
        token = self.camera_token.float()
        return torch.cat([token[:, :1], token[:, 1:].expand(-1, views - 1, -1)], dim=1).expand(batch, -1, -1)

    def forward(
        self, images: Float[Tensor, "b s 3 h w"], camera_tokens: Float[Tensor, "b s c"] | None = None
    ) -> Features:
        """Features of normalised images whose sides are multiples of 14; camera tokens stand for given cameras."""
        batch, views = images.shape[:2]
        rows, columns = images.shape[-2] // PATCH, images.shape[-1] // PATCH
        config, start = self.config, self.config.alternation_start
        x = local = self.tokens(images)
        of_view: Rotation | None = None
        of_all: Rotation | None = None
        order: Int[Tensor, "b s"] | None = None
        outputs = []
        for index, block in enumerate(self.blocks):
            if start is not None and index == start - 1 and camera_tokens is None and views >= REFERENCE_VIEWS:
                order = reference_first(x[:, :, 0])
                x, local = take_views(x, order), take_views(local, order)
            if index == start:
                given = self.default_camera_tokens(batch, views) if camera_tokens is None else camera_tokens
                x = torch.cat([given[:, :, None].to(x.dtype), x[:, :, 1:]], dim=2)
                of_view, of_all = token_rotations(rows, columns, views, config.dim // config.heads, x.device)
            if start is not None and index >= start and index % 2 == 1:
                x = block(x.flatten(1, 2), of_all).unflatten(1, (views, -1))
            else:
                x = local = block(x.flatten(0, 1), of_view).unflatten(0, (batch, views))
            if index in config.output_layers:
                # The final norm is for the current tokens only; the local ones beside them stay raw (released code).
                output = self.norm(x) if start is None else torch.cat([local, self.norm(x)], dim=-1)
                outputs.append((output if order is None else take_views(output, order.argsort(dim=1)))[:, :, 1:])
        camera = (x if start is None else torch.cat([local, x], dim=-1))[:, :, :1]
        camera = camera if order is None else take_views(camera, order.argsort(dim=1))
        return Features(tuple(outputs), camera[:, :, 0], rows, columns)


class Backbone(nn.Module):
    """Holds the transformer under the released name `pretrained`."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.pretrained = VisionTransformer(config)

    def forward(
        self, images: Float[Tensor, "b s 3 h w"], camera_tokens: Float[Tensor, "b s c"] | None = None
    ) -> Features:
        """See `VisionTransformer.forward`."""
        return self.pretrained(images, camera_tokens)


def token_rotations(
    rows: int, columns: int, views: int, head_dim: int, device: torch.device
) -> tuple[Rotation, Rotation]:
    """Rotary positions inside a view and over all views.

    Inside a view the special token is at (0, 0) and patches at (row + 1, column + 1); over all views every patch is at
    (1, 1), so that only special tokens and patches are told apart (released code).
    """
    row, column = torch.meshgrid(
        torch.arange(1, rows + 1, device=device), torch.arange(1, columns + 1, device=device), indexing="ij"
    )
    special = torch.zeros(1, 2, dtype=torch.long, device=device)
    patches = torch.stack([row, column], dim=-1).flatten(0, 1)
    alone = torch.cat([special, patches])
    together = torch.cat([special, torch.ones_like(patches)]).repeat(views, 1)
    return Rotation.at(alone, head_dim), Rotation.at(together, head_dim)


def reference_first(special: Float[Tensor, "b s c"]) -> Int[Tensor, "b s"]:
    """Order of views that puts the reference view first and keeps the others' order (released rule).

    The reference is the most average view: mean similarity to the others, norm and variance of the special token, each
    scaled to [0, 1] over the views, lie nearest to 0.5 in sum.
    """
    special = special.float()
    views = special.shape[1]
    norm = special.norm(dim=-1)
    unit = special / norm[..., None]
    similarity = ((unit @ unit.transpose(1, 2)).sum(dim=-1) - 1) / (views - 1)
    traits = torch.stack([similarity, norm, unit.var(dim=-1)], dim=-1)
    low, high = traits.amin(dim=1, keepdim=True), traits.amax(dim=1, keepdim=True)
    distance = ((traits - low) / (high - low + 1e-8) - 0.5).abs().sum(dim=-1)
    reference = distance.argmin(dim=1, keepdim=True)
    # Sorting these keys moves the reference to the front and leaves the rest as it was.
    keys = torch.arange(views, device=special.device).expand(len(special), -1)
    return keys.scatter(1, reference, -1).argsort(dim=1)


def take_views(x: Float[Tensor, "b s n c"], order: Int[Tensor, "b s"]) -> Float[Tensor, "b s n c"]:
    """Views in another order, one order for each item of the batch."""
    return x[torch.arange(len(x), device=x.device)[:, None], order]
