"""Times the compiled splat rasteriser on this CPU: CPU and wall seconds of a frame, for scenes of three sizes.

Run with `python benchmarks/rasterizer.py`; prints JSON. The splats lie at random on a wavy wall with a step in depth,
as large as lifting makes them from this image (one for 2x2 pixels), so that the larger scenes overlap as those of many
views do, and all of them are in view. Random order is the worst for memory; a lifted scene is in its frames' order.
"""

from __future__ import annotations

import json
import platform
import time
from dataclasses import dataclass

import torch
import tyro

from lyra.reconstruction.gaussians import BLOCK, FOOTPRINT_SIGMA, OPACITY, THINNESS
from lyra.reconstruction.rasterizer import NumbaRenderer
from lyra.types import GaussianScene

FOCAL = 600.0


@dataclass(frozen=True)
class Options:
    """What to time."""

    splats: tuple[int, ...] = (200_000, 1_000_000, 4_000_000)
    height: int = 480
    width: int = 832
    frames: int = 3
    """Frames timed for each scene, after one that is not; the fastest counts."""
    threads: int = 0
    """Threads; as many as torch takes if 0."""


def surface_splats(count: int, height: int, width: int) -> GaussianScene:
    """Discs near to facing the camera, at random pixels of a surface 3 to 7 units away."""
    generator = torch.Generator().manual_seed(0)
    u, v = torch.rand(count, generator=generator) * width, torch.rand(count, generator=generator) * height
    z = 4 + torch.sin(u / 60) * torch.cos(v / 45) + 2 * (u > width / 2)
    quats = 0.1 * torch.randn(count, 4, generator=generator)
    quats[:, 0] = 1
    return GaussianScene(
        means=torch.stack([(u - width / 2) / FOCAL * z, (v - height / 2) / FOCAL * z, z], dim=-1),
        quats=torch.nn.functional.normalize(quats, dim=-1),
        scales=(FOOTPRINT_SIGMA * BLOCK * z / FOCAL)[:, None] * torch.tensor([1, 1, THINNESS]),
        opacities=torch.full((count,), OPACITY),
        sh=3 * torch.rand(count, 1, 3, generator=generator) - 1.5,
    )


def time_frames(count: int, options: Options) -> dict[str, float]:
    """Seconds of one frame and of making the renderer."""
    height, width = options.height, options.width
    k = torch.tensor([[FOCAL, 0, (width - 1) / 2], [0, FOCAL, (height - 1) / 2], [0, 0, 1]])
    scene = surface_splats(count, height, width)
    started = time.perf_counter()
    renderer = NumbaRenderer(scene)
    prepared = time.perf_counter() - started
    cpu, wall = [], []
    for _ in range(options.frames + 1):
        cpu_start, wall_start = time.process_time(), time.perf_counter()
        view = renderer.render(torch.eye(4), k, height, width)
        cpu.append(time.process_time() - cpu_start)
        wall.append(time.perf_counter() - wall_start)
    return {
        "splats": count,
        "cpu_seconds": round(min(cpu[1:]), 3),
        "wall_seconds": round(min(wall[1:]), 3),
        "first_frame_wall_seconds": round(wall[0], 3),
        "prepare_wall_seconds": round(prepared, 4),
        "mean_alpha": round(float(view.alpha.mean()), 4),
    }


def main() -> None:
    """Print the report."""
    options = tyro.cli(Options)
    if options.threads:
        torch.set_num_threads(options.threads)
    report = {
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "height": options.height,
        "width": options.width,
        "scenes": [time_frames(count, options) for count in options.splats],
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
