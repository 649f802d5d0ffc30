"""How much is one chunk: tokens, FLOPs, parameters and bytes, counted from a transformer's configuration.

A multiplication with its addition counts as two FLOPs; norms and rotary embedding are left out of FLOPs and
count in bytes only. The rest of a chunk (autoencoder, encoders, depth) is a table of the released networks. Knows no
device, no speed and no weights; `lyra.placement` asks what fits where.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from lyra.errors import UserError
from lyra.models.framepack import RELEASED_LAYOUT, FramePackLayout, Segment

WeightFormat = Literal["bf16", "fp8", "nf4", "fp32"]
"""How weights are stored: fp8 is float8 storage of the blocks' linear layers, cast up layer by layer (diffusers), nf4
4-bit NormalFloat of their matrices with double quantisation (bitsandbytes); the rest stays bf16."""

WEIGHT_FORMATS: tuple[WeightFormat, ...] = get_args(WeightFormat)
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Bytes of a 4-bit weight: half a byte, an 8-bit scale per 64 weights, and a float32 scale of 256 scales."""

COUNTED_PIXELS = 480 * 832
"""Frame size at which the figures below were counted, most of them on tensors without storage."""

WHOLE_TENSORS = 5
"""Tensors as large as the tokens that are alive at the widest moment of a block, attention: the block's input, queries,
keys, values and output. What is done in slices takes less."""
BUILD_INPUTS = 6.88e9
"""Bytes of warping the newest frame and five remembered ones' coordinates and building a chunk's inputs, float32."""
DECODER_CACHE, ENCODER_CACHE = 1.89e9, 1.12e9
"""Bytes of the Wan autoencoder's feature caches (bf16), from which the next chunk goes on."""
DECODE_WORKING, ENCODE_WORKING = 4.23e9, 2.97e9
"""Bytes of decoding and encoding latent by latent, the cache that is built among them; the one before is not."""
FRAMES, REMEMBERED = 0.19e9, 0.45e9
"""Bytes of the 80 decoded frames, and of what ten chunks leave: images, depth and latents."""
DEPTH_WORKING, TEXT_WORKING = 4.75e9, 0.3e9
"""Bytes of Depth Anything 3 (nested) with ten frames, eight at once in its float32 heads, and of UMT5-XXL."""


@dataclass(frozen=True)
class TransformerConfig:
    """The constructor arguments of `Lyra2Transformer3DModel` that decide its cost, with the released values."""

    dim: int = 5120
    num_heads: int = 40
    num_layers: int = 40
    ffn_dim: int = 13824
    in_channels: int = 36
    out_channels: int = 16
    text_dim: int = 4096
    text_len: int = 512
    freq_dim: int = 256
    image_dim: int = 1280
    camera_channels: int = 384
    correspondence_channels: int = 1280
    correspondence_frequencies: int = 2
    correspondence_squeeze: int = 256
    layout: str = RELEASED_LAYOUT

    @classmethod
    def of(cls, config: Any) -> TransformerConfig:
        """The values that a mapping or an object has, a model's `config` among them; released ones for the rest."""
        names = [item.name for item in fields(cls)]
        if isinstance(config, Mapping):
            return cls(**{name: config[name] for name in names if name in config})
        return cls(**{name: getattr(config, name) for name in names if hasattr(config, name)})

    @property
    def encoded_correspondence(self) -> int:
        """Values of one token's sine-cosine encoded correspondences: 4 cells, 2 functions per frequency."""
        return self.correspondence_channels * 4 * 2 * self.correspondence_frequencies

    @property
    def patch_inputs(self) -> tuple[int, ...]:
        """Input values of one token of each history segment."""
        segments = FramePackLayout.parse(self.layout).history
        return tuple(self.in_channels * 4 * math.prod(segment.kernel) for segment in segments)


