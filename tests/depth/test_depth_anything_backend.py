"""Depth Anything 3 behind the project's two depth protocols, and the resizing before it."""

from dataclasses import replace

import pytest
import torch
from recipe import fill_depth_anything, views

from lyra.depth.depth_anything import DepthAnythingDepth, is_still, keep_apart
from lyra.errors import UserError
from lyra.geometry.rotations import axis_angle_to_matrix
from lyra.models.depth_anything.config import CONFIGS, BackboneConfig, DepthAnythingConfig, NestedDepthAnythingConfig
from lyra.models.depth_anything.model import build, load_depth_anything
from lyra.models.depth_anything.preprocess import nearest_multiple, prepare_pixels, resize_area, resize_cubic, to_bytes
from lyra.models.depth_anything_folder import published_config
from lyra.types import Cameras

ANY_VIEW = DepthAnythingConfig(BackboneConfig(64, 5, 4, (1, 2, 3, 4), 1), 32, (8, 8, 16, 16))
MONO = DepthAnythingConfig(BackboneConfig(64, 4, 4, (0, 1, 2, 3), None), 32, (8, 8, 16, 16))
NESTED = NestedDepthAnythingConfig(ANY_VIEW, MONO)
HEIGHT, WIDTH = 60, 90  # Neither is a multiple of 14.


def backend(config):
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in build(config).state_dict().items()}
    weights = fill_depth_anything(shapes)
    for name in weights:
        # Fields of view near one radian: random ones are 0 half of the time, which makes focal lengths absurd.
        if "fc_fov" in name:
            weights[name] = torch.ones_like(weights[name]) if name.endswith("bias") else 0.1 * weights[name]
    model = load_depth_anything(config, weights)
    return DepthAnythingDepth(model, config, torch.device("cpu"))


@pytest.fixture(scope="module")
def nested():
    return backend(NESTED)


