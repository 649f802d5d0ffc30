// How a value sent from Python becomes a picture one can move in: mounts the viewer and wires its parts.
// Knows no file format, no gesture and no CSS. The value's fields are those of `lyra.ui.viewer.ViewerValue`.
//
// It draws on demand: every change asks for one frame, and an idle viewer draws none.

import { SparkRenderer } from "@sparkjsdev/spark";
import {
  Color, Group, Matrix4, PerspectiveCamera, Quaternion, Scene, SRGBColorSpace, Timer, Vector3, WebGLRenderer,
} from "three";
import { Controls } from "./controls.js";
import { OPENCV_WORLD, poseFromW2c, verticalFov, w2cFromCameraMatrix } from "./coordinates.js";
import { Panel } from "./panel.js";
import { CameraPath, Playback } from "./path.js";
import { setPointCamera } from "./points.js";
import { loadScene, medianDepth } from "./scene.js";

const FIRST_POSE = { w2c: [1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1], fy: 1, height: 1.155, width: 2.053 };
const LOST = "The browser took the graphics context away, usually because memory ran short.";
const NO_WEBGL = "This browser shows no WebGL 2, which the 3D view needs. Try another browser or turn on graphics acceleration.";

/** Splat counts this machine can draw at once. A software renderer takes 30 µs per splat, a real one is 1000 times faster. */
function splatBudget(gl) {
  const info = gl.getExtension("WEBGL_debug_renderer_info");
  const name = info ? gl.getParameter(info.UNMASKED_RENDERER_WEBGL) : "";
  return /swiftshader|llvmpipe|software/i.test(name) ? { lodAbove: 50_000, lodSplatCount: 20_000 } : { lodAbove: 300_000 };
}

class Viewer {
  constructor(host, notify) {
    this.notify = notify;
    this.panel = new Panel(host);
    this.disposed = false;
    this.frames = 0;
    this.value = null;
    this.scene = null;
    this.path = null;
    this.loading = null;
    this.moved = false;
    this.playback = new Playback();
    this.timer = new Timer();
    this.#makeRenderer();
    this.world = new Group();
    this.world.quaternion.copy(OPENCV_WORLD);
    this.root = new Scene().add(this.world, this.spark);
    this.camera = new PerspectiveCamera(60, 16 / 9);
    const { canvas, joystick } = this.panel;
    const onUser = () => this.#userMoved();
    this.controls = new Controls({ camera: this.camera, canvas, joystick, onChange: () => this.requestFrame(), onUser });
    this.#goToStart();
    this.#wire();
  }

  /** Show a new value; a scene that is on screen already is kept. */
  async show(value) {
    const before = this.value;
    this.value = value;
    const sameScene = before && drawingOf(before) === drawingOf(value) && this.state !== "error";
    const sameStart = JSON.stringify(startOf(before)) === JSON.stringify(startOf(value));
    this.#showPath(value.path);
    if (!sameScene) await this.#load(value);
    else if (!value.keep_view && !(sameStart && this.moved)) this.#goToStart();
    this.#describe();
    this.requestFrame();
  }

  requestFrame() {
    if (this.pending || this.disposed) return;
    this.pending = requestAnimationFrame((timestamp) => {
      this.pending = 0;
      this.#step(timestamp);
    });
  }

  /** Draw and read the picture back in the same task, as WebGL keeps it no longer: for tests. */
  probe() {
    this.#draw();
    const gl = this.renderer.getContext();
    const [width, height] = [gl.drawingBufferWidth, gl.drawingBufferHeight];
    const pixels = new Uint8Array(4 * width * height);
    gl.readPixels(0, 0, width, height, gl.RGBA, gl.UNSIGNED_BYTE, pixels);
    const colours = new Set();
    for (let at = 0; at < pixels.length; at += 4) {
      colours.add(((pixels[at] >> 4) << 8) | ((pixels[at + 1] >> 4) << 4) | (pixels[at + 2] >> 4));
    }
    const middle = 4 * ((height >> 1) * width + (width >> 1));
    const { kind = "none", count = 0 } = this.scene ?? {};
    return {
      kind,
      splats: kind === "splats" ? count : 0,
      points: kind === "points" ? count : 0,
      triangles: kind === "mesh" ? count : 0,
      drawnSplats: this.spark.activeSplats,
      distinctColours: colours.size,
      frames: this.frames,
      centre: [...pixels.subarray(middle, middle + 3)],
    };
  }

