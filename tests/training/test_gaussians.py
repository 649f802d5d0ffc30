"""The trainer of the Gaussian head: its loss, its depths, and a run as a user starts it."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from skimage.metrics import structural_similarity

from lyra.depth.tiny import TinyDepthModel
from lyra.hub import MODELS
from lyra.models.gaussian_head import TinyGaussianHead
from lyra.training.data import load_walk, render_walks, to_model_range
from lyra.training.gaussians import GaussianTraining, Windows, measured_depths, similarity, window_losses
from lyra.types import Cameras
from tests.conftest import ROOT

HEIGHT, WIDTH = 64, 96


@pytest.fixture(scope="module")
def walks(tmp_path_factory):
    """A folder with a short walk."""
    folder = tmp_path_factory.mktemp("walks")
    render_walks(folder, 1, 33, HEIGHT, WIDTH, every=4)
    return folder


@pytest.fixture(scope="module")
def depth():
    return TinyDepthModel.from_pretrained(MODELS / "lyra-tiny" / "depth").eval().requires_grad_(False)


def test_similarity_is_the_one_that_everybody_measures():
    g = torch.Generator().manual_seed(0)
    a = torch.rand(1, 3, 40, 50, generator=g)
    b = (a + 0.2 * torch.randn(a.shape, generator=g)).clamp(0, 1)
    ours = similarity(a, b)[0, 3:-3, 3:-3]
    expected = structural_similarity(
        a[0].numpy(), b[0].numpy(), channel_axis=0, data_range=1.0, use_sample_covariance=False, full=True
    )[1]
    torch.testing.assert_close(ours, torch.from_numpy(expected).mean(0)[3:-3, 3:-3], rtol=0, atol=1e-4)


def test_anchored_depth_agrees_between_frames_and_free_depth_does_not(walks, depth):
    walk = load_walk(next(walks.glob("walk-*.safetensors")))
    ids = [0, 1, 2]
    cameras = Cameras(walk.w2c[ids], walk.intrinsics.expand(3, 3, 3), HEIGHT, WIDTH)
    images, truth = to_model_range(walk.rgb[ids]), [walk.depth[i] for i in ids]
    known = {kind: measured_depths(images, truth, cameras, depth, anchor=kind) for kind in (True, False)}
    torch.testing.assert_close(known[True][0], known[False][0])
    assert not torch.allclose(known[True][2], known[False][2], rtol=1e-3)
    # Only the first frame's scale is taken from the truth.
    wrong = [truth[0], truth[1] * 3, truth[2] * 3]
    again = measured_depths(images, wrong, cameras, depth, anchor=True)
    torch.testing.assert_close(again[2], known[True][2])


def test_the_head_learns_a_window(walks, depth, tmp_path):
    torch.manual_seed(0)
    head = TinyGaussianHead()
    settings = GaussianTraining(MODELS / "lyra-tiny", walks, tmp_path, sources=3)
    windows = Windows(settings, depth, 0)
    windows.refresh()
    window = windows.draw()
    optimizer, losses = torch.optim.AdamW(head.parameters(), lr=1e-3), []
    with ThreadPoolExecutor(2) as pool:
        for _ in range(12):
            loss, parts = window_losses(window, head, depth, pool)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]
    assert set(parts) == {"l1", "psnr_db", "unlike", "log_depth"}


def test_a_run_exports_a_head_and_a_second_one_goes_on(walks, tmp_path):
    command = [sys.executable, "-m", "lyra.training.gaussians", "--models", str(MODELS / "lyra-tiny")]
    command += ["--data", str(walks), "--out", str(tmp_path), "--sources", "3", "--minutes"]
    subprocess.run([*command, "0.02"], cwd=ROOT, check=True, capture_output=True)
    first = json.loads((tmp_path / "state.json").read_text())
    subprocess.run([*command, "0.06"], cwd=ROOT, check=True, capture_output=True)
    second = json.loads((tmp_path / "state.json").read_text())
    assert 0 < int(first["step"]) < int(second["step"])
    head = TinyGaussianHead.from_pretrained(tmp_path / "export")
    assert float(head.last.weight.detach().abs().max()) > 0
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [int(first["step"]), int(second["step"])]