def frames(count):
    noise = torch.rand(count, 3, HEIGHT // 10, WIDTH // 10, generator=torch.Generator().manual_seed(count)) * 2 - 1
    return torch.nn.functional.interpolate(noise, (HEIGHT, WIDTH), mode="bilinear")


def path(count, scale=1.0):
    _, w2c, intrinsics = views(count, HEIGHT, WIDTH, 0)
    w2c = w2c[0].clone()
    w2c[:, :3, 3] *= scale
    return Cameras(w2c, intrinsics[0], HEIGHT, WIDTH)


def unseen(count):
    return torch.full((count, HEIGHT, WIDTH), torch.inf)


@pytest.mark.parametrize("config", [NESTED, ANY_VIEW, MONO], ids=["nested", "any-view", "mono"])
def test_a_prediction_has_the_images_size_and_range(config):
    prediction = backend(config).predict(frames(2))
    assert prediction.depth.shape == prediction.sky.shape == prediction.confidence.shape == (2, HEIGHT, WIDTH)
    assert prediction.depth.isfinite().all() and (prediction.depth > 0).all() and (prediction.depth <= 1e4).all()
    assert prediction.sky.dtype == torch.bool
    assert (prediction.confidence > 0).all() and (prediction.confidence <= 1).all()
    assert prediction.fov_x_deg.shape == (2,)
    assert (prediction.fov_x_deg > 0).all() and (prediction.fov_x_deg < 180).all()
    assert prediction.features.shape == (2, 0, 1)


def test_only_networks_that_tell_see_sky(nested):
    bias = nested.model.da3_metric.head.scratch.sky_output_conv2[2].bias
    before = bias.clone()
    try:
        bias.fill_(20.0)
        assert nested.predict(frames(1)).sky.all()
        bias.fill_(-20.0)
        assert not nested.predict(frames(1)).sky.any()
    finally:
        bias.copy_(before)
    assert not backend(ANY_VIEW).predict(frames(1)).sky.any()


def test_each_image_is_predicted_alone(nested):
    images = frames(3)
    together, alone = nested.predict(images), nested.predict(images[1:2])
    torch.testing.assert_close(together.depth[1:2], alone.depth)
    torch.testing.assert_close(together.fov_x_deg[1:2], alone.fov_x_deg)


@pytest.mark.parametrize("count", [4, 11], ids=["all-views", "without-outliers"])
def test_measured_depth_is_in_the_units_of_the_cameras(nested, count):
    images = frames(count)
    depth = nested.measure(images, path(count), unseen(count))
    larger = nested.measure(images, path(count, scale=3.0), unseen(count))
    assert depth.shape == (count, HEIGHT, WIDTH)
    assert depth.max() < 1e3
    torch.testing.assert_close(larger, 3 * depth, rtol=1e-3, atol=0)


def test_measured_depth_does_not_depend_on_the_worlds_frame(nested):
    turn = torch.eye(4)
    turn[:3, :3] = axis_angle_to_matrix(torch.tensor([0.2, 1.0, -0.4]))
    turn[:3, 3] = torch.tensor([5.0, -2.0, 1.0])
    cameras = path(4)
    moved = Cameras(cameras.w2c @ turn, cameras.intrinsics, HEIGHT, WIDTH)
    depth = nested.measure(frames(4), cameras, unseen(4))
    torch.testing.assert_close(nested.measure(frames(4), moved, unseen(4)), depth, rtol=1e-3, atol=0)


def test_seen_depth_plays_no_part_while_the_cameras_move(nested):
    depth = nested.measure(frames(3), path(3), unseen(3))
    assert torch.equal(nested.measure(frames(3), path(3), torch.full((3, HEIGHT, WIDTH), 7.0)), depth)


def test_cameras_change_what_is_measured(nested):
    depth = nested.measure(frames(3), path(3), unseen(3))
    cameras = path(3)
    turned = Cameras(cameras.w2c.flip(0), cameras.intrinsics, HEIGHT, WIDTH)
    assert not torch.allclose(nested.measure(frames(3), turned, unseen(3)), depth, rtol=1e-2)


@pytest.mark.parametrize("count", [1, 3, 12])
def test_still_cameras_take_their_scale_from_what_is_seen(nested, count):
    cameras = path(count, scale=0.0)
    assert is_still(cameras.w2c)
    own = nested.measure(frames(count), cameras, unseen(count))
    assert own.isfinite().all() and own.max() < 1e3
    seen = unseen(count)
    seen[:, :20] = 5 * own[:, :20]
    scaled = nested.measure(frames(count), cameras, seen)
    torch.testing.assert_close(scaled, 5 * own, rtol=1e-4, atol=0)


def test_still_cameras_are_moved_by_a_millionth_of_a_unit():
    w2c = path(5, scale=0.0).w2c.double()
    centres = -(keep_apart(w2c)[:, :3, :3].transpose(1, 2) @ keep_apart(w2c)[:, :3, 3:])[..., 0]
    assert centres.norm(dim=1).max() == pytest.approx(1e-6, rel=1e-2)
    assert (centres[1:, 0] > centres[:-1, 0]).all()
    assert not is_still(path(3).w2c)


def straight_path(step):
    w2c = torch.eye(4).repeat(12, 1, 1)
    w2c[:, 2, 3] = -step * torch.arange(12)
    return Cameras(w2c, path(12).intrinsics, HEIGHT, WIDTH)


def test_a_straight_path_has_a_scale(nested):
    depth = nested.measure(frames(12), straight_path(0.2), unseen(12))
    doubled = nested.measure(frames(12), straight_path(0.4), unseen(12))
    torch.testing.assert_close(doubled, 2 * depth, rtol=1e-3, atol=0)


def test_two_views_are_enough(nested):
    depth = nested.measure(frames(2), path(2), unseen(2))
    assert depth.isfinite().all() and (depth > 0).all() and depth.max() < 1e3


def test_a_monocular_network_refuses_cameras():
    with pytest.raises(ValueError, match="monocular"):
        backend(MONO).measure(frames(2), path(2), unseen(2))


@pytest.mark.parametrize("size", [(60, 90), (1200, 1800)], ids=["enlarged", "shrunk"])
def test_a_network_with_a_resolution_sees_every_image_at_it(size):
    network = replace(backend(ANY_VIEW), resolution=126)
    sizes = []
    with network.model.register_forward_pre_hook(lambda module, inputs: sizes.append(tuple(inputs[0].shape[-2:]))):
        prediction = network.predict(torch.nn.functional.interpolate(frames(1), size))
        cameras = path(2).resized(*size)
        depth = network.measure(
            torch.nn.functional.interpolate(frames(2), size), cameras, torch.full((2, *size), torch.inf)
        )
    assert sizes == [(84, 126), (84, 126)]
    assert prediction.depth.shape == (1, *size) and depth.shape == (2, *size) and depth.isfinite().all()


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("da3-small", "small"),
        ("DA3-BASE", "base"),
        ("da3-large", "large"),
        ("da3-giant", "giant"),
        ("da3mono-large", "mono-large"),
        ("da3metric-large", "metric-large"),
        ("da3nested-giant-large", "nested-giant-large"),
    ],
)
def test_a_published_name_alone_gives_the_sizes(name, layout):
    assert published_config({"model_name": name}) == CONFIGS[layout]


