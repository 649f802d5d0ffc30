"""Files are written and read back, by this project and by somebody else's reader."""

import gsply
import numpy as np
import pytest
import torch
import trimesh
from plyfile import PlyData, PlyElement

from lyra.errors import UserError
from lyra.export.ply import read_splat_ply, write_mesh_ply, write_point_ply, write_splat_ply
from lyra.types import GaussianScene, TriangleMesh


def random_scene(count: int, coefficients: int = 1) -> GaussianScene:
    g = torch.Generator().manual_seed(0)
    quats = torch.nn.functional.normalize(torch.randn(count, 4, generator=g), dim=-1)
    return GaussianScene(
        means=torch.randn(count, 3, generator=g),
        quats=quats,
        scales=torch.rand(count, 3, generator=g) + 0.01,
        opacities=torch.rand(count, generator=g) * 0.9 + 0.05,
        sh=torch.randn(count, coefficients, 3, generator=g),
    )


@pytest.mark.parametrize("coefficients", [1, 9])
def test_splat_ply_round_trips(tmp_path, coefficients):
    scene = random_scene(50, coefficients)
    write_splat_ply(tmp_path / "scene.ply", scene, "two\nlines")
    again = read_splat_ply(tmp_path / "scene.ply")
    for name in ("means", "quats", "scales", "opacities", "sh"):
        assert torch.allclose(getattr(scene, name), getattr(again, name), atol=1e-5), name


def test_splat_ply_has_the_inria_layout_for_plyfile(tmp_path):
    scene = random_scene(7)
    write_splat_ply(tmp_path / "scene.ply", scene, "made in a test")
    ply = PlyData.read(str(tmp_path / "scene.ply"))
    names = [item.name for item in ply["vertex"].properties]
    assert names[:6] == ["x", "y", "z", "nx", "ny", "nz"]
    assert names[6:] == [
        "f_dc_0", "f_dc_1", "f_dc_2", "opacity", "scale_0", "scale_1", "scale_2", "rot_0", "rot_1", "rot_2", "rot_3",
    ]  # fmt: skip
    assert ply.comments == ["made in a test"]
    assert np.allclose(1 / (1 + np.exp(-ply["vertex"]["opacity"])), scene.opacities.numpy(), atol=1e-5)
    assert np.allclose(np.exp(ply["vertex"]["scale_1"]), scene.scales[:, 1].numpy(), atol=1e-5)


def test_gsply_reads_what_is_written(tmp_path):
    scene = random_scene(70_000, 4)
    write_splat_ply(tmp_path / "scene.ply", scene)
    theirs = gsply.plyread(tmp_path / "scene.ply")
    assert np.allclose(theirs.means, scene.means.numpy())
    assert np.allclose(theirs.quats, scene.quats.numpy())
    assert np.allclose(np.exp(theirs.scales), scene.scales.numpy(), rtol=1e-5)
    assert np.allclose(1 / (1 + np.exp(-theirs.opacities)), scene.opacities.numpy(), atol=1e-5)
    assert np.allclose(theirs.sh0, scene.sh[:, 0].numpy())
    # Coefficients are kept channel by channel in the file; a reader may show them in either order.
    assert np.allclose(np.sort(theirs.shN.reshape(70_000, -1)), np.sort(scene.sh[:, 1:].reshape(70_000, -1).numpy()))


@pytest.mark.parametrize("change", [{"text": True}, {"byte_order": ">"}])
def test_splat_ply_of_other_writers_is_read(tmp_path, change):
    scene = random_scene(20, 4)
    write_splat_ply(tmp_path / "scene.ply", scene)
    ply = PlyData.read(str(tmp_path / "scene.ply"))
    for name, value in change.items():
        setattr(ply, name, value)
    ply.write(str(tmp_path / "other.ply"))
    again = read_splat_ply(tmp_path / "other.ply")
    for name in ("means", "quats", "scales", "opacities", "sh"):
        assert torch.allclose(getattr(scene, name), getattr(again, name), atol=1e-4), name


