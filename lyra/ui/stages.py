"""How is a job shown in words and bars? HTML for the stage list, for messages and for the page's header.

Everything that comes from outside is escaped. The one-line summary is a live region, so it holds no running seconds:
a screen reader speaks when the state or the stage changes, not each second. Knows no component and no job manager.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Literal

from lyra.serving.jobs import JobStatus
from lyra.serving.stages import StageStatus

MEASURING = "measuring…"
_MARKS = {"waiting": "·", "running": "▸", "done": "✓"}


def message(text: str | None, kind: Literal["info", "warning", "error"] = "info") -> str:
    """A sentence beside the control that it is about; nothing for None."""
    if not text:
        return ""
    role = "alert" if kind == "error" else "status"
    return f'<p class="lyra-note lyra-{kind}" role="{role}">{escape(text)}</p>'


def seconds_in_words(seconds: float) -> str:
    """A duration as people say it: 8 s, 1 min 05 s, 2 h 10 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def stage_list(status: JobStatus | None, *, by_chunk: bool = True) -> str:
    """A job's summary, its time left and its stages; nothing for no job.

    Args:
        status: the job.
        by_chunk: group the stages of each chunk; of all chunks but the running one only the sum is shown.
    """
    if status is None:
        return ""
    if status.state == "queued":
        ahead = status.queue_position - 1
        others = "the running job" if ahead == 0 else f"the running job and {ahead} more"
        return message(f"Waiting for {others}.")
    head = f'<p class="lyra-summary" role="status">{escape(_summary(status))}</p>'
    if status.state == "failed":
        head = message(status.error, "error")
    rows = f'<ul class="lyra-stages">{_rows(status, by_chunk)}</ul>'
    if status.ended:
        rows = f"<details><summary>Stages and their seconds</summary>{rows}</details>"
    return f'<div class="lyra-job">{head}{_overall(status)}{rows}</div>'


def _summary(status: JobStatus) -> str:
    if status.state == "done":
        return f"Finished in {seconds_in_words(status.elapsed_seconds)}."
    if status.state == "cancelled":
        return "Cancelled; finished chunks are kept." if status.chunks > 1 else "Cancelled."
    chunk = f"Chunk {status.chunk + 1} of {status.chunks}: " if status.chunks > 1 else ""
    return f"{chunk}{status.stage or 'Starting'}"


def _overall(status: JobStatus) -> str:
    """Elapsed time, time left and the bar of the whole job while it runs."""
    if status.ended:
        return ""
    left = status.seconds_left
    times = f"{seconds_in_words(status.elapsed_seconds)} so far, time left: "
    times += MEASURING if left is None else f"about {seconds_in_words(left)}"
    share = ""
    if left is not None:
        share = f' max="1" value="{status.elapsed_seconds / max(status.elapsed_seconds + left, 1e-6):.3f}"'
    return f'<progress aria-label="Whole job"{share}></progress><p class="lyra-times">{times}</p>'


def _rows(status: JobStatus, by_chunk: bool) -> str:
    stages = [stage for stage in status.stages if stage.state != "skipped"]
    if not by_chunk or status.chunks == 1:
        return "".join(_row(stage) for stage in stages)
    chunks = range(max([stage.chunk for stage in status.stages], default=-1) + 1)
    return "".join(_chunk_rows(chunk, [s for s in status.stages if s.chunk == chunk], status) for chunk in chunks)


def _chunk_rows(chunk: int, stages: Sequence[StageStatus], status: JobStatus) -> str:
    """The chunk's stages if it is the running one, else one row for all."""
    met = [stage for stage in stages if stage.state != "skipped"]
    if chunk == status.chunk and not status.ended:
        return "".join(_row(stage, f"Chunk {chunk + 1}: ") for stage in met)
    done = all(stage.state in ("done", "skipped") for stage in stages)
    reused = done and len(met) < len(stages) / 2
    spent = sum(stage.seconds for stage in stages)
    note = "kept from before" if reused else seconds_in_words(spent) if done else ""
    return _line("done" if done else "waiting", f"Chunk {chunk + 1}", note)


def _row(stage: StageStatus, prefix: str = "") -> str:
    if stage.state == "done":
        return _line("done", stage.name, _short(stage.seconds))
    if stage.state == "waiting":
        expected = stage.seconds_left
        return _line("waiting", stage.name, "" if expected is None else f"about {_short(expected)}")
    value = f' max="{stage.steps}" value="{stage.step}"' if stage.steps > 1 else ""
    label = escape(f"{prefix}{stage.name}")
    note = f"{stage.step} of {stage.steps}" if stage.steps > 1 else _short(stage.seconds)
    return _line("running", stage.name, note, f'<progress aria-label="{label}"{value}></progress>')


def _line(state: str, name: str, note: str, bar: str = "") -> str:
    return (
        f'<li class="lyra-{state}"><span aria-hidden="true">{_MARKS[state]}</span>'
        f"<span>{escape(name)}</span>{bar}<span>{escape(note)}</span></li>"
    )


def _short(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 10 else seconds_in_words(seconds)
