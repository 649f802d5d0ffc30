"""Depth Anything 3 against the released network's outputs, its tensor counts and its files."""

import json
import logging
from dataclasses import replace

import pytest
import torch
from recipe import fill_depth_anything, views
from safetensors.torch import load_file

from lyra.geometry.rotations import axis_angle_to_matrix, rotation_angle, world_to_camera
from lyra.models.depth_anything import heads
from lyra.models.depth_anything.alignment import align_orientations, camera_centres, umeyama, umeyama_ransac
from lyra.models.depth_anything.backbone import reference_first, take_views
from lyra.models.depth_anything.camera import decode_cameras, encode_cameras, normalised_cameras
from lyra.models.depth_anything.config import (
    CONFIGS,
    SMALL,
    BackboneConfig,
    DepthAnythingConfig,
    NestedDepthAnythingConfig,
)
from lyra.models.depth_anything.gaussian_adapter import gaussian_cameras, to_gaussians
from lyra.models.depth_anything.metric import metric_depth, metric_scale, quantile, sky_at_the_back
from lyra.models.depth_anything.model import build, load_depth_anything, place
from lyra.models.depth_anything.names import unwrap_checkpoint
from tests.conftest import GOLDEN

WITH_GAUSSIANS = replace(SMALL, gaussian_head=True)
TINY = DepthAnythingConfig(BackboneConfig(64, 5, 4, (1, 2, 3, 4), 1, "swiglu"), 32, (8, 8, 16, 16))
TINY_METRIC = DepthAnythingConfig(BackboneConfig(64, 4, 4, (0, 1, 2, 3), None), 32, (8, 8, 16, 16))


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN / "depth_anything_3x56x84.safetensors")


@pytest.fixture(scope="module")
def golden_shapes():
    keys = json.loads((GOLDEN / "depth_anything_keys.json").read_text())
    return {name: tuple(shape) for name, shape in keys.items()}


@pytest.fixture(scope="module")
def model(golden_shapes):
    return load_depth_anything(WITH_GAUSSIANS, fill_depth_anything(golden_shapes))


@pytest.fixture(scope="module")
def posed(model):
    images, w2c, intrinsics = views(3, 56, 84, 0)
    with torch.no_grad():
        return model(images, w2c, intrinsics, gaussian_reduction=2)


def random_weights(config):
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in build(config).state_dict().items()}
    return fill_depth_anything(shapes)


def relative_error(value, expected):
    assert value.shape == expected.shape
    return float((value - expected).abs().max() / expected.abs().max())


def check_network(output, golden, case):
    assert relative_error(output.depth, golden[f"{case}.depth"]) < 1e-4
    assert relative_error(output.confidence, golden[f"{case}.depth_conf"]) < 1e-4
    assert relative_error(output.w2c[:, :, :3], golden[f"{case}.extrinsics"]) < 1e-4
    # Entry by entry, because a predicted field of view of 0 makes some of them huge.
    torch.testing.assert_close(output.intrinsics, golden[f"{case}.intrinsics"], rtol=1e-4, atol=0)


def test_views_without_cameras_give_the_released_depth_and_cameras(model, golden):
    with torch.no_grad():
        check_network(model(views(3, 56, 84, 0)[0]), golden, "unposed")


def test_views_with_cameras_give_the_released_depth_and_cameras(posed, golden):
    check_network(posed, golden, "posed_aligned")
    check_network(posed, golden, "posed_input_cameras")


@pytest.mark.parametrize(("case", "use_predicted"), [("posed_aligned", True), ("posed_input_cameras", False)])
def test_gaussians_have_every_released_attribute_in_both_camera_modes(posed, golden, case, use_predicted):
    _, w2c, intrinsics = views(3, 56, 84, 0)
    cameras = gaussian_cameras(w2c[0], posed.w2c[0], use_predicted=use_predicted)
    scene = to_gaussians(posed.raw_gaussians[0], posed.depth[0], cameras, intrinsics[0])
    assert posed.raw_gaussians.shape == (1, 3, 28, 42, 38)
    assert relative_error(scene.means, golden[f"{case}.means"][0]) < 1e-4
    assert relative_error(scene.scales, golden[f"{case}.scales"][0]) < 1e-4
    assert relative_error(scene.opacities, golden[f"{case}.opacities"][0]) < 1e-4
    assert relative_error(scene.quats, golden[f"{case}.rotations"][0]) < 1e-4
    assert relative_error(scene.sh.transpose(1, 2), golden[f"{case}.harmonics"][0]) < 1e-4