@dataclass(frozen=True)
class Tokens:
    """Tokens of one forward pass: of each history segment and of the latents to generate."""

    segments: tuple[int, ...]
    targets: int
    corresponding: int
    """Those that have correspondences: retrieved frames and targets."""

    @property
    def history(self) -> int:
        """Packed tokens of the past."""
        return sum(self.segments)

    @property
    def total(self) -> int:
        """All tokens that attend to each other."""
        return self.history + self.targets


@dataclass(frozen=True)
class ForwardFlops:
    """FLOPs of one forward pass by term; the last four are the same in all steps of a chunk."""

    self_projections: int
    """Queries, keys, values and output."""
    cross_projections: int
    """Queries and output."""
    feed_forward: int
    camera: int
    """Ray features to the width of the tokens, in every block, and squeezed correspondences likewise."""
    correspondence: int
    self_attention: int
    cross_attention: int
    ends: int
    """Patch embedding of the targets, time embedding and output head."""
    history: int
    """Patch embedding of the history; the same throughout a chunk."""
    squeeze: int
    """Encoded correspondences to the squeezed width, in every block; the same throughout a chunk."""
    image: int
    """Image embedding, and the keys and values made of it; the same throughout a chunk."""
    text: int
    """Likewise of the text; the same throughout a chunk for one text."""

    @property
    def per_chunk(self) -> int:
        """Part that depends on neither step nor text."""
        return self.history + self.squeeze + self.image

    @property
    def per_text(self) -> int:
        """Part that depends on the text only."""
        return self.text

    @property
    def per_forward(self) -> int:
        """Part that every forward pass has to compute."""
        return self.total - self.per_chunk - self.per_text

    @property
    def attention(self) -> int:
        """Part that is attention, not a product with weights."""
        return self.self_attention + self.cross_attention

    @property
    def total(self) -> int:
        """A forward pass that can reuse nothing."""
        return sum(getattr(self, item.name) for item in fields(self))


@dataclass(frozen=True)
class Parameters:
    """Parameters of a transformer by where they are: its blocks, or embeddings and output head outside."""

    block_matrices: int
    """Weights of the blocks' linear layers."""
    block_biases: int
    block_norms: int
    outside: int
    layers: int
    largest_matrix: int
    """Weights of the largest linear layer of a block."""

    @property
    def total(self) -> int:
        """All of them."""
        return self.block_matrices + self.block_biases + self.block_norms + self.outside

    def block_bytes(self, weights: WeightFormat) -> int:
        """Bytes of all blocks in a storage format."""
        linear = {
            "fp32": 4 * (self.block_matrices + self.block_biases),
            "bf16": 2 * (self.block_matrices + self.block_biases),
            "fp8": self.block_matrices + self.block_biases,
            "nf4": math.ceil(NF4_BYTES * self.block_matrices) + 2 * self.block_biases,
        }
        return linear[weights] + self.block_norms * (4 if weights == "fp32" else 2)

    def outside_bytes(self, weights: WeightFormat) -> int:
        """Bytes of embeddings and head, never stored in fewer than 16 bits."""
        return self.outside * (4 if weights == "fp32" else 2)

    def bytes(self, weights: WeightFormat) -> int:
        """Bytes of the whole network."""
        return self.block_bytes(weights) + self.outside_bytes(weights)


@dataclass(frozen=True)
class OtherFlops:
    """FLOPs of a chunk outside the transformer, for the released networks (80 frames, ten with depth, one caption)."""

    decode: float
    encode_condition: float
    """The warped frames, with one frame put before them."""
    encode_new: float
    encode_memory: float
    """Five remembered images, one by one."""
    image_encoder: float
    text_encoder: float
    depth: float

    @property
    def autoencoder(self) -> float:
        """All passes through the autoencoder."""
        return self.decode + self.encode_condition + self.encode_new + self.encode_memory

    @property
    def total(self) -> float:
        """All of it."""
        return sum(getattr(self, item.name) for item in fields(self))


@dataclass(frozen=True)
class Activations:
    """Bytes on the device beside the weights, by what needs them, each at its widest moment."""

    inputs: int
    """What a chunk is conditioned on, float32, as it is built."""
    build_inputs: int
    """Building them."""
    denoise: int
    """A forward pass, with its inputs in its own number format and what is kept of it for the next one."""
    decode: int
    encode: int
    decoder_cache: int
    encoder_cache: int
    frames: int
    depth: int
    text: int
    remembered: int


