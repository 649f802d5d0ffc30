"""Finished chunks survive, damaged ones are made again, and a disk's failures become one sentence."""

import errno

import pytest
import torch

from lyra.config import GenerateJob
from lyra.errors import UserError
from lyra.generation.captions import caption_of_chunk, read_captions
from lyra.generation.chunk_store import ChunkStore, content_key, disk_message
from lyra.generation.state import ChunkRecord
from lyra.record import chunk_key
from lyra.types import Cameras


def small_record() -> ChunkRecord:
    return ChunkRecord(
        latents=torch.randn(1, 2, 3, 4, 5),
        measured_ids=torch.tensor([4, 8]),
        depth=torch.rand(2, 4, 5),
        images=torch.rand(2, 3, 4, 5),
        pixels=torch.zeros(2, 3, 8, 10, dtype=torch.uint8),
        retrieved_ids=torch.tensor([0]),
        encoder_cache={"encoder.0": torch.rand(2)},
        decoder_cache={"features": [torch.rand(3), "Rep", None]},
    )


FRAMES = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)


def test_a_saved_chunk_is_loaded_exactly(tmp_path):
    store, record = ChunkStore(tmp_path), small_record()
    store.save("key", record, FRAMES, {"prompt": "p"})
    again = store.load("key")
    assert torch.equal(again.latents, record.latents)
    assert torch.equal(again.encoder_cache["encoder.0"], record.encoder_cache["encoder.0"])
    features = again.decoder_cache["features"]
    assert torch.equal(features[0], record.decoder_cache["features"][0])
    assert features[1:] == ["Rep", None]


def test_missing_and_damaged_chunks_are_none(tmp_path):
    store = ChunkStore(tmp_path)
    assert store.load("key") is None
    store.save("key", small_record(), FRAMES, {})
    path = store.path("key") / "record.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    assert store.load("key") is None


def test_an_interrupted_save_leaves_no_chunk(tmp_path, monkeypatch):
    def fail(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("lyra.generation.chunk_store.write_video", fail)
    store = ChunkStore(tmp_path)
    with pytest.raises(UserError, match="is full; free some space"):
        store.save("key", small_record(), FRAMES, {})
    assert store.load("key") is None


def test_each_failure_of_a_disk_is_one_sentence(tmp_path):
    full = disk_message(tmp_path, OSError(errno.ENOSPC, "No space left on device"))
    denied = disk_message(tmp_path, OSError(errno.EACCES, "Permission denied"))
    assert "full" in full
    assert "Permission denied" in denied
    assert all(text.count("\n") == 0 and text.endswith(".") for text in (full, denied))


def test_keys_depend_on_every_part_and_on_nothing_else():
    assert content_key("a", 1, b"x") == content_key("a", 1, b"x")
    assert len({content_key("a", 1), content_key("a", 2), content_key("b", 1), content_key("a", b"1")}) == 4


def path_of(frames: int) -> Cameras:
    w2c = torch.eye(4).repeat(frames, 1, 1)
    w2c[:, 2, 3] = -torch.arange(frames) * 0.01
    return Cameras(w2c, torch.eye(3).repeat(frames, 1, 1), 480, 832)


def test_a_longer_job_finds_the_shorter_ones_chunks():
    short = GenerateJob(photo="a.jpg", chunks=1)
    long = GenerateJob(photo="b.jpg", chunks=3)
    assert chunk_key("start", short, path_of(81), 0, "") == chunk_key("start", long, path_of(241), 0, "")


@pytest.mark.parametrize("change", [{"seed": 1}, {"sampler": "full"}, {"memory": "none"}])
def test_another_setting_makes_another_chunk(change):
    plain = chunk_key("start", GenerateJob(photo="a.jpg"), path_of(81), 0, "")
    assert plain != chunk_key("start", GenerateJob(photo="a.jpg", **change), path_of(81), 0, "")
    assert plain != chunk_key("start", GenerateJob(photo="a.jpg"), path_of(81), 0, "a prompt")


def test_steps_do_not_matter_to_the_distilled_sampler():
    keys = {chunk_key("s", GenerateJob(photo="a", steps=steps), path_of(81), 0, "") for steps in (10, 35)}
    assert len(keys) == 1


def test_captions_start_where_the_released_code_starts_them(tmp_path):
    path = tmp_path / "captions.json"
    path.write_text('{"0": "a", "81": "b", "161": "c", "999": "never"}')
    captions = read_captions(GenerateJob(photo="x", chunks=2, captions=str(path)))
    assert captions == {0: "a", 81: "b"}
    assert [caption_of_chunk(captions, chunk) for chunk in (0, 1, 2)] == ["a", "b", "b"]


@pytest.mark.parametrize("text", ["[1]", "nonsense", '{"x": "a"}', '{"999": "late"}'])
def test_unusable_captions_are_one_sentence(tmp_path, text):
    path = tmp_path / "captions.json"
    path.write_text(text)
    with pytest.raises(UserError, match="captions file"):
        read_captions(GenerateJob(photo="x", captions=str(path)))
