"""The whole app in a real browser, with the real process and the default model, as a visitor walks through it.

One process and one page serve all tests, which go through the tabs in order: each begins where the one before it ended.
A walkthrough is generated once, and begun and cancelled once.
"""

import io
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import trimesh
from playwright.sync_api import Page, expect
from plyfile import PlyData

from tests.ui.visit import Visit, served_process

pytestmark = [pytest.mark.browser, pytest.mark.timeout(900), pytest.mark.usefixtures("patience")]

GENERATING = 800_000
"""Milliseconds in which a walkthrough of one chunk is finished, also on a busy machine; 60 s is usual."""


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with served_process(tmp_path_factory.mktemp("app")) as address:
        yield address


@pytest.fixture(scope="module")
def visit(url: str, browser_page: Callable[..., Page]) -> Visit:
    return Visit(browser_page(viewport={"width": 1280, "height": 1000}), url)


def test_the_page_begins_with_the_photo_and_the_rest_locked(visit: Visit) -> None:
    expect(visit.tab("1 Photo")).to_be_enabled()
    for name in ("2 Camera", "3 Video", "4 World"):
        expect(visit.tab(name)).to_be_disabled()
    expect(visit.page.locator("#lyra-examples img")).to_have_count(9)
    expect(visit.page.locator("#lyra-licence")).to_be_hidden()


def test_what_is_no_photo_is_refused_beside_the_upload(visit: Visit, tmp_path: Path) -> None:
    (tmp_path / "letter.jpg").write_text("Dear reader, this is no picture.")
    visit.upload(tmp_path / "letter.jpg")
    alert = visit.page.locator("#lyra-photo-note [role=alert]")
    expect(alert).to_have_text(re.compile(r"letter\.jpg is not a picture in a known format; .+\."))
    expect(visit.page.locator(".toast-body")).to_have_count(0)
    expect(visit.tab("2 Camera")).to_be_disabled()


def test_an_example_shows_its_depth_its_field_of_view_and_its_points(visit: Visit) -> None:
    visit.choose_example(2)
    expect(visit.page.locator("#lyra-photo-note")).to_have_text(re.compile(r"Field of view \d\d°.*Photo: .*source"))
    expect(visit.page.locator("#lyra-depth img")).to_be_visible()
    shown = visit.viewer("points")
    assert shown["points"] > 1000 and shown["distinctColours"] > 100


def test_a_camera_move_is_drawn_before_anything_is_generated(visit: Visit) -> None:
    visit.button("Continue to the camera").click()
    expect(visit.tab("3 Video")).to_be_enabled()
    visit.page.get_by_role("radio", name="Push in").check()
    expect(visit.page.locator("#lyra-path")).to_contain_text("5 s (80 frames)")
    play = visit.page.locator(".lyra-viewer").get_by_role("button", name="Play path")
    expect(play).to_be_enabled()
    with_path = visit.view_of_the_world()
    show = visit.page.locator(".lyra-viewer").get_by_role("button", name="Show path")
    show.click()
    without = visit.view_of_the_world()
    show.click()
    assert (np.abs(with_path - without).max(-1) > 30).sum() > 50


def test_a_path_through_the_scene_is_shortened_with_the_reason(visit: Visit) -> None:
    strength, chunks = (visit.page.locator(f"#lyra-{name} input[type=number]") for name in ("strength", "chunks"))
    for field, value in ((strength, "2"), (chunks, "6")):
        field.fill(value)
        field.press("Enter")
    expect(visit.page.locator("#lyra-path-note")).to_contain_text("shortened to")
    expect(visit.page.locator("#lyra-path")).to_contain_text("30 s (480 frames)")
    for field in (strength, chunks):
        field.fill("1")
        field.press("Enter")
    expect(visit.page.locator("#lyra-path")).to_contain_text("5 s (80 frames)")


def test_cancelling_stops_the_walkthrough(visit: Visit) -> None:
    visit.button("Continue to the video").click()
    expect(visit.page.locator("#lyra-sampler")).to_contain_text("How the 4-step weights")
    visit.button("Generate").click()
    summary = visit.page.locator("#lyra-video-progress .lyra-summary")
    expect(summary).to_have_text(re.compile("Photo depth|Remember|Retrieve|Correspond|Denoise"))
    visit.button("Cancel").click()
    expect(summary).to_have_text("Cancelled.")
    expect(visit.button("Generate")).to_be_enabled()
    expect(visit.tab("4 World")).to_be_disabled()


