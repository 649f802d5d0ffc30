"""Public Depth Anything 3 checkpoints, key for key as published, as the depth of any model."""

import json
import logging
import os
import pickle

import pytest
import torch
from recipe import fill_depth_anything
from safetensors.torch import load_file, save_file

from lyra.depth.base import SKY_DEPTH
from lyra.errors import UserError
from lyra.hub import find_depth, find_model
from lyra.licences import APACHE_2, CC_BY_NC_4, NVIDIA_RESEARCH
from lyra.loading import load_components, load_depth
from lyra.placement import Placement
from lyra.types import Cameras
from tests.conftest import GOLDEN

CPU = Placement("fp32", device="cpu")
HEIGHT, WIDTH = 32, 112  # Flat, so that the network sees 360 patches at its 504 pixels and not 756.


@pytest.fixture(scope="session")
def all_names():
    """Names and shapes of DA3-SMALL's 437 tensors, and of the Gaussian head that it could have.

    The norm that four levels share is there once, because safetensors keeps shared tensors under one name.
    """
    return {n: tuple(s) for n, s in json.loads((GOLDEN / "depth_anything_keys.json").read_text()).items()}


@pytest.fixture(scope="session")
def published_config():
    """The config.json as published."""

    def part(module: str, class_name: str, **values):
        return {
            "__object__": {"path": f"depth_anything_3.model.{module}", "name": class_name, "args": "as_params"}
        } | values

    starts = {"alt_start": 4, "qknorm_start": 4, "rope_start": 4}
    return {
        "model_name": "da3-small",
        "config": part(
            "da3",
            "DepthAnything3Net",
            net=part("dinov2.dinov2", "DinoV2", name="vits", out_layers=[5, 7, 9, 11], **starts, cat_token=True),
            head=part("dualdpt", "DualDPT", dim_in=768, output_dim=2, features=64, out_channels=[48, 96, 192, 384]),
            cam_enc=part("cam_enc", "CameraEnc", dim_out=384),
            cam_dec=part("cam_dec", "CameraDec", dim_in=768),
        ),
    }


