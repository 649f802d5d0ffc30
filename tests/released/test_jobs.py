"""Jobs with a model in the released layout: samplers, LoRAs, recipes, captions, paths, and ways to fit in memory."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from lyra.errors import UserError
from lyra.generation.captioner import CaptionRequest
from lyra.hub import find_model
from lyra.loading import load_components
from lyra.models.lora import loaded_loras
from lyra.offload import CachedTexts, OnDemand
from lyra.pipeline import LyraPipeline
from lyra.placement import Placement
from lyra.trajectory.gui_path import write_gui_path
from lyra.trajectory.presets import preset_cameras
from lyra.types import Cameras
from tests.conftest import DEFAULT_PHOTO, ROOT
from tests.released.conftest import job_of
from tests.simulated_device import DEVICE, SimulatedDevice

pytestmark = pytest.mark.usefixtures("accepted", "small_frames")


def command(*arguments, environment):
    return subprocess.run(
        [sys.executable, "-m", "lyra", *map(str, arguments)],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip


def test_without_acceptance_nothing_runs_and_with_it_the_world_names_its_licences(
    checkpoints, clean_environment, tmp_path
):
    arguments = ("generate", DEFAULT_PHOTO, "--out", tmp_path / "w", "--model", checkpoints, "--preset", "original")
    refused = command(*arguments, environment=clean_environment)
    assert refused.returncode == 2 and not (tmp_path / "w").exists()
    assert "Internal Scientific Research" in refused.stderr and "--accept-licence" in refused.stderr
    assert "Traceback" not in refused.stderr
    switched_off = command(
        *arguments, "--accept-licence", environment=clean_environment | {"LYRA_NO_GATED_MODELS": "1"}
    )
    assert switched_off.returncode == 2 and "switched off" in switched_off.stderr
    done = command(*arguments, "--accept-licence", environment=clean_environment)
    assert done.returncode == 0, done.stderr
    assert "Forbids:" in done.stderr
    model = json.loads((tmp_path / "w" / "run.json").read_text())["model"]
    assert model["name"] == "nvidia/Lyra-2.0"
    assert model["licences"]["transformer"] == "nvidia-research" and model["licences"]["autoencoder"] == "Apache-2.0"
    assert model["accepted"]["nvidia-research"].startswith("20")


def test_four_steps_use_the_lora_and_other_steps_do_not(pipeline, tmp_path, monkeypatch):
    active = watch_loras(pipeline, monkeypatch)
    few = pipeline(DEFAULT_PHOTO, tmp_path / "few", preset="pan-left", sampler="dmd")
    full = pipeline(DEFAULT_PHOTO, tmp_path / "full", preset="pan-left", sampler="full", steps=2)
    assert active == [{"dmd": 1.0}, {}]
    assert not torch.equal(few.video, full.video)
    again = pipeline(DEFAULT_PHOTO, tmp_path / "again", preset="pan-left", sampler="dmd")
    assert torch.equal(few.video, again.video), "switching must not change the weights"


def watch_loras(pipeline, monkeypatch) -> list[dict[str, float]]:
    """Which LoRAs each job makes active."""
    seen = []
    from lyra import offload

    original = offload.set_loras

    def watched(model, strengths):
        seen.append(dict(strengths))
        original(model, strengths)

    monkeypatch.setattr(offload, "set_loras", watched)
    return seen


def test_a_further_lora_is_used_only_when_it_is_asked_for(pipeline, checkpoints, tmp_path, monkeypatch):
    style = tmp_path / "film.grain.safetensors"
    style.write_bytes((checkpoints / "lora" / "dmd_distillation.safetensors").read_bytes())
    active = watch_loras(pipeline, monkeypatch)
    pipeline(DEFAULT_PHOTO, tmp_path / "w", preset="original", loras=(f"{style}=0.4",))
    (strengths,) = active
    assert list(strengths.values()) == [0.4, 1.0] and list(strengths)[1] == "dmd"
    assert len(loaded_loras(pipeline.parts.transformer)) == 2
    pipeline(DEFAULT_PHOTO, tmp_path / "v", preset="original")
    assert active[-1] == {"dmd": 1.0}
    with pytest.raises(UserError, match="write a path and a strength"):
        pipeline(DEFAULT_PHOTO, tmp_path / "u", loras=("film.safetensors",))
    with pytest.raises(UserError, match="cannot be read"):
        pipeline(DEFAULT_PHOTO, tmp_path / "u", preset="original", loras=("missing.safetensors=1",))


def test_fused_loras_make_the_same_video_and_leave_the_weights_as_they_were(checkpoints, pipeline, tmp_path):
    source, placement = find_model(str(checkpoints)), Placement("fp32", "none", device="cpu")
    fused = LyraPipeline(load_components(source, placement, fuse_loras=True), source, placement)
    plain = pipeline(DEFAULT_PHOTO, tmp_path / "p", preset="pan-left")
    video = fused(DEFAULT_PHOTO, tmp_path / "f", preset="pan-left").video.float()
    assert (video - plain.video.float()).abs().mean() < 0.2
    fused.parts.use_sampler("full", {})
    before = pipeline.parts.transformer.state_dict()
    after = fused.parts.transformer.state_dict()
    name = "blocks.0.attn1.to_q.base_layer.weight"
    assert torch.equal(after[name], before[name])


def test_without_the_distilled_weights_four_steps_are_refused(checkpoints, tmp_path):
    for path in checkpoints.iterdir():
        if path.name != "lora":
            (tmp_path / path.name).symlink_to(path)
    pipeline = LyraPipeline.from_pretrained(str(tmp_path))
    with pytest.raises(UserError, match="choose --sampler full"):
        pipeline(DEFAULT_PHOTO, tmp_path / "w", preset="original")


def test_the_zoom_recipe_is_one_video_of_two_walks_that_meet_in_the_photo(pipeline, tmp_path):
    world = pipeline(DEFAULT_PHOTO, tmp_path / "w", preset="zoom-in-zoom-out", chunks=1)
    assert job_of(world)["job"]["chunks"] == 4
    assert len(world.video) == 321 and len(world.cameras) == 321
    identity = torch.eye(4)
    assert torch.allclose(world.cameras.w2c[240], identity)
    assert not torch.allclose(world.cameras.w2c[0], identity) and not torch.allclose(world.cameras.w2c[320], identity)
    from PIL import Image

    photo = torch.from_numpy(np.array(Image.open(world.photo_path))).movedim(-1, 0).float()
    errors = (world.video[200:280].float() - photo).abs().mean(dim=(1, 2, 3))
    assert int(errors.argmin()) + 200 == 240 and errors.min() < 6
    depths = world.depth
    assert 240 in depths and {232, 248} <= depths.keys() and max(depths) == 320
    # A stopped job goes on: all chunks are found again.
    chunks = sorted(path.name for path in (world.folder / "chunks").iterdir())
    pipeline(DEFAULT_PHOTO, tmp_path / "w", preset="zoom-in-zoom-out")
    assert sorted(path.name for path in (world.folder / "chunks").iterdir()) == chunks and len(chunks) == 4


def test_the_custom_trajectory_recipe_scales_the_path_and_gives_each_chunk_its_caption(pipeline, tmp_path, monkeypatch):
    seen = pipeline.see(DEFAULT_PHOTO)
    cameras = preset_cameras(
        "pan-left", frames=161, depth=seen.depth, intrinsics=seen.depth.intrinsics, image_height=32, image_width=48
    )
    w2c = cameras.w2c.clone()
    w2c[:, 0, 3] = torch.linspace(0, 0.05, 161)
    path = tmp_path / "path.json"
    write_gui_path(path, Cameras(w2c, cameras.intrinsics, 32, 48))
    captions = tmp_path / "captions.json"
    captions.write_text(json.dumps({"0": "a quiet street", "81": "evening light"}))
    prompts = []
    encode = CachedTexts.__call__

    def watched(self, texts):
        prompts.append(list(texts))
        return encode(self, texts)

    monkeypatch.setattr(CachedTexts, "__call__", watched)
    world = pipeline(DEFAULT_PHOTO, tmp_path / "w", trajectory=str(path), captions=str(captions), chunks=2)
    # Both captions before the first chunk, so that the text encoder can leave; then each chunk's own.
    assert prompts == [["a quiet street", "evening light"], ["a quiet street"], ["evening light"]]
    scale = world.cameras.w2c[160, :3, 3].norm() / w2c[160, :3, 3].norm()
    assert float(scale) == pytest.approx(1.1, rel=2e-2)
    plain = pipeline.asked_path(seen, job(trajectory=str(path), chunks=2, pose_scale=1.0)).legs[0].cameras
    assert float(plain.w2c[160, :3, 3].norm()) == pytest.approx(float(w2c[160, :3, 3].norm()), rel=2e-2)


def job(**options):
    from lyra.config import GenerateJob

    return GenerateJob(photo=str(DEFAULT_PHOTO), **options)


def test_a_captioner_writes_the_caption_of_each_chunk_from_what_is_known_of_its_views(pipeline, tmp_path):
    requests: list[CaptionRequest] = []

    def captioner(request: CaptionRequest) -> str:
        requests.append(request)
        return f"a street and {len(requests)} tree"

    pipeline._captioners["a-model"] = captioner
    world = pipeline(
        DEFAULT_PHOTO, tmp_path / "w", preset="pan-left", chunks=2, captioner="a-model", prompt="the house on the left"
    )
    first, second = requests
    assert first.region_hint == "the house on the left"
    assert first.previews.shape == (4, 3, 32, 48) and first.previews.dtype == torch.uint8
    assert torch.equal(first.newest, first.photo) and not torch.equal(second.newest, second.photo)
    black = (first.previews.float().sum(1) == 0).float().mean(dim=(1, 2))
    assert ((black > 0) & (black < 1)).all(), "a part of each view is known"
    about = [json.loads(path.read_text()) for path in (world.folder / "chunks").glob("*/chunk.json")]
    assert sorted(entry["prompt"] for entry in about) == ["a street and 1 tree", "a street and 2 tree"]
    pipeline(
        DEFAULT_PHOTO, tmp_path / "w", preset="pan-left", chunks=2, captioner="a-model", prompt="the house on the left"
    )
    assert len(requests) == 2, "finished chunks are found without asking again"
    with pytest.raises(UserError, match="captioner"):
        pipeline(DEFAULT_PHOTO, tmp_path / "v", preset="original", captioner="nobody/no-such-model")


def test_more_scored_views_may_retrieve_other_frames_and_make_another_chunk(pipeline, tmp_path):
    one = pipeline(DEFAULT_PHOTO, tmp_path / "w", preset="loop", chunks=2)
    four = pipeline(DEFAULT_PHOTO, tmp_path / "w4", preset="loop", chunks=2, retrieval_views=4)
    assert job_of(four)["job"]["retrieval_views"] == 4
    assert {p.name for p in (one.folder / "chunks").iterdir()}.isdisjoint(
        p.name for p in (four.folder / "chunks").iterdir()
    )


def first_chunk(checkpoints, placement, tmp_path):
    source = find_model(str(checkpoints))
    loaded = LyraPipeline(load_components(source, placement), source, placement)
    return loaded(DEFAULT_PHOTO, tmp_path, preset="pan-left").video.float()


@pytest.mark.parametrize("offload", ["model", "group"])
def test_moving_networks_does_not_change_a_byte(checkpoints, pipeline, tmp_path, offload):
    resident = pipeline(DEFAULT_PHOTO, tmp_path / "r", preset="pan-left").video.float()
    moved = first_chunk(checkpoints, Placement("fp32", offload, device="cpu"), tmp_path / "m")
    assert torch.equal(moved, resident)


@pytest.mark.parametrize("offload", ["none", "model"])
def test_on_an_accelerator_every_part_gets_what_it_needs_where_it_is(checkpoints, pipeline, tmp_path, offload):
    expected = pipeline(DEFAULT_PHOTO, tmp_path / "cpu", preset="pan-left")
    source, placement = find_model(str(checkpoints)), Placement("fp32", offload, device=str(DEVICE))
    with torch.no_grad(), SimulatedDevice():
        there = LyraPipeline(load_components(source, placement), source, placement)
        world = there(DEFAULT_PHOTO, tmp_path / "there", preset="pan-left")
        waits = there.parts.transformer.proj_out.base_layer.weight.device.type
    assert waits == ("cuda" if offload == "none" else "cpu")
    assert job_of(world)["device"] == "cuda:0"
    assert (world.video.float() - expected.video.float()).abs().mean() < 2


def test_rounded_weights_come_near(checkpoints, pipeline, tmp_path):
    full = pipeline(DEFAULT_PHOTO, tmp_path / "r", preset="pan-left").video.float()
    fp8 = first_chunk(checkpoints, Placement("fp8", "none", device="cpu"), tmp_path / "8")
    error = (fp8 - full).abs().mean()
    assert 0 < error < 12, "of 255; random weights amplify rounding"


def test_tiled_decoding_of_small_frames_is_exact(checkpoints, pipeline, tmp_path):
    whole = pipeline(DEFAULT_PHOTO, tmp_path / "r", preset="pan-left").video.float()
    tiled = first_chunk(checkpoints, Placement("fp32", "none", "tiled", device="cpu"), tmp_path / "t")
    # Rounding differs, and video coding turns some of it into other bytes.
    assert (tiled - whole).abs().mean() < 0.2


def test_four_bit_weights_need_a_converted_model(checkpoints):
    with pytest.raises(UserError, match="lyra convert"):
        load_components(find_model(str(checkpoints)), Placement("nf4", "none", device="cpu"))


def test_the_text_encoder_leaves_the_device_before_denoising():
    encoder = torch.nn.Embedding(8, 4).requires_grad_(False)
    with torch.no_grad(), SimulatedDevice():
        on_demand = OnDemand(encoder, DEVICE, resident=False)
        where = []

        def encode(texts):
            out = encoder(torch.tensor([[len(text) for text in texts]]).T)
            where.append(encoder.weight.device.type)
            return out

        texts = CachedTexts(encode, on_demand, DEVICE)
        embedding = texts(["one", "three"])
        assert where == ["cuda"] and encoder.weight.device.type == "cpu"
        assert embedding.device == DEVICE and embedding.shape == (2, 1, 4)
        assert torch.equal(texts(["three"]).cpu(), embedding[1:].cpu()) and len(where) == 1


def test_two_processes_make_the_video_of_one(checkpoints, accepted_config, clean_environment, tmp_path):
    environment = clean_environment | {"LYRA_CONFIG_DIR": str(accepted_config), "OMP_NUM_THREADS": "1"}
    arguments = ["generate", str(DEFAULT_PHOTO), "--model", str(checkpoints), "--preset", "original"]
    alone = command(*arguments, "--out", tmp_path / "one", environment=environment)
    assert alone.returncode == 0, alone.stderr
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "lyra"]
    together = subprocess.run(
        [*launch, *arguments, "--out", str(tmp_path / "two"), "--device", "cpu"],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert together.returncode == 0, together.stderr
    from lyra.world import World

    one, two = World.open(tmp_path / "one").video, World.open(tmp_path / "two").video
    assert (one.float() - two.float()).abs().max() <= 2
