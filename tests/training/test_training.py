"""Trainers: a loop that resumes exactly, samples made by the loop's own code, and a loss that falls."""

import numpy as np
import pytest
import torch
from torch import nn

from lyra.training.data import load_walk, save_walk
from lyra.training.loop import LoopSettings, TrainingLoop
from lyra.training.samples import augmented, relative_to_first


def make_loop(folder, minutes: float) -> TrainingLoop:
    torch.manual_seed(0)
    return TrainingLoop(nn.Linear(4, 1), folder, LoopSettings(minutes=minutes, save_minutes=0.0, warmup_steps=1))


def steps_of(loop: TrainingLoop, count: int) -> None:
    """Train for a number of steps instead of minutes."""
    x = torch.arange(20.0).view(5, 4) / 20
    done = 0

    def loss_of_step(step: int):
        nonlocal done
        done += 1
        if done > count:
            raise StopIteration
        return (loop.model(x) - 1).pow(2).mean(), {}

    with pytest.raises(StopIteration):
        loop.run(loss_of_step, lambda: None)


def test_training_resumes_where_it_stopped(tmp_path):
    loop = make_loop(tmp_path / "a", 1000)
    steps_of(loop, 6)
    loop.save()
    again = make_loop(tmp_path / "a", 1000)
    assert again.step == loop.step
    assert again.spent_seconds == pytest.approx(loop.spent_seconds)
    for name in loop.parameters:
        assert torch.equal(loop.parameters[name], again.parameters[name])
        assert torch.equal(loop.ema[name], again.ema[name])
        before = loop.optimizer.state[loop.parameters[name]]
        after = again.optimizer.state[again.parameters[name]]
        assert torch.equal(before["exp_avg_sq"], after["exp_avg_sq"])


def test_the_loss_falls(tmp_path):
    loop = make_loop(tmp_path / "b", 1000)
    x = torch.arange(20.0).view(5, 4) / 20
    before = (loop.model(x) - 1).pow(2).mean().item()
    steps_of(loop, 30)
    assert (loop.model(x) - 1).pow(2).mean().item() < before


def test_averaged_weights_are_put_in_and_taken_out(tmp_path):
    loop = make_loop(tmp_path / "c", 1000)
    steps_of(loop, 5)
    trained = loop.model.weight.detach().clone()
    with loop.averaged_weights():
        assert torch.equal(loop.model.weight, loop.ema["weight"])
    assert torch.equal(loop.model.weight, trained)


@pytest.fixture(scope="module")
def walk(tmp_path_factory):
    path = tmp_path_factory.mktemp("walk") / "walk.safetensors"
    save_walk(path, "room", 3, 9, 32, 56)
    return load_walk(path)


def test_a_rendered_walk_reads_back(walk):
    assert walk.rgb.shape == (9, 32, 56, 3)
    assert walk.caption
    assert torch.allclose(walk.w2c[:, 3], torch.tensor([0.0, 0, 0, 1]).expand(9, 4))


def test_a_mirrored_walk_still_agrees_with_its_depth(walk):
    """A point of frame 0, moved into frame 8 with the augmented cameras, is where frame 8's depth says it is."""
    for seed in range(4):
        frames, depth, cameras = augmented(walk, np.random.default_rng(seed))
        cameras = relative_to_first(cameras)
        assert torch.allclose(cameras.w2c[0], torch.eye(4), atol=1e-5)
        rows, columns = torch.meshgrid(torch.arange(32.0), torch.arange(56.0), indexing="ij")
        pixels = torch.stack([columns, rows, torch.ones_like(rows)], -1)
        points = (pixels @ torch.linalg.inv(cameras.intrinsics[0]).T) * depth[0][..., None]
        moved = points @ cameras.w2c[8, :3, :3].T + cameras.w2c[8, :3, 3]
        projected = moved @ cameras.intrinsics[8].T
        u, v = (projected[..., i] / projected[..., 2] for i in (0, 1))
        inside = (u > 0) & (u < 55) & (v > 0) & (v < 31) & (depth[0] < 200)
        there = depth[8][v.round().clamp(0, 31).long(), u.round().clamp(0, 55).long()]
        error = ((there - moved[..., 2]).abs() / moved[..., 2])[inside]
        assert error.median() < 0.02
        assert frames.shape == (9, 3, 32, 56)
