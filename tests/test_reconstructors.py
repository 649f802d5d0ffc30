"""Which reconstructor a job gets, and that nothing but the depth network of a model is read for it."""

import json
import logging
from dataclasses import asdict, replace

import pytest
import torch
from recipe import fill_depth_anything, views

from lyra.config import LoadOptions, ReconstructJob
from lyra.errors import UserError
from lyra.generation.walkthrough import from_uint8
from lyra.hub import MODELS, find_depth
from lyra.licences import CC_BY_NC_4, NVIDIA_RESEARCH, accept
from lyra.models.depth_anything.model import build, load_depth_anything
from lyra.models.depth_anything_folder import save_depth_folder
from lyra.placement import Placement
from lyra.progress import Cancelled, Progress
from lyra.reconstruction.base import Walkthrough
from lyra.reconstruction.gaussians import GeometricLift, lift, lifted_frames
from lyra.reconstruction.tiny_gaussians import TinyGaussianReconstructor
from lyra.reconstructors import has_gaussian_head, lifting_placement, load_reconstructor, reconstructor_for, resolve
from lyra.types import Cameras
from lyra.world import World
from tests.released_checkpoint import DEPTH, write_reconstruction

CPU = Placement("fp32", device="cpu")
HEIGHT, WIDTH = 56, 84


def nothing(done: int, of: int) -> None:
    """Ignore progress."""


