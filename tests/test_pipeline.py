"""The pipeline with the shipped model: cancelling, going on, what the photo shows, and the path's check."""

import shutil

import pytest
import torch

from lyra import GenerateJob, LyraPipeline, World
from lyra.generation.walkthrough import from_uint8
from lyra.geometry.resample import draw_surface, enlarge_depth, make_surface
from lyra.metrics.image import kept_detail
from lyra.progress import Cancelled, Progress, Status
from tests.conftest import DEFAULT_PHOTO


@pytest.fixture(scope="module")
def pipeline() -> LyraPipeline:
    return LyraPipeline.from_pretrained("lyra-tiny")


def test_a_longer_job_reuses_the_chunk_and_a_cancel_stops_within_one_step_and_keeps_it(pipeline, world, tmp_path):
    folder = tmp_path / "longer"
    shutil.copytree(world.folder, folder)
    video = (folder / "walkthrough.mp4").read_bytes()
    seen: list[Status] = []

    def stop_in_the_second_chunk() -> bool:
        return bool(seen) and seen[-1].stage == "Denoise" and seen[-1].step >= 1

    progress = Progress(listener=seen.append, should_stop=stop_in_the_second_chunk)
    with pytest.raises(Cancelled):
        pipeline.generate(GenerateJob(photo=str(DEFAULT_PHOTO), chunks=2), folder, progress)
    assert {s.chunk for s in seen if s.stage == "Denoise"} == {1}
    assert max(s.step for s in seen if s.stage == "Denoise") == 1
    assert (folder / "walkthrough.mp4").read_bytes() == video
    assert len(World.open(folder).cameras) == 81


def test_what_the_photo_shows_keeps_its_detail(world):
    depth, cameras = world.depth[0], world.cameras
    photo, last = from_uint8(world.video[0]), from_uint8(world.video[-1])
    size = (photo.shape[-2], photo.shape[-1])
    surface = make_surface(enlarge_depth(depth, size), cameras.w2c[0], cameras.intrinsics[0])
    shown = draw_surface(surface, cameras.w2c[-1], cameras.intrinsics[-1], *size).depth.isfinite()
    inner = torch.nn.functional.max_pool2d((~shown)[None].float(), 17, stride=1, padding=8)[0] < 0.5
    assert inner.float().mean() > 0.3
    assert kept_detail(photo, last, depth, cameras) >= 0.8


def test_a_strong_push_in_is_shortened_with_a_reason(pipeline):
    seen = pipeline.see(DEFAULT_PHOTO)
    gentle = pipeline.plan(seen, GenerateJob(photo="", strength=0.3))
    strong = pipeline.plan(seen, GenerateJob(photo="", strength=3.0, chunks=3))
    assert gentle.report.reason is None
    assert torch.equal(gentle.cameras.w2c, gentle.asked.w2c)
    assert "shortened" in strong.report.reason
    reach = [c.centres[-1].norm() for c in (strong.cameras, strong.asked)]
    assert reach[0] < reach[1]


@pytest.mark.parametrize("name", ["living-room.jpg", "great-wall.jpg"])
def test_every_shape_of_photo_is_seen(pipeline, photos, name):
    photo = next(p for p in photos if p.name == name)
    seen = pipeline.see(photo)
    height, width = seen.image.shape[-2:]
    assert (height > width) == (name == "living-room.jpg")
    assert seen.depth.depth.shape == (height, width)
    assert 20 <= seen.fov_x_deg <= 120
    assert seen.depth.valid.float().mean() > 0.3
