"""How a long job tells where it stands and is told to stop, whoever listens: a terminal, the app or a test.

A stage calls `Progress.step`; the listener gets a `Status`. Cancelling raises `Cancelled` at the next step, so nothing
runs on behind a cancelled job. Knows no thread and no user interface.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path


class Cancelled(Exception):
    """The job was cancelled; what was finished before stays on disk."""


@dataclass(frozen=True)
class Status:
    """One moment of a job."""

    stage: str
    """Name of the running stage, for people."""
    step: int
    """Finished steps of this stage."""
    steps: int
    """All steps of this stage."""
    chunk: int
    """Index of the running chunk, from 0."""
    chunks: int
    elapsed_seconds: float
    """Since the job started."""
    picture: Path | None = None
    """An image or video that can be shown already."""


@dataclass
class Progress:
    """Passed down the stages; mutable because it remembers the running stage."""

    listener: Callable[[Status], None] = lambda status: None
    should_stop: Callable[[], bool] = lambda: False
    chunks: int = 1
    chunk: int = 0
    stage: str = ""
    started: float = field(default_factory=time.perf_counter)
    stage_seconds: dict[str, float] = field(default_factory=dict)
    _stage_started: float | None = None

    def enter(self, stage: str, picture: Path | None = None) -> None:
        """Start a stage; its time is added to `stage_seconds` when the next one starts or `finish` is called."""
        self.finish()
        self.stage, self._stage_started = stage, time.perf_counter()
        self.step(0, 1, picture)

    def finish(self) -> None:
        """End the running stage."""
        if self._stage_started is not None:
            spent = time.perf_counter() - self._stage_started
            self.stage_seconds[self.stage] = self.stage_seconds.get(self.stage, 0.0) + spent
            self._stage_started = None

    def step(self, step: int, steps: int, picture: Path | None = None) -> None:
        """Tell the listener that `step` of `steps` of the stage are done.

        Raises:
            Cancelled: the listener asked to stop.
        """
        if self.should_stop():
            raise Cancelled(f"cancelled during '{self.stage}'")
        elapsed = time.perf_counter() - self.started
        self.listener(Status(self.stage, step, steps, self.chunk, self.chunks, elapsed, picture))
