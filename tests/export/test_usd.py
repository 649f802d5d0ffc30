"""A stage is read back with pxr itself and with Newton's importer, and by this project."""

from __future__ import annotations

import math
import sys
import zipfile

import numpy as np
import pytest
import torch

from lyra.errors import UserError
from lyra.export.usd import StageTransform, read_usd, rotate_sh, sh_basis, write_usd
from lyra.geometry.cameras import project
from lyra.geometry.rotations import axis_angle_to_matrix, look_at, quaternion_to_matrix
from lyra.types import Cameras, GaussianScene, TriangleMesh

pxr = pytest.importorskip("pxr", reason="usd-core needs Python 3.11")
from pxr import Gf, Usd, UsdGeom, UsdPhysics, UsdShade, UsdUtils, UsdValidation, UsdVol  # noqa: E402

UP = torch.tensor([0.2, -1.0, 0.3])
"""Up in a world whose first camera looked a little down and to the side."""


def random_scene(count: int = 40, coefficients: int = 1) -> GaussianScene:
    g = torch.Generator().manual_seed(3)
    return GaussianScene(
        means=torch.randn(count, 3, generator=g),
        quats=torch.nn.functional.normalize(torch.randn(count, 4, generator=g), dim=-1),
        scales=torch.rand(count, 3, generator=g) * 0.2 + 0.01,
        opacities=torch.rand(count, generator=g) * 0.9 + 0.05,
        sh=torch.randn(count, coefficients, 3, generator=g),
    )


def tilted_floor() -> TriangleMesh:
    """A square whose normal is UP, 2 units below the first camera."""
    normal = UP / UP.norm()
    right = torch.linalg.cross(normal, torch.tensor([0.0, 0.0, 1.0]))
    right = right / right.norm()
    ahead = torch.linalg.cross(normal, right)
    corners = torch.tensor([[-1.0, -1.0], [1.0, -1.0], [1.0, 1.0], [-1.0, 1.0]])
    vertices = corners[:, :1] * right + corners[:, 1:] * ahead - 2 * normal
    colours = torch.tensor([[188, 0, 255], [0, 10, 20], [128, 128, 128], [255, 255, 255]], dtype=torch.uint8)
    return TriangleMesh(vertices, torch.tensor([[0, 1, 2], [0, 2, 3]]), colours)


def walk(frames: int = 3) -> Cameras:
    """A path with a principal point off the centre and pixels that are not square."""
    centres = torch.stack([torch.linspace(0, 1, frames), torch.zeros(frames), torch.linspace(0, 0.5, frames)], dim=-1)
    k = torch.tensor([[300.0, 0.0, 90.0], [0.0, 280.0, 70.0], [0.0, 0.0, 1.0]])
    return Cameras(look_at(centres, centres + torch.tensor([0.1, 0.3, 1.0])), k.expand(frames, 3, 3), 128, 200)


def quaternions_of(values) -> torch.Tensor:
    """wxyz by the names of the parts, not by the layout of the buffer."""
    return torch.tensor([[q.GetReal(), *q.GetImaginary()] for q in values])


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """A stage with everything in it, opened by pxr."""
    path = tmp_path_factory.mktemp("usd") / "world.usdc"
    floor = tilted_floor()
    points = floor.vertices[:3]
    write_usd(
        path, random_scene(), floor, floor, up=UP, cameras=walk(), drop_points=points, provenance="made in a test"
    )
    return Usd.Stage.Open(str(path))


def test_the_stage_has_the_metadata_of_simulators(full):
    assert UsdGeom.GetStageUpAxis(full) == "Z"
    assert UsdGeom.GetStageMetersPerUnit(full) == 1
    assert UsdPhysics.GetStageKilogramsPerUnit(full) == 1
    assert full.GetDefaultPrim().GetPath() == "/World"
    assert full.GetRootLayer().comment == "made in a test"
    assert (full.GetStartTimeCode(), full.GetEndTimeCode(), full.GetTimeCodesPerSecond()) == (0, 2, 16)
    scene = UsdPhysics.Scene.Get(full, "/World/PhysicsScene")
    assert scene.GetGravityDirectionAttr().Get() == Gf.Vec3f(0, 0, -1)
    assert scene.GetGravityMagnitudeAttr().Get() == pytest.approx(9.81)
    # Nothing is moved by an operation that a loader may overlook, except the camera, which is nothing else.
    moved = [prim.GetName() for prim in full.Traverse() if UsdGeom.Xformable(prim).GetOrderedXformOps()]
    assert moved == ["Camera"]


