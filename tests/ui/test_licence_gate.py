"""The licence panel: what it says, what it holds back, and what the box in it does."""

import json
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import pytest
import torch
from playwright.sync_api import Locator, Page, expect

from lyra.errors import UserError
from lyra.hub import DEFAULT_MODEL, licences_of
from lyra.licences import NVIDIA_RESEARCH, RELEASED_PARTS, accept, accepted
from lyra.pipeline import LyraPipeline
from lyra.serving.jobs import JobManager
from lyra.serving.sessions import Sessions
from lyra.serving.studio import Studio
from lyra.trajectory.gui_path import write_gui_path
from lyra.trajectory.presets import preset_cameras
from lyra.ui.handlers import Handlers
from lyra.ui.licence_gate import ACCEPT_FIRST, OPERATOR_FIRST, SWITCHED_OFF, LicenceGate, build_licence_gate, panel_text
from lyra.ui.wiring import Page as Page_of_the_app
from tests.conftest import DEFAULT_PHOTO
from tests.ui.visit import Visit, served_process

NAME = "nvidia/Lyra-2.0"


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A config folder in which nothing is accepted."""
    monkeypatch.setenv("LYRA_CONFIG_DIR", str(tmp_path / "config"))
    for name in ("LYRA_ACCEPT_LICENCE", "LYRA_NO_GATED_MODELS"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "config"


def gate_of(model: str, *, visitors_accept: bool = True) -> LicenceGate:
    with gr.Blocks():
        return build_licence_gate(model, licences_of(model), visitors_accept=visitors_accept)


@pytest.fixture
def handlers(tmp_path: Path, released_repository: Path, serve_app: Callable[..., str]) -> Iterator[Handlers]:
    """Of a studio that loads the small released model, as soon as it may; `serve_app` sets the folder for copies."""
    jobs, model = JobManager(), str(released_repository)
    yield Handlers(Studio(lambda: LyraPipeline.from_pretrained(model), Sessions(tmp_path / "worlds"), jobs, model))
    jobs.close()


def test_each_part_is_in_the_row_of_its_licence(config: Path) -> None:
    rows = re.findall(r"<tr>(?!<th scope=.col)(.*?)</tr>", panel_text(NAME, RELEASED_PARTS))
    parts = {name: row for row in rows for name in re.sub("<[^>]+>", "|", row).split("|")[1].lower().split(", ")}
    assert set(parts) == {part.replace("_", " ") for part in RELEASED_PARTS}
    for part, licence in RELEASED_PARTS.items():
        row = parts[part.replace("_", " ")]
        assert licence.name in row and f'href="{licence.url}"' in row
        assert ("to be accepted" in row) == licence.gated


def test_the_panel_says_what_the_gated_licence_forbids(config: Path) -> None:
    text = panel_text(NAME, RELEASED_PARTS)
    assert f"forbids {NVIDIA_RESEARCH.forbids}." in text
    assert text.count("forbids") == 1, "the other licences ask nothing of who only uses the model"


def test_a_models_name_cannot_be_markup(config: Path) -> None:
    assert "<img" not in panel_text("<img src=x onerror=alert(1)>", RELEASED_PARTS)


def test_the_shipped_model_has_nothing_to_accept(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LYRA_NO_GATED_MODELS", "1")
    gate = gate_of(DEFAULT_MODEL)
    assert gate.licences == () and gate.reason is None


def test_the_gate_opens_with_the_acceptance_and_only_then(
    config: Path, monkeypatch: pytest.MonkeyPatch, released_repository: Path
) -> None:
    gate = gate_of(str(released_repository))
    assert gate.licences == (NVIDIA_RESEARCH,) and gate.agree.interactive
    assert gate.reason == ACCEPT_FIRST
    accept(NVIDIA_RESEARCH, "a test")
    assert gate.reason is None
    monkeypatch.setenv("LYRA_NO_GATED_MODELS", "1")
    assert gate.reason == SWITCHED_OFF
    assert not gate_of(str(released_repository)).agree.interactive


def test_where_strangers_visit_only_the_operator_can_accept(
    config: Path, handlers: Handlers, released_repository: Path
) -> None:
    gate = gate_of(str(released_repository), visitors_accept=False)
    assert gate.reason == OPERATOR_FIRST and not gate.agree.interactive
    # Whoever speaks to the server without the page can send a tick all the same.
    page = SimpleNamespace(licence=gate, handlers=handlers)
    updates = Page_of_the_app.accept_licence(page, True)  # type: ignore[arg-type]
    assert updates[gate.agree] is False and OPERATOR_FIRST in str(updates[gate.note])
    assert accepted(NVIDIA_RESEARCH) is None
    accept(NVIDIA_RESEARCH, "command line")
    assert gate.reason is None


def test_nothing_is_loaded_before_the_acceptance_and_the_model_after_it(config: Path, handlers: Handlers) -> None:
    with pytest.raises(UserError, match="needs your acceptance"):
        handlers.see_photo(str(DEFAULT_PHOTO))
    handlers.accept_licences([NVIDIA_RESEARCH])
    assert handlers.studio.pipeline.parts.settings.name == NAME
    assert handlers.see_photo(str(DEFAULT_PHOTO)).world_id
    remembered = json.loads((config / "licences.json").read_text())["accepted"]
    assert [(entry["licence"], entry["how"]) for entry in remembered] == [("nvidia-research", "app")]


def test_where_gated_models_are_switched_off_nothing_is_accepted(
    config: Path, handlers: Handlers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LYRA_NO_GATED_MODELS", "1")
    with pytest.raises(UserError, match="switched off"):
        handlers.accept_licences([NVIDIA_RESEARCH])
    assert accepted(NVIDIA_RESEARCH) is None


class Loads:
    """Loads of a model, each of which ends when and how the test says."""

    def __init__(self, tmp_path: Path) -> None:
        self.begun = threading.Semaphore(0)
        self.ends: list[UserError | str] = []
        self.go = threading.Semaphore(0)
        self.studio = Studio(self.load, Sessions(tmp_path / "worlds"), JobManager())  # type: ignore[arg-type]

    def load(self) -> str:
        self.begun.release()
        assert self.go.acquire(timeout=20)
        end = self.ends.pop(0)
        if isinstance(end, UserError):
            raise end
        return end

    def end(self, how: UserError | str) -> None:
        self.ends.append(how)
        self.go.release()

    def result(self) -> Any:
        with ThreadPoolExecutor(1) as waiting:
            return waiting.submit(lambda: self.studio.pipeline).result(timeout=20)


def test_a_load_that_fails_while_the_licence_is_being_accepted_is_repeated(tmp_path: Path) -> None:
    loads = Loads(tmp_path)
    assert loads.begun.acquire(timeout=20) and loads.studio.is_loading
    loads.studio.load_again()
    loads.end(UserError("The licence is not accepted."))
    loads.end("the model")
    assert loads.result() == "the model" and not loads.studio.is_loading
    loads.studio.jobs.close()


def test_a_model_is_not_loaded_twice(tmp_path: Path) -> None:
    loads = Loads(tmp_path)
    loads.studio.load_again()
    loads.end("the model")
    assert loads.result() == "the model"
    loads.studio.load_again()
    assert loads.begun.acquire(timeout=20) and not loads.begun.acquire(blocking=False)
    assert loads.result() == "the model"
    loads.studio.jobs.close()


def panel(visit: Visit) -> Locator:
    return visit.page.locator("#lyra-licence")


@pytest.fixture(scope="class")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gated")


@pytest.fixture(scope="class")
def visit(
    folder: Path, released_repository: Path, browser_page: Callable[..., Page], patience: None
) -> Iterator[Visit]:
    environment = {"LYRA_CONFIG_DIR": str(folder / "config"), "LYRA_ACCEPT_LICENCE": "", "LYRA_NO_GATED_MODELS": ""}
    with served_process(folder, "--model", str(released_repository), environment=environment) as url:
        visit = Visit(browser_page(viewport={"width": 1280, "height": 1000}), url)
        yield visit
        visit.page.context.close()


@pytest.mark.browser
@pytest.mark.timeout(900)
class TestInTheBrowser:
    """A visitor without and then with the acceptance; each test begins where the one before it ended."""

    def test_the_panel_is_above_the_tabs_with_a_row_for_each_licence(self, visit: Visit) -> None:
        expect(panel(visit)).to_contain_text(f"{NAME}: accept its licence first")
        expect(panel(visit).locator("tbody tr")).to_have_count(3)
        expect(panel(visit).get_by_role("link").first).to_have_attribute("href", NVIDIA_RESEARCH.url)
        boxes = panel(visit).bounding_box(), visit.tab("1 Photo").bounding_box()
        assert boxes[0] and boxes[1] and boxes[0]["y"] + boxes[0]["height"] <= boxes[1]["y"]

    def test_a_photo_before_the_acceptance_gets_one_sentence_beside_it(self, visit: Visit) -> None:
        visit.choose_example(2)
        expect(visit.page.locator("#lyra-photo-note [role=alert]")).to_have_text(ACCEPT_FIRST)
        expect(visit.tab("2 Camera")).to_be_disabled()

    def test_ticking_the_box_hides_the_panel_and_loads_the_model(self, visit: Visit, folder: Path) -> None:
        panel(visit).get_by_role("checkbox").check()
        expect(panel(visit)).to_be_hidden()
        expect(visit.page.locator("#lyra-photo-note")).to_be_hidden()
        visit.choose_example(2)
        expect(visit.tab("2 Camera")).to_be_enabled()
        assert "nvidia-research" in (folder / "config" / "licences.json").read_text()

    def test_after_a_reload_the_licence_is_not_asked_for_again(self, visit: Visit) -> None:
        visit.page.reload()
        expect(visit.tab("2 Camera")).to_be_enabled()
        expect(panel(visit)).to_be_hidden()

    def test_a_recipe_has_no_chunks_to_choose(self, visit: Visit) -> None:
        visit.tab("2 Camera").click()
        visit.page.get_by_role("radio", name="Zoom in zoom out").check()
        expect(visit.page.locator("#lyra-path")).to_contain_text("20 s (320 frames)")
        expect(visit.page.locator("#lyra-chunks")).to_be_hidden()
        visit.page.get_by_role("radio", name="Pan left").check()
        expect(visit.page.locator("#lyra-path")).to_contain_text("5 s (80 frames)")
        expect(visit.page.locator("#lyra-chunks input[type=number]")).to_have_value("1")

    def test_a_path_file_is_followed_and_what_is_none_gets_its_sentence_under_it(
        self, visit: Visit, tmp_path: Path
    ) -> None:
        visit.page.get_by_role("button", name="Use a path from a file instead of a preset").click()
        file, note = visit.page.locator("#lyra-trajectory"), visit.page.locator("#lyra-path-note")
        (tmp_path / "letter.json").write_text("Dear reader, this is no path.")
        file.locator("input[type=file]").set_input_files(tmp_path / "letter.json")
        expect(note.get_by_role("alert")).to_have_text(
            re.compile(r"letter\.json is neither JSON nor an npz file; .+\.")
        )
        expect(visit.tab("3 Video")).to_be_disabled()
        file.get_by_role("button", name="Clear").click()
        expect(note).to_be_hidden()
        k = torch.tensor([[90.0, 0, 56], [0, 90, 32], [0, 0, 1]])
        turn = preset_cameras("pan-left", frames=81, depth=2.0, intrinsics=k, image_height=64, image_width=112)
        write_gui_path(tmp_path / "turn.json", turn)
        file.locator("input[type=file]").set_input_files(tmp_path / "turn.json")
        expect(visit.page.locator("#lyra-path")).to_have_text("Follow the poses of the file. 5 s (80 frames)")
        expect(note).to_be_hidden()
        expect(visit.tab("3 Video")).to_be_enabled()

    def test_a_walkthrough_of_the_released_layout_is_made(self, visit: Visit) -> None:
        visit.tab("3 Video").click()
        expect(visit.page.locator("#lyra-sampler")).to_contain_text("NVIDIA's DMD distillation")
        visit.button("Generate").click()
        progress = visit.page.locator("#lyra-video-progress .lyra-summary")
        expect(progress).to_have_text(re.compile("Finished in"), timeout=600_000)
        # Its network would lift 81 frames to 7 million splats, which the drawing of a test's browser takes minutes for.
        visit.button("Continue to the world").click()
        expect(visit.button("Lift to splats")).to_be_enabled()
        assert visit.errors == []

    def test_on_a_page_for_others_the_box_is_off_until_the_operator_has_accepted(
        self, tmp_path: Path, released_repository: Path, browser_page: Callable[..., Page], patience: None
    ) -> None:
        # On a Space the page is everybody's, whatever address the program listens on.
        environment = {"LYRA_CONFIG_DIR": str(tmp_path / "config"), "LYRA_ACCEPT_LICENCE": "", "SPACE_ID": "a/lab"}
        options = ("--model", str(released_repository), "--host", "127.0.0.1")
        with served_process(tmp_path, *options, environment=environment) as url:
            visit = Visit(browser_page(viewport={"width": 1280, "height": 1000}), url)
            expect(panel(visit)).to_contain_text("only whoever runs this server can accept it")
            expect(panel(visit).get_by_role("checkbox")).to_be_disabled()
            visit.page.context.close()
        with served_process(tmp_path, *options, "--accept-licence", environment=environment) as url:
            visit = Visit(browser_page(viewport={"width": 1280, "height": 1000}), url)
            visit.choose_example(2)
            expect(visit.tab("2 Camera")).to_be_enabled()
            expect(panel(visit)).to_be_hidden()
            visit.page.context.close()

    def test_where_gated_models_are_switched_off_the_box_is_too(
        self, tmp_path: Path, released_repository: Path, browser_page: Callable[..., Page], patience: None
    ) -> None:
        environment = {"LYRA_CONFIG_DIR": str(tmp_path / "config"), "LYRA_NO_GATED_MODELS": "1"}
        with served_process(tmp_path, "--model", str(released_repository), environment=environment) as url:
            phone = Visit(browser_page(viewport={"width": 390, "height": 844}, is_mobile=True, has_touch=True), url)
            expect(panel(phone)).to_contain_text(f"{NAME} is not available here")
            expect(panel(phone).get_by_role("checkbox")).to_be_disabled()
            assert phone.page.evaluate("document.documentElement.scrollWidth") <= 390
            phone.choose_example(2)
            expect(phone.page.locator("#lyra-photo-note [role=alert]")).to_have_text(SWITCHED_OFF)
            phone.page.context.close()
