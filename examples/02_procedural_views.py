"""Views of procedural worlds with their exact depth and cameras: ground truth for trying things out.

Writes, for each family below, rgb.jpg, depth.npz (z depth in metres, float16; the sky is 1000) and cameras.npz (the
released trajectory format) under examples/procedural. Run with `python examples/02_procedural_views.py`.
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from lyra import Cameras
from lyra.training.worlds import build_world
from lyra.trajectory.files import write_trajectory

HEIGHT, WIDTH = 480, 832
VIEWS = (("street", 2_000_001), ("hall", 2_000_002), ("ruins", 2_000_003))

for family, seed in VIEWS:
    folder = Path(__file__).parent / "procedural" / family
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    world = build_world(family, seed)
    intrinsics, walk = world.random_intrinsics(rng, HEIGHT, WIDTH), world.random_walk(rng, 81)
    view = world.render(walk[0], intrinsics, HEIGHT, WIDTH, supersample=2)
    Image.fromarray(view.rgb).save(folder / "rgb.jpg", quality=90)
    np.savez_compressed(folder / "depth.npz", depth=view.depth.astype(np.float16), sky=view.sky)
    w2c = torch.from_numpy(np.asarray(walk, np.float32))
    k = torch.from_numpy(np.asarray(intrinsics, np.float32)).expand(len(w2c), 3, 3)
    write_trajectory(folder / "cameras.npz", Cameras(w2c, k, HEIGHT, WIDTH))
    print(f"{folder}: {world.caption()}")