@pytest.mark.parametrize("suffix", [".usdc", ".usda", ".usdz"])
@pytest.mark.parametrize("coefficients", [1, 4, 9, 16])
def test_a_world_round_trips(tmp_path, suffix, coefficients):
    scene, floor = random_scene(coefficients=coefficients), tilted_floor()
    path = tmp_path / f"my world{suffix}"
    write_usd(path, scene, floor, floor, up=UP, drop_points=floor.vertices, metres_per_unit=1.7, provenance="x\ny")
    world = read_usd(path)
    assert world.provenance == "x\ny"
    for name in ("means", "scales", "opacities"):
        assert torch.allclose(getattr(world.scene, name), getattr(scene, name), atol=2e-6), name
    assert torch.allclose(quaternion_to_matrix(world.scene.quats), quaternion_to_matrix(scene.quats), atol=2e-6)
    assert world.scene.sh.shape[1] == (1 if coefficients == 1 else 16)
    assert torch.allclose(world.scene.sh[:, :coefficients], scene.sh, atol=1e-5)
    assert world.scene.sh[:, coefficients:].abs().sum() < 1e-5
    assert torch.allclose(world.collider.vertices, floor.vertices, atol=2e-6)
    assert torch.equal(world.mesh.faces, floor.faces)
    assert torch.equal(world.mesh.colours, floor.colours)
    assert torch.allclose(world.drop_points, floor.vertices, atol=2e-6)


def test_parts_that_were_not_written_are_not_read(tmp_path):
    write_usd(tmp_path / "a.usdc", None, None, tilted_floor())
    world = read_usd(tmp_path / "a.usdc")
    assert (world.scene, world.mesh, world.drop_points, world.provenance) == (None, None, None, "")
    assert len(world.collider.faces) == 2


def test_a_file_that_was_replaced_is_read_anew(tmp_path):
    for count in (5, 9):
        write_usd(tmp_path / "a.usdc", random_scene(count), None, None)
        keep = Usd.Stage.Open(str(tmp_path / "a.usdc"))  # Keeps the layer in pxr's cache.
        assert len(read_usd(tmp_path / "a.usdc").scene) == count
    assert keep


def test_a_tilted_floor_becomes_level_below_and_faces_up(full):
    points = np.array(UsdGeom.Mesh.Get(full, "/World/Collider").GetPointsAttr().Get())
    assert np.allclose(points[:, 2], -2, atol=1e-5)
    a, b, c = points[UsdGeom.Mesh.Get(full, "/World/Collider").GetFaceVertexIndicesAttr().Get()[:3]]
    assert np.cross(b - a, c - a)[2] > 0
    drops = np.array(full.GetDefaultPrim().GetCustomDataByKey("lyra:dropPoints"))
    assert np.allclose(drops, points[:3], atol=1e-6)


def test_a_level_world_only_changes_axes():
    transform = StageTransform.levelled(torch.tensor([0.0, -1.0, 0.0]), 2.0)
    assert transform.points(torch.tensor([1.0, 2.0, 3.0])).tolist() == [2, 6, -4]


@pytest.mark.parametrize("up", [(0.0, 3.0, 0.0), (1.0, 0.0, 0.0), (0.0, 0.0, -1.0), (1e-4, -1.0, 0.0)])
def test_any_up_direction_becomes_z_by_a_proper_rotation(up):
    transform = StageTransform.levelled(torch.tensor(up))
    unit = torch.tensor(up) / torch.tensor(up).norm()
    assert torch.allclose(transform.points(unit), torch.tensor([0.0, 0.0, 1.0]), atol=1e-6)
    assert torch.linalg.det(transform.rotation) == pytest.approx(1)


def test_every_splat_keeps_its_shape_under_the_change_of_axes(full):
    scene, rotation = random_scene(), StageTransform.levelled(UP).rotation.float()
    splats = UsdVol.ParticleField3DGaussianSplat.Get(full, "/World/Splats")

    def covariance(quats, scales):
        axes = quaternion_to_matrix(quats) * scales[:, None, :]
        return axes @ axes.transpose(1, 2)

    quats = quaternions_of(splats.GetOrientationsAttr().Get())
    assert torch.allclose(quats.norm(dim=1), torch.ones(len(quats)), atol=1e-6)
    found = covariance(quats, torch.tensor(np.array(splats.GetScalesAttr().Get())))
    assert torch.allclose(found, rotation @ covariance(scene.quats, scene.scales) @ rotation.T, atol=1e-6)
    means = torch.tensor(np.array(splats.GetPositionsAttr().Get()))
    assert torch.allclose(means, scene.means @ rotation.T, atol=1e-5)
    # The extent holds three deviations along each axis of the stage, and not much more.
    deviations = torch.diagonal(found, dim1=1, dim2=2).sqrt()
    low, high = torch.tensor(np.array(splats.GetExtentAttr().Get()))
    assert torch.allclose(low, (means - 3 * deviations).amin(0), atol=1e-5)
    assert torch.allclose(high, (means + 3 * deviations).amax(0), atol=1e-5)


