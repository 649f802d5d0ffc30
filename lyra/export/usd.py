"""How does a world become a place for a robot: one USD stage with splats, surface, collider, physics and the walk?

The stage is what simulators expect: z up, metres, kilograms, a static collider of triangles, a physics scene and a
physics material. OpenCV axes become (x, z, -y), then the world is levelled with its up direction; both are applied to
the numbers themselves, to splats, meshes, cameras and drop points alike, and not left to transform operations, so that
every loader agrees. `usd_layers` knows the prims and imports pxr; this module does not, so that the rest of the
project works where there is no usd-core. Knows no physics engine.
"""

from __future__ import annotations

import importlib.util
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from lyra.errors import UserError
from lyra.export.files import require_gaussians
from lyra.geometry.rotations import (
    axis_angle_to_matrix,
    canonical_quaternion,
    matrix_to_quaternion,
    multiply_quaternions,
)
from lyra.types import Cameras, GaussianScene, TriangleMesh

SUFFIXES = (".usdc", ".usda", ".usdz")
"""Binary, text, and a package of one binary file."""
UP = (0.0, -1.0, 0.0)
"""Up in the world of a level camera, whose y axis points down."""
OPENCV_TO_Z_UP = ((1.0, 0.0, 0.0), (0.0, 0.0, 1.0), (0.0, -1.0, 0.0))
"""(x, y, z) of OpenCV becomes (x, z, -y): x right, y forward, z up."""
STAGE_SH = (1, 16)
"""Coefficients that simulators import: degree 0 or degree 3 (fvdb-reality-capture issue 124)."""


@dataclass(frozen=True)
class StageTransform:
    """From world axes and units to those of a stage: p_stage = scale * rotation @ p_world."""

    rotation: Float[Tensor, "3 3"]
    scale: float
    """Metres per scene unit."""

    @classmethod
    def levelled(cls, up: Float[Tensor, "3"], metres_per_unit: float = 1.0) -> StageTransform:
        """The change of axes, then the smallest rotation that makes `up`, in OpenCV axes, the z axis.

        Raises:
            UserError: `up` has no direction, or the scale is not a positive number.
        """
        up = up.detach().cpu().double()
        if not bool(up.isfinite().all()) or float(up.norm()) < 1e-6:
            raise UserError(f"The up direction {up.tolist()} points nowhere; give three numbers such as (0, -1, 0).")
        if not (math.isfinite(metres_per_unit) and metres_per_unit > 0):
            raise UserError(f"A scene unit cannot be {metres_per_unit} metres; give a positive number.")
        axes = torch.tensor(OPENCV_TO_Z_UP, dtype=torch.float64)
        vertical = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)
        tilted = normalize(axes @ up, dim=0)
        across = torch.linalg.cross(tilted, vertical)
        angle = torch.atan2(across.norm(), tilted @ vertical)
        if float(across.norm()) < 1e-12:
            # Level already, or upside down, which a half turn about any horizontal axis puts right.
            across = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
        return cls(axis_angle_to_matrix(normalize(across, dim=0) * angle) @ axes, float(metres_per_unit))

    def inverse(self) -> StageTransform:
        """From the stage back to the world."""
        return StageTransform(self.rotation.T, 1 / self.scale)

    def points(self, points: Float[Tensor, "*batch 3"]) -> Float[Tensor, "*batch 3"]:
        """Moved positions, on the CPU and in float32."""
        return (self.scale * points.detach().cpu().double() @ self.rotation.T).float()

    def mesh(self, mesh: TriangleMesh) -> TriangleMesh:
        """The moved mesh; the rotation is proper, so faces keep their outside."""
        return TriangleMesh(self.points(mesh.vertices), mesh.faces.cpu(), mesh.colours.cpu())

    def scene(self, scene: GaussianScene) -> GaussianScene:
        """The moved Gaussians: means, axes, sizes, and the directions that their colours depend on."""
        turn = matrix_to_quaternion(self.rotation).expand(len(scene), 4)
        quats = multiply_quaternions(turn, normalize(scene.quats.detach().cpu().double(), dim=-1))
        return GaussianScene(
            means=self.points(scene.means),
            quats=canonical_quaternion(quats).float(),
            scales=scene.scales.detach().cpu().float() * self.scale,
            opacities=scene.opacities.detach().cpu().float(),
            sh=rotate_sh(scene.sh.detach().cpu(), self.rotation),
        )

    def poses(self, cameras: Cameras) -> Float[Tensor, "n 4 4"]:
        """Camera-to-stage matrices of USD cameras, which look along -z with y up."""
        c2w = torch.linalg.inv(cameras.w2c.detach().cpu().double())
        flip = torch.tensor([1.0, -1.0, -1.0], dtype=torch.float64)
        poses = torch.eye(4, dtype=torch.float64).repeat(len(cameras), 1, 1)
        poses[:, :3, :3] = self.rotation @ c2w[:, :3, :3] * flip
        poses[:, :3, 3] = self.scale * c2w[:, :3, 3] @ self.rotation.T
        return poses


