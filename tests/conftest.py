"""Paths and golden tensors that many tests use."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

GOLDEN = Path(__file__).parent / "golden"
sys.path.insert(0, str(GOLDEN))
ROOT = Path(__file__).parent.parent


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
