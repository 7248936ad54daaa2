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

// What WebGPU needs is large, and comes from the server where a bundle is for it.
// The service worker knows what belongs together by its digests, and so is another when a file is.
const files = Object.fromEntries(
  [...names, "app.js"].filter((name) => !name.includes(".asyncify.")).sort().map((name) => [name, `sha256-${digest(join(out, name))}`]),
);
await build({
  ...options,
  entryPoints: [join(here, "src", "service-worker.ts")],
  define: { FILES: JSON.stringify(files), VERSION: JSON.stringify(digestOf(JSON.stringify(files))) },
});

function digest(path) {
  return digestOf(readFileSync(path));
}

function digestOf(data) {
  return createHash("sha256").update(data).digest("base64");
}