  /** Where the viewer's eye is: row-major w2c in OpenCV axes and the vertical field of view in degrees. */
  view() {
    this.camera.updateMatrixWorld();
    return { w2c: w2cFromCameraMatrix(this.camera.matrixWorld), fov: this.camera.fov };
  }

  dispose(message = "") {
    this.disposed = true;
    this.loading?.abort();
    cancelAnimationFrame(this.pending);
    this.observers.forEach((observer) => observer.disconnect());
    this.controls.dispose();
    this.path?.dispose();
    this.scene?.dispose();
    this.spark.dispose();
    this.renderer.dispose();
    this.renderer.forceContextLoss();
    this.panel.setState("error", "none", message);
    this.panel.setMessage(message, true);
  }

  #makeRenderer() {
    // Antialiasing costs splats much and shows them no better, says Spark.
    this.renderer = new WebGLRenderer({ canvas: this.panel.canvas, antialias: false, powerPreference: "high-performance" });
    const { lodAbove, lodSplatCount } = splatBudget(this.renderer.getContext());
    this.lodAbove = lodAbove;
    this.spark = new SparkRenderer({ renderer: this.renderer, lodSplatCount, onDirty: () => this.requestFrame() });
  }

  #wire() {
    const { panel } = this;
    panel.wire({
      orbit: () => this.#setMode("orbit"),
      walk: () => this.#setMode("walk"),
      reset: () => this.#reset(),
      play: () => (this.playback.playing ? this.#stop() : this.#play()),
      path: () => this.#togglePath(),
      fullscreen: () => (document.fullscreenElement ? document.exitFullscreen() : panel.host.requestFullscreen()),
      screenshot: () => this.#screenshot(),
    });
    panel.canvas.addEventListener("webglcontextlost", () => this.disposed || this.dispose(LOST));
    const resize = new ResizeObserver(() => this.#resize());
    resize.observe(panel.stage);
    const theme = new MutationObserver(() => this.#paintBackground());
    for (const element of [document.documentElement, document.body]) theme.observe(element, { attributeFilter: ["class"] });
    this.observers = [resize, theme];
    this.#paintBackground();
    this.#resize();
  }

  #paintBackground() {
    const [r, g, b] = this.panel.backgroundColour();
    this.renderer.setClearColor(new Color().setRGB(r / 255, g / 255, b / 255, SRGBColorSpace));
    this.requestFrame();
  }

  #resize() {
    const { clientWidth: width, clientHeight: height } = this.panel.canvas;
    if (width === 0 || height === 0) return; // In a hidden tab.
    this.renderer.setPixelRatio(Math.min(devicePixelRatio, 2));
    this.renderer.setSize(width, height, false);
    this.camera.aspect = width / height;
    this.camera.fov = verticalFov(this.value?.path ?? FIRST_POSE, this.camera.aspect);
    this.camera.updateProjectionMatrix();
    this.#draw(); // At once: resizing has cleared the canvas.
  }

  #step(timestamp) {
    this.timer.update(timestamp);
    const seconds = this.stepping ? Math.min(this.timer.getDelta(), 0.1) : 1 / 60;
    if (this.playback.playing) this.#follow(timestamp);
    this.stepping = this.controls.step(seconds) || this.playback.playing;
    this.#draw();
    if (this.stepping) this.requestFrame();
  }

  #draw() {
    if (this.disposed || !this.panel.canvas.clientWidth) return;
    this.path?.hideAround(this.camera.position);
    this.renderer.render(this.root, this.camera);
    this.frames += 1;
    if (this.state === "loading" && this.scene && !this.loading && this.scene.drawn()) this.#loaded();
  }

  async #load({ scene, keep_view: keepView }) {
    this.loading?.abort();
    if (!scene) {
      this.loading = null;
      this.#replaceScene(null);
      this.#setState("empty");
      return this.#goToStart();
    }
    const loading = (this.loading = new AbortController());
    this.#setState("loading");
    if (!this.scene) this.#goToStart();
    const { spark, lodAbove, panel } = this;
    const { file, kind, wireframe } = scene;
    const onProgress = (fraction) => panel.setProgress(fraction);
    try {
      const { signal } = loading;
      const loaded = await loadScene({ url: file.url, kind, wireframe, spark, lodAbove, signal, onProgress });
      const first = !this.scene;
      this.#replaceScene(loaded);
      if (!keepView || first) this.#goToStart();
      this.loading = null;
    } catch (error) {
      if (loading.signal.aborted) return;
      this.loading = null;
      this.#fail(`The scene could not be shown: ${error.message ?? error}.`);
    }
  }

  #replaceScene(scene) {
    this.scene?.object.removeFromParent();
    this.scene?.dispose();
    this.scene = scene;
    if (scene) this.world.add(scene.object);
  }

  #loaded() {
    this.#setState("loaded");
    this.notify("viewer_loaded", { kind: this.scene.kind, count: this.scene.count });
  }

  #fail(message) {
    this.#replaceScene(null);
    this.#setState("error");
    this.panel.setState("error", "none", message);
    this.panel.setMessage(message);
    this.notify("viewer_error", { message });
  }

  #setState(state) {
    this.state = state;
    this.#describe();
  }

  /** Status line and message for the present state. An error keeps the words `#fail` gave it. */
  #describe() {
    if (this.state === "error") return;
    const count = (this.scene?.count ?? 0).toLocaleString("en-US");
    const kind = this.value?.scene?.kind ?? "none";
    const poses = this.path ? `camera path of ${this.path.poses.length} poses` : "";
    const words = { loading: "loading…", loaded: `${count} ${kind === "mesh" ? "triangles" : kind}`, empty: poses || "nothing to show yet" };
    this.panel.setState(this.state, kind, words[this.state]);
    this.panel.setMessage(this.state === "empty" && !this.path ? "Your world will appear here." : "");
    for (const name of ["reset", "screenshot"]) this.panel.enable(name, Boolean(this.scene || this.path));
    this.panel.enable("path", Boolean(this.path));
    this.panel.enable("play", (this.path?.seconds ?? 0) > 0);
  }

  #showPath(path) {
    this.#stop();
    this.path?.dispose();
    this.path = path ? new CameraPath(path) : null;
    if (!path) return;
    this.path.group.visible = this.panel.buttons.path.getAttribute("aria-pressed") === "true";
    this.world.add(this.path.group);
    this.#fitToScene();
  }

  /** Sizes that depend on how far away things are: pivot, clipping planes, walking speed, drawn cameras, point footprint. */
  #fitToScene() {
    const start = startOf(this.value);
    const eye = poseFromW2c(start.w2c);
    const probe = this.camera.clone();
    probe.position.copy(eye.position);
    probe.quaternion.copy(eye.quaternion);
    const extent = this.path?.extent ?? 0;
    const depth = (this.scene && medianDepth(this.scene, probe)) || 2 * extent || 2;
    this.controls.pivot = depth;
    this.camera.near = depth / 200;
    this.camera.far = depth * 2000;
    this.camera.fov = verticalFov(start, this.camera.aspect);
    this.camera.updateProjectionMatrix();
    this.path?.resize(Math.min(0.04 * depth, Math.max(0.012 * depth, extent / 10)));
    if (this.scene?.kind === "points" && this.path) {
      setPointCamera(this.scene.object, new Vector3().copy(eye.position).applyQuaternion(OPENCV_WORLD), this.path.path);
    }
  }

  #goToStart() {
    this.#stop();
    this.#fitToScene();
    this.controls.place(this.#homePose());
    this.path?.moveGhost(this.path.start);
    this.moved = false;
  }

  /** Where the eye starts: the path's start camera, or a place behind and above it from which the path is seen. */
  #homePose() {
    const start = poseFromW2c(startOf(this.value).w2c);
    if (!startOf(this.value).overview) return start;
    const depth = this.controls.pivot;
    const reach = Math.max(this.path.extent, 0.15 * depth);
    const away = new Vector3(0.5 * reach, 0.6 * reach, 1.3 * reach).applyQuaternion(start.quaternion);
    const position = start.position.clone().add(away);
    const target = new Vector3(0, 0, -0.7 * depth).applyQuaternion(start.quaternion).add(start.position);
    const up = new Vector3(0, 1, 0).applyQuaternion(start.quaternion);
    const quaternion = new Quaternion().setFromRotationMatrix(new Matrix4().lookAt(position, target, up));
    return { position, quaternion };
  }

  #userMoved() {
    this.moved = true;
    this.#stop();
  }

  #reset() {
    this.#goToStart();
    this.requestFrame();
  }

  #setMode(mode) {
    this.#stop();
    this.controls.setMode(mode);
    this.panel.setMode(mode);
    this.panel.canvas.focus({ preventScroll: true });
  }

  #play() {
    this.playback.start(this.path, performance.now());
    this.path.group.visible = false; // Seen from inside, the path would only be in the way.
    this.moved = true;
    this.panel.setPlaying(true);
    this.requestFrame();
  }

  #follow(now) {
    const pose = this.playback.pose(Math.max(now, this.playback.began));
    this.controls.place(pose);
    this.path.moveGhost(pose);
    if (!this.playback.playing) this.#stop();
  }

  #stop() {
    this.playback.stop();
    this.panel.setPlaying(false);
    if (this.path) this.path.group.visible = this.panel.buttons.path.getAttribute("aria-pressed") === "true";
  }

  #togglePath() {
    this.#stop();
    this.path.group.visible = !this.path.group.visible;
    this.panel.press("path", this.path.group.visible);
    this.requestFrame();
  }

  #screenshot() {
    this.#draw(); // In the same task as toBlob, or the picture would be empty.
    this.panel.canvas.toBlob((blob) => {
      const link = Object.assign(document.createElement("a"), { href: URL.createObjectURL(blob), download: "lyra-view.png" });
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
    });
  }
}

