"""Videos: what is written is read back, frame by frame or all at once, and damaged files are one sentence."""

import random
import threading
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from lyra.errors import UserError
from lyra.export.video import VideoFrames, join_videos, read_video, write_video
from lyra.metrics.image import psnr_db


def moving_picture(frames: int, height: int = 96, width: int = 160) -> torch.Tensor:
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    pictures = [torch.stack([(x + 2 * t) % 256, (y * 2 + t) % 256, (x + y) % 256]) for t in range(frames)]
    return torch.stack(pictures).to(torch.uint8)


def test_video_keeps_frames_above_38_db(tmp_path):
    frames = moving_picture(20)
    write_video(tmp_path / "a.mp4", frames, "a comment")
    again = read_video(tmp_path / "a.mp4")
    assert again.shape == frames.shape
    assert psnr_db(frames[0].float(), again[0].float(), 255) > 38


def test_joined_videos_have_all_frames_in_order_and_bytes_do_not_change(tmp_path):
    frames = moving_picture(30)
    write_video(tmp_path / "a.mp4", frames[:17])
    write_video(tmp_path / "b.mp4", frames[17:])
    for name in ("one.mp4", "two.mp4"):
        join_videos(tmp_path / name, [tmp_path / "a.mp4", tmp_path / "b.mp4"], "joined")
    joined = read_video(tmp_path / "one.mp4")
    parts = torch.cat([read_video(tmp_path / "a.mp4"), read_video(tmp_path / "b.mp4")])
    assert torch.equal(joined, parts)
    assert (tmp_path / "one.mp4").read_bytes() == (tmp_path / "two.mp4").read_bytes()


def test_odd_sizes_are_refused(tmp_path):
    with pytest.raises(ValueError, match="must be even"):
        write_video(tmp_path / "a.mp4", torch.zeros(1, 3, 95, 160, dtype=torch.uint8))


def test_frames_are_encoded_as_they_come_at_any_rate(tmp_path):
    frames = moving_picture(12)
    taken = []

    def one_by_one():
        for index, frame in enumerate(frames):
            taken.append(index)
            yield frame

    write_video(tmp_path / "a.mp4", one_by_one(), fps=8)
    write_video(tmp_path / "b.mp4", frames, fps=8)
    assert taken == list(range(12))
    assert torch.equal(read_video(tmp_path / "a.mp4"), read_video(tmp_path / "b.mp4"))
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert container.streams.video[0].average_rate == 8
    with pytest.raises(ValueError, match="without frames"):
        write_video(tmp_path / "c.mp4", frames[:0])
    assert not (tmp_path / "c.mp4").exists()


def decoded_by_av(path: Path) -> torch.Tensor:
    with av.open(str(path)) as container:
        pictures = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return torch.from_numpy(np.stack(pictures)).movedim(-1, 1)


def write_elsewhere(path: Path, frames: torch.Tensor) -> None:
    """A video as other programs write it: with B-frames, and key frames that later ones look behind."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = frames.shape[-1], frames.shape[-2], "yuv420p"
        stream.options = {"bf": "3", "g": "15", "x264-params": "open-gop=1"}
        for frame in frames.movedim(1, -1).contiguous().numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))


@pytest.fixture(scope="module", params=["own.mp4", "foreign.mp4", "foreign.mkv"])
def video(request, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("videos") / request.param
    (write_video if request.param == "own.mp4" else write_elsewhere)(path, moving_picture(90))
    return path


def test_frames_are_the_same_in_whatever_order_they_are_asked_for(video, monkeypatch):
    expected = decoded_by_av(video)
    assert torch.equal(read_video(video), expected)
    monkeypatch.setattr("lyra.export.video.KEPT_BYTES", 3 * expected[0].nbytes)
    frames = VideoFrames.open(video)
    assert frames.shape == expected.shape and len(frames) == 90 and frames.device == expected.device
    draws = random.Random(0)
    for index in [89, 0, 88, 1, *(draws.randrange(90) for _ in range(60))]:
        assert torch.equal(frames[index], expected[index]), index
    assert torch.equal(frames[-2], expected[-2])
    assert torch.equal(frames[[7, 3, 7]], expected[[7, 3, 7]]) and frames[[]].shape == (0, *expected.shape[1:])
    part = frames[5:80:10]
    assert isinstance(part, VideoFrames) and torch.equal(torch.stack(list(part[1:])), expected[15:80:10])
    for index in (90, -91):
        with pytest.raises(IndexError):
            frames[index]


def test_a_reader_keeps_no_more_frames_than_it_may(video, monkeypatch):
    frames = VideoFrames.open(video)
    monkeypatch.setattr("lyra.export.video.KEPT_BYTES", 4 * frames[0].nbytes)
    for _ in frames:
        assert len(frames.reader._kept) <= 4


def test_threads_may_share_a_reader(video):
    expected, frames, wrong = decoded_by_av(video), VideoFrames.open(video), []

    def check(offset: int) -> None:
        wrong.extend(i for i in range(offset, 90, 7) if not torch.equal(frames[i], expected[i]))

    threads = [threading.Thread(target=check, args=(offset,)) for offset in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def sound_only(path: Path) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        tone = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        tone.sample_rate = 44100
        container.mux(stream.encode(tone))
        container.mux(stream.encode(None))


def test_what_is_no_video_is_one_sentence(tmp_path):
    write_video(tmp_path / "whole.mp4", moving_picture(30))
    whole = (tmp_path / "whole.mp4").read_bytes()
    for name, content in (("text", b"hello " * 99), ("empty", b""), ("cut", whole[: len(whole) // 2])):
        (tmp_path / f"{name}.mp4").write_bytes(content)
    sound_only(tmp_path / "sound.mp4")
    for name in ("text", "empty", "cut", "sound", "absent"):
        with pytest.raises(UserError) as error:
            VideoFrames.open(tmp_path / f"{name}.mp4")
        text = str(error.value)
        assert text.startswith(str(tmp_path / f"{name}.mp4")) and text.endswith(".") and "\n" not in text


def test_a_video_that_is_damaged_inside_is_one_sentence_where_it_is(tmp_path):
    write_video(tmp_path / "a.mp4", moving_picture(90))
    content = bytearray((tmp_path / "a.mp4").read_bytes())
    middle = len(content) // 2
    content[middle : middle + 3000] = random.Random(0).randbytes(3000)
    (tmp_path / "a.mp4").write_bytes(content)
    frames = VideoFrames.open(tmp_path / "a.mp4")
    assert frames[3].shape == (3, 96, 160)
    with pytest.raises(UserError, match=r"a\.mp4 .*\.$"):
        list(frames)
