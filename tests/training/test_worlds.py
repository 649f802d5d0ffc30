"""The procedural worlds: determinism, exact depth against a plain twin, sane pictures and clear walks."""

from __future__ import annotations

import numpy as np
import pytest

from lyra.training.worlds import FAMILIES, HELD_OUT_FAMILIES, MAX_DEPTH, SKY_DEPTH, World, build_world
from lyra.training.worlds import layout as lo
from lyra.training.worlds.camera_paths import CLEARANCE

H, W = 36, 64


def _twin_solid(world: World, i: int, o: np.ndarray, d: np.ndarray) -> float:
    """First crossing of the surface of one solid, from the definition of the unit solids in plain numpy."""
    a = world.arrays
    m = a.to_local[i].reshape(3, 4)
    p, q = m[:, :3] @ o + m[:, 3], m[:, :3] @ d
    sa, sb = a.material[i, lo.M_SHAPE_A], a.material[i, lo.M_SHAPE_B]
    kind = a.kind[i]

    def inside(t: np.ndarray) -> np.ndarray:
        x, y, z = p[:, None] + q[:, None] * t
        if kind == lo.BALL:
            return x * x + y * y + z * z <= 1
        slab = np.abs(y) <= 1
        w = 0.5 * (1 + sa) + 0.5 * (1 - sa) * y
        if kind == lo.BOX:
            return slab & (np.abs(x) <= 1) & (np.abs(z) <= 1)
        if kind == lo.ARCH:
            hole = (x / sa) ** 2 + ((y - 1) / sb) ** 2 <= 1
            return slab & (np.abs(x) <= 1) & (np.abs(z) <= 1) & ~hole
        if kind == lo.CONE:
            return slab & (x * x + z * z <= w * w) & (w >= 0)
        if kind == lo.GABLE:
            return slab & (np.abs(x) <= w) & (np.abs(z) <= 1)
        return slab & (np.abs(x) <= w) & (np.abs(z) <= w)

    t = np.linspace(1e-4, 40, 20001)
    flag = inside(t)
    change = np.flatnonzero(flag[1:] != flag[:-1])
    if not len(change):
        return np.inf
    low, high = t[change[0]], t[change[0] + 1]
    start = inside(np.array([low]))[0]
    for _ in range(40):
        middle = 0.5 * (low + high)
        if inside(np.array([middle]))[0] == start:
            low = middle
        else:
            high = middle
    return high


def test_the_same_seed_gives_the_same_bytes() -> None:
    views = []
    for _ in range(2):
        world, rng = build_world("street", 3), np.random.default_rng(5)
        k = world.random_intrinsics(rng, H, W)
        views.append(world.render(world.random_view(rng), k, H, W))
    assert views[0].rgb.tobytes() == views[1].rgb.tobytes()
    assert views[0].depth.tobytes() == views[1].depth.tobytes()
    assert build_world("street", 3).caption() == build_world("street", 3).caption()


@pytest.mark.parametrize("family", ["solids", "room"])
def test_the_hierarchy_agrees_with_brute_force(family: str) -> None:
    world, rng = build_world(family, 4), np.random.default_rng(1)
    c2w = np.linalg.inv(world.random_view(rng))
    o, compared = c2w[:3, 3], 0
    kept = world.arrays.material[:, lo.M_CUT] == 0
    for _ in range(6):
        d = c2w[:3, :3] @ np.array([*rng.uniform(-0.6, 0.6, 2), 1.0])
        t, who = world.cast_rays(o[None], d[None], 39.0)
        if who[0] >= 0 and not kept[who[0]]:
            continue
        best = min(_twin_solid(world, int(i), o, d) for i in np.flatnonzero(kept))
        if who[0] >= 0:
            # The twin samples every two millimetres and may skip a thinner sliver, never find a nearer one.
            assert best >= t[0] - 1e-6
            assert best == pytest.approx(t[0], abs=1e-6) or best > t[0]
            compared += best == pytest.approx(t[0], abs=1e-6)
        else:
            assert best >= min(t[0], 39.0) - 1e-6
            compared += 1
    assert compared >= 3


