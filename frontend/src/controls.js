// How mouse, touch and keyboard move the camera: orbit around a pivot, or walk.
// Knows no scene and no path; keys count only while the canvas has the focus, so typing elsewhere moves nothing.

import { Euler, MathUtils, Quaternion, Spherical, Vector3 } from "three";
import { OrbitControls } from "three/addons/controls/OrbitControls.js";

const UP = new Vector3(0, 1, 0);
const TURN_PER_SECOND = 1.1;
const WALK = {
  KeyW: [0, 0, -1], KeyS: [0, 0, 1], ArrowUp: [0, 0, -1], ArrowDown: [0, 0, 1],
  KeyA: [-1, 0, 0], KeyD: [1, 0, 0], KeyQ: [0, -1, 0], KeyE: [0, 1, 0],
};
const WALK_TURN = { ArrowLeft: [1, 0], ArrowRight: [-1, 0], PageUp: [0, 1], PageDown: [0, -1] };
const ORBIT_TURN = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
const ORBIT_ZOOM = { Equal: -1, NumpadAdd: -1, Minus: 1, NumpadSubtract: 1 };
const FAST = ["ShiftLeft", "ShiftRight"];

/** A round pad for the thumb: `vector` is its displacement, x right and y down, at most 1 long. */
class Joystick {
  constructor(element, onChange) {
    this.vector = { x: 0, y: 0 };
    const knob = element.firstElementChild;
    const set = (x, y) => {
      this.vector = { x, y };
      knob.style.transform = `translate(${x * 60}%, ${y * 60}%)`;
      onChange();
    };
    const follow = (event) => {
      if (!element.hasPointerCapture(event.pointerId)) return;
      const box = element.getBoundingClientRect();
      const x = (2 * (event.clientX - box.left)) / box.width - 1;
      const y = (2 * (event.clientY - box.top)) / box.height - 1;
      const length = Math.max(1, Math.hypot(x, y));
      set(x / length, y / length);
    };
    element.addEventListener("pointerdown", (event) => {
      element.setPointerCapture(event.pointerId);
      follow(event);
    });
    element.addEventListener("pointermove", follow);
    for (const name of ["pointerup", "pointercancel"]) element.addEventListener(name, () => set(0, 0));
  }
}

/** Moves `camera`; `onChange` asks for frames, `onUser` tells that a person took over. */
export class Controls {
  constructor({ camera, canvas, joystick, onChange, onUser }) {
    this.camera = camera;
    this.canvas = canvas;
    this.onChange = onChange;
    this.onUser = onUser;
    this.mode = "orbit";
    this.pivot = 2;
    this.keys = new Set();
    this.joystick = new Joystick(joystick, () => this.#moved());
    this.orbit = new OrbitControls(camera, canvas);
    this.orbit.rotateSpeed = 0.5; // Half a turn per canvas height: one stands in a scene, an object would take a whole one.
    this.orbit.enableZoom = false; // Until the canvas has the focus: a page scrolled past the view should not zoom it.
    this.orbit.addEventListener("change", () => this.onChange());
    this.orbit.addEventListener("start", () => this.onUser());
    this.#listen();
  }

  /** "orbit" or "walk". */
  setMode(mode) {
    this.mode = mode;
    this.orbit.enabled = mode === "orbit";
    this.keys.clear();
    this.#aim();
  }

  /** Put the camera at a pose exactly, roll included; `pivot` (scene units ahead) becomes the centre to orbit around. */
  place({ position, quaternion }, pivot = this.pivot) {
    this.pivot = pivot;
    this.camera.position.copy(position);
    this.camera.quaternion.copy(quaternion);
    this.#aim();
    this.onChange();
  }

  /** Move by what is held down for `seconds`; true while anything is. */
  step(seconds) {
    return this.mode === "walk" ? this.#walk(seconds) : this.#orbitByKeys(seconds);
  }

  dispose() {
    this.orbit.dispose();
  }

  #aim() {
    const ahead = new Vector3(0, 0, -this.pivot).applyQuaternion(this.camera.quaternion);
    this.orbit.target.copy(this.camera.position).add(ahead);
  }

