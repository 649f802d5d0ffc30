"""Counted tokens, FLOPs, parameters and bytes against the model itself and the published figures."""

import gc

import pytest
import recipe
import torch
from diffusers import AutoencoderKLWan
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import UMT5Config, UMT5EncoderModel

from lyra.errors import UserError
from lyra.generation.conditioning import ChunkScene, build_inputs
from lyra.geometry import warp
from lyra.memory.spatial_cache import SpatialCache
from lyra.models import blocks, cost, tiled_autoencoder
from lyra.models.cost import TransformerConfig, count_activations, count_cost, latent_size
from lyra.models.depth_anything.config import NESTED_GIANT_LARGE
from lyra.models.depth_anything.model import build, place
from lyra.models.footprint import OTHER_PARTS, TEXT_EMBEDDING, TEXT_PINNED, pinned_block_bytes, tile_share
from lyra.models.framepack import RELEASED_LAYOUT, FramePackLayout
from lyra.models.streaming import StreamingWanAutoencoder, decode_video, encode_video
from lyra.models.tiled_autoencoder import TiledWanAutoencoder
from lyra.models.transformer import ChunkCache, Lyra2Transformer3DModel
from lyra.types import Cameras
from tests.models.tiny_released import golden_transformer

RELEASED = TransformerConfig()
COST = count_cost(RELEASED, 480, 832)


class PeakBytes(TorchDispatchMode):
    """Largest number of bytes alive at once among the tensors made in this context; works without storage."""

    def __init__(self, known) -> None:
        super().__init__()
        self.alive = {ref.cdata: (ref, 0) for ref in (StorageWeakRef(t.untyped_storage()) for t in known)}
        self.now = self.peak = 0

    def sweep(self) -> None:
        for key in [key for key, (ref, _) in self.alive.items() if ref.expired()]:
            self.now -= self.alive.pop(key)[1]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.sweep()
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                ref = StorageWeakRef(tensor.untyped_storage())
                if ref.cdata not in self.alive:
                    size = tensor.untyped_storage().nbytes()
                    self.alive[ref.cdata] = (ref, size)
                    self.now += size
        self.peak = max(self.peak, self.now)
        return out


