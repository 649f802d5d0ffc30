"""The GPU benchmark, rehearsed at tiny size on the CPU: every case runs, counts rightly and fails alone."""

import math
import os
import statistics
import subprocess
import sys

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu import CASES, PLAN, RESULTS, Result, append, parse, plan, read, run, watch
from tests.conftest import ROOT

ABSENT = ("av", "gradio", "tyro", "plotly", "trimesh", "plyfile", "ftfy", "bitsandbytes", "beartype")
"""Packages that a borrowed GPU machine need not have; what the benchmark needs is not among them."""


def blocking(folder, names) -> dict[str, str]:
    """An environment in which some packages cannot be imported."""
    code = f"import sys\nfor name in {names!r}:\n    sys.modules[name] = None\n"
    (folder / "sitecustomize.py").write_text(code, encoding="utf-8")
    return os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}


def benchmark(out, *arguments, env=None):
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), *arguments, "--tiny", "--device", "cpu"]
    command += ["--out", str(out), "--revision", "abc1234"]
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=180, check=False)
    return result, read(out / RESULTS)


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    """All cases in one run, without the packages that may be missing."""
    folder = tmp_path_factory.mktemp("gpu")
    arguments = (*CASES, "--steps", "2", "--minutes", "3")
    return benchmark(folder / "out", *arguments, env=blocking(folder, ABSENT))


@pytest.fixture(scope="module")
def lines(rehearsal):
    return {line["name"]: line for line in rehearsal[1]}


