"""Rendering splats: the fast rasteriser against its slow twin, against arithmetic, and against what was lifted."""

import importlib.machinery
import math
import sys
import types
from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lyra.errors import UserError
from lyra.export.video import read_video
from lyra.geometry.rotations import quaternion_to_matrix
from lyra.metrics.image import psnr_db
from lyra.reconstruction import rasterizer
from lyra.reconstruction.fly_through import write_fly_through
from lyra.reconstruction.gaussians import LiftedFrame, lift
from lyra.reconstruction.rasterizer import GsplatRenderer, NumbaRenderer, choose_renderer, render
from lyra.reconstruction.rasterizer_reference import harmonics, render_slowly
from lyra.types import Cameras, GaussianScene

K = torch.tensor([[60.0, 0, 40], [0, 62, 30], [0, 0, 1]])
HEIGHT, WIDTH = 45, 70
BACKGROUND = torch.tensor([0.2, 0.5, 0.9])
C0 = 0.28209479177387814


# The arguments of gsplat.rasterization 1.5.3 in order, and their defaults; None for those of no use here.
def gsplat_1_5_3(
    *,
    means,
    quats,
    scales,
    opacities,
    colors,
    viewmats,
    Ks,
    width,
    height,
    near_plane=0.01,
    far_plane=1e10,
    radius_clip=0.0,
    eps2d=0.3,
    sh_degree=None,
    packed=True,
    tile_size=16,
    backgrounds=None,
    render_mode="RGB",
    sparse_grad=False,
    absgrad=False,
    rasterize_mode="classic",
    channel_chunk=32,
    distributed=False,
    camera_model="pinhole",
    segmented=False,
    covars=None,
    with_ut=False,
    with_eval3d=False,
    radial_coeffs=None,
    tangential_coeffs=None,
    thin_prism_coeffs=None,
    ftheta_coeffs=None,
    rolling_shutter=None,
    viewmats_rs=None,
):
    """Its contract for a batch of one camera, computed by the twin."""
    assert viewmats.shape == (1, 4, 4) and Ks.shape == (1, 3, 3)
    assert (sh_degree + 1) ** 2 <= colors.shape[1] and render_mode == "RGB+ED" and backgrounds is None
    assert (near_plane, far_plane, eps2d, rasterize_mode) == (0.01, 1e10, 0.3, "classic")
    scene = GaussianScene(means, quats, scales, opacities, colors[:, : (sh_degree + 1) ** 2])
    assert all(getattr(scene, field.name).isfinite().all() for field in fields(scene))
    # gsplat's own pixel centres are at +0.5.
    view = render_slowly(scene, viewmats[0], Ks[0] - torch.tensor([[0, 0, 0.5], [0, 0, 0.5], [0, 0, 0]]), height, width)
    return torch.cat([view.colours, view.depth[None]]).movedim(0, -1)[None], view.alpha[None, ..., None], {}


def random_scene(seed: int, count: int = 60, harmonics: int = 4, scale: float = 0.1) -> GaussianScene:
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(count, 3, generator=generator) * torch.tensor([2.0, 1.5, 2.0]) + torch.tensor([0, 0, 4.0])
    return GaussianScene(
        means,
        torch.randn(count, 4, generator=generator),
        torch.rand(count, 3, generator=generator) * 2 * scale + 1e-4,
        torch.rand(count, generator=generator),
        torch.randn(count, harmonics, 3, generator=generator) * 0.3,
    )


def each_field(scene: GaussianScene, change) -> GaussianScene:
    return GaussianScene(*(change(getattr(scene, field.name)) for field in fields(scene)))


def one_gaussian(**changes) -> GaussianScene:
    scene = GaussianScene(
        torch.tensor([[0.0, 0.0, 2.0]]),
        torch.tensor([[1.0, 0, 0, 0]]),
        torch.full((1, 3), 0.1),
        torch.tensor([0.8]),
        torch.tensor([[[0.5, 0.1, -0.3]]]) / C0,
    )
    return replace(scene, **changes)