/** What of a value decides whether a scene on screen has to be loaded again. */
const drawingOf = ({ scene }) => JSON.stringify(scene && [scene.file.url, scene.kind, scene.wireframe]);

/** Camera the viewer starts from: `{w2c, fy, height, width, overview}`. */
function startOf(value) {
  const path = value?.path;
  if (!path) return FIRST_POSE;
  const { fy, height, width, overview } = path;
  return { w2c: path.w2c[path.start_pose], fy, height, width, overview };
}

let mounted = null; // A page has one WebGL context for this viewer: a later mount takes it over.

/** Called by the component's `js_on_load`: builds the viewer in `element` and shows `props.value` now and when it changes. */
export function mount({ element, props, trigger, watch }) {
  const host = element.querySelector(".lyra-viewer");
  const start = () => {
    if (mounted && !mounted.disposed) mounted.dispose("The 3D view is open elsewhere on this page.");
    try {
      mounted = new Viewer(host, trigger);
    } catch (error) {
      console.error(error);
      const panel = new Panel(host);
      panel.setState("error", "none", NO_WEBGL);
      panel.setMessage(NO_WEBGL);
      return trigger("viewer_error", { message: NO_WEBGL });
    }
    host.lyraViewer = mounted;
    mounted.panel.wire({ restart: start });
    mounted.show(props.value);
  };
  watch("value", () => host.lyraViewer?.disposed === false && host.lyraViewer.show(props.value));
  start();
}
