"""What do writers of all formats share: a file or folder that appears only when it is whole, and checks of its content.

Knows no format.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np

from lyra.errors import UserError
from lyra.types import GaussianScene, TriangleMesh


@contextmanager
def replacing_path(path: Path) -> Iterator[Path]:
    """The name of a temporary file, renamed to `path` when the block ends and removed when it fails."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A binary file under a temporary name, renamed to `path` when the block ends and removed when it fails."""
    with replacing_path(path) as temporary, temporary.open("wb") as file:
        yield file


@contextmanager
def replacing_folder(folder: Path, members: Collection[str]) -> Iterator[Path]:
    """A temporary folder that takes the place of `folder` when the block ends and is removed when it fails.

    Raises:
        UserError: `folder` holds something that is not among the `members` of such a folder, which would be lost.
    """
    others = sorted(path.name for path in folder.iterdir() if path.name not in members) if folder.is_dir() else []
    if others or folder.is_file():
        what = f"holds {others[0]}" if others else "is a file"
        raise UserError(f"{folder} {what}, which an export would replace; choose a new folder.")
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if folder.exists():
            shutil.rmtree(folder)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def require_gaussians(path: Path, scene: GaussianScene) -> GaussianScene:
    """The scene on the CPU, without gradients.

    Raises:
        UserError: it has no Gaussians, or a number in it is not finite.
    """
    if len(scene) == 0:
        raise UserError(f"There is nothing to write to {path.name}: the scene has no Gaussians; lift a world first.")
    fields = {
        name: getattr(scene, name).detach().cpu().float() for name in ("means", "quats", "scales", "opacities", "sh")
    }
    # A sum is not finite when a term is not, and takes a tenth of the time of a mask.
    unfit = [name for name, value in fields.items() if not np.isfinite(value.numpy().sum(dtype=np.float64))]
    if unfit:
        raise UserError(
            f"The scene for {path.name} has {', '.join(unfit)} that are not finite; drop such Gaussians before export."
        )
    return GaussianScene(**fields)


def require_faces(path: Path, mesh: TriangleMesh) -> None:
    """Check that a mesh has a triangle.

    Raises:
        UserError: it has none.
    """
    if len(mesh.faces) == 0:
        raise UserError(f"There is nothing to write to {path.name}: the mesh has no faces.")


def one_line(text: str) -> str:
    """A text whose white space is single spaces, because a line break would end the comments of many formats."""
    return " ".join(text.split())
