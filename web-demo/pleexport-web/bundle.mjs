// Makes of dist what a page loads: dist/browser, with all that it needs.
import { copyFileSync, statSync } from "node:fs";
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
const wasm = "ort-wasm-simd-threaded.wasm";
const runtime = resolve(`onnxruntime-web/${wasm}`);
await build({
  entryPoints: ["dist/worker.js", "dist/ort-module.js", "dist/client.js"],
  outdir: "dist/browser",
  bundle: true,
  minify: true,
  format: "esm",
  target: "es2022",
  platform: "browser",
  plugins: [wasmOnly],
  define: { RUNTIME_BYTES: String(statSync(runtime).size) },
  conditions: ["onnxruntime-web-use-extern-wasm"],
  external: ["node:*", "module", "worker_threads", "fs", "path"],
  logLevel: "warning",
});
copyFileSync(runtime, `dist/browser/${wasm}`);