def test_the_largest_gaussian_scale_can_be_raised(posed):
    _, w2c, intrinsics = views(3, 56, 84, 0)
    cameras = gaussian_cameras(w2c[0], posed.w2c[0])
    pair = [
        to_gaussians(posed.raw_gaussians[0], posed.depth[0], cameras, intrinsics[0], scale_multiplier=m).scales
        for m in (1.0, 2.0)
    ]
    torch.testing.assert_close(pair[1] / pair[0], torch.full_like(pair[0], 2.0), rtol=1e-3, atol=0)


def test_heads_do_not_depend_on_how_many_views_they_take_at_once(model, posed, monkeypatch):
    monkeypatch.setattr(heads, "VIEWS_AT_ONCE", 2)
    images, w2c, intrinsics = views(3, 56, 84, 0)
    with torch.no_grad():
        again = model(images, w2c, intrinsics, gaussian_reduction=2)
    torch.testing.assert_close(again.depth, posed.depth, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(again.raw_gaussians, posed.raw_gaussians, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "tensors", "millions"),
    [
        ("nested-giant-large", 1383, 1689.8),
        ("giant", 977, 1355.7),
        ("large", 643, 410.9),
        ("base", 443, 135.4),
        ("small", 443, 34.3),
        ("mono-large", 406, 334.2),
        ("metric-large", 406, 334.2),
    ],
)
def test_released_layouts_have_the_released_number_of_tensors(name, tensors, millions):
    with torch.device("meta"):
        network = build(CONFIGS[name])
    assert len(network.state_dict()) == tensors
    assert round(sum(p.numel() for p in network.parameters()) / 1e6, 1) == millions


def test_the_nested_network_has_the_released_groups():
    with torch.device("meta"):
        names = list(build(CONFIGS["nested-giant-large"]).state_dict())
    groups = {
        "da3.backbone.pretrained.": 675,
        "da3.head.": 162,
        "da3.cam_enc.": 64,
        "da3.cam_dec.": 10,
        "da3.gs_head.": 66,
        "da3_metric.backbone.pretrained.": 342,
        "da3_metric.head.": 64,
    }
    assert {group: sum(name.startswith(group) for name in names) for group in groups} == groups


def test_parameter_names_and_shapes_are_the_released_ones(golden_shapes):
    with torch.device("meta"):
        network = build(WITH_GAUSSIANS)
    assert {name: tuple(p.shape) for name, p in network.named_parameters()} == golden_shapes


def test_a_released_torch_file_loads_without_its_second_entry(tmp_path, caplog):
    weights = random_weights(TINY)
    path = tmp_path / "model.pt"
    wrapped = {f"model.{name}": tensor for name, tensor in weights.items()}
    torch.save({"module": wrapped, "ema": {"model.backbone.shadow": torch.zeros(3)}, "step": 7}, path)
    contents = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    with caplog.at_level(logging.INFO):
        network = load_depth_anything(TINY, unwrap_checkpoint(contents))
    assert "ema" in caplog.text and "step" in caplog.text
    assert not any(parameter.is_meta or parameter.requires_grad for parameter in network.parameters())
    assert torch.equal(network.cam_dec.fc_t.weight, weights["cam_dec.fc_t.weight"])
    image = torch.randn(1, 2, 3, 28, 42, generator=torch.Generator().manual_seed(0))
    assert network(image).depth.shape == (1, 2, 28, 42)


def test_other_wrappings_load_too():
    weights = random_weights(TINY_METRIC)
    flat = {f"model.{name}": tensor for name, tensor in weights.items()}
    for contents in ({"model": flat}, flat, weights):
        unwrapped = unwrap_checkpoint(contents)
        assert unwrapped.keys() == weights.keys()


def test_a_shared_norm_may_be_in_the_file_once_or_four_times():
    weights = random_weights(TINY)
    once = {name: t for name, t in weights.items() if not any(f"conv2_aux.{k}.2." in name for k in (1, 2, 3))}
    assert len(weights) - len(once) == 6
    assert len(load_depth_anything(TINY, once).state_dict()) == len(load_depth_anything(TINY, weights).state_dict())


def test_weights_that_do_not_fit_are_refused_by_name():
    weights = random_weights(TINY)
    weights["head.norm.weight"] = torch.zeros(5)
    weights["head.extra"] = torch.zeros(1)
    del weights["cam_dec.fc_t.bias"]
    with pytest.raises(ValueError, match="3 weights") as refusal:
        load_depth_anything(TINY, weights)
    for name in ("head.norm.weight", "head.extra", "cam_dec.fc_t.bias"):
        assert name in str(refusal.value)


