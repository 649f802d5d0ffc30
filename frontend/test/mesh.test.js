// GLB files that can be shown and those that must be refused with a sentence, without a browser: `npm test`.

import assert from "node:assert/strict";
import test from "node:test";
import { Box3 } from "three";
import { buildMesh, centroid, parseMesh } from "../src/mesh.js";

const POSITIONS = [0, 0, 0, 3, 0, 0, 0, 3, 0, 0, 0, 6];
const INDICES = [0, 1, 2, 0, 1, 3];

/** A GLB of two coloured triangles; `change(json)` may spoil its description. */
function glb({ change = () => {}, positions = POSITIONS, indices = INDICES } = {}) {
  const arrays = [new Float32Array(positions), new Uint32Array(indices), new Uint16Array(16).fill(65535)];
  const lengths = arrays.map((array) => array.byteLength);
  const offsets = [0, lengths[0], lengths[0] + lengths[1]];
  const json = {
    asset: { version: "2.0" },
    scenes: [{ nodes: [0] }],
    nodes: [{ mesh: 0 }],
    materials: [{ pbrMetallicRoughness: { baseColorTexture: { index: 0 } } }],
    textures: [{ source: 0 }],
    images: [{ uri: "https://example.com/texture.png" }],
    meshes: [{ primitives: [{ attributes: { POSITION: 0, COLOR_0: 2 }, indices: 1, material: 0 }] }],
    accessors: [
      { bufferView: 0, componentType: 5126, count: 4, type: "VEC3", min: [0, 0, 0], max: [3, 3, 6] },
      { bufferView: 1, componentType: 5125, count: indices.length, type: "SCALAR" },
      { bufferView: 2, componentType: 5123, count: 4, type: "VEC4", normalized: true },
    ],
    bufferViews: lengths.map((byteLength, i) => ({ buffer: 0, byteLength, byteOffset: offsets[i] })),
    buffers: [{ byteLength: offsets[2] + lengths[2] }],
  };
  change(json);
  const text = new TextEncoder().encode(JSON.stringify(json));
  const padded = 4 * Math.ceil(text.length / 4);
  const bytes = new Uint8Array(28 + padded + json.buffers[0].byteLength).fill(0x20, 20, 20 + padded);
  const view = new DataView(bytes.buffer);
  [0x46546c67, 2, bytes.length, padded, 0x4e4f534a].forEach((word, i) => view.setUint32(4 * i, word, true));
  bytes.set(text, 20);
  [json.buffers[0].byteLength, 0x004e4942].forEach((word, i) => view.setUint32(20 + padded + 4 * i, word, true));
  arrays.forEach((array, i) => bytes.set(new Uint8Array(array.buffer), 28 + padded + offsets[i]));
  return bytes;
}

test("triangles are counted, placed by their nodes and keep their colours; textures are not asked for", async (t) => {
  const fetched = t.mock.method(globalThis, "fetch", () => assert.fail("nothing may be fetched"));
  const change = (json) => {
    json.scenes[0].nodes.push(1);
    json.nodes.push({ mesh: 0, translation: [0, 0, 10] });
  };
  const parts = await parseMesh(glb({ change }));
  assert.deepEqual(parts.map(({ first, triangles }) => [first, triangles]), [[0, 2], [2, 2]]);
  assert.deepEqual([1, 2, 3].map((i) => centroid(parts, i).toArray()), [[1, 0, 2], [1, 1, 10], [1, 0, 12]]);
  assert.ok(parts.every(({ geometry }) => geometry.attributes.color.normalized));
  assert.equal(fetched.mock.callCount(), 0);
});

test("a wireframe covers the same space as the mesh, with corners of its own for each triangle", async () => {
  const parts = await parseMesh(glb());
  const [plain, wireframe] = [false, true].map((wanted) => buildMesh(parts, wanted));
  assert.equal(wireframe.children[0].geometry.attributes.position.count, 6);
  assert.deepEqual(new Box3().setFromObject(wireframe), new Box3().setFromObject(plain));
});

const SPOILT = {
  "not a GLB": [() => new TextEncoder().encode("solid this is an STL file of another program"), /not a GLB file/],
  "an older glTF": [() => glb().fill(1, 4, 5), /not a GLB file of glTF 2/],
  "cut short": [() => glb().slice(0, -8), /cut short/],
  "no JSON inside": [() => glb().fill(0x20, 20, 40), /damaged/],
  "arrays beyond the end": [() => glb({ change: (json) => (json.accessors[0].byteOffset = 4000) }), /damaged/],
  "no positions": [() => glb({ change: (json) => delete json.meshes[0].primitives[0].attributes.POSITION }), /damaged/],
  "a missing vertex": [() => glb({ indices: [0, 1, 2, 0, 1, 4] }), /vertices that are not there/],
  "a vertex that is nowhere": [() => glb({ positions: POSITIONS.with(4, NaN) }), /not finite/],
  "points only": [() => glb({ change: (json) => (json.meshes[0].primitives[0].mode = 0) }), /no triangles/],
  "no whole triangle": [() => glb({ indices: [0, 1] }), /no triangles/],
  "too large": [() => glb({ change: (json) => (json.accessors[1].count = 18e6) }), /6,000,000 triangles, more than the 5,000,000/],
  "other files": [() => glb({ change: (json) => (json.buffers[0].uri = "https://example.com/a.bin") }), /other files/],
  "compression": [
    () => glb({ change: (json) => (json.extensionsRequired = ["KHR_draco_mesh_compression"]) }),
    /needs KHR_draco_mesh_compression/,
  ],
};

for (const [name, [spoilt, words]] of Object.entries(SPOILT)) {
  test(`a file is refused with a sentence: ${name}`, async (t) => {
    t.mock.method(globalThis, "fetch", () => assert.fail("nothing may be fetched"));
    await assert.rejects(parseMesh(spoilt()), words);
  });
}
