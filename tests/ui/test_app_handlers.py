"""The app's functions and its HTTP API, without a browser and with a pipeline that invents nothing.

The stand-in sees a slanted plane in every photo and makes videos of the photo alone; paths, files, jobs, folders and
the server are real.
"""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image
from plyfile import PlyData

from lyra.config import GenerateJob, ReconstructJob
from lyra.depth.base import SKY_DEPTH, intrinsics_from_fov
from lyra.errors import UserError
from lyra.export.ply import write_splat_ply
from lyra.export.video import write_video
from lyra.generation.walkthrough import to_uint8
from lyra.hub import DEFAULT_MODEL, settings_of
from lyra.photo import fit_photo, load_photo, output_size
from lyra.pipeline import LyraPipeline, SeenPhoto
from lyra.progress import Progress
from lyra.serving.jobs import JobManager
from lyra.serving.sessions import Sessions
from lyra.serving.studio import Studio
from lyra.trajectory.files import read_trajectory
from lyra.trajectory.gui_path import write_gui_path
from lyra.types import DepthMap, GaussianScene
from lyra.ui.app import LAUNCH, build_app
from lyra.ui.handlers import Handlers, PathChoice, VideoChoice, attempt
from lyra.ui.previews import SKY_GREY, depth_picture
from lyra.ui.viewer import BLOCKED_COLOUR, PATH_COLOUR

FOV = 62.0


