"""Which camera paths does the released Lyra 2.0 code offer, name by name and number by number?

`released_cameras` makes them with the released parameters: frame count N, centre depth d, strength s (a distance in
units of d, except where said) and a direction, whose sign sg is +1 for "right" and -1 for every other one. Distances
scale with d. Knows no photo, no clearance and no project preset; `presets.py` offers these paths to the user.

Corrected defects of the released code:
    * an unknown direction is an error instead of meaning "left";
    * the noise presets draw from a generator that is passed in, not from the global one, and leave frame 0 clean;
    * `spiral_center` and `rotate_spot_noise` start at the photo's camera instead of one radius beside it;
    * `spiral_center` heeds direction and strength, and `back` and `back_simple` heed strength;
    * `spiral_outwards` works (it fails with a dtype error in the released code);
    * `back` and `back_simple` have exactly N poses (half hold, half circle) instead of 2N - 1, and their radii are
      multiples of d instead of absolute units; `back` puts the camera where it says (t = -R C instead of t = C);
    * one frame is a valid length (the released code divides by zero), and a view along the y axis is a rotation.

Kept although odd, because recorded outputs of the released code pin it: the `horizontal` family stops one step short of
its end, `dolly_zoom` moves 3 absolute units whatever d, s and direction are and turns round once it has passed its
target, "right" turns `rotate_spot` to the left, and `rotate_zoom_in/out` drift sideways instead of along the view.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from lyra.errors import UserError
from lyra.geometry.rotations import axis_angle_to_matrix, look_at, world_to_camera
from lyra.types import Cameras

DIRECTIONS = ("right", "left", "up", "down")
"""Words the released code takes; a preset that has no use for one ignores it or takes it as "left"."""
_SIDEWAYS = ("right", "left")
_UPRIGHT = ("up", "down")
_X, _Y, _Z = 0, 1, 2


@dataclass(frozen=True)
class _Request:
    """What every path is made from; lengths in scene units, kept in float64 until the cameras are made."""

    frames: int
    depth: float
    strength: float
    direction: str
    generator: torch.Generator

    @property
    def sign(self) -> float:
        """+1 for "right", -1 otherwise (released code)."""
        return 1.0 if self.direction == "right" else -1.0

    @property
    def reach(self) -> float:
        """Signed length s * d of the motion."""
        return self.sign * self.strength * self.depth

    @property
    def index(self) -> Float[Tensor, "n"]:
        """Frame numbers i."""
        return torch.arange(self.frames, dtype=torch.float64)

    @property
    def fraction(self) -> Float[Tensor, "n"]:
        """i / (N - 1): 0 at the first frame, 1 at the last."""
        return self.index / max(self.frames - 1, 1)


@dataclass(frozen=True)
class ReleasedPreset:
    """One path of the released code."""

    description: str
    directions: tuple[str, ...]
    """Directions that make a difference, the usual one first; empty when there is none."""
    usual_strength: float
    """Strength s of a comfortable move, a share of d (0.5: released zoom script), or degrees or radians where said."""
    poses: Callable[[_Request], Float[Tensor, "n 4 4"]]


def _points(x: Tensor | float, y: Tensor | float, z: Tensor | float, like: Float[Tensor, "n"]) -> Float[Tensor, "n 3"]:
    """Points from coordinates, each one number for all frames or one per frame."""
    columns = [torch.as_tensor(value, dtype=torch.float64).expand_as(like) for value in (x, y, z)]
    return torch.stack(columns, dim=-1)


def _centre_point(request: _Request) -> Float[Tensor, "3"]:
    """P = (0, 0, d)."""
    return torch.tensor([0.0, 0.0, request.depth], dtype=torch.float64)


def _beyond_point(request: _Request) -> Float[Tensor, "3"]:
    """P = (0, 0, d (1 + s)), which a zoom never reaches."""
    return torch.tensor([0.0, 0.0, request.depth * (1 + request.strength)], dtype=torch.float64)


def _looking(centres: Float[Tensor, "n 3"], target: Float[Tensor, "*n 3"]) -> Float[Tensor, "n 4 4"]:
    return look_at(centres, target.expand_as(centres))


def _without_turning(centres: Float[Tensor, "n 3"]) -> Float[Tensor, "n 4 4"]:
    return world_to_camera(torch.eye(3, dtype=torch.float64).expand(len(centres), 3, 3), centres)


def _turn(angle: Float[Tensor, "n"]) -> Float[Tensor, "n 3 3"]:
    """World-to-camera rotation about the y axis by an angle in radians; a positive one turns the view to -x."""
    return axis_angle_to_matrix(_points(0.0, angle, 0.0, angle))


def _original(request: _Request) -> Float[Tensor, "n 4 4"]:
    return _without_turning(_points(0.0, 0.0, 0.0, request.index))


def _line(request: _Request, axis: int, steps: int | None = None) -> Float[Tensor, "n 3"]:
    """C_i = sg i s d / N along one axis; with `steps`, N is `steps` and the last pose is held."""
    steps = request.frames if steps is None else max(steps, 1)
    centres = torch.zeros(request.frames, 3, dtype=torch.float64)
    centres[:, axis] = request.reach * request.index.clamp(max=steps - 1) / steps
    return centres


def _jitter(request: _Request, moving_axis: int) -> Float[Tensor, "n 3"]:
    """Gaussian noise of 1e-4 s d on the two axes that do not move, none in frame 0, which is the photo."""
    noise = torch.randn(request.frames, 3, dtype=torch.float64, generator=request.generator)
    noise *= 1e-4 * request.strength * request.depth
    noise[:, moving_axis] = 0.0
    noise[0] = 0.0
    return noise


def _bend(request: _Request) -> Float[Tensor, "n 3"]:
    """y = sg b s d i / N with b = 0.04 forwards ("right") and 0.12 otherwise: up on the way out, down on the way in."""
    share = 0.04 if request.direction == "right" else 0.12
    return _line(request, _Y) * share


def _horizontal(request: _Request, axis: int, noisy: bool = False, still: bool = False) -> Float[Tensor, "n 4 4"]:
    centres = _line(request, axis, request.frames // 2 if still else None)
    if noisy:
        centres = centres + _jitter(request, axis)
    return _looking(centres, _beyond_point(request) if axis == _Z else _centre_point(request))


def _horizontal_zoom_bend(request: _Request, noisy: bool = False) -> Float[Tensor, "n 4 4"]:
    centres = _line(request, _Z) + _bend(request)
    if noisy:
        centres = centres + _jitter(request, _Z)
    return _looking(centres, _beyond_point(request))


def _horizontal_simple(request: _Request) -> Float[Tensor, "n 4 4"]:
    return _without_turning(_points(request.reach * request.fraction, 0.0, 0.0, request.fraction))


def _vertical_simple(request: _Request) -> Float[Tensor, "n 4 4"]:
    upwards = -1.0 if request.direction == "up" else 1.0
    height = upwards * request.strength * request.depth * request.fraction
    return _without_turning(_points(0.0, height, 0.0, height))


def _horizontal_outward(request: _Request) -> Float[Tensor, "n 4 4"]:
    centres = _line(request, _X)
    return _looking(centres, _centre_point(request) + 2 * centres)


def _ellipse(request: _Request, turns: float, x_radius: float, y_radius: float) -> Float[Tensor, "n 3"]:
    """x = r_x (cos th - 1) sg and y = r_y sin th with th from 0 to 2 pi `turns`, so that it starts at the origin."""
    theta = 2 * math.pi * turns * request.fraction
    size = request.strength * request.depth
    x = x_radius * size * request.sign * (torch.cos(theta) - 1)
    return _points(x, y_radius * size * torch.sin(theta), 0.0, theta)


def _spiral(request: _Request, turns: float, x_radius: float, y_radius: float) -> Float[Tensor, "n 4 4"]:
    return _looking(_ellipse(request, turns, x_radius, y_radius), _centre_point(request))


def _spiral_outwards(request: _Request) -> Float[Tensor, "n 4 4"]:
    targets = _centre_point(request) + _ellipse(request, 1.0, 0.3, 0.2)
    return _looking(torch.zeros_like(targets), targets)


def _horizontal_spiral(request: _Request) -> Float[Tensor, "n 4 4"]:
    forward = _points(0.0, 0.0, request.reach * request.fraction, request.fraction)
    return _looking(_ellipse(request, 2.0, 0.01875, 0.0125) + forward, _beyond_point(request))


def _back(request: _Request, x_radius: float, y_radius: float) -> Float[Tensor, "n 4 4"]:
    """Hold for the first half, then go once round an ellipse and arrive where it began."""
    held = (request.frames + 1) // 2
    circling = request.frames - held
    theta = 2 * math.pi * (request.index - held).clamp(min=0) / max(circling - 1, 1)
    size = request.strength * request.depth
    x = x_radius * size * request.sign * (torch.cos(theta) - 1)
    return _looking(_points(x, y_radius * size * torch.sin(theta), 0.0, theta), _centre_point(request))


def _dolly_travel(request: _Request) -> Float[Tensor, "n"]:
    """C_z = 3 i / (N - 1), in absolute units (released code)."""
    return 3.0 * request.fraction


def _dolly_target(request: _Request) -> float:
    """d' = 0.185 d, the depth whose size in the image the zoom is meant to keep (released code)."""
    return 0.185 * request.depth


