"""What of the released-size model is measured on a GPU, in which order and within which time?

Run with `python benchmarks/gpu.py CASE... --out DIR`; `--tiny --device cpu` rehearses the same code with tiny networks
on any machine. Weights are random, because times do not depend on them. Every case is a process of its own with a
budget of time, so that one that fails, hangs or is killed costs only itself; results are appended to DIR/gpu.jsonl as
they come. This file starts and watches the cases and imports no torch; `benchmarks/gpu_cases.py` measures.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = "gpu.jsonl"
START = "import sys; from benchmarks.gpu_cases import main; sys.exit(main())"
"""What the process of a case runs."""
SHORTEST_SECONDS = 10.0
"""A case is not started with less time than this."""
GRACE_SECONDS = 20.0
"""A case looks at the clock between measurements; so long after its budget it is ended from outside."""
CASE_FAILED, NO_GPU = 3, 4
"""Exit codes of a case that wrote its error itself, and of one that torch gives no GPU."""


@dataclass(frozen=True)
class Case:
    """One group of measurements."""

    minutes: float
    """Its budget at the released size."""
    summary: str


CASES: Mapping[str, Case] = {
    "ceilings": Case(1.5, "matrix products in bf16 and float8, attention kernels and copies, at the model's shapes"),
    "forward": Case(6.0, "passes of the transformer, eager and compiled, with each attention kernel"),
    "fp8": Case(3.0, "the same with weights stored in float8"),
    "dmd": Case(4.0, "a whole chunk of four distilled steps with all networks, by stage"),
    "full": Case(3.5, "some of the 35 steps with guidance, extrapolated to all"),
    "offload": Case(5.5, "blocks streamed from host memory, with the GPU's memory capped at 24 and 16 GB"),
}

PLAN: Sequence[tuple[str, float]] = (
    ("dmd offload forward --tiny --out OUT/tiny", 2.5),
    ("ceilings dmd --out OUT", 6.0),
    ("forward fp8 --out OUT", 9.0),
    ("full offload --out OUT", 9.0),
)
"""Arguments and minutes of what fits into half an hour of a GPU in commands of ten minutes: the first two, which find
out what does not work and measure the headline figure, make up the first command."""


@dataclass(frozen=True)
class Request:
    """What the command line asks for."""

    cases: tuple[str, ...]
    out: Path
    height: int
    width: int
    tiny: bool
    device: str
    minutes: float
    """For all cases together."""
    steps: int
    """Measured steps of `full`."""
    revision: str

    def arguments(self, case: str, minutes: float) -> list[str]:
        """Command-line arguments that ask for one case."""
        values = [case, "--out", str(self.out), "--size", f"{self.height}x{self.width}", "--device", self.device]
        values += ["--minutes", str(minutes), "--steps", str(self.steps), "--revision", self.revision]
        return [*values, "--tiny"] if self.tiny else values


@dataclass(frozen=True)
class Timing:
    """Repeated measurements of one thing."""

    median: float
    min: float
    max: float
    n: int
    warm_ups: int


@dataclass(frozen=True)
class Memory:
    """Most memory at once, in bytes; what the GPU held is unknown on the CPU."""

    peak_allocated: int | None
    peak_reserved: int | None
    peak_host: int
    """Of the process since it started."""


@dataclass(frozen=True)
class Limit:
    """Least time of the counted work at speeds measured in the same process."""

    linear_tflops: float
    attention_tflops: float
    seconds: float


@dataclass(frozen=True)
class Result:
    """One line of the results; what a measurement does not have is None."""

    name: str
    """CASE/what/how."""
    case: str
    revision: str
    date: str
    machine: Mapping[str, Any]
    """GPU, driver and versions."""
    shapes: Mapping[str, Any]
    backend: str | None = None
    """Attention kernel, by diffusers' name."""
    seconds: Timing | None = None
    memory: Memory | None = None
    flops: float | None = None
    bytes: float | None = None
    tflops: float | None = None
    """Counted work in the median time."""
    gigabytes_per_second: float | None = None
    limit: Limit | None = None
    ratio_to_limit: float | None = None
    target_seconds: float | None = None
    """What the chunk should take on an H200."""
    compile_seconds: float | None = None
    stage_seconds: Mapping[str, float] | None = None
    step_seconds: Sequence[float] | None = None
    checks: Mapping[str, float] = field(default_factory=dict)
    """Relative errors ‖a - b‖ / ‖b‖ against the plain path with the same inputs, and the like."""
    note: str | None = None
    error: str | None = None


