"""The released files load key for key through the public entry points, and nothing else does."""

import json
import os
import pickle
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from torch.distributed import checkpoint as dcp

from lyra.convert import convert
from lyra.errors import UserError
from lyra.hub import find_model
from lyra.models.checkpoint import WrongWeights
from lyra.models.distributed_checkpoint import read_metadata
from lyra.models.released import load_autoencoder, load_text_encoder, load_transformer
from lyra.pipeline import LyraPipeline
from lyra.progress import Progress
from tests.released_checkpoint import Sizes, transformer_weights, write_distributed

pytestmark = pytest.mark.usefixtures("accepted")


@pytest.fixture
def weights(released_shapes):
    return transformer_weights(list(released_shapes), Sizes())


@pytest.fixture
def copy(checkpoints, tmp_path):
    """A folder with the same small parts, whose transformer a test writes itself."""
    for path in checkpoints.iterdir():
        if path.name != "model":
            (tmp_path / path.name).symlink_to(path)
    (tmp_path / "model").mkdir()
    return tmp_path


def same_weights(first, second) -> bool:
    ours, theirs = first.state_dict(), second.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_every_part_of_the_released_layout_is_loaded(pipeline):
    parts = pipeline.parts
    assert parts.settings.name == "nvidia/Lyra-2.0"
    assert parts.transformer.config.num_layers == 3
    assert parts.negative_text.shape == (1, 512, 32)
    assert parts.encode_text(["a quiet street"]).shape == (1, 512, 32)
    assert parts.encode_image(torch.zeros(1, 3, 64, 112)).shape == (1, 257, 32)


@pytest.mark.parametrize("form", ["model.pth", "model.safetensors"])
def test_a_single_file_holds_the_same_transformer_as_the_distributed_checkpoint(copy, checkpoints, weights, form):
    path = copy / "model" / form
    (torch.save if form.endswith("pth") else save_file)({f"net.{name}": t for name, t in weights.items()}, path)
    assert same_weights(load_transformer(copy, torch.float32), load_transformer(checkpoints, torch.float32))


def test_a_checkpoint_of_several_shards_gives_the_same_transformer(copy, checkpoints, weights):
    state = {f"net.{name}": tensor for name, tensor in weights.items()}
    writer = dcp.FileSystemWriter(copy / "model" / "model", single_file_per_rank=False)
    dcp.save(state, storage_writer=writer, no_dist=True)
    assert len(list((copy / "model" / "model").glob("*.distcp"))) > 10
    assert same_weights(load_transformer(copy, torch.float32), load_transformer(checkpoints, torch.float32))


def test_missing_extra_and_misshapen_tensors_are_listed_before_anything_is_read(copy, weights):
    weights["blocks.1.surprise.weight"] = torch.zeros(2)
    with pytest.raises(KeyError, match=r"blocks\.1\.surprise\.weight"):
        write_and_load(copy, weights)
    del weights["blocks.1.surprise.weight"]
    weights["head.head.bias"] = torch.zeros(3)
    del weights["blocks.2.ffn.0.weight"]
    with pytest.raises(WrongWeights) as error:
        write_and_load(copy, weights)
    assert error.value.problems == (
        "missing blocks.2.ffn.net.0.proj.weight [96, 48]",
        "proj_out.bias is [3], not [64]",
    )


def write_and_load(folder, weights):
    shutil.rmtree(folder / "model" / "model", ignore_errors=True)
    write_distributed(folder / "model" / "model", weights)
    return load_transformer(folder, torch.float32)


def test_a_truncated_network_does_not_pass_for_a_smaller_one(copy, weights):
    short = {name: tensor for name, tensor in weights.items() if not name.startswith("blocks.2.")}
    with pytest.raises(WrongWeights, match=r"missing blocks\.2\.") as error:
        write_and_load(copy, short)
    assert len(error.value.problems) == 35 and "and 23 more" in str(error.value)


def test_without_a_sizes_file_the_released_sizes_are_expected(copy, weights):
    (copy / "sizes.json").unlink()
    with pytest.raises(WrongWeights, match=r"\[5120"):
        write_and_load(copy, weights)


def test_an_entry_that_is_no_tensor_is_refused(copy, weights):
    state = {f"net.{name}": tensor for name, tensor in weights.items()} | {"net.head.extra": "a pickled object"}
    dcp.save(state, checkpoint_id=copy / "model" / "model", no_dist=True)
    with pytest.raises(KeyError, match="extra"):
        load_transformer(copy, torch.float32)