def meta_inputs(
    config: TransformerConfig, height: int, width: int, dtype: torch.dtype = torch.float32
) -> list[torch.Tensor]:
    """Inputs of a forward pass without storage."""
    channels = (16, 4, 16, config.camera_channels, config.correspondence_channels)
    videos = [torch.empty(1, c, 45, height // 8, width // 8, device="meta", dtype=dtype) for c in channels]
    text = torch.empty(1, config.text_len, config.text_dim, device="meta", dtype=dtype)
    image = torch.empty(1, 257, config.image_dim, device="meta", dtype=dtype)
    return [*videos, text, image, torch.empty(1, device="meta")]


def meta_transformer(**sizes) -> Lyra2Transformer3DModel:
    with torch.device("meta"):
        return Lyra2Transformer3DModel(**sizes).eval()


def profiled_flops(model, inputs, cache) -> int:
    # The plain kernel, because the counter does not know the fused CPU kernel in every version of torch.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(*inputs, cache=cache)
    return counter.get_total_flops()


@pytest.mark.parametrize(
    ("height", "width", "tokens", "tflops"),
    [(480, 832, 38_246, 2_184), (448, 768, 32_928, 1_738), (720, 1280, 88_360, 8_670)],
)
def test_released_size_has_the_published_tokens_and_flops(height, width, tokens, tflops):
    counted = count_cost(RELEASED, height, width)
    assert counted.tokens.total == tokens
    assert counted.flops.total / 1e12 == pytest.approx(tflops, rel=2e-3)


def test_terms_of_a_forward_pass_are_the_published_ones():
    flops = COST.flops
    published = {
        "self_projections": 320.8,
        "cross_projections": 160.4,
        "feed_forward": 433.1,
        "camera": 24.1,
        "self_attention": 1198.3,
        "cross_attention": 24.1,
    }
    for name, tflops in published.items():
        assert getattr(flops, name) / 1e12 == pytest.approx(tflops, abs=0.06), name
    # The published 20.1 TFLOP send the temporal history through the correspondence encoder, too.
    assert (flops.squeeze + flops.correspondence) / 1e12 == pytest.approx(20.1 * 34_320 / 38_246, abs=0.06)


@pytest.mark.parametrize(("height", "width"), [(8, 12), (12, 20)])
def test_formula_counts_what_the_profiler_counts_in_the_first_and_the_later_passes(released_shapes, height, width):
    model = golden_transformer(released_shapes)
    given = recipe.transformer_inputs(height, width)
    inputs = [given[name] for name in ("x", "mask", "cond", "plucker", "buffer", "text", "clip")]
    inputs.append(given["timestep"][0].float())
    flops = count_cost(model.config, height * 8, width * 8).flops
    cache = ChunkCache()
    assert flops.total == pytest.approx(profiled_flops(model, inputs, cache), rel=1e-3)
    assert flops.per_forward == pytest.approx(profiled_flops(model, inputs, cache), rel=1e-3)
    inputs[5] = inputs[5].clone()  # Another text.
    assert flops.per_forward + flops.per_text == pytest.approx(profiled_flops(model, inputs, cache), rel=1e-3)


def test_formula_counts_what_the_profiler_counts_at_the_released_size():
    layers = 2
    flops = count_cost({"num_layers": layers}, 480, 832).flops
    profiled = profiled_flops(meta_transformer(num_layers=layers), meta_inputs(RELEASED, 480, 832), ChunkCache())
    assert flops.total == pytest.approx(profiled, rel=1e-3)


@pytest.mark.parametrize("element", [2, 4])
@pytest.mark.parametrize(
    ("height", "width", "text_len"), [(448, 768, 512), (480, 832, 512), (720, 1280, 512), (480, 832, 8192)]
)
def test_bytes_beside_the_weights_are_those_of_forward_passes(monkeypatch, element, height, width, text_len):
    # Fused attention leaves nothing behind but its output, which a device without storage cannot show.
    monkeypatch.setattr(blocks, "attend", lambda q, k, v: torch.empty_like(q))
    dtype = torch.bfloat16 if element == 2 else torch.float32
    config = TransformerConfig(num_layers=3, text_len=text_len)
    model, inputs = meta_transformer(**vars(config)).to(dtype), meta_inputs(config, height, width, dtype)
    others, cache, peaks = torch.empty_like(inputs[5]), ChunkCache(), []
    gc.collect()
    with torch.no_grad(), PeakBytes([*model.parameters(), *inputs, others]) as measured:
        for text in (inputs[5], others, inputs[5]):
            measured.peak = 0
            model(*inputs[:5], text, *inputs[6:], cache=cache)
            peaks.append(measured.peak)
    activations = count_activations(count_cost(config, height, width), element)
    own_inputs = sum(tensor.nbytes for tensor in inputs[:5]) if element == 2 else 0
    assert activations.inputs == sum(tensor.numel() * 4 for tensor in inputs[:5])
    # The first pass is the widest, or, where texts take much, those that begin with keys and values of two.
    assert (peaks[0] == max(peaks)) == (text_len == 512)
    assert activations.denoise - own_inputs == pytest.approx(max(peaks), rel=0.03)


def test_parameters_are_those_of_the_model():
    assert COST.parameters.total == 17_029_871_424
    for sizes in (recipe.TINY, {"num_layers": 1, "layout": "f1k1f2s2f4k2_g4", "correspondence_frequencies": 3}):
        model = meta_transformer(**sizes)
        counted = count_cost(model.config, 480, 832).parameters
        assert counted.total == sum(p.numel() for p in model.parameters())
        in_blocks = counted.total - counted.outside
        assert in_blocks == sum(p.numel() for p in model.blocks.parameters())
        linear = [m for m in model.blocks.modules() if isinstance(m, torch.nn.Linear)]
        assert counted.block_matrices == sum(m.weight.numel() for m in linear)
        assert counted.block_biases == sum(m.bias.numel() for m in linear if m.bias is not None)
        assert counted.largest_matrix == max(m.weight.numel() for m in linear)


def test_bytes_of_the_weights_are_the_published_ones():
    parameters = COST.parameters
    published = {"fp32": 68.12, "bf16": 34.06, "fp8": 17.3, "nf4": 9.2}
    for name, gigabytes in published.items():
        assert parameters.bytes(name) / 1e9 == pytest.approx(gigabytes, rel=5e-3), name


def test_float8_storage_takes_as_many_bytes_as_layerwise_casting_leaves():
    model = Lyra2Transformer3DModel(**recipe.TINY).to(torch.bfloat16)
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    counted = count_cost(model.config, 64, 96).parameters.bytes("fp8")
    assert counted == sum(p.nbytes for p in model.parameters())


def test_defaults_are_the_models_own():
    model = meta_transformer(num_layers=1)
    ours = TransformerConfig.of(model.config)
    assert ours == TransformerConfig(num_layers=1)
    assert TransformerConfig.of(dict(model.config)) == ours


def meta_autoencoder() -> AutoencoderKLWan:
    with torch.device("meta"):
        return AutoencoderKLWan().to(torch.bfloat16)


def test_autoencoder_takes_the_counted_flops_and_bytes():
    vae = meta_autoencoder()
    streaming = StreamingWanAutoencoder(vae)
    latents = torch.empty(1, 16, 2, 60, 104, device="meta", dtype=torch.bfloat16)
    frames = torch.empty(1, 3, 9, 480, 832, device="meta", dtype=torch.bfloat16)
    decoder, encoder = {}, {}
    streaming.decode_piece(latents, decoder)
    streaming.encode_piece(frames, encoder)
    for cache, counted in ((decoder, cost.DECODER_CACHE), (encoder, cost.ENCODER_CACHE)):
        assert sum(t.nbytes for t in cache_of(cache)) == pytest.approx(counted, rel=0.01)
    known = [*vae.parameters(), frames, latents, *cache_of(decoder), *cache_of(encoder)]
    with FlopCounterMode(display=False) as counter, PeakBytes(known) as decoding:
        streaming.decode_piece(latents, fetched(decoder))
    assert 10 * counter.get_total_flops() == pytest.approx(COST.other.decode, rel=0.01)
    with FlopCounterMode(display=False) as counter, PeakBytes(known) as encoding:
        streaming.encode_piece(frames[:, :, 1:], fetched(encoder))
    assert 10 * counter.get_total_flops() == pytest.approx(COST.other.encode_new, rel=0.01)
    # A cache that was fetched is let go entry by entry, so it adds nothing to the one that takes its place.
    output = 72 * 3 * 480 * 832 * 2
    assert decoding.peak + output == pytest.approx(cost.DECODE_WORKING, rel=0.02)
    assert encoding.peak == pytest.approx(cost.ENCODE_WORKING, rel=0.02)


def cache_of(cache) -> list[torch.Tensor]:
    return [entry for entry in cache["features"] if isinstance(entry, torch.Tensor)]


def fetched(cache):
    """A copy of a cache, as it arrives from where it waits."""
    return {"features": [torch.empty_like(e) if isinstance(e, torch.Tensor) else e for e in cache["features"]]}


class Parked:
    """What of a tensor is left on a device while it waits elsewhere: nothing."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.shape, self.dtype = tensor.shape, tensor.dtype


def test_tiles_take_their_share_of_the_bytes(monkeypatch):
    def moved(cache, device):
        def entry_there(entry):
            if isinstance(entry, torch.Tensor) and device.type == "cpu":
                return Parked(entry)
            fetch = isinstance(entry, Parked) and device.type == "meta"
            return torch.empty(entry.shape, dtype=entry.dtype, device="meta") if fetch else entry

        return {name: [entry_there(entry) for entry in entries] for name, entries in cache.items()}

    monkeypatch.setattr(tiled_autoencoder, "cache_to", moved)
    vae = meta_autoencoder()
    # Two tiles, because a tile takes the same of every frame.
    latents = torch.empty(1, 16, 2, 32, 56, device="meta", dtype=torch.bfloat16)
    frames = torch.empty(1, 3, 9, 256, 448, device="meta", dtype=torch.bfloat16)
    for run, piece, counted in (
        (decode_video, latents, cost.DECODE_WORKING),
        (encode_video, frames, cost.ENCODE_WORKING),
    ):
        with PeakBytes([*vae.parameters(), piece]) as measured:
            run(TiledWanAutoencoder(vae), piece, {})
        assert 0.9 < measured.peak / (tile_share(COST) * counted) < 1 + cost.FRAMES / counted / tile_share(COST)


def test_depth_network_takes_the_counted_bytes(monkeypatch):
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda q, *_, **__: torch.empty_like(q))
    with torch.device("meta"):
        network = place(build(NESTED_GIANT_LARGE), torch.device("meta"), torch.bfloat16)
    assert sum(p.nbytes for p in network.parameters()) == pytest.approx(OTHER_PARTS["depth"], rel=0.01)
    images = torch.empty(1, 10, 3, 476, 826, device="meta")
    cameras = torch.empty(1, 10, NESTED_GIANT_LARGE.any_view.backbone.dim, device="meta")
    any_view, metric = network.da3, network.da3_metric
    with torch.no_grad(), PeakBytes([*network.parameters(), images, cameras]) as measured:
        any_view.head(any_view.backbone(images, cameras))
        metric.head(metric.backbone(images))
    assert measured.peak == pytest.approx(cost.DEPTH_WORKING, rel=0.02)


def test_text_encoder_has_the_counted_layers():
    sizes = {"vocab_size": 256384, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
    with torch.device("meta"):
        encoder = UMT5EncoderModel(UMT5Config(feed_forward_proj="gated-gelu", **sizes)).to(torch.bfloat16)
    layers = [p.nbytes for p in encoder.parameters()]
    assert sum(layers) == pytest.approx(OTHER_PARTS["text"], rel=0.001)
    assert max(layers) == pytest.approx(TEXT_EMBEDDING, rel=0.001)
    assert sum(1 << (size - 1).bit_length() for size in layers) == pytest.approx(TEXT_PINNED, rel=0.001)


@pytest.mark.parametrize(("weights", "element"), [("fp32", 4), ("bf16", 2), ("fp8", 1)])
def test_pinned_memory_is_that_of_tensors_rounded_up_to_powers_of_two(weights, element):
    layers = 2
    sizes = [p.numel() * element for p in meta_transformer(num_layers=layers).blocks.parameters()]
    pinned = sum(1 << (size - 1).bit_length() for size in sizes)
    counted = pinned_block_bytes(count_cost({"num_layers": layers}, 480, 832), weights)
    assert counted == pytest.approx(pinned, rel=0.001)


def test_building_a_chunks_inputs_takes_the_counted_bytes(monkeypatch):
    # Off the CPU, warping is done by torch.
    monkeypatch.setattr(warp, "splat", warp.splat_reference)
    height, width, frames = 96, 160, 161
    w2c = torch.eye(4).repeat(frames, 1, 1)
    w2c[:, 0, 3] = torch.linspace(0, 0.3, frames)
    intrinsics = torch.tensor([[140.0, 0, width / 2], [0, 140, height / 2], [0, 0, 1]]).repeat(frames, 1, 1)
    depth, memory = (2 + torch.linspace(0, 1, width)).expand(height, width).contiguous(), SpatialCache()
    for frame in range(0, 40, 8):
        memory.write(frame, depth, w2c[frame], intrinsics[frame])
    scene = ChunkScene(Cameras(w2c, intrinsics, height, width), 80, memory.frames, memory.read(0))
    latents = [torch.zeros(1, 16, count, height // 8, width // 8) for count in (45, 5, 20)]
    names = ("history_latents", "spatial_latents", "warp_latents")
    settings = {"target_mask": None, "stride": 8, "cell_samples": 8, "warp_group": 16}
    gc.collect()
    with torch.no_grad(), PeakBytes(latents) as measured:
        last = (depth, w2c[80], intrinsics[80], w2c[81:], intrinsics[81:])
        newest = warp.forward_warp(torch.zeros(3, height, width), *last, group=16)
        layout = FramePackLayout.parse(RELEASED_LAYOUT)
        inputs = build_inputs(scene, layout, **dict(zip(names, latents, strict=True)), **settings)
    counted = count_activations(count_cost(RELEASED, height, width), 2)
    assert measured.peak == pytest.approx(counted.build_inputs, rel=0.03)
    assert sum(part.nbytes for part in vars(inputs).values()) == pytest.approx(counted.inputs, rel=0.01)
    assert newest.covered.any()


def test_the_rest_of_a_chunk_grows_with_the_pixels():
    small, large = COST, count_cost(RELEASED, 960, 1664)
    assert small.other.total / 1e12 == pytest.approx(724 + 271.0 - 261.8, rel=0.01)
    assert large.other.autoencoder == pytest.approx(4 * small.other.autoencoder)
    assert large.other.text_encoder == small.other.text_encoder


def test_guidance_takes_two_passes_a_step_and_shares_the_chunks_constants():
    plain, guided = (COST.denoise_flops(35, guided=value) for value in (False, True))
    assert guided - 2 * plain == -COST.flops.per_chunk
    assert COST.denoise_flops(4, guided=False) / 1e15 == pytest.approx(8.74, rel=0.01)
    assert guided / 1e15 == pytest.approx(152.9, rel=0.01)


@pytest.mark.parametrize(("height", "width"), [(481, 832), (480, 4), (0, 832)])
def test_a_size_that_is_no_multiple_of_the_stride_is_refused(height, width):
    with pytest.raises(UserError, match=f"{height}x{width}.*multiples of 8"):
        latent_size(height, width, 8)
