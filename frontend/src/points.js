// How a coloured point cloud file becomes THREE.Points. Knows nothing of splats, networks or the page.
//
// The one accepted layout is the binary PLY that `lyra.ui.viewer.write_points` writes: per point little-endian float32
// x y z (OpenCV axes) and uint8 red green blue, 15 bytes, nothing else.

import { BufferAttribute, BufferGeometry, Points, ShaderMaterial, Vector3 } from "three";

const BYTES_PER_POINT = 15;
const PROPERTIES = "float x,float y,float z,uchar red,uchar green,uchar blue";

/** First line of numbers of any PLY: `{count, properties, dataStart}`; throws if the bytes are not a PLY. */
export function readPlyHeader(bytes) {
  const text = new TextDecoder("latin1").decode(bytes.subarray(0, 16384));
  const end = text.indexOf("end_header\n");
  const count = /^element vertex (\d+)$/m.exec(text);
  if (!text.startsWith("ply\n") || end < 0 || !count) throw new Error("this is not a PLY file");
  const header = text.slice(0, end);
  return {
    count: Number(count[1]),
    littleEndian: header.includes("format binary_little_endian 1.0"),
    properties: [...header.matchAll(/^property (.+)$/gm)].map((match) => match[1]).join(","),
    dataStart: end + "end_header\n".length,
  };
}

/** Positions and colours of a point cloud file. */
export function parsePoints(bytes) {
  const { count, littleEndian, properties, dataStart } = readPlyHeader(bytes);
  if (!littleEndian || properties !== PROPERTIES) throw new Error("points need a binary PLY with float x y z and uchar red green blue");
  if (bytes.length < dataStart + count * BYTES_PER_POINT) throw new Error("the point file is cut short");
  const view = new DataView(bytes.buffer, bytes.byteOffset + dataStart);
  const positions = new Float32Array(count * 3);
  const colours = new Uint8Array(count * 3);
  for (let i = 0, at = 0; i < count; i++, at += BYTES_PER_POINT) {
    for (let axis = 0; axis < 3; axis++) {
      positions[3 * i + axis] = view.getFloat32(at + 4 * axis, true);
      colours[3 * i + axis] = view.getUint8(at + 12 + axis);
    }
  }
  return { count, positions, colours };
}

/**
 * Points drawn as squares as large as the depth pixel each came from: seen from the camera that measured them they close
 * to a picture, and nearer or farther cameras see them grow or shrink as surfaces would.
 */
export function buildPoints({ count, positions, colours }) {
  const geometry = new BufferGeometry();
  geometry.setAttribute("position", new BufferAttribute(positions, 3));
  geometry.setAttribute("tint", new BufferAttribute(colours, 3, true));
  const material = new ShaderMaterial({
    uniforms: { eye: { value: new Vector3() }, footprint: { value: 1.1 / Math.sqrt(count) }, screenHeight: { value: 1 } },
    vertexShader: `
      attribute vec3 tint;
      uniform vec3 eye;
      uniform float footprint, screenHeight;
      varying vec3 colour;
      void main() {
        vec4 view = modelViewMatrix * vec4(position, 1.0);
        float pixelsPerUnit = 0.5 * screenHeight * projectionMatrix[1][1] / max(-view.z, 1e-6);
        gl_PointSize = clamp(distance(position, eye) * footprint * pixelsPerUnit, 1.5, 64.0);
        gl_Position = projectionMatrix * view;
        colour = tint;
      }`,
    fragmentShader: `
      varying vec3 colour;
      void main() { gl_FragColor = vec4(colour, 1.0); }`,
  });
  const points = new Points(geometry, material);
  points.frustumCulled = false;
  points.onBeforeRender = (renderer) => {
    material.uniforms.screenHeight.value = renderer.domElement.height;
    material.uniformsNeedUpdate = true;
  };
  return points;
}

/** Tell the points which camera measured them: its centre in OpenCV axes and its image. */
export function setPointCamera(points, centre, { fy, height, width }) {
  const stride = Math.sqrt((height * width) / points.geometry.attributes.position.count);
  points.material.uniforms.eye.value.copy(centre);
  points.material.uniforms.footprint.value = (1.2 * Math.max(1, stride)) / fy;
}
