"""The viewer in a real browser: what it draws where, from which files, and that it keeps to itself."""

import gzip
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import pytest
import torch
import trimesh
from PIL import Image, ImageColor
from playwright.sync_api import Page
from trimesh.transformations import euler_matrix, translation_matrix

from lyra.export.gltf import srgb_to_linear, write_mesh_glb
from lyra.export.ply import write_point_ply, write_splat_ply
from lyra.export.spz import write_spz
from lyra.types import Cameras, GaussianScene, TriangleMesh
from lyra.ui.viewer import BLOCKED_COLOUR, PATH_COLOUR, WorldViewer, viewer_value
from tests.ui.visit import Visit

pytestmark = pytest.mark.browser

HEIGHT, WIDTH, FOCAL = 480, 832, 520.0
MARKERS = np.array(
    [[-1.5, -0.9, 4.0], [0.2, -0.7, 3.0], [1.9, -0.4, 5.0], [-1.1, 0.8, 3.5], [0.3, 0.5, 2.5], [1.2, 1.0, 4.5]]
)
COLOURS = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0], [255, 0, 255], [0, 255, 255]])
TINTS = COLOURS // 2 + 60


def w2c(yaw: float, pitch: float, roll: float, centre: list[float]) -> np.ndarray:
    return euler_matrix(yaw, pitch, roll, "syxz") @ translation_matrix(-np.array(centre))


def camera_path(poses: list[np.ndarray]) -> Cameras:
    intrinsics = torch.tensor([[FOCAL, 0, WIDTH / 2], [0, FOCAL, HEIGHT / 2], [0, 0, 1]]).repeat(len(poses), 1, 1)
    return Cameras(torch.tensor(np.stack(poses), dtype=torch.float32), intrinsics, HEIGHT, WIDTH)


TILTED = camera_path([w2c(0.12, -0.08, 0.1, [0.2, -0.1, -0.4])])
CURVE = camera_path([w2c(0.0, 0.0, 0.0, [1.6 * t**2, 0.4 * t**2, 2 * t]) for t in np.linspace(0, 1, 81)])


def gaussians(means: np.ndarray, colours: np.ndarray, sigma: float, seed: int | None = None) -> GaussianScene:
    """Round blobs of one colour; with a seed, needles in all directions whose colour depends on the view."""
    n, random = len(means), torch.Generator().manual_seed(seed or 0)
    sh = torch.from_numpy((colours / 255 - 0.5) / 0.2820948)[:, None].float()
    quats, scales = torch.tensor([1.0, 0, 0, 0]).repeat(n, 1), torch.full((n, 3), sigma)
    if seed is not None:
        quats = torch.nn.functional.normalize(torch.randn(n, 4, generator=random), dim=1)
        scales = scales * torch.tensor([5.0, 1.0, 0.5])
        sh = torch.cat([0 * sh, 0.3 * torch.randn(n, 15, 3, generator=random)], dim=1)
    return GaussianScene(torch.from_numpy(means).float(), quats, scales, torch.full((n,), 0.9975), sh)


def write_quads(path: Path) -> Path:
    """A GLB by another program: per marker a square that faces it, every second one seen from behind."""
    corners = np.array([[-1, -1, 0], [1, -1, 0], [1, 1, 0], [-1, 1, 0]]) * 0.12
    vertices = (MARKERS[:, None] + corners).reshape(-1, 3) * [1, -1, -1]
    faces = np.array([[[0, 1, 2], [0, 2, 3]], [[0, 2, 1], [0, 3, 2]]] * 3) + 4 * np.arange(6)[:, None, None]
    linear = np.rint(srgb_to_linear(TINTS / 255) * 255).astype(np.uint8).repeat(4, axis=0)
    trimesh.Trimesh(vertices, faces.reshape(-1, 3), vertex_colors=linear, process=False).export(path)
    return path


