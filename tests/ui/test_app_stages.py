"""A job in words and bars: honest about time, readable by a screen reader, safe against what it shows."""

from collections.abc import Sequence
from typing import Any

import pytest

from lyra.serving.jobs import JobStatus
from lyra.serving.stages import StageStatus
from lyra.ui.stages import message, seconds_in_words, stage_list


def status(stages: Sequence[StageStatus] = (), **fields: Any) -> JobStatus:
    values: dict[str, Any] = {
        "id": "x",
        "state": "running",
        "elapsed_seconds": 12.0,
        "seconds_left": None,
        "queue_position": 0,
        "stage": "Denoise",
        "step": 2,
        "steps": 4,
        "chunk": 0,
        "chunks": 1,
        "picture": None,
        "pictures": 0,
        "error": None,
        "result": None,
    }
    return JobStatus(stages=tuple(stages), **(values | fields))


RUNNING = StageStatus("Denoise", 0, "running", step=2, steps=4, seconds=3.0, seconds_left=3.0)


def test_time_left_is_not_claimed_without_a_ground() -> None:
    html = stage_list(status([RUNNING]))
    assert "time left: measuring…" in html
    assert '<progress aria-label="Whole job"></progress>' in html
    assert '<progress aria-label="Denoise" max="4" value="2"></progress>' in html


def test_time_left_is_told_when_it_is_known() -> None:
    html = stage_list(status([RUNNING], seconds_left=36.0))
    assert "12 s so far, time left: about 36 s" in html
    assert 'aria-label="Whole job" max="1" value="0.250"' in html


def test_what_a_screen_reader_is_told_holds_no_running_seconds() -> None:
    html = stage_list(status([RUNNING], chunks=2, chunk=1))
    assert '<p class="lyra-summary" role="status">Chunk 2 of 2: Denoise</p>' in html


def test_only_the_running_chunk_is_spread_out() -> None:
    stages = [
        StageStatus("Retrieve", 0, "skipped"),
        StageStatus("Denoise", 0, "skipped"),
        StageStatus("Write video", 0, "done", seconds=0.1),
        StageStatus("Retrieve", 1, "done", seconds=2.0),
        StageStatus("Denoise", 1, "running"),
        StageStatus("Write video", 1, "waiting"),
        StageStatus("Retrieve", 2, "waiting"),
    ]
    html = stage_list(status(stages, chunk=1, chunks=3))
    assert html.index("Chunk 1</span>") < html.index("kept from before") < html.index("Retrieve")
    assert html.count("Retrieve") == 1 and html.count("Write video") == 1
    assert "Chunk 3</span>" in html


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"state": "queued", "queue_position": 1}, "Waiting for the running job."),
        ({"state": "queued", "queue_position": 3}, "Waiting for the running job and 2 more."),
        ({"state": "done", "elapsed_seconds": 75.2}, "Finished in 1 min 15 s."),
        ({"state": "cancelled"}, "Cancelled."),
        ({"state": "failed", "error": "The disk is full."}, 'role="alert">The disk is full.'),
    ],
)
def test_each_state_has_its_words(fields: dict[str, Any], words: str) -> None:
    assert words in stage_list(status(**fields))


def test_nothing_is_said_of_no_job() -> None:
    assert stage_list(None) == message(None) == message("") == ""


def test_what_comes_from_outside_cannot_be_markup() -> None:
    evil = "<img src=x onerror=alert(1)>\"'"
    shown = stage_list(status([StageStatus(evil, 0, "running")], stage=evil))
    shown += stage_list(status([StageStatus(evil, 0, "done")], state="failed", error=evil)) + message(evil, "error")
    assert "<img" not in shown and shown.count("&lt;img") >= 4
    assert "onerror=alert(1)>" not in shown


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.2, "0 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (125, "2 min 05 s"), (7800, "2 h 10 min")],
)
def test_durations_are_said_as_people_say_them(seconds: float, words: str) -> None:
    assert seconds_in_words(seconds) == words
