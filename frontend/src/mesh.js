// How a GLB file becomes a triangle mesh, and what if it is wrong? Knows nothing of splats, networks or the page.
//
// Vertices are in glTF's axes (x right, y up, z towards the viewer). COLOR_0 is linear light, as three.js expects it, and
// is shown as it is: the light of the photograph is in it. Materials, textures, lights and animations are left out, so
// nothing but shapes and vertex colours is decoded and no file can make the browser fetch another one. A wireframe shows
// the shape alone: faces shaded as if lit from the eye, and their edges.

import { BufferGeometry, DoubleSide, Group, Mesh, MeshBasicMaterial, ShaderMaterial, Vector3 } from "three";
import { GLTFLoader } from "three/addons/loaders/GLTFLoader.js";

/** What a browser tab can take: such a mesh, its file and its edges need about 1 GB while it is decoded. */
const MOST_TRIANGLES = 5_000_000;
export const MOST_BYTES = 512 * 2 ** 20;

const GLB = 0x46546c67;
const TRIANGLE_MODES = [4, 5, 6]; // Lists, strips and fans.
const READABLE_EXTENSIONS = ["KHR_materials_unlit", "KHR_mesh_quantization"];

class Refusal extends Error {}

/** The JSON part of a GLB. */
function readDescription(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  if (bytes.length < 20 || view.getUint32(0, true) !== GLB || view.getUint32(4, true) !== 2) {
    throw new Refusal("this is not a GLB file of glTF 2.0");
  }
  if (view.getUint32(8, true) > bytes.length) throw new Refusal("the GLB file is cut short; copy or write it again");
  return JSON.parse(new TextDecoder().decode(bytes.subarray(20, 20 + view.getUint32(12, true))));
}

/** Refuse what cannot be shown before memory is spent on it. */
function checkDescription({ extensionsRequired = [], buffers, meshes = [], accessors }) {
  const unknown = extensionsRequired.find((name) => !READABLE_EXTENSIONS.includes(name));
  if (unknown) throw new Refusal(`the GLB needs ${unknown}, which this view does not read; save it without that`);
  if (buffers?.some(({ uri }) => uri !== undefined)) throw new Refusal("the GLB refers to other files; save it as a single one");
  const primitives = meshes.flatMap((mesh) => mesh.primitives).filter(({ mode = 4 }) => TRIANGLE_MODES.includes(mode));
  if (!primitives.length) throw new Refusal("the GLB holds no triangles");
  let triangles = 0;
  for (const { mode = 4, indices, attributes } of primitives) {
    triangles += accessors[indices ?? attributes.POSITION].count / (mode === 4 ? 3 : 1);
  }
  if (triangles > MOST_TRIANGLES) {
    const [has, most] = [triangles, MOST_TRIANGLES].map((number) => Math.round(number).toLocaleString("en-US"));
    throw new Refusal(`the mesh has ${has} triangles, more than the ${most} this view can show; write it with fewer`);
  }
}

/** A plugin of GLTFLoader that takes everything but shapes and vertex colours out of the description. */
function onlyShapes({ json }) {
  for (const name of ["animations", "cameras", "skins"]) delete json[name];
  for (const node of json.nodes ?? []) {
    for (const name of ["camera", "skin", "extensions"]) delete node[name];
  }
  for (const primitive of json.meshes.flatMap((mesh) => mesh.primitives)) {
    const { POSITION, COLOR_0 } = primitive.attributes;
    primitive.attributes = COLOR_0 === undefined ? { POSITION } : { POSITION, COLOR_0 };
    for (const name of ["material", "targets", "extensions"]) delete primitive[name];
  }
  return { name: "lyra_only_shapes" };
}

/** Refuse vertices that are nowhere and triangles of vertices that are not there, which WebGL would draw as anything. */
function checkGeometry({ index, attributes: { position } }) {
  let sum = 0;
  for (let i = 0; i < position.count; i++) sum += position.getX(i) + position.getY(i) + position.getZ(i);
  if (!Number.isFinite(sum)) throw new Refusal("the mesh has vertices that are not finite; write it again");
  for (let i = 0; i < (index?.count ?? 0); i++) {
    if (index.getX(i) >= position.count) throw new Refusal("the mesh has a triangle of vertices that are not there; write it again");
  }
}

