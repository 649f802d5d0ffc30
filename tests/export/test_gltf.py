"""GLB files are opened by trimesh and pygltflib and read back."""

import json
import struct

import numpy as np
import pygltflib
import pytest
import torch
import trimesh

from lyra.errors import UserError
from lyra.export.gltf import read_mesh_glb, read_splat_glb, write_mesh_glb, write_splat_glb
from lyra.geometry.rotations import quaternion_to_matrix
from lyra.types import GaussianScene, TriangleMesh
from tests.export.test_formats import random_scene

Y_UP = np.diag([1.0, -1.0, -1.0])


def coloured_mesh() -> TriangleMesh:
    """A tetrahedron with faces counter-clockwise from outside, in many colours."""
    vertices = torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    faces = torch.tensor([[0, 2, 1], [0, 1, 3], [0, 3, 2], [1, 2, 3]])
    colours = torch.tensor([[0, 128, 255], [1, 2, 3], [10, 200, 60], [255, 255, 254]], dtype=torch.uint8)
    return TriangleMesh(vertices, faces, colours)


def accessor_values(file: pygltflib.GLTF2, index: int) -> np.ndarray:
    """An accessor's numbers, taken apart with pygltflib's constants."""
    accessor = file.accessors[index]
    view = file.bufferViews[accessor.bufferView]
    dtype = {pygltflib.FLOAT: "<f4", pygltflib.UNSIGNED_SHORT: "<u2", pygltflib.UNSIGNED_BYTE: "u1"}
    width = {pygltflib.SCALAR: 1, pygltflib.VEC3: 3, pygltflib.VEC4: 4}[accessor.type]
    values = np.frombuffer(
        file.binary_blob(), dtype[accessor.componentType], accessor.count * width, view.byteOffset + accessor.byteOffset
    ).reshape(-1, width)
    return values / np.iinfo(values.dtype).max if accessor.normalized else values


def test_trimesh_opens_the_mesh_with_y_up_and_its_outside_outside(tmp_path):
    mesh = coloured_mesh()
    write_mesh_glb(tmp_path / "a.glb", mesh, "made in a test")
    loaded = trimesh.load(tmp_path / "a.glb", process=False)
    (theirs,) = loaded.geometry.values()
    assert np.allclose(theirs.vertices, mesh.vertices.numpy() @ Y_UP)
    assert np.array_equal(theirs.faces, mesh.faces.numpy())
    assert theirs.is_watertight
    assert theirs.volume == pytest.approx(1 / 6)  # Negative if the turn had mirrored the mesh.


def test_vertex_colours_are_linear_and_the_material_is_unlit(tmp_path):
    write_mesh_glb(tmp_path / "a.glb", coloured_mesh(), "made in a test")
    file = pygltflib.GLTF2().load(str(tmp_path / "a.glb"))
    primitive = file.meshes[0].primitives[0]
    colours = accessor_values(file, primitive.attributes.COLOR_0)
    # sRGB 128 is 21.6 % of the light of white; 10 is in the straight part, 10 / 255 / 12.92.
    assert colours[0] == pytest.approx([0, 0.2158605, 1, 1], abs=1e-5)
    assert colours[2, 0] == pytest.approx(10 / 255 / 12.92, abs=1e-5)
    assert file.materials[primitive.material].extensions == {"KHR_materials_unlit": {}}
    assert file.extensionsUsed == ["KHR_materials_unlit"]
    assert file.asset.extras == {"provenance": "made in a test"}
    assert file.asset.generator.startswith("Lyra ")
    position = file.accessors[primitive.attributes.POSITION]
    assert (position.min, position.max) == ([0, -1, -1], [1, 0, 0])


def test_mesh_round_trips_to_the_bit(tmp_path):
    mesh = coloured_mesh()
    every = torch.arange(256, dtype=torch.uint8)
    many = TriangleMesh(torch.rand(256, 3), torch.tensor([[0, 1, 255]]), torch.stack([every, every, every.flip(0)], 1))
    for original in (mesh, many):
        write_mesh_glb(tmp_path / "a.glb", original)
        again = read_mesh_glb(tmp_path / "a.glb")
        assert torch.equal(again.vertices, original.vertices)
        assert torch.equal(again.faces, original.faces)
        assert torch.equal(again.colours, original.colours)