def test_splat_ply_with_other_properties_and_elements_is_read(tmp_path):
    scene = random_scene(20)
    write_splat_ply(tmp_path / "scene.ply", scene)
    vertices = PlyData.read(str(tmp_path / "scene.ply"))["vertex"].data
    wide = np.empty(20, [("label", "u1"), *((name, "f8" if name == "y" else "f4") for name in vertices.dtype.names)])
    wide["label"] = 7
    for name in vertices.dtype.names:
        wide[name] = vertices[name]
    before = np.zeros(3, [("weight", "f8"), ("tag", "i2")])
    elements = [PlyElement.describe(before, "before"), PlyElement.describe(wide, "vertex")]
    lists = np.empty(1, [("vertex_indices", object)])
    lists["vertex_indices"][0] = np.array([0, 1, 2], "i4")
    for name, parts in (("plain", elements), ("lists", [PlyElement.describe(lists, "face"), *elements])):
        PlyData(parts, comments=["end_header is only a word here"]).write(str(tmp_path / f"{name}.ply"))
        again = read_splat_ply(tmp_path / f"{name}.ply")
        for field in ("means", "quats", "scales", "opacities", "sh"):
            assert torch.allclose(getattr(scene, field), getattr(again, field), atol=1e-5), (name, field)


def test_damaged_splat_ply_is_refused_in_one_sentence(tmp_path):
    path = tmp_path / "scene.ply"
    with pytest.raises(UserError, match="cannot be read"):
        read_splat_ply(path)
    write_splat_ply(path, random_scene(50))
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(UserError, match="cut short: 50 vertices"):
        read_splat_ply(path)
    path.write_bytes(whole[:200])
    with pytest.raises(UserError, match="not a readable PLY"):
        read_splat_ply(path)
    path.write_bytes(whole.replace(b"vertex 50", b"vertex 99999999999999"))
    with pytest.raises(UserError, match="cut short"):
        read_splat_ply(path)
    path.write_bytes(b"something else")
    with pytest.raises(UserError, match="not a readable PLY"):
        read_splat_ply(path)


def test_scene_without_gaussians_or_with_nan_is_refused_and_the_old_file_stays(tmp_path):
    path = tmp_path / "scene.ply"
    scene = random_scene(5)
    write_splat_ply(path, scene)
    before = path.read_bytes()
    fields = [scene.means, scene.quats, scene.scales, scene.opacities, scene.sh]
    with pytest.raises(UserError, match="no Gaussians"):
        write_splat_ply(path, GaussianScene(*(field[:0] for field in fields)))
    with pytest.raises(UserError, match="has scales that are not finite"):
        write_splat_ply(path, GaussianScene(*fields[:2], scene.scales / 0, *fields[3:]))
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["scene.ply"]


def test_extreme_opacities_and_scales_stay_finite(tmp_path):
    scene = random_scene(2)
    scene = GaussianScene(scene.means, scene.quats, scene.scales * 0, torch.tensor([0.0, 1.0]), scene.sh)
    write_splat_ply(tmp_path / "scene.ply", scene)
    vertices = PlyData.read(str(tmp_path / "scene.ply"))["vertex"]
    assert np.isfinite(vertices["opacity"]).all()
    assert np.isfinite(vertices["scale_0"]).all()


def test_mesh_ply_is_read_by_trimesh(tmp_path):
    vertices = torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    faces = torch.tensor([[0, 2, 1], [0, 1, 3], [0, 3, 2], [1, 2, 3]])
    colours = torch.randint(0, 256, (4, 3), dtype=torch.uint8)
    write_mesh_ply(tmp_path / "mesh.ply", TriangleMesh(vertices, faces, colours), "made in a test")
    mesh = trimesh.load(tmp_path / "mesh.ply", process=False)
    assert np.array_equal(mesh.faces, faces.numpy())
    assert np.allclose(mesh.vertices, vertices.numpy())
    assert np.array_equal(mesh.visual.vertex_colors[:, :3], colours.numpy())
    assert mesh.volume == pytest.approx(1 / 6)
    with pytest.raises(UserError, match="no faces"):
        write_mesh_ply(tmp_path / "mesh.ply", TriangleMesh(vertices, faces[:0], colours))


def test_another_ply_is_refused_with_what_it_lacks(tmp_path):
    write_point_ply(tmp_path / "points.ply", torch.zeros(3, 3), torch.zeros(3, 3, dtype=torch.uint8))
    with pytest.raises(ValueError, match="not a splat PLY: it lacks f_dc_0"):
        read_splat_ply(tmp_path / "points.ply")


def test_point_cloud_is_read_by_trimesh(tmp_path):
    points = torch.rand(20, 3)
    colours = torch.randint(0, 256, (20, 3), dtype=torch.uint8)
    write_point_ply(tmp_path / "points.ply", points, colours)
    cloud = trimesh.load(tmp_path / "points.ply")
    assert np.allclose(cloud.vertices, points.numpy(), atol=1e-6)
    assert np.array_equal(np.asarray(cloud.colors)[:, :3], colours.numpy())
