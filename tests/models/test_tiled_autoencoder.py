"""Tiles cover the frame, agree with whole frames where they can, and carry on from piece to piece."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from lyra.models.streaming import (
    StreamingWanAutoencoder,
    cache_from_tensors,
    cache_tensors,
    copy_cache,
    decode_video,
    encode_video,
)
from lyra.models.tiled_autoencoder import TiledWanAutoencoder, edge_ramp, tiles
from tests.models.tiny_released import golden_autoencoder


@given(st.integers(1, 120), st.integers(1, 120))
def test_tiles_cover_every_cell_and_stay_inside(height, width):
    covered = torch.zeros(height, width)
    for tile in tiles(height, width):
        assert 0 <= tile.top < tile.bottom <= height and 0 <= tile.left < tile.right <= width
        covered[tile.top : tile.bottom, tile.left : tile.right] += 1
    assert covered.min() >= 1


def test_a_frame_of_one_tile_is_exact():
    vae = golden_autoencoder()
    frames = torch.rand(1, 3, 5, 64, 96) * 2 - 1
    whole, tiled = StreamingWanAutoencoder(vae), TiledWanAutoencoder(vae)
    latents = encode_video(whole, frames, {})
    assert torch.allclose(encode_video(tiled, frames, {}), latents, atol=1e-5)
    assert torch.allclose(decode_video(tiled, latents, {}), decode_video(whole, latents, {}), atol=1e-5)


def test_a_large_frame_is_near_whole_frames_and_goes_on_from_its_caches():
    vae = golden_autoencoder()
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 16, 3, 34, 16, generator=generator)
    whole, tiled = decode_video(StreamingWanAutoencoder(vae), latents, {}), TiledWanAutoencoder(vae)
    at_once = decode_video(tiled, latents, {})
    assert at_once.shape == whole.shape
    # The attention of this random network sees other neighbours in a tile; the rest of it does not.
    assert (at_once - whole).abs().mean() < 0.2 * whole.std()
    cache: dict = {}
    first = decode_video(tiled, latents[:, :, :2], cache)
    saved = cache_from_tensors(cache_tensors(copy_cache(cache)))
    second = decode_video(tiled, latents[:, :, 2:], saved)
    assert torch.allclose(torch.cat([first, second], dim=2), at_once, atol=1e-5)


def test_weights_of_a_tile_grow_inwards_and_never_vanish():
    ramp = edge_ramp(9, torch.device("cpu"))
    assert ramp.tolist() == [1, 2, 3, 4, 5, 4, 3, 2, 1]