def test_mesh_of_trimesh_is_read(tmp_path):
    mesh = coloured_mesh()
    colours = np.full((4, 4), 255, np.uint8)
    theirs = trimesh.Trimesh(mesh.vertices.numpy() @ Y_UP, mesh.faces.numpy(), vertex_colors=colours, process=False)
    (tmp_path / "a.glb").write_bytes(trimesh.exchange.gltf.export_glb(trimesh.Scene({"one": theirs})))
    file = pygltflib.GLTF2().load(str(tmp_path / "a.glb"))
    file.nodes = [pygltflib.Node(mesh=0)]  # trimesh writes identity matrices, which are refused like any other.
    file.save(str(tmp_path / "b.glb"))
    again = read_mesh_glb(tmp_path / "b.glb")
    assert torch.allclose(again.vertices, mesh.vertices)
    assert torch.equal(again.faces, mesh.faces)
    assert int(again.colours.min()) == 255


@pytest.mark.parametrize("coefficients", [1, 4, 9, 16])
def test_gaussians_follow_the_khronos_extension(tmp_path, coefficients):
    scene = random_scene(60, coefficients)
    write_splat_glb(tmp_path / "a.glb", scene, "made in a test")
    file = pygltflib.GLTF2().load(str(tmp_path / "a.glb"))
    assert file.extensionsUsed == ["KHR_gaussian_splatting"]
    assert file.asset.extras == {"provenance": "made in a test"}
    primitive = file.meshes[0].primitives[0]
    assert primitive.mode == pygltflib.POINTS
    assert primitive.extensions == {
        "KHR_gaussian_splatting": {
            "kernel": "ellipse",
            "colorSpace": "srgb_rec709_display",
            "projection": "perspective",
            "sortingMethod": "cameraDistance",
        }
    }
    attributes = {name: index for name, index in vars(primitive.attributes).items() if index is not None}
    names = [f"SH_DEGREE_{degree}_COEF_{n}" for degree in range(4) for n in range(2 * degree + 1)][:coefficients]
    expected = {"POSITION", "COLOR_0"}
    expected |= {f"KHR_gaussian_splatting:{name}" for name in ("ROTATION", "SCALE", "OPACITY", *names)}
    assert set(attributes) == expected
    values = {name.split(":")[-1]: accessor_values(file, index) for name, index in attributes.items()}
    assert np.allclose(values["POSITION"], scene.means.numpy() @ Y_UP)
    assert np.allclose(values["SCALE"], scene.scales.numpy())
    assert np.allclose(values["OPACITY"][:, 0], scene.opacities.numpy())
    assert np.allclose(values["SH_DEGREE_0_COEF_0"], scene.sh[:, 0].numpy())
    assert np.allclose(np.linalg.norm(values["ROTATION"], axis=1), 1, atol=1e-6)
    wxyz = torch.from_numpy(np.ascontiguousarray(values["ROTATION"][:, [3, 0, 1, 2]]))
    axes = quaternion_to_matrix(wxyz) * scene.scales[:, None]
    own = quaternion_to_matrix(scene.quats) * scene.scales[:, None]
    turn = torch.from_numpy(Y_UP).float()
    assert torch.allclose(axes @ axes.transpose(1, 2), turn @ own @ own.transpose(1, 2) @ turn, atol=1e-5)


def test_programs_without_the_extension_see_a_coloured_cloud(tmp_path):
    scene = random_scene(60)
    write_splat_glb(tmp_path / "a.glb", scene)
    (cloud,) = trimesh.load(tmp_path / "a.glb").geometry.values()
    assert isinstance(cloud, trimesh.PointCloud)
    assert np.allclose(cloud.vertices, scene.means.numpy() @ Y_UP, atol=1e-6)
    srgb = np.clip(0.5 + 0.28209479 * scene.sh[:, 0].double().numpy(), 0, 1)
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    expected = np.concatenate([linear, scene.opacities[:, None].numpy()], axis=1) * 255
    assert np.abs(np.asarray(cloud.colors) - expected).max() <= 0.51


