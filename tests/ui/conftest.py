"""A headless browser and a way to serve an app to it, shared by the tests of the user interface."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.released_checkpoint import write_released
from tests.ui.visit import SOON

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
ARGUMENTS = [
    "--use-angle=swiftshader",  # WebGL without a graphics card.
    "--enable-unsafe-swiftshader",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    executable = next(filter(None, map(shutil.which, BROWSERS)), None)
    if executable is None:
        pytest.fail(f"browser tests need one of {', '.join(BROWSERS)} on PATH, e.g. `apt-get install chromium`")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def browser_page(browser: Browser) -> Callable[..., Page]:
    """Opens a page in a fresh profile; options are those of `Browser.new_context`. Closes with the browser."""

    def open_page(**options: Any) -> Page:
        page = browser.new_context(**{"viewport": {"width": 960, "height": 760}, **options}).new_page()
        page.set_default_timeout(20_000)
        return page

    return open_page


@pytest.fixture(scope="session")
def serve_app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., str]]:
    """Serves a `gr.Blocks` on a free port of 127.0.0.1 and returns its address; options are those of `launch`."""
    served: list[gr.Blocks] = []
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("gradio")))
        environment.setenv("GRADIO_ANALYTICS_ENABLED", "False")
        environment.setenv("NO_PROXY", "127.0.0.1,localhost")

        def serve(app: gr.Blocks, **options: Any) -> str:
            served.append(app)
            return app.launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True, **options)[1]

        yield serve
        for app in served:
            app.close()


@pytest.fixture(scope="module")
def patience() -> Iterator[None]:
    """Expectations about the page wait as long as a busy machine needs."""
    expect.set_options(timeout=SOON)
    yield
    expect.set_options(timeout=5_000)


@pytest.fixture(scope="session")
def released_repository(tmp_path_factory: pytest.TempPathFactory, released_shapes: dict[str, Any]) -> Path:
    """A folder with a small checkpoint in the released layout."""
    return write_released(tmp_path_factory.mktemp("repository"), released_shapes).parent
