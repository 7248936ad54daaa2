// Makes a folder that a static host serves: the page, and what it loads of the package.
//
//   node build.mjs FOLDER
import { createHash } from "node:crypto";
import { copyFileSync, mkdirSync, readdirSync, readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { join } from "node:path";
import { fileURLToPath } from "node:url";

const out = process.argv[2];
const here = fileURLToPath(new URL(".", import.meta.url));
const project = fileURLToPath(new URL("../pleexport-web/", import.meta.url));
const browser = join(project, "dist", "browser");
const { build } = createRequire(join(project, "package.json"))("esbuild");
const options = {
  outdir: out,
  bundle: true,
  minify: true,
  format: "esm",
  target: "es2022",
  alias: { "pleexport-web/client": join(browser, "client.js") },
  logLevel: "warning",
};

mkdirSync(out, { recursive: true });
const copied = [
  ...["index.html", "style.css", "icon.svg"].map((name) => join(here, "src", name)),
  ...readdirSync(browser).filter((name) => name !== "client.js").map((name) => join(browser, name)),
];
const names = copied.map((path) => path.slice(Math.max(path.lastIndexOf("/"), path.lastIndexOf("\\")) + 1));
copied.forEach((path, i) => copyFileSync(path, join(out, names[i])));
await build({ ...options, entryPoints: [join(here, "src", "app.ts")] });

// What computes is large, and which of it a bundle needs is known when it is open.
const RUNTIMES = {
  cpu: ["ort-module.js", "ort-wasm-simd-threaded.wasm"],
  gpu: ["ort-gpu.js", "ort-wasm-simd-threaded.asyncify.js", "ort-wasm-simd-threaded.asyncify.wasm"],
};
const some = Object.values(RUNTIMES).flat();
// The service worker knows what belongs together by its digests, and so is another when a file is.
const files = digests([...names, "app.js"].filter((name) => !some.includes(name)));
const runtimes = Object.fromEntries(Object.entries(RUNTIMES).map(([kind, own]) => [kind, digests(own)]));
await build({
  ...options,
  entryPoints: [join(here, "src", "service-worker.ts")],
  define: {
    FILES: JSON.stringify(files),
    RUNTIMES: JSON.stringify(runtimes),
    VERSION: JSON.stringify(digestOf(JSON.stringify([files, runtimes]))),
  },
});

function digests(own) {
  return Object.fromEntries([...own].sort().map((name) => [name, `sha256-${digestOf(readFileSync(join(out, name)))}`]));
}

function digestOf(data) {
  return createHash("sha256").update(data).digest("base64");
}
