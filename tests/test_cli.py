"""The command line as a subprocess: the default job on a real photo, and one sentence for every mistake."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lyra.cli import parse
from lyra.config import GenerateJob, LoadOptions
from lyra.export.ply import read_splat_ply
from tests.conftest import DEFAULT_PHOTO, ROOT

PHOTO = DEFAULT_PHOTO


def lyra(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command and return what it said."""
    return subprocess.run(
        [sys.executable, "-m", "lyra", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


def assert_one_sentence(result: subprocess.CompletedProcess[str], *words: str) -> None:
    """The command failed with one line that names the problem, and without a traceback."""
    assert result.returncode != 0
    assert "Traceback" not in result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("lyra: ")
    assert last.endswith(".")
    for word in words:
        assert word in last


def test_generate_leaves_a_world_that_reads_without_this_project(world):
    run = json.loads((world.folder / "run.json").read_text())
    assert run["status"] == "finished"
    assert run["model"]["licence"]
    assert run["stage_seconds"]["Denoise"] > 0
    assert world.video.shape == (81, 3, 480, 832)
    with np.load(world.folder / "cameras.npz") as cameras:
        assert cameras["w2c"].shape == (81, 4, 4)
        assert cameras["intrinsics"].shape == (81, 3, 3)
        assert (int(cameras["image_height"]), int(cameras["image_width"])) == (480, 832)
        assert np.allclose(cameras["w2c"][0], np.eye(4))
    assert sorted(world.depth) == list(range(0, 81, 4))
    assert Image.open(world.folder / "photo.png").size == (832, 480)


def test_the_first_frame_is_the_photo_and_later_ones_are_neither_grey_nor_noise(world):
    video = world.video.float()
    photo = np.asarray(Image.open(world.folder / "photo.png"), np.float32)
    error = np.mean((video[0].movedim(0, -1).numpy() - photo) ** 2)
    assert 10 * np.log10(255**2 / error) >= 38
    assert (video.std(dim=(1, 2, 3)) > 20).all()
    steps = video.diff(dim=0).abs().mean(dim=(1, 2, 3))
    assert steps[1:].max() < 12


def test_the_same_job_again_is_answered_from_its_chunks_with_the_same_bytes(world):
    before = world.video_path.read_bytes()
    result = lyra("generate", "--out", world.folder, "--resume")
    assert result.returncode == 0, result.stderr
    assert "Denoise" not in result.stderr
    assert world.video_path.read_bytes() == before


def test_a_job_file_repeats_a_run(world, tmp_path):
    job = tmp_path / "job.json"
    job.write_text(json.dumps(json.loads((world.folder / "run.json").read_text())["job"]))
    result = lyra("generate", "--job", job, "--out", world.folder)
    assert result.returncode == 0, result.stderr
    assert "Denoise" not in result.stderr


def test_reconstruct_and_export_write_splats(world):
    result = lyra("reconstruct", world.folder)
    assert result.returncode == 0, result.stderr
    result = lyra("export", world.folder, "--formats", "ply")
    assert result.returncode == 0, result.stderr
    scene = read_splat_ply(world.folder / "exports" / "scene.ply")
    assert 100_000 <= len(scene) <= 1_500_000
    assert scene.means.isfinite().all()


def test_another_photo_does_not_overwrite_a_world(world, photos):
    before = world.video_path.read_bytes()
    assert_one_sentence(lyra("generate", photos[0], "--out", world.folder), "another photo", "--out")
    assert world.video_path.read_bytes() == before


def test_doctor_names_the_machine_and_the_models():
    result = lyra("doctor")
    assert result.returncode == 0
    for word in ("cores", "memory", "GPU", "lyra-tiny", "nvidia/Lyra-2.0"):
        assert word in result.stdout


def test_mistakes_get_one_sentence(tmp_path):
    text = tmp_path / "text.jpg"
    text.write_text("not an image")
    assert_one_sentence(lyra("generate", text, "--out", tmp_path / "w"), "picture", "JPEG")
    assert_one_sentence(lyra("generate", tmp_path / "missing.jpg", "--out", tmp_path / "w"), "missing.jpg")
    assert_one_sentence(lyra("generate", PHOTO, "--preset", "pushin", "--out", tmp_path / "w"), "push-in")
    assert_one_sentence(lyra("generate", PHOTO, "--chunks", "9", "--out", tmp_path / "w"), "1 to 6")
    assert_one_sentence(lyra("generate", PHOTO, "--model", "other", "--out", tmp_path / "w"), "lyra-tiny")
    assert_one_sentence(lyra("generate", "--out", tmp_path / "w"), "photo")
    assert_one_sentence(lyra("generate", "--out", tmp_path / "w", "--resume"), "run.json")


def test_a_resumed_job_keeps_its_number_formats_unless_others_are_given(tmp_path):
    job = GenerateJob(photo="photo.jpg", seed=3)
    placed = LoadOptions(None, "cuda", "fp8", "group", "tiled", fuse_loras=False)
    (tmp_path / "run.json").write_text(json.dumps({"job": job.to_json(), "placement": placed.to_json()}))
    resumed = parse(["generate", "--resume", "--out", str(tmp_path)])
    assert resumed.load == placed and resumed.options.seed == 3
    other = parse(["generate", "--resume", "--out", str(tmp_path), "--weights", "bf16", "--fuse-loras"])
    assert other.load == replace(placed, weights="bf16", fuse_loras=True)
    fresh = parse(["generate", "--job", str(tmp_path / "run.json"), "--out", str(tmp_path / "other")])
    assert fresh.load == LoadOptions() and fresh.options.seed == 3
    assert_one_sentence(lyra("reconstruct", tmp_path / "w"), "generate")
    assert_one_sentence(lyra("export", tmp_path), "generate")


def test_an_unusable_trajectory_gets_one_sentence(tmp_path):
    path = tmp_path / "trajectory.npz"
    w2c = np.tile(np.eye(4, dtype=np.float32), (20, 1, 1))
    np.savez(path, w2c=w2c, intrinsics=np.tile(np.eye(3), (20, 1, 1)), image_height=480, image_width=832)
    result = lyra("generate", PHOTO, "--trajectory", path, "--out", tmp_path / "w")
    assert_one_sentence(result, "81")


def test_an_unwritable_folder_gets_one_sentence(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("a file where a folder should be")
    assert_one_sentence(lyra("generate", PHOTO, "--out", blocked / "world"), "--out")


def test_a_full_disk_gets_one_sentence_and_keeps_what_was_there(tmp_path):
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    folder = tmp_path / "w"
    folder.mkdir()
    (folder / "photo.png").symlink_to("/dev/full")
    assert_one_sentence(lyra("generate", PHOTO, "--out", folder), "full")
