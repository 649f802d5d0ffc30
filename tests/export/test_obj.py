"""OBJ files are opened by trimesh and read back."""

import numpy as np
import pytest
import torch
import trimesh

from lyra.errors import UserError
from lyra.export.obj import read_obj, write_obj
from lyra.types import TriangleMesh
from tests.export.test_gltf import Y_UP, coloured_mesh


def test_trimesh_opens_the_coloured_mesh_with_y_up(tmp_path):
    mesh = coloured_mesh()
    write_obj(tmp_path / "a.obj", mesh, "made in\na test")
    theirs = trimesh.load(tmp_path / "a.obj", process=False)
    # trimesh orders vertices by face, so the shape and the colour of each corner are compared.
    assert theirs.is_watertight
    assert theirs.volume == pytest.approx(1 / 6)
    for corner, colour in zip(theirs.vertices, theirs.visual.vertex_colors, strict=True):
        ours = np.abs(mesh.vertices.numpy() @ Y_UP - corner).sum(1).argmin()
        assert list(colour[:3]) == mesh.colours[ours].tolist()
    assert (tmp_path / "a.obj").read_text().startswith("# made in a test\n")


def test_round_trip_keeps_faces_colours_and_a_millionth_of_a_unit(tmp_path):
    generator = torch.Generator().manual_seed(0)
    vertices = torch.randn(40_000, 3, generator=generator)
    faces = torch.randint(0, 40_000, (20_000, 3), generator=generator)
    colours = torch.randint(0, 256, (40_000, 3), generator=generator, dtype=torch.uint8)
    write_obj(tmp_path / "a.obj", TriangleMesh(vertices, faces, colours))
    again = read_obj(tmp_path / "a.obj")
    assert (again.vertices - vertices).abs().max() < 1e-6
    assert torch.equal(again.faces, faces)
    assert torch.equal(again.colours, colours)


def test_collider_has_three_numbers_a_vertex(tmp_path):
    write_obj(tmp_path / "a.obj", coloured_mesh(), colours=False)
    vertices = [line.split() for line in (tmp_path / "a.obj").read_text().splitlines() if line.startswith("v ")]
    assert [len(words) for words in vertices] == [4] * 4
    assert int(read_obj(tmp_path / "a.obj").colours.min()) == 255
    assert trimesh.load(tmp_path / "a.obj").volume == pytest.approx(1 / 6)


def test_quads_slashes_and_negative_numbers_of_other_writers_are_read(tmp_path):
    text = "mtllib x.mtl\nv 0 0 0\nv 1 0 0\nv 1 1 0\nv 0 1 0\nvn 0 0 1\nf 1//1 2//1 3//1 4//1\nf -4 -2 -1\n"
    (tmp_path / "a.obj").write_text(text)
    mesh = read_obj(tmp_path / "a.obj")
    assert mesh.faces.tolist() == [[0, 1, 2], [0, 2, 3], [0, 2, 3]]
    assert mesh.vertices[2].tolist() == [1.0, -1.0, 0.0]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("v 0 0 0\n", "no faces"),
        ("v 0 0 0\nf 1 2 3\n", "vertices that are not there"),
        ("v 0 0 0\nv 1 0 0\nv 0 1 0\nf 0 1 2\n", "vertices that are not there"),
        ("v 0 0 zero\nf 1 1 1\n", "not an OBJ file"),
        ("v 0 0\nf 1 1 1\n", "not an OBJ file"),
    ],
)
def test_wrong_files_are_refused_in_one_sentence(tmp_path, text, words):
    (tmp_path / "a.obj").write_text(text)
    with pytest.raises(UserError, match=words):
        read_obj(tmp_path / "a.obj")


def test_missing_file_and_empty_mesh_are_refused(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        read_obj(tmp_path / "none.obj")
    mesh = coloured_mesh()
    with pytest.raises(UserError, match="no faces"):
        write_obj(tmp_path / "a.obj", TriangleMesh(mesh.vertices, mesh.faces[:0], mesh.colours))
