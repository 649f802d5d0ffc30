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

from lyra.errors import UserError
from lyra.models import blocks
from lyra.models.cost import (
    DECODER_CACHE,
    ENCODE_WORKING,
    ENCODER_CACHE,
    TransformerConfig,
    count_activations,
    count_cost,
    latent_size,
)
from lyra.models.streaming import StreamingWanAutoencoder, copy_cache
from lyra.models.transformer import ChunkCache, Lyra2Transformer3DModel
from tests.models.tiny_released import golden_transformer

RELEASED = TransformerConfig()


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


def meta_inputs(config: TransformerConfig, height: int, width: int) -> list[torch.Tensor]:
    """Inputs of a forward pass without storage."""
    channels = (16, 4, 16, config.camera_channels, config.correspondence_channels)
    videos = [torch.empty(1, c, 45, height // 8, width // 8, device="meta") for c in channels]
    text = torch.empty(1, config.text_len, config.text_dim, device="meta")
    image = torch.empty(1, 257, config.image_dim, device="meta")
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
    cost = count_cost(RELEASED, height, width)
    assert cost.tokens.total == tokens
    assert cost.flops.total / 1e12 == pytest.approx(tflops, rel=2e-3)


def test_terms_of_a_forward_pass_are_the_published_ones():
    flops = count_cost(RELEASED, 480, 832).flops
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
    cost = count_cost({"num_layers": layers}, 480, 832)
    profiled = profiled_flops(meta_transformer(num_layers=layers), meta_inputs(RELEASED, 480, 832), ChunkCache())
    assert cost.flops.total == pytest.approx(profiled, rel=1e-3)


@pytest.mark.parametrize("element", [2, 4])
@pytest.mark.parametrize(("height", "width"), [(480, 832), (720, 1280)])
def test_bytes_beside_the_weights_are_those_of_a_forward_pass(monkeypatch, element, height, width):
    # Fused attention leaves nothing behind but its output, which a device without storage cannot show.
    monkeypatch.setattr(blocks, "attend", lambda q, k, v: torch.empty_like(q))
    model = meta_transformer(num_layers=3).to(torch.bfloat16 if element == 2 else torch.float32)
    inputs = meta_inputs(RELEASED, height, width)
    gc.collect()
    with torch.no_grad(), PeakBytes([*model.parameters(), *inputs]) as measured:
        model(*inputs, cache=ChunkCache())
    cost = count_cost({"num_layers": 3}, height, width)
    counted = count_activations(cost, element).denoise - sum(tensor.nbytes for tensor in inputs[:5])
    # A part of the inputs is cast before it is used, and norms differ between versions of torch.
    assert counted == pytest.approx(measured.peak, rel=0.08)


def test_parameters_are_those_of_the_model():
    assert count_cost(RELEASED, 480, 832).parameters.total == 17_029_871_424
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
    parameters = count_cost(RELEASED, 480, 832).parameters
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


def test_autoencoder_takes_the_counted_flops_and_bytes():
    with torch.device("meta"):
        vae = AutoencoderKLWan().to(torch.bfloat16)
    streaming, cost = StreamingWanAutoencoder(vae), count_cost(RELEASED, 480, 832)
    latents = torch.empty(1, 16, 2, 60, 104, device="meta", dtype=torch.bfloat16)
    frames = torch.empty(1, 3, 9, 480, 832, device="meta", dtype=torch.bfloat16)
    decoder, encoder = {}, {}
    streaming.decode_piece(latents, decoder)
    streaming.encode_piece(frames, encoder)
    for cache, counted in ((decoder, DECODER_CACHE), (encoder, ENCODER_CACHE)):
        assert sum(t.nbytes for t in cache_of(cache)) == pytest.approx(counted, rel=0.02)
    known = [*vae.parameters(), frames, latents, *cache_of(decoder), *cache_of(encoder)]
    with FlopCounterMode(display=False) as counter, PeakBytes(known) as decoding:
        streaming.decode_piece(latents, copy_cache(decoder))
    assert 10 * counter.get_total_flops() == pytest.approx(cost.other.decode, rel=0.01)
    with FlopCounterMode(display=False) as counter, PeakBytes(known) as encoding:
        streaming.encode_piece(frames[:, :, 1:], copy_cache(encoder))
    assert 10 * counter.get_total_flops() == pytest.approx(cost.other.encode_new, rel=0.01)
    assert encoding.peak == pytest.approx(ENCODE_WORKING, rel=0.05)
    # New frames are encoded while the decoder's new cache waits, which is the wider of the two moments.
    assert decoding.peak < DECODER_CACHE + ENCODE_WORKING


def cache_of(cache) -> list[torch.Tensor]:
    return [entry for entry in cache["features"] if isinstance(entry, torch.Tensor)]


def test_the_rest_of_a_chunk_grows_with_the_pixels():
    small, large = count_cost(RELEASED, 480, 832), count_cost(RELEASED, 960, 1664)
    assert small.other.total / 1e12 == pytest.approx(724 + 271.0 - 261.8, rel=0.01)
    assert large.other.autoencoder == pytest.approx(4 * small.other.autoencoder)
    assert large.other.text_encoder == small.other.text_encoder


def test_guidance_takes_two_passes_a_step_and_shares_the_chunks_constants():
    cost = count_cost(RELEASED, 480, 832)
    plain, guided = (cost.denoise_flops(35, guided=value) for value in (False, True))
    assert guided - 2 * plain == -cost.flops.per_chunk
    assert cost.denoise_flops(4, guided=False) / 1e15 == pytest.approx(8.74, rel=0.01)
    assert guided / 1e15 == pytest.approx(152.9, rel=0.01)


@pytest.mark.parametrize(("height", "width"), [(481, 832), (480, 4), (0, 832)])
def test_a_size_that_is_no_multiple_of_the_stride_is_refused(height, width):
    with pytest.raises(UserError, match=f"{height}x{width}.*multiples of 8"):
        latent_size(height, width, 8)
