"""H.264 MP4 files: write frames, read them back, and join chunks without encoding again.

16 frames a second, no B-frames, so that chunk files can be joined packet by packet. Knows nothing about what is shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import av
import torch
from jaxtyping import UInt8
from torch import Tensor

FRAMES_PER_SECOND = 16
"""Frame rate of walkthroughs (released code)."""
QUALITY_CRF = 15
"""x264's constant rate factor; 15 keeps photos above 40 dB."""


def write_video(path: Path, frames: UInt8[Tensor, "t 3 h w"], comment: str = "") -> None:
    """Encode frames; height and width must be even.

    Raises:
        ValueError: the height or width is odd.
    """
    height, width = frames.shape[-2:]
    if height % 2 or width % 2:
        raise ValueError(f"a video of {height}x{width} cannot be encoded; both must be even")
    with av.open(str(path), "w", format="mp4") as container:
        if comment:
            container.metadata["comment"] = comment
        stream = container.add_stream("libx264", rate=FRAMES_PER_SECOND)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"crf": str(QUALITY_CRF), "preset": "fast", "bf": "0", "g": "40"}
        for image in frames.movedim(1, -1).contiguous().numpy():
            for packet in stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode(None):
            container.mux(packet)


def read_video(path: Path) -> UInt8[Tensor, "t 3 h w"]:
    """Decode all frames."""
    with av.open(str(path)) as container:
        frames = [torch.from_numpy(frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
    return torch.stack(frames).movedim(-1, 1).contiguous()


def join_videos(path: Path, parts: Sequence[Path], comment: str = "") -> None:
    """Join files of `write_video` with the same size into one, packet by packet."""
    with av.open(str(path), "w", format="mp4") as out:
        if comment:
            out.metadata["comment"] = comment
        target, offset = None, 0
        for part in parts:
            with av.open(str(part)) as source:
                stream = source.streams.video[0]
                if target is None:
                    target = out.add_stream_from_template(stream)
                    step = round(1 / (FRAMES_PER_SECOND * float(stream.time_base or 1)))
                count = 0
                for packet in source.demux(stream):
                    if packet.dts is None:
                        continue
                    packet.pts = packet.dts = offset + count * step
                    packet.stream = target
                    out.mux(packet)
                    count += 1
                offset += count * step
