"""A camera path of one's own: poses to a trajectory.npz, which `generate --trajectory` takes.

The path goes forward while it rises and looks slightly down. Units are those of the photo's depth, roughly metres.
Run with `python examples/01_own_camera_path.py`.
"""

from pathlib import Path

import torch

from lyra import Cameras, LyraPipeline
from lyra.geometry.rotations import look_at
from lyra.trajectory.files import write_trajectory

photo = Path(__file__).parent / "photos" / "palace-square.jpg"
pipe = LyraPipeline.from_pretrained("lyra-tiny")
seen = pipe.see(photo)

frames = 81
time = torch.linspace(0, 1, frames)
eased = time * time * (3 - 2 * time)
centres = torch.stack([torch.zeros(frames), -0.6 * eased, 1.5 * eased], dim=-1)  # OpenCV: y points down.
targets = torch.tensor([0.0, 0.0, 8.0]).expand(frames, 3)
cameras = Cameras(look_at(centres, targets), seen.depth.intrinsics.expand(frames, 3, 3), 480, 832)
write_trajectory(Path("trajectory.npz"), cameras)

world = pipe(photo, out="world-own-path", trajectory="trajectory.npz")
print(f"{world.video_path}: {len(world.cameras)} frames")