class Hostile:
    """Runs a command when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def test_a_hostile_metadata_file_is_refused_and_does_not_run(checkpoints, tmp_path):
    folder, marker = tmp_path / "model", tmp_path / "it-ran"
    shutil.copytree(checkpoints / "model" / "model", folder)
    (folder / ".metadata").write_bytes(pickle.dumps(Hostile(marker)))
    with pytest.raises(UserError, match=r"damaged or hostile.*system"):
        read_metadata(folder)
    assert not marker.exists()


@pytest.mark.parametrize(
    "part", ["vae/vae.pth", "text_encoder/encoder.pth", "recon/model.pt", "image_encoder/model.pth"]
)
def test_a_hostile_torch_file_is_refused_and_does_not_run(checkpoints, tmp_path, part):
    shutil.copytree(checkpoints, tmp_path / "c")
    marker = tmp_path / "it-ran"
    torch.save({"module": Hostile(marker)}, tmp_path / "c" / part)
    with pytest.raises(UserError, match="asks for code to be run"):
        LyraPipeline.from_pretrained(str(tmp_path / "c"))
    assert not marker.exists()


def test_metadata_that_points_outside_of_its_folder_is_refused(checkpoints, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(checkpoints / "model" / "model", folder)
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    next(iter(metadata.storage_data.values())).relative_path = "../secret"
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(UserError, match="no plain file of its folder"):
        read_metadata(folder)


def test_a_download_that_is_cut_short_is_noticed_before_it_is_read(checkpoints, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(checkpoints / "model" / "model", folder)
    shard = next(folder.glob("*.distcp"))
    with shard.open("r+b") as file:
        file.truncate(shard.stat().st_size - 100)
    with pytest.raises(UserError, match="the download is not complete"):
        read_metadata(folder)
    shard.unlink()
    with pytest.raises(UserError, match="has 0 bytes"):
        read_metadata(folder)


@pytest.mark.parametrize(
    ("part", "load"), [("vae/vae.pth", load_autoencoder), ("text_encoder/encoder.pth", load_text_encoder)]
)
def test_other_parts_are_strict_too(checkpoints, tmp_path, part, load):
    shutil.copytree(checkpoints, tmp_path / "c")
    path = tmp_path / "c" / part
    weights = torch.load(path, weights_only=True)
    name = next(iter(weights))
    weights.pop(name)
    torch.save(weights, path)
    with pytest.raises(WrongWeights, match="missing"):
        load(tmp_path / "c", torch.float32)


def test_a_converted_model_is_the_same_and_keeps_its_licence(checkpoints, pipeline, tmp_path):
    out = tmp_path / "converted"
    stages = []
    progress = Progress(listener=lambda status: stages.append(status.stage))
    convert(find_model(str(checkpoints)), out, dtype=torch.float32, progress=progress, shard_bytes=8 << 20)
    assert len(list((out / "transformer").glob("*.safetensors"))) > 3
    assert "Convert transformer" in stages
    source = find_model(str(out))
    assert source.layout == "lyra" and source.licences == find_model(str(checkpoints)).licences
    again = LyraPipeline.from_pretrained(str(out))
    assert replace(again.parts.settings, part_licences={}) == pipeline.parts.settings
    assert same_weights(again.parts.transformer, load_transformer(checkpoints, torch.float32))
    image = torch.rand(1, 3, 64, 112) * 2 - 1
    # Weights that are mapped from a file lie elsewhere in memory, and kernels round by that.
    assert torch.allclose(again.parts.encode_image(image), pipeline.parts.encode_image(image), atol=1e-5)
    assert torch.allclose(again.parts.encode_text(["a tree"]), pipeline.parts.encode_text(["a tree"]), atol=1e-5)
    assert torch.equal(again.parts.negative_text, pipeline.parts.negative_text)
    depths = [p.depth.predict(image).depth for p in (again, pipeline)]
    assert torch.allclose(*depths, rtol=1e-4)
    encoded = [p.parts.autoencoder.encode_piece(image[:, :, None], {}) for p in (again, pipeline)]
    assert torch.allclose(*encoded, atol=1e-5)


def test_an_interrupted_conversion_goes_on_and_is_no_model_before_it_is_whole(checkpoints, tmp_path):
    out, calls = tmp_path / "converted", []

    def stop_at_the_transformer() -> bool:
        calls.append(1)
        return len(calls) > 6

    source = find_model(str(checkpoints))
    with pytest.raises(Exception, match="cancelled"):
        convert(source, out, dtype=torch.float32, progress=Progress(should_stop=stop_at_the_transformer))
    assert not (out / "lyra.json").exists() and (out / "autoencoder").is_dir()
    before = (out / "autoencoder" / "config.json").stat().st_mtime_ns
    convert(source, out, dtype=torch.float32, progress=Progress())
    assert (out / "autoencoder" / "config.json").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="holds a model already"):
        convert(source, out, dtype=torch.float32, progress=Progress())


def test_a_converted_folder_with_a_missing_tensor_is_refused(checkpoints, tmp_path):
    out = tmp_path / "converted"
    convert(find_model(str(checkpoints)), out, dtype=torch.float32, progress=Progress(), shard_bytes=8 << 20)
    index = out / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    first = sorted((out / "transformer").glob("*.safetensors"))[0]
    assert json.loads(index.read_text())["weight_map"]
    first.unlink()
    with pytest.raises(UserError, match=r"weights do not fit the model: missing"):
        LyraPipeline.from_pretrained(str(out))