@pytest.fixture(scope="session")
def published(tmp_path_factory, all_names, published_config):
    """A folder as published, with random weights."""
    folder = tmp_path_factory.mktemp("DA3-SMALL")
    weights = fill_depth_anything({name: shape for name, shape in all_names.items() if not name.startswith("gs_head.")})
    # Random weights give any field of view; these give about 35 by 57 degrees.
    weights["cam_dec.fc_fov.0.weight"] *= 0.01
    weights["cam_dec.fc_fov.0.bias"] = torch.tensor([0.6, 1.0])
    assert len(weights) == 437
    save_file({f"model.{name}": tensor for name, tensor in weights.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(published_config))
    return folder


@pytest.fixture
def changed(published, tmp_path):
    """Writes a copy of the folder with other tensors or another config.json."""

    def write(weights=None, config=None):
        for path in published.iterdir():
            (tmp_path / path.name).unlink(missing_ok=True)
            (tmp_path / path.name).symlink_to(path)
        if weights is not None:
            (tmp_path / "model.safetensors").unlink()
            save_file(weights, tmp_path / "model.safetensors")
        if config is not None:
            (tmp_path / "config.json").unlink()
            (tmp_path / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
        return tmp_path

    return write


@pytest.fixture(scope="session")
def tiny_with_public_depth(published):
    """The default model with that depth network."""
    return load_components(find_model("lyra-tiny"), CPU, depth=str(published))


def picture(seed: int = 0, count: int = 1, size=(HEIGHT, WIDTH)):
    coarse = torch.rand(count, 3, 4, 6, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return torch.nn.functional.interpolate(coarse, size, mode="bilinear")


def path(count: int) -> Cameras:
    w2c = torch.eye(4).repeat(count, 1, 1)
    w2c[:, 2, 3] = -0.2 * torch.arange(count)
    w2c[:, 0, 3] = 0.05 * torch.arange(count) ** 2
    intrinsics = torch.tensor([[100.0, 0.0, WIDTH / 2], [0.0, 100.0, HEIGHT / 2], [0.0, 0.0, 1.0]])
    return Cameras(w2c, intrinsics.repeat(count, 1, 1), HEIGHT, WIDTH)


def refusal(folder) -> str:
    with pytest.raises(UserError) as caught:
        load_depth(str(folder), CPU)
    text = str(caught.value)
    assert "\n" not in text and text.endswith(".")
    return text


def test_the_published_file_is_loaded_whole_and_unneeded_heads_are_named(published, caplog):
    with caplog.at_level(logging.INFO, logger="lyra.models.depth_anything_folder"):
        depth = load_depth(str(published), CPU)
    rays = sum("_aux" in name for name in load_file(published / "model.safetensors"))
    assert f"rays ({rays} tensors)" in caplog.text and "Gaussians" not in caplog.text
    assert depth.source.layout == "depth-anything" and depth.source.licences == {"depth": APACHE_2}
    assert depth.knows_cameras
    large = picture(size=(600, 1400))
    prediction = depth.photo.predict(large)
    assert prediction.depth.shape == (1, 600, 1400) and prediction.depth.isfinite().all()
    assert (prediction.depth > 0).all() and 40 < float(prediction.fov_x_deg[0]) < 75
    measured = depth.walk.measure(picture(1, 2), path(2), torch.full((2, HEIGHT, WIDTH), torch.inf))
    assert measured.shape == (2, HEIGHT, WIDTH) and measured.isfinite().all()


def test_missing_misshapen_and_unexpected_tensors_are_refused(published, changed, all_names):
    weights = load_file(published / "model.safetensors")
    short = {name: tensor for name, tensor in weights.items() if name != "model.cam_enc.token_norm.bias"}
    assert "missing cam_enc.token_norm.bias" in refusal(changed(short))
    bent = weights | {"model.head.norm.weight": torch.ones(3)}
    assert "head.norm.weight is [3], not [768]" in refusal(changed(bent))
    head = {f"model.{name}": torch.zeros(shape) for name, shape in all_names.items() if name.startswith("gs_head.")}
    assert "unexpected gs_head." in refusal(changed(weights | head))
    doubled = weights | {"head.norm.weight": torch.ones(768)}
    assert "with and without the prefix" in refusal(changed(doubled))


class Hostile:
    """Runs a command when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def test_a_hostile_or_damaged_file_is_refused_and_does_not_run(published, changed, tmp_path):
    folder, marker = changed(), tmp_path / "it-ran"
    (folder / "model.safetensors").unlink()
    for content in (pickle.dumps(Hostile(marker)), b"", (published / "model.safetensors").read_bytes()[:10_000]):
        (folder / "model.safetensors").write_bytes(content)
        assert "cannot be read as safetensors" in refusal(folder)
    torch.save({"model": Hostile(marker)}, folder / "model.safetensors")
    assert "cannot be read as safetensors" in refusal(folder)
    (folder / "model.safetensors").unlink()
    assert "model.safetensors missing" in refusal(folder)
    assert not marker.exists()


def test_a_config_that_names_no_or_another_network_is_refused(changed, published_config):
    assert "names no published Depth Anything 3" in refusal(changed(config="{"))
    assert "names no published Depth Anything 3" in refusal(changed(config=[1, 2]))
    assert "names no published Depth Anything 3" in refusal(changed(config={"config": {}}))
    assert "'da3-tiny', which is none of: da3-base" in refusal(changed(config={"model_name": "da3-tiny"}))
    assert "weights do not fit" in refusal(changed(config={"model_name": "da3-base"}))
    net = published_config["config"]["net"] | {"out_layers": [2, 5, 8, 11]}
    other = published_config | {"config": published_config["config"] | {"net": net}}
    assert "layers are of another network" in refusal(changed(config=other))


def test_a_folder_that_names_a_gated_network_is_gated(changed, monkeypatch, tmp_path):
    monkeypatch.setenv("LYRA_CONFIG_DIR", str(tmp_path / "config"))
    assert CC_BY_NC_4.name in refusal(changed(config={"model_name": "da3-giant"}))


def test_the_default_model_keeps_its_tokens_its_sky_and_its_unit(tiny_with_public_depth, published):
    model, plain = tiny_with_public_depth, load_components(find_model("lyra-tiny"), CPU)
    image = picture(2)
    assert model.depth_source is not None and model.depth_source.licences == {"depth": APACHE_2}
    assert plain.depth_source is None
    assert torch.equal(model.parts.encode_image(image), plain.parts.encode_image(image))
    ours, tiny = model.depth.predict(image), plain.depth.predict(image)
    other = load_depth(str(published), CPU).photo.predict(image)
    assert torch.equal(ours.sky, tiny.sky) and (ours.depth[ours.sky] == SKY_DEPTH).all()
    ground = ~ours.sky
    assert int(ground.sum()) > 100 and ours.depth.isfinite().all()
    ratio = (ours.depth / other.depth)[ground]
    torch.testing.assert_close(ratio, ratio.median().expand_as(ratio))
    assert float((tiny.depth / ours.depth)[ground].median()) == pytest.approx(1, rel=1e-4)
    assert torch.equal(ours.fov_x_deg, other.fov_x_deg)


def test_the_default_models_new_frames_continue_what_memory_shows(tiny_with_public_depth):
    images, cameras = picture(3, 2), path(2)
    seen = torch.full((2, HEIGHT, WIDTH), torch.inf)
    seen[:, :, :40] = 4.0
    depth = tiny_with_public_depth.parts.depth.measure(images, cameras, seen)
    assert (depth[:, :, :40] == 4.0).all() and depth.isfinite().all() and (depth > 0).all()
    nearby = depth[:, :, 40:44]
    assert float(nearby[nearby < SKY_DEPTH].median()) == pytest.approx(4.0, rel=0.5)


@pytest.mark.usefixtures("accepted")
def test_the_released_model_takes_it_and_needs_no_depth_network_of_its_own(checkpoints, published, tmp_path):
    for item in checkpoints.iterdir():
        if item.name != "recon":
            (tmp_path / item.name).symlink_to(item)
    source = find_model(str(tmp_path))
    with pytest.raises(UserError, match=r"recon.model\.pt"):
        load_components(source, CPU)
    model = load_components(source, CPU, depth=str(published))
    alone = load_depth(str(published), CPU)
    image = picture(4)
    torch.testing.assert_close(model.depth.predict(image).depth, alone.photo.predict(image).depth)
    assert model.parts.encode_image(image).shape == (1, 257, 32)
    measured = model.parts.depth.measure(picture(5, 2), path(2), torch.full((2, HEIGHT, WIDTH), torch.inf))
    assert measured.isfinite().all()


@pytest.mark.usefixtures("accepted")
def test_the_depth_network_of_a_whole_model_serves_another_one(checkpoints, tmp_path, monkeypatch):
    (tmp_path / "only").mkdir()
    for name in ("recon", "sizes.json"):
        (tmp_path / "only" / name).symlink_to(checkpoints / name)
    source = find_depth(str(tmp_path / "only"))
    assert source.layout == "released" and source.licences == {"depth": NVIDIA_RESEARCH}
    model = load_components(find_model("lyra-tiny"), CPU, depth=str(tmp_path / "only"))
    assert model.depth.predict(picture(6)).depth.isfinite().all()
    monkeypatch.setenv("LYRA_CONFIG_DIR", str(tmp_path / "config"))
    assert NVIDIA_RESEARCH.name in refusal(tmp_path / "only")
