"""Where depth networks come from: public names, folders and models, on the server of the downloads' own tests."""

import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub import constants

from lyra import licences
from lyra.hub import DEFAULT_MODEL, RELEASED_MODEL, downloaded, find_depth, find_model
from lyra.licences import APACHE_2, CC_BY_NC_4, NVIDIA_RESEARCH
from tests import test_hub
from tests.test_hub import COMMIT, READ, lyra_json, refusal, write

fake_hub = test_hub.fake_hub
PUBLIC = {"config.json": b'{"model_name": "da3-small"}', "model.safetensors": b"depth" * 1000, "README.md": b"card"}


@pytest.mark.parametrize("name", ["da3-small", "DA3-SMALL", "depth-anything/DA3-Small"])
def test_a_public_depth_network_is_downloaded_by_any_of_its_names_and_only_once(fake_hub, name):
    fake_hub.repositories["depth-anything/DA3-SMALL"] = PUBLIC
    source = find_depth(name)
    assert sorted(fake_hub.files_sent()) == ["config.json", "model.safetensors"]
    assert (source.layout, source.licences, source.revision) == ("depth-anything", {"depth": APACHE_2}, COMMIT)
    assert (source.folder / "model.safetensors").read_bytes() == PUBLIC["model.safetensors"]
    asked = len(fake_hub.requests)
    assert find_depth("da3-small", download=False).folder == source.folder
    assert find_depth(f"da3-small@{COMMIT}", download=False).folder == source.folder
    assert len(fake_hub.requests) == asked
    for tree in Path(constants.HF_HUB_CACHE).rglob("trees"):
        shutil.rmtree(tree)  # Other programs leave no list of files.
    assert find_depth("da3-small", download=False).folder == source.folder


def test_a_depth_network_that_is_not_there_is_one_sentence(fake_hub, tmp_path, monkeypatch):
    assert "not on this machine" in refusal("da3-base", find_depth, download=False)
    assert "choose da3-small, da3-base" in refusal("da3-huge", find_depth)
    assert "choose da3-small, da3-base" in refusal("da3-small@main", find_depth)
    assert "config.json and model.safetensors missing" in refusal(str(tmp_path), find_depth)
    write(tmp_path, {"config.json": b'{"model_name": "da3-small"}'})
    assert "(model.safetensors missing)" in refusal(str(tmp_path), find_depth)
    assert fake_hub.requests == []
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    assert "check the network" in refusal("da3-base", find_depth)


def test_large_public_depth_networks_are_gated_wherever_they_are(fake_hub, tmp_path):
    folder = write(tmp_path / "copy", PUBLIC | {"config.json": b'{"model_name": "da3-giant"}'})
    for name in ("da3-giant-1.1", "depth-anything/DA3NESTED-GIANT-LARGE", str(folder)):
        assert CC_BY_NC_4.name in refusal(name, find_depth)
    assert fake_hub.requests == []
    licences.accept(CC_BY_NC_4, "test")
    assert find_depth(str(folder)).licences == {"depth": CC_BY_NC_4}


def test_of_the_released_repository_only_the_reconstruction_network_is_downloaded(fake_hub):
    assert NVIDIA_RESEARCH.name in refusal(RELEASED_MODEL, find_depth) and fake_hub.requests == []
    licences.accept(NVIDIA_RESEARCH, "test")
    source = find_depth(RELEASED_MODEL)
    assert fake_hub.files_sent() == ["checkpoints/recon/model.pt"]
    assert source.layout == "released" and source.licences == {"depth": NVIDIA_RESEARCH}
    assert (source.folder / "recon" / "model.pt").read_bytes() == READ["checkpoints/recon/model.pt"]
    assert downloaded(RELEASED_MODEL) is None
    whole = find_model(RELEASED_MODEL)
    assert (
        find_depth(RELEASED_MODEL).folder == whole.folder
        and fake_hub.files_sent().count("checkpoints/recon/model.pt") == 1
    )


def test_the_depth_network_of_a_model_has_one_licence(fake_hub, tmp_path):
    assert find_depth(DEFAULT_MODEL).licences == {"depth": APACHE_2}
    parts = json.dumps(json.loads(lyra_json("several")) | {"part_licences": {"reconstruction": "nvidia-research"}})
    folder = write(tmp_path / "converted", {"lyra.json": parts.encode()})
    assert NVIDIA_RESEARCH.name in refusal(str(folder), find_depth)
    licences.accept(NVIDIA_RESEARCH, "test")
    source = find_depth(str(folder))
    assert source.layout == "lyra" and source.licences == {"depth": NVIDIA_RESEARCH}
