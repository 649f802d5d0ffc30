"""Paths and golden tensors that many tests use."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

GOLDEN = Path(__file__).parent / "golden"
sys.path.insert(0, str(GOLDEN))
ROOT = Path(__file__).parent.parent
DEFAULT_PHOTO = ROOT / "examples" / "photos" / "temple-court.jpg"


@pytest.fixture(scope="session")
def conditioning() -> dict[str, torch.Tensor]:
    """Outputs of the released warps, memory, presets and time grids."""
    return load_file(GOLDEN / "conditioning.safetensors")


@pytest.fixture(scope="session")
def released_shapes() -> dict[str, tuple[int, ...]]:
    """Name and shape of the 1,435 parameters of the released transformer."""
    keys = json.loads((GOLDEN / "checkpoint_keys.json").read_text())
    return {name: tuple(shape) for name, (shape, _) in keys.items() if not name.startswith("accum_")}


@pytest.fixture(scope="session")
def photos() -> list[Path]:
    """The example photos."""
    return sorted((ROOT / "examples" / "photos").glob("*.jpg"))


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """The default job, run once by the command line."""
    from lyra.world import World

    folder = tmp_path_factory.mktemp("worlds") / "temple"
    command = [
        sys.executable,
        "-m",
        "lyra",
        "generate",
        str(DEFAULT_PHOTO),
        "--preset",
        "push-in",
        "--out",
        str(folder),
    ]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
    assert result.returncode == 0, result.stderr
    return World.open(folder)
