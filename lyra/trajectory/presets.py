"""Which camera paths can a user choose by name, and how far do they go in front of this photo?

Offers the project's presets and, under their released names, those of the released code (`released_presets.py`). All
distances scale with the centre depth d of the photo. Knows no scene: whether a path hits something is `clearance.py`.

Two kinds of project preset, because finished chunks are cached and a longer job should reuse a shorter job's chunks:
    * an *extending* path eases in over 20 frames and then keeps its speed, without slowing down at the end. Where it is
      in frame i depends on i alone, so the path of a longer job begins with the path of the shorter one, bit for bit.
      It covers its amount (0.45 d for push-in) in the first 80 frames and 8/7 of it in every 80 frames after that.
    * a *closed* path (out-and-back, loop) leaves from rest and returns to exactly where it began, at rest. It is
      stretched over the whole job, so a longer job runs it more slowly and shares no chunk with a shorter one.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from lyra.errors import UserError
from lyra.geometry.rotations import axis_angle_to_matrix, look_at, world_to_camera
from lyra.trajectory.released_presets import RELEASED_PRESETS, ReleasedPreset, released_cameras
from lyra.types import Cameras, DepthMap

CHUNK_FRAMES = 80
"""Frames per chunk; amounts of the extending presets are for this many."""
EASE_FRAMES = 20
"""Frames an extending path takes to reach its speed."""
MAX_STRENGTH = 3.0
"""Three times a comfortable move: beyond it the closed paths would pass the point that they look at."""


@dataclass(frozen=True)
class PresetInputs:
    """What a preset is made for."""

    frames: int
    centre_depth: float
    """d, in scene units."""
    intrinsics: Float[Tensor, "3 3"]
    """K of the photo in pixels of the image size."""
    image_height: int
    image_width: int
    strength: float
    """1 is a comfortable move."""


@dataclass(frozen=True)
class Preset:
    """A camera path that a user can choose."""

    description: str
    """One sentence for the user."""
    extends: bool
    """True if the path of a longer job begins with the path of a shorter one."""
    directions: tuple[str, ...]
    """Directions that can follow the name after a colon; the first is meant when none does."""
    cameras: Callable[[PresetInputs, str], Cameras]
    """The path for some inputs and one of `directions` (or "" where there is none)."""


def centre_depth(depth: DepthMap) -> float:
    """d: the 25 % quantile of the photo's valid depth without sky, in scene units (paper and released code).

    A photo of nothing but sky counts its sky, which is far but finite.

    Raises:
        UserError: no pixel has a usable depth.
    """
    usable = depth.valid & torch.isfinite(depth.depth) & (depth.depth > 0)
    scene = usable & ~depth.sky
    values = depth.depth[scene if bool(scene.any()) else usable]
    if values.numel() == 0:
        raise UserError("No distance could be measured anywhere in this photo; use a photo that shows some scene.")
    # numpy, because torch.quantile refuses more than 16 million values.
    return float(np.quantile(values.detach().cpu().double().numpy(), 0.25))


def extending_progress(frames: int) -> Float[Tensor, "n"]:
    """How much of its amount an extending path has covered at each frame: 0 at frame 0 and 1 at frame 80.

    The speed rises from rest along 3 u^2 - 2 u^3 over `EASE_FRAMES`, whose integral u^3 - u^4 / 2 ends at one half.
    """
    frame = torch.arange(frames, dtype=torch.float64)
    u = (frame / EASE_FRAMES).clamp(max=1.0)
    easing = EASE_FRAMES * (u**3 - u**4 / 2)
    cruising = (frame - EASE_FRAMES).clamp(min=0.0)
    return (easing + cruising) / (CHUNK_FRAMES - EASE_FRAMES / 2)


def closed_progress(frames: int) -> Float[Tensor, "n"]:
    """How much of a closed path is done at each frame: 0 at the first, 1 at the last, at rest at both.

    t^3 (10 - 15 t + 6 t^2), the polynomial whose first two derivatives vanish at both ends.
    """
    t = torch.arange(frames, dtype=torch.float64) / max(frames - 1, 1)
    return t**3 * (10 - 15 * t + 6 * t**2)


def _stack(x: Tensor, y: Tensor, z: Tensor) -> Float[Tensor, "n 3"]:
    return torch.stack([x, y, z], dim=-1)


def _facing(yaw: Float[Tensor, "n"], pitch: Float[Tensor, "n"]) -> Float[Tensor, "n 3 3"]:
    """World-to-camera rotation that looks `yaw` radians to the right, then `pitch` radians down."""
    zero = torch.zeros_like(yaw)
    return axis_angle_to_matrix(_stack(pitch, zero, zero)) @ axis_angle_to_matrix(_stack(zero, -yaw, zero))


def _straight(amount: Float[Tensor, "n"], axis: int) -> Float[Tensor, "n 4 4"]:
    """Move along one axis of the photo's camera without turning."""
    centres = torch.zeros(len(amount), 3, dtype=torch.float64)
    centres[:, axis] = amount
    return world_to_camera(torch.eye(3, dtype=torch.float64).expand(len(amount), 3, 3), centres)


