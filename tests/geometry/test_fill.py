"""Push-pull filling: known pixels stay, unknown ones continue them, whatever the sizes."""

import pytest
import torch

from lyra.geometry.fill import fill_unseen


@pytest.mark.parametrize(("height", "width"), [(16, 24), (15, 37), (1, 9), (128, 224)])
def test_known_pixels_stay_and_a_constant_is_continued_everywhere(height, width):
    image = torch.full((1, 3, height, width), 0.7)
    seen = torch.zeros(1, height, width, dtype=torch.bool)
    seen[:, :, : max(1, width // 5)] = True
    filled = fill_unseen(image * seen[:, None], seen)
    assert torch.allclose(filled, image, atol=1e-4)


def test_a_hole_takes_the_colour_of_its_nearer_side():
    image = torch.zeros(1, 1, 32, 64)
    image[..., 32:] = 1.0
    seen = torch.ones(1, 32, 64, dtype=torch.bool)
    seen[..., 24:40] = False
    filled = fill_unseen(image * seen[:, None], seen)
    assert filled[..., 25].max() < 0.4
    assert filled[..., 38].min() > 0.6
    assert torch.equal(filled[..., :24], image[..., :24])
