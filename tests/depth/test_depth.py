"""Depth: alignment, what memory shows is kept, and the shipped network beats a prior on an unseen world."""

import math

import pytest
import torch

from lyra.depth.base import SKY_DEPTH, DepthPrediction, align_depth, intrinsics_from_fov
from lyra.depth.walk import SeenDepth
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
