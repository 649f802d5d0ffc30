"""A small checkpoint in the released layout, its licence accepted in a config folder of its own, and small frames."""

import json
import os

import pytest
import torch

from lyra import photo
from lyra.hub import find_model
from lyra.licences import NVIDIA_RESEARCH, accept
from lyra.pipeline import LyraPipeline
from tests.released_checkpoint import write_released


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory, released_shapes):
    """The `checkpoints` folder."""
    return write_released(tmp_path_factory.mktemp("repository"), list(released_shapes))


@pytest.fixture(scope="session")
def accepted_config(tmp_path_factory):
    """A config folder in which the research licence is accepted."""
    folder = tmp_path_factory.mktemp("config")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LYRA_CONFIG_DIR", str(folder))
        accept(NVIDIA_RESEARCH, "a test")
    return folder


@pytest.fixture
def accepted(accepted_config, monkeypatch):
    """The licence is accepted."""
    monkeypatch.setenv("LYRA_CONFIG_DIR", str(accepted_config))
    monkeypatch.delenv("LYRA_NO_GATED_MODELS", raising=False)


@pytest.fixture
def small_frames(monkeypatch):
    """Videos of 32x48, so that a chunk takes a second."""
    monkeypatch.setattr(photo, "MIN_SIDE", 16)
    monkeypatch.setattr(photo, "LANDSCAPE", {"480x832": (32, 48), "448x768": (32, 64)})


@pytest.fixture(scope="session")
def pipeline(checkpoints, accepted_config):
    """The small released model, loaded from the released files."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LYRA_CONFIG_DIR", str(accepted_config))
        assert find_model(str(checkpoints)).layout == "released"
        return LyraPipeline.from_pretrained(str(checkpoints))


@pytest.fixture
def clean_environment(tmp_path):
    """Environment of a subprocess in which no licence is accepted."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("LYRA_")}
    return kept | {"LYRA_CONFIG_DIR": str(tmp_path / "config"), "OMP_NUM_THREADS": str(torch.get_num_threads())}


def job_of(world) -> dict:
    """The record of a run."""
    return json.loads((world.folder / "run.json").read_text())
