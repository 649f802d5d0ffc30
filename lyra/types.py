"""What the stages hand to each other: cameras, depth maps and Gaussian scenes, as frozen dataclasses of tensors.

Knows no file format, no model and no stage. Conventions: OpenCV cameras (x right, y down, z forward), `w2c` is
world-to-camera, intrinsics are in pixels, quaternions are wxyz, and Gaussian fields are named as in gsplat.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor


@dataclass(frozen=True)
class Cameras:
    """A path of pinhole cameras that share one image size."""

    w2c: Float[Tensor, "n 4 4"]
    """World-to-camera matrices."""
    intrinsics: Float[Tensor, "n 3 3"]
    """Pinhole matrices K in pixels of an image of `image_height` x `image_width`."""
    image_height: int
    image_width: int

    def __len__(self) -> int:
        return self.w2c.shape[0]

    def __getitem__(self, index: int | slice | Sequence[int]) -> Cameras:
        """Cameras at an index, a slice or a list of indices; always a path, even of one camera."""
        if isinstance(index, int):
            index = [index]
        return Cameras(self.w2c[index], self.intrinsics[index], self.image_height, self.image_width)

    @property
    def c2w(self) -> Float[Tensor, "n 4 4"]:
        """Camera-to-world matrices."""
        return torch.linalg.inv(self.w2c)

    @property
    def centres(self) -> Float[Tensor, "n 3"]:
        """Camera centres in world units."""
        return self.c2w[:, :3, 3]

    def to(self, device: torch.device) -> Cameras:
        """The same cameras with their tensors on a device."""
        return Cameras(self.w2c.to(device), self.intrinsics.to(device), self.image_height, self.image_width)

    def resized(self, height: int, width: int) -> Cameras:
        """The same cameras for an image stretched to height x width pixels (each axis scaled on its own)."""
        scale = torch.tensor([width / self.image_width, height / self.image_height, 1.0], dtype=self.intrinsics.dtype)
        intrinsics = self.intrinsics * scale.to(self.intrinsics.device)[None, :, None]
        return Cameras(self.w2c, intrinsics, height, width)

    @staticmethod
    def concatenate(parts: Sequence[Cameras]) -> Cameras:
        """One path from several of the same image size, in order."""
        first = parts[0]
        if any((p.image_height, p.image_width) != (first.image_height, first.image_width) for p in parts):
            raise ValueError("cameras of different image sizes cannot be joined; use Cameras.resized first")
        w2c = torch.cat([p.w2c for p in parts])
        return Cameras(w2c, torch.cat([p.intrinsics for p in parts]), first.image_height, first.image_width)


@dataclass(frozen=True)
class DepthMap:
    """Depth of one view along the camera's z axis, with the camera it was measured for."""

    depth: Float[Tensor, "h w"]
    """z depth in scene units (metre-like); sky is far but finite."""
    valid: Bool[Tensor, "h w"]
    """False where the depth says nothing."""
    sky: Bool[Tensor, "h w"]
    """True where the view is open sky, so that no path is blocked by it."""
    intrinsics: Float[Tensor, "3 3"]
    """Pinhole matrix in pixels of this map."""


@dataclass(frozen=True)
class GaussianScene:
    """3D Gaussians in OpenCV world axes, in linear quantities (not logits or logarithms)."""

    means: Float[Tensor, "n 3"]
    quats: Float[Tensor, "n 4"]
    """Unit quaternions, wxyz."""
    scales: Float[Tensor, "n 3"]
    """Standard deviations in scene units."""
    opacities: Float[Tensor, "n"]
    """In (0, 1)."""
    sh: Float[Tensor, "n k 3"]
    """Spherical-harmonic coefficients, degree 0 first; colour = 0.5 + 0.2820948 * sh[:, 0] for degree 0."""

    def __len__(self) -> int:
        return self.means.shape[0]

    def save(self, path: str | Path) -> None:
        """Write a splat PLY in the INRIA layout."""
        # Imported here because the file formats know this class.
        from lyra.export.ply import write_splat_ply

        write_splat_ply(Path(path), self)


@dataclass(frozen=True)
class TriangleMesh:
    """A coloured surface in OpenCV world axes; faces are counter-clockwise seen from outside, in free space."""

    vertices: Float[Tensor, "v 3"]
    """In scene units."""
    faces: Int[Tensor, "f 3"]
    """Indices of vertices."""
    colours: UInt8[Tensor, "v 3"]
    """sRGB of each vertex."""
