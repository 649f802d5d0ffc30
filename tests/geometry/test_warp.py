"""The forward warp against the released outputs and its slow twin; the backward warp against its twin."""

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lyra.geometry.cameras import project, ray_maps, unproject
from lyra.geometry.resample import draw_surface, draw_surface_reference, make_surface, resample
from lyra.geometry.warp import forward_warp, forward_warp_reference, reliable_mask

FRAMES = (1, 16, 40, 80)


def intrinsics(focal=40.0, height=24, width=32):
    return torch.tensor([[focal, 0, (width - 1) / 2], [0, focal, (height - 1) / 2], [0, 0, 1.0]])


def moved(x=0.0, y=0.0, z=0.0, turn=0.0):
    w2c = torch.eye(4)
    angle = torch.tensor(turn)
    w2c[0, 0] = w2c[2, 2] = angle.cos()
    w2c[0, 2], w2c[2, 0] = angle.sin(), -angle.sin()
    w2c[:3, 3] = torch.tensor([x, y, z])
    return w2c


def test_reliability_mask_is_the_released_one(conditioning):
    depth = conditioning["warp.depth"][0, 0]
    for ratio, name in ((0.05, "005"), (0.15, "015")):
        assert torch.equal(reliable_mask(depth, ratio), conditioning[f"warp.reliable_{name}"][0, 0].bool())


def test_forward_warp_is_the_released_one_for_both_groupings(conditioning):
    g = conditioning
    k, w2c = g["warp.K"], g["warp.w2c_all"]
    for group in (16, 2):
        warped = forward_warp(
            g["warp.img"][0], g["warp.depth"][0, 0], w2c[0], k, w2c[1:], k.expand(80, 3, 3), group=group
        )
        for n, frame in enumerate(FRAMES):
            index = frame - 1
            key = f"chunk{group}[1,16,40,80]"
            assert (warped.values[index] - g[f"warp.rgb_{key}"][n]).abs().max() < 1e-5
            assert (warped.depth[index] - g[f"warp.z_{key}"][n]).abs().max() < 1e-5
            assert torch.equal(warped.covered[index].float(), g[f"warp.mask_{key}"][n, 0].float())


def test_compiled_splat_equals_its_slow_twin():
    g = torch.Generator().manual_seed(3)
    depth = 2 + torch.nn.functional.interpolate(torch.rand(1, 1, 6, 8, generator=g), (24, 32), mode="bicubic")[0, 0]
    depth[8:14, 10:20] -= 1
    values = torch.rand(5, 24, 32, generator=g) * 2 - 1
    targets = torch.stack([moved(0.2, 0, -0.3, 0.1), moved(-0.4, 0.1, 0.2), moved(0, 0, 0)])
    k = intrinsics().expand(3, 3, 3)
    ours = forward_warp(values, depth, torch.eye(4), intrinsics(), targets, k)
    twin = forward_warp_reference(values, depth, torch.eye(4), intrinsics(), targets, k)
    assert torch.equal(ours.covered, twin.covered)
    assert torch.allclose(ours.values, twin.values, atol=2e-5)
    assert torch.allclose(ours.depth, twin.depth, atol=2e-5)


def test_rays_are_the_released_ones_and_relative_to_the_newest_camera(conditioning):
    w2c, k = conditioning["warp.w2c_all"], conditioning["warp.K"]
    relative = w2c[40] @ torch.linalg.inv(w2c[[0, 40, 80]])
    rays = ray_maps(relative, k.expand(3, 3, 3), 64, 96)
    assert (rays - conditioning["plucker.rays_0_40_80"][0]).abs().max() < 1e-6


@settings(max_examples=30, deadline=None)
@given(st.floats(-0.5, 0.5), st.floats(-0.5, 0.5), st.floats(-0.5, 0.5), st.floats(-0.4, 0.4))
def test_projecting_an_unprojected_map_gives_its_pixels_back(x, y, z, turn):
    w2c, k = moved(x, y, z, turn), intrinsics()
    depth = torch.rand(24, 32, generator=torch.Generator().manual_seed(1)) * 5 + 0.5
    uv, seen = project(unproject(depth, w2c, k), w2c, k)
    rows, columns = torch.meshgrid(torch.arange(24.0), torch.arange(32.0), indexing="ij")
    assert torch.allclose(uv, torch.stack([columns, rows], -1), atol=2e-3)
    assert torch.allclose(seen, depth, atol=1e-4)


@settings(max_examples=8, deadline=None)
@example(x=0.0, z=0.0, turn=0.0, seed=10)  # Columns of vertices fall on pixel centres, give or take a rounding.
@given(st.floats(-0.4, 0.4), st.floats(-0.6, 0.6), st.floats(-0.2, 0.2), st.integers(0, 99))
def test_drawn_surface_equals_its_slow_twin(x, z, turn, seed):
    g = torch.Generator().manual_seed(seed)
    depth = 2 + torch.nn.functional.interpolate(torch.rand(1, 1, 4, 5, generator=g), (16, 22), mode="bicubic")[0, 0]
    depth[5:10, 6:14] -= 0.9
    k = intrinsics(25.0, 16, 22)
    surface = make_surface(depth, torch.eye(4), k)
    ours = draw_surface(surface, moved(x, 0.1, z, turn), k, 16, 22)
    twin = draw_surface_reference(surface, moved(x, 0.1, z, turn), k, 16, 22)
    both = ours.depth.isfinite() & twin.depth.isfinite()
    assert (ours.depth.isfinite() != twin.depth.isfinite()).sum() <= 1
    close = (ours.depth - twin.depth).abs() < 1e-3
    assert close[both].float().mean() > 0.99
    assert ((ours.coordinates - twin.coordinates).abs().amax(-1) < 0.02)[both].float().mean() > 0.98


def test_drawing_from_the_same_camera_gives_the_image_back():
    g = torch.Generator().manual_seed(0)
    depth = 3 + torch.nn.functional.interpolate(torch.rand(1, 1, 4, 5, generator=g), (40, 60), mode="bicubic")[0, 0]
    k = intrinsics(50.0, 40, 60)
    view = draw_surface(make_surface(depth, torch.eye(4), k), torch.eye(4), k, 40, 60)
    image = torch.rand(3, 40, 60, generator=g)
    inner = (slice(1, -1), slice(1, -1))
    source = torch.where(view.depth.isfinite(), 0, -1).to(torch.int32)
    again = resample(image[None], view.coordinates, source)
    assert view.depth[inner].isfinite().all()
    assert (again[:, 1:-1, 1:-1] - image[:, 1:-1, 1:-1]).abs().max() < 2e-3


def test_a_plane_stays_whole_up_to_the_horizon_and_an_edge_tears():
    rows = torch.arange(60.0)
    ground = (1.6 * 50 / (rows - 9)).clamp(min=0.5)[10:, None].expand(50, 80)
    surface = make_surface(ground.contiguous(), torch.eye(4), intrinsics(50.0, 50, 80))
    assert surface.quads[:, 1:-1].float().mean() > 0.97
    step = torch.full((50, 80), 2.0)
    step[:, 40:] = 6.0
    torn = make_surface(step, torch.eye(4), intrinsics(50.0, 50, 80))
    assert not torn.quads[:, 19:20].any()
    assert torn.quads[:, :17].all()
