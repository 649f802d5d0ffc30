"""The same three steps with NVIDIA's released checkpoint: a GPU, an accepted licence and about 90 GB of disk.

Run `python -m lyra doctor` first; it says whether and in which way the checkpoint fits this machine.
"""

import sys

from lyra import LyraPipeline
from lyra.licences import NVIDIA_RESEARCH, accept, accepted, notice

photo = sys.argv[1] if len(sys.argv) > 1 else "examples/photos/temple-court.jpg"

if accepted(NVIDIA_RESEARCH) is None:
    print(notice([NVIDIA_RESEARCH]))
    if input("Do you accept this licence? [yes/no] ").strip().lower() != "yes":
        sys.exit("Nothing was downloaded.")
    accept(NVIDIA_RESEARCH, "example script")

pipe = LyraPipeline.from_pretrained("nvidia/Lyra-2.0")  # weights="fp8", offload="group" and so on choose another way
world = pipe(photo, out="world", preset="push-in", sampler="dmd", prompt="A temple court at noon.")
print(world.video_path)
pipe.reconstruct(world).save("scene.ply")