def _dolly_zoom(request: _Request) -> Float[Tensor, "n 4 4"]:
    """Forwards while looking at (0, 0, d'), which turns the view round at d'.

    The rotation is written out instead of using `look_at`, which has no direction to look in at d' itself.
    """
    travel = _dolly_travel(request)
    facing = torch.where(travel > _dolly_target(request), -1.0, 1.0).to(torch.float64)
    rotation = torch.diag_embed(_points(facing, 1.0, facing, travel))
    return world_to_camera(rotation, _points(0.0, 0.0, travel, travel))


def _dolly_focal_factor(request: _Request) -> Float[Tensor, "n"]:
    """Focal lengths are multiplied by d' / (d' + C_z) (released code)."""
    return _dolly_target(request) / (_dolly_target(request) + _dolly_travel(request))


def _orbit_horizontal(request: _Request) -> Float[Tensor, "n 4 4"]:
    """C = d (sin th, 0, 1 + cos th), th = pi - sg s i / (N - 1): s is an angle in radians."""
    angle = request.sign * request.strength * request.fraction
    centres = request.depth * _points(torch.sin(angle), 0.0, 1 - torch.cos(angle), angle)
    return _looking(centres, _centre_point(request))


def _orbit_vertical(request: _Request) -> Float[Tensor, "n 4 4"]:
    """C = d (0, sin th, 1 + cos th), th = pi + s i / (N - 1) for "up", minus otherwise: s is an angle in radians."""
    upwards = 1.0 if request.direction == "up" else -1.0
    angle = upwards * request.strength * request.fraction
    centres = request.depth * _points(0.0, -torch.sin(angle), 1 - torch.cos(angle), angle)
    return _looking(centres, _centre_point(request))


