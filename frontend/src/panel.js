// What the viewer looks like around its picture: canvas, buttons, status line and messages.
// Knows no three.js and decides nothing; viewer.js wires its parts. Lives in a shadow root, so that Gradio's style sheets
// and re-rendering leave it alone while Gradio's theme variables still reach it.

import css from "./viewer.css";

const ICONS = {
  orbit: "M12 12m-3 0a3 3 0 1 0 6 0a3 3 0 1 0-6 0M3 12c0-3 4-5 9-5s9 2 9 5-4 5-9 5",
  walk: "M13 4.5m-1.5 0a1.5 1.5 0 1 0 3 0a1.5 1.5 0 1 0-3 0M8 21l3-6-1-6 3 1 2 3 3 1M10 9l-3 2-1 3M11 15l4 2 1 4",
  reset: "M4 12a8 8 0 1 0 3-6.2M4 4v4.5h4.5",
  play: "M7 5l12 7-12 7z",
  stop: "M7 7h10v10H7z",
  path: "M5 19m-2 0a2 2 0 1 0 4 0a2 2 0 1 0-4 0M19 5m-2 0a2 2 0 1 0 4 0a2 2 0 1 0-4 0M7 19h8a3.5 3.5 0 0 0 0-7H9a3.5 3.5 0 0 1 0-7h8",
  fullscreen: "M4 9V4h5M20 9V4h-5M4 15v5h5M20 15v5h-5",
  screenshot: "M4 8h3l2-3h6l2 3h3v11H4zM12 13m-3.5 0a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0-7 0",
};

const icon = (name) => `<svg viewBox="0 0 24 24" aria-hidden="true"><path d="${ICONS[name]}"/></svg>`;
const button = (name, label, extra = "") =>
  `<button type="button" data-do="${name}" aria-label="${label}" title="${label}" ${extra}>${icon(name)}<span>${label}</span></button>`;

const MARKUP = `
  <div class="stage">
    <canvas tabindex="0" role="application" aria-label="3D view" aria-describedby="hint"></canvas>
    <div class="progress" hidden><div></div></div>
    <div class="joystick" aria-hidden="true" hidden><div></div></div>
    <div class="message"><p></p><button type="button" data-do="restart" hidden>Restart the view</button></div>
  </div>
  <div class="bar">
    <div class="group" role="group" aria-label="How to move">
      ${button("orbit", "Orbit", 'aria-pressed="true"')}${button("walk", "Walk", 'aria-pressed="false"')}
    </div>
    ${button("reset", "Reset view")}
    ${button("play", "Play path")}
    ${button("path", "Show path", 'aria-pressed="true"')}
    <div class="push"></div>
    ${button("screenshot", "Screenshot")}
    ${button("fullscreen", "Fullscreen")}
  </div>
  <div class="foot">
    <span role="status"></span>
    <span id="hint"></span>
  </div>`;

const HINTS = matchMedia("(pointer: coarse)").matches
  ? { orbit: "Drag to orbit, pinch to zoom, two fingers to pan.", walk: "Drag to look, use the pad to walk." }
  : {
      orbit: "Drag to orbit, right-drag to pan. After a click: wheel or + − to zoom, arrow keys to orbit.",
      walk: "Drag to look. After a click: W A S D or arrow keys to walk, Q E down and up, Shift for speed.",
    };

export class Panel {
  constructor(host) {
    this.host = host;
    this.root = host.shadowRoot ?? host.attachShadow({ mode: "open" });
    this.root.innerHTML = `<style>${css}</style>${MARKUP}`;
    this.stage = this.root.querySelector(".stage");
    this.canvas = this.root.querySelector("canvas");
    this.joystick = this.root.querySelector(".joystick");
    this.buttons = Object.fromEntries([...this.root.querySelectorAll("[data-do]")].map((b) => [b.dataset.do, b]));
    this.buttons.fullscreen.hidden = !document.fullscreenEnabled;
    this.setMode("orbit");
  }

  /** Call `actions[name]()` when the button of that name is pressed. */
  wire(actions) {
    for (const [name, action] of Object.entries(actions)) this.buttons[name].addEventListener("click", action);
  }

  /** What the viewer shows ("splats", "points", "mesh" or "none") and how far it is ("empty", "loading", "loaded", "error"). */
  setState(state, kind, status) {
    this.host.dataset.state = state;
    this.host.dataset.kind = kind;
    this.root.querySelector("[role=status]").textContent = status;
    this.root.querySelector(".progress").hidden = state !== "loading";
    if (state !== "loading") this.setProgress(0);
  }

  /** Part of the file that has arrived, 0 to 1. */
  setProgress(fraction) {
    this.root.querySelector(".progress div").style.width = `${100 * fraction}%`;
  }

  /** A sentence in the middle of the picture; none if empty. */
  setMessage(text, restart = false) {
    this.root.querySelector(".message p").textContent = text;
    this.root.querySelector(".message").hidden = !text;
    this.buttons.restart.hidden = !restart;
  }

  setMode(mode) {
    this.press("orbit", mode === "orbit");
    this.press("walk", mode === "walk");
    this.joystick.hidden = mode !== "walk";
    this.root.querySelector("#hint").textContent = HINTS[mode];
  }

  press(name, on) {
    this.buttons[name].setAttribute("aria-pressed", on);
  }

  setPlaying(playing) {
    const label = playing ? "Stop" : "Play path";
    const { play } = this.buttons;
    play.innerHTML = `${icon(playing ? "stop" : "play")}<span>${label}</span>`;
    play.setAttribute("aria-label", label);
    play.title = label;
  }

  enable(name, on) {
    this.buttons[name].disabled = !on;
  }

  /** The theme's colour behind the picture, as `[r, g, b]` of 0 to 255, whatever CSS notation the theme uses. */
  backgroundColour() {
    const brush = new OffscreenCanvas(1, 1).getContext("2d");
    brush.fillStyle = getComputedStyle(this.stage).backgroundColor;
    brush.fillRect(0, 0, 1, 1);
    return [...brush.getImageData(0, 0, 1, 1).data.subarray(0, 3)];
  }
}