@pytest.fixture(scope="module")
def values(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("scenes")
    random = np.random.default_rng(0)
    for ending, write in (("ply", write_splat_ply), ("spz", write_spz)):
        write(folder / f"markers.{ending}", gaussians(MARKERS, COLOURS, 0.04))
        write(folder / f"needles.{ending}", gaussians(MARKERS, COLOURS, 0.08, seed=1))
    spz = gzip.decompress((folder / "markers.spz").read_bytes())
    (folder / "newer.spz").write_bytes(gzip.compress(spz[:4] + struct.pack("<I", 4) + spz[8:]))
    v, u = (grid.ravel() for grid in np.mgrid[0:HEIGHT:4, 0:WIDTH:4])
    z = 3 + np.sin(u / 90)
    cloud = np.stack([(u - WIDTH / 2) / FOCAL * z, (v - HEIGHT / 2) / FOCAL * z, z], -1)
    tints = torch.from_numpy(np.stack([u * 255 // WIDTH, v * 255 // HEIGHT, np.full_like(u, 90)], -1)).byte()
    write_point_ply(folder / "points.ply", torch.from_numpy(cloud), tints)
    many = random.normal(size=(52_000, 3)) * 0.8 + [0, 0, 4]
    write_splat_ply(folder / "crowd.ply", gaussians(many, random.integers(0, 256, (52_000, 3)), 0.01))
    grid = np.arange(len(z)).reshape(120, 208)[::4, ::4]
    a, b, c, d = grid[:-1, :-1].ravel(), grid[:-1, 1:].ravel(), grid[1:, 1:].ravel(), grid[1:, :-1].ravel()
    faces = torch.from_numpy(np.concatenate([np.stack([a, d, c], -1), np.stack([a, c, b], -1)]))
    write_mesh_glb(folder / "surface.glb", TriangleMesh(torch.from_numpy(cloud).float(), faces, tints))
    (folder / "broken.glb").write_bytes((folder / "surface.glb").read_bytes()[:100_000])
    blocked = [30 <= i < 50 for i in range(81)]
    return {
        "ply": viewer_value(splats=folder / "markers.ply", cameras=TILTED),
        "spz": viewer_value(splats=folder / "markers.spz", cameras=TILTED),
        "newer": viewer_value(splats=folder / "newer.spz", cameras=TILTED),
        "points": viewer_value(points=folder / "points.ply", cameras=CURVE, blocked=blocked),
        "crowd": viewer_value(splats=folder / "crowd.ply", cameras=CURVE),
        "needles ply": viewer_value(splats=folder / "needles.ply", cameras=TILTED),
        "needles spz": viewer_value(splats=folder / "needles.spz", cameras=TILTED),
        "quads": viewer_value(mesh=write_quads(folder / "quads.glb"), cameras=TILTED),
        "mesh": viewer_value(mesh=folder / "surface.glb", cameras=CURVE, blocked=blocked),
        "wireframe": viewer_value(mesh=folder / "surface.glb", wireframe=True, cameras=CURVE, blocked=blocked),
        "broken": viewer_value(mesh=folder / "broken.glb", cameras=CURVE),
        "path": viewer_value(cameras=CURVE, blocked=blocked),
    }


class ViewerVisit(Visit):
    """The page with the viewer and a button for each value."""

    def __init__(self, page: Page, url: str) -> None:
        page.on("console", lambda message: message.type == "error" and self.errors.append(message.text))
        super().__init__(page, url)
        self.host = page.locator(".lyra-viewer")
        self.status = self.host.get_by_role("status")
        page.locator(".lyra-viewer[data-state=empty]").wait_for()

    def show(self, name: str, state: str = "loaded") -> None:
        self.button("nothing").click()
        self.page.locator(".lyra-viewer[data-state=empty][data-kind=none]").wait_for()
        self.button(name).click()
        self.page.locator(f".lyra-viewer[data-state={state}]").wait_for()

    def press(self, name: str) -> None:
        self.host.get_by_role("button", name=name, exact=True).click()

    def ask(self, expression: str) -> Any:
        return self.host.evaluate(f"host => host.lyraViewer.{expression}")

    def probe(self) -> dict[str, Any]:
        return self.ask("probe()")

    def eye(self) -> np.ndarray:
        return np.array(self.ask("view().w2c")).reshape(4, 4)

    def picture(self, path: bool = True) -> np.ndarray:
        """What the canvas shows, with the drawn path or without it."""
        if path:
            return self.view_of_the_world()
        self.press("Show path")
        picture = self.view_of_the_world()
        self.press("Show path")
        return picture


@pytest.fixture(scope="module")
def url(values: dict[str, Any], serve_app: Callable[..., str]) -> str:
    with gr.Blocks() as app:
        gr.Textbox(label="Caption")
        viewer = WorldViewer()
        with gr.Row():  # Below each other they would be so many that the view is scrolled away.
            for name, value in {"nothing": None, **values}.items():
                gr.Button(name, size="sm").click(lambda value=value: value, outputs=viewer, show_progress="hidden")
    return serve_app(app, theme=gr.themes.Base(font="sans-serif", font_mono="monospace"))


@pytest.fixture(scope="module")
def visit(url: str, browser_page: Callable[..., Page]) -> ViewerVisit:
    return ViewerVisit(browser_page(), url)


def near(picture: np.ndarray, colour: tuple[int, ...] | np.ndarray, tolerance: int) -> np.ndarray:
    return np.abs(picture - np.array(colour)).max(-1) <= tolerance


def markers_on(picture: np.ndarray) -> np.ndarray:
    """Where the camera model puts the markers, in pixels of the picture."""
    height, width, _ = picture.shape
    seen = MARKERS @ TILTED.w2c[0, :3, :3].numpy().T + TILTED.w2c[0, :3, 3].numpy()
    return seen[:, :2] / seen[:, 2:] * FOCAL * height / HEIGHT + [width / 2, height / 2]


@pytest.mark.parametrize("name", ["ply", "spz"])
def test_splats_appear_where_the_camera_model_puts_them(visit: ViewerVisit, name: str) -> None:
    visit.show(name)
    picture = visit.picture(path=False)
    assert visit.probe()["splats"] == 6
    assert visit.status.text_content() == "6 splats"
    for colour, point in zip(COLOURS, markers_on(picture), strict=True):
        rows, columns = np.nonzero(near(picture, colour, 90))
        assert len(rows) > 15, colour
        np.testing.assert_allclose([columns.mean() + 0.5, rows.mean() + 0.5], point, atol=1.5)


def test_spz_and_ply_of_a_scene_look_alike_from_the_side(visit: ViewerVisit) -> None:
    """Shapes, turns and view-dependent colours come through the axes of both formats."""
    pictures = []
    for name in ("needles ply", "needles spz"):
        visit.show(name)
        pictures.append(visit.picture(path=False))
    assert np.abs(pictures[0] - np.median(pictures[0], axis=(0, 1))).max(-1).clip(0, 40).sum() > 40_000
    assert np.abs(pictures[0] - pictures[1]).mean() < 0.6


def test_a_mesh_shows_its_colours_where_the_camera_model_puts_them(visit: ViewerVisit) -> None:
    visit.show("quads")
    picture = visit.picture(path=False)
    assert (visit.probe()["kind"], visit.probe()["triangles"], visit.probe()["splats"]) == ("mesh", 12, 0)
    assert visit.status.text_content() == "12 triangles"
    np.testing.assert_allclose(visit.eye(), TILTED.w2c[0].numpy(), atol=2e-6)
    for tint, point in zip(TINTS, markers_on(picture), strict=True):
        rows, columns = np.nonzero(near(picture, tint, 2))
        assert len(rows) > 300, tint
        np.testing.assert_allclose([columns.mean() + 0.5, rows.mean() + 0.5], point, atol=1.5)


@pytest.mark.parametrize(("name", "unit", "count"), [("points", "points", 24_960), ("mesh", "triangles", 2_958)])
def test_points_and_meshes_close_to_a_picture(visit: ViewerVisit, name: str, unit: str, count: int) -> None:
    visit.show(name)
    probe = visit.probe()
    assert (probe["kind"], probe[unit], probe["splats"]) == (name, count, 0)
    assert probe["distinctColours"] > 100
    picture = visit.picture()
    height, width, _ = picture.shape
    inside = picture[height // 8 : -height // 8, width // 8 : -width // 8]
    drawn = near(inside, [128, 128, 90], 128) & (np.abs(inside[..., 2] - 90) < 3)
    assert drawn.mean() > 0.9


def test_path_is_drawn_and_blocked_stretches_are_red(visit: ViewerVisit) -> None:
    visit.show("path", state="empty")
    shown, hidden = visit.picture(), visit.picture(path=False)
    for colour in (PATH_COLOUR, BLOCKED_COLOUR):
        assert near(shown, ImageColor.getrgb(colour), 12).sum() > 100
        assert near(hidden, ImageColor.getrgb(colour), 12).sum() == 0


@pytest.mark.parametrize(("name", "state"), [("path", "empty"), ("mesh", "loaded")])
def test_path_plays_to_its_end_by_the_clock(visit: ViewerVisit, name: str, state: str) -> None:
    visit.show(name, state)
    visit.press("Play path")
    visit.ask("playback.began -= 2500")  # As if the walk had begun so many milliseconds earlier.
    visit.page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
    seconds = visit.ask("playback.began") / -1000 + visit.page.evaluate("performance.now() / 1000")
    np.testing.assert_allclose(visit.eye()[0, 3], -1.6 * (seconds / 5) ** 2, atol=0.1)
    visit.ask("playback.began -= 3000")
    visit.host.get_by_role("button", name="Play path").wait_for()
    np.testing.assert_allclose(visit.eye(), CURVE.w2c[-1].numpy(), atol=1e-5)


def test_keys_walk_only_while_the_canvas_has_the_focus(visit: ViewerVisit) -> None:
    visit.show("points")
    visit.press("Walk")
    start = visit.eye()
    visit.page.get_by_label("Caption").press_sequentially("wasdqe", delay=20)
    np.testing.assert_array_equal(visit.eye(), start)
    visit.host.locator("canvas").focus()
    visit.page.keyboard.press("KeyW", delay=300)
    assert visit.eye()[2, 3] < start[2, 3] - 0.05
    visit.press("Reset view")
    visit.press("Orbit")
    np.testing.assert_allclose(visit.eye(), start, atol=1e-6)


@pytest.mark.parametrize("name", ["points", "mesh", "wireframe"])
def test_dragging_orbits_around_what_is_in_the_middle(visit: ViewerVisit, name: str) -> None:
    visit.show(name)
    box = visit.host.locator("canvas").bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    start = visit.eye()
    visit.page.mouse.move(x, y)
    visit.page.mouse.down()
    visit.page.mouse.move(x + 80, y, steps=4)
    visit.page.mouse.up()
    moved = visit.eye()
    assert np.linalg.norm(moved[:3, 3] - start[:3, 3]) > 0.2
    assert np.abs((moved @ [0, 0, 3, 1])[:2]).max() < 0.35


def test_big_scenes_load_with_levels_of_detail(visit: ViewerVisit) -> None:
    visit.show("crowd")
    probe = visit.probe()
    assert probe["splats"] == 52_000
    assert 1_000 < probe["drawnSplats"] < 52_000
    assert probe["distinctColours"] > 100


def test_an_idle_view_draws_nothing(visit: ViewerVisit) -> None:
    visit.show("ply")
    visit.page.wait_for_timeout(300)
    before = visit.ask("frames")
    visit.page.wait_for_timeout(300)
    assert visit.ask("frames") == before


def test_a_wireframe_shows_the_shape_and_its_edges_in_place_of_colours(visit: ViewerVisit) -> None:
    inside = []
    for name in ("mesh", "wireframe"):
        visit.show(name)
        inside.append(visit.picture(path=False)[80:-80, 100:-100])
    assert (np.abs(inside[0] - inside[1]).max(-1) > 30).mean() > 0.5
    assert np.ptp(inside[1], axis=-1).max() < 40  # Hardly any colour, but steps from face to edge:
    steps = [np.abs(np.diff(picture.mean(-1), axis=0)).mean() for picture in inside]
    assert steps[1] > 20 * steps[0]


def test_a_scene_that_is_replaced_is_freed(visit: ViewerVisit) -> None:
    held = []
    for name, kind in [("ply", "splats"), ("mesh", "mesh"), ("points", "points"), ("wireframe", "mesh")] * 3:
        visit.button(name).click()
        visit.page.locator(f".lyra-viewer[data-state=loaded][data-kind={kind}]").wait_for()
        visit.probe()
        held.append(visit.ask("renderer.info.memory"))
    assert held[4:8] == held[8:]


@pytest.mark.parametrize(("name", "words"), [("newer", "SPZ version 4 is not"), ("broken", "GLB file is cut short")])
def test_an_unreadable_scene_is_named(visit: ViewerVisit, name: str, words: str) -> None:
    visit.show(name, state="error")
    assert words in visit.status.text_content()


def test_a_lost_graphics_context_can_be_restarted(visit: ViewerVisit) -> None:
    visit.show("ply")
    lose = "canvas => canvas.getContext('webgl2').getExtension('WEBGL_lose_context').loseContext()"
    visit.host.locator("canvas").evaluate(lose)
    visit.page.locator(".lyra-viewer[data-state=error]").wait_for()
    assert "graphics context" in visit.status.text_content()
    visit.press("Restart the view")
    visit.page.locator(".lyra-viewer[data-state=loaded]").wait_for()
    assert visit.probe()["splats"] == 6


def test_background_follows_the_theme(visit: ViewerVisit) -> None:
    visit.show("path", state="empty")
    light = visit.probe()["centre"]
    visit.page.evaluate("document.body.classList.add('dark')")
    dark = "() => document.querySelector('.lyra-viewer').lyraViewer.probe().centre[0] < 80"
    visit.page.wait_for_function(dark, polling=100)
    visit.page.evaluate("document.body.classList.remove('dark')")
    assert min(light) > 200


def test_screenshot_is_the_picture(visit: ViewerVisit) -> None:
    visit.show("points")
    with visit.page.expect_download() as download:
        visit.press("Screenshot")
    assert download.value.suggested_filename == "lyra-view.png"
    picture = Image.open(download.value.path())
    assert len(picture.convert("RGB").getcolors(picture.width * picture.height)) > 1000


def test_every_control_can_be_reached_and_named_by_keyboard(visit: ViewerVisit) -> None:
    visit.show("points")
    visit.host.locator("canvas").focus()
    names = []
    for _ in range(7):
        visit.page.keyboard.press("Tab")
        names.append(visit.host.evaluate("host => host.shadowRoot.activeElement?.getAttribute('aria-label')"))
    assert names == ["Orbit", "Walk", "Reset view", "Play path", "Show path", "Screenshot", "Fullscreen"]


def test_fullscreen_fills_the_screen(visit: ViewerVisit) -> None:
    visit.show("points")
    visit.press("Fullscreen")
    visit.page.wait_for_function("() => document.fullscreenElement?.matches('.lyra-viewer')")
    visit.page.evaluate("document.exitFullscreen()")


def test_fingers_walk_by_the_pad_and_the_page_fits_a_phone(url: str, browser_page: Callable[..., Page]) -> None:
    phone = ViewerVisit(browser_page(viewport={"width": 390, "height": 844}, is_mobile=True, has_touch=True), url)
    phone.show("points")
    phone.press("Walk")
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


def test_nothing_is_fetched_from_elsewhere_and_nothing_throws(visit: ViewerVisit) -> None:
    visit.show("ply")
    visit.show("points")
    assert visit.hosts <= {"127.0.0.1", None}
    assert visit.errors == []


def test_thinning_keeps_the_ends_the_start_and_short_collisions() -> None:
    blocked = [i == 402 for i in range(801)]
    path = viewer_value(cameras=camera_path([np.eye(4)] * 801), blocked=blocked, start_pose=399)["path"]
    assert len(path["w2c"]) <= 120
    assert (path["frames"][0], path["frames"][-1], path["frames"][path["start_pose"]]) == (0, 800, 399)
    assert path["colours"].count(BLOCKED_COLOUR) == 1
