"""Which prims, attributes and metadata does a world have in USD, and how are they read back?

Takes everything in the axes and units of the stage; the way there is in `usd`. Needs usd-core 26.3 or later, where
ParticleField3DGaussianSplat is part of UsdVol.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from pxr import Gf, Sdf, Tf, Usd, UsdGeom, UsdPhysics, UsdShade, UsdUtils, UsdVol, Vt
from torch import Tensor

from lyra.errors import UserError
from lyra.export.usd import StageTransform
from lyra.export.video import FRAMES_PER_SECOND
from lyra.geometry.rotations import canonical_quaternion, quaternion_to_matrix
from lyra.types import Cameras, GaussianScene, TriangleMesh

ROOT = "/World"
SPLATS = "/World/Splats"
MESH = "/World/Mesh"
COLLIDER = "/World/Collider"
CAMERA = "/World/Camera"
PHYSICS_SCENE = "/World/PhysicsScene"
PHYSICS_MATERIAL = "/World/PhysicsMaterial"
WORLD_TO_STAGE = "lyra:worldToStage"
"""Custom data of the root: the 4x4 matrix that was applied, for row vectors as all of USD."""
DROP_POINTS = "lyra:dropPoints"
"""Custom data of the root: places on walkable ground, in stage axes."""
RADIANCE_SPACE = "srgb_rec709_display"
"""Radiance is fitted to sRGB images and blended as such (3dgrut's and Newton's name; USD lists none for it)."""
LINEAR_SPACE = "lin_rec709_scene"
"""What displayColor means in USD."""
GRAVITY = 9.81
STATIC_FRICTION, DYNAMIC_FRICTION, RESTITUTION = 0.8, 0.7, 0.0
"""Rubber on stone or wood; authored, because an applied material without values has no friction at all."""
EXTENT_DEVIATIONS = 3.0
"""An extent holds this many standard deviations of each Gaussian."""
APERTURE = 20.955
"""Width of the film in tenths of a unit, the schema's own; only its ratio to the focal length matters."""
GREY = 128
PACKAGE_TIME = 315_619_200
"""1 January 1980, 12:00 UTC: about as early as a zip file can say."""


def new_stage(transform: StageTransform, provenance: str) -> Usd.Stage:
    """A stage in memory with its metadata, the root and the physics scene."""
    stage = Usd.Stage.CreateInMemory()
    UsdGeom.SetStageUpAxis(stage, UsdGeom.Tokens.z)
    UsdGeom.SetStageMetersPerUnit(stage, 1.0)
    UsdPhysics.SetStageKilogramsPerUnit(stage, 1.0)
    root = UsdGeom.Xform.Define(stage, ROOT).GetPrim()
    stage.SetDefaultPrim(root)
    stage.GetRootLayer().comment = provenance
    matrix = np.eye(4)
    matrix[:3, :3] = transform.scale * transform.rotation.T.double().numpy()
    root.SetCustomDataByKey(WORLD_TO_STAGE, Gf.Matrix4d(matrix))
    scene = UsdPhysics.Scene.Define(stage, PHYSICS_SCENE)
    scene.CreateGravityDirectionAttr(Gf.Vec3f(0.0, 0.0, -1.0))
    scene.CreateGravityMagnitudeAttr(GRAVITY)
    return stage


def add_splats(stage: Usd.Stage, scene: GaussianScene, sh: Float[Tensor, "n k 3"]) -> None:
    """The Gaussians, with padded coefficients."""
    splats = UsdVol.ParticleField3DGaussianSplat.Define(stage, SPLATS)
    prim = splats.GetPrim()
    splats.CreatePositionsAttr(_vectors(scene.means))
    # Gf.Quatf is written real part first, but its buffer holds the imaginary part first.
    splats.CreateOrientationsAttr(Vt.QuatfArray.FromNumpy(_floats(scene.quats[:, [1, 2, 3, 0]])))
    splats.CreateScalesAttr(_vectors(scene.scales))
    splats.CreateOpacitiesAttr(Vt.FloatArray.FromNumpy(_floats(scene.opacities)))
    # The schema's degree is 3 unless one is authored, also for data of degree 0.
    splats.CreateRadianceSphericalHarmonicsDegreeAttr(round(sh.shape[1] ** 0.5) - 1)
    coefficients = splats.CreateRadianceSphericalHarmonicsCoefficientsAttr(_vectors(sh.flatten(0, 1)))
    # Renderers differ in where they look for the space of the radiance: on the prim or on the attribute.
    Usd.ColorSpaceAPI.Apply(prim).CreateColorSpaceNameAttr(RADIANCE_SPACE)
    coefficients.SetColorSpace(RADIANCE_SPACE)
    splats.CreateProjectionModeHintAttr(UsdVol.Tokens.perspective)
    splats.CreateSortingModeHintAttr(UsdVol.Tokens.zDepth)
    # Half the box around an ellipsoid: the row norms of its axes.
    axes = quaternion_to_matrix(scene.quats) * scene.scales[:, None, :]
    half = EXTENT_DEVIATIONS * axes.norm(dim=-1)
    corners = torch.stack([(scene.means - half).amin(0), (scene.means + half).amax(0)])
    splats.CreateExtentAttr(_vectors(corners))


