"""The app in a process of its own, and a visitor's page of it in a browser."""

from __future__ import annotations

import io
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from PIL import Image
from playwright.sync_api import Locator, Page

ROOT = Path(__file__).resolve().parents[2]
SOON = 90_000
"""Milliseconds for what takes seconds."""


@contextmanager
def served_process(folder: Path, *options: str, environment: Mapping[str, str] | None = None) -> Iterator[str]:
    """Address of the app, served by `app.py` with some options; its worlds and its output are in the folder."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "app.py", "--port", str(port), "--worlds", str(folder / "worlds"), *options]
    variables = {**os.environ, "GRADIO_TEMP_DIR": str(folder / "gradio"), **(environment or {})}
    with (
        (folder / "errors.txt").open("w") as errors,
        subprocess.Popen(command, cwd=ROOT, env=variables, stdout=subprocess.PIPE, stderr=errors, text=True) as app,
    ):
        try:
            assert app.stdout is not None
            line = app.stdout.readline()
            address = re.search(r"http://\S+", line)
            assert address, (folder / "errors.txt").read_text()
            yield address[0]
        finally:
            app.terminate()
    assert "Traceback" not in (folder / "errors.txt").read_text()


class Visit:
    """A visitor's page."""

    def __init__(self, page: Page, url: str) -> None:
        self.page, self.errors = page, list[str]()
        self.hosts: set[str | None] = set()
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("request", lambda request: self.hosts.add(urlsplit(request.url).hostname))
        page.set_default_timeout(SOON)
        page.goto(url)

    def tab(self, name: str) -> Locator:
        return self.page.get_by_role("tab", name=name)

    def button(self, name: str) -> Locator:
        return self.page.get_by_role("button", name=name, exact=True)

    def viewer(self, kind: str) -> dict[str, Any]:
        """What the viewer shows once it has drawn something of this kind."""
        self.page.locator(f".lyra-viewer[data-state=loaded][data-kind={kind}]").wait_for()
        return self.page.locator(".lyra-viewer").evaluate("host => host.lyraViewer.probe()")

    def view_of_the_world(self) -> np.ndarray:
        png = self.page.locator(".lyra-viewer canvas").screenshot()
        return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)

    def upload(self, path: Path) -> None:
        self.page.locator("#lyra-photo input[type=file]").set_input_files(path)

    def choose_example(self, number: int) -> None:
        self.page.locator("#lyra-examples button img").nth(number).click()
