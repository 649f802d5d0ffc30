// Bundles src/viewer.js with three.js and Spark into the one file the app serves. Nothing is fetched at run time: Spark's
// WASM and worker are inside its module.

import { build } from "esbuild";

await build({
  entryPoints: ["src/viewer.js"],
  outfile: "../assets/viewer/viewer.js",
  bundle: true,
  minify: true,
  format: "esm",
  target: "es2022",
  loader: { ".css": "text" },
  legalComments: "none", // All licences are in THIRD_PARTY_LICENSES.txt.
});