def add_mesh(stage: Usd.Stage, mesh: TriangleMesh, *, shown: bool) -> None:
    """The surface to see, with a linear colour at each vertex."""
    geometry = _triangles(stage, MESH, mesh)
    # A reconstruction is a sheet, of which the viewer may be on the other side.
    geometry.CreateDoubleSidedAttr(True)
    colour = geometry.CreateDisplayColorPrimvar(UsdGeom.Tokens.vertex)
    colour.Set(_vectors(_linear(mesh.colours)))
    colour.GetAttr().SetColorSpace(LINEAR_SPACE)
    if not shown:
        geometry.CreateVisibilityAttr(UsdGeom.Tokens.invisible)


def add_collider(stage: Usd.Stage, collider: TriangleMesh, *, shown: bool) -> None:
    """A static collider: every triangle counts, and nothing moves because there is no rigid body."""
    geometry = _triangles(stage, COLLIDER, collider)
    prim = geometry.GetPrim()
    UsdPhysics.CollisionAPI.Apply(prim)
    UsdPhysics.MeshCollisionAPI.Apply(prim).CreateApproximationAttr(UsdPhysics.Tokens.none)
    geometry.CreatePurposeAttr(UsdGeom.Tokens.default_ if shown else UsdGeom.Tokens.guide)
    material = UsdShade.Material.Define(stage, PHYSICS_MATERIAL)
    physics = UsdPhysics.MaterialAPI.Apply(material.GetPrim())
    physics.CreateStaticFrictionAttr(STATIC_FRICTION)
    physics.CreateDynamicFrictionAttr(DYNAMIC_FRICTION)
    physics.CreateRestitutionAttr(RESTITUTION)
    binding = UsdShade.MaterialBindingAPI.Apply(prim)
    binding.Bind(material, UsdShade.Tokens.weakerThanDescendants, "physics")


def add_camera(stage: Usd.Stage, cameras: Cameras, poses: Float[Tensor, "n 4 4"]) -> None:
    """A camera that walks the path, one time code a frame, and stands at its beginning without a time."""
    stage.SetTimeCodesPerSecond(FRAMES_PER_SECOND)
    stage.SetFramesPerSecond(FRAMES_PER_SECOND)
    stage.SetStartTimeCode(0)
    stage.SetEndTimeCode(len(cameras) - 1)
    camera = UsdGeom.Camera.Define(stage, CAMERA)
    camera.CreateProjectionAttr(UsdGeom.Tokens.perspective)
    camera.CreateClippingRangeAttr(Gf.Vec2f(0.01, 10_000.0))
    camera.CreateHorizontalApertureAttr(APERTURE)
    width, height = cameras.image_width, cameras.image_height
    k = cameras.intrinsics.detach().cpu().double()
    focal = k[:, 0, 0] * APERTURE / width
    tall = focal * height / k[:, 1, 1]
    lenses = {
        camera.CreateFocalLengthAttr(): focal,
        camera.CreateVerticalApertureAttr(): tall,
        # The film is moved to where the picture's centre is, seen from the principal point.
        camera.CreateHorizontalApertureOffsetAttr(): (0.5 - k[:, 0, 2] / width) * APERTURE,
        camera.CreateVerticalApertureOffsetAttr(): (k[:, 1, 2] / height - 0.5) * tall,
    }
    for attribute, values in lenses.items():
        attribute.Set(float(values[0]))
        if bool((values != values[0]).any()):
            for frame, value in enumerate(values.tolist()):
                attribute.Set(value, frame)
    pose = camera.MakeMatrixXform()
    matrices = [Gf.Matrix4d(matrix.T.numpy()) for matrix in poses]
    pose.Set(matrices[0])
    for frame, matrix in enumerate(matrices):
        pose.Set(matrix, frame)


def set_drop_points(stage: Usd.Stage, points: Float[Tensor, "n 3"]) -> None:
    """Places on walkable ground, as custom data of the root."""
    stage.GetPrimAtPath(ROOT).SetCustomDataByKey(DROP_POINTS, _vectors(points))


def save(stage: Usd.Stage, folder: Path, stem: str, suffix: str) -> Path:
    """Write the stage into a folder of its own; a package holds one binary layer named like it."""
    layer = folder / f"{Tf.MakeValidIdentifier(stem)}{'.usdc' if suffix == '.usdz' else suffix}"
    if not stage.GetRootLayer().Export(os.fspath(layer)):
        raise UserError(f"{stem}{suffix} could not be written; see whether the disk is full.")
    if suffix != ".usdz":
        return layer
    # Packages note when their files were changed, which would make each export of one world another file.
    os.utime(layer, (PACKAGE_TIME, PACKAGE_TIME))
    package = folder / "package.usdz"
    if not UsdUtils.CreateNewUsdzPackage(Sdf.AssetPath(os.fspath(layer)), os.fspath(package)):
        raise UserError(f"{stem}{suffix} could not be packed; see whether the disk is full.")
    return package