@dataclass(frozen=True)
class ModelCost:
    """Everything counted for a model at one frame size."""

    config: TransformerConfig
    height: int
    width: int
    latent_size: tuple[int, int]
    image_tokens: int
    tokens: Tokens
    flops: ForwardFlops
    parameters: Parameters
    other: OtherFlops

    def denoise_flops(self, steps: int, *, guided: bool) -> float:
        """FLOPs of a chunk's denoising, with the chunk-constant part computed once (guidance: twice per step)."""
        branches = 2 if guided else 1
        once = self.flops.per_chunk + branches * self.flops.per_text
        return steps * branches * self.flops.per_forward + once


def count_cost(config: Any, height: int, width: int, *, stride: int = 8, image_tokens: int = 257) -> ModelCost:
    """Count a model, given as a mapping or object with the transformer's constructor arguments.

    Args:
        height, width: of the generated frames, in pixels.
        stride: pixels per latent cell (released: 8). image_tokens: of the image embedding (released: 257).

    Raises:
        UserError: the size is not a multiple of the stride.
    """
    counted = TransformerConfig.of(config)
    size = latent_size(height, width, stride)
    tokens = count_tokens(counted.layout, *size)
    return ModelCost(
        config=counted,
        height=height,
        width=width,
        latent_size=size,
        image_tokens=image_tokens,
        tokens=tokens,
        flops=forward_flops(counted, tokens, image_tokens),
        parameters=count_parameters(counted),
        other=other_flops(height, width),
    )


def latent_size(height: int, width: int, stride: int) -> tuple[int, int]:
    """Height and width in latent cells.

    Raises:
        UserError: the size is not a positive multiple of the stride.
    """
    if min(height, width) < stride or height % stride or width % stride:
        raise UserError(f"A frame of {height}x{width} pixels cannot be generated; choose multiples of {stride}.")
    return height // stride, width // stride


def count_tokens(layout: str, latent_height: int, latent_width: int) -> Tokens:
    """Tokens of a layout; sides that a packing kernel does not divide are padded up (released code)."""
    parsed = FramePackLayout.parse(layout)
    rows, columns = math.ceil(latent_height / 2), math.ceil(latent_width / 2)

    def of(segment: Segment) -> int:
        sides = zip((segment.count, rows, columns), segment.kernel, strict=True)
        return math.prod(math.ceil(side / kernel) for side, kernel in sides)

    spatial = sum(of(segment) for segment in parsed.history if segment.spatial)
    targets = of(parsed.targets)
    return Tokens(tuple(of(segment) for segment in parsed.history), targets, spatial + targets)


def forward_flops(c: TransformerConfig, tokens: Tokens, image_tokens: int) -> ForwardFlops:
    """FLOPs of one forward pass; tokens without correspondences skip their encoder (released code: times zero)."""
    n, d, layers = tokens.total, c.dim, c.num_layers
    embed_text = 2 * c.text_len * (c.text_dim * d + d * d)
    embed_image = 2 * image_tokens * (c.image_dim * c.image_dim + c.image_dim * d)
    time = 2 * (c.freq_dim * d + d * d + 6 * d * d)
    patches = zip(tokens.segments, c.patch_inputs, strict=True)
    return ForwardFlops(
        self_projections=2 * n * layers * 4 * d * d,
        cross_projections=2 * n * layers * 2 * d * d,
        feed_forward=2 * n * layers * 2 * d * c.ffn_dim,
        camera=2 * n * layers * 4 * c.camera_channels * d,
        correspondence=2 * tokens.corresponding * layers * c.correspondence_squeeze * d,
        self_attention=4 * n * n * d * layers,
        cross_attention=4 * n * (c.text_len + image_tokens) * d * layers,
        ends=2 * tokens.targets * 4 * (c.in_channels + c.out_channels) * d + time,
        history=2 * d * sum(count * inputs for count, inputs in patches),
        squeeze=2 * tokens.corresponding * layers * c.encoded_correspondence * c.correspondence_squeeze,
        image=embed_image + 2 * layers * 2 * image_tokens * d * d,
        text=embed_text + 2 * layers * 2 * c.text_len * d * d,
    )