def assert_same_view(fast, slow, tolerance: float = 1e-5) -> None:
    """Equal but for a pixel or two where rounding decides whether a contribution of 1/255 is skipped."""
    error = torch.cat([fast.colours - slow.colours, (fast.depth - slow.depth)[None], (fast.alpha - slow.alpha)[None]])
    assert error.isfinite().all()
    assert int((error.abs().amax(0) > tolerance).sum()) <= 2
    assert error[[0, 1, 2, 4]].abs().max() < 1.01 / 255


def textured_wall(height: int = 96, width: int = 128) -> LiftedFrame:
    y, x = torch.meshgrid(torch.arange(height) / height, torch.arange(width) / width, indexing="ij")
    image = torch.stack([torch.sin(9 * x + 4 * y), torch.cos(7 * y) * x, torch.sin(12 * x * y)]) * 0.8
    k = torch.tensor([[100.0, 0, (width - 1) / 2], [0, 100.0, (height - 1) / 2], [0, 0, 1]])
    return LiftedFrame(image, torch.full((height, width), 3.0), torch.eye(4), k)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    harmonics=st.sampled_from([1, 4, 9, 16]),
    scale=st.floats(1e-3, 2),
    rotation=st.tuples(*[st.floats(-1, 1)] * 4).filter(lambda q: sum(x * x for x in q) > 0.1),
    shift=st.tuples(*[st.floats(-3, 3)] * 3),
    focal=st.floats(20, 200),
    size=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    depth_mode=st.sampled_from(["expected", "median"]),
)
def test_every_view_equals_the_slow_twin(seed, harmonics, scale, rotation, shift, focal, size, depth_mode):
    w2c = torch.eye(4, dtype=torch.float64)
    w2c[:3, :3] = quaternion_to_matrix(torch.tensor(rotation, dtype=torch.float64))
    w2c[:3, 3] = torch.tensor(shift, dtype=torch.float64)
    k = K.double() * torch.tensor([[focal / 60], [focal / 60], [1]])
    scene = random_scene(seed, harmonics=harmonics, scale=scale)
    options = dict(background=BACKGROUND, depth_mode=depth_mode)
    slow = render_slowly(each_field(scene, torch.Tensor.double), w2c, k, *size, **options)
    assert_same_view(render(scene, w2c, k, *size, **options), slow)


def test_thin_and_very_large_splats_equal_the_slow_twin():
    scene = random_scene(3, count=40)
    scales = torch.tensor([[1e-6, 2.0, 1e-6], [30.0, 1e-5, 30.0], [0, 0, 0], [200.0, 200.0, 200.0]]).repeat(10, 1)
    scene = replace(scene, scales=scales, opacities=scene.opacities * 0.3)
    slow = render_slowly(each_field(scene, torch.Tensor.double), torch.eye(4), K, HEIGHT, WIDTH)
    assert_same_view(render(scene, torch.eye(4), K, HEIGHT, WIDTH), slow)
    assert slow.alpha.min() > 0.1


def test_one_gaussian_is_where_and_what_arithmetic_says():
    view = render(one_gaussian(), torch.eye(4), K, HEIGHT, WIDTH, background=BACKGROUND)
    variance = torch.tensor([(60 * 0.1 / 2) ** 2 + 0.3, (62 * 0.1 / 2) ** 2 + 0.3])
    # Pixel centres are at integers: the principal point's pixel sees the centre.
    for dx, dy in [(0, 0), (3, 0), (0, -4), (-2, 5)]:
        alpha = 0.8 * math.exp(-0.5 * float(dx * dx / variance[0] + dy * dy / variance[1]))
        assert view.alpha[30 + dy, 40 + dx] == pytest.approx(alpha, abs=1e-6)
        colour = alpha * torch.tensor([1.0, 0.6, 0.2]) + (1 - alpha) * BACKGROUND
        assert torch.allclose(view.colours[:, 30 + dy, 40 + dx], colour, atol=1e-6)
        assert view.depth[30 + dy, 40 + dx] == pytest.approx(2.0, abs=1e-6)
    assert view.alpha[0, 0] == 0 and view.depth[0, 0] == 0
    assert torch.allclose(view.colours[:, 0, 0], BACKGROUND)


