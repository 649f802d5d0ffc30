"""Who runs long work, one piece at a time, so that people can watch it, come back to it and stop it?

One worker thread takes jobs in the order they came: the device does one at a time. A job is known by an id that cannot
be guessed, so a page finds its job again after a reload. Cancelling takes effect at the job's next step. Knows no user
interface, no model and no file; jobs are lost when the process ends, and what they wrote is not.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lyra.errors import UserError
from lyra.progress import Cancelled, Progress, Status
from lyra.serving.stages import PlannedStage, StageLog, StageSeconds, StageStatus, finished_seconds

logger = logging.getLogger(__name__)

JobState = Literal["queued", "running", "done", "failed", "cancelled"]

MAX_WAITING = 16
"""Jobs that may wait, of all people together."""
MAX_PER_SESSION = 2
"""Jobs that one session may have waiting or running."""
KEPT_JOBS = 200
KEPT_SECONDS = 24 * 3600.0
"""How many finished jobs are remembered, and for how long."""
APOLOGY = (
    "Something went wrong on our side and was written to the log; what was finished is kept, so please try again, and "
    "report it if it happens twice."
)


@dataclass(frozen=True)
class JobStatus:
    """One moment of a job, for whoever watches it."""

    id: str
    state: JobState
    elapsed_seconds: float
    """Since it began to run; 0 while it waits."""
    seconds_left: float | None
    """Expected from what stages took so far in this process; None while there is no ground for it."""
    queue_position: int
    """1 for the next one to run, 0 when it does not wait."""
    stage: str
    step: int
    steps: int
    chunk: int
    chunks: int
    stages: tuple[StageStatus, ...]
    """All stages in order, planned ones included."""
    picture: Path | None
    """The newest image or video that can be shown."""
    pictures: int
    """How many pictures there were so far; a new one may have the old one's path."""
    error: str | None
    """One sentence, when it failed."""
    result: Any
    """What the job's function returned, when it is done."""

    @property
    def ended(self) -> bool:
        """Whether nothing will change any more."""
        return self.state in ("done", "failed", "cancelled")

    @property
    def finished_stages(self) -> dict[str, float]:
        """Seconds of the finished stages by name."""
        return finished_seconds(self.stages)


@dataclass
class _Job:
    id: str
    session: str
    work: Callable[[Progress], Any]
    log: StageLog
    state: JobState = "queued"
    stop: threading.Event = field(default_factory=threading.Event)
    last: Status = field(default_factory=lambda: Status("", 0, 1, 0, 1, 0.0))
    began: float | None = None
    ended: float | None = None
    picture: Path | None = None
    pictures: int = 0
    error: str | None = None
    result: Any = None

    @property
    def over(self) -> bool:
        return self.ended is not None


class JobManager:
    """Runs jobs one after the other in a thread of its own."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._jobs: dict[str, _Job] = {}
        self._waiting: deque[_Job] = deque()
        self._seconds = StageSeconds()
        self._closed = False
        self._changed = threading.Condition()
        self._worker = threading.Thread(target=self._run_all, name="lyra-jobs", daemon=True)
        self._worker.start()

    def submit(self, work: Callable[[Progress], Any], session: str, plan: Sequence[PlannedStage] = ()) -> str:
        """Put work at the end of the queue and return the id of its job.

        Args:
            work: called with a `Progress` in the worker thread.
            session: whose job it is, for the limit of `MAX_PER_SESSION`.
            plan: the stages that the work is expected to enter.

        Raises:
            UserError: too many jobs are waiting.
        """
        with self._changed:
            self._forget_old()
            if sum(job.session == session and not job.over for job in self._jobs.values()) >= MAX_PER_SESSION:
                raise UserError(f"You have {MAX_PER_SESSION} unfinished jobs; wait for one of them or cancel it.")
            if len(self._waiting) >= MAX_WAITING:
                raise UserError(f"{MAX_WAITING} jobs are waiting already; please try again in a few minutes.")
            job = _Job(secrets.token_urlsafe(18), session, work, StageLog(self._seconds, plan))
            self._jobs[job.id] = job
            self._waiting.append(job)
            self._changed.notify_all()
            return job.id

    def status(self, job_id: str) -> JobStatus | None:
        """Where a job stands; None when there is no such job, or none any more."""
        with self._changed:
            job = self._jobs.get(job_id)
            return None if job is None else self._status(job)

    def wait(self, job_id: str, seconds: float) -> JobStatus | None:
        """The job's status as soon as it has ended, at the latest after some seconds."""
        deadline = time.monotonic() + seconds
        with self._changed:
            job = self._jobs.get(job_id)
            while job is not None and not job.over and (left := deadline - time.monotonic()) > 0:
                self._changed.wait(left)
            return None if job is None else self._status(job)

    def cancel(self, job_id: str) -> bool:
        """Stop a job before its next step, or take it out of the queue; False if it is over or unknown."""
        with self._changed:
            job = self._jobs.get(job_id)
            if job is None or job.over:
                return False
            job.stop.set()
            if job.state == "queued":
                self._waiting.remove(job)
                self._end(job, "cancelled")
            return True

    def close(self) -> None:
        """Cancel everything and end the worker."""
        with self._changed:
            self._closed = True
            for job in list(self._jobs.values()):
                self.cancel(job.id)
            self._changed.notify_all()
        self._worker.join()

    def _run_all(self) -> None:
        while True:
            with self._changed:
                while not self._waiting and not self._closed:
                    self._changed.wait()
                if self._closed:
                    return
                job = self._waiting.popleft()
                job.state, job.began = "running", self._clock()
            self._run(job)

    def _run(self, job: _Job) -> None:
        progress = Progress(listener=lambda status: self._follow(job, status), should_stop=job.stop.is_set)
        state: JobState = "done"
        try:
            job.result = job.work(progress)
        except Cancelled:
            state = "cancelled"
        except UserError as error:
            state, job.error = "failed", str(error)
        except Exception:
            logger.exception("A job failed during '%s'.", job.last.stage)
            state, job.error = "failed", APOLOGY
        with self._changed:
            self._end(job, state)

    def _follow(self, job: _Job, status: Status) -> None:
        with self._changed:
            job.last = status
            job.log.follow(status, self._clock())
            if status.picture is not None:
                job.picture, job.pictures = status.picture, job.pictures + 1

    def _end(self, job: _Job, state: JobState) -> None:
        job.state, job.ended = state, self._clock()
        if state == "done":
            job.log.finish(job.ended)
        else:
            job.log.stop(job.ended)
        self._changed.notify_all()

    def _status(self, job: _Job) -> JobStatus:
        now = self._clock() if job.ended is None else job.ended
        return JobStatus(
            id=job.id,
            state=job.state,
            elapsed_seconds=0.0 if job.began is None else now - job.began,
            seconds_left=job.log.seconds_left(now) if job.state == "running" else None,
            queue_position=self._waiting.index(job) + 1 if job.state == "queued" else 0,
            stage=job.last.stage,
            step=job.last.step,
            steps=job.last.steps,
            chunk=job.last.chunk,
            chunks=job.last.chunks,
            stages=job.log.statuses(now),
            picture=job.picture,
            pictures=job.pictures,
            error=job.error,
            result=job.result,
        )

    def _forget_old(self) -> None:
        over = [job for job in self._jobs.values() if job.ended is not None]
        over.sort(key=lambda job: job.ended or 0.0)
        now = self._clock()
        for index, job in enumerate(over):
            if len(over) - index > KEPT_JOBS or now - (job.ended or 0.0) > KEPT_SECONDS:
                del self._jobs[job.id]
