// The maths of axes, fields of view and playback, without a browser: `npm test`.

import assert from "node:assert/strict";
import test from "node:test";
import { Vector3 } from "three";
import { cameraMatrixFromW2c, verticalFov, w2cFromCameraMatrix } from "../src/coordinates.js";
import { CameraPath, Playback } from "../src/path.js";

const QUARTER_TURN = [0, 0, 1, -2, 0, 1, 0, 3, -1, 0, 0, 5, 0, 0, 0, 1];
const at = (x) => [1, 0, 0, -x, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1];
const near = (a, b) => a.forEach((value, i) => assert.ok(Math.abs(value - b[i]) < 1e-6, `${a} is not ${b}`));

test("a pose survives the way to three.js and back", () => {
  near(w2cFromCameraMatrix(cameraMatrixFromW2c(QUARTER_TURN)), QUARTER_TURN);
});

test("what OpenCV sees ahead, right and below, three.js sees at -z, +x and -y", () => {
  const camera = cameraMatrixFromW2c(at(0)).invert();
  const world = new Vector3(1, 2, 3).multiply(new Vector3(1, -1, -1)); // An OpenCV point in three.js axes.
  near(world.applyMatrix4(camera).toArray(), [1, -2, -3]);
});

test("the whole picture stays in view on canvases of any shape", () => {
  const picture = { fy: 100, height: 200, width: 300 };
  assert.equal(verticalFov(picture, 2), 90);
  const horizontal = Math.tan((verticalFov(picture, 0.5) * Math.PI) / 360) * 0.5;
  assert.ok(Math.abs(horizontal - 1.5) < 1e-9);
});

test("playback follows frame numbers, not pose numbers, and stops at the end", () => {
  const path = new CameraPath({ w2c: [at(0), at(1), at(2)], frames: [0, 10, 40], fps: 10, fy: 1, height: 1, width: 1, start_pose: 0 });
  const walk = new Playback();
  walk.start(path, 1000);
  near(walk.pose(1500).position.toArray(), [0.5, 0, 0]);
  near(walk.pose(3500).position.toArray(), [1.5, 0, 0]);
  assert.ok(walk.playing);
  near(walk.pose(9000).position.toArray(), [2, 0, 0]);
  assert.ok(!walk.playing);
});
