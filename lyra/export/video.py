"""H.264 MP4 files: write frames, read them back, and join chunks without encoding again.

16 frames a second, no B-frames, so that chunk files can be joined packet by packet. Long videos are read a frame at a
time, because 3,000 frames of 480x832 are 3.6 GB. Knows nothing about what is shown.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from threading import Lock
from typing import Protocol, overload

import av
import torch
from jaxtyping import UInt8
from torch import Tensor

from lyra.errors import UserError

FRAMES_PER_SECOND = 16
"""Frame rate of walkthroughs (released code)."""
QUALITY_CRF = 15
"""x264's constant rate factor; 15 keeps photos above 40 dB."""
KEPT_BYTES = 256 * 2**20
"""Decoded frames that a reader keeps: 214 of 480x832, so that a walkthrough of two chunks is decoded once."""
_UNREADABLE = (av.FFmpegError, OSError, RuntimeError, ValueError)


class Frames(Protocol):
    """Frames of a video, (t, 3, h, w) in RGB bytes: all in memory as a tensor, or decoded when they are asked for."""

    @property
    def shape(self) -> torch.Size:
        """(t, 3, h, w)."""
        ...

    @property
    def device(self) -> torch.device:
        """Where the frames are."""
        ...

    def __len__(self) -> int: ...

    @overload
    def __getitem__(self, index: int | list[int], /) -> Tensor: ...

    @overload
    def __getitem__(self, index: slice, /) -> Frames: ...


def write_video(
    path: Path, frames: Iterable[UInt8[Tensor, "3 h w"]], comment: str = "", fps: int = FRAMES_PER_SECOND
) -> None:
    """Encode frames as they come; height and width must be even.

    Args:
        frames: RGB, all of one size; a tensor (t, 3, h, w) will do.
        comment: goes into the file's metadata.
        fps: frames a second.

    Raises:
        ValueError: the height or width is odd, or there are no frames.
    """
    pictures = iter(frames)
    first = next(pictures, None)
    if first is None:
        raise ValueError("a video without frames cannot be encoded")
    height, width = first.shape[-2:]
    if height % 2 or width % 2:
        raise ValueError(f"a video of {height}x{width} cannot be encoded; both must be even")
    with av.open(str(path), "w", format="mp4") as container:
        if comment:
            container.metadata["comment"] = comment
        stream = container.add_stream("libx264", rate=fps)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"crf": str(QUALITY_CRF), "preset": "fast", "bf": "0", "g": "40"}
        for picture in chain([first], pictures):
            image = picture.movedim(0, -1).cpu().contiguous().numpy()
            for packet in stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode(None):
            container.mux(packet)


def read_video(path: Path) -> UInt8[Tensor, "t 3 h w"]:
    """Decode all frames.

    Raises:
        UserError: the file is not there, or damaged, or no video.
    """
    frames = VideoFrames.open(path)
    decoded = torch.empty(frames.shape, dtype=torch.uint8)
    for index, frame in enumerate(frames):
        decoded[index] = frame
    return decoded


@dataclass(frozen=True)
class VideoFrames:
    """Frames of a file, each decoded when it is asked for, behind the protocol `Frames`.

    Reading on costs a frame's decoding, jumping back up to 40. Threads may share it.
    """

    reader: _Reader
    ids: range
    """Which frames of the file these are."""

    @classmethod
    def open(cls, path: Path) -> VideoFrames:
        """All frames of a video.

        Raises:
            UserError: the file is not there, or damaged, or no video.
        """
        reader = _Reader(path)
        return cls(reader, range(len(reader.times)))

    @property
    def shape(self) -> torch.Size:
        """(t, 3, h, w)."""
        return torch.Size((len(self.ids), *self.reader.first.shape))

    @property
    def device(self) -> torch.device:
        """The CPU, where videos are decoded."""
        return self.reader.first.device

    def __len__(self) -> int:
        return len(self.ids)

    def __iter__(self) -> Iterator[UInt8[Tensor, "3 h w"]]:
        return (self.reader.frame(index) for index in self.ids)

    @overload
    def __getitem__(self, index: int | list[int], /) -> Tensor: ...

    @overload
    def __getitem__(self, index: slice, /) -> VideoFrames: ...

    def __getitem__(self, index: int | list[int] | slice, /) -> Tensor | VideoFrames:
        """A frame, the frames of a list, or, not decoded yet, those of a slice.

        Raises:
            UserError: the file is damaged there.
            IndexError: there is no such frame.
        """
        if isinstance(index, slice):
            return VideoFrames(self.reader, self.ids[index])
        if isinstance(index, list):
            chosen = [self.ids[i] for i in index]
            return torch.stack([self.reader.frame(i) for i in chosen]) if chosen else self.reader.first[None][:0]
        return self.reader.frame(self.ids[index])