def test_median_depth_is_that_of_the_gaussian_that_takes_the_light_below_a_half():
    front, back = one_gaussian(opacities=torch.tensor([0.4])), one_gaussian(means=torch.tensor([[0.0, 0, 5]]))
    scene = GaussianScene(*(torch.cat([getattr(s, f.name) for s in (back, front)]) for f in fields(front)))
    assert render(scene, torch.eye(4), K, HEIGHT, WIDTH, depth_mode="median").depth[30, 40] == 5
    assert render(front, torch.eye(4), K, HEIGHT, WIDTH, depth_mode="median").depth[30, 40] == 0
    expected = render(scene, torch.eye(4), K, HEIGHT, WIDTH).depth[30, 40]
    assert expected == pytest.approx((0.4 * 2 + 0.6 * 0.8 * 5) / (0.4 + 0.6 * 0.8), abs=1e-5)


def test_harmonics_are_orthonormal_and_have_the_signs_that_splats_use():
    index = torch.arange(4000, dtype=torch.float64) + 0.5
    z, angle = 1 - 2 * index / 4000, math.pi * (1 + 5**0.5) * index
    radius = (1 - z * z).sqrt()
    basis = harmonics(radius * angle.cos(), radius * angle.sin(), z, 3)
    products = basis.T @ basis * 4 * math.pi / 4000
    assert torch.allclose(products, torch.eye(16, dtype=torch.float64), atol=2e-3)
    along_x = harmonics(*(torch.tensor([n], dtype=torch.float64) for n in (1, 0, 0)), 3)[0]
    assert (along_x.sign() == torch.tensor([1, 0, 0, -1, 0, 0, -1, 0, 1, 0, 0, 0, 0, 1, 0, -1])).all()


def test_colour_depends_on_the_side_that_a_gaussian_is_seen_from():
    sh = torch.zeros(1, 4, 3)
    sh[0, 2] = 0.5
    scene = one_gaussian(sh=sh, means=torch.zeros(1, 3))
    ahead, behind = torch.eye(4), torch.diag(torch.tensor([-1.0, 1, -1, 1]))
    ahead[2, 3] = behind[2, 3] = 2
    seen = [float(render(scene, w2c, K, HEIGHT, WIDTH).colours[0, 30, 40]) / 0.8 for w2c in (ahead, behind)]
    assert seen == pytest.approx([0.5 + 0.5 * 0.4886025, 0.5 - 0.5 * 0.4886025], abs=1e-5)


def test_a_lifted_wall_renders_back_from_its_own_camera():
    frame = textured_wall()
    scene = lift([frame], lambda done, of: None)
    view = render(scene, frame.w2c, frame.intrinsics, 96, 128)
    inner = (slice(None), slice(4, -4), slice(4, -4))
    assert psnr_db(view.colours[inner], (frame.image[inner] + 1) / 2, 1.0) > 30
    for mode in ("expected", "median"):
        depth = render(scene, frame.w2c, frame.intrinsics, 96, 128, depth_mode=mode).depth[4:-4, 4:-4]
        assert (depth / 3 - 1).abs().max() < 0.01
    assert view.alpha[4:-4, 4:-4].min() > 0.95


def test_a_slanted_wall_has_its_own_depth():
    frame = textured_wall()
    x = (torch.arange(128) - frame.intrinsics[0, 2]) / frame.intrinsics[0, 0]
    depth = (3 / (1 - 0.4 * x)).expand(96, 128)
    scene = lift([LiftedFrame(frame.image, depth, frame.w2c, frame.intrinsics)], lambda done, of: None)
    view = render(scene, frame.w2c, frame.intrinsics, 96, 128)
    assert (view.depth / depth - 1)[4:-4, 4:-4].abs().max() < 0.01


