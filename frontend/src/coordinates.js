// How OpenCV cameras and worlds become three.js ones, and back. Knows no scene, no DOM and no controls.
//
// OpenCV: x right, y down, z forward; `w2c` is world-to-camera, 16 numbers row by row. three.js: x right, y up, the
// camera looks along -z. Both differ by F = diag(1, -1, -1, 1), a turn by pi about x, which is its own inverse, so
// three.matrixWorld = F · c2w · F. Objects that keep OpenCV coordinates live in a group turned by OPENCV_WORLD.

import { MathUtils, Matrix4, Quaternion, Vector3 } from "three";

export const OPENCV_WORLD = new Quaternion(1, 0, 0, 0);

const FLIP = new Matrix4().makeScale(1, -1, -1);

/** Row-major w2c in OpenCV axes → the three.js camera's matrixWorld. */
export function cameraMatrixFromW2c(w2c) {
  return new Matrix4().set(...w2c).invert().premultiply(FLIP).multiply(FLIP);
}

/** A three.js matrixWorld → row-major w2c in OpenCV axes. */
export function w2cFromCameraMatrix(matrixWorld) {
  return new Matrix4().copy(matrixWorld).premultiply(FLIP).multiply(FLIP).invert().transpose().toArray();
}

/** Position and orientation of one pose: `{position, quaternion}` in three.js axes. */
export function poseFromW2c(w2c) {
  const pose = { position: new Vector3(), quaternion: new Quaternion() };
  cameraMatrixFromW2c(w2c).decompose(pose.position, pose.quaternion, new Vector3());
  return pose;
}

/**
 * Vertical field of view in degrees that shows the whole picture of a pinhole camera.
 * 2·atan(H / 2fy) where the canvas is at least as wide as the picture; wider where it is narrower, so that the picture's
 * left and right edges stay in view.
 */
export function verticalFov({ fy, height, width }, canvasAspect) {
  const widen = Math.max(1, width / height / canvasAspect);
  return MathUtils.radToDeg(2 * Math.atan((height / (2 * fy)) * widen));
}
