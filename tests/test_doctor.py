"""The report on this machine, the speeds that it knows, and the printed limits of a chunk."""

import json
import re
from dataclasses import replace

import pytest
import recipe
import torch
from huggingface_hub import constants

from benchmarks import limits
from lyra import doctor
from lyra.doctor import (
    DATASHEET_SHARE,
    MATRIX_SHARE,
    datasheet_tflops,
    device_rates,
    duration,
    free_disk_gib,
    machine_lines,
    model_lines,
    placement_lines,
)
from lyra.licences import NVIDIA_RESEARCH
from lyra.models.cost import count_cost
from lyra.models.footprint import Rates
from lyra.placement import ON_GPU
from tests.test_placement import MACHINES

SPEED = Rates(346, 346, "35% of a datasheet")


def row(lines: list[str], options: str) -> str:
    """The one line of the table about some options."""
    (found,) = [line for line in lines if line.strip().startswith(options + "  ")]
    return found


def test_the_table_has_a_line_for_every_placement_with_memory_time_and_verdict():
    lines = placement_lines(MACHINES[80], SPEED)
    for placement in ON_GPU:
        verdict = "needs a converted model" if placement.weights == "nf4" else "fits"
        assert re.search(rf"\d+\.\d +\d+\.\d +\d+ s +\d+ (s|min) +{verdict}$", row(lines, placement.options))
    assert any("nf4) are made from a converted model" in line for line in lines)
    assert any("speed: 35% of a datasheet" in line for line in lines)
    assert not any("None fits here" in line for line in lines)


def test_the_table_says_by_how_much_something_does_not_fit():
    lines = placement_lines(MACHINES[8], SPEED)
    assert re.search(r"\d+\.\d GiB of GPU memory short", row(lines, "--weights bf16 --offload none"))
    old = placement_lines(replace(MACHINES[16], compute_capability=(7, 5)), None)
    assert row(old, "--weights fp8 --offload group").endswith("needs compute capability 8.0")
    bare = placement_lines(replace(MACHINES[80], packages=frozenset({"accelerate"})), None)
    nf4 = row(bare, "--weights nf4 --offload model")
    assert nf4.endswith("needs pip install bitsandbytes, needs a converted model")
    tiled = placement_lines(MACHINES[12], SPEED)
    assert row(tiled, "--weights fp8 --offload group --decode tiled").endswith("fits")


def test_no_time_is_made_up_for_an_unknown_device():
    unknown = replace(MACHINES[80], gpu_name="NVIDIA Something 9000")
    assert device_rates(unknown) is None
    lines = placement_lines(unknown, None)
    assert row(lines, "--weights bf16 --offload none").count("unknown") == 2
    assert any("nothing is known of the NVIDIA Something 9000" in line for line in lines)


def test_without_a_gpu_the_table_says_what_float32_takes():
    lines = "\n".join(placement_lines(MACHINES["cpu 23"], Rates(0.06, 0.06, "measured")))
    assert "17 billion weights take 68 GB in float32" in lines
    assert re.search(r"--device cpu +- +\d+\.\d +\d+ h +\d+ days +\d+\.\d GiB of host memory short", lines)
    assert "lyra-tiny runs everywhere" in lines
    assert "fits" in placement_lines(MACHINES["cpu 128"], None)[1]


def test_the_machine_is_described():
    assert "NVIDIA RTX A6000" in machine_lines(MACHINES[48])[-1] and "8.6" in machine_lines(MACHINES[48])[-1]
    assert "none that torch can use" in machine_lines(MACHINES["cpu 23"])[-1]
    assert "lyra-tiny wants 4 GiB" in "\n".join(machine_lines(replace(MACHINES["cpu 23"], host_total_gib=2.0)))