@dataclass(frozen=True)
class UsdWorld:
    """What `read_usd` finds, in the world's own axes and units."""

    scene: GaussianScene | None
    """With 1 or 16 coefficients, as the stage has them."""
    mesh: TriangleMesh | None
    collider: TriangleMesh | None
    """Grey, because a collider has no colour."""
    drop_points: Float[Tensor, "n 3"] | None
    provenance: str


def write_usd(
    path: str | Path,
    scene: GaussianScene | None,
    mesh: TriangleMesh | None,
    collider: TriangleMesh | None,
    *,
    up: Float[Tensor, "3"] | None = None,
    cameras: Cameras | None = None,
    drop_points: Float[Tensor, "n 3"] | None = None,
    metres_per_unit: float = 1.0,
    provenance: str = "",
) -> None:
    """Write a stage at once; the same world always gives the same bytes.

    Prims: /World/Splats, /World/Mesh, /World/Collider, /World/Camera (time-sampled along the walk),
    /World/PhysicsScene and /World/PhysicsMaterial. One appearance is shown at a time: with splats the mesh is there
    but invisible, for programs that cannot show splats; the collider is a guide unless it is all there is.

    Args:
        path: ends in .usdc, .usda or .usdz.
        scene: Gaussians; their spherical harmonics are padded to degree 3 when they have more than degree 0.
        mesh: the surface to see.
        collider: the surface to stand on.
        up: in world axes, (0, -1, 0) when None; need not be of unit length.
        cameras: the walked path.
        drop_points: places on walkable ground in world axes, kept in the stage for tests of the collider.
        metres_per_unit: size of a scene unit; the stage itself is always in metres.
        provenance: becomes the comment of the layer.

    Raises:
        UserError: usd-core is not installed, the path is no good, or what to write is missing, empty or not finite.
    """
    path = Path(path)
    require_usd()
    _check_path(path)
    if scene is None and mesh is None and collider is None:
        raise UserError(f"There is nothing to write to {path.name}: give Gaussians, a mesh or a collider.")
    transform = StageTransform.levelled(torch.tensor(UP) if up is None else up, metres_per_unit)

    from lyra.export import usd_layers

    stage = usd_layers.new_stage(transform, provenance)
    if scene is not None:
        moved = transform.scene(require_gaussians(path, scene))
        usd_layers.add_splats(stage, moved, pad_sh(moved.sh))
    if mesh is not None:
        usd_layers.add_mesh(stage, transform.mesh(_sound(path, mesh, "mesh")), shown=scene is None)
    if collider is not None:
        alone = scene is None and mesh is None
        usd_layers.add_collider(stage, transform.mesh(_sound(path, collider, "collider")), shown=alone)
    if cameras is not None and len(cameras):
        usd_layers.add_camera(stage, cameras, transform.poses(cameras))
    if drop_points is not None:
        usd_layers.set_drop_points(stage, transform.points(drop_points))
    # Beside the file, so that the last step is a rename within one disk; USD goes by the suffix.
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        finished = usd_layers.save(stage, Path(folder), path.stem, path.suffix)
        finished.replace(path)


def read_usd(path: str | Path) -> UsdWorld:
    """What `write_usd` wrote, back in the world's axes and units.

    Raises:
        UserError: usd-core is not installed, the file is not there or not USD, or nothing in it is from `write_usd`.
    """
    path = Path(path)
    require_usd()
    if not path.is_file():
        raise UserError(f"There is no file {path}; check the name.")

    from lyra.export import usd_layers

    stage = usd_layers.open_stage(path)
    transform = usd_layers.transform_of(stage)
    if transform is None:
        raise UserError(f"{path.name} has no world in it that this program wrote; export one with `lyra export` first.")
    back = transform.inverse()
    scene, drop_points = usd_layers.splats_of(stage), usd_layers.drop_points_of(stage)
    mesh, collider = usd_layers.mesh_of(stage, usd_layers.MESH), usd_layers.mesh_of(stage, usd_layers.COLLIDER)
    return UsdWorld(
        scene=None if scene is None else back.scene(scene),
        mesh=None if mesh is None else back.mesh(mesh),
        collider=None if collider is None else back.mesh(collider),
        drop_points=None if drop_points is None else back.points(drop_points),
        provenance=stage.GetRootLayer().comment,
    )