@pytest.mark.parametrize("family", ["hall", "hills"])
def test_depth_agrees_between_two_views(family: str) -> None:
    world, rng = build_world(family, 2), np.random.default_rng(3)
    k, w2c = world.random_intrinsics(rng, H, W), world.random_view(rng)
    moved = w2c.copy()
    moved[:3, 3] += [-0.05, 0.0, -0.1]
    view, eye = world.render(w2c, k, H, W), np.linalg.inv(moved)[:3, 3]
    y, x = np.nonzero(~view.sky & (view.depth < 0.9 * MAX_DEPTH))
    z = view.depth[y, x].astype(np.float64)
    camera = np.linalg.inv(k) @ np.stack([x, y, np.ones_like(x)]) * z
    c2w = np.linalg.inv(w2c)
    points = (c2w[:3, :3] @ camera + c2w[:3, 3:]).T
    t, _ = world.cast_rays(np.repeat(eye[None], len(points), 0), points - eye, 1.5)
    # Parameter 1 is the point itself: smaller values are occluders, larger ones would mean that the depth is wrong.
    assert (t < 1.002).mean() > 0.99
    assert (np.abs(t - 1) < 2e-3).mean() > 0.85


def test_supersampling_leaves_depth_alone() -> None:
    world, rng = build_world("village", 1), np.random.default_rng(2)
    k, w2c = world.random_intrinsics(rng, H, W), world.random_view(rng)
    plain = world.render(w2c, k, H, W)
    fine = world.render(w2c, k, H, W, supersample=2)
    bare = world.render(w2c, k, H, W, shading=False)
    # A handful of grazing rays over rough ground may meet another bump when the direction is scaled differently.
    for other in (fine, bare):
        assert np.isclose(plain.depth, other.depth, rtol=1e-5).mean() > 0.998
    assert not bare.rgb.any()
    assert (plain.rgb != fine.rgb).any()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_usable_pictures(family: str) -> None:
    rng, deviations = np.random.default_rng(7), []
    for seed in (0, 1, 2):
        world = build_world(family, seed)
        view = world.render(world.random_view(rng), world.random_intrinsics(rng, H, W), H, W)
        assert view.rgb.dtype == np.uint8 and view.depth.dtype == np.float32 and view.sky.dtype == np.bool_
        assert view.sky.mean() < 0.95
        assert (view.depth[view.sky] == SKY_DEPTH).all()
        assert (view.depth[~view.sky] > 0).all() and (view.depth[~view.sky] <= MAX_DEPTH).all()
        deviations.append(view.rgb.std())
        assert len(world.caption().split()) > 6
    assert np.mean(deviations) > 12


@pytest.mark.parametrize("family", ["corridor", "forest", "square"])
def test_walks_are_smooth_and_clear(family: str) -> None:
    world = build_world(family, 5)
    poses = world.random_walk(np.random.default_rng(4), 40)
    assert poses.shape == (40, 4, 4)
    eyes = np.linalg.inv(poses)[:, :3, 3]
    steps = np.linalg.norm(np.diff(eyes, axis=0), axis=1)
    assert steps.max() < 0.8
    # The path was checked before a hand-held sway of a few millimetres was added.
    assert world.clearance(eyes, 0.6).min() > CLEARANCE - 0.03
    np.testing.assert_allclose(
        poses[:, :3, :3] @ poses[:, :3, :3].transpose(0, 2, 1), np.eye(3)[None].repeat(40, 0), atol=1e-9
    )


def test_views_keep_to_the_promised_angles() -> None:
    world, rng = build_world("park", 9), np.random.default_rng(0)
    for _ in range(10):
        c2w = np.linalg.inv(world.random_view(rng))
        assert abs(np.degrees(np.arcsin(c2w[1, 2]))) <= 25.01
        k = world.random_intrinsics(rng, H, W)
        assert 44.9 <= np.degrees(2 * np.arctan(0.5 * W / k[0, 0])) <= 95.1


def test_families_cover_indoors_and_outdoors() -> None:
    assert len(FAMILIES) >= 8
    assert set(HELD_OUT_FAMILIES) < set(FAMILIES)
    with pytest.raises(ValueError, match="family"):
        build_world("moon", 0)
