"""Measures the default job as a user runs it: seconds, memory, quality of what the photo shows, and lifting.

Run with `python benchmarks/default_job.py [PHOTO ...]` on an idle machine; writes benchmarks/default_job.json and
prints a table. Every figure in the README's table comes from here.
"""

from __future__ import annotations

import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from lyra.device import usable_cores
from lyra.export.ply import read_splat_ply
from lyra.generation.walkthrough import from_uint8
from lyra.metrics.image import kept_detail, psnr_db
from lyra.world import World

ROOT = Path(__file__).resolve().parent.parent
DEFAULT_PHOTOS = ("great-wall.jpg", "temple-court.jpg")


@dataclass(frozen=True)
class Measurement:
    """One photo's figures."""

    photo: str
    generate_seconds: float
    """From starting the process to the finished video, loading included."""
    peak_memory_gib: float
    reconstruct_seconds: float
    splats: int
    first_frame_psnr_db: float
    kept_laplacian_share: float
    """Laplacian energy of the photo's region in the last frame, against an exact warp of the photo."""
    stage_seconds: dict[str, float]


def command_seconds(*arguments: str) -> float:
    """Wall time of a command line of this project."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "lyra", *arguments], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def measure(photo: Path, folder: Path) -> Measurement:
    """Run the default job and lift it, each in a process of its own."""
    generate = command_seconds("generate", str(photo), "--out", str(folder))
    lifting = command_seconds("reconstruct", str(folder))
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    world = World.open(folder)
    photo_seen, video = from_uint8(photo_pixels(world)), from_uint8(world.video[[0, -1]])
    return Measurement(
        photo=photo.name,
        generate_seconds=round(generate, 1),
        peak_memory_gib=round(peak, 2),
        reconstruct_seconds=round(lifting, 1),
        splats=len(read_splat_ply(world.scene_path)),
        first_frame_psnr_db=round(psnr_db(video[0], photo_seen, 2.0), 1),
        kept_laplacian_share=round(kept_detail(photo_seen, video[1], world.depth[0], world.cameras), 2),
        stage_seconds=world.run["stage_seconds"],
    )


def photo_pixels(world: World) -> torch.Tensor:
    """The photo as it was given to the model."""
    import numpy as np
    from PIL import Image

    return torch.from_numpy(np.asarray(Image.open(world.photo_path).convert("RGB"))).movedim(-1, 0)


def import_seconds() -> float:
    """Wall time of `import lyra` in a fresh interpreter."""
    code = "import time; t = time.perf_counter(); import lyra; print(time.perf_counter() - t)"
    return float(subprocess.check_output([sys.executable, "-c", code], cwd=ROOT))


def main() -> None:
    """Measure the given photos, or two of the examples."""
    photos = [Path(p).resolve() for p in sys.argv[1:]] or [ROOT / "examples" / "photos" / n for n in DEFAULT_PHOTOS]
    with tempfile.TemporaryDirectory() as folder:
        results = [measure(photo, Path(folder) / photo.stem) for photo in photos]
    report = {
        "machine": f"{usable_cores()} cores, {platform.machine()}",
        "torch": torch.__version__,
        "import_seconds": round(import_seconds(), 3),
        "results": [asdict(result) for result in results],
    }
    text = json.dumps(report, indent=2)
    (ROOT / "benchmarks" / "default_job.json").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
