// Serves a folder on this computer as a static host should serve a page and its bundle: parts of files
// (`Range`), tags that tell whether a file has changed, and the headers that let a page have threads.
//
//   node serve.mjs FOLDER [PORT]
import { createReadStream, realpathSync, statSync } from "node:fs";
import { createServer } from "node:http";
import { extname, join, normalize, sep } from "node:path";
import { fileURLToPath } from "node:url";

const BOUNDARY = "pleexport-part";
const TYPES = {
  ".css": "text/css; charset=utf-8",
  ".html": "text/html; charset=utf-8",
  ".js": "text/javascript; charset=utf-8",
  ".json": "application/json",
  ".svg": "image/svg+xml",
  ".wasm": "application/wasm",
};
const ISOLATED = {
  "cross-origin-opener-policy": "same-origin",
  "cross-origin-embedder-policy": "require-corp",
  "cross-origin-resource-policy": "same-origin",
};

/** Path and size of what a URL names in the folder; null where that is no file. */
function found(folder, url) {
  try {
    const name = normalize(decodeURIComponent(new URL(url, "http://localhost").pathname));
    const path = join(folder, name.endsWith(sep) ? `${name}index.html` : name);
    const stat = statSync(path);
    return stat.isFile() ? { path, size: stat.size, tag: `"${stat.size}-${stat.mtimeMs}"` } : null;
  } catch {
    return null;
  }
}

/** The parts that `Range` asks for, each [first, last]; null where it asks for none, or for the impossible. */
function partsOf(range, size) {
  const parts = /^bytes=(.+)$/.exec(range ?? "")?.[1].split(",").map((part) => {
    const [, first, last] = /^\s*(\d*)-(\d*)\s*$/.exec(part) ?? ["", "", ""];
    if (first === "") return [Math.max(0, size - Number(last)), size - 1];
    return [Number(first), last === "" ? size - 1 : Math.min(Number(last), size - 1)];
  });
  return parts?.every(([first, last]) => first <= last) ? parts : null;
}

async function send(path, response, [first, last]) {
  if (first > last) return;
  for await (const chunk of createReadStream(path, { start: first, end: last })) {
    if (!response.write(chunk)) await drained(response);
    if (response.destroyed) return;
  }
}

/** Waits until more can be written, or nobody wants more. */
function drained(response) {
  return new Promise((resolve) => {
    const done = () => {
      response.off("drain", done).off("close", done);
      resolve();
    };
    response.on("drain", done).on("close", done);
  });
}

/** Answers a request for a file of a folder. */
export async function answer(folder, { method, url, headers }, response) {
  const file = found(folder, url);
  if ((method !== "GET" && method !== "HEAD") || file === null) {
    response.writeHead(file === null ? 404 : 405, ISOLATED).end();
    return;
  }
  const { path, size, tag } = file;
  const type = TYPES[extname(path)] ?? "application/octet-stream";
  const head = { ...ISOLATED, "accept-ranges": "bytes", "cache-control": "no-cache", etag: tag };
  if (headers["if-none-match"] === tag) {
    response.writeHead(304, head).end();
    return;
  }
  const parts = partsOf(headers.range, size);
  let body = [[[0, size - 1], ""]];
  if (parts === null) {
    response.writeHead(200, { ...head, "content-type": type, "content-length": size });
  } else if (parts.length === 1) {
    const [[first, last]] = parts;
    const range = `bytes ${first}-${last}/${size}`;
    const length = last - first + 1;
    response.writeHead(206, { ...head, "content-type": type, "content-length": length, "content-range": range });
    body = [[parts[0], ""]];
  } else {
    response.writeHead(206, { ...head, "content-type": `multipart/byteranges; boundary=${BOUNDARY}` });
    body = parts.map(([first, last]) => [
      [first, last],
      `\r\n--${BOUNDARY}\r\nContent-Type: ${type}\r\nContent-Range: bytes ${first}-${last}/${size}\r\n\r\n`,
    ]);
    body.push([[0, -1], `\r\n--${BOUNDARY}--\r\n`]);
  }
  if (method === "GET") {
    for (const [part, before] of body) {
      response.write(before);
      await send(path, response, part);
    }
  }
  response.end();
}

/** Serves a folder until the process is stopped. */
function serve(folder, port) {
  const server = createServer((request, response) => {
    answer(folder, request, response).catch(() => response.destroy());
  });
  server.on("error", (err) => {
    // Somebody else has the port: any other will do.
    if (err.code === "EADDRINUSE" && server.listening === false) server.listen(0, "127.0.0.1");
    else throw err;
  });
  server.on("listening", () => {
    console.log(`The page is at http://localhost:${server.address().port}/  (Ctrl-C ends it)`);
  });
  server.listen(port, "127.0.0.1");
  for (const signal of ["SIGINT", "SIGTERM"]) {
    process.on(signal, () => {
      console.log("\nStopped.");
      process.exit(0);
    });
  }
}

const [, script, folder, wanted = "8000"] = process.argv;
if (realpathSync(script) === fileURLToPath(import.meta.url)) serve(folder, Number(wanted));