def open_stage(path: Path) -> Usd.Stage:
    """The stage in a file as it is now, whatever the process has read under this name before.

    Raises:
        UserError: the file is not USD.
    """
    try:
        return Usd.Stage.Open(Sdf.Layer.OpenAsAnonymous(os.fspath(path)))
    except Tf.ErrorException as error:
        raise UserError(f"{path.name} is not a readable USD file; export the world again.") from error


def transform_of(stage: Usd.Stage) -> StageTransform | None:
    """The transformation that was applied to the world, if one is noted."""
    root = stage.GetPrimAtPath(ROOT)
    matrix = root.GetCustomDataByKey(WORLD_TO_STAGE) if root else None
    if not isinstance(matrix, Gf.Matrix4d):
        return None
    turned = torch.from_numpy(np.array(matrix)[:3, :3].T.copy())
    scale = float(torch.linalg.det(turned)) ** (1 / 3)
    return StageTransform(turned / scale, scale)


def drop_points_of(stage: Usd.Stage) -> Float[Tensor, "n 3"] | None:
    """Places on walkable ground, if they are noted."""
    points = stage.GetPrimAtPath(ROOT).GetCustomDataByKey(DROP_POINTS)
    return None if points is None else _tensor(points)


def splats_of(stage: Usd.Stage) -> GaussianScene | None:
    """The Gaussians, if there are any."""
    splats = UsdVol.ParticleField3DGaussianSplat.Get(stage, SPLATS)
    if not splats:
        return None
    count = (splats.GetRadianceSphericalHarmonicsDegreeAttr().Get() + 1) ** 2
    return GaussianScene(
        means=_tensor(splats.GetPositionsAttr().Get()),
        quats=canonical_quaternion(_tensor(splats.GetOrientationsAttr().Get())[:, [3, 0, 1, 2]]),
        scales=_tensor(splats.GetScalesAttr().Get()),
        opacities=_tensor(splats.GetOpacitiesAttr().Get()),
        sh=_tensor(splats.GetRadianceSphericalHarmonicsCoefficientsAttr().Get()).unflatten(0, (-1, count)),
    )


def mesh_of(stage: Usd.Stage, path: str) -> TriangleMesh | None:
    """A mesh of triangles, if there is one; grey when it has no colours."""
    mesh = UsdGeom.Mesh.Get(stage, path)
    if not mesh:
        return None
    vertices = _tensor(mesh.GetPointsAttr().Get())
    linear = mesh.GetDisplayColorPrimvar().Get()
    colours = torch.full(vertices.shape, GREY, dtype=torch.uint8) if linear is None else _srgb(_tensor(linear))
    faces = torch.from_numpy(np.array(mesh.GetFaceVertexIndicesAttr().Get(), dtype=np.int64)).unflatten(0, (-1, 3))
    return TriangleMesh(vertices, faces, colours)


def _triangles(stage: Usd.Stage, path: str, mesh: TriangleMesh) -> UsdGeom.Mesh:
    """The geometry of a mesh; not a cage for a subdivision surface, which a mesh is unless it says so."""
    geometry = UsdGeom.Mesh.Define(stage, path)
    geometry.CreatePointsAttr(_vectors(mesh.vertices))
    geometry.CreateFaceVertexIndicesAttr(Vt.IntArray.FromNumpy(mesh.faces.flatten().numpy().astype(np.int32)))
    geometry.CreateFaceVertexCountsAttr(Vt.IntArray.FromNumpy(np.full(len(mesh.faces), 3, np.int32)))
    geometry.CreateSubdivisionSchemeAttr(UsdGeom.Tokens.none)
    geometry.CreateExtentAttr(_vectors(torch.stack([mesh.vertices.amin(0), mesh.vertices.amax(0)])))
    return geometry


def _linear(colours: Tensor) -> Float[Tensor, "v 3"]:
    """8-bit sRGB as linear light (IEC 61966-2-1)."""
    value = colours.float() / 255
    return torch.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def _srgb(linear: Float[Tensor, "v 3"]) -> Tensor:
    """Linear light as 8-bit sRGB."""
    linear = linear.clamp(0, 1)
    value = torch.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return (value * 255).round().to(torch.uint8)


def _floats(values: Tensor) -> NDArray[np.float32]:
    """Contiguous float32 in memory of the CPU."""
    return np.ascontiguousarray(values.detach().cpu().float().numpy())


def _vectors(values: Float[Tensor, "n 3"]) -> Vt.Vec3fArray:
    """Triples of floats as USD keeps them."""
    return Vt.Vec3fArray.FromNumpy(_floats(values))


def _tensor(values: Vt.Vec3fArray) -> Tensor:
    """An array of USD as a tensor of its own."""
    return torch.from_numpy(np.array(values, dtype=np.float32))
