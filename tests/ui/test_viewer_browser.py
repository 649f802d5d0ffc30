"""The viewer in a real browser: what it draws where, from which files, and that it keeps to itself."""

import gzip
import io
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import gradio as gr
import numpy as np
import pytest
import torch
from PIL import Image
from playwright.sync_api import Page
from plyfile import PlyData, PlyElement

from lyra.export.ply import write_point_ply
from lyra.types import Cameras
from lyra.ui.viewer import BLOCKED_COLOUR, PATH_COLOUR, WorldViewer, viewer_value

pytestmark = pytest.mark.browser

HEIGHT, WIDTH, FOCAL = 480, 832, 520.0
MARKERS = np.array(
    [[-1.5, -0.9, 4.0], [0.2, -0.7, 3.0], [1.9, -0.4, 5.0], [-1.1, 0.8, 3.5], [0.3, 0.5, 2.5], [1.2, 1.0, 4.5]]
)
COLOURS = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0], [255, 0, 255], [0, 255, 255]])


def w2c(yaw: float, pitch: float, roll: float, centre: list[float]) -> np.ndarray:
    cy, sy, cx, sx, cz, sz = (f(a) for a in (yaw, pitch, roll) for f in (np.cos, np.sin))
    turn = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    turn = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]]) @ turn
    turn = np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]]) @ turn
    matrix = np.eye(4)
    matrix[:3, :3], matrix[:3, 3] = turn, -turn @ np.array(centre)
    return matrix


def camera_path(poses: list[np.ndarray]) -> Cameras:
    intrinsics = torch.tensor([[FOCAL, 0, WIDTH / 2], [0, FOCAL, HEIGHT / 2], [0, 0, 1]]).repeat(len(poses), 1, 1)
    return Cameras(torch.tensor(np.stack(poses), dtype=torch.float32), intrinsics, HEIGHT, WIDTH)


TILTED = camera_path([w2c(0.12, -0.08, 0.1, [0.2, -0.1, -0.4])])
CURVE = camera_path([w2c(0.0, 0.0, 0.0, [1.6 * t**2, 0.4 * t**2, 2 * t]) for t in np.linspace(0, 1, 81)])


def write_ply(path: Path, means: np.ndarray, colours: np.ndarray, sigma: float) -> Path:
    """The INRIA layout: logarithmic scales, logit opacities, degree-0 harmonics."""
    columns = dict(zip("xyz", means.T, strict=True))
    columns |= {f"f_dc_{i}": (colours[:, i] / 255 - 0.5) / 0.2820948 for i in range(3)}
    columns |= {"opacity": np.full(len(means), 6.0)}
    columns |= {f"scale_{i}": np.full(len(means), np.log(sigma)) for i in range(3)}
    columns |= {f"rot_{i}": np.full(len(means), float(i == 0)) for i in range(4)}
    table = np.rec.fromarrays([c.astype("<f4") for c in columns.values()], names=list(columns))
    PlyData([PlyElement.describe(table, "vertex")]).write(path)
    return path


def write_spz(path: Path, means: np.ndarray, colours: np.ndarray, sigma: float, version: int = 2) -> Path:
    """SPZ 2 without harmonics: 24-bit fixed-point positions, byte opacities, colours, scales and rotations."""
    n = len(means)
    fixed = np.round(means * 4096).astype("<i4").reshape(n, 3, 1).view("u1")[..., :3]
    harmonics = (colours / 255 - 0.5) / 0.2820948 * 0.15 + 0.5
    scales = np.full(3 * n, round((np.log(sigma) + 10) * 16), "u1")
    body = [
        fixed,
        np.full(n, 254, "u1"),
        np.clip(harmonics * 255, 0, 255).astype("u1"),
        scales,
        np.full(3 * n, 128, "u1"),
    ]
    header = struct.pack("<IIIBBBB", 0x5053474E, version, n, 0, 12, 0, 0)
    path.write_bytes(gzip.compress(header + b"".join(part.tobytes() for part in body)))
    return path


