// How a scene file of any kind is fetched, decoded and freed. Knows no camera path, no controls and no page.
//
// Each file is in the axes of its format: PLY in OpenCV's, SPZ and GLB with y up and z towards the viewer. Neither says
// so in itself, so the format decides. The caller puts `object` into a group turned by OPENCV_WORLD; what has y up already
// is turned back here. Whole files are fetched here, not by Spark, because only so can a load be cancelled, its progress
// shown and an unreadable file named.

import { SplatFileType, SplatMesh } from "@sparkjsdev/spark";
import { Vector3 } from "three";
import { OPENCV_WORLD } from "./coordinates.js";
import { buildMesh, centroid, disposeMesh, MOST_BYTES, parseMesh } from "./mesh.js";
import { buildPoints, parsePoints, readPlyHeader } from "./points.js";

/** The file's bytes, at most `most`; `onProgress(fraction)` while it arrives, if the server tells the size. */
async function download(url, most, signal, onProgress) {
  const response = await fetch(url, { signal });
  if (!response.ok) throw new Error(`the server answered ${response.status}`);
  const total = Number(response.headers.get("Content-Length"));
  if (total > most) {
    await response.body.cancel();
    const [has, limit] = [total, most].map((size) => Math.round(size / 2 ** 20));
    throw new Error(`the file has ${has} MB, more than the ${limit} MB this view can show; write it with fewer triangles`);
  }
  const parts = [];
  let received = 0;
  for (const reader = response.body.getReader(); ; ) {
    const { done, value } = await reader.read();
    if (done) break;
    parts.push(value);
    received += value.length;
    if (total) onProgress(Math.min(1, received / total));
  }
  const bytes = new Uint8Array(received);
  let at = 0;
  for (const part of parts) {
    bytes.set(part, at);
    at += part.length;
  }
  return bytes;
}

/** Kind and splat count of a file, from its first bytes: `{fileType, count}`. */
async function inspectSplats(bytes) {
  if (bytes[0] === 0x1f && bytes[1] === 0x8b) {
    const header = await firstUnzippedBytes(bytes, 16);
    const version = header.getUint32(4, true);
    if (header.getUint32(0, true) !== 0x5053474e) throw new Error("this is not an SPZ file");
    if (version > 3) throw new Error(`SPZ version ${version} is not supported, write version 2 or 3`);
    return { fileType: SplatFileType.SPZ, count: header.getUint32(8, true) };
  }
  if (bytes[0] === 0x4e && bytes[1] === 0x47) throw new Error("SPZ version 4 is not supported, write version 2 or 3");
  const { count, properties } = readPlyHeader(bytes);
  if (!properties.includes("f_dc_0") && !properties.includes("packed_position")) throw new Error("this PLY holds no Gaussians");
  return { fileType: SplatFileType.PLY, count };
}

async function firstUnzippedBytes(bytes, length) {
  const reader = new Blob([bytes.subarray(0, 65536)]).stream().pipeThrough(new DecompressionStream("gzip")).getReader();
  const head = new Uint8Array(length);
  for (let filled = 0; filled < length; ) {
    const { done, value } = await reader.read();
    if (done) throw new Error("the file is cut short");
    head.set(value.subarray(0, length - filled), filled);
    filled += value.length;
  }
  reader.cancel().catch(() => {}); // The rest of the stream is of no interest, nor is how it ends.
  return new DataView(head.buffer);
}

async function loadSplats(bytes, spark, lodAbove) {
  const { fileType, count } = await inspectSplats(bytes);
  const lod = count > lodAbove;
  const mesh = new SplatMesh({ fileBytes: bytes, fileType, lod });
  await mesh.initialized;
  if (fileType === SplatFileType.SPZ) mesh.quaternion.copy(OPENCV_WORLD);
  const source = mesh.packedSplats.lodSplats ?? mesh.packedSplats;
  return {
    object: mesh,
    kind: "splats",
    count,
    centre: (index) => source.getSplat(index).center,
    centres: source.numSplats,
    /** Whether the picture shows this scene. A level-of-detail tree first draws its root alone: one colour, not a scene. */
    drawn() {
      const shown = spark.display.mapping.find(({ node }) => node === mesh)?.count ?? 0;
      return lod ? shown > 1 && shown === spark.lodInstances.get(mesh)?.numSplats : shown > 0;
    },
    dispose: () => mesh.dispose(),
  };
}

function loadPoints(bytes) {
  const cloud = parsePoints(bytes);
  const points = buildPoints(cloud);
  return {
    object: points,
    kind: "points",
    count: cloud.count,
    centre: (index) => new Vector3().fromArray(cloud.positions, 3 * index),
    centres: cloud.count,
    drawn: () => true,
    dispose() {
      points.geometry.dispose();
      points.material.dispose();
    },
  };
}

async function loadMesh(bytes, wireframe) {
  const parts = await parseMesh(bytes);
  const object = buildMesh(parts, wireframe);
  object.quaternion.copy(OPENCV_WORLD);
  const { first, triangles } = parts.at(-1);
  return {
    object,
    kind: "mesh",
    count: first + triangles,
    centre: (index) => centroid(parts, index),
    centres: first + triangles,
    drawn: () => true,
    dispose: () => disposeMesh(object),
  };
}

/**
 * Fetch and decode one scene file; `wireframe` is for meshes.
 * Returns `{object, kind, count, centre(index), centres, drawn(), dispose()}`; an aborted load rejects with an AbortError.
 */
export async function loadScene({ url, kind, wireframe, spark, lodAbove, signal, onProgress }) {
  const bytes = await download(url, kind === "mesh" ? MOST_BYTES : Infinity, signal, onProgress);
  const load = {
    splats: () => loadSplats(bytes, spark, lodAbove),
    points: () => loadPoints(bytes),
    mesh: () => loadMesh(bytes, wireframe),
  };
  const scene = await load[kind]();
  if (signal.aborted) {
    scene.dispose();
    throw new DOMException("replaced by a newer scene", "AbortError");
  }
  return scene;
}

/** Median depth of what `camera` sees of the scene, in scene units; undefined if it sees nothing. */
export function medianDepth(scene, camera) {
  const step = Math.max(1, Math.floor(scene.centres / 2000));
  const depths = [];
  const point = new Vector3();
  camera.updateMatrixWorld();
  scene.object.updateWorldMatrix(true, false);
  for (let index = 0; index < scene.centres; index += step) {
    point.copy(scene.centre(index)).applyMatrix4(scene.object.matrixWorld).applyMatrix4(camera.matrixWorldInverse);
    const depth = -point.z;
    point.applyMatrix4(camera.projectionMatrix);
    if (depth > 0 && Math.abs(point.x) < 1 && Math.abs(point.y) < 1) depths.push(depth);
  }
  depths.sort((a, b) => a - b);
  return depths[depths.length >> 1];
}
