"""lyra-tiny's Gaussian head: where it starts, what it sees, and that all of it can be trained."""

from dataclasses import replace

import pytest
import torch

from lyra.depth.tiny import TinyDepthModel
from lyra.errors import UserError
from lyra.geometry.rotations import quaternion_to_matrix
from lyra.hub import MODELS
from lyra.models.gaussian_head import TinyGaussianHead
from lyra.reconstruction.base import Walkthrough
from lyra.reconstruction.gaussians import GeometricLift, frames_to_lift, fused_frames, pixel_blocks
from lyra.reconstruction.rasterizer_gradients import render_with_gradients
from lyra.reconstruction.tiny_gaussians import (
    TinyGaussianReconstructor,
    changed_gaussians,
    head_input,
    in_time,
    median_depth,
    neighbour_ids,
)
from lyra.types import Cameras

HEIGHT, WIDTH = 34, 50


def nothing(done: int, of: int) -> None:
    """Ignore progress."""


@pytest.fixture(scope="module")
def depth() -> TinyDepthModel:
    return TinyDepthModel.from_pretrained(MODELS / "lyra-tiny" / "depth").eval().requires_grad_(False)


@pytest.fixture(scope="module")
def walkthrough() -> Walkthrough:
    """Five frames to the side of a slanted wall with a box before it, all with depth."""
    g = torch.Generator().manual_seed(0)
    frames = (torch.rand(5, 3, HEIGHT, WIDTH, generator=g) * 255).to(torch.uint8)
    slope = torch.linspace(3.0, 4.0, WIDTH).expand(HEIGHT, WIDTH).clone()
    slope[10:20, 20:30] = 2.0
    slope[:5] = 1000.0
    w2c = torch.eye(4).repeat(5, 1, 1)
    w2c[:, 0, 3] = -0.1 * torch.arange(5)
    k = torch.tensor([[40.0, 0, 24.5], [0, 40.0, 16.5], [0, 0, 1]]).expand(5, 3, 3)
    return Walkthrough(frames, Cameras(w2c, k, HEIGHT, WIDTH), dict.fromkeys(range(5), slope))


def trained(seed: int) -> TinyGaussianHead:
    """A head that changes everything a little."""
    torch.manual_seed(seed)
    head = TinyGaussianHead()
    torch.nn.init.normal_(head.last.weight, std=0.02)
    return head.eval()


def test_an_untrained_head_is_the_geometric_lift(depth, walkthrough):
    steps = []
    way = TinyGaussianReconstructor(depth, TinyGaussianHead().eval(), interval=1)
    ours = way.reconstruct(walkthrough, lambda done, of: steps.append((done, of)))
    plain = GeometricLift(1).reconstruct(walkthrough, nothing)
    assert ours.frame_ids == plain.frame_ids and steps[-1] == (10, 10) and steps == sorted(steps)
    assert len(ours.scene) == len(plain.scene)
    for name in ("means", "scales", "opacities", "sh"):
        torch.testing.assert_close(getattr(ours.scene, name), getattr(plain.scene, name), rtol=1e-4, atol=1e-4)
    turns = quaternion_to_matrix(ours.scene.quats), quaternion_to_matrix(plain.scene.quats)
    torch.testing.assert_close(*turns, rtol=1e-4, atol=1e-4)


def test_changes_stay_near_the_surface(depth, walkthrough):
    head = trained(0)
    scene = TinyGaussianReconstructor(depth, head, interval=1).reconstruct(walkthrough, nothing).scene
    plain = GeometricLift(1).reconstruct(walkthrough, nothing).scene
    assert len(scene) == len(plain) and scene.means.isfinite().all()
    assert not torch.allclose(scene.scales, plain.scales)
    assert float(scene.opacities.min()) > 0 and float(scene.opacities.max()) < 1 and float(scene.scales.min()) > 0


def test_a_long_video_is_lifted_in_passes_without_a_seam(depth, walkthrough, monkeypatch):
    head = trained(1)
    whole = TinyGaussianReconstructor(depth, head, interval=1).reconstruct(walkthrough, nothing).scene
    monkeypatch.setattr("lyra.reconstruction.tiny_gaussians.VIEWS_AT_ONCE", 2)
    parts = TinyGaussianReconstructor(depth, head, interval=1).reconstruct(walkthrough, nothing).scene
    for name in ("means", "quats", "scales", "opacities", "sh"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name), rtol=1e-4, atol=1e-4)


def test_neighbours_are_those_in_time_and_a_lone_view_has_none():
    assert neighbour_ids(3).tolist() == [[0, 0, 1], [1, 0, 2], [2, 1, 2]]
    assert neighbour_ids(1).tolist() == [[0, 0, 0]]


def test_a_single_frame_is_lifted(depth, walkthrough):
    one = Walkthrough(walkthrough.frames[:1], walkthrough.cameras[:1], {0: walkthrough.depths[0]})
    assert len(TinyGaussianReconstructor(depth, trained(0)).reconstruct(one, nothing).scene) > 300


def test_what_neighbours_show_is_told_to_the_head(depth, walkthrough):
    fused = in_time(list(fused_frames(frames_to_lift(walkthrough, range(3)))))
    blocks = [pixel_blocks(frame) for frame in fused]
    seen = head_input(fused, blocks, depth, median_depth(fused)).views
    # The last ten channels: two neighbours' colours, depth ratio and where they show.
    assert float(seen[0, -10:-5].abs().sum()) == 0 and float(seen[2, -5:].abs().sum()) == 0
    shown = seen[1, -6] > 0
    assert 0.6 < float(shown.float().mean()) < 1
    # Over the wall, away from the box, a neighbour agrees about the depth.
    assert float(seen[1, -7, -4:][shown[-4:]].abs().median()) < 0.1


def test_every_part_of_the_head_learns_from_a_picture(depth, walkthrough):
    head = trained(2).train()
    fused = in_time(list(fused_frames(frames_to_lift(walkthrough, range(3)))))
    blocks = [pixel_blocks(frame) for frame in fused]
    changes = head(head_input(fused, blocks, depth, median_depth(fused)))
    cameras = walkthrough.cameras
    loss = torch.zeros(())
    for i in range(3):
        scene = changed_gaussians(fused[i], blocks[i], changes, i)
        view = render_with_gradients(scene, cameras.w2c[3], cameras.intrinsics[3], HEIGHT, WIDTH)
        loss = loss + view.colours.square().mean() + view.depth.mean()
    loss.backward()
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert float(parameter.grad.abs().sum()) > 0, name


def test_it_says_what_it_lacks(depth, walkthrough):
    way = TinyGaussianReconstructor(depth, TinyGaussianHead())
    with pytest.raises(UserError, match="cameras"):
        way.reconstruct(replace(walkthrough, cameras=None), nothing)
    with pytest.raises(UserError, match="first frame"):
        way.reconstruct(replace(walkthrough, depths={4: walkthrough.depths[4]}), nothing)
