"""Which stages does a job go through, how far is each, and how long will the rest take?

A `StageLog` follows the statuses of one job. `StageSeconds` remembers how long stages took in this process, which is
the only ground for a time left; without it there is none. Knows no thread, no model and no stage by name.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from lyra.progress import Status

StageState = Literal["waiting", "running", "done", "skipped"]

_REMEMBERED = 3
"""Runs of a stage that its expected seconds are the mean of; the first run of a process is slower than the others."""


@dataclass(frozen=True)
class PlannedStage:
    """A stage that a job is going to enter."""

    name: str
    """As the job's `Progress.enter` calls it."""
    chunk: int = 0
    cost: str = ""
    """Stages of the same cost take about as long; the name when empty."""


@dataclass(frozen=True)
class StageStatus:
    """How far one stage of a job is."""

    name: str
    chunk: int
    state: StageState
    step: int = 0
    steps: int = 1
    seconds: float = 0.0
    """Spent so far, or in all when it is done."""
    seconds_left: float | None = None
    """Expected; None when nothing is known."""


class StageSeconds:
    """Seconds that the last few runs of each stage took in this process."""

    def __init__(self) -> None:
        self._seconds: defaultdict[str, deque[float]] = defaultdict(lambda: deque(maxlen=_REMEMBERED))

    def add(self, cost: str, seconds: float) -> None:
        """Remember a finished stage."""
        self._seconds[cost].append(seconds)

    def expected(self, cost: str) -> float | None:
        """Mean of the remembered runs; None before the first."""
        known = self._seconds.get(cost)
        return sum(known) / len(known) if known else None


@dataclass
class _Stage:
    plan: PlannedStage
    state: StageState = "waiting"
    step: int = 0
    steps: int = 1
    started: float = 0.0
    stepped: float = 0.0
    seconds: float = 0.0

    @property
    def cost(self) -> str:
        return self.plan.cost or self.plan.name


@dataclass
class StageLog:
    """The stages of one job, planned and met; mutable because it follows the job."""

    history: StageSeconds
    plan: Sequence[PlannedStage] = ()
    running: _Stage | None = None
    stages: list[_Stage] = field(init=False)

    def __post_init__(self) -> None:
        self.stages = [_Stage(planned) for planned in self.plan]

    def follow(self, status: Status, now: float) -> None:
        """Take in a status of the job.

        A stage that was not planned is put in where the job stands, unless it only announces a picture.
        """
        stage = self.running
        if stage is None or (stage.plan.name, stage.plan.chunk) != (status.stage, status.chunk):
            self.end(now)
            stage = self._enter(status)
            if stage is None:
                return
            stage.state, stage.started = "running", now
            self.running = stage
        stage.step, stage.steps, stage.stepped = status.step, max(status.steps, 1), now

    def end(self, now: float) -> None:
        """The running stage came to its end."""
        if self.running is None:
            return
        stage, self.running = self.running, None
        stage.state, stage.seconds, stage.step = "done", now - stage.started, stage.steps
        self.history.add(stage.cost, stage.seconds)

    def finish(self, now: float) -> None:
        """The job is done: what was not entered was not needed."""
        self.end(now)
        self._skip_before(len(self.stages))

    def stop(self, now: float) -> None:
        """The job was cancelled or failed: the running stage was left in the middle, so its seconds teach nothing."""
        if self.running is not None:
            stage, self.running = self.running, None
            stage.state, stage.seconds = "waiting", now - stage.started

    def statuses(self, now: float) -> tuple[StageStatus, ...]:
        """All stages in order."""
        return tuple(self._status(stage, now) for stage in self.stages)

    def seconds_left(self, now: float) -> float | None:
        """Expected seconds of the running stage and all waiting ones; None if any of them is unknown."""
        left = [self._left(stage, now) for stage in self.stages if stage.state in ("running", "waiting")]
        known = [seconds for seconds in left if seconds is not None]
        return sum(known) if len(known) == len(left) and left else None

    def _enter(self, status: Status) -> _Stage | None:
        for index, stage in enumerate(self.stages):
            if stage.state == "waiting" and (stage.plan.name, stage.plan.chunk) == (status.stage, status.chunk):
                self._skip_before(index)
                return stage
        if status.picture is not None:
            return None
        stage = _Stage(PlannedStage(status.stage, status.chunk))
        behind = [index for index, met in enumerate(self.stages) if met.state != "waiting"]
        self.stages.insert(behind[-1] + 1 if behind else 0, stage)
        return stage

    def _skip_before(self, end: int) -> None:
        for stage in self.stages[:end]:
            if stage.state == "waiting":
                stage.state = "skipped"

    def _status(self, stage: _Stage, now: float) -> StageStatus:
        seconds = now - stage.started if stage.state == "running" else stage.seconds
        left = self._left(stage, now) if stage.state in ("running", "waiting") else None
        return StageStatus(
            stage.plan.name, stage.plan.chunk, stage.state, stage.step, stage.steps, seconds, seconds_left=left
        )

    def _left(self, stage: _Stage, now: float) -> float | None:
        """The stage's own rate where it has made steps, else what earlier runs took."""
        if stage.state == "running" and stage.step > 0:
            a_step = (stage.stepped - stage.started) / stage.step
            return max(a_step * (stage.steps - stage.step) - (now - stage.stepped), 0.0)
        expected = self.history.expected(stage.cost)
        if expected is None or stage.state == "waiting":
            return expected
        return max(expected - (now - stage.started), 0.0)


def finished_seconds(stages: Sequence[StageStatus]) -> dict[str, float]:
    """Seconds of the finished stages by name, summed over the chunks."""
    seconds: dict[str, float] = {}
    for stage in stages:
        if stage.state == "done":
            seconds[stage.name] = seconds.get(stage.name, 0.0) + stage.seconds
    return seconds