def test_a_walkthrough_goes_on_through_a_reload_and_is_shown(visit: Visit) -> None:
    visit.button("Generate").click()
    summary = visit.page.locator("#lyra-video-progress .lyra-summary")
    expect(visit.page.locator("#lyra-video-progress progress").first).to_be_visible()
    visit.page.reload()
    expect(visit.page.locator("#lyra-video-progress progress").first).to_be_visible()
    expect(summary).to_have_text(re.compile("Finished in"), timeout=GENERATING)
    video = visit.page.locator("#lyra-video video")
    expect(video).to_be_visible()
    visit.page.wait_for_function("() => document.querySelector('#lyra-video video').videoWidth === 832", polling=500)
    assert video.evaluate("video => video.duration") == pytest.approx(81 / 16, abs=0.2)


def test_the_walkthrough_is_lifted_to_splats(visit: Visit) -> None:
    visit.button("Continue to the world").click()
    visit.button("Lift to splats").click()
    shown = visit.viewer("splats")
    assert shown["splats"] > 1000
    visit.page.wait_for_function(
        "() => document.querySelector('.lyra-viewer').lyraViewer.probe().distinctColours > 100", polling=1000
    )


def test_the_splats_become_a_mesh_with_a_collider(visit: Visit) -> None:
    expect(visit.page.locator("#lyra-world-fact")).to_contain_text("splats")
    expect(visit.page.locator("#lyra-shape")).to_be_hidden()
    visit.button("Make the mesh").click()
    assert visit.viewer("mesh")["triangles"] > 1000
    expect(visit.page.locator("#lyra-world-fact")).to_contain_text("triangles, collider")
    visit.page.locator("#lyra-shape").get_by_role("radio", name="Collider").check()
    visit.page.wait_for_function(
        "() => document.querySelector('.lyra-viewer').lyraViewer.probe().triangles < 25000", polling=1000
    )
    visit.page.locator("#lyra-shape").get_by_role("radio", name="Splats").check()
    assert visit.viewer("splats")["splats"] > 1000


def test_the_chosen_formats_are_written(visit: Visit) -> None:
    formats = visit.page.locator("#lyra-formats")
    formats.get_by_role("checkbox", name="nerfstudio:").check()
    visit.button("Write the files").click()
    expect(visit.page.locator("#lyra-downloads a")).to_have_count(9)


def test_the_worlds_files_can_be_downloaded(visit: Visit) -> None:
    links = visit.page.locator("#lyra-downloads a")
    files = {Path(link).name: link for link in (link.get_attribute("href") or "" for link in links.all())}
    assert set(files) == {
        "cameras.npz", "run.json", "scene.ply", "scene.spz", "walkthrough.mp4", "mesh.glb", "collider.obj",
        "scene.usdc", "nerfstudio.zip",
    }  # fmt: skip
    bodies = {name: visit.page.request.get(link).body() for name, link in files.items()}
    assert len(PlyData.read(io.BytesIO(bodies["scene.ply"]))["vertex"]) > 1000
    assert len(np.load(io.BytesIO(bodies["cameras.npz"]))["w2c"]) == 81
    assert trimesh.load(io.BytesIO(bodies["mesh.glb"]), "glb").area > 0
    assert trimesh.load(io.BytesIO(bodies["collider.obj"]), "obj").area > 0
    assert bodies["scene.usdc"][:8] == b"PXR-USDC"
    assert bodies["walkthrough.mp4"][4:8] == b"ftyp"
    assert b'"status": "finished"' in bodies["run.json"]


def test_everything_is_there_again_when_the_page_is_opened_later(visit: Visit) -> None:
    visit.page.reload()
    for name in ("2 Camera", "3 Video", "4 World"):
        expect(visit.tab(name)).to_be_enabled()
    visit.tab("4 World").click()
    assert visit.viewer("splats")["splats"] > 1000


def test_all_four_tabs_fit_a_phone(url: str, browser_page: Callable[..., Page]) -> None:
    phone = Visit(browser_page(viewport={"width": 390, "height": 844}, is_mobile=True, has_touch=True), url)
    for name in ("1 Photo", "2 Camera", "3 Video", "4 World"):
        expect(phone.tab(name)).to_be_visible()
    assert phone.page.evaluate("document.documentElement.scrollWidth") <= 390
    phone.page.context.close()


def test_nothing_came_from_elsewhere_and_nothing_threw(visit: Visit) -> None:
    assert visit.hosts <= {"127.0.0.1", None}
    assert visit.errors == []