def _rotate_spot(request: _Request) -> Float[Tensor, "n 4 4"]:
    """Rotation about y by sg s i / (N - 1): s is in degrees."""
    rotation = _turn(math.radians(request.sign * request.strength) * request.fraction)
    return world_to_camera(rotation, torch.zeros(request.frames, 3, dtype=torch.float64))


def _rotate_spot_noise(request: _Request) -> Float[Tensor, "n 4 4"]:
    """As `_rotate_spot`, while the centre goes round a circle of radius 1e-5 d, once in 1000 frames."""
    theta = 2 * math.pi * 0.001 * request.index
    centres = 1e-5 * request.depth * _points(torch.cos(theta) - 1, torch.sin(theta), 0.0, theta)
    rotation = _turn(math.radians(request.sign * request.strength) * request.fraction)
    return world_to_camera(rotation @ _looking(centres, _centre_point(request))[:, :3, :3], centres)


def _rotate_zoom(request: _Request, inwards: float) -> Float[Tensor, "n 4 4"]:
    """Turn 20 degrees on the spot in N // 2 frames, then move s d; `inwards` is +1 for in and -1 for out.

    The translation is t = -R^T C with C along the new forward axis, as released, so the true path leaves the photo at
    three times the angle of the view. The released final centre of `rotate_zoom_in` pins this.
    """
    half = request.frames // 2
    turned = (request.index / max(half - 1, 1)).clamp(max=1.0)
    moved = ((request.index - half) / max(request.frames - half - 1, 1)).clamp(min=0.0)
    if half == 0:
        moved = torch.zeros_like(moved)
    rotation = _turn(math.radians(20.0) * request.sign * turned)
    forward = rotation[:, 2]
    aimed = inwards * request.strength * request.depth * moved[:, None] * forward
    centres = rotation.transpose(-1, -2) @ rotation.transpose(-1, -2) @ aimed[..., None]
    return world_to_camera(rotation, centres[..., 0])