def test_gaussians_round_trip(tmp_path):
    scene = random_scene(80, 9)
    write_splat_glb(tmp_path / "a.glb", scene)
    again = read_splat_glb(tmp_path / "a.glb")
    for name in ("means", "quats", "scales", "opacities", "sh"):
        assert torch.allclose(getattr(again, name), getattr(scene, name), atol=1e-6), name


def test_quantised_attributes_of_other_writers_are_read(tmp_path):
    scene = random_scene(8)
    write_splat_glb(tmp_path / "a.glb", scene)
    data = (tmp_path / "a.glb").read_bytes()
    length = struct.unpack_from("<I", data, 12)[0]
    tree = json.loads(data[20 : 20 + length])
    opacity = np.rint(scene.opacities.numpy() * 255).astype(np.uint8)
    binary = data[28 + length :] + opacity.tobytes()
    index = tree["meshes"][0]["primitives"][0]["attributes"]["KHR_gaussian_splatting:OPACITY"]
    tree["accessors"][index] |= {"bufferView": len(tree["bufferViews"]), "componentType": 5121, "normalized": True}
    tree["bufferViews"].append({"buffer": 0, "byteOffset": len(binary) - 8, "byteLength": 8})
    text = json.dumps(tree).encode()
    text += b" " * (-len(text) % 4)
    parts = [struct.pack("<III", 0x46546C67, 2, 28 + len(text) + len(binary))]
    parts += [struct.pack("<II", len(text), 0x4E4F534A), text, struct.pack("<II", len(binary), 0x004E4942), binary]
    (tmp_path / "b.glb").write_bytes(b"".join(parts))
    again = read_splat_glb(tmp_path / "b.glb")
    assert torch.allclose(again.opacities, scene.opacities, atol=0.5 / 255 + 1e-6)


def test_nothing_to_write_is_refused(tmp_path):
    scene, mesh = random_scene(3), coloured_mesh()
    empty = GaussianScene(*(getattr(scene, name)[:0] for name in ("means", "quats", "scales", "opacities", "sh")))
    with pytest.raises(UserError, match="no Gaussians"):
        write_splat_glb(tmp_path / "a.glb", empty)
    with pytest.raises(UserError, match="no faces"):
        write_mesh_glb(tmp_path / "a.glb", TriangleMesh(mesh.vertices, mesh.faces[:0], mesh.colours))
    with pytest.raises(UserError, match="cannot hold 5 harmonics"):
        write_splat_glb(tmp_path / "a.glb", random_scene(3, 5))
    assert list(tmp_path.iterdir()) == []


def test_wrong_files_are_refused_in_one_sentence(tmp_path):
    path = tmp_path / "a.glb"
    with pytest.raises(UserError, match="cannot be read"):
        read_mesh_glb(path)
    write_mesh_glb(path, coloured_mesh())
    with pytest.raises(UserError, match="holds no KHR_gaussian_splatting primitive"):
        read_splat_glb(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-40])
    with pytest.raises(UserError, match="cut short"):
        read_mesh_glb(path)
    path.write_bytes(whole[:8])
    with pytest.raises(UserError, match="not a GLB"):
        read_mesh_glb(path)
    path.write_bytes(whole.replace(b'"count":4', b'"count":9'))
    with pytest.raises(UserError, match="not a GLB file that can be read"):
        read_mesh_glb(path)
    path.write_bytes(whole)
    moved = pygltflib.GLTF2().load(str(path))
    moved.nodes[0].translation = [1.0, 0.0, 0.0]
    moved.save(str(path))
    with pytest.raises(UserError, match="moves its nodes"):
        read_mesh_glb(path)
    path.write_bytes(b"solid ascii STL")
    with pytest.raises(UserError, match=r"not a GLB of glTF 2\.0"):
        read_mesh_glb(path)
    write_splat_glb(path, random_scene(3))
    with pytest.raises(UserError, match="no indexed triangles"):
        read_mesh_glb(path)