def test_the_released_model_is_reported_with_download_and_licence(tmp_path, monkeypatch):
    monkeypatch.setenv("LYRA_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.delenv("LYRA_ACCEPT_LICENCE", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(doctor, "free_disk_gib", lambda folder: 50.0)
    text = "\n".join(model_lines())
    assert "lyra-tiny" in text and "ready" in text
    assert f"40 GiB more than {tmp_path / 'hub'} has free" in text
    assert f"{NVIDIA_RESEARCH.name}: not accepted yet" in text and NVIDIA_RESEARCH.url in text
    monkeypatch.setattr(doctor, "free_disk_gib", lambda folder: 500.0)
    monkeypatch.setenv("LYRA_ACCEPT_LICENCE", NVIDIA_RESEARCH.id)
    text = "\n".join(model_lines())
    assert "not downloaded; the first run fetches" in text
    assert f"{NVIDIA_RESEARCH.name}: accepted on 20" in text
    monkeypatch.setattr(doctor, "downloaded", lambda name: tmp_path / "weights")
    assert f"downloaded to {tmp_path / 'weights'}" in "\n".join(model_lines())


def test_free_disk_is_that_of_the_nearest_folder_that_exists(tmp_path):
    assert free_disk_gib(tmp_path / "not" / "there") == pytest.approx(free_disk_gib(tmp_path), rel=0.01)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "unknown"), (11.4, "11 s"), (119, "119 s"), (441, "7 min"), (7300, "2 h"), (1_700_000, "20 days")],
)
def test_durations_have_a_unit_that_suits_them(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A10G", 70),
        ("NVIDIA A10", 125),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA GeForce RTX 4080 SUPER", 97),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("Tesla T4", None),
    ],
)
def test_datasheets_are_found_by_the_devices_name(name, tflops):
    assert datasheet_tflops(name) == tflops


def test_measured_speeds_come_before_datasheets(tmp_path):
    path, gpu = tmp_path / "rates.json", MACHINES[80]
    sheet = device_rates(gpu, path)
    assert sheet.linear_tflops == pytest.approx(DATASHEET_SHARE * 989) and "not measured" in sheet.source
    limits.keep_rates("another", Rates(1, 2, "measured"), path)
    assert device_rates(gpu, path) == sheet
    limits.keep_rates(gpu.gpu_name, Rates(700, 600, "measured"), path)
    measured = device_rates(gpu, path)
    assert measured.linear_tflops == MATRIX_SHARE * 700 and measured.attention_tflops == MATRIX_SHARE * 600
    assert "measured on such a GPU" in measured.source
    assert set(json.loads(path.read_text())) == {"another", gpu.gpu_name}


def test_the_processor_is_measured_on_the_spot():
    rates = device_rates(MACHINES["cpu 23"])
    assert 1e-4 < rates.linear_tflops < 100 and "measured on this processor now" in rates.source


def test_limits_of_a_chunk_are_the_published_ones(capsys):
    assert limits.main(["--height", "480", "--width", "832"]) == 0
    text = capsys.readouterr().out
    assert "38,246" in text and "17,029,871,424" in text
    published = {
        "35 steps with guidance": (152.9, 193.5, 154.6, 150.9, 96.8, 77.3),
        "4 steps": (8.74, 11.1, 8.8, 8.6, 5.5, 4.4),
    }
    for name, expected in published.items():
        (line,) = [line for line in text.splitlines() if line.strip().startswith(name)]
        figures = [float(word) for word in line.replace(name, "").split()]
        assert figures == pytest.approx(expected, rel=0.015)


def test_limits_take_other_sizes_and_refuse_what_cannot_be(capsys):
    assert limits.main(["--height", "720", "--width", "1280", "--rates", "790"]) == 0
    assert "88,360" in capsys.readouterr().out
    for arguments, word in ((["--height", "481"], "multiples of 8"), (["--rates", "fast"], "write TFLOP/s")):
        assert limits.main(arguments) == 2
        assert word in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert limits.main(["--measure"]) == 2
        assert "needs a CUDA GPU" in capsys.readouterr().err


def test_speeds_are_measured_on_the_models_shapes():
    rates = limits.measure_rates(count_cost(recipe.TINY, 64, 96), torch.device("cpu"), torch.float32)
    assert 1e-5 < rates.linear_tflops < 100 and 1e-5 < rates.attention_tflops < 100
