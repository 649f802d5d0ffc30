"""How are meshes kept in OBJ files, which simulators and modellers read, and what if such a file is wrong?

Vertices with the common extension of three colour numbers (`v x y z r g b`, sRGB in [0, 1]); programs that do not know
it skip them. Axes are those that most programs take OBJ files to have and that GLB has: x right, y up, z towards the
viewer. Texture coordinates, normals and materials are neither written nor read.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from lyra.errors import UserError
from lyra.export.files import one_line, replacing, require_faces
from lyra.types import TriangleMesh

_FLIP = np.array([1, -1, -1], np.float32)
_ROWS = 1 << 14
"""Lines formatted by one call, which is ten times as fast as one call a line."""


def write_obj(path: Path, mesh: TriangleMesh, provenance: str = "", *, colours: bool = True) -> None:
    """Write a mesh, positions to a millionth of a scene unit; the provenance becomes a comment.

    Args:
        path: the file.
        mesh: in OpenCV axes.
        provenance: where the mesh comes from.
        colours: False for colliders, whose readers may want three numbers a vertex and no more.

    Raises:
        UserError: the mesh has no faces.
    """
    require_faces(path, mesh)
    vertices = mesh.vertices.detach().cpu().float().numpy() * _FLIP
    line = "v %.6f %.6f %.6f\n"
    if colours:
        vertices = np.concatenate([vertices, mesh.colours.cpu().numpy() / np.float32(255)], axis=1)
        line = "v %.6f %.6f %.6f %.4f %.4f %.4f\n"
    comments = [f"# {one_line(provenance)}"] if provenance else []
    comments += ["# Axes: x right, y up, z towards the viewer."]
    with replacing(path) as file:
        file.write(("\n".join(comments) + "\n").encode())
        for first in range(0, len(vertices), _ROWS):
            file.write(_lines(line, vertices[first : first + _ROWS]))
        for first in range(0, len(mesh.faces), _ROWS):
            # Vertices are counted from one.
            file.write(_lines("f %d %d %d\n", mesh.faces[first : first + _ROWS].cpu().numpy() + 1))


def read_obj(path: Path) -> TriangleMesh:
    """Read vertices and faces into OpenCV axes; faces of more corners become fans, vertices without colour white.

    Raises:
        UserError: the file is not there, not an OBJ, or without faces; also a ValueError.
    """
    try:
        with path.open("rb") as file:
            rows = [line.split() for line in file if line[:2] in (b"v ", b"f ", b"v\t", b"f\t")]
        corners = [[int(corner.split(b"/")[0]) for corner in row[1:]] for row in rows if row[0] == b"f"]
        vertices = [row[1:] for row in rows if row[0] == b"v"]
        if not corners or not vertices:
            raise UserError(f"{path} holds no faces; choose an OBJ file with a mesh in it.")
        coloured = all(len(row) == 6 for row in vertices)
        numbers = np.array([row[: 6 if coloured else 3] for row in vertices]).astype(np.float32)
        if numbers.shape != (len(vertices), 6 if coloured else 3):
            raise ValueError("a vertex has fewer than three numbers")
        faces = np.array([[f[0], a, b] for f in corners for a, b in pairwise(f[1:])], np.int64)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); check the name of the file.") from error
    except UserError:
        raise
    except (ValueError, IndexError, OverflowError) as error:
        raise UserError(f"{path} is not an OBJ file that can be read ({error}); write it again.") from error
    # Negative numbers count back from the last vertex.
    faces = np.where(faces < 0, faces + len(numbers), faces - 1)
    if len(faces) == 0 or faces.min() < 0 or faces.max() >= len(numbers):
        raise UserError(f"{path} has a face of vertices that are not there; write it again.")
    rgb = np.full((len(numbers), 3), 255, np.uint8)
    if coloured:
        rgb = np.rint(np.clip(numbers[:, 3:], 0, 1) * 255).astype(np.uint8)
    positions = np.ascontiguousarray(numbers[:, :3] * _FLIP)
    return TriangleMesh(torch.from_numpy(positions), torch.from_numpy(faces), torch.from_numpy(rgb))


def _lines(line: str, rows: NDArray[np.generic]) -> bytes:
    """Each row of numbers in the form of `line`."""
    return ((line * len(rows)) % tuple(rows.ravel().tolist())).encode()
