"""How are meshes and Gaussians kept in GLB files (binary glTF 2.0), and what if such a file is wrong?

Meshes are triangles with vertex colours, unlit because the photo's light is in them. Gaussians follow the Khronos
extension KHR_gaussian_splatting: a primitive of points that programs without the extension still show as a coloured
cloud. Axes are glTF's (x right, y up, z towards the viewer), so everything is turned by half a turn about x on the way
out and in. Colours in COLOR_0 are linear, as glTF has them. Reading is for such files, not for any glTF scene.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lyra import __version__
from lyra.errors import UserError
from lyra.export.files import replacing, require_faces, require_gaussians
from lyra.export.ply import NEAREST_TO_CERTAIN
from lyra.export.splat import SH_C0
from lyra.export.spz import turned_about_x
from lyra.types import GaussianScene, TriangleMesh

SPLATS = "KHR_gaussian_splatting"
UNLIT = "KHR_materials_unlit"
_MAGIC, _JSON, _BIN = 0x46546C67, 0x4E4F534A, 0x004E4942
_POINTS, _TRIANGLES = 0, 4
_VERTICES, _INDICES = 34962, 34963
_COMPONENTS = {5120: "i1", 5121: "u1", 5122: "<i2", 5123: "<u2", 5125: "<u4", 5126: "<f4"}
_CODES = {np.dtype(name): code for code, name in _COMPONENTS.items()}
_WIDTHS = {"SCALAR": 1, "VEC2": 2, "VEC3": 3, "VEC4": 4}
_COEFFICIENTS = (1, 4, 9, 16)
_FLIP = np.array([1, -1, -1], np.float32)
_UNREADABLE = (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError, struct.error, RecursionError)
"""What a file with wrong contents leads to while it is taken apart."""


def srgb_to_linear(srgb: NDArray[np.floating]) -> NDArray[np.floating]:
    """Linear light of sRGB values, both in [0, 1] (IEC 61966-2-1)."""
    return np.where(srgb <= 0.04045, srgb / 12.92, ((np.maximum(srgb, 0.04045) + 0.055) / 1.055) ** 2.4)


def linear_to_srgb(linear: NDArray[np.floating]) -> NDArray[np.floating]:
    """The inverse of `srgb_to_linear`."""
    return np.where(linear <= 0.0031308, linear * 12.92, 1.055 * np.maximum(linear, 0.0031308) ** (1 / 2.4) - 0.055)


def write_mesh_glb(path: Path, mesh: TriangleMesh, provenance: str = "") -> None:
    """Write a mesh; the provenance becomes `asset.extras.provenance`.

    Raises:
        UserError: the mesh has no faces, or is larger than a GLB can be (4 GiB).
    """
    require_faces(path, mesh)
    file = _Glb()
    linear = srgb_to_linear(np.arange(256) / 255)
    colours = np.full((len(mesh.vertices), 4), 65535, np.uint16)
    colours[:, :3] = np.rint(linear * 65535).astype(np.uint16)[mesh.colours.cpu().numpy()]
    positions = mesh.vertices.detach().cpu().float().numpy() * _FLIP
    attributes = {
        "POSITION": file.add(positions, _VERTICES, bounds=True),
        "COLOR_0": file.add(colours, _VERTICES, normalized=True),
    }
    indices = file.add(mesh.faces.cpu().numpy().astype(np.uint32).reshape(-1, 1), _INDICES)
    primitive = {"attributes": attributes, "indices": indices, "mode": _TRIANGLES, "material": 0}
    surface = {"baseColorFactor": [1, 1, 1, 1], "metallicFactor": 0, "roughnessFactor": 1}
    material = {"name": "photo", "pbrMetallicRoughness": surface, "extensions": {UNLIT: {}}}
    file.write(path, primitive, UNLIT, provenance, materials=[material])


def write_splat_glb(path: Path, scene: GaussianScene, provenance: str = "") -> None:
    """Write Gaussians without loss; the provenance becomes `asset.extras.provenance`.

    Raises:
        UserError: the scene is empty, holds numbers that are not finite, has another number of harmonics than those of
            degree 0 to 3, or is larger than a GLB can be (4 GiB).
    """
    scene = require_gaussians(path, scene)
    if scene.sh.shape[1] not in _COEFFICIENTS:
        raise UserError(
            f"{path.name} cannot hold {scene.sh.shape[1]} harmonics for each Gaussian; give it 1, 4, 9 or 16 of them."
        )
    turned = turned_about_x(scene)
    file = _Glb()
    colours = srgb_to_linear(np.clip(0.5 + SH_C0 * turned.sh[:, 0].numpy(), 0, 1))
    opacities = turned.opacities.clamp(0, 1).numpy()[:, None]
    rgba = np.concatenate([colours, opacities], axis=1)
    xyzw = torch.nn.functional.normalize(turned.quats, dim=1)[:, [1, 2, 3, 0]]
    attributes = {
        "POSITION": file.add(turned.means.numpy(), _VERTICES, bounds=True),
        "COLOR_0": file.add(np.rint(rgba * 255).astype(np.uint8), _VERTICES, normalized=True),
        f"{SPLATS}:ROTATION": file.add(xyzw.numpy(), _VERTICES),
        f"{SPLATS}:SCALE": file.add(turned.scales.numpy(), _VERTICES),
        f"{SPLATS}:OPACITY": file.add(opacities, _VERTICES),
    }
    for index in range(turned.sh.shape[1]):
        attributes[_harmonic(index)] = file.add(turned.sh[:, index].numpy(), _VERTICES)
    kind = {
        "kernel": "ellipse",
        "colorSpace": "srgb_rec709_display",
        "projection": "perspective",
        "sortingMethod": "cameraDistance",
    }
    primitive = {"attributes": attributes, "mode": _POINTS, "extensions": {SPLATS: kind}}
    file.write(path, primitive, SPLATS, provenance)


def read_mesh_glb(path: Path) -> TriangleMesh:
    """Read the first triangle primitive into OpenCV axes; vertices without colours become white.

    Raises:
        UserError: the file is not there, not a GLB, cut short, or holds no triangles that can be read.
    """
    file = _Reader(path)
    try:
        primitive = file.primitive(lambda p: p.get("mode", _TRIANGLES) == _TRIANGLES and "indices" in p)
        if primitive is None:
            raise UserError(f"{path} holds no indexed triangles; choose a GLB with a mesh in it.")
        positions = file.array(primitive["attributes"]["POSITION"])
        faces = file.array(primitive["indices"]).astype(np.int64).reshape(-1, 3)
        if len(faces) and faces.max() >= len(positions):
            raise UserError(f"{path} has a triangle of vertices that are not there; write it again.")
        colours = np.full(positions.shape, 255, np.uint8)
        if "COLOR_0" in primitive["attributes"]:
            linear = np.clip(file.array(primitive["attributes"]["COLOR_0"])[:, :3], 0, 1)
            colours = np.rint(linear_to_srgb(linear) * 255).astype(np.uint8)
        return TriangleMesh(
            torch.from_numpy(positions * _FLIP),
            torch.from_numpy(faces),
            torch.from_numpy(np.ascontiguousarray(colours)),
        )
    except UserError:
        raise
    except _UNREADABLE as error:
        raise file.wrong(error) from error


def read_splat_glb(path: Path) -> GaussianScene:
    """Read the first primitive of Gaussians into OpenCV axes.

    Raises:
        UserError: the file is not there, not a GLB, cut short, or holds no Gaussians that can be read.
    """
    file = _Reader(path)
    try:
        primitive = file.primitive(lambda p: SPLATS in p.get("extensions", {}))
        if primitive is None:
            raise UserError(f"{path} holds no {SPLATS} primitive; choose a GLB with Gaussians in it.")
        attributes = primitive["attributes"]
        count = sum(_harmonic(index) in attributes for index in range(_COEFFICIENTS[-1]))
        sh = [file.array(attributes[_harmonic(index)]) for index in range(count)]
        opacities = file.array(attributes[f"{SPLATS}:OPACITY"])[:, 0]
        scene = GaussianScene(
            means=torch.from_numpy(file.array(attributes["POSITION"])),
            quats=torch.from_numpy(file.array(attributes[f"{SPLATS}:ROTATION"])[:, [3, 0, 1, 2]]),
            scales=torch.from_numpy(file.array(attributes[f"{SPLATS}:SCALE"])),
            opacities=torch.from_numpy(np.clip(opacities, NEAREST_TO_CERTAIN, 1 - NEAREST_TO_CERTAIN)),
            sh=torch.from_numpy(np.stack(sh, axis=1)),
        )
        return turned_about_x(scene)
    except UserError:
        raise
    except _UNREADABLE as error:
        raise file.wrong(error) from error


def _harmonic(index: int) -> str:
    """Attribute of a spherical-harmonic coefficient, counted over all degrees."""
    degree = math.isqrt(index)
    return f"{SPLATS}:SH_DEGREE_{degree}_COEF_{index - degree**2}"


class _Glb:
    """A file in the making: arrays are added, each with a view and an accessor of its own, then all is written."""

    def __init__(self) -> None:
        self.arrays: list[NDArray[Any]] = []
        self.views: list[dict[str, Any]] = []
        self.accessors: list[dict[str, Any]] = []
        self.length = 0

    def add(self, array: NDArray[Any], target: int, *, normalized: bool = False, bounds: bool = False) -> int:
        """Add an array (count, width) and return its accessor; `bounds` adds the extrema that positions need."""
        array = np.ascontiguousarray(array)
        kind = next(name for name, width in _WIDTHS.items() if width == array.shape[1])
        accessor: dict[str, Any] = {
            "bufferView": len(self.views),
            "componentType": _CODES[array.dtype],
            "count": len(array),
            "type": kind,
        }
        accessor |= {"normalized": True} if normalized else {}
        accessor |= {"min": array.min(0).tolist(), "max": array.max(0).tolist()} if bounds else {}
        self.accessors.append(accessor)
        self.views.append({"buffer": 0, "byteOffset": self.length, "byteLength": array.nbytes, "target": target})
        self.arrays.append(array)
        self.length += array.nbytes + -array.nbytes % 4
        return len(self.accessors) - 1

    def write(
        self,
        path: Path,
        primitive: dict[str, Any],
        extension: str,
        provenance: str,
        materials: list[dict[str, Any]] | None = None,
    ) -> None:
        """Write a scene of one node with one mesh of one primitive."""
        asset: dict[str, Any] = {"version": "2.0", "generator": f"Lyra {__version__}"}
        asset |= {"extras": {"provenance": provenance}} if provenance else {}
        tree: dict[str, Any] = {
            "asset": asset,
            "extensionsUsed": [extension],
            "scene": 0,
            "scenes": [{"nodes": [0]}],
            "nodes": [{"name": "world", "mesh": 0}],
            "meshes": [{"name": "world", "primitives": [primitive]}],
            "accessors": self.accessors,
            "bufferViews": self.views,
            "buffers": [{"byteLength": self.length}],
        }
        tree |= {"materials": materials} if materials else {}
        text = json.dumps(tree, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 4)
        total = 12 + 8 + len(text) + 8 + self.length
        if total >= 2**32:
            raise UserError(f"{path.name} would have {total >> 20} MB, more than a GLB can; write a PLY instead.")
        with replacing(path) as file:
            file.write(struct.pack("<III", _MAGIC, 2, total) + struct.pack("<II", len(text), _JSON) + text)
            file.write(struct.pack("<II", self.length, _BIN))
            for array in self.arrays:
                file.write(array.data)
                file.write(b"\0" * (-array.nbytes % 4))


class _Reader:
    """An opened GLB: its description and its binary chunk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            data = path.read_bytes()
            magic, version, total = struct.unpack_from("<III", data)
            if (magic, version) != (_MAGIC, 2):
                raise UserError(f"{path} is not a GLB of glTF 2.0; choose a file that ends in .glb.")
            length, _ = struct.unpack_from("<II", data, 12)
            if len(data) < total or len(data) < 28 + length:
                raise UserError(f"{path} is cut short: it should have {total} bytes; copy or write it again.")
            self.tree = json.loads(data[20 : 20 + length])
            self.binary = memoryview(data)[28 + length :]
        except UserError:
            raise
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror}); check the name of the file.") from error
        except _UNREADABLE as error:
            raise self.wrong(error) from error

    def wrong(self, error: Exception) -> UserError:
        """The sentence for contents that make no sense."""
        return UserError(f"{self.path} is not a GLB file that can be read ({error!r}); copy or write it again.")

    def primitive(self, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any] | None:
        """The first primitive that is wanted.

        Raises:
            UserError: the file moves its nodes, so that positions in it are not those of the world.
        """
        moves = {"matrix", "translation", "rotation", "scale"}
        if any(moves & node.keys() for node in self.tree.get("nodes", [])):
            raise UserError(f"{self.path} moves its nodes; apply the transforms in the program that wrote it first.")
        found = [p for mesh in self.tree.get("meshes", []) for p in mesh["primitives"] if wanted(p)]
        return found[0] if found else None

    def array(self, index: int) -> NDArray[Any]:
        """An accessor as (count, width): float32 where it is float or normalised, else integers."""
        accessor = self.tree["accessors"][index]
        view = self.tree["bufferViews"][accessor["bufferView"]]
        if (
            "sparse" in accessor
            or view.get("buffer", 0) != 0
            or "uri" in self.tree["buffers"][0]
            or "extensions" in view
        ):
            raise UserError(f"{self.path} is compressed or split over several files; save it as one plain GLB.")
        dtype, width = np.dtype(_COMPONENTS[accessor["componentType"]]), _WIDTHS[accessor["type"]]
        first = view.get("byteOffset", 0)
        strides = (view.get("byteStride", width * dtype.itemsize), dtype.itemsize)
        # numpy refuses an array that would reach beyond the view.
        inside = self.binary[first : first + view["byteLength"]]
        raw = np.ndarray((accessor["count"], width), dtype, inside, accessor.get("byteOffset", 0), strides)
        if not accessor.get("normalized", False):
            return raw.copy()
        # Signed integers are symmetric: the lowest value means -1 as its neighbour does (glTF 2.0, section 3.6.2.2).
        return np.maximum(raw / np.float32(np.iinfo(dtype).max), np.float32(-1))
