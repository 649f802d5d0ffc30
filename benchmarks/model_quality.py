"""Measures lyra-tiny's parts on worlds that it was not trained on: depth, autoencoder, holes and their steadiness.

Run with `python benchmarks/model_quality.py`; writes benchmarks/model_quality.json. The model card quotes it.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from lyra.config import GenerateJob
from lyra.depth.tiny import TinyDepthModel
from lyra.generation.state import WalkState
from lyra.generation.walkthrough import Components, denoise
from lyra.memory.spatial_cache import SpatialCache
from lyra.models.streaming import decode_video, encode_video
from lyra.pipeline import LyraPipeline
from lyra.progress import Progress
from lyra.training.data import HELD_OUT_SEEDS, Walk, to_model_range
from lyra.training.samples import make_sample
from lyra.training.worlds import FAMILIES, HELD_OUT_FAMILIES, build_world
from lyra.types import Cameras

ROOT = Path(__file__).resolve().parent.parent
HEIGHT, WIDTH = 128, 224
VIEWS = 170
WALKS = 6


@dataclass(frozen=True)
class Quality:
    """Figures on held-out worlds."""

    depth_delta1: float
    """Share of pixels within 25 % of the true depth after scaling by the median."""
    depth_delta1_position_prior: float
    """The same for the mean log-depth map of other views."""
    depth_abs_rel: float
    autoencoder_psnr_db: float
    hole_psnr_db_4_steps: float
    """Inside what the warp does not show, against the true frames; mean over walks."""
    hole_psnr_db_push_pull: float
    """The same for smooth filling, through the same autoencoder."""
    hole_flicker_4_steps: float
    """Mean absolute change from frame to frame inside holes, over that of the true frames."""


def held_out_views(count: int) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Images, depth and sky of unseen worlds, all families in turn, other textures."""
    views = []
    for number in range(count):
        rng = np.random.default_rng(HELD_OUT_SEEDS + number)
        world = build_world(FAMILIES[number % len(FAMILIES)], HELD_OUT_SEEDS + number, texture_seed=1)
        k = world.random_intrinsics(rng, HEIGHT, WIDTH)
        view = world.render(world.random_view(rng), k, HEIGHT, WIDTH)
        views.append(
            (to_model_range(torch.from_numpy(view.rgb)), torch.from_numpy(view.depth), torch.from_numpy(view.sky))
        )
    return views


def delta1(predicted: torch.Tensor, true: torch.Tensor, ground: torch.Tensor) -> tuple[float, float]:
    """Share within 25 % and mean relative error, after scaling by the median ratio."""
    p, t = predicted[ground], true[ground].clamp(0.15, 200)
    p = p * (t / p).median()
    ratio = torch.maximum(p / t, t / p)
    return (ratio < 1.25).float().mean().item(), ((p - t).abs() / t).mean().item()


def depth_quality(model: TinyDepthModel) -> tuple[float, float, float]:
    """delta1 of the network, of the position prior, and the network's relative error."""
    views = [v for v in held_out_views(VIEWS) if (~v[2]).float().mean() > 0.2]
    half = len(views) // 2
    log_depth = torch.stack([torch.where(s, torch.nan, d.clamp(0.15, 200).log()) for _, d, s in views])
    centred = log_depth - log_depth.flatten(1).nanmedian(1).values[:, None, None]
    ours, prior, relative = [], [], []
    for index, (image, depth, sky) in enumerate(views):
        others = centred[half:] if index < half else centred[:half]
        mean_map = others.nanmean(0).nan_to_num(0.0).exp()
        a, r = delta1(model.predict(image[None]).depth[0], depth, ~sky)
        ours.append(a)
        relative.append(r)
        prior.append(delta1(mean_map, depth, ~sky)[0])
    return float(np.mean(ours)), float(np.mean(prior)), float(np.mean(relative))


