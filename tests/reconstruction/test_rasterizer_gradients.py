"""The rasteriser that trains: values and gradients of its slow twin."""

import pytest
import torch

from lyra.reconstruction.rasterizer import render
from lyra.reconstruction.rasterizer_gradients import render_with_gradients
from lyra.reconstruction.rasterizer_reference import render_slowly
from lyra.types import GaussianScene

HEIGHT, WIDTH = 33, 47
K = torch.tensor([[40.0, 0, 23.0], [0, 42.0, 15.5], [0, 0, 1]])


def cloud(count: int, size: float, seed: int) -> list[torch.Tensor]:
    """Fields of random Gaussians before the camera, some beside the image."""
    g = torch.Generator().manual_seed(seed)
    means = torch.randn(count, 3, generator=g) + torch.tensor([0.0, 0.0, 4.0])
    scales = size * (0.1 + torch.rand(count, 3, generator=g))
    opacities = 0.02 + 0.97 * torch.rand(count, generator=g)
    sh = torch.randn(count, 1, 3, generator=g)
    return [means, torch.randn(count, 4, generator=g), scales, opacities, sh]


@pytest.mark.parametrize(("count", "size"), [(60, 0.4), (150, 0.05), (12, 3.0)])
def test_gradients_are_those_of_the_slow_twin(count, size):
    g = torch.Generator().manual_seed(1)
    of_colours, of_depth, of_alpha = (torch.randn(n, HEIGHT, WIDTH, generator=g) for n in (3, 1, 1))
    found = []
    for way in (render_slowly, render_with_gradients):
        fields = [field.clone().requires_grad_() for field in cloud(count, size, 0)]
        view = way(GaussianScene(*fields), torch.eye(4), K, HEIGHT, WIDTH)
        # The slow twin bounds colours at 1, where it has no gradient.
        inside = (view.colours < 0.999).detach()
        loss = (view.colours * of_colours * inside).sum() + (view.depth * of_depth[0]).sum()
        (loss + (view.alpha * of_alpha[0]).sum()).backward()
        found.append([view.depth.detach(), view.alpha.detach(), *(field.grad for field in fields)])
    for expected, actual in zip(*found, strict=True):
        assert expected.abs().max() > 0
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_it_shows_what_the_fast_renderer_shows():
    scene = GaussianScene(*cloud(400, 0.1, 3))
    fast = render(scene, torch.eye(4), K, HEIGHT, WIDTH)
    view = render_with_gradients(scene, torch.eye(4), K, HEIGHT, WIDTH)
    torch.testing.assert_close(view.colours.clamp(max=1), fast.colours, rtol=0, atol=2e-4)
    torch.testing.assert_close(view.alpha, fast.alpha, rtol=0, atol=2e-4)


def test_a_scene_behind_the_camera_is_black_and_has_no_gradient():
    fields = cloud(20, 0.2, 0)
    fields[0] = fields[0] - torch.tensor([0.0, 0.0, 20.0])
    fields = [field.requires_grad_() for field in fields]
    view = render_with_gradients(GaussianScene(*fields), torch.eye(4), K, HEIGHT, WIDTH)
    assert float(view.alpha.detach().max()) == 0
    view.colours.sum().backward()
    assert all(field.grad is None or float(field.grad.abs().sum()) == 0 for field in fields)


def test_a_wrong_colour_is_learnt_away():
    fields = cloud(80, 0.3, 5)
    truth = render_with_gradients(GaussianScene(*fields), torch.eye(4), K, HEIGHT, WIDTH).colours
    sh = torch.zeros_like(fields[4]).requires_grad_()
    optimizer, errors = torch.optim.Adam([sh], lr=0.1), []
    for _ in range(60):
        scene = GaussianScene(*fields[:4], sh)
        error = (render_with_gradients(scene, torch.eye(4), K, HEIGHT, WIDTH).colours - truth).square().mean()
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        errors.append(error.item())
    assert errors[-1] < 0.05 * errors[0]