RELEASED_PRESETS: dict[str, ReleasedPreset] = {
    "original": ReleasedPreset("Stay at the photo's camera.", (), 0.5, _original),
    "horizontal": ReleasedPreset("Move sideways, eyes on the centre.", _SIDEWAYS, 0.5, partial(_horizontal, axis=_X)),
    "horizontal_lift": ReleasedPreset(
        'Move down ("right") or up ("left"), eyes on the centre.', _SIDEWAYS, 0.5, partial(_horizontal, axis=_Y)
    ),
    "horizontal_zoom": ReleasedPreset(
        'Move forwards ("right") or backwards ("left").', _SIDEWAYS, 0.5, partial(_horizontal, axis=_Z)
    ),
    "horizontal_noise": ReleasedPreset(
        "As horizontal, with a trace of shake.", _SIDEWAYS, 0.5, partial(_horizontal, axis=_X, noisy=True)
    ),
    "horizontal_lift_noise": ReleasedPreset(
        "As horizontal_lift, with a trace of shake.", _SIDEWAYS, 0.5, partial(_horizontal, axis=_Y, noisy=True)
    ),
    "horizontal_zoom_noise": ReleasedPreset(
        "As horizontal_zoom, with a trace of shake.", _SIDEWAYS, 0.5, partial(_horizontal, axis=_Z, noisy=True)
    ),
    "horizontal_zoom_bend": ReleasedPreset(
        "As horizontal_zoom, sinking on the way in, rising on the way out.", _SIDEWAYS, 0.5, _horizontal_zoom_bend
    ),
    "horizontal_zoom_noise_bend": ReleasedPreset(
        "As horizontal_zoom_bend, with a trace of shake.", _SIDEWAYS, 0.5, partial(_horizontal_zoom_bend, noisy=True)
    ),
    "horizontal_still": ReleasedPreset(
        "Move sideways for half of the time, then hold.", _SIDEWAYS, 0.5, partial(_horizontal, axis=_X, still=True)
    ),
    "horizontal_zoom_still": ReleasedPreset(
        "Move in or out for half of the time, then hold.", _SIDEWAYS, 0.5, partial(_horizontal, axis=_Z, still=True)
    ),
    "horizontal_simple": ReleasedPreset("Move sideways without turning.", _SIDEWAYS, 0.5, _horizontal_simple),
    "vertical_simple": ReleasedPreset("Move up or down without turning.", _UPRIGHT, 0.5, _vertical_simple),
    "horizontal_outward": ReleasedPreset(
        "Move sideways and look further out than the motion goes.", _SIDEWAYS, 0.5, _horizontal_outward
    ),
    "spiral": ReleasedPreset(
        "Two turns on an ellipse, eyes on the centre.",
        _SIDEWAYS,
        0.5,
        partial(_spiral, turns=2.0, x_radius=0.15, y_radius=0.10),
    ),
    "spiral_center": ReleasedPreset(
        "One small turn on an ellipse, eyes on the centre.",
        _SIDEWAYS,
        1.0,
        partial(_spiral, turns=1.0, x_radius=0.03, y_radius=0.02),
    ),
    "spiral_outwards": ReleasedPreset(
        "Stay and let the eyes go once round an ellipse.", _SIDEWAYS, 0.5, _spiral_outwards
    ),
    "horizontal_spiral": ReleasedPreset("Move in or out on a narrow helix.", _SIDEWAYS, 0.5, _horizontal_spiral),
    "back": ReleasedPreset(
        "Hold, then go once round a wide ellipse.", _SIDEWAYS, 1.0, partial(_back, x_radius=0.3, y_radius=0.2)
    ),
    "back_simple": ReleasedPreset(
        "Hold, then go once round an ellipse.", _SIDEWAYS, 1.0, partial(_back, x_radius=0.15, y_radius=0.1)
    ),
    "dolly_zoom": ReleasedPreset(
        "Move forwards while the lens widens; turns round when it has passed its target.", (), 0.5, _dolly_zoom
    ),
    "orbit_horizontal": ReleasedPreset("Circle the centre sideways (radians).", _SIDEWAYS, 0.5, _orbit_horizontal),
    "orbit_vertical": ReleasedPreset("Circle the centre over or under it (radians).", _UPRIGHT, 0.5, _orbit_vertical),
    "rotate_spot": ReleasedPreset('Turn on the spot (degrees); "right" turns left.', _SIDEWAYS, 30.0, _rotate_spot),
    "rotate_spot_noise": ReleasedPreset("As rotate_spot, with a trace of motion.", _SIDEWAYS, 30.0, _rotate_spot_noise),
    "rotate_zoom_in": ReleasedPreset(
        "Turn 20 degrees, then move ahead.", _SIDEWAYS, 0.5, partial(_rotate_zoom, inwards=1.0)
    ),
    "rotate_zoom_out": ReleasedPreset(
        "Turn 20 degrees, then move back.", _SIDEWAYS, 0.5, partial(_rotate_zoom, inwards=-1.0)
    ),
}