def held_out_walk(number: int) -> Walk:
    """A rendered walk of an unseen world."""
    family = [f for f in FAMILIES if f not in HELD_OUT_FAMILIES][number * 5 % (len(FAMILIES) - 1)]
    seed = HELD_OUT_SEEDS + 5000 + number
    rng = np.random.default_rng(seed)
    world = build_world(family, seed, texture_seed=1)
    k, poses = world.random_intrinsics(rng, HEIGHT, WIDTH), world.random_walk(rng, 81)
    views = [world.render(pose, k, HEIGHT, WIDTH) for pose in poses]
    return Walk(
        rgb=torch.from_numpy(np.stack([v.rgb for v in views])),
        depth=torch.from_numpy(np.stack([v.depth for v in views])).float(),
        w2c=torch.from_numpy(np.asarray(poses, np.float32)),
        intrinsics=torch.from_numpy(np.asarray(k, np.float32)),
        caption=world.caption(),
        family=family,
    )


@torch.no_grad()
def video_quality(parts: Components, depth: TinyDepthModel) -> tuple[float, float, float, float]:
    """Autoencoder PSNR, hole PSNR of 4 steps and of push-pull, and flicker inside holes."""
    coded, ours, filled, flicker = [], [], [], []
    for number in range(WALKS):
        walk = held_out_walk(number)
        frames = to_model_range(walk.rgb)
        clip = frames.transpose(0, 1)[None]
        again = decode_video(parts.autoencoder, encode_video(parts.autoencoder, clip, {}), {})
        coded.append(10 * np.log10(4 / (again - clip).pow(2).mean().item()))
        sample = make_sample(parts, depth, walk, np.random.default_rng(number))
        first = parts.layout.targets.start
        state = WalkState(
            cameras=Cameras(walk.w2c, walk.intrinsics.expand(81, 3, 3), HEIGHT, WIDTH),
            history=sample.inputs.history,
            encoder_cache={},
            decoder_cache={},
            memory=SpatialCache(),
            images={0: frames[0]},
            pixels={},
            buffer_depth=walk.depth[0],
            memory_stride=8,
        )
        job = GenerateJob(photo="", sampler="dmd")
        # The sample may be mirrored or reversed, so its own image tokens are used.
        told = replace(parts, encode_image=lambda image, tokens=sample.image: tokens)
        latents = denoise(told, state, sample.inputs, job, walk.caption, 0, Progress())
        history = sample.inputs.history[:, :, -4:]
        decoded = {}
        for name, z in (
            ("ours", latents),
            ("fill", sample.inputs.conditioning[:, :, first:]),
            ("true", sample.targets),
        ):
            decoded[name] = decode_video(parts.autoencoder, torch.cat([history, z], 2), {})[0, :, -80:]
        cells = sample.inputs.mask[0, :, first:].transpose(0, 1).flatten(0, 1)
        hole = F.interpolate(cells[None], (HEIGHT, WIDTH), mode="nearest")[0] < 0.25
        if hole.float().mean() < 0.01:
            continue
        where = hole[None].expand(3, -1, -1, -1)
        for name, results in (("ours", ours), ("fill", filled)):
            error = (decoded[name] - decoded["true"])[where].pow(2).mean().item()
            results.append(10 * np.log10(4 / error))
        both = (hole[1:] & hole[:-1])[None].expand(3, -1, -1, -1)
        change = {name: decoded[name].diff(dim=1).abs()[both].mean().item() for name in ("ours", "true")}
        flicker.append(change["ours"] / change["true"])
    return tuple(float(np.mean(values)) for values in (coded, ours, filled, flicker))  # type: ignore[return-value]


def main() -> None:
    """Measure and write the figures."""
    pipeline = LyraPipeline.from_pretrained("lyra-tiny", device="cpu")
    parts, depth = pipeline.parts, pipeline.depth
    share, prior, relative = depth_quality(depth)
    coded, ours, filled, flicker = video_quality(parts, depth)
    quality = Quality(
        depth_delta1=round(share, 3),
        depth_delta1_position_prior=round(prior, 3),
        depth_abs_rel=round(relative, 3),
        autoencoder_psnr_db=round(coded, 2),
        hole_psnr_db_4_steps=round(ours, 2),
        hole_psnr_db_push_pull=round(filled, 2),
        hole_flicker_4_steps=round(flicker, 2),
    )
    text = json.dumps(asdict(quality), indent=2)
    (ROOT / "benchmarks" / "model_quality.json").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
