"""Lifting: one Gaussian a block, on the surface, and none twice."""

import pytest
import torch

from lyra.geometry.resample import make_surface
from lyra.reconstruction.gaussians import FOOTPRINT_SIGMA, LiftedFrame, lift, new_pixels

HEIGHT, WIDTH = 48, 64
K = torch.tensor([[50.0, 0, 31.5], [0, 50.0, 23.5], [0, 0, 1]])


def nothing(done: int, of: int) -> None:
    """Ignore progress."""


def wall_frame(x: float = 0.0, depth: float = 4.0) -> LiftedFrame:
    w2c = torch.eye(4)
    w2c[0, 3] = -x
    image = torch.linspace(-1, 1, WIDTH).expand(3, HEIGHT, WIDTH).clone()
    return LiftedFrame(image, torch.full((HEIGHT, WIDTH), depth), w2c, K)


def test_one_gaussian_for_each_block_on_the_surface_with_its_colour():
    scene = lift([wall_frame()], nothing)
    assert len(scene) == HEIGHT * WIDTH // 4
    assert torch.allclose(scene.means[:, 2], torch.full((len(scene),), 4.0), atol=1e-4)
    projected = scene.means @ K.T
    uv = projected[:, :2] / projected[:, 2:]
    assert torch.allclose(uv[0], torch.tensor([0.5, 0.5]), atol=1e-3)
    assert torch.allclose(uv[-1], torch.tensor([WIDTH - 1.5, HEIGHT - 1.5]), atol=1e-3)
    colours = 0.5 + 0.28209479 * scene.sh[:, 0]
    assert colours[:, 0].min() == pytest.approx(0.0, abs=0.02)
    assert colours[:, 0].max() == pytest.approx(1.0, abs=0.02)


def test_discs_lie_in_the_wall_and_overlap_their_neighbours():
    scene = lift([wall_frame()], nothing)
    spacing = 4.0 * 2 / 50
    assert torch.allclose(scene.scales[:, :2], torch.full((len(scene), 2), FOOTPRINT_SIGMA * spacing), rtol=0.02)
    assert (scene.scales[:, 2] < scene.scales[:, 0] / 3).all()
    assert torch.allclose(scene.quats.norm(dim=-1), torch.ones(len(scene)), atol=1e-5)


def test_a_second_view_adds_only_what_the_first_did_not_show():
    alone = len(lift([wall_frame()], nothing))
    same = len(lift([wall_frame(), wall_frame()], nothing))
    shifted = len(lift([wall_frame(), wall_frame(x=1.0)], nothing))
    assert same <= alone * 1.05
    # A metre to the side at 4 m is 12.5 of 64 columns.
    assert alone * 1.1 < shifted < alone * 1.35


def test_a_nearer_surface_in_the_second_view_is_kept():
    first = wall_frame()
    fresh = new_pixels([make_surface(first.depth, first.w2c, K)], torch.full((HEIGHT, WIDTH), 2.0), first)
    assert fresh.all()


def test_no_frames_is_an_error():
    with pytest.raises(ValueError, match="no frames"):
        lift([], nothing)