def test_the_order_of_the_gaussians_does_not_matter():
    scene = random_scene(5, count=300)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(1))
    one = render(scene, torch.eye(4), K, HEIGHT, WIDTH)
    other = render(each_field(scene, lambda values: values[order]), torch.eye(4), K, HEIGHT, WIDTH)
    assert torch.equal(one.colours, other.colours) and torch.equal(one.depth, other.depth)


def test_the_number_of_threads_does_not_matter():
    scene, before, views = random_scene(6, count=20_000, scale=0.02), torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            views.append(render(scene, torch.eye(4), K, HEIGHT, WIDTH))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(views[0].colours, views[1].colours) and torch.equal(views[0].depth, views[1].depth)


def test_a_view_in_bands_is_the_view_in_one_piece(monkeypatch):
    scene = random_scene(7, count=500, scale=1.0)
    whole = render(scene, torch.eye(4), K, 130, WIDTH)
    monkeypatch.setattr(rasterizer, "BAND_ENTRIES", 100)
    assert list(rasterizer.row_bands(torch.tensor([60, 30, 200, 40]).numpy())) == [(0, 2), (2, 3), (3, 4)]
    banded = render(scene, torch.eye(4), K, 130, WIDTH)
    assert torch.equal(whole.colours, banded.colours) and torch.equal(whole.depth, banded.depth)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e30, -1e30])
@pytest.mark.parametrize("name", ["means", "quats", "scales", "opacities", "sh"])
def test_a_broken_gaussian_leaves_the_others_as_they_are(name, bad):
    scene = random_scene(8, count=20)
    scene.means[3], scene.opacities[3] = torch.tensor([0, 0, 1.5]), 0.9
    values = getattr(scene, name).clone()
    values[3].view(-1)[0] = bad
    broken = replace(scene, **{name: values})
    view = render(broken, torch.eye(4), K, HEIGHT, WIDTH)
    slow = render_slowly(each_field(broken, torch.Tensor.double), torch.eye(4), K, HEIGHT, WIDTH)
    assert all(getattr(view, field.name).isfinite().all() for field in fields(view))
    if not math.isfinite(bad):
        assert_same_view(view, slow)
        without = torch.arange(20) != 3
        clean = render(each_field(scene, lambda values: values[without]), torch.eye(4), K, HEIGHT, WIDTH)
        assert torch.equal(view.colours, clean.colours)
        assert not torch.equal(view.colours, render(scene, torch.eye(4), K, HEIGHT, WIDTH).colours)


def test_nothing_behind_the_camera_or_without_rotation_is_drawn():
    for change in ({"means": torch.tensor([[0.0, 0, -2]])}, {"quats": torch.zeros(1, 4)}):
        assert not render(one_gaussian(**change), torch.eye(4), K, HEIGHT, WIDTH).alpha.any()


def test_an_empty_scene_is_its_background_and_an_empty_image_is_refused():
    empty = each_field(one_gaussian(), lambda values: values[:0])
    view = render(empty, torch.eye(4), K, HEIGHT, WIDTH, background=BACKGROUND)
    assert torch.allclose(view.colours, BACKGROUND[:, None, None].expand(3, HEIGHT, WIDTH))
    with pytest.raises(ValueError, match="0x70"):
        render(empty, torch.eye(4), K, 0, WIDTH)
    with pytest.raises(ValueError, match="5 spherical harmonics"):
        render(one_gaussian(sh=torch.zeros(1, 5, 3)), torch.eye(4), K, HEIGHT, WIDTH)