def test_published_entries_that_change_no_shape_must_be_of_the_named_network():
    giant = {"net": {"out_layers": [19, 27, 33, 39], "alt_start": 13}}
    metric = {"net": {"out_layers": [4, 11, 17, 23], "alt_start": -1}}
    nested = {"model_name": "da3nested-giant-large", "config": {"anyview": giant, "metric": metric}}
    assert published_config(nested) == CONFIGS["nested-giant-large"]
    assert published_config({"model_name": "da3mono-large", "config": metric}) == CONFIGS["mono-large"]
    for config in ({"anyview": metric, "metric": metric}, {"anyview": giant, "metric": giant}):
        with pytest.raises(UserError, match="layers are of another network"):
            published_config(nested | {"config": config})
    with pytest.raises(UserError, match="sizes may be: nested-giant-large"):
        published_config({"model_name": "da2-small"})


def area_by_hand(pixels, height, width):
    """Each target pixel as the mean over the rectangle that it covers, cell by cell."""
    source = pixels.double()
    out = torch.zeros(height, width, dtype=torch.float64)
    tall, wide = source.shape[0] / height, source.shape[1] / width
    for r in range(height):
        for c in range(width):
            total = 0.0
            for y in range(int(r * tall), min(source.shape[0], int((r + 1) * tall) + 1)):
                for x in range(int(c * wide), min(source.shape[1], int((c + 1) * wide) + 1)):
                    covered_y = max(0.0, min((r + 1) * tall, y + 1) - max(r * tall, y))
                    covered_x = max(0.0, min((c + 1) * wide, x + 1) - max(c * wide, x))
                    total += covered_y * covered_x * float(source[y, x])
            out[r, c] = total / (tall * wide)
    return out


@pytest.mark.parametrize("size", [(14, 28), (20, 31), (21, 32), (23, 16)])
def test_area_resizing_is_the_mean_over_what_a_pixel_covers(size):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (1, 3, 23, 33), generator=generator, dtype=torch.uint8)
    resized = resize_area(pixels, size)
    for channel in range(3):
        by_hand = area_by_hand(pixels[0, channel], *size)
        assert (resized[0, channel].double() - by_hand).abs().max() <= 0.501


def test_halving_rounds_half_up():
    pixels = torch.tensor([[0, 1], [1, 0]], dtype=torch.uint8).expand(1, 3, 2, 2)
    assert resize_area(pixels, (1, 1)).flatten().tolist() == [1, 1, 1]


def test_enlarging_overshoots_as_a_cubic_of_minus_three_quarters_does():
    row = torch.tensor([100, 100, 100, 200, 200, 200], dtype=torch.uint8).expand(1, 3, 4, 6)
    # A quarter of a pixel beside a sample the four weights are -27/256, 225/256, 67/256 and -9/256.
    assert resize_cubic(row, (4, 12))[0, 0, 0, 4:8].tolist() == [89, 123, 177, 211]


@pytest.mark.parametrize(
    ("side", "expected"), [(480, 476), (832, 826), (448, 448), (768, 770), (7, 14), (21, 28), (20, 14), (3, 14)]
)
def test_sides_become_the_nearest_multiple_of_14(side, expected):
    assert nearest_multiple(side) == expected


def test_pictures_are_resized_and_normalised():
    pixels = torch.full((2, 3, 100, 150), 255, dtype=torch.uint8)
    assert prepare_pixels(pixels).shape == (2, 3, 98, 154)
    assert prepare_pixels(pixels, 75).shape == (2, 3, 56, 70)
    assert prepare_pixels(pixels, 56, "lower").shape == (2, 3, 56, 84)
    assert prepare_pixels(pixels, 300).shape == (2, 3, 196, 294)
    white = prepare_pixels(pixels)[0, :, 0, 0]
    torch.testing.assert_close(white, torch.tensor([0.515 / 0.229, 0.544 / 0.224, 0.594 / 0.225]))


def test_bytes_round_half_up_and_stay_in_range():
    assert to_bytes(torch.tensor([-2.0, -1.0, 0.0, 1.0, 3.0])).tolist() == [0, 0, 128, 255, 255]
    assert torch.equal(to_bytes(torch.arange(256) / 127.5 - 1), torch.arange(256, dtype=torch.uint8))
