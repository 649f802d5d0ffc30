"""Tiny networks with the golden weights, in this project's classes."""

import recipe
import torch
from diffusers import AutoencoderKLWan

from lyra.models.checkpoint import from_released, from_released_name, load_strictly
from lyra.models.transformer import Lyra2Transformer3DModel
from lyra.models.wan_autoencoder import from_released_autoencoder, to_released_autoencoder_name


def golden_transformer(released_shapes: dict[str, tuple[int, ...]]) -> Lyra2Transformer3DModel:
    """The tiny transformer with the golden weights, loaded through the released names."""
    model = Lyra2Transformer3DModel(**recipe.TINY)
    released = {from_released_name(name): name for name in released_shapes}
    shapes = {released[name]: tuple(p.shape) for name, p in model.named_parameters()}
    weights = recipe.fill(shapes)
    load_strictly(model, from_released({f"net.{name}": tensor for name, tensor in weights.items()}))
    return model.eval()


def golden_autoencoder() -> torch.nn.Module:
    """The tiny Wan autoencoder with the golden weights."""
    vae = AutoencoderKLWan(
        base_dim=8, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=2, temperal_downsample=[False, True, True]
    ).eval()
    shapes = {to_released_autoencoder_name(name): tuple(p.shape) for name, p in vae.state_dict().items()}
    load_strictly(vae, from_released_autoencoder(recipe.fill_vae(shapes)))
    return vae