@pytest.mark.parametrize(
    "contents",
    [{"module": 3}, {"model.a": torch.zeros(1), "b": "text"}, {"model.a": torch.zeros(1), "a": torch.zeros(1)}],
)
def test_contents_that_are_no_state_dict_are_refused(contents):
    with pytest.raises(ValueError):
        unwrap_checkpoint(contents)


def test_only_the_backbone_leaves_float32(golden_shapes, posed):
    network = load_depth_anything(WITH_GAUSSIANS, fill_depth_anything(golden_shapes))
    place(network, torch.device("cpu"), torch.bfloat16)
    block = network.backbone.pretrained.blocks[5]
    assert block.attn.qkv.weight.dtype == block.mlp.fc1.weight.dtype == torch.bfloat16
    assert block.norm1.weight.dtype == network.backbone.pretrained.pos_embed.dtype == torch.float32
    assert {p.dtype for part in (network.head, network.cam_enc, network.cam_dec) for p in part.parameters()} == {
        torch.float32
    }
    with torch.no_grad():
        output = network(*views(3, 56, 84, 0))
    assert output.depth.dtype == torch.float32
    error = (output.depth / posed.depth).log().abs().mean()
    assert 0 < error < 0.02


def test_bad_input_is_refused(model):
    images, w2c, intrinsics = views(2, 56, 84, 0)
    with pytest.raises(ValueError, match="multiples of 14"):
        model(images[..., :50, :])
    with pytest.raises(ValueError, match="both"):
        model(images, w2c)
    with pytest.raises(ValueError, match="both"):
        model(images, intrinsics=intrinsics)
    with pytest.raises(ValueError, match="Gaussian head"):
        load_depth_anything(TINY, random_weights(TINY))(images, gaussian_reduction=1)


def test_the_most_average_view_comes_first_and_the_order_can_be_undone():
    generator = torch.Generator().manual_seed(0)
    special = torch.randn(2, 5, 16, generator=generator)
    order = reference_first(special)
    assert all(sorted(row) == list(range(5)) for row in order.tolist())
    assert all(row[1:] == sorted(row[1:]) for row in order.tolist())
    x = torch.randn(2, 5, 3, 4, generator=generator)
    assert torch.equal(take_views(take_views(x, order), order.argsort(dim=1)), x)
    # A view like all the others in one crowd, with outliers on both sides in norm, is the average one.
    crowd = torch.stack([torch.tensor([1.0, 0.0]), torch.tensor([2.0, 1.0]), torch.tensor([6.0, 6.0])])[None]
    assert reference_first(crowd)[0, 0] == 1


def test_told_cameras_do_not_depend_on_the_worlds_frame_and_unit():
    w2c = views(5, 14, 14, 0)[1]
    turn = torch.eye(4)
    turn[:3, :3] = axis_angle_to_matrix(torch.tensor([0.3, -0.8, 0.2]))
    turn[:3, 3] = torch.tensor([3.0, -1.0, 2.0])
    moved = w2c @ turn
    larger = w2c.clone()
    larger[..., :3, 3] *= 7
    told = normalised_cameras(w2c)
    torch.testing.assert_close(told[0, 0], torch.eye(4))
    assert told[0, :, :3, 3].norm(dim=-1).median() == pytest.approx(1)
    torch.testing.assert_close(normalised_cameras(moved), told, rtol=0, atol=1e-5)
    torch.testing.assert_close(normalised_cameras(larger), told, rtol=0, atol=1e-5)


def test_near_cameras_are_not_blown_up():
    w2c = torch.eye(4).repeat(1, 3, 1, 1)
    w2c[0, :, 0, 3] = torch.tensor([0.0, 0.01, 0.02])
    torch.testing.assert_close(normalised_cameras(w2c)[0, :, 0, 3], torch.tensor([0.0, 0.1, 0.2]))


def test_encoded_cameras_decode_to_themselves():
    _, w2c, intrinsics = views(4, 56, 84, 0)
    decoded, k = decode_cameras(encode_cameras(w2c, intrinsics, 56, 84), 56, 84)
    torch.testing.assert_close(decoded, w2c, rtol=0, atol=1e-5)
    torch.testing.assert_close(k, intrinsics, rtol=1e-5, atol=0)


def camera_path(count=12):
    generator = torch.Generator().manual_seed(1)
    rotation = axis_angle_to_matrix(0.3 * torch.randn(count, 3, generator=generator))
    return world_to_camera(rotation, torch.randn(count, 3, generator=generator))


def as_predicted(w2c, rotation, translation, scale):
    """Cameras of the same places in a world in which x is scale R x + t."""
    own = w2c[:, :3, :3].transpose(1, 2)
    centres = scale * camera_centres(w2c).float() @ rotation.T + translation
    return world_to_camera((rotation @ own).transpose(1, 2), centres)