def numbers(value):
    """All numbers in nested values."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [number for item in value for number in numbers(item)]
    return [value] if isinstance(value, int | float) and not isinstance(value, bool) else []


def test_every_case_runs_without_an_error_and_the_table_shows_its_lines(rehearsal, lines):
    result, _ = rehearsal
    assert result.returncode == 0, result.stderr
    assert {line["case"] for line in lines.values()} == set(CASES)
    assert all(name in result.stdout for name in lines)
    assert not [line for line in lines.values() if line["error"]]


def test_lines_say_what_was_measured_with_what_and_hold_finite_numbers(lines):
    for line in lines.values():
        assert line["revision"] == "abc1234" and line["date"].endswith("+00:00") and line["shapes"]
        assert line["machine"]["torch"] == torch.__version__ and line["machine"]["diffusers"]
        assert line["memory"]["peak_host"] > 1e8 and line["memory"]["peak_allocated"] is None
        assert all(math.isfinite(number) for number in numbers(line))
        if line["seconds"] is not None:
            found = line["seconds"]
            assert 0 < found["min"] <= found["median"] <= found["max"] and found["n"] >= 1
    passes = [line for name, line in lines.items() if " pass/" in name]
    assert len(passes) == 20
    assert all(line["seconds"]["n"] == 5 and line["seconds"]["warm_ups"] == 2 for line in passes)


def test_rates_and_ratios_follow_from_the_time_the_flops_and_the_limit(lines):
    counted = [line for line in lines.values() if line["flops"]]
    assert len(counted) > 30
    for line in counted:
        assert line["tflops"] == pytest.approx(line["flops"] / line["seconds"]["median"] / 1e12)
        if line["limit"] is not None:
            assert line["ratio_to_limit"] == pytest.approx(line["seconds"]["median"] / line["limit"]["seconds"])
            fastest = max(line["limit"]["linear_tflops"], line["limit"]["attention_tflops"])
            assert line["limit"]["seconds"] >= 0.99 * line["flops"] / fastest / 1e12


def test_counted_flops_are_those_of_the_tiny_transformer(lines):
    from benchmarks.gpu_cases import random_inputs, random_transformer
    from benchmarks.gpu_measure import Bench
    from lyra.models.transformer import ChunkCache

    bench = Bench(parse(["forward", "--tiny", "--device", "cpu", "--out", "unused", "--revision", "x"])[0])
    model, cache = random_transformer(bench), ChunkCache()
    counts = []
    for inputs in random_inputs(bench, model):
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(**inputs, cache=cache)
        counts.append(counter.get_total_flops())
    assert lines["forward/first pass/eager/native"]["flops"] == counts[0]
    assert lines["forward/later pass/eager/native"]["flops"] == counts[1]


def test_fast_paths_are_compared_with_the_plain_one(lines):
    def error(name):
        return lines[name]["checks"]["relative_error"]

    for which in ("first", "later"):
        assert error(f"forward/{which} pass/compiled/_native_flash") < 1e-5
        assert error(f"forward/{which} pass/eager/_native_math") < 1e-5
        assert 1e-3 < error(f"fp8/{which} pass/eager/native") < 0.2
        assert error(f"offload/streamed, 16 GB, {which} pass/eager/_native_flash") == 0
    assert error("dmd/chunk/compiled/_native_flash") < 1e-4
    products = [name for name in lines if name.startswith("ceilings/float8")]
    assert len(products) == 8 and all(1e-3 < error(name) < 0.1 for name in products)
    assert error("ceilings/attention/_native_flash") < 1e-5


def test_the_yardsticks_would_show_an_input_that_got_lost(lines):
    checks = lines["forward/yardsticks"]["checks"]
    assert checks["without_cache"] < 1e-6
    assert min(checks[f"other_{name}"] for name in ("correspondence", "rays", "text")) > 0.02


def test_a_chunk_is_divided_into_its_stages_and_steps(lines):
    line = lines["dmd/chunk/eager/native"]
    assert list(line["stage_seconds"]) == [
        "Retrieve", "Correspond", "Denoise", "Decode", "Measure depth", "Remember"
    ]  # fmt: skip
    assert len(line["step_seconds"]) == 4
    assert sum(line["step_seconds"]) <= line["stage_seconds"]["Denoise"] * 1.001
    assert sum(line["stage_seconds"].values()) <= line["seconds"]["median"] * 1.001
    assert line["target_seconds"] is None  # It is said for the released size only.


def test_thirty_five_steps_are_extrapolated_from_some_and_said_to_be(lines):
    line = lines["full/chunk/compiled/_native_flash"]
    steps, stages = line["step_seconds"], line["stage_seconds"]
    assert len(steps) == 2 and line["note"].startswith("EXTRAPOLATED from 2 of 35 steps")
    assert stages["Denoise"] == pytest.approx(sum(steps) + 33 * statistics.median(steps[1:]))
    assert line["seconds"]["median"] == pytest.approx(sum(stages.values()))
    assert len(stages) == 6


def test_a_failing_case_does_not_stop_the_others(tmp_path):
    arguments = ("forward", "ceilings", "--minutes", "2")
    result, lines = benchmark(tmp_path / "out", *arguments, env=blocking(tmp_path, ("diffusers",)))
    assert result.returncode == 1
    assert [line["case"] for line in lines[:2]] == ["forward", "ceilings"]
    assert "diffusers" in lines[0]["error"] and not any(line["error"] for line in lines[1:])


def test_processes_that_hang_or_die_are_reported():
    assert "ended from outside" in watch([sys.executable, "-c", "import time; time.sleep(60)"], 0.3)
    assert "code 7" in watch([sys.executable, "-c", "import sys; sys.exit(7)"], 30)
    assert watch([sys.executable, "-c", ""], 30) is None


def test_a_case_that_has_no_time_left_is_not_started(tmp_path):
    result, lines = benchmark(tmp_path, "forward", "dmd", "--minutes", "0.01")
    assert result.returncode == 1
    assert [line["name"] for line in lines] == ["forward", "dmd"]
    assert all(line["error"].startswith("not started") for line in lines)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_without_a_gpu_the_line_says_how_to_rehearse(tmp_path):
    request, _ = parse(["ceilings", "--out", str(tmp_path), "--minutes", "1", "--revision", "x"])
    assert run(request) == 1
    (line,) = read(tmp_path / RESULTS)
    assert line["error"] == "torch can use no CUDA GPU here; rehearse with --device cpu"


def test_numbers_that_are_none_become_an_error(tmp_path):
    append(tmp_path, Result("a", "a", "x", "now", {}, {}, flops=math.inf, checks={"relative_error": math.nan}))
    (line,) = read(tmp_path / RESULTS)
    assert line["flops"] is None and line["checks"]["relative_error"] is None
    assert line["error"] == "not a number: flops, checks.relative_error"


def test_the_plan_fits_half_an_hour_in_three_commands_of_ten_minutes(tmp_path):
    request, _ = parse(["--plan", "--out", "OUT", "--revision", "abc1234"])
    commands = [line for line in plan(request).splitlines() if line[:1].isdigit() and "gpu.py" in line]
    assert len(commands) == 3 and sum(minutes for _, minutes in PLAN) < 28
    measured = set()
    for command in commands:
        parts = [part.split("gpu.py ")[1] for part in command.split(";")]
        requests = [parse(part.split())[0] for part in parts]
        assert sum(60 * r.minutes + 20 for r in requests) < 600
        assert all(r.device == "cuda" and r.revision == "abc1234" for r in requests)
        measured |= {case for r in requests if not r.tiny for case in r.cases}
    assert measured == set(CASES)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["nothing"], "there is no case nothing; choose from ceilings, forward"),
        (["forward"], "a folder for the results with --out"),
        (["forward", "--out", "x", "--size", "100x100"], "multiples of 8, such as 480x832"),
        (["full", "--out", "x", "--steps", "1"], "--steps must be at least 2"),
    ],
)
def test_a_wrong_command_line_is_explained(wrong, said, capsys):
    with pytest.raises(SystemExit) as ended:
        parse(wrong)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err