@pytest.fixture(autouse=True)
def accepted(tmp_path_factory, monkeypatch):
    """A config folder in which the research licence is accepted."""
    monkeypatch.setenv("LYRA_CONFIG_DIR", str(tmp_path_factory.mktemp("config")))
    monkeypatch.delenv("LYRA_NO_GATED_MODELS", raising=False)
    accept(NVIDIA_RESEARCH, "a test")


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A released folder with nothing but the reconstruction network."""
    folder = tmp_path_factory.mktemp("released")
    write_reconstruction(folder / "recon" / "model.pt")
    (folder / "sizes.json").write_text(json.dumps({"reconstruction": asdict(DEPTH)}))
    return folder


@pytest.fixture
def converted(tmp_path):
    """A converted folder with nothing but the depth network and lyra.json."""
    with torch.device("meta"):
        shapes = {name: tuple(t.shape) for name, t in build(DEPTH).state_dict().items()}
    save_depth_folder(load_depth_anything(DEPTH, fill_depth_anything(shapes)), DEPTH, tmp_path / "converted" / "depth")
    settings = json.loads((MODELS / "lyra-tiny" / "lyra.json").read_text())
    settings |= {"part_licences": {"reconstruction": "nvidia-research"}}
    (tmp_path / "converted" / "lyra.json").write_text(json.dumps(settings))
    return tmp_path / "converted"


@pytest.fixture
def walkthrough():
    """Twelve smooth frames on an arc, with depth of every second one."""
    images, w2c, intrinsics = views(12, HEIGHT, WIDTH, 0)
    frames = ((images[0] * 0.25 + 0.5).clamp(0, 1) * 255).to(torch.uint8)
    depths = {i: torch.full((HEIGHT // 2, WIDTH // 2), 4.0) for i in range(0, 12, 2)} | {11: torch.full((28, 42), 4.0)}
    return Walkthrough(frames, Cameras(w2c[0], intrinsics[0], HEIGHT, WIDTH), depths)


def world_of(tmp_path, model) -> World:
    """A world folder whose record names a model."""
    world = World(tmp_path / "world")
    world.write_run({"job": {"model": str(model)}, "model": {"name": "whatever the weights are called"}})
    return world


def sentence(error) -> str:
    text = str(error.value)
    assert "\n" not in text and text.endswith(".")
    return text


def test_the_geometric_way_lifts_the_photo_every_nth_measured_frame_and_the_last(walkthrough):
    steps = []
    result = load_reconstructor("geometric", None, CPU, interval=4).reconstruct(
        walkthrough, lambda done, of: steps.append((done, of))
    )
    assert result.frame_ids == (0, 4, 8, 11) and steps == [(i + 1, 4) for i in range(4)]
    assert torch.equal(result.cameras.w2c, walkthrough.cameras.w2c[[0, 4, 8, 11]])
    images = {i: from_uint8(walkthrough.frames[i]) for i in result.frame_ids}
    expected = lift(
        lifted_frames(images, {i: walkthrough.depths[i] for i in result.frame_ids}, walkthrough.cameras), nothing
    )
    assert len(result.scene) == len(expected) > 1000 and torch.equal(result.scene.means, expected.means)
    assert load_reconstructor("geometric", None, CPU).reconstruct(walkthrough, nothing).frame_ids == (0, 8, 11)


def test_the_geometric_way_says_what_it_lacks(walkthrough):
    for broken, said in (
        (replace(walkthrough, cameras=None), "cameras"),
        (replace(walkthrough, depths={4: walkthrough.depths[4]}), "first frame"),
    ):
        with pytest.raises(UserError, match=said) as error:
            GeometricLift().reconstruct(broken, nothing)
        sentence(error)
    with pytest.raises(UserError, match="1 or more"):
        GeometricLift(0)


@pytest.mark.parametrize("layout", ["released", "converted"])
def test_depth_anything_lifts_with_the_depth_network_alone(layout, request, walkthrough):
    source = find_depth(str(request.getfixturevalue(layout)))
    assert has_gaussian_head(source)
    progress = Progress()
    reconstructor = load_reconstructor("depth-anything", source, CPU, progress)
    assert progress.stage == "Load reconstruction network"
    result = reconstructor.reconstruct(walkthrough, nothing)
    assert len(result.scene) > 1000 and result.scene.means.isfinite().all()
    assert result.frame_ids == tuple(range(12)) and result.cameras.image_height == HEIGHT


def test_networks_without_a_gaussian_head_are_refused_before_their_weights_are_read(tmp_path):
    (tmp_path / "config.json").write_text('{"model_name": "da3-small"}')
    (tmp_path / "model.safetensors").write_bytes(b"never read")
    for name in (str(tmp_path), "lyra-tiny"):
        source = find_depth(name)
        with pytest.raises(UserError, match="no Depth Anything Gaussian head") as error:
            load_reconstructor("depth-anything", source, CPU)
        assert name in sentence(error)
    with pytest.raises(UserError, match="needs its weights") as error:
        load_reconstructor("depth-anything", None, CPU)
    sentence(error)
    with pytest.raises(UserError, match="choose geometric, lyra-tiny or depth-anything"):
        load_reconstructor("poisson", None, CPU)


def test_damaged_weights_are_one_sentence(released, tmp_path):
    (tmp_path / "recon").mkdir()
    (tmp_path / "recon" / "model.pt").write_bytes((released / "recon" / "model.pt").read_bytes()[:5000])
    (tmp_path / "sizes.json").symlink_to(released / "sizes.json")
    with pytest.raises(UserError) as error:
        load_reconstructor("depth-anything", find_depth(str(tmp_path)), CPU)
    sentence(error)
    torch.save({"module": {"model.da3.strange": torch.zeros(1)}}, tmp_path / "recon" / "model.pt")
    with pytest.raises(UserError, match="do not fit the model") as error:
        load_reconstructor("depth-anything", find_depth(str(tmp_path)), CPU)
    sentence(error)


def test_a_world_is_lifted_by_its_own_models_network_where_that_makes_gaussians(released, tmp_path, walkthrough):
    world = world_of(tmp_path, released)
    chosen = resolve(world, ReconstructJob())
    assert (chosen.reconstructor, chosen.model) == ("depth-anything", str(released))
    reconstructor = reconstructor_for(world, ReconstructJob(chunks=1), LoadOptions(device="cpu"))
    assert len(reconstructor.reconstruct(walkthrough, nothing).scene) > 1000
    assert isinstance(reconstructor_for(world, ReconstructJob("geometric"), LoadOptions()), GeometricLift)
    assert resolve(world, ReconstructJob("geometric")).model == str(released)
    with pytest.raises(UserError, match="no Depth Anything Gaussian head"):
        reconstructor_for(world, ReconstructJob(model="lyra-tiny"), LoadOptions(device="cpu"))


def test_other_worlds_are_lifted_by_the_default_models_head(tmp_path, caplog, walkthrough):
    tiny = reconstructor_for(world_of(tmp_path, "lyra-tiny"), ReconstructJob(interval=5), LoadOptions(device="cpu"))
    assert isinstance(tiny, TinyGaussianReconstructor) and tiny.interval == 5 and not caplog.records
    assert len(tiny.reconstruct(walkthrough, nothing).scene) > 1000
    with caplog.at_level(logging.WARNING):
        gone = reconstructor_for(world_of(tmp_path, tmp_path / "moved"), ReconstructJob(), LoadOptions(device="cpu"))
    assert isinstance(gone, TinyGaussianReconstructor) and "without the world's own model" in caplog.text


def test_what_is_asked_for_and_missing_or_gated_is_refused(tmp_path):
    world = world_of(tmp_path, "lyra-tiny")
    with pytest.raises(UserError, match="There is no depth network") as error:
        reconstructor_for(world, ReconstructJob(model="moved"), LoadOptions(device="cpu"))
    sentence(error)
    with pytest.raises(UserError, match="no Depth Anything Gaussian head"):
        reconstructor_for(world, ReconstructJob("depth-anything"), LoadOptions(device="cpu"))
    with pytest.raises(UserError, match=CC_BY_NC_4.name):
        reconstructor_for(world, ReconstructJob("depth-anything", model="da3-giant"), LoadOptions(device="cpu"))


def test_the_lift_can_be_stopped(walkthrough):
    with pytest.raises(Cancelled):
        GeometricLift().reconstruct(walkthrough, Progress(should_stop=lambda: True).step)


def test_networks_lift_in_float32_on_the_cpu_whatever_was_asked_of_the_transformer():
    for weights in (None, "bf16", "nf4", "fp32"):
        assert lifting_placement(LoadOptions(device="cpu", weights=weights)) == CPU