def released_cameras(
    name: str,
    *,
    frames: int,
    centre_depth: float,
    intrinsics: Float[Tensor, "3 3"],
    image_height: int,
    image_width: int,
    direction: str = "right",
    strength: float = 0.5,
    generator: torch.Generator | None = None,
) -> Cameras:
    """A released path with the released parameters; its first camera is the photo's (identity).

    Args:
        name: a key of `RELEASED_PRESETS`.
        frames: number of cameras N, at least 1.
        centre_depth: d, in scene units.
        intrinsics: K of the photo, in pixels of the image size given.
        image_height: pixels.
        image_width: pixels.
        direction: one of `DIRECTIONS`.
        strength: s as released, a share of d except for orbits (radians) and turns on the spot (degrees).
        generator: where the noise presets draw from; by default one seeded with 0.

    Raises:
        UserError: the direction is none of `DIRECTIONS`.
        KeyError: the name is not a released one.
    """
    if direction not in DIRECTIONS:
        raise UserError(f'There is no direction "{direction}"; choose one of {", ".join(DIRECTIONS)}.')
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    request = _Request(frames, centre_depth, strength, direction, generator)
    # Adding zero turns -0.0 into 0.0, so that equal paths have equal bytes.
    w2c = RELEASED_PRESETS[name].poses(request).float() + 0.0
    focal = torch.ones(frames, 3, 3)
    if name == "dolly_zoom":
        factor = _dolly_focal_factor(request).float()
        focal[:, 0, 0] = factor
        focal[:, 1, 1] = factor
    return Cameras(w2c, intrinsics.detach().float().cpu() * focal, image_height, image_width)
