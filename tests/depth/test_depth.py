"""Depth: alignment, what memory shows is kept, and the shipped network beats a prior on an unseen world."""

import math

import pytest
import torch

from lyra.depth.base import SKY_DEPTH, DepthPrediction, align_depth, intrinsics_from_fov
from lyra.depth.combined import CombinedDepth
from lyra.depth.walk import SeenDepth, SeenViewsDepth
from lyra.types import Cameras


class Flat:
    """An estimator that says 2 everywhere and finds sky in the first row."""

    def predict(self, images: torch.Tensor) -> DepthPrediction:
        b, _, h, w = images.shape
        sky = torch.zeros(b, h, w, dtype=torch.bool)
        sky[:, 0] = True
        depth = torch.where(sky, torch.full((b, h, w), SKY_DEPTH), torch.full((b, h, w), 2.0))
        return DepthPrediction(depth, sky, torch.ones(b, h, w), torch.full((b,), 60.0), torch.zeros(b, 1, 4))


def measure(seen: torch.Tensor) -> torch.Tensor:
    cameras = Cameras(torch.eye(4)[None], torch.eye(3)[None], 16, 24)
    return SeenDepth(Flat()).measure(torch.zeros(1, 3, 16, 24), cameras, seen[None])[0]


def test_seen_depth_is_kept_and_the_rest_continues_its_scale():
    seen = torch.full((16, 24), torch.inf)
    seen[:, :12] = 6.0
    depth = measure(seen)
    assert (depth[:, :12] == 6.0).all()
    assert torch.allclose(depth[1:, 12:], torch.full((15, 12), 6.0), rtol=0.02)
    assert (depth[0, 12:] == SKY_DEPTH).all()


def test_without_seen_depth_the_estimate_keeps_its_own_scale():
    depth = measure(torch.full((16, 24), torch.inf))
    assert (depth[1:] == 2.0).all()


def test_alignment_is_a_median_of_ratios():
    predicted = torch.full((4, 5), 2.0)
    known = torch.full((4, 5), 6.0)
    known[0, 0] = 1e6
    everywhere = torch.ones(4, 5, dtype=torch.bool)
    assert torch.allclose(align_depth(predicted, known, everywhere), torch.full((4, 5), 6.0))
    few = torch.zeros(4, 5, dtype=torch.bool)
    few[0] = True
    assert torch.equal(align_depth(predicted, known, few), predicted)


def test_field_of_view_gives_the_focal_length():
    k = intrinsics_from_fov(90.0, 480, 832)
    assert k[0, 0].item() == pytest.approx(416, abs=1e-3)
    assert 2 * math.degrees(math.atan(416 / k[0, 0].item())) == pytest.approx(90)


class Sloped:
    """An estimator in a unit of its own, ten times as small, without sky, tokens or a camera of its own."""

    def predict(self, images: torch.Tensor) -> DepthPrediction:
        b, _, h, w = images.shape
        depth = torch.linspace(0.1, 0.3, w).expand(b, h, w).clone()
        sky, fov = torch.zeros(b, h, w, dtype=torch.bool), torch.full((b,), 80.0)
        return DepthPrediction(depth, sky, torch.full((b, h, w), 0.5), fov, torch.zeros(b, 0, 1))


def test_combined_depth_has_the_shape_of_one_network_and_all_else_of_the_other():
    both = CombinedDepth(Sloped(), Flat()).predict(torch.zeros(2, 3, 16, 24))
    assert (both.depth[:, 0] == SKY_DEPTH).all() and both.sky[:, 0].all() and not both.sky[:, 1:].any()
    slope = torch.linspace(0.1, 0.3, 24)
    assert float(both.depth[0, 1:].median()) == pytest.approx(2.0, rel=0.1)
    torch.testing.assert_close(both.depth[0, 5] / both.depth[0, 5, 0], slope / slope[0])
    assert both.features.shape == (2, 1, 4) and (both.confidence == 0.5).all()
    assert (both.fov_x_deg == 80.0).all()
    own = CombinedDepth(Sloped(), Flat(), own_fov=True).predict(torch.zeros(2, 3, 16, 24))
    assert (own.fov_x_deg == 60.0).all()


def test_views_measured_together_are_anchored_in_what_is_seen():
    def together(images, cameras, seen):
        return Sloped().predict(images).depth

    cameras = Cameras(torch.eye(4).repeat(5, 1, 1), torch.eye(3).repeat(5, 1, 1), 16, 24)
    seen = torch.full((5, 16, 24), torch.inf)
    seen[:, :, :12] = 30 * torch.linspace(0.1, 0.3, 24)[:12]
    depth = SeenViewsDepth(together, Flat()).measure(torch.zeros(5, 3, 16, 24), cameras, seen)
    assert torch.equal(depth[:, :, :12], seen[:, :, :12])
    expected = 30 * torch.linspace(0.1, 0.3, 24)[12:]
    torch.testing.assert_close(depth[:, 1:, 12:], expected.expand(5, 15, 12), rtol=0.02, atol=0)
    assert (depth[:, 0, 12:] == SKY_DEPTH).all()


def test_an_estimate_of_nothing_stays_finite():
    seen = torch.full((1, 16, 24), torch.inf)
    seen[:, :, :12] = 5.0
    cameras = Cameras(torch.eye(4)[None], torch.eye(3)[None], 16, 24)
    measured = SeenViewsDepth(lambda images, cameras, seen: torch.zeros(1, 16, 24), Flat())
    assert measured.measure(torch.zeros(1, 3, 16, 24), cameras, seen).isfinite().all()
