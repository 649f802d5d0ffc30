"""Jobs run one after the other, can be watched, stopped and estimated, and fail in a sentence."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lyra.errors import UserError
from lyra.progress import Progress
from lyra.serving import jobs as jobs_module
from lyra.serving.jobs import APOLOGY, MAX_PER_SESSION, MAX_WAITING, JobManager, JobStatus
from lyra.serving.stages import PlannedStage


class Clock:
    """Time that passes when the test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def manager(clock: Clock) -> Iterator[JobManager]:
    manager = JobManager(clock)
    yield manager
    manager.close()


def ended(manager: JobManager, job_id: str) -> JobStatus:
    status = manager.wait(job_id, 10)
    assert status is not None and status.ended
    return status


def now(manager: JobManager, job_id: str) -> JobStatus:
    status = manager.status(job_id)
    assert status is not None
    return status


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


class Gate:
    """Work that enters a stage, then waits to be let on, step by step."""

    def __init__(self, steps: int = 4) -> None:
        self.steps, self.done = steps, 0
        self.entered, self.next = threading.Event(), threading.Semaphore(0)

    def __call__(self, progress: Progress) -> str:
        progress.enter("Denoise")
        self.entered.set()
        for step in range(1, self.steps + 1):
            self.next.acquire()
            progress.step(step, self.steps)
            self.done = step
        return "result"

    def let_on(self, steps: int = 1) -> None:
        target = self.done + steps
        for _ in range(steps):
            self.next.release()
        until(lambda: self.done == target)


def test_a_job_runs_and_hands_over_its_result(manager: JobManager) -> None:
    status = ended(manager, manager.submit(lambda progress: 42, "a"))
    assert (status.state, status.result, status.error) == ("done", 42, None)


def test_jobs_run_one_at_a_time_in_the_order_they_came(manager: JobManager) -> None:
    gate, order = Gate(1), []
    first = manager.submit(gate, "a")
    gate.entered.wait(10)
    others = [manager.submit(lambda progress, name=name: order.append(name), name) for name in "bcd"]
    positions = [now(manager, job).queue_position for job in [first, *others]]
    assert positions == [0, 1, 2, 3]
    assert now(manager, others[0]).state == "queued"
    assert order == []
    gate.let_on()
    ended(manager, others[-1])
    assert order == ["b", "c", "d"]


def test_ids_cannot_be_guessed(manager: JobManager) -> None:
    ids = [manager.submit(lambda progress: None, str(i)) for i in range(5)]
    assert len(set(ids)) == 5 and min(map(len, ids)) >= 24
    assert manager.status("job-1") is None
    assert not manager.cancel("job-1")


def test_cancelling_stops_at_the_next_step(manager: JobManager) -> None:
    gate = Gate(4)
    job = manager.submit(gate, "a")
    gate.entered.wait(10)
    gate.let_on()
    assert manager.cancel(job)
    gate.next.release()
    status = ended(manager, job)
    assert (status.state, status.error, gate.done) == ("cancelled", None, 1)
    assert not manager.cancel(job)


def test_a_waiting_job_is_cancelled_at_once_and_never_runs(manager: JobManager) -> None:
    gate, ran = Gate(1), []
    manager.submit(gate, "a")
    gate.entered.wait(10)
    waiting = manager.submit(lambda progress: ran.append(1), "b")
    assert manager.cancel(waiting)
    assert now(manager, waiting).state == "cancelled"
    gate.let_on()
    ended(manager, manager.submit(lambda progress: None, "c"))
    assert ran == []


def test_a_users_mistake_is_told_in_its_own_sentence(manager: JobManager) -> None:
    def work(progress: Progress) -> None:
        raise UserError("The disk is full; free some space.")

    status = ended(manager, manager.submit(work, "a"))
    assert (status.state, status.error) == ("failed", "The disk is full; free some space.")


def test_a_bug_is_logged_and_apologised_for(manager: JobManager, caplog: pytest.LogCaptureFixture) -> None:
    def work(progress: Progress) -> None:
        raise ZeroDivisionError("secret detail")

    status = ended(manager, manager.submit(work, "a"))
    assert (status.state, status.error) == ("failed", APOLOGY)
    assert "secret detail" in caplog.text and "Traceback" in caplog.text
    assert ended(manager, manager.submit(lambda progress: "on", "a")).result == "on"