class _Reader:
    """A decoder that goes on from where it is, or from the key frame before what is asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = Lock()
        self._kept: OrderedDict[int, Tensor] = OrderedDict()
        try:
            self._container = av.open(str(path))
            streams = self._container.streams.video
            packets = [p for p in self._container.demux(streams[0]) if p.size and not p.is_discard] if streams else []
        except _UNREADABLE as error:
            raise self._damaged(error) from error
        times = sorted((p.pts, p.is_keyframe) for p in packets if p.pts is not None)
        # Without a time of its own for each frame, frames can only be counted from the start.
        timed = len({time for time, _ in times}) == len(packets)
        self.times = [time for time, _ in times] if timed else list(range(len(packets)))
        self._keys = [i for i, (_, is_key) in enumerate(times) if is_key] if timed else []
        if not self.times:
            raise UserError(f"{path} shows nothing; choose a video with frames.")
        self._stream = streams[0]
        self._rewind(0)
        self.first = self.frame(0)

    def frame(self, index: int) -> UInt8[Tensor, "3 h w"]:
        """One frame.

        Raises:
            UserError: the file is damaged there.
        """
        with self._lock:
            if index not in self._kept:
                self._keep(index, self._decode(index))
            self._kept.move_to_end(index)
            return self._kept[index]

    def _keep(self, index: int, frame: Tensor) -> None:
        self._kept[index] = frame
        while len(self._kept) > max(1, KEPT_BYTES // frame.nbytes):
            self._kept.popitem(last=False)

    def _decode(self, index: int) -> Tensor:
        try:
            key = self._key_before(index)
            if index < self._next or key > self._next:
                self._rewind(key)
            found = self._read_on(index)
            if found is None and key:
                # Frames after a key frame may lean on what was before it.
                self._rewind(0)
                found = self._read_on(index)
        except _UNREADABLE as error:
            raise self._damaged(error) from error
        if found is None:
            raise UserError(f"{self.path} is damaged at frame {index}; make the video again, or restore the file.")
        height, width = self.first.shape[-2:] if index else (found.height, found.width)
        image = found.reformat(width=width, height=height, format="rgb24").to_ndarray()
        return torch.from_numpy(image).movedim(-1, 0).contiguous()

    def _key_before(self, index: int) -> int:
        """The last frame up to this one that needs no other one; the first where none is known."""
        place = bisect_right(self._keys, index)
        return self._keys[place - 1] if place else 0

    def _rewind(self, key: int) -> None:
        """Go on from a key frame."""
        if key:
            self._container.seek(self.times[key], stream=self._stream)
        else:
            self._container.seek(0)
        self._decoded: Iterator[av.VideoFrame] = self._container.decode(self._stream)
        self._next = key

    def _read_on(self, index: int) -> av.VideoFrame | None:
        """Decode up to a frame; None where the file has none of its time."""
        for frame in self._decoded:
            if self._keys and frame.pts is not None:
                place = bisect_right(self.times, frame.pts) - 1
                if place < 0 or self.times[place] != frame.pts:
                    continue
                self._next = place
            self._next += 1
            if self._next > index:
                return frame if self._next == index + 1 else None
        return None

    def _damaged(self, error: Exception) -> UserError:
        reason = getattr(error, "strerror", None) or error
        return UserError(f"{self.path} cannot be read as a video ({reason}); make it again, or restore the file.")


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