def test_a_similarity_between_camera_paths_is_found_and_undone():
    given, turn = camera_path(), axis_angle_to_matrix(torch.tensor([0.5, 1.0, -0.2]))
    predicted = as_predicted(given, turn, torch.tensor([1.0, 2.0, 3.0]), 2.5)
    for fit in (
        umeyama(camera_centres(given), camera_centres(predicted)),
        umeyama_ransac(camera_centres(given), camera_centres(predicted)),
        align_orientations(given, predicted),
    ):
        assert fit.scale == pytest.approx(2.5, rel=1e-5)
        torch.testing.assert_close(fit.undo(predicted), given, rtol=0, atol=1e-5)


def test_views_that_do_not_fit_are_left_out():
    given = camera_centres(camera_path())
    predicted = 2.5 * given
    predicted[3] += 40.0
    assert umeyama(given, predicted).scale != pytest.approx(2.5, rel=0.05)
    assert umeyama_ransac(given, predicted).scale == pytest.approx(2.5, rel=1e-6)


def test_orientations_keep_up_upright_on_a_straight_path():
    given = torch.eye(4).repeat(6, 1, 1)
    given[:, 2, 3] = -torch.arange(6.0)
    turn = axis_angle_to_matrix(torch.tensor([0.4, 0.3, 1.0]))
    predicted = as_predicted(given, turn, torch.zeros(3), 1.7)
    fit = align_orientations(given, predicted)
    assert rotation_angle(fit.rotation.float(), turn) < 1e-3
    assert fit.scale == pytest.approx(1.7, rel=1e-5)
    assert umeyama(camera_centres(given), camera_centres(predicted)).scale == pytest.approx(1.7, rel=1e-5)


def test_still_cameras_have_no_scale():
    still = torch.eye(4).repeat(3, 1, 1)
    for align in (lambda a, b: umeyama(camera_centres(a), camera_centres(b)), align_orientations):
        with pytest.raises(ValueError, match="do not move"):
            align(still, camera_path(3))


def test_the_metric_network_gives_the_unit():
    generator = torch.Generator().manual_seed(0)
    own = 1 + torch.rand(1, 2, 20, 30, generator=generator)
    raw = own * 0.5
    raw[..., :5, :] = 9.0
    confidence = 1 + torch.rand(own.shape, generator=generator)
    confidence[..., 5:7, :] = 1.0
    raw[..., 5:7, :] = 30.0
    intrinsics = torch.diag(torch.tensor([500.0, 700.0, 1.0])).expand(1, 2, 3, 3)
    sky = torch.zeros(own.shape, dtype=torch.bool)
    sky[..., :5, :] = True
    scale = metric_scale(own, confidence, metric_depth(raw, intrinsics), sky)
    assert float(scale) == pytest.approx(0.5 * 600 / 300, rel=1e-5)


def test_nothing_but_sky_keeps_the_unit_and_says_so(caplog):
    depth = torch.ones(1, 1, 8, 8)
    sky = torch.ones(1, 1, 8, 8, dtype=torch.bool)
    assert metric_scale(depth, depth, depth, sky) == 1
    assert "sky" in caplog.text
    assert torch.equal(sky_at_the_back(depth, sky), depth)


def test_the_sky_is_behind_almost_everything():
    depth = torch.rand(1, 2, 30, 40, generator=torch.Generator().manual_seed(0))
    sky = depth < 0.2
    moved = sky_at_the_back(depth, sky)
    expected = torch.quantile(depth[~sky], 0.99)
    torch.testing.assert_close(moved[sky], expected.expand_as(moved[sky]))
    assert torch.equal(moved[~sky], depth[~sky])
    assert sky_at_the_back(depth, sky, 0.5)[sky].max() == 0.5
    torch.testing.assert_close(quantile(depth.flatten(), 0.37), torch.quantile(depth, 0.37))


def test_the_nested_network_is_in_metres_and_keeps_its_own_unit_beside():
    config = NestedDepthAnythingConfig(TINY, TINY_METRIC)
    network = load_depth_anything(config, random_weights(config))
    images, w2c, intrinsics = views(3, 56, 84, 0)
    with torch.no_grad():
        output = network(images, w2c, intrinsics)
        own = network.da3(images, w2c, intrinsics)
    torch.testing.assert_close(output.own.depth, own.depth)
    ratio = (output.depth / own.depth)[output.sky < 0.3]
    torch.testing.assert_close(ratio, ratio.median().expand_as(ratio), rtol=1e-4, atol=0)
    torch.testing.assert_close(output.w2c[..., :3, 3], own.w2c[..., :3, 3] * ratio.median(), rtol=1e-4, atol=1e-6)
