"""From a photo to a walkthrough and splats in five lines.

Run with `python examples/00_photo_to_world.py`; the world folder is ./world. Running it again goes on from the chunks
that are finished.
"""

from pathlib import Path

from lyra import LyraPipeline

photo = Path(__file__).parent / "photos" / "great-wall.jpg"

pipe = LyraPipeline.from_pretrained("lyra-tiny")
world = pipe(photo, out="world", preset="push-in", chunks=1, sampler="dmd", seed=0)
scene = pipe.reconstruct(world)

print(f"{world.video_path}: {len(world.cameras)} frames; {world.scene_path}: {len(scene):,} splats")