def test_gradients_of_the_twin_are_finite_and_right():
    scene = random_scene(9, count=12)
    scene.means[0], scene.opacities[1], scene.scales[2] = math.nan, math.nan, 0
    leaves = [getattr(scene, field.name).clone().requires_grad_() for field in fields(scene)]
    view = render_slowly(GaussianScene(*leaves), torch.eye(4), K, HEIGHT, WIDTH, background=BACKGROUND)
    (view.colours.square().sum() + view.depth.sum() + view.alpha.sum()).backward()
    assert all(leaf.grad is not None and leaf.grad.isfinite().all() for leaf in leaves)
    assert any(leaf.grad.any() for leaf in leaves)

    def moment(mean):
        """Of the middle of the Gaussian, where nothing is faint enough to be skipped."""
        scene = replace(each_field(one_gaussian(), torch.Tensor.double), means=mean)
        alpha = render_slowly(scene, torch.eye(4), K, HEIGHT, WIDTH).alpha[26:35, 36:45]
        return (alpha * torch.arange(9)).sum()

    assert torch.autograd.gradcheck(moment, torch.tensor([[0.05, 0.02, 2.0]], dtype=torch.float64, requires_grad=True))


def test_gsplat_is_called_with_its_own_arguments_and_conventions(monkeypatch):
    module = types.ModuleType("gsplat")
    module.__spec__ = importlib.machinery.ModuleSpec("gsplat", None)
    module.rasterization = gsplat_1_5_3
    monkeypatch.setitem(sys.modules, "gsplat", module)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    scene = random_scene(10)
    scene.means[7] = math.nan
    view = GsplatRenderer(scene).render(torch.eye(4), K, HEIGHT, WIDTH, background=BACKGROUND)
    assert_same_view(view, render_slowly(scene, torch.eye(4), K, HEIGHT, WIDTH, background=BACKGROUND), 1e-4)
    # A scene on the CPU stays there.
    assert isinstance(choose_renderer(scene), NumbaRenderer)


def test_a_fly_through_shows_each_camera_and_reports_each_frame(tmp_path):
    frame, scene, seen = textured_wall(), lift([textured_wall()], lambda done, of: None), []
    w2c = torch.eye(4).repeat(5, 1, 1)
    w2c[:, 0, 3] = torch.linspace(0, -0.3, 5)
    cameras = Cameras(w2c, frame.intrinsics.expand(5, 3, 3), 96, 127)
    path = tmp_path / "film.mp4"
    write_fly_through(scene, cameras, path, fps=8, check=lambda done, of: seen.append((done, of)))
    video = read_video(path)
    assert video.shape == (5, 3, 96, 126) and seen == [(n, 5) for n in range(1, 6)]
    last = render(scene, w2c[4], frame.intrinsics, 96, 126).colours
    assert psnr_db(video[4] / 255, last, 1.0) > 30
    assert psnr_db(video[0] / 255, last, 1.0) < 25
    assert [p.name for p in tmp_path.iterdir()] == ["film.mp4"]


def test_a_cancelled_fly_through_leaves_the_old_file(tmp_path):
    def stop(done: int, of: int) -> None:
        # Late enough for the encoder to have written something.
        if done == 90:
            raise KeyboardInterrupt

    path = tmp_path / "film.mp4"
    path.write_bytes(b"old")
    cameras = Cameras(torch.eye(4).repeat(99, 1, 1), K.expand(99, 3, 3), 32, 32)
    with pytest.raises(KeyboardInterrupt):
        write_fly_through(one_gaussian(), cameras, path, check=stop)
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_an_empty_scene_an_empty_path_and_no_frame_rate_are_refused_in_words(tmp_path):
    cameras = Cameras(torch.eye(4)[None], K[None], 32, 32)
    empty = each_field(one_gaussian(), lambda values: values[:0])
    with pytest.raises(UserError, match="no splats"):
        write_fly_through(empty, cameras, tmp_path / "a.mp4")
    with pytest.raises(UserError, match="no cameras"):
        write_fly_through(one_gaussian(), cameras[0:0], tmp_path / "a.mp4")
    with pytest.raises(UserError, match="0 frames a second"):
        write_fly_through(one_gaussian(), cameras, tmp_path / "a.mp4", fps=0)
    assert not list(tmp_path.iterdir())