def count_parameters(c: TransformerConfig) -> Parameters:
    """Parameters of `Lyra2Transformer3DModel`."""
    d, f = c.dim, c.ffn_dim
    squeeze = c.correspondence_squeeze * (c.encoded_correspondence + d)
    matrices = 10 * d * d + 2 * d * f + 4 * c.camera_channels * d + squeeze
    time = (c.freq_dim * d + d) + (d * d + d) + (d * 6 * d + 6 * d)
    text = (c.text_dim * d + d) + (d * d + d)
    image = 2 * c.image_dim + (c.image_dim**2 + c.image_dim) + (c.image_dim * d + d) + 2 * d
    patches = sum(inputs * d + d for inputs in (c.in_channels * 4, *c.patch_inputs))
    head = 2 * d + (d * 4 * c.out_channels + 4 * c.out_channels)
    return Parameters(
        block_matrices=c.num_layers * matrices,
        block_biases=c.num_layers * (10 * d + f + d),
        block_norms=c.num_layers * 13 * d,
        outside=time + text + image + patches + head,
        layers=c.num_layers,
        largest_matrix=max(d * f, d * d, c.encoded_correspondence * c.correspondence_squeeze),
    )


def other_flops(height: int, width: int) -> OtherFlops:
    """The other networks at a frame size: Wan autoencoder, CLIP ViT-H, UMT5-XXL, Depth Anything 3 (nested), in FLOPs.

    Counted at 480x832 with torch's flop counter and scaled by pixels; the encoders see a fixed size.
    """
    scale = height * width / COUNTED_PIXELS * 1e12
    return OtherFlops(
        decode=271.0 * scale,
        encode_condition=163.7 * scale,
        encode_new=161.0 * scale,
        encode_memory=13.6 * scale,
        image_encoder=0.6e12,
        text_encoder=4.8e12,
        depth=119.0 * scale,
    )


def count_activations(cost: ModelCost, element: Literal[2, 4]) -> Activations:
    """Bytes beside the weights, with activations of so many bytes an element.

    The transformer's are a formula; the others were counted at 480x832 and are scaled by pixels.
    """
    c, tokens = cost.config, cost.tokens
    slots, cells = FramePackLayout.parse(c.layout).slots, math.prod(cost.latent_size)
    inputs = slots * cells * (c.in_channels + c.camera_channels + c.correspondence_channels)
    text, image = (c.num_layers * 2 * count * c.dim for count in (c.text_len, cost.image_tokens))
    cached = tokens.history * c.dim + tokens.total * 4 * c.camera_channels + text + image
    cached += c.num_layers * tokens.corresponding * c.correspondence_squeeze
    # The first pass holds the folded correspondences; later ones may hold the second text of guidance instead.
    once = max(tokens.corresponding * 4 * c.correspondence_channels, text)
    working = WHOLE_TENSORS * tokens.total * c.dim
    # Inputs in float32 are used as they are.
    own_inputs = element * inputs if element < 4 else 0
    pixels = cost.height * cost.width / COUNTED_PIXELS
    scale = element / 2 * pixels
    return Activations(
        inputs=4 * inputs,
        build_inputs=round(pixels * BUILD_INPUTS),
        denoise=own_inputs + element * (cached + once + working),
        decode=round(scale * DECODE_WORKING),
        encode=round(scale * ENCODE_WORKING),
        decoder_cache=round(scale * DECODER_CACHE),
        encoder_cache=round(scale * ENCODER_CACHE),
        frames=round(scale * FRAMES),
        depth=round(pixels * DEPTH_WORKING),
        text=round(element / 2 * TEXT_WORKING),
        remembered=round(pixels * REMEMBERED),
    )