@pytest.fixture(scope="module")
def values(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("scenes")
    random = np.random.default_rng(0)
    ply = write_ply(folder / "markers.ply", MARKERS, COLOURS, 0.04)
    spz = write_spz(folder / "markers.spz", MARKERS, COLOURS, 0.04)
    newer = write_spz(folder / "newer.spz", MARKERS, COLOURS, 0.04, version=4)
    v, u = (grid.ravel() for grid in np.mgrid[0:HEIGHT:4, 0:WIDTH:4])
    z = 3 + np.sin(u / 90)
    cloud = np.stack([(u - WIDTH / 2) / FOCAL * z, (v - HEIGHT / 2) / FOCAL * z, z], -1)
    tints = np.stack([u * 255 // WIDTH, v * 255 // HEIGHT, np.full_like(u, 90)], -1)
    points = folder / "points.ply"
    write_point_ply(points, torch.from_numpy(cloud), torch.from_numpy(tints.astype(np.uint8)))
    many = random.normal(size=(52_000, 3)) * 0.8 + [0, 0, 4]
    crowd = write_ply(folder / "crowd.ply", many, random.integers(0, 256, (52_000, 3)), 0.01)
    blocked = [30 <= i < 50 for i in range(81)]
    return {
        "ply": viewer_value(splats=ply, cameras=TILTED),
        "spz": viewer_value(splats=spz, cameras=TILTED),
        "newer": viewer_value(splats=newer, cameras=TILTED),
        "points": viewer_value(points=points, cameras=CURVE, blocked=blocked),
        "crowd": viewer_value(splats=crowd, cameras=CURVE),
        "path": viewer_value(cameras=CURVE, blocked=blocked),
    }


class Visit:
    """The page with the viewer, and what it asked the network for."""

    def __init__(self, page: Page, url: str) -> None:
        self.page = page
        self.hosts: set[str | None] = set()
        self.errors: list[str] = []
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("request", lambda request: self.hosts.add(urlsplit(request.url).hostname))
        page.goto(url)
        self.host = page.locator(".lyra-viewer")
        self.status = self.host.get_by_role("status")
        page.locator(".lyra-viewer[data-state=empty]").wait_for()

    def show(self, name: str, state: str = "loaded") -> None:
        self.page.get_by_role("button", name="nothing", exact=True).click()
        self.page.locator(".lyra-viewer[data-state=empty][data-kind=none]").wait_for()
        self.page.get_by_role("button", name=name, exact=True).click()
        self.page.locator(f".lyra-viewer[data-state={state}]").wait_for()

    def button(self, name: str) -> None:
        self.host.get_by_role("button", name=name, exact=True).click()

    def probe(self) -> dict[str, Any]:
        return self.host.evaluate("host => host.lyraViewer.probe()")

    def eye(self) -> np.ndarray:
        return np.array(self.host.evaluate("host => host.lyraViewer.view().w2c")).reshape(4, 4)

    def picture(self) -> np.ndarray:
        png = self.host.locator("canvas").screenshot()
        return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


@pytest.fixture(scope="module")
def url(values: dict[str, Any], serve_app: Callable[..., str]) -> str:
    with gr.Blocks() as app:
        gr.Textbox(label="Caption")
        viewer = WorldViewer()
        for name, value in {"nothing": None, **values}.items():
            gr.Button(name).click(lambda value=value: value, outputs=viewer, show_progress="hidden")
    return serve_app(app, theme=gr.themes.Base(font="sans-serif", font_mono="monospace"))


@pytest.fixture(scope="module")
def visit(url: str, browser_page: Callable[..., Page]) -> Visit:
    return Visit(browser_page(), url)


def near(picture: np.ndarray, colour: tuple[int, ...] | np.ndarray, tolerance: int) -> np.ndarray:
    return np.abs(picture - np.array(colour)).max(-1) <= tolerance


def rgb(colour: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(colour[1:]))


@pytest.mark.parametrize("name", ["ply", "spz"])
def test_splats_appear_where_the_camera_model_puts_them(visit: Visit, name: str) -> None:
    visit.show(name)
    visit.button("Show path")
    picture = visit.picture()
    visit.button("Show path")
    assert visit.probe()["splats"] == 6
    assert visit.status.text_content() == "6 splats"
    height, width, _ = picture.shape
    seen = MARKERS @ TILTED.w2c[0, :3, :3].numpy().T + TILTED.w2c[0, :3, 3].numpy()
    expected = seen[:, :2] / seen[:, 2:] * FOCAL * height / HEIGHT + [width / 2, height / 2]
    for colour, point in zip(COLOURS, expected, strict=True):
        rows, columns = np.nonzero(near(picture, colour, 90))
        assert len(rows) > 15, colour
        np.testing.assert_allclose([columns.mean() + 0.5, rows.mean() + 0.5], point, atol=1.5)


def test_view_is_the_start_pose_to_the_digit(visit: Visit) -> None:
    visit.show("ply")
    np.testing.assert_allclose(visit.eye(), TILTED.w2c[0].numpy(), atol=2e-6)


def test_points_close_to_a_picture_from_their_own_camera(visit: Visit) -> None:
    visit.show("points")
    probe = visit.probe()
    assert (probe["kind"], probe["points"], probe["splats"]) == ("points", 120 * 208, 0)
    assert probe["distinctColours"] > 100
    picture = visit.picture()
    height, width, _ = picture.shape
    inside = picture[height // 8 : -height // 8, width // 8 : -width // 8]
    drawn = near(inside, [128, 128, 90], 128) & (np.abs(inside[..., 2] - 90) < 3)
    assert drawn.mean() > 0.9


def test_path_is_drawn_and_blocked_stretches_are_red(visit: Visit) -> None:
    visit.show("path", state="empty")
    shown = visit.picture()
    visit.button("Show path")
    hidden = visit.picture()
    visit.button("Show path")
    for colour in (PATH_COLOUR, BLOCKED_COLOUR):
        assert near(shown, rgb(colour), 12).sum() > 100
        assert near(hidden, rgb(colour), 12).sum() == 0


def test_path_plays_to_its_end_by_the_clock(visit: Visit) -> None:
    visit.show("path", state="empty")
    visit.page.clock.install()
    visit.button("Play path")
    visit.page.clock.run_for(2500)
    np.testing.assert_allclose(visit.eye()[0, 3], -0.4, atol=0.03)
    visit.page.clock.run_for(3000)
    visit.page.clock.resume()
    np.testing.assert_allclose(visit.eye(), CURVE.w2c[-1].numpy(), atol=1e-5)
    visit.host.get_by_role("button", name="Play path").wait_for()


def test_keys_walk_only_while_the_canvas_has_the_focus(visit: Visit) -> None:
    visit.show("points")
    visit.button("Walk")
    start = visit.eye()
    visit.page.get_by_label("Caption").press_sequentially("wasdqe", delay=20)
    np.testing.assert_array_equal(visit.eye(), start)
    visit.host.locator("canvas").focus()
    visit.page.keyboard.press("KeyW", delay=300)
    assert visit.eye()[2, 3] < start[2, 3] - 0.05
    visit.button("Reset view")
    visit.button("Orbit")
    np.testing.assert_allclose(visit.eye(), start, atol=1e-6)


def test_dragging_orbits_around_what_is_in_the_middle(visit: Visit) -> None:
    visit.show("points")
    box = visit.host.locator("canvas").bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    start = visit.eye()
    visit.page.mouse.move(x, y)
    visit.page.mouse.down()
    visit.page.mouse.move(x + 80, y, steps=4)
    visit.page.mouse.up()
    moved = visit.eye()
    assert np.linalg.norm(moved[:3, 3] - start[:3, 3]) > 0.2
    pivot = np.array([0, 0, 3.0, 1])
    assert np.abs((moved @ pivot)[:2]).max() < 0.35


def test_big_scenes_load_with_levels_of_detail(visit: Visit) -> None:
    visit.show("crowd")
    probe = visit.probe()
    assert probe["splats"] == 52_000
    assert 1_000 < probe["drawnSplats"] < 52_000
    assert probe["distinctColours"] > 100


def test_an_idle_view_draws_nothing(visit: Visit) -> None:
    visit.show("ply")
    visit.page.wait_for_timeout(300)
    frames = "host => host.lyraViewer.frames"
    before = visit.host.evaluate(frames)
    visit.page.wait_for_timeout(300)
    assert visit.host.evaluate(frames) == before


def test_an_unreadable_scene_is_named(visit: Visit) -> None:
    visit.show("newer", state="error")
    assert "SPZ version 4 is not supported" in visit.status.text_content()


def test_a_lost_graphics_context_can_be_restarted(visit: Visit) -> None:
    visit.show("ply")
    lose = "canvas => canvas.getContext('webgl2').getExtension('WEBGL_lose_context').loseContext()"
    visit.host.locator("canvas").evaluate(lose)
    visit.page.locator(".lyra-viewer[data-state=error]").wait_for()
    assert "graphics context" in visit.status.text_content()
    visit.button("Restart the view")
    visit.page.locator(".lyra-viewer[data-state=loaded]").wait_for()
    assert visit.probe()["splats"] == 6


def test_background_follows_the_theme(visit: Visit) -> None:
    visit.show("path", state="empty")
    light = visit.probe()["centre"]
    visit.page.evaluate("document.body.classList.add('dark')")
    visit.page.wait_for_function(
        "() => document.querySelector('.lyra-viewer').lyraViewer.probe().centre[0] < 80", polling=100
    )
    visit.page.evaluate("document.body.classList.remove('dark')")
    assert min(light) > 200


def test_screenshot_is_the_picture(visit: Visit) -> None:
    visit.show("points")
    with visit.page.expect_download() as download:
        visit.button("Screenshot")
    assert download.value.suggested_filename == "lyra-view.png"
    picture = Image.open(download.value.path())
    assert len(picture.convert("RGB").getcolors(picture.width * picture.height)) > 1000


def test_every_control_can_be_reached_and_named_by_keyboard(visit: Visit) -> None:
    visit.show("points")
    visit.host.locator("canvas").focus()
    names = []
    for _ in range(7):
        visit.page.keyboard.press("Tab")
        names.append(visit.host.evaluate("host => host.shadowRoot.activeElement?.getAttribute('aria-label')"))
    assert names == ["Orbit", "Walk", "Reset view", "Play path", "Show path", "Screenshot", "Fullscreen"]


def test_fullscreen_fills_the_screen(visit: Visit) -> None:
    visit.show("points")
    visit.button("Fullscreen")
    visit.page.wait_for_function("() => document.fullscreenElement?.matches('.lyra-viewer')")
    visit.page.evaluate("document.exitFullscreen()")


def test_fingers_walk_by_the_pad_and_the_page_fits_a_phone(url: str, browser_page: Callable[..., Page]) -> None:
    phone = Visit(browser_page(viewport={"width": 390, "height": 844}, is_mobile=True, has_touch=True), url)
    phone.show("points")
    phone.button("Walk")
    start = phone.eye()
    box = phone.host.locator(".joystick").bounding_box()
    touch = phone.page.context.new_cdp_session(phone.page)
    thumb = {"x": box["x"] + box["width"] / 2, "y": box["y"] + 6}
    touch.send("Input.dispatchTouchEvent", {"type": "touchStart", "touchPoints": [thumb]})
    phone.page.wait_for_timeout(300)
    touch.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
    assert phone.eye()[2, 3] < start[2, 3] - 0.05
    assert phone.page.evaluate("document.documentElement.scrollWidth") <= 390
    phone.page.context.close()


def test_a_browser_without_webgl_is_told_so(url: str, browser_page: Callable[..., Page]) -> None:
    page = browser_page()
    page.add_init_script("HTMLCanvasElement.prototype.getContext = () => null")
    page.goto(url)
    page.locator(".lyra-viewer[data-state=error]").wait_for()
    assert "WebGL 2" in page.locator(".lyra-viewer").get_by_role("status").text_content()
    page.context.close()


def test_nothing_is_fetched_from_elsewhere_and_nothing_throws(visit: Visit) -> None:
    visit.show("ply")
    visit.show("points")
    assert visit.hosts <= {"127.0.0.1", None}
    assert visit.errors == []


def test_thinning_keeps_the_ends_the_start_and_short_collisions() -> None:
    path = viewer_value(cameras=camera_path([np.eye(4)] * 801), blocked=[i == 402 for i in range(801)], start_pose=399)[
        "path"
    ]
    assert len(path["w2c"]) <= 120
    assert (path["frames"][0], path["frames"][-1], path["frames"][path["start_pose"]]) == (0, 800, 399)
    assert path["colours"].count(BLOCKED_COLOUR) == 1