/** Decode a GLB: `[{geometry, matrix, first, triangles}]`, `first` being the number of triangles in the parts before. */
export async function parseMesh(bytes) {
  try {
    checkDescription(readDescription(bytes));
    const { scene } = await new GLTFLoader().register(onlyShapes).parseAsync(bytes.buffer, "");
    const parts = [];
    let first = 0;
    scene.updateMatrixWorld();
    scene.traverse(({ isMesh, geometry, matrixWorld }) => {
      if (!isMesh) return;
      checkGeometry(geometry);
      const triangles = Math.floor((geometry.index ?? geometry.attributes.position).count / 3);
      if (triangles) parts.push({ geometry, matrix: matrixWorld, first, triangles });
      first += triangles;
    });
    if (!first) throw new Refusal("the GLB holds no triangles");
    return parts;
  } catch (error) {
    if (error instanceof Refusal) throw error;
    throw new Refusal("the GLB file is damaged; copy or write it again", { cause: error });
  }
}

/** Centroid of one triangle, in the file's axes. */
export function centroid(parts, triangle) {
  const { geometry, matrix, first } = parts.findLast((part) => part.first <= triangle);
  const sum = new Vector3();
  const corner = new Vector3();
  for (let i = 3 * (triangle - first), end = i + 3; i < end; i++) {
    sum.add(corner.fromBufferAttribute(geometry.attributes.position, geometry.index?.getX(i) ?? i));
  }
  return sum.divideScalar(3).applyMatrix4(matrix);
}

/** Corners one after the other, three for each triangle, so that a shader knows which corner it is at. */
function unshared({ index, attributes: { position } }) {
  const geometry = new BufferGeometry().setAttribute("position", position).setIndex(index);
  return index ? geometry.toNonIndexed() : geometry;
}

/**
 * Faces of one colour, lit from the eye and a little from above, and their edges as smooth lines. Edges fade where faces
 * shrink to a few pixels, as they would bury the shape there.
 */
function wireframeMaterial() {
  return new ShaderMaterial({
    side: DoubleSide,
    vertexShader: `
      varying vec3 seen, corner;
      void main() {
        int which = gl_VertexID % 3;
        corner = vec3(which == 0, which == 1, which == 2);
        vec4 view = modelViewMatrix * vec4(position, 1.0);
        seen = view.xyz;
        gl_Position = projectionMatrix * view;
      }`,
    fragmentShader: `
      varying vec3 seen, corner;
      void main() {
        vec3 normal = normalize(cross(dFdx(seen), dFdy(seen)));
        float headlight = abs(dot(normal, normalize(seen)));
        float above = max(0.0, dot(normal, normalize(vec3(-0.4, 0.8, 0.4))));
        vec3 face = vec3(0.72, 0.79, 0.87) * (0.2 + 0.55 * headlight + 0.25 * above);
        vec3 perPixel = fwidth(corner);
        vec3 pixels = corner / perPixel;
        float line = 1.0 - smoothstep(0.3, 1.2, min(pixels.x, min(pixels.y, pixels.z)));
        float height = 1.0 / max(perPixel.x, max(perPixel.y, perPixel.z));
        gl_FragColor = vec4(mix(face, vec3(0.04, 0.07, 0.13), 0.75 * line * smoothstep(1.5, 6.0, height)), 1.0);
      }`,
  });
}

/** The parts of `parseMesh` in a group to be drawn: in their own colours, or, if they have none or not to, as a wireframe. */
export function buildMesh(parts, wireframe) {
  const group = new Group();
  for (const { geometry, matrix } of parts) {
    const mesh =
      wireframe || !geometry.hasAttribute("color")
        ? new Mesh(unshared(geometry), wireframeMaterial())
        : new Mesh(geometry, new MeshBasicMaterial({ vertexColors: true, side: DoubleSide }));
    mesh.matrixAutoUpdate = false;
    mesh.matrix.copy(matrix);
    group.add(mesh);
  }
  return group;
}

export function disposeMesh(group) {
  group.traverse(({ geometry, material }) => {
    geometry?.dispose();
    material?.dispose();
  });
}