def require_usd() -> None:
    """Check that pxr can be imported.

    Raises:
        UserError: it cannot.
    """
    if importlib.util.find_spec("pxr") is None:
        raise UserError("USD files need the package usd-core; use Python 3.11 or later and `pip install usd-core`.")


def rotate_sh(sh: Float[Tensor, "n k 3"], rotation: Float[Tensor, "3 3"]) -> Float[Tensor, "n k 3"]:
    """Coefficients whose colour in direction `rotation @ d` is the old colour in direction d.

    A rotation maps each degree onto itself, so the matrix that does it follows from the basis in enough directions.

    Raises:
        UserError: the number of coefficients is not that of degree 0, 1, 2 or 3.
    """
    count = sh.shape[1]
    if count not in (1, 4, 9, 16):
        raise UserError(
            f"Gaussians with {count} coefficients a colour are of no degree from 0 to 3; give 1, 4, 9 or 16."
        )
    if count == 1:
        return sh.float()
    # Golden spiral: directions that are spread evenly, four for each coefficient.
    index = torch.arange(64, dtype=torch.float64, device=sh.device)
    height, turn = 1 - (2 * index + 1) / 64, index * (math.pi * (3 - math.sqrt(5)))
    radius = (1 - height * height).sqrt()
    directions = torch.stack([radius * turn.cos(), radius * turn.sin(), height], dim=-1)
    rotation = rotation.to(sh.device, torch.float64)
    new, old = sh_basis(directions, count), sh_basis(directions @ rotation, count)
    matrix = torch.linalg.lstsq(new, old).solution
    return torch.einsum("ij,njc->nic", matrix, sh.double()).float()


def sh_basis(directions: Float[Tensor, "m 3"], count: int) -> Float[Tensor, "m {count}"]:
    """Real spherical harmonics up to degree 3 with the signs of 3D Gaussian splatting (Kerbl et al. 2023)."""
    x, y, z = directions.unbind(-1)
    xx, yy, zz = x * x, y * y, z * z
    values = [
        torch.full_like(x, 0.28209479177387814),
        -0.4886025119029199 * y,
        0.4886025119029199 * z,
        -0.4886025119029199 * x,
        1.0925484305920792 * x * y,
        -1.0925484305920792 * y * z,
        0.31539156525252005 * (2 * zz - xx - yy),
        -1.0925484305920792 * x * z,
        0.5462742152960396 * (xx - yy),
        -0.5900435899266435 * y * (3 * xx - yy),
        2.890611442640554 * x * y * z,
        -0.4570457994644658 * y * (4 * zz - xx - yy),
        0.3731763325901154 * z * (2 * zz - 3 * xx - 3 * yy),
        -0.4570457994644658 * x * (4 * zz - xx - yy),
        1.445305721320277 * z * (xx - yy),
        -0.5900435899266435 * x * (xx - 3 * yy),
    ]
    return torch.stack(values[:count], dim=-1)


def pad_sh(sh: Float[Tensor, "n k 3"]) -> Float[Tensor, "n stage 3"]:
    """Zeros after the coefficients, up to a number that simulators import."""
    wanted = next(count for count in STAGE_SH if count >= sh.shape[1])
    return torch.cat([sh, sh.new_zeros(len(sh), wanted - sh.shape[1], 3)], dim=1)


def _check_path(path: Path) -> None:
    """The suffix decides the format, and the folder must be there."""
    if path.suffix not in SUFFIXES:
        raise UserError(f"A USD file cannot be called {path.name}; let its name end in {', '.join(SUFFIXES)}.")
    if not path.parent.is_dir():
        raise UserError(f"There is no folder {path.parent} to write {path.name} to; make it first.")


def _sound(path: Path, mesh: TriangleMesh, name: str) -> TriangleMesh:
    """The mesh, if a physics engine can take it."""
    if len(mesh.faces) == 0:
        raise UserError(f"The {name} for {path.name} has no faces; make one from depth or splats first.")
    if not bool(mesh.vertices.isfinite().all()):
        raise UserError(f"The {name} for {path.name} has vertices that are not finite; make it again.")
    if int(mesh.faces.min()) < 0 or int(mesh.faces.max()) >= len(mesh.vertices):
        raise UserError(f"The {name} for {path.name} has faces whose vertices it lacks; make it again.")
    return mesh
