// Makes of dist what a page loads: dist/browser, with all that it needs.
import { copyFileSync, rmSync, statSync } from "node:fs";
import { createRequire } from "node:module";
import { build } from "esbuild";

const resolve = createRequire(import.meta.url).resolve;
/** The part of ONNX Runtime Web that knows WebAssembly only, and takes its module from where we say. */
const wasmOnly = {
  name: "wasm-only",
  setup(build) {
    build.onResolve({ filter: /^onnxruntime-web$/ }, ({ resolveDir, kind }) => {
      return build.resolve("onnxruntime-web/wasm", { resolveDir, kind });
    });
  },
};
const runtime = "ort-wasm-simd-threaded";
const runtimeBytes = statSync(resolve(`onnxruntime-web/${runtime}.wasm`)).size;
const common = {
  outdir: "dist/browser",
  bundle: true,
  minify: true,
  format: "esm",
  target: "es2022",
  platform: "browser",
  plugins: [wasmOnly],
  define: { RUNTIME_BYTES: String(runtimeBytes) },
  conditions: ["onnxruntime-web-use-extern-wasm"],
  external: ["node:*", "module", "worker_threads", "fs", "path"],
  logLevel: "warning",
};
rmSync("dist/browser", { recursive: true, force: true }); // what an older build left
await build({ ...common, entryPoints: ["dist/ort-module.js", "dist/client.js"] });
// What WebGPU needs is a file of its own, which is loaded where it is needed.
await build({ ...common, entryPoints: ["dist/worker.js"], splitting: true, chunkNames: "[name]" });
for (const name of [`${runtime}.wasm`, `${runtime}.asyncify.wasm`, `${runtime}.asyncify.mjs`]) {
  // Not every server knows that a file of that last ending is a module.
  copyFileSync(resolve(`onnxruntime-web/${name}`), `dist/browser/${name.replace(".mjs", ".js")}`);
}