  #moved() {
    this.onUser();
    this.onChange();
  }

  #listen() {
    const { canvas, keys, orbit } = this;
    canvas.addEventListener("focus", () => (orbit.enableZoom = true));
    canvas.addEventListener("blur", () => {
      orbit.enableZoom = false;
      keys.clear();
    });
    canvas.addEventListener("keydown", (event) => {
      const known = this.mode === "walk" ? [WALK, WALK_TURN] : [ORBIT_TURN, ORBIT_ZOOM];
      if (event.ctrlKey || event.metaKey || event.altKey) return;
      if (FAST.includes(event.code)) keys.add(event.code);
      if (!known.some((table) => event.code in table)) return;
      event.preventDefault();
      keys.add(event.code);
      this.#moved();
    });
    canvas.addEventListener("keyup", (event) => keys.delete(event.code));
    let last = null; // The latest event of the pointer that looks around; another finger may be on the joystick.
    canvas.addEventListener("pointerdown", (event) => {
      canvas.focus({ preventScroll: true });
      if (this.mode !== "walk" || last) return;
      canvas.setPointerCapture(event.pointerId);
      last = event;
    });
    canvas.addEventListener("pointermove", (event) => {
      if (event.pointerId !== last?.pointerId) return;
      this.#lookBy(event.clientX - last.clientX, event.clientY - last.clientY);
      last = event;
    });
    canvas.addEventListener("lostpointercapture", (event) => {
      if (event.pointerId === last?.pointerId) last = null;
    });
    canvas.addEventListener("wheel", (event) => {
      if (this.mode !== "walk" || !orbit.enableZoom) return;
      event.preventDefault();
      this.camera.translateZ(Math.sign(event.deltaY) * 0.05 * this.pivot);
      this.#moved();
    }, { passive: false });
  }

  /** Turn so that the picture follows the pointer. */
  #lookBy(dx, dy) {
    const perPixel = MathUtils.degToRad(this.camera.fov) / this.canvas.clientHeight;
    this.#turn(dx * perPixel, dy * perPixel);
    this.#moved();
  }

  #turn(yaw, pitch) {
    const angles = new Euler().setFromQuaternion(this.camera.quaternion, "YXZ");
    angles.y += yaw;
    angles.x = MathUtils.clamp(angles.x + pitch, -1.5, 1.5);
    this.camera.quaternion.setFromEuler(angles);
  }

  #walk(seconds) {
    const { x, y } = this.joystick.vector;
    const move = new Vector3(x, 0, y);
    const turn = [0, 0];
    for (const key of this.keys) {
      if (key in WALK) move.add(new Vector3(...WALK[key]));
      if (key in WALK_TURN) turn.forEach((_, axis) => (turn[axis] += WALK_TURN[key][axis]));
    }
    const heading = new Euler().setFromQuaternion(this.camera.quaternion, "YXZ").y;
    const speed = 0.4 * this.pivot * (this.#fast() ? 3 : 1);
    move.clampLength(0, 1).multiplyScalar(speed * seconds);
    this.camera.position.add(move.applyQuaternion(new Quaternion().setFromAxisAngle(UP, heading)));
    if (turn[0] || turn[1]) this.#turn(turn[0] * TURN_PER_SECOND * seconds, turn[1] * TURN_PER_SECOND * seconds);
    return move.lengthSq() > 0 || turn[0] !== 0 || turn[1] !== 0;
  }

  #orbitByKeys(seconds) {
    const { camera, orbit } = this;
    const offset = new Spherical().setFromVector3(camera.position.clone().sub(orbit.target));
    const rate = TURN_PER_SECOND * seconds * (this.#fast() ? 3 : 1);
    let held = false;
    for (const key of this.keys) {
      const [theta, phi] = ORBIT_TURN[key] ?? [0, 0];
      offset.theta += theta * rate;
      offset.phi += phi * rate;
      offset.radius *= Math.exp((ORBIT_ZOOM[key] ?? 0) * rate);
      held ||= key in ORBIT_TURN || key in ORBIT_ZOOM;
    }
    if (!held) return false;
    camera.position.setFromSpherical(offset.makeSafe()).add(orbit.target);
    orbit.update();
    return true;
  }

  #fast() {
    return FAST.some((key) => this.keys.has(key));
  }
}
