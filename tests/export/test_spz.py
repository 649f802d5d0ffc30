"""SPZ files are read by gsply, gsply's are read here, and the loss is that of the format's bytes."""

import gzip
import math
import struct

import gsply
import numpy as np
import pytest
import torch

from lyra.errors import UserError
from lyra.export.spz import read_spz, turned_about_x, write_spz
from lyra.geometry.rotations import quaternion_to_matrix
from lyra.types import GaussianScene
from tests.export.test_formats import random_scene

HALF_TURN = torch.diag(torch.tensor([1.0, -1.0, -1.0]))
POSITION_STEP = 2.0**-12


def visible_scene(count: int, coefficients: int = 1) -> GaussianScene:
    """A scene whose numbers all lie in the range of the format."""
    scene = random_scene(count, coefficients)
    return GaussianScene(scene.means, scene.quats, scene.scales, scene.opacities, scene.sh.clamp(-0.95, 0.95))


def covariances(quats: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    axes = quaternion_to_matrix(quats) * scales[:, None, :]
    return axes @ axes.transpose(1, 2)


def angles(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    cosine = (a.double() * b.double()).sum(-1).abs().clamp(max=1)
    return 2 * torch.acos(cosine)


def assert_close_in_bytes(scene: GaussianScene, other: GaussianScene) -> None:
    assert (scene.means - other.means).abs().max() <= POSITION_STEP / 2 + 1e-6
    assert (scene.opacities - other.opacities).abs().max() <= 0.5 / 255 + 1e-6
    assert (scene.scales.log() - other.scales.log()).abs().max() <= 0.5 / 16 + 1e-5
    assert (scene.sh[:, 0] - other.sh[:, 0]).abs().max() <= 0.5 / 255 / 0.15 + 1e-5
    if scene.sh.shape[1] > 1:
        assert (scene.sh[:, 1:] - other.sh[:, 1:]).abs().max() <= 0.5 / 128 + 1e-6
    # Each of three components is off by at most half a step, the largest by that of all three if all are equal.
    assert angles(scene.quats, other.quats).max() <= 2 * math.sqrt(3 + 9) * 0.5 * math.sqrt(0.5) / 511
    assert {getattr(other, name).dtype for name in ("means", "quats", "scales", "opacities", "sh")} == {torch.float32}


@pytest.mark.parametrize("coefficients", [1, 4, 9, 16])
def test_gsply_reads_the_file_in_axes_with_y_up(tmp_path, coefficients):
    scene = visible_scene(300, coefficients)
    write_spz(tmp_path / "a.spz", scene, "made in a test")
    theirs = gsply.read_spz(tmp_path / "a.spz")
    assert np.abs(theirs.means - (scene.means @ HALF_TURN).numpy()).max() <= POSITION_STEP / 2 + 1e-6
    assert np.abs(1 / (1 + np.exp(-theirs.opacities)) - scene.opacities.numpy()).max() <= 0.5 / 255 + 1e-5
    assert np.abs(theirs.sh0 - scene.sh[:, 0].numpy()).max() <= 0.5 / 255 / 0.15 + 1e-5
    assert np.abs(theirs.scales - scene.scales.log().numpy()).max() <= 0.5 / 16 + 1e-5
    # With the scene's own deviations, so that only the rotation is compared: HALF_TURN C HALF_TURN is the turned C.
    ours = HALF_TURN @ covariances(scene.quats, scene.scales) @ HALF_TURN
    assert (covariances(torch.from_numpy(theirs.quats), scene.scales) - ours).abs().max() < 0.01
    assert (theirs.shN is None or theirs.shN.size == 0) == (coefficients == 1)


@pytest.mark.parametrize("coefficients", [1, 4, 16])
def test_round_trip_loses_only_what_the_bytes_cannot_hold(tmp_path, coefficients):
    scene = visible_scene(500, coefficients)
    write_spz(tmp_path / "a.spz", scene)
    assert_close_in_bytes(scene, read_spz(tmp_path / "a.spz"))


def test_file_of_gsply_is_read_into_opencv_axes(tmp_path):
    scene = visible_scene(200, 4)
    turned = turned_about_x(scene)
    data = gsply.GSData.from_arrays(
        means=turned.means.numpy(),
        scales=turned.scales.log().numpy(),
        quats=turned.quats.numpy(),
        opacities=torch.logit(turned.opacities).numpy(),
        sh0=turned.sh[:, 0].numpy(),
        shN=np.ascontiguousarray(turned.sh[:, 1:].numpy()),
        format="ply",
    )
    gsply.write_spz(tmp_path / "theirs.spz", data)
    assert_close_in_bytes(scene, read_spz(tmp_path / "theirs.spz"))


def test_bytes_of_one_gaussian_are_those_of_the_documentation(tmp_path):
    scene = GaussianScene(
        means=torch.tensor([[1.5, 0.25, -2.0]]),
        quats=torch.tensor([[0.0, 0.0, 1.0, 0.0]]),
        scales=torch.full((1, 3), math.exp(-2.0)),
        opacities=torch.tensor([0.4]),
        sh=torch.tensor([[[0.0, 1.0, -1.0]]]),
    )
    write_spz(tmp_path / "a.spz", scene)
    data = gzip.decompress((tmp_path / "a.spz").read_bytes())
    assert struct.unpack_from("<IIIBBBB", data) == (0x5053474E, 3, 1, 0, 12, 0, 0)
    body = data[16:]
    assert len(body) == 20
    places = [int.from_bytes(body[i : i + 3], "little", signed=True) / 4096 for i in (0, 3, 6)]
    assert places == [1.5, -0.25, 2.0]
    assert body[9] == 102
    assert list(body[10:13]) == [128, 166, 89]
    assert list(body[13:16]) == [128, 128, 128]
    # y of xyzw is the largest and the others are zero; whether a zero has a sign does not matter.
    assert int.from_bytes(body[16:20], "little") >> 30 == 1
    assert int.from_bytes(body[16:20], "little") & 0b0111111111_0111111111_0111111111 == 0


def test_version_2_is_read(tmp_path):
    n = 4
    means = np.arange(12, dtype=np.float32).reshape(n, 3)
    fixed = np.round(means * 4096).astype("<i4").reshape(n, 3, 1).view("u1")[..., :3]
    quat = np.tile(np.array([127.5 + 127.5 * 0.6, 127.5, 127.5]).round().astype("u1"), n)
    body = [fixed.tobytes(), bytes([254]) * n, bytes([200]) * 3 * n, bytes([100]) * 3 * n, quat.tobytes()]
    header = struct.pack("<IIIBBBB", 0x5053474E, 2, n, 0, 12, 0, 0)
    (tmp_path / "a.spz").write_bytes(gzip.compress(header + b"".join(body)))
    scene = read_spz(tmp_path / "a.spz")
    assert np.allclose(scene.means.numpy(), means * [1, -1, -1])
    assert torch.allclose(scene.quats[0], torch.tensor([0.8, 0.6, 0.0, 0.0]), atol=0.01)
    assert torch.allclose(scene.scales, torch.tensor(100 / 16 - 10).exp())


def test_far_scene_keeps_its_size_with_coarser_steps(tmp_path):
    near = visible_scene(100)
    scene = GaussianScene(near.means * 5000, near.quats, near.scales, near.opacities, near.sh)
    write_spz(tmp_path / "a.spz", scene)
    theirs = gsply.read_spz(tmp_path / "a.spz")
    assert np.abs(theirs.means - (scene.means @ HALF_TURN).numpy()).max() < 0.01
    assert (read_spz(tmp_path / "a.spz").means - scene.means).abs().max() < 0.01


def harmonics(direction: torch.Tensor) -> torch.Tensor:
    """Real spherical harmonics of degree 0 to 3 as polynomials, by KHR_gaussian_splatting's appendix."""
    x, y, z = direction.unbind(-1)
    terms = [
        0.2820947917738781 + 0 * x,
        *(-0.4886025119029199 * y, 0.4886025119029199 * z, -0.4886025119029199 * x),
        *(1.092548430592079 * x * y, -1.092548430592079 * y * z, 0.31539156525252 * (2 * z * z - x * x - y * y)),
        *(-1.092548430592079 * x * z, 0.5462742152960395 * (x * x - y * y)),
        *(-0.5900435899266435 * y * (3 * x * x - y * y), 2.890611442640554 * x * y * z),
        -0.4570457994644657 * y * (4 * z * z - x * x - y * y),
        0.3731763325901154 * z * (2 * z * z - 3 * x * x - 3 * y * y),
        -0.4570457994644657 * x * (4 * z * z - x * x - y * y),
        *(1.445305721320277 * z * (x * x - y * y), -0.5900435899266435 * x * (x * x - 3 * y * y)),
    ]
    return torch.stack(terms, dim=-1)


def test_half_turn_keeps_the_colour_seen_from_every_side_and_is_its_own_inverse():
    scene = random_scene(40, 16)
    turned = turned_about_x(scene)
    directions = torch.nn.functional.normalize(torch.randn(40, 3, generator=torch.Generator().manual_seed(1)), dim=-1)
    before = (harmonics(directions)[..., None] * scene.sh).sum(1)
    after = (harmonics(directions @ HALF_TURN)[..., None] * turned.sh).sum(1)
    assert torch.allclose(before, after, atol=1e-5)
    again = turned_about_x(turned)
    for name in ("means", "quats", "scales", "opacities", "sh"):
        assert torch.equal(getattr(again, name), getattr(scene, name)), name


def test_provenance_is_in_the_gzip_header_and_bytes_do_not_change(tmp_path):
    # Larger than one piece of the compressor, so that pieces must fit together.
    scene = random_scene(30_000)
    for name in ("a.spz", "b.spz"):
        write_spz(tmp_path / name, scene, "Lyra,\nfrom photo.jpg")
    data = (tmp_path / "a.spz").read_bytes()
    assert data == (tmp_path / "b.spz").read_bytes()
    assert data[10:].startswith(b"Lyra, from photo.jpg\0")
    assert len(gzip.decompress(data)) == 16 + 20 * 30_000
    assert len(read_spz(tmp_path / "a.spz")) == 30_000


def test_scenes_that_do_not_fit_are_refused_and_the_old_file_stays(tmp_path):
    path = tmp_path / "a.spz"
    scene = visible_scene(10)
    write_spz(path, scene)
    before = path.read_bytes()
    empty = GaussianScene(*(getattr(scene, name)[:0] for name in ("means", "quats", "scales", "opacities", "sh")))
    unknown = GaussianScene(scene.means * float("nan"), scene.quats, scene.scales, scene.opacities, scene.sh)
    huge = GaussianScene(scene.means * 1e8, scene.quats, scene.scales, scene.opacities, scene.sh)
    for bad, words in [
        (empty, "no Gaussians"),
        (unknown, "means that are not finite"),
        (huge, "too large for SPZ"),
        (visible_scene(10, 5), "cannot hold 5 harmonics"),
    ]:
        with pytest.raises(UserError, match=words):
            write_spz(path, bad)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.spz"]


def test_wrong_files_are_refused_in_one_sentence(tmp_path):
    path = tmp_path / "a.spz"
    with pytest.raises(UserError, match="cannot be read"):
        read_spz(path)
    write_spz(path, visible_scene(1000))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="cut short"):
        read_spz(path)
    path.write_bytes(whole[:-8] + b"12345678")
    with pytest.raises(UserError, match="not an SPZ file"):
        read_spz(path)
    path.write_bytes(b"NGSP" + struct.pack("<I", 4) + bytes(24))
    with pytest.raises(UserError, match="up to version 3"):
        read_spz(path)
    path.write_bytes(gzip.compress(b"something else that is long enough"))
    with pytest.raises(UserError, match="not an SPZ file"):
        read_spz(path)
    path.write_bytes(gzip.compress(struct.pack("<IIIBBBB", 0x5053474E, 3, 2**32 - 1, 0, 12, 0, 0)))
    with pytest.raises(UserError, match="cut short"):
        read_spz(path)