@pytest.mark.parametrize(("coefficients", "degree"), [(1, 0), (4, 3), (9, 3), (16, 3)])
def test_the_degree_is_authored_and_one_that_simulators_import(tmp_path, coefficients, degree):
    write_usd(tmp_path / "a.usdc", random_scene(7, coefficients), None, None)
    stage = Usd.Stage.Open(str(tmp_path / "a.usdc"))
    splats = UsdVol.ParticleField3DGaussianSplat.Get(stage, "/World/Splats")
    attribute = splats.GetRadianceSphericalHarmonicsDegreeAttr()
    assert attribute.HasAuthoredValue()
    assert attribute.Get() == degree
    assert len(splats.GetRadianceSphericalHarmonicsCoefficientsAttr().Get()) == 7 * (degree + 1) ** 2


def test_the_colour_space_of_the_radiance_is_authored_where_readers_look(full):
    prim = full.GetPrimAtPath("/World/Splats")
    assert prim.HasAPI(Usd.ColorSpaceAPI)
    assert Usd.ColorSpaceAPI(prim).GetColorSpaceNameAttr().Get() == "srgb_rec709_display"
    assert prim.GetAttribute("radiance:sphericalHarmonicsCoefficients").GetColorSpace() == "srgb_rec709_display"


def test_the_basis_is_orthonormal():
    z, weights = np.polynomial.legendre.leggauss(8)
    turn = np.arange(16) * math.pi / 8
    radius = np.sqrt(1 - z * z)[:, None]
    directions = np.stack([radius * np.cos(turn), radius * np.sin(turn), np.repeat(z[:, None], 16, 1)], -1)
    values = sh_basis(torch.from_numpy(directions.reshape(-1, 3)), 16)
    gram = (values * torch.from_numpy(np.repeat(weights, 16))[:, None] * math.pi / 8).T @ values
    assert torch.allclose(gram, torch.eye(16, dtype=gram.dtype), atol=1e-6)


def test_colours_turn_with_the_world():
    sh, rotation = random_scene(5, 16).sh, axis_angle_to_matrix(torch.tensor([0.7, -1.1, 0.4], dtype=torch.float64))
    turned = rotate_sh(sh, rotation)
    directions = torch.nn.functional.normalize(torch.randn(30, 3, generator=torch.Generator().manual_seed(1)), dim=-1)
    before = torch.einsum("mk,nkc->nmc", sh_basis(directions, 16), sh)
    after = torch.einsum("mk,nkc->nmc", sh_basis(directions @ rotation.float().T, 16), turned)
    assert torch.allclose(before, after, atol=1e-4)
    # Degree 1 is a vector: (x, y, z) are coefficients 3, 1, 2 with the signs -, -, +.
    signs = torch.tensor([-1.0, -1.0, 1.0])[None, :, None]
    vector, vector_turned = sh[:, [3, 1, 2]] * signs, turned[:, [3, 1, 2]] * signs
    assert torch.allclose(torch.einsum("ij,njc->nic", rotation.float(), vector), vector_turned, atol=1e-5)


def test_colours_are_turned_in_the_file_too(tmp_path):
    scene, rotation = random_scene(coefficients=4), StageTransform.levelled(UP).rotation.float()
    write_usd(tmp_path / "a.usdc", scene, None, None, up=UP)
    stage = Usd.Stage.Open(str(tmp_path / "a.usdc"))
    values = stage.GetAttributeAtPath("/World/Splats.radiance:sphericalHarmonicsCoefficients").Get()
    found = torch.tensor(np.array(values)).unflatten(0, (-1, 16))
    signs = torch.tensor([-1.0, -1.0, 1.0])[None, :, None]
    vector = torch.einsum("ij,njc->nic", rotation, scene.sh[:, [3, 1, 2]] * signs)
    assert torch.allclose(found[:, [3, 1, 2]] * signs, vector, atol=1e-5)
    assert torch.equal(found[:, 4:], torch.zeros(len(scene), 12, 3))