class StandIn:
    """Has the methods of `LyraPipeline` that the app calls."""

    plan = LyraPipeline.plan
    asked_path = LyraPipeline.asked_path
    parts = SimpleNamespace(settings=settings_of(DEFAULT_MODEL))

    def see(self, photo: Any) -> SeenPhoto:
        image = load_photo(photo)
        height, width = output_size(image)
        depth = torch.linspace(8, 2, height)[:, None].expand(height, width).clone()
        sky = torch.zeros(height, width, dtype=torch.bool)
        sky[: height // 4] = True
        depth[sky] = SKY_DEPTH
        fitted = fit_photo(image, height, width)
        return SeenPhoto(fitted, DepthMap(depth, ~sky, sky, intrinsics_from_fov(FOV, height, width)), FOV)

    def generate(self, job: GenerateJob, out: Path, progress: Progress) -> Any:
        from lyra.world import World

        world, seen = World(out), self.see(job.photo)
        progress.chunks = job.chunks
        world.write_run({"status": "running", "job": job.to_json()})
        frames = to_uint8(seen.image)[None, :, :64, :64].expand(job.frames, -1, -1, -1)
        for chunk in range(job.chunks):
            progress.chunk = chunk
            progress.enter("Denoise")
            for step in range(4):
                progress.step(step + 1, 4)
            write_video(world.video_path, frames)
            world.write_path(self.plan(seen, job).asked, {0: torch.ones(4, 4)})
            progress.enter("Chunk finished", world.video_path)
        world.write_run({"status": "finished", "job": job.to_json()})
        return world

    def reconstruct(self, world: Any, job: ReconstructJob, progress: Progress) -> None:
        progress.enter("Lift to splats")
        n = 10
        quats = torch.tensor([1.0, 0, 0, 0]).expand(n, 4)
        sh = torch.zeros(n, 1, 3)
        scene = GaussianScene(torch.rand(n, 3), quats, torch.full((n, 3), 0.1), torch.full((n,), 0.9), sh)
        write_splat_ply(world.scene_path, scene)
        world.write_run(world.run | {"reconstruct": {"poses": job.poses, "splats": n}})


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("photos") / "holiday.jpg"
    noise = np.random.default_rng(0).integers(0, 256, (300, 520, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    return path


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("worlds")


@pytest.fixture(scope="module")
def url(worlds: Path, serve_app: Callable[..., str]) -> str:
    return serve_app(build_app(lambda: StandIn(), worlds), **LAUNCH)  # type: ignore[arg-type, return-value]


@pytest.fixture(scope="module")
def client(url: str, tmp_path_factory: pytest.TempPathFactory) -> Client:
    return Client(url, verbose=False, download_files=tmp_path_factory.mktemp("downloads"))


@pytest.fixture(scope="module")
def seen(client: Client, photo: Path) -> SimpleNamespace:
    world, fov, depth, points = client.predict(handle_file(photo), api_name="/see_photo")
    return SimpleNamespace(world=world, fov=fov, depth=depth, points=points)


@pytest.fixture
def handlers(tmp_path: Path, serve_app: Callable[..., str]) -> Iterator[Handlers]:
    jobs = JobManager()
    yield Handlers(Studio(lambda: StandIn(), Sessions(tmp_path / "worlds"), jobs))  # type: ignore[arg-type, return-value]
    jobs.close()


def test_other_programs_see_six_endpoints_and_nothing_of_the_page(client: Client) -> None:
    endpoints = client.view_api(return_format="dict")
    assert sorted(endpoints["named_endpoints"]) == [
        "/export", "/generate", "/lift", "/mesh", "/plan_path", "/see_photo",
    ]  # fmt: skip
    assert endpoints["unnamed_endpoints"] == {}


def test_a_photo_is_seen(seen: SimpleNamespace) -> None:
    assert re.fullmatch(r"[0-9a-f]{32}-[0-9a-f]{16}", seen.world)
    assert seen.fov == FOV
    picture = np.asarray(Image.open(seen.depth))
    assert picture.shape == (480, 832, 3) and (picture[:100] == SKY_GREY).all()
    points = PlyData.read(seen.points)["vertex"]
    assert len(points) == 180 * 416, "every second pixel of both sides that is not sky"
    assert points["z"].max() < 10


def test_a_file_that_is_no_photo_is_refused_in_a_sentence(client: Client, tmp_path: Path) -> None:
    fake = tmp_path / "fake.jpg"
    fake.write_text("no picture")
    with pytest.raises(AppError, match=r"fake\.jpg is not a picture in a known format"):
        client.predict(handle_file(fake), api_name="/see_photo")


def test_a_path_is_planned_and_shortened_with_a_reason(client: Client, seen: SimpleNamespace) -> None:
    cameras, reason = client.predict(seen.world, "pan-left", 1.0, 2, None, api_name="/plan_path")
    assert (len(read_trajectory(cameras)), reason) == (161, "")
    _, reason = client.predict(seen.world, "push-in", 2.0, 6, None, api_name="/plan_path")
    assert "shortened" in reason


def test_a_path_file_replaces_the_preset(client: Client, seen: SimpleNamespace, photo: Path) -> None:
    cameras, _ = client.predict(seen.world, "truck-left", 1.0, 1, None, api_name="/plan_path")
    again, _ = client.predict(seen.world, "push-in", 1.0, 1, handle_file(cameras), api_name="/plan_path")
    torch.testing.assert_close(read_trajectory(again).w2c, read_trajectory(cameras).w2c)
    with pytest.raises(AppError, match="is neither JSON nor an npz file"):
        client.predict(seen.world, "push-in", 1.0, 1, handle_file(photo), api_name="/plan_path")


def test_a_camera_path_of_the_released_interface_replaces_the_preset(
    client: Client, seen: SimpleNamespace, tmp_path: Path
) -> None:
    cameras, _ = client.predict(seen.world, "truck-left", 1.0, 1, None, api_name="/plan_path")
    path = tmp_path / "path.json"
    write_gui_path(path, read_trajectory(cameras))
    again, _ = client.predict(seen.world, "push-in", 1.0, 1, handle_file(path), api_name="/plan_path")
    # The released interface moves at an even speed, so the way is the same and the times are not.
    asked, walked = read_trajectory(cameras).w2c, read_trajectory(again).w2c
    torch.testing.assert_close(walked[[0, -1]], asked[[0, -1]], atol=1e-3, rtol=0)
    torch.testing.assert_close(walked[:, 0, 3], torch.linspace(0, 1, 81) * asked[-1, 0, 3], atol=1e-3, rtol=0)
    path.write_text('{"path": [{"R": [0, 0, 0, 1], "T": [0, 0, 0]}]}')
    with pytest.raises(AppError, match=r'In keyframe 0 of path\.json "fov" is missing'):
        client.predict(seen.world, "push-in", 1.0, 1, handle_file(path), api_name="/plan_path")


def test_a_path_file_stays_when_its_upload_is_gone(handlers: Handlers, photo: Path, tmp_path: Path) -> None:
    world_id = handlers.see_photo(str(photo)).world_id
    planned = handlers.plan_path(world_id, PathChoice("pan-left"))
    upload = tmp_path / "upload.json"
    write_gui_path(upload, read_trajectory(planned.cameras))
    job = handlers.studio.job(world_id, trajectory=str(upload))
    upload.unlink()
    assert len(handlers.studio.plan(world_id, job).cameras) == 81
    assert Path(str(job.trajectory)).parent == handlers.studio.sessions.world(world_id).folder


def test_a_recipe_has_its_own_number_of_chunks(client: Client, seen: SimpleNamespace) -> None:
    cameras, _ = client.predict(seen.world, "zoom-in-zoom-out", 1.0, 1, None, api_name="/plan_path")
    path = read_trajectory(cameras)
    assert len(path) == 321
    torch.testing.assert_close(path.w2c[240], torch.eye(4))


def test_a_recipe_is_drawn_whole_and_red_where_it_is_blocked(
    tmp_path: Path, photo: Path, serve_app: Callable[..., str]
) -> None:
    class AtAWall(StandIn):
        def see(self, photo: Any) -> SeenPhoto:
            seen = super().see(photo)
            wall = replace(seen.depth, depth=torch.full_like(seen.depth.depth, 2.0))
            return replace(seen, depth=wall)

    jobs = JobManager()
    handlers = Handlers(Studio(AtAWall, Sessions(tmp_path / "worlds"), jobs))  # type: ignore[arg-type]
    view = handlers.plan_path(handlers.see_photo(str(photo)).world_id, PathChoice("zoom-in-zoom-out", strength=2.0))
    jobs.close()
    path = view.viewer["path"]
    colours = dict(zip(path["frames"], path["colours"], strict=True))
    assert colours[0] == PATH_COLOUR and colours[320] == BLOCKED_COLOUR
    assert "shortened" in str(view.reason)


def test_an_empty_prompt_is_no_prompt(handlers: Handlers, photo: Path) -> None:
    world_id = handlers.see_photo(str(photo)).world_id
    job_id = handlers.generate(world_id, PathChoice("pan-left"), VideoChoice(prompt=None))  # type: ignore[arg-type]
    assert handlers.finished(job_id).run["job"]["prompt"] == ""


def test_a_world_is_generated_and_lifted(client: Client, seen: SimpleNamespace, worlds: Path) -> None:
    settings = ("pan-right", 1.0, 2, None, "dmd", 35, 2.0, 7, "a garden", "lyra")
    made = {Path(path).name: path for path in client.predict(seen.world, *settings, api_name="/generate")}
    assert sorted(made) == ["cameras.npz", "run.json", "walkthrough.mp4"]
    run = Path(made["run.json"]).read_text()
    job = json.loads(run)["job"]
    assert (job["photo"], job["chunks"], job["seed"], job["prompt"]) == ("photo.png", 2, 7, "a garden")
    assert str(worlds) not in run
    lifted = {Path(path).name: path for path in client.predict(seen.world, "estimated", api_name="/lift")}
    assert json.loads(Path(lifted["run.json"]).read_text())["reconstruct"]["poses"] == "estimated"
    assert len(PlyData.read(lifted["scene.ply"])["vertex"]) == 10


@pytest.mark.parametrize("world", ["", "../../etc", f"{'0' * 32}-{'0' * 16}"])
def test_an_unknown_world_is_refused_in_a_sentence(client: Client, world: str) -> None:
    with pytest.raises(AppError, match="choose the photo again"):
        client.predict(world, "commanded", api_name="/lift")


def test_only_what_was_handed_out_can_be_fetched(url: str, seen: SimpleNamespace, worlds: Path) -> None:
    session, _, photo = seen.world.partition("-")
    secret = worlds / session / photo / "photo.png"
    assert secret.exists()
    assert httpx.get(f"{url}gradio_api/file={secret}").status_code == 403
    assert httpx.get(f"{url}gradio_api/file={worlds}").status_code in (403, 404)


def test_the_same_photo_finds_its_world_again_and_another_session_does_not(handlers: Handlers, photo: Path) -> None:
    first = handlers.see_photo(str(photo))
    session = first.world_id.partition("-")[0]
    assert handlers.see_photo(str(photo), session).world_id == first.world_id
    assert handlers.see_photo(str(photo), "0" * 32).world_id != first.world_id


def test_a_job_can_be_followed_and_its_numbers_are_exact(handlers: Handlers, photo: Path) -> None:
    world_id = handlers.see_photo(str(photo)).world_id
    path = PathChoice("pan-left", 1, 2)
    job_id = handlers.generate(world_id, path, VideoChoice(guidance_scale=2, sampler="full", steps=20))
    assert handlers.studio.latest_job(world_id, "video") == job_id, "so a reloaded page finds it"
    assert handlers.studio.latest_job(world_id, "world") is None
    statuses = list(handlers.follow(job_id))
    assert statuses[-1].state == "done" and statuses[-1].pictures == 2
    job = handlers.finished(job_id).run["job"]
    assert isinstance(job["guidance_scale"], float) and isinstance(job["steps"], int)
    assert list(handlers.follow("unknown")) == []


def test_splats_of_an_old_walkthrough_do_not_stay_with_a_new_one(handlers: Handlers, photo: Path) -> None:
    world_id = handlers.see_photo(str(photo)).world_id
    world = handlers.finished(handlers.generate(world_id, PathChoice("pan-left"), VideoChoice()))
    handlers.finished(handlers.lift(world_id))
    assert next(Path(path).name for path in handlers.downloads(world)) == "scene.ply"
    assert handlers.view_world(world)["scene"]["kind"] == "splats"
    handlers.finished(handlers.export(world_id, ["spz", "splat"]))
    names = {Path(path).name for path in handlers.downloads(world)}
    assert {"scene.ply", "scene.spz", "scene.splat"} <= names
    handlers.finished(handlers.generate(world_id, PathChoice("pan-right"), VideoChoice()))
    assert not world.scene_path.exists() and not world.exports.exists()


def test_mesh_and_files_need_splats_and_a_format(handlers: Handlers, photo: Path) -> None:
    world_id = handlers.see_photo(str(photo)).world_id
    handlers.finished(handlers.generate(world_id, PathChoice("pan-left"), VideoChoice()))
    for request in (lambda: handlers.mesh(world_id), lambda: handlers.export(world_id, ["spz"])):
        with pytest.raises(UserError, match="no splats yet; lift the walkthrough first"):
            request()
    handlers.finished(handlers.lift(world_id))
    with pytest.raises(UserError, match="No format is chosen"):
        handlers.export(world_id, [])
    with pytest.raises(UserError, match="--triangles is 3"):
        handlers.mesh(world_id, 3)


@pytest.mark.parametrize(
    ("path", "video", "sentence"),
    [
        (PathChoice(chunks=9), VideoChoice(), "chunks"),
        (PathChoice(strength=99.0), VideoChoice(), "strength"),
        (PathChoice("fly-away"), VideoChoice(), 'no preset "fly-away"'),
        (PathChoice(), VideoChoice(seed=None), "Seed is empty"),  # type: ignore[arg-type]
        (PathChoice(), VideoChoice(sampler="slow"), "sampler"),  # type: ignore[arg-type]
    ],
)
def test_settings_out_of_range_are_refused_before_the_queue(
    handlers: Handlers, photo: Path, path: PathChoice, video: VideoChoice, sentence: str
) -> None:
    world_id = handlers.see_photo(str(photo)).world_id
    with pytest.raises(UserError, match=sentence):
        handlers.generate(world_id, path, video)


def test_lifting_needs_a_walkthrough(handlers: Handlers, photo: Path) -> None:
    with pytest.raises(UserError, match="no walkthrough yet"):
        handlers.lift(handlers.see_photo(str(photo)).world_id)


def test_the_upload_and_its_metadata_do_not_stay(handlers: Handlers, tmp_path: Path) -> None:
    image = Image.new("RGB", (300, 200), "green")
    exif = image.getexif()
    exif[0x010E] = "taken at home"
    image.save(tmp_path / "private.jpg", exif=exif)
    handlers.see_photo(str(tmp_path / "private.jpg"))
    kept = [path for path in (tmp_path / "worlds").rglob("*") if path.is_file()]
    assert kept and not any(b"taken at home" in path.read_bytes() for path in kept)


def test_a_bug_becomes_an_apology_without_its_details(caplog: pytest.LogCaptureFixture) -> None:
    value, sentence = attempt(lambda: 1 / 0)
    assert value is None and sentence is not None and "division" not in sentence
    assert "division" in caplog.text


def test_depth_of_nothing_but_sky_has_a_picture() -> None:
    sky = torch.ones(64, 64, dtype=torch.bool)
    depth = DepthMap(torch.full((64, 64), SKY_DEPTH), ~sky, sky, intrinsics_from_fov(60, 64, 64))
    assert np.unique(np.asarray(depth_picture(SeenPhoto(torch.zeros(3, 64, 64), depth, 60.0)))).tolist() == [SKY_GREY]
