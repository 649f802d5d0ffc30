"""The stages that a job is said to have, against those that the pipeline really enters."""

from dataclasses import replace
from pathlib import Path

import pytest

from lyra import photo
from lyra.config import RELEASED_SETTINGS, GenerateJob
from lyra.licences import NVIDIA_RESEARCH, accept
from lyra.pipeline import LyraPipeline
from lyra.progress import Progress, Status
from lyra.serving.studio import planned_stages
from tests.conftest import DEFAULT_PHOTO


@pytest.fixture
def pipeline(released_repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LyraPipeline:
    """The small released model with videos of 64x112, so that a chunk takes a second."""
    monkeypatch.setenv("LYRA_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.delenv("LYRA_NO_GATED_MODELS", raising=False)
    monkeypatch.setattr(photo, "LANDSCAPE", {"480x832": (64, 112), "448x768": (64, 96)})
    accept(NVIDIA_RESEARCH, "a test")
    return LyraPipeline.from_pretrained(str(released_repository))


@pytest.mark.parametrize(("preset", "walks"), [("pan-left", [2]), ("zoom-in-zoom-out", [3, 1])])
def test_a_walkthrough_enters_the_planned_stages_in_the_planned_order(
    pipeline: LyraPipeline, tmp_path: Path, preset: str, walks: list[int]
) -> None:
    entered: list[tuple[str, int]] = []

    def listen(status: Status) -> None:
        if status.picture is None and status.step == 0 and (status.stage, status.chunk) not in entered[-1:]:
            entered.append((status.stage, status.chunk))

    job = GenerateJob(photo=str(DEFAULT_PHOTO), preset=preset, chunks=2)
    pipeline.generate(job, tmp_path / "world", Progress(listener=listen))
    planned = planned_stages(job, pipeline.parts.settings, walks)
    assert entered == [(stage.name, stage.chunk) for stage in planned]


def test_a_captioned_job_writes_a_caption_before_each_chunk() -> None:
    job = GenerateJob(photo="photo.jpg", chunks=2, captioner="Qwen/Qwen3-VL-4B-Instruct")
    names = [stage.name for stage in planned_stages(job, RELEASED_SETTINGS, [2])]
    assert [names[index + 1] for index, name in enumerate(names) if name == "Caption"] == ["Retrieve", "Retrieve"]
    plain = [stage.name for stage in planned_stages(replace(job, captioner=None), RELEASED_SETTINGS, [2])]
    assert plain == [name for name in names if name != "Caption"]


def test_the_cost_of_denoising_is_that_of_its_sampler() -> None:
    costs = {
        stage.cost
        for job in (GenerateJob(photo="a"), GenerateJob(photo="a", sampler="full"))
        for stage in planned_stages(job, RELEASED_SETTINGS, [1])
        if stage.name == "Denoise"
    }
    assert costs == {"Denoise dmd", "Denoise full 35"}