def test_time_left_needs_a_ground_and_then_follows_it(manager: JobManager, clock: Clock) -> None:
    plan = [PlannedStage("Denoise"), PlannedStage("Decode")]

    def run(gate: Gate) -> Callable[[Progress], None]:
        def work(progress: Progress) -> None:
            gate(progress)
            progress.enter("Decode")
            clock.now += 3

        return work

    gate = Gate(4)
    first = manager.submit(run(gate), "a", plan)
    gate.entered.wait(10)
    assert now(manager, first).seconds_left is None
    clock.now += 2
    gate.let_on()
    status = now(manager, first)
    assert status.seconds_left is None, "how long Decode takes is not known"
    assert status.stages[0].seconds_left == pytest.approx(6)
    clock.now += 6
    gate.let_on(3)
    assert ended(manager, first).finished_stages == pytest.approx({"Denoise": 8, "Decode": 3})

    gate = Gate(4)
    second = manager.submit(run(gate), "a", plan)
    gate.entered.wait(10)
    assert now(manager, second).seconds_left == pytest.approx(11)
    clock.now += 1
    assert now(manager, second).seconds_left == pytest.approx(10)
    gate.let_on()
    assert now(manager, second).seconds_left == pytest.approx(6)
    gate.let_on(3)
    ended(manager, second)


def test_planned_stages_that_were_not_needed_are_skipped(manager: JobManager) -> None:
    plan = [PlannedStage("Denoise", 0), PlannedStage("Write", 0), PlannedStage("Denoise", 1), PlannedStage("Write", 1)]

    def work(progress: Progress) -> None:
        progress.chunks = 2
        progress.enter("Write")
        progress.chunk = 1
        progress.enter("Denoise")
        progress.enter("Surprise")
        progress.enter("Write")

    status = ended(manager, manager.submit(work, "a", plan))
    assert [(stage.name, stage.chunk, stage.state) for stage in status.stages] == [
        ("Denoise", 0, "skipped"),
        ("Write", 0, "done"),
        ("Denoise", 1, "done"),
        ("Surprise", 1, "done"),
        ("Write", 1, "done"),
    ]


def test_a_picture_is_news_even_under_the_same_name(manager: JobManager) -> None:
    def work(progress: Progress) -> None:
        progress.enter("Denoise")
        progress.enter("Chunk finished", Path("video.mp4"))
        progress.enter("Denoise again")
        progress.enter("Chunk finished", Path("video.mp4"))

    status = ended(manager, manager.submit(work, "a"))
    assert (status.picture, status.pictures) == (Path("video.mp4"), 2)
    assert [stage.name for stage in status.stages] == ["Denoise", "Denoise again"]


def test_a_stage_that_was_cut_short_teaches_nothing(manager: JobManager, clock: Clock) -> None:
    for _ in range(2):
        gate = Gate(2)
        job = manager.submit(gate, "a", [PlannedStage("Denoise")])
        gate.entered.wait(10)
        assert now(manager, job).seconds_left is None
        clock.now += 5
        manager.cancel(job)
        gate.next.release()
        assert ended(manager, job).finished_stages == {}


def test_nobody_can_fill_the_queue(manager: JobManager) -> None:
    gate = Gate(1)
    jobs = [manager.submit(gate, "running")]
    gate.entered.wait(10)
    jobs += [manager.submit(lambda progress: None, "greedy") for _ in range(MAX_PER_SESSION)]
    with pytest.raises(UserError, match="unfinished jobs"):
        manager.submit(lambda progress: None, "greedy")
    jobs += [manager.submit(lambda progress: None, str(i)) for i in range(MAX_WAITING - MAX_PER_SESSION)]
    with pytest.raises(UserError, match="waiting already"):
        manager.submit(lambda progress: None, "late")
    gate.let_on()
    ended(manager, jobs[-1])
    manager.submit(lambda progress: None, "greedy")


def test_finished_jobs_are_forgotten(manager: JobManager, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs_module, "KEPT_JOBS", 3)
    jobs = []
    for i in range(5):
        clock.now += 1
        jobs.append(manager.submit(lambda progress: None, str(i)))
        ended(manager, jobs[-1])
    last = manager.submit(lambda progress: None, "x")
    ended(manager, last)
    assert [manager.status(job) is not None for job in jobs] == [False, False, True, True, True]
    clock.now += jobs_module.KEPT_SECONDS + 1
    ended(manager, manager.submit(lambda progress: None, "y"))
    assert all(manager.status(job) is None for job in [*jobs, last])


def test_closing_cancels_what_runs_and_what_waits(clock: Clock) -> None:
    manager, gate = JobManager(clock), Gate(2)
    running, waiting = manager.submit(gate, "a"), manager.submit(lambda progress: None, "b")
    gate.entered.wait(10)
    gate.next.release(2)
    manager.close()
    states = {now(manager, job).state for job in (running, waiting)}
    assert "queued" not in states and "running" not in states