def _push(amount: Float[Tensor, "n"], depth: float) -> Float[Tensor, "n 4 4"]:
    return _straight(0.45 * depth * amount, axis=2)


def _truck(amount: Float[Tensor, "n"], depth: float) -> Float[Tensor, "n 4 4"]:
    return _straight(0.3 * depth * amount, axis=0)


def _pan(amount: Float[Tensor, "n"], depth: float) -> Float[Tensor, "n 4 4"]:
    """Turn on the spot by 30 degrees; d plays no part."""
    yaw = math.radians(30.0) * amount
    return world_to_camera(_facing(yaw, torch.zeros_like(yaw)), torch.zeros(len(yaw), 3, dtype=torch.float64))


def _orbit(amount: Float[Tensor, "n"], depth: float) -> Float[Tensor, "n 4 4"]:
    """20 degrees of the circle of radius d about the point at depth d, always looking at that point."""
    angle = math.radians(20.0) * amount
    centres = depth * _stack(torch.sin(angle), torch.zeros_like(angle), 1 - torch.cos(angle))
    return world_to_camera(_facing(-angle, torch.zeros_like(angle)), centres)


def _rise(amount: Float[Tensor, "n"], depth: float) -> Float[Tensor, "n 4 4"]:
    """0.2 d upwards, looking down by half of the angle that would keep the centre in the middle."""
    height = 0.2 * depth * amount
    pitch = torch.atan(height / depth) / 2
    zero = torch.zeros_like(height)
    return world_to_camera(_facing(zero, pitch), _stack(zero, -height, zero))


def _spiral(amount: Float[Tensor, "n"], depth: float, strength: float) -> Float[Tensor, "n 4 4"]:
    """One turn and a push of 0.15 d per amount; the ellipse touches the photo's camera from above.

    `amount` counts turns, so the strength widens the ellipse instead of adding turns. The point looked at stays d
    ahead.
    """
    angle = 2 * math.pi * amount
    push = 0.15 * strength * depth * amount
    radius = 0.1 * strength * depth
    centres = _stack(radius * torch.sin(angle), 0.7 * radius * (torch.cos(angle) - 1), push)
    zero = torch.zeros_like(push)
    return look_at(centres, _stack(zero, zero, push + depth))


def _out_and_back(frames: int, depth: float, strength: float) -> Float[Tensor, "n 4 4"]:
    """Forwards (0.35 d), to the right (0.2 d) and 40 degrees to the right, then the same way back.

    (1 - cos 2 pi t) / 2 is at rest at both ends and at the turning point, and symmetric in time.
    """
    t = torch.arange(frames, dtype=torch.float64) / max(frames - 1, 1)
    out = (1 - torch.cos(2 * math.pi * t)) / 2
    # The way to the right lags behind the way ahead, which makes the path a curve instead of a line.
    centres = strength * depth * _stack(0.2 * out**2, torch.zeros_like(out), 0.35 * out)
    yaw = math.radians(40.0) * min(strength, 2.0) * out
    return world_to_camera(_facing(yaw, torch.zeros_like(yaw)), centres)


def _loop(frames: int, depth: float, strength: float) -> Float[Tensor, "n 4 4"]:
    """Once round a level ellipse, 0.3 d deep and 0.4 d wide: right, ahead, left and back, looking at the centre."""
    angle = 2 * math.pi * closed_progress(frames)
    side = 0.2 * strength * depth * torch.sin(angle)
    ahead = 0.15 * strength * depth * (1 - torch.cos(angle))
    zero = torch.zeros_like(angle)
    w2c = look_at(_stack(side, zero, ahead), torch.tensor([0.0, 0.0, depth], dtype=torch.float64).expand(frames, 3))
    # sin(2 pi) is not zero in floating point, and the way back must end exactly where it began.
    w2c[-1] = w2c[0]
    return w2c


_Amount = Callable[[Float[Tensor, "n"], float], Float[Tensor, "n 4 4"]]


def _assemble(inputs: PresetInputs, w2c: Float[Tensor, "n 4 4"]) -> Cameras:
    # Sines of a batch may differ in their last bit with the batch's length; rounding to 2^-30 first hides that, so that
    # a longer path begins with the very bytes of the shorter one. Adding zero turns -0.0 into 0.0.
    w2c = (w2c * 2**30).round() / 2**30 + 0.0
    intrinsics = inputs.intrinsics.detach().float().cpu().expand(inputs.frames, 3, 3).clone()
    return Cameras(w2c.float(), intrinsics, inputs.image_height, inputs.image_width)


def _extending(description: str, path: _Amount, sign: float = 1.0) -> Preset:
    """A preset whose amount is `sign` times strength times `extending_progress`."""

    def cameras(inputs: PresetInputs, direction: str) -> Cameras:
        amount = sign * inputs.strength * extending_progress(inputs.frames)
        return _assemble(inputs, path(amount, inputs.centre_depth))

    return Preset(description, True, (), cameras)


def _spiral_cameras(inputs: PresetInputs, direction: str) -> Cameras:
    return _assemble(inputs, _spiral(extending_progress(inputs.frames), inputs.centre_depth, inputs.strength))


