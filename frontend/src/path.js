// What a camera path looks like in the world, and where a camera that walks it is at a given second.
// Knows no scene, no controls and no page.

import {
  BufferAttribute, BufferGeometry, Color, DoubleSide, Group, Matrix4, Mesh, MeshBasicMaterial, Quaternion, Vector3,
} from "three";
import { Line2 } from "three/addons/lines/Line2.js";
import { LineGeometry } from "three/addons/lines/LineGeometry.js";
import { LineMaterial } from "three/addons/lines/LineMaterial.js";
import { LineSegments2 } from "three/addons/lines/LineSegments2.js";
import { LineSegmentsGeometry } from "three/addons/lines/LineSegmentsGeometry.js";
import { OPENCV_WORLD, poseFromW2c } from "./coordinates.js";

const PATH_COLOUR = "#38bdf8";
const GHOST_COLOUR = "#f59e0b";
const MOST_FRUSTA = 9;

/** Corners of a camera of depth 1, in OpenCV axes: apex first, then the picture's corners clockwise, then its "up" tip. */
function frustumCorners({ fy, height, width }) {
  const x = width / (2 * fy);
  const y = height / (2 * fy);
  return [[0, 0, 0], [-x, -y, 1], [x, -y, 1], [x, y, 1], [-x, y, 1], [0, -1.45 * y, 1]];
}

function frustumLines(corners) {
  const edges = [[0, 1], [0, 2], [0, 3], [0, 4], [1, 2], [2, 3], [3, 4], [4, 1], [1, 5], [5, 2]];
  return new LineSegmentsGeometry().setPositions(edges.flatMap(([a, b]) => [...corners[a], ...corners[b]]));
}

function pictureFace(corners) {
  const geometry = new BufferGeometry();
  geometry.setAttribute("position", new BufferAttribute(new Float32Array(corners.slice(1, 5).flat()), 3));
  geometry.setIndex([0, 1, 2, 0, 2, 3]);
  return geometry;
}

/** Line, frusta and ghost camera of one path. Add `group` to the turned (OpenCV) world. */
export class CameraPath {
  constructor(path) {
    this.path = path;
    this.poses = path.w2c.map(poseFromW2c);
    this.size = 0.1;
    this.group = new Group();
    this.frusta = [];
    this.colours = path.colours ?? path.w2c.map(() => PATH_COLOUR);
    const corners = frustumCorners(path);
    this.lines = frustumLines(corners);
    this.#addLine();
    const step = Math.max(1, Math.ceil(path.w2c.length / MOST_FRUSTA));
    for (let index = 0; index < path.w2c.length; index += step) this.#addFrustum(index);
    this.ghost = this.#camera(GHOST_COLOUR, 3);
    const face = new MeshBasicMaterial({ color: GHOST_COLOUR, transparent: true, opacity: 0.25, side: DoubleSide, depthWrite: false });
    this.ghost.add(new Mesh(pictureFace(corners), face));
    this.group.add(this.ghost);
    this.moveGhost(this.poses[path.start_pose]);
  }

  /** Seconds a walk along the whole path takes. */
  get seconds() {
    const { frames, fps } = this.path;
    return (frames.at(-1) - frames[0]) / fps;
  }

  /** Longest distance between the first camera and any other. */
  get extent() {
    return Math.max(...this.poses.map(({ position }) => position.distanceTo(this.poses[0].position)));
  }

  get start() {
    return this.poses[this.path.start_pose];
  }

  /** Second at which the start pose is passed. */
  get startSecond() {
    const { frames, fps, start_pose } = this.path;
    return (frames[start_pose] - frames[0]) / fps;
  }

  /** Camera pose `second` seconds into the walk: straight between positions, slerp between orientations. */
  poseAt(second) {
    const { frames, fps } = this.path;
    const frame = frames[0] + second * fps;
    const next = frames.findIndex((value) => value > frame);
    if (next <= 0) return this.poses.at(next); // Before the first pose, or (-1) after the last.
    const part = (frame - frames[next - 1]) / (frames[next] - frames[next - 1]);
    const [a, b] = [this.poses[next - 1], this.poses[next]];
    return {
      position: new Vector3().lerpVectors(a.position, b.position, part),
      quaternion: new Quaternion().slerpQuaternions(a.quaternion, b.quaternion, part),
    };
  }

  moveGhost(pose) {
    this.#place(this.ghost, pose);
  }

  /** Depth of the drawn cameras, in scene units. */
  resize(size) {
    this.size = size;
    for (const frustum of this.frusta) frustum.scale.setScalar(size);
    this.ghost.scale.setScalar(1.7 * size);
  }

  /** Leave out the cameras so close to the viewer's eye that they would fill the picture. */
  hideAround(eye) {
    for (const camera of [...this.frusta, this.ghost]) {
      camera.visible = eye.distanceTo(camera.userData.position) > 4 * this.size;
    }
  }

  dispose() {
    this.group.removeFromParent();
    this.group.traverse((object) => {
      object.geometry?.dispose();
      object.material?.dispose();
    });
  }

  #addLine() {
    if (this.poses.length < 2) return;
    const toOpenCv = ({ position }) => position.clone().applyQuaternion(OPENCV_WORLD).toArray();
    const geometry = new LineGeometry();
    geometry.setPositions(this.poses.flatMap(toOpenCv));
    geometry.setColors(this.colours.flatMap((colour) => new Color(colour).toArray()));
    this.group.add(new Line2(geometry, this.#material({ vertexColors: true, linewidth: 3.5 })));
  }

  #addFrustum(index) {
    const frustum = this.#camera(this.colours[index], 1.5);
    this.#place(frustum, this.poses[index]);
    this.frusta.push(frustum);
    this.group.add(frustum);
  }

  #camera(colour, linewidth) {
    return new LineSegments2(this.lines, this.#material({ color: colour, linewidth }));
  }

  /** An overview shows the path through whatever is before it, so that poses inside the scene are seen. */
  #material(options) {
    return new LineMaterial({ ...options, depthTest: !this.path.overview, transparent: Boolean(this.path.overview) });
  }

  #place(camera, { position, quaternion }) {
    const matrix = new Matrix4().compose(position, quaternion, new Vector3(1, 1, 1));
    const flip = new Matrix4().makeRotationFromQuaternion(OPENCV_WORLD);
    const scale = camera.scale.clone();
    matrix.premultiply(flip).multiply(flip).decompose(camera.position, camera.quaternion, new Vector3());
    camera.scale.copy(scale);
    camera.userData.position = position;
  }
}

/** A walk along a path by the wall clock, so that slow drawing drops frames and does not stretch the walk. */
export class Playback {
  constructor() {
    this.path = null;
  }

  get playing() {
    return this.path !== null;
  }

  start(path, now) {
    this.path = path;
    this.began = now;
  }

  stop() {
    this.path = null;
  }

  /** The pose to show at `now` (milliseconds); stops itself at the path's end. */
  pose(now) {
    const { path } = this;
    const second = (now - this.began) / 1000;
    if (second >= path.seconds) this.stop();
    return path.poseAt(Math.min(second, path.seconds));
  }
}
