"""Measures every splat format: seconds to write and read a million Gaussians, and bytes for each of them.

Run with `python benchmarks/formats.py` on an idle machine; prints a table. The scene is a photo lifted on a wavy
surface, so that positions and colours are as alike from one Gaussian to the next as those of a world are, which decides
what packing gains. Files go to a temporary folder; `--folder /dev/shm` leaves the disk out of the times.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from lyra.export.gltf import read_splat_glb, write_splat_glb  # noqa: E402
from lyra.export.ply import read_splat_ply, write_splat_ply  # noqa: E402
from lyra.export.splat import read_splat, write_splat  # noqa: E402
from lyra.export.spz import read_spz, write_spz  # noqa: E402
from lyra.export.usd import write_usd  # noqa: E402
from lyra.reconstruction.gaussians import LiftedFrame, lift  # noqa: E402
from lyra.types import GaussianScene  # noqa: E402

PHOTO = ROOT / "examples" / "photos" / "temple-court.jpg"


@dataclass(frozen=True)
class Format:
    """A format with its functions."""

    name: str
    write: Callable[[Path, GaussianScene], None]
    read: Callable[[Path], Any] | None
    """None where the project only writes."""


FORMATS = (
    Format("ply", write_splat_ply, read_splat_ply),
    Format("spz", write_spz, read_spz),
    Format("splat", write_splat, read_splat),
    Format("glb", write_splat_glb, read_splat_glb),
    Format("usdc", lambda path, scene: write_usd(path, scene, None, None), None),
)


@dataclass(frozen=True)
class Options:
    """What is measured, and where."""

    gaussians: int = 1_000_000
    """Size of the scene."""
    repeats: int = 5
    """The median of so many runs is shown, after one that does not count."""
    folder: Path | None = None
    """Where files are written; the system's temporary folder when left out."""


def photo_scene(count: int) -> GaussianScene:
    """`count` Gaussians, one for each 2x2 pixels of the photo at a fitting size."""
    photo = Image.open(PHOTO).convert("RGB")
    height = 2 * int(np.ceil((count * photo.height / photo.width) ** 0.5))
    width = 2 * int(np.ceil(2 * count / height))
    image = torch.from_numpy(np.array(photo.resize((width, height)))).movedim(-1, 0).float() / 127.5 - 1
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    depth = 4 + torch.sin(3 * x) * torch.cos(2 * y) + 0.02 * image.mean(0)
    intrinsics = torch.tensor([[0.6 * width, 0.0, width / 2], [0.0, 0.6 * width, height / 2], [0.0, 0.0, 1.0]])
    scene = lift([LiftedFrame(image, depth, torch.eye(4), intrinsics)], lambda done, of: None)
    return GaussianScene(
        scene.means[:count], *(f[:count] for f in (scene.quats, scene.scales, scene.opacities, scene.sh))
    )


def median_seconds(action: Callable[[], Any], repeats: int) -> str:
    """Wall and processor time of an action that has run once before; the latter tells more on a busy machine."""
    action()
    times = []
    for _ in range(repeats):
        wall, processor = time.perf_counter(), time.process_time()
        action()
        times.append((time.perf_counter() - wall, time.process_time() - processor))
    return "".join(f"{statistics.median(column):10.3f}" for column in zip(*times, strict=True))


def main() -> None:
    """Measure all formats and print a table."""
    options = tyro.cli(Options)
    scene = photo_scene(options.gaussians)
    print(f"{len(scene)} Gaussians, {torch.get_num_threads()} threads, median of {options.repeats}")
    print("format   write wall, processor s    read wall, processor s    bytes for each")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for kind in FORMATS:
            path, write, read = Path(folder) / f"scene.{kind.name}", kind.write, kind.read
            writing = median_seconds(lambda path=path, write=write: write(path, scene), options.repeats)
            reading = "-" if read is None else median_seconds(lambda path=path, read=read: read(path), options.repeats)
            print(f"{kind.name:8} {writing:>24} {reading:>25} {path.stat().st_size / len(scene):17.2f}")


if __name__ == "__main__":
    main()