def _out_and_back_cameras(inputs: PresetInputs, direction: str) -> Cameras:
    return _assemble(inputs, _out_and_back(inputs.frames, inputs.centre_depth, inputs.strength))


def _loop_cameras(inputs: PresetInputs, direction: str) -> Cameras:
    return _assemble(inputs, _loop(inputs.frames, inputs.centre_depth, inputs.strength))


def _released(name: str, released: ReleasedPreset) -> Preset:
    """A released path as a preset: strength 1 is its usual released strength, 0.5 for most."""

    def cameras(inputs: PresetInputs, direction: str) -> Cameras:
        return released_cameras(
            name,
            frames=inputs.frames,
            centre_depth=inputs.centre_depth,
            intrinsics=inputs.intrinsics,
            image_height=inputs.image_height,
            image_width=inputs.image_width,
            direction=direction or "right",
            strength=inputs.strength * released.usual_strength,
        )

    return Preset(f"Released path: {released.description}", False, released.directions, cameras)


PROJECT_PRESETS: dict[str, Preset] = {
    "push-in": _extending("Move straight ahead into the scene.", _push),
    "pull-back": _extending("Move straight back and reveal what surrounds the scene.", _push, -1.0),
    "pan-left": _extending("Stand still and turn to the left.", _pan, -1.0),
    "pan-right": _extending("Stand still and turn to the right.", _pan),
    "orbit-left": _extending("Circle the centre of the scene to the left.", _orbit, -1.0),
    "orbit-right": _extending("Circle the centre of the scene to the right.", _orbit),
    "rise": _extending("Rise and look slightly down.", _rise),
    "truck-left": _extending("Slide to the left without turning.", _truck, -1.0),
    "truck-right": _extending("Slide to the right without turning.", _truck),
    "spiral": Preset("Circle in front of the scene while moving slowly ahead.", True, (), _spiral_cameras),
    "out-and-back": Preset(
        "Walk ahead to the right, look round the corner and come back the same way.", False, (), _out_and_back_cameras
    ),
    "loop": Preset("Walk once round a small circle and end where you began.", False, (), _loop_cameras),
}
"""The project's own presets; no direction, because theirs is part of the name."""

PRESETS: dict[str, Preset] = PROJECT_PRESETS | {
    (f"released-{name}" if name in PROJECT_PRESETS else name): _released(name, preset)
    for name, preset in RELEASED_PRESETS.items()
}
"""All presets by name. The one released name that the project also uses, "spiral", is "released-spiral" here."""


def find_preset(name: str) -> tuple[Preset, str]:
    """The preset of a name such as "push-in", "horizontal" or "horizontal:left", and its direction ("" if none).

    Raises:
        UserError: no such preset (with the nearest name and all names), or not a direction of it.
    """
    stem, colon, direction = name.partition(":")
    if stem not in PRESETS:
        near = difflib.get_close_matches(stem, PRESETS, n=1, cutoff=0.5)
        hint = f' (did you mean "{near[0]}"?)' if near else ""
        raise UserError(f'There is no preset "{stem}"{hint}; choose one of {", ".join(PRESETS)}.')
    preset = PRESETS[stem]
    if colon and direction not in preset.directions:
        ways = ", ".join(f'"{stem}:{way}"' for way in preset.directions)
        remedy = f"choose one of {ways}" if ways else f'write "{stem}" alone'
        raise UserError(f'The preset "{stem}" has no direction "{direction}"; {remedy}.')
    return preset, direction or (preset.directions[0] if preset.directions else "")


def preset_cameras(
    name: str,
    *,
    frames: int,
    depth: DepthMap | float,
    intrinsics: Float[Tensor, "3 3"],
    image_height: int,
    image_width: int,
    strength: float = 1.0,
) -> Cameras:
    """The camera path of a preset; its first camera is the photo's (identity).

    Args:
        name: a key of `PRESETS`, for the released ones optionally with a direction as in "horizontal:left".
        frames: number of cameras, at least 1 (a job has 1 + 80 k).
        depth: the photo's depth map, or its centre depth d in scene units.
        intrinsics: K of the photo in pixels of the image size given.
        image_height: pixels.
        image_width: pixels.
        strength: how far the move goes; 1 is comfortable. Over 0 and at most `MAX_STRENGTH`.

    Raises:
        UserError: unknown name or direction, or a strength out of range.
        ValueError: fewer than one frame, or a centre depth that is not a positive number.
    """
    preset, direction = find_preset(name)
    if not (math.isfinite(strength) and 0 < strength <= MAX_STRENGTH):
        raise UserError(
            f"A strength of {strength:g} is out of range; choose one over 0 and at most {MAX_STRENGTH:g}, "
            "where 1 is a comfortable move."
        )
    if frames < 1:
        raise ValueError(f"a path needs at least one frame, not {frames}")
    distance = centre_depth(depth) if isinstance(depth, DepthMap) else float(depth)
    if not (math.isfinite(distance) and distance > 0):
        raise ValueError(f"the centre depth must be a positive number, not {distance}")
    return preset.cameras(PresetInputs(frames, distance, intrinsics, image_height, image_width, strength), direction)