def append(out: Path, result: Result) -> None:
    """Add a line to the results and see it safely on disk; numbers that are none become an error."""
    missing: list[str] = []
    values = finite(asdict(result), "", missing)
    if missing:
        values["error"] = f"not a number: {', '.join(missing)}; {values['error'] or ''}".strip("; ")
    out.mkdir(parents=True, exist_ok=True)
    with (out / RESULTS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(values, allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def finite(value: Any, name: str, missing: list[str]) -> Any:
    """The same nested values with None for infinity and NaN, whose names are put on a list."""
    if isinstance(value, Mapping):
        return {key: finite(item, f"{name}.{key}".lstrip("."), missing) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item, name, missing) for item in value]
    if isinstance(value, float) and not abs(value) < float("inf"):
        missing.append(name)
        return None
    return value


def now() -> str:
    """Date and time in UTC."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def revision() -> str:
    """Abbreviated commit of this checkout, with a plus sign where files differ from it; `unknown` without git."""
    try:
        commit = git("rev-parse", "--short=12", "HEAD")
        return commit + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def git(*arguments: str) -> str:
    """Output of a git command in this checkout."""
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.check_output(command, text=True, stderr=subprocess.DEVNULL).strip()


def parse(arguments: Sequence[str] | None = None) -> tuple[Request, bool]:
    """The command line, and whether only the plan is asked for; ends the program with a message where it is wrong."""
    cases = "\n".join(f"  {name:<10}{case.summary} ({case.minutes:g} min)" for name, case in CASES.items())
    parser = argparse.ArgumentParser(
        description=f"{__doc__}\ncases:\n{cases}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="*", metavar="CASE", help="what to measure")
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.add_argument("--size", help="HEIGHTxWIDTH in pixels; 480x832, or 32x48 with --tiny")
    parser.add_argument("--tiny", action="store_true", help="tiny networks, to rehearse")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--minutes", type=float, default=9.0, help="for all cases together")
    parser.add_argument("--steps", type=int, default=6, help="steps of `full` that are measured, at least 2")
    parser.add_argument("--revision", help="commit, where there is no git to ask")
    parser.add_argument("--plan", action="store_true", help="print the commands for half an hour of a GPU and end")
    found = parser.parse_args(arguments)
    unknown = [name for name in found.cases if name not in CASES]
    if unknown:
        parser.error(f"there is no case {', '.join(unknown)}; choose from {', '.join(CASES)}")
    if not found.plan and not (found.cases and found.out):
        parser.error("name one or more cases, and a folder for the results with --out")
    height, width = frame_size(found.size or ("32x48" if found.tiny else "480x832"), parser)
    if found.steps < 2 or found.minutes <= 0:
        parser.error("--steps must be at least 2, because the first step is slower, and --minutes more than 0")
    request = Request(
        cases=tuple(dict.fromkeys(found.cases)),
        out=found.out or Path("OUT"),
        height=height,
        width=width,
        tiny=found.tiny,
        device=found.device,
        minutes=found.minutes,
        steps=min(found.steps, 35),
        revision=found.revision or revision(),
    )
    return request, found.plan


def frame_size(text: str, parser: argparse.ArgumentParser) -> tuple[int, int]:
    """Height and width in pixels; ends the program with a message where they are wrong."""
    sides = text.lower().split("x")
    if len(sides) != 2 or not all(side.isdigit() and int(side) and int(side) % 8 == 0 for side in sides):
        parser.error(f"--size is '{text}'; write HEIGHTxWIDTH with multiples of 8, such as 480x832")
    return int(sides[0]), int(sides[1])


def plan(request: Request) -> str:
    """The commands for half an hour of a GPU, with this checkout's commit."""
    out = shlex.quote(str(request.out))
    lines = [
        f"python3 benchmarks/gpu.py {arguments.replace('OUT', out)} --minutes {minutes:g} --revision {request.revision}"
        for arguments, minutes in PLAN
    ]
    commands = [f"{lines[0]}; {lines[1]}", *lines[2:]]
    total = sum(minutes for _, minutes in PLAN)
    head = f"{len(commands)} commands, each under ten minutes, {total:g} minutes at most; OUT is a folder that is kept."
    return "\n".join([head, *(f"{number}. {command}" for number, command in enumerate(commands, 1))])


def watch(command: Sequence[str], seconds: float) -> str | None:
    """Run a process to its end or for so long; says what was wrong, unless the process said it itself."""
    # Nothing is looked up on the network, and the modules of this checkout are found.
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    environment |= {"HF_HUB_OFFLINE": "1", "DIFFUSERS_VERBOSITY": "error", "TRANSFORMERS_VERBOSITY": "error"}
    with subprocess.Popen(command, env=environment) as process:
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            return f"ended from outside after {seconds:.0f} s"
        except BaseException:
            process.kill()
            raise
    if code == NO_GPU:
        return "torch can use no CUDA GPU here; rehearse with --device cpu"
    return None if code in (0, CASE_FAILED) else f"the process ended with code {code}; its output says why"


def run(request: Request) -> int:
    """Measure one case after the other; returns the number of lines that are errors."""
    ends = time.monotonic() + 60 * request.minutes
    path = request.out / RESULTS
    known = len(read(path))
    for name in request.cases:
        seconds = min(60 * CASES[name].minutes, ends - time.monotonic())
        problem: str | None = f"not started: {max(seconds, 0):.0f} s were left of {request.minutes:g} minutes"
        if seconds >= SHORTEST_SECONDS:
            arguments = request.arguments(name, seconds / 60)
            problem = watch([sys.executable, "-c", START, *arguments], seconds + GRACE_SECONDS)
        if problem is not None:
            machine = {"host": platform.machine(), "python": platform.python_version()}
            append(request.out, Result(name, name, request.revision, now(), machine, {}, error=problem))
    lines = read(path)[known:]
    print(table(lines))
    return sum(line["error"] is not None for line in lines)


def read(path: Path) -> list[dict[str, Any]]:
    """Lines of a file of results; none where there is no file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def table(lines: Sequence[Mapping[str, Any]]) -> str:
    """Results as text."""
    rows = [f"{'':<42}{'seconds':>11}{'TFLOP/s':>9}{'/limit':>8}{'GB':>7}{'error':>9}"]
    for line in lines:
        reserved = (line["memory"] or {}).get("peak_reserved")
        cells = [
            cell((line["seconds"] or {}).get("median"), 11, ".4g"),
            cell(line["tflops"], 9, ".4g"),
            cell(line["ratio_to_limit"], 8, ".2f"),
            cell(reserved and reserved / 1e9, 7, ".1f"),
            cell(line["checks"].get("relative_error"), 9, ".1e"),
        ]
        rows.append(f"{line['name']:<42}{''.join(cells)}  {line['error'] or ''}".rstrip())
    return "\n".join(rows)


def cell(value: float | None, width: int, form: str) -> str:
    """A number at the right of a column, or nothing."""
    return ("" if value is None else format(value, form)).rjust(width)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; returns 0 when nothing failed."""
    request, only_plan = parse(arguments)
    if only_plan:
        print(plan(request))
        return 0
    return 1 if run(request) else 0


if __name__ == "__main__":
    sys.exit(main())