def test_the_collider_is_static_exact_and_has_friction(full):
    prim = full.GetPrimAtPath("/World/Collider")
    assert prim.HasAPI(UsdPhysics.CollisionAPI)
    assert not prim.HasAPI(UsdPhysics.RigidBodyAPI)
    assert not full.GetDefaultPrim().HasAPI(UsdPhysics.RigidBodyAPI)
    assert UsdPhysics.MeshCollisionAPI(prim).GetApproximationAttr().Get() == "none"
    assert UsdGeom.Mesh(prim).GetSubdivisionSchemeAttr().Get() == "none"
    material = UsdShade.MaterialBindingAPI(prim).ComputeBoundMaterial("physics")[0]
    physics = UsdPhysics.MaterialAPI(material.GetPrim())
    assert physics.GetStaticFrictionAttr().Get() == pytest.approx(0.8)
    assert physics.GetDynamicFrictionAttr().Get() == pytest.approx(0.7)
    assert physics.GetRestitutionAttr().Get() == 0
    # Only the collider collides.
    assert [p.GetName() for p in full.Traverse() if p.HasAPI(UsdPhysics.CollisionAPI)] == ["Collider"]


@pytest.mark.parametrize(
    ("splats", "mesh", "shown"),
    [
        (True, True, ["Splats"]),
        (True, False, ["Splats"]),
        (False, True, ["Mesh"]),
        (False, False, ["Collider"]),
    ],
)
def test_one_appearance_is_shown(tmp_path, splats, mesh, shown):
    floor = tilted_floor()
    write_usd(tmp_path / "a.usda", random_scene() if splats else None, floor if mesh else None, floor)
    stage = Usd.Stage.Open(str(tmp_path / "a.usda"))
    drawn = [
        prim.GetName()
        for prim in stage.Traverse()
        if prim.IsA(UsdGeom.Gprim)
        and UsdGeom.Imageable(prim).ComputeVisibility() == "inherited"
        and UsdGeom.Imageable(prim).ComputePurpose() == "default"
    ]
    assert drawn == shown


def test_vertex_colours_are_linear_light(full):
    mesh = UsdGeom.Mesh.Get(full, "/World/Mesh")
    colour = mesh.GetDisplayColorPrimvar()
    assert colour.GetInterpolation() == "vertex"
    assert colour.GetAttr().GetColorSpace() == "lin_rec709_scene"
    # 188 of 255 in sRGB is half the light, and 10 is in the linear toe of the curve.
    assert np.allclose(colour.Get()[0], [0.5029, 0, 1], atol=1e-4)
    assert colour.Get()[1][1] == pytest.approx(10 / 255 / 12.92, rel=1e-5)


def test_the_camera_of_the_stage_sees_what_the_walk_saw(full):
    cameras, transform = walk(), StageTransform.levelled(UP)
    points = torch.tensor([[0.2, 0.9, 4.0], [1.0, 0.2, 3.0], [-0.3, 1.4, 5.0]])
    camera = UsdGeom.Camera.Get(full, "/World/Camera")
    for frame in range(3):
        frustum = camera.GetCamera(frame).frustum
        matrix = frustum.ComputeViewMatrix() * frustum.ComputeProjectionMatrix()
        pixels, depth = project(points, cameras.w2c[frame], cameras.intrinsics[frame])
        assert bool((depth > 0).all())
        for point, pixel in zip(transform.points(points).tolist(), pixels.tolist(), strict=True):
            screen = matrix.Transform(Gf.Vec3d(*point))
            found = [(1 + screen[0]) / 2 * 200, (1 - screen[1]) / 2 * 128]
            assert found == pytest.approx(pixel, abs=0.01)
    assert camera.GetCamera(Usd.TimeCode.Default()).transform == camera.GetCamera(0).transform


def test_lenses_that_change_on_the_way_are_kept(tmp_path):
    cameras = walk()
    zoomed = Cameras(cameras.w2c, cameras.intrinsics * torch.tensor([1.0, 1.5, 2.0])[:, None, None], 128, 200)
    write_usd(tmp_path / "a.usdc", random_scene(), None, None, cameras=zoomed)
    stage = Usd.Stage.Open(str(tmp_path / "a.usdc"))
    camera = UsdGeom.Camera.Get(stage, "/World/Camera")
    first, last = camera.GetFocalLengthAttr().Get(0), camera.GetFocalLengthAttr().Get(2)
    assert last == pytest.approx(2 * first)


def complaints(stage) -> list[str]:
    """What the validators that come with USD have to say."""
    validators = UsdValidation.ValidationRegistry().GetOrLoadAllValidators()
    return [str(error.GetName()) for error in UsdValidation.ValidationContext(validators).Validate(stage)]


