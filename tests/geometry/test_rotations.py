"""Rotations: conversions round-trip, agree with scipy, and hold for any batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation
from torch import Tensor

from lyra.geometry import rotations

component = st.floats(-1, 1, allow_nan=False, width=32)
quaternions = (
    st.tuples(component, component, component, component)
    .filter(lambda q: sum(v * v for v in q) > 1e-2)
    .map(lambda q: torch.nn.functional.normalize(torch.tensor(q, dtype=torch.float64), dim=0))
)
# Angles a hair above or below 0 and pi are where conversions lose digits or flip signs.
angles = st.one_of(st.floats(0, np.pi), st.sampled_from([0.0, 1e-9, 1e-4, np.pi - 1e-9, np.pi]))
axes = quaternions.map(lambda q: q[1:]).filter(lambda v: v.norm() > 1e-2).map(lambda v: v / v.norm())
points = st.tuples(component, component, component).map(lambda p: torch.tensor(p, dtype=torch.float64))


def scipy_matrix(quaternion: Tensor) -> np.ndarray:
    w, x, y, z = quaternion.tolist()
    return Rotation.from_quat([x, y, z, w]).as_matrix()


@given(quaternions)
def test_quaternion_to_matrix_agrees_with_scipy(quaternion: Tensor) -> None:
    assert np.allclose(rotations.quaternion_to_matrix(quaternion).numpy(), scipy_matrix(quaternion), atol=1e-12)


@given(quaternions)
def test_quaternion_survives_matrix_and_back_up_to_sign(quaternion: Tensor) -> None:
    again = rotations.matrix_to_quaternion(rotations.quaternion_to_matrix(quaternion))
    assert torch.allclose((again * quaternion).sum().abs(), torch.ones((), dtype=torch.float64), atol=1e-12)
    assert again[0] >= 0


@given(axes, angles)
def test_half_turns_and_tiny_turns_survive_axis_angle_and_back(axis: Tensor, angle: float) -> None:
    matrix = rotations.axis_angle_to_matrix(axis * angle)
    assert np.allclose(matrix.numpy(), Rotation.from_rotvec((axis * angle).numpy()).as_matrix(), atol=1e-12)
    again = rotations.matrix_to_axis_angle(matrix)
    assert torch.allclose(rotations.axis_angle_to_matrix(again), matrix, atol=1e-9)
    assert again.norm() <= np.pi + 1e-9


@given(quaternions, quaternions)
def test_product_of_quaternions_is_product_of_matrices(a: Tensor, b: Tensor) -> None:
    product = rotations.quaternion_to_matrix(rotations.multiply_quaternions(a, b))
    assert torch.allclose(product, rotations.quaternion_to_matrix(a) @ rotations.quaternion_to_matrix(b), atol=1e-12)


@given(quaternions, quaternions, st.floats(0, 1))
def test_slerp_covers_its_fraction_of_the_shorter_way(a: Tensor, b: Tensor, fraction: float) -> None:
    t = torch.tensor(fraction, dtype=torch.float64)
    start, end = rotations.quaternion_to_matrix(a), rotations.quaternion_to_matrix(b)
    middle = rotations.quaternion_to_matrix(rotations.slerp(a, b, t))
    whole = rotations.rotation_angle(start, end)
    assert rotations.rotation_angle(start, middle).item() == pytest.approx((t * whole).item(), abs=1e-6)
    assert rotations.rotation_angle(middle, end).item() == pytest.approx(((1 - t) * whole).item(), abs=1e-6)


@given(quaternions, quaternions)
def test_slerp_starts_and_ends_at_its_ends_whatever_their_signs(a: Tensor, b: Tensor) -> None:
    zero, one = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    assert (
        torch.allclose(rotations.slerp(a, -b, zero), rotations.canonical_quaternion(a), atol=1e-9) or abs(a[0]) < 1e-9
    )
    end = rotations.slerp(a, -b, one)
    assert (end * b).sum().abs() == pytest.approx(1.0, abs=1e-9)


@given(points, points)
def test_look_at_puts_the_target_on_the_optical_axis(centre: Tensor, target: Tensor) -> None:
    distance = (target - centre).norm()
    if distance < 1e-3:
        return
    w2c = rotations.look_at(centre, target)
    seen = w2c[:3, :3] @ target + w2c[:3, 3]
    assert torch.allclose(seen, torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64) * distance, atol=1e-9)
    assert rotations.is_rotation(w2c[:3, :3], 1e-9)
    assert torch.allclose(-w2c[:3, :3].T @ w2c[:3, 3], centre, atol=1e-9)


def test_look_at_straight_ahead_is_the_identity() -> None:
    assert torch.equal(rotations.look_at(torch.zeros(3), torch.tensor([0.0, 0.0, 2.0])), torch.eye(4))


@pytest.mark.parametrize("y", [1.0, -1.0])
def test_look_at_straight_up_or_down_is_still_a_rotation(y: float) -> None:
    assert rotations.is_rotation(rotations.look_at(torch.zeros(3), torch.tensor([0.0, y, 0.0]))[:3, :3])


def test_look_at_its_own_centre_is_refused() -> None:
    with pytest.raises(ValueError, match="own centre"):
        rotations.look_at(torch.ones(3), torch.ones(3))


def test_is_rotation_refuses_reflection_scale_shear_and_nan() -> None:
    eye = torch.eye(3)
    shear = eye.clone()
    shear[0, 1] = 0.01
    matrices = torch.stack([eye, -eye, eye * 1.01, shear, eye * torch.nan, eye * torch.inf, eye * 0])
    assert rotations.is_rotation(matrices).tolist() == [True, False, False, False, False, False, False]


@settings(max_examples=20)
@given(st.lists(st.integers(1, 3), max_size=3), st.sampled_from([torch.float32, torch.float64]))
def test_every_function_keeps_batch_dimensions_and_dtype(batch: list[int], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.nn.functional.normalize(torch.randn(*batch, 4, dtype=dtype, generator=generator), dim=-1)
    v = torch.randn(*batch, 3, dtype=dtype, generator=generator)
    r = rotations.quaternion_to_matrix(q)
    expected: list[tuple[Tensor, tuple[int, ...]]] = [
        (r, (3, 3)),
        (rotations.matrix_to_quaternion(r), (4,)),
        (rotations.quaternion_to_axis_angle(q), (3,)),
        (rotations.axis_angle_to_matrix(v), (3, 3)),
        (rotations.slerp(q, -q.flip(-1), v[..., 0].abs().clamp(max=1)), (4,)),
        (rotations.look_at(v, v + 1), (4, 4)),
        (rotations.rotation_angle(r, r), ()),
    ]
    for value, shape in expected:
        assert value.shape == (*batch, *shape)
        assert value.dtype == dtype
    assert rotations.is_rotation(r).shape == tuple(batch)
