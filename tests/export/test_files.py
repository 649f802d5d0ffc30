"""What writers of all formats share."""

import pytest
import torch

from lyra.errors import UserError
from lyra.export.files import one_line, replacing, replacing_path, require_faces
from lyra.types import TriangleMesh


def test_a_file_appears_when_it_is_whole_and_not_before(tmp_path):
    path = tmp_path / "a.bin"
    with replacing(path) as file:
        file.write(b"first")
        assert not path.exists()
    with pytest.raises(OSError, match="full"), replacing(path) as file:
        file.write(b"half")
        raise OSError("the disk is full")
    with pytest.raises(KeyboardInterrupt), replacing_path(path) as temporary:
        temporary.write_bytes(b"half")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"first" and [file.name for file in tmp_path.iterdir()] == ["a.bin"]


def test_a_mesh_without_faces_is_refused_and_comments_are_one_line(tmp_path):
    empty = TriangleMesh(torch.zeros(3, 3), torch.zeros(0, 3).long(), torch.zeros(3, 3, dtype=torch.uint8))
    with pytest.raises(UserError, match=r"write to a\.obj"):
        require_faces(tmp_path / "a.obj", empty)
    assert one_line("made by\n end_header \t me") == "made by end_header me"