@pytest.mark.parametrize("suffix", [".usdc", ".usda", ".usdz"])
def test_the_validators_of_usd_are_content(tmp_path, suffix):
    floor = tilted_floor()
    path = tmp_path / f"world{suffix}"
    write_usd(path, random_scene(coefficients=9), floor, floor, up=UP, cameras=walk(), drop_points=floor.vertices)
    stage = Usd.Stage.Open(str(path))
    assert complaints(stage) == []
    stage.GetRootLayer().ClearDefaultPrim()
    UsdPhysics.RigidBodyAPI.Apply(stage.OverridePrim("/World/Collider/Inner"))
    assert complaints(stage), "the validators would not have found anything"


def test_a_package_holds_one_layer_and_no_reference_to_outside(tmp_path):
    write_usd(tmp_path / "world.usdz", random_scene(), None, tilted_floor())
    layers, assets, unresolved = UsdUtils.ComputeAllDependencies(str(tmp_path / "world.usdz"))
    assert [len(assets), len(unresolved)] == [0, 0]
    assert all(str(layer.identifier).startswith(str(tmp_path / "world.usdz")) for layer in layers)
    with zipfile.ZipFile(tmp_path / "world.usdz") as package:
        assert [(entry.filename, entry.date_time[0]) for entry in package.infolist()] == [("world.usdc", 1980)]


@pytest.mark.parametrize("suffix", [".usdc", ".usda", ".usdz"])
def test_the_same_world_gives_the_same_bytes_and_leaves_nothing_else(tmp_path, suffix):
    contents = []
    for name in ("one", "two"):
        folder = tmp_path / name
        folder.mkdir()
        floor = tilted_floor()
        write_usd(folder / f"w{suffix}", random_scene(), floor, floor, up=UP, cameras=walk(), provenance="same")
        assert [p.name for p in folder.iterdir()] == [f"w{suffix}"]
        contents.append((folder / f"w{suffix}").read_bytes())
    assert contents[0] == contents[1]


def test_a_file_is_kept_until_the_new_one_is_finished(tmp_path, monkeypatch):
    from lyra.export import usd_layers

    path = tmp_path / "w.usdc"
    write_usd(path, random_scene(), None, None)
    before = path.read_bytes()
    whole = usd_layers.save

    def cut_short(*arguments):
        whole(*arguments)
        raise OSError("no space left")

    monkeypatch.setattr(usd_layers, "save", cut_short)
    with pytest.raises(OSError, match="no space left"):
        write_usd(path, random_scene(5), None, None)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["w.usdc"]


def test_what_cannot_be_written_is_refused_in_one_sentence(tmp_path):
    scene, floor = random_scene(), tilted_floor()
    broken = TriangleMesh(floor.vertices, floor.faces + 2, floor.colours)
    holed = TriangleMesh(floor.vertices / 0, floor.faces, floor.colours)
    empty = TriangleMesh(floor.vertices, floor.faces[:0], floor.colours)
    cases = [
        ("let its name end in .usdc", lambda: write_usd(tmp_path / "a.obj", scene, None, None)),
        ("There is no folder", lambda: write_usd(tmp_path / "no" / "a.usdc", scene, None, None)),
        ("nothing to write", lambda: write_usd(tmp_path / "a.usdc", None, None, None)),
        ("points nowhere", lambda: write_usd(tmp_path / "a.usdc", scene, None, None, up=torch.zeros(3))),
        ("positive number", lambda: write_usd(tmp_path / "a.usdc", scene, None, None, metres_per_unit=0.0)),
        ("whose vertices it lacks", lambda: write_usd(tmp_path / "a.usdc", None, None, broken)),
        ("not finite", lambda: write_usd(tmp_path / "a.usdc", None, holed, None)),
        ("has no faces", lambda: write_usd(tmp_path / "a.usdc", None, None, empty)),
        ("of no degree", lambda: write_usd(tmp_path / "a.usdc", random_scene(3, 5), None, None)),
        ("There is no file", lambda: read_usd(tmp_path / "a.usdc")),
    ]
    for words, call in cases:
        with pytest.raises(UserError, match=words) as caught:
            call()
        assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_other_files_are_refused_in_one_sentence(tmp_path):
    (tmp_path / "a.usdc").write_bytes(b"not a stage")
    with pytest.raises(UserError, match="not a readable USD file"):
        read_usd(tmp_path / "a.usdc")
    Usd.Stage.CreateNew(str(tmp_path / "b.usda")).Save()
    with pytest.raises(UserError, match="no world in it"):
        read_usd(tmp_path / "b.usda")


def test_without_usd_the_way_out_is_said(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pxr", None)
    for call in (
        lambda: write_usd(tmp_path / "a.usdc", random_scene(), None, None),
        lambda: read_usd(tmp_path / "a.usdc"),
    ):
        with pytest.raises(UserError, match="pip install usd-core"):
            call()
