"""Similarities: they form a group, and points, cameras and Gaussians move together under them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lyra.geometry.cameras import project
from lyra.geometry.rotations import axis_angle_to_matrix, quaternion_to_matrix, rotation_angle, world_to_camera
from lyra.models.depth_anything.alignment import camera_centres, nearest_rotation
from lyra.reconstruction.sim3 import (
    Sim3,
    align_cameras,
    mean_rotation,
    turned_harmonics,
    weighted_umeyama,
)
from lyra.types import Cameras, GaussianScene

number = st.floats(-3, 3)
vector = st.tuples(number, number, number).map(lambda v: torch.tensor(v, dtype=torch.float64))
similarities = st.builds(
    lambda scale, turn, move: Sim3(scale, axis_angle_to_matrix(turn), move), st.floats(0.1, 10), vector, vector
)


def points(count=20, seed=0):
    return torch.randn(count, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def path(count=8, seed=1):
    turns = axis_angle_to_matrix(0.4 * points(count, seed))
    return world_to_camera(turns, points(count, seed + 1))


def straight_path(count=8):
    """A drive along z, as on a zoom-out."""
    w2c = torch.eye(4, dtype=torch.float64).repeat(count, 1, 1)
    w2c[:, 2, 3] = -0.5 * torch.arange(count)
    return w2c


def scene(count=20, harmonics=1):
    draw = torch.Generator().manual_seed(3)
    return GaussianScene(
        means=points(count),
        quats=torch.nn.functional.normalize(torch.randn(count, 4, generator=draw, dtype=torch.float64), dim=-1),
        scales=torch.rand(count, 3, generator=draw, dtype=torch.float64) + 0.1,
        opacities=torch.rand(count, generator=draw, dtype=torch.float64),
        sh=torch.randn(count, harmonics, 3, generator=draw, dtype=torch.float64),
    )


def covariances(gaussians):
    axes = quaternion_to_matrix(gaussians.quats) * gaussians.scales[:, None]
    return axes @ axes.transpose(1, 2)


def same(a, b):
    assert a.scale == pytest.approx(b.scale, rel=1e-9)
    torch.testing.assert_close(a.rotation, b.rotation, rtol=0, atol=1e-9)
    torch.testing.assert_close(a.translation, b.translation, rtol=1e-9, atol=1e-7)


@settings(deadline=None, max_examples=40)
@given(similarities, similarities, similarities)
def test_similarities_are_a_group(a, b, c):
    same(a.after(b).after(c), a.after(b.after(c)))
    same(a.after(a.inverse()), Sim3.identity())
    same(a.inverse().after(a), Sim3.identity())
    torch.testing.assert_close(
        a.after(b).apply_to_points(points()), a.apply_to_points(b.apply_to_points(points())), rtol=1e-9, atol=1e-7
    )


@settings(deadline=None, max_examples=40)
@given(similarities)
def test_moved_cameras_see_moved_points_at_the_same_pixels_as_far_as_the_scale_says(sim3):
    intrinsics = torch.tensor([[50.0, 0, 31.5], [0, 50.0, 23.5], [0, 0, 1]], dtype=torch.float64)
    cameras = Cameras(path(), intrinsics.expand(8, 3, 3), 48, 64)
    moved = sim3.apply_to_cameras(cameras)
    torch.testing.assert_close(
        camera_centres(moved.w2c), sim3.apply_to_points(camera_centres(cameras.w2c)), rtol=1e-9, atol=1e-7
    )
    for before, after in zip(cameras.w2c, moved.w2c, strict=True):
        pixels, depth = project(points(), before, intrinsics)
        pixels_after, depth_after = project(sim3.apply_to_points(points()), after, intrinsics)
        torch.testing.assert_close(depth_after, sim3.scale * depth, rtol=1e-8, atol=1e-7)
        clear = depth.abs() > 0.1
        torch.testing.assert_close(pixels_after[clear], pixels[clear], rtol=1e-4, atol=1e-3)


@settings(deadline=None, max_examples=40)
@given(similarities)
def test_gaussians_keep_their_shape_and_are_turned_and_scaled(sim3):
    before, after = scene(), sim3.apply_to_scene(scene())
    expected = sim3.scale**2 * sim3.rotation @ covariances(before) @ sim3.rotation.T
    torch.testing.assert_close(covariances(after), expected, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(after.means, sim3.apply_to_points(before.means))
    assert torch.equal(after.opacities, before.opacities) and torch.equal(after.sh, before.sh)
    torch.testing.assert_close(after.quats.norm(dim=-1), torch.ones(len(after), dtype=torch.float64))


def harmonic_basis(d):
    """The real harmonics of degree 2 of 3D Gaussian splatting, without their constants."""
    x, y, z = d.unbind(-1)
    second = [x * y, -y * z, (2 * z * z - x * x - y * y) / 12**0.5, -x * z, (x * x - y * y) / 2]
    return torch.stack([torch.ones_like(x), -y, z, -x, *second], dim=-1)


@settings(deadline=None, max_examples=20)
@given(similarities, st.sampled_from([1, 4, 9]))
def test_colours_turn_with_the_scene(sim3, count):
    before, after = scene(harmonics=count), sim3.apply_to_scene(scene(harmonics=count))
    directions = torch.nn.functional.normalize(points(len(before), seed=9), dim=-1)
    seen = torch.einsum("nk,nkc->nc", harmonic_basis(directions)[:, :count], before.sh)
    turned = torch.einsum("nk,nkc->nc", harmonic_basis(directions @ sim3.rotation.T)[:, :count], after.sh)
    torch.testing.assert_close(turned, seen, rtol=1e-8, atol=1e-8)


def test_harmonics_of_other_degrees_are_refused():
    with pytest.raises(ValueError, match="16"):
        turned_harmonics(torch.zeros(2, 16, 3), torch.eye(3))


def test_a_scene_keeps_its_dtype():
    double = scene()
    single = GaussianScene(*(getattr(double, name).float() for name in GaussianScene.__dataclass_fields__))
    moved = Sim3(2.0, axis_angle_to_matrix(points(1)[0]), points(1)[0]).apply_to_scene(single)
    assert {getattr(moved, name).dtype for name in GaussianScene.__dataclass_fields__} == {torch.float32}


@settings(deadline=None, max_examples=40)
@given(similarities, st.integers(0, 1000))
def test_weighted_umeyama_finds_the_similarity_whatever_the_weights(sim3, seed):
    source = points(12, seed)
    weights = torch.rand(12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.01
    same(weighted_umeyama(source, sim3.apply_to_points(source), weights), sim3)
    same(weighted_umeyama(source, sim3.apply_to_points(source), weights, sim3.rotation), sim3)


def test_a_weight_counts_like_so_many_pairs():
    source, target = points(6, 1), points(6, 2)
    weights = torch.tensor([1.0, 3, 2, 1, 1, 2], dtype=torch.float64)
    often = torch.arange(6).repeat_interleave(weights.long())
    same(
        weighted_umeyama(source, target, weights),
        weighted_umeyama(source[often], target[often], torch.ones(10, dtype=torch.float64)),
    )
    without = torch.tensor([1.0, 1, 1, 1, 1, 0], dtype=torch.float64)
    ones = torch.ones(5, dtype=torch.float64)
    same(weighted_umeyama(source, target, without), weighted_umeyama(source[:5], target[:5], ones))


def test_a_fit_is_never_a_reflection():
    source = points()
    mirrored = source * torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64)
    fit = weighted_umeyama(source, mirrored, torch.ones(20, dtype=torch.float64))
    assert torch.linalg.det(fit.rotation) == pytest.approx(1)
    assert torch.linalg.det(nearest_rotation(-torch.eye(3, dtype=torch.float64))) == pytest.approx(1)


def test_points_without_a_scale_are_refused():
    ones = torch.ones(20, dtype=torch.float64)
    with pytest.raises(ValueError, match="coincide"):
        weighted_umeyama(points()[:1].expand(20, 3), points(), ones)
    with pytest.raises(ValueError, match="against"):
        weighted_umeyama(points(), -points(), ones, torch.eye(3))


@settings(deadline=None, max_examples=40)
@given(similarities, st.sampled_from(["orientations", "centres"]))
def test_both_rules_align_a_curved_path(sim3, rule):
    same(align_cameras(path(), sim3.apply_to_w2c(path()), rule), sim3)


@settings(deadline=None, max_examples=40)
@given(similarities)
def test_a_straight_path_keeps_its_roll_with_averaged_rotations(sim3):
    fit = align_cameras(straight_path(), sim3.apply_to_w2c(straight_path()))
    assert float(torch.rad2deg(rotation_angle(fit.rotation, sim3.rotation))) < 1e-4
    assert fit.scale == pytest.approx(sim3.scale)


def test_a_straight_path_loses_its_roll_with_centres_alone():
    angles = []
    for seed in range(20):
        sim3 = Sim3(1.3, axis_angle_to_matrix(points(1, seed)[0]), points(1, seed + 50)[0])
        target = sim3.apply_to_w2c(straight_path())
        fit = align_cameras(straight_path(), target, "centres")
        torch.testing.assert_close(
            camera_centres(fit.apply_to_w2c(straight_path())), camera_centres(target), rtol=0, atol=1e-6
        )
        angles.append(float(torch.rad2deg(rotation_angle(fit.rotation, sim3.rotation))))
    assert max(angles) > 30


def test_a_noisy_straight_path_is_upright_to_a_fraction_of_the_noise():
    path_length, noise = straight_path(16), 0.02 * points(16, 5)
    turned = path_length.clone()
    turned[:, :3, :3] = axis_angle_to_matrix(noise) @ path_length[:, :3, :3]
    assert rotation_angle(mean_rotation(path_length, turned), torch.eye(3, dtype=torch.float64)) < 0.02


def test_cameras_that_do_not_move_have_a_rotation_but_no_scale():
    still = path()
    still[:, :3, 3] = 0
    turn = Sim3(1.0, axis_angle_to_matrix(points(1)[0]), torch.zeros(3, dtype=torch.float64))
    torch.testing.assert_close(mean_rotation(still, turn.apply_to_w2c(still)), turn.rotation)
    for rule in ("orientations", "centres"):
        with pytest.raises(ValueError, match="do not move"):
            align_cameras(still, path(), rule)
