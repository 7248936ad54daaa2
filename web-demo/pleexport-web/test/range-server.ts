import { createHash } from "node:crypto";
import * as fs from "node:fs";
import { createServer, type IncomingMessage, type ServerResponse } from "node:http";
import type { AddressInfo } from "node:net";
import { extname, join, normalize } from "node:path";

const TYPES: Record<string, string> = { ".css": "text/css", ".html": "text/html", ".svg": "image/svg+xml", ".js": "text/javascript", ".wasm": "application/wasm" };

const ISOLATED = { "cross-origin-opener-policy": "same-origin", "cross-origin-embedder-policy": "require-corp" };

/** What a server does otherwise than it should. */
export interface Manners {
  /** Answers a request for parts with the whole file. */
  ignoresRanges?: (name: string) => boolean;
  /** Answers several parts with the whole file, the first part, or all. */
  several?: "whole" | "first" | "all";
  /** Changes a byte of what it sends. */
  damages?: (name: string) => boolean;
  /** Ends connections within the body. */
  cutsOff?: (name: string) => boolean;
  /** Does not answer at all. */
  isAway?: (name: string) => boolean;
  /** Sends half of a file, and the rest when this is over. */
  halts?: (name: string) => Promise<void> | undefined;
  /** Sends something else in place of a file. */
  replaces?: (name: string, data: Buffer) => Buffer;
  status?: (name: string) => number | undefined;
  /** Lets pages have threads. */
  isolates?: boolean;
}

export interface RangeServer {
  readonly url: string;
  /** Name and range of each request. */
  readonly asked: [string, string | undefined][];
  readonly manners: Manners;
  bytes: number;
  close(): Promise<void>;
}

/** Serves a folder as a static host does that knows ranges. */
export async function serve(folder: string, manners: Manners = {}): Promise<RangeServer> {
  const asked: [string, string | undefined][] = [];
  const server = createServer((request, response) => answer(request, response));
  const found = { asked, manners, bytes: 0 };

  let tag = "";

  function answer(request: IncomingMessage, response: ServerResponse): void {
    const place = normalize(decodeURIComponent(new URL(request.url!, "http://x").pathname)).slice(1);
    const name = /(^|\/)$/.test(place) ? `${place}index.html` : place;
    asked.push([name, request.headers.range]);
    if (manners.isAway?.(name) === true) {
      request.socket.destroy();
      return;
    }
    const status = manners.status?.(name);
    const path = join(folder, name);
    if (status !== undefined || !fs.existsSync(path)) {
      response.writeHead(status ?? 404).end();
      return;
    }
    const read = fs.readFileSync(path);
    const data = manners.replaces?.(name, read) ?? read;
    // What a browser keeps has the headers of its time.
    tag = createHash("sha1").update(data).update(String(manners.isolates)).digest("hex");
    if (request.headers["if-none-match"] === `"${tag}"`) {
      response.writeHead(304, manners.isolates === true ? ISOLATED : {}).end();
      return;
    }
    const ranges = [...(request.headers.range ?? "").matchAll(/(\d+)-(\d*)/g)].map(([, begin, end]) => {
      return [Number(begin), Math.min(Number(end || Infinity), data.length - 1)] as const;
    });
    const several = manners.several ?? "all";
    if (ranges.length === 0 || manners.ignoresRanges?.(name) === true || (ranges.length > 1 && several === "whole")) {
      send(response, 200, {}, data, name);
    } else if (ranges.length === 1 || several === "first") {
      const [begin, end] = ranges[0]!;
      const headers = { "content-range": `bytes ${begin}-${end}/${data.length}` };
      send(response, 206, headers, data.subarray(begin, end + 1), name);
    } else {
      const parts = ranges.flatMap(([begin, end]) => [
        Buffer.from(
          `\r\n--LIMIT\r\nContent-Type: application/octet-stream\r\n` +
            `Content-Range: bytes ${begin}-${end}/${data.length}\r\n\r\n`,
        ),
        data.subarray(begin, end + 1),
      ]);
      const body = Buffer.concat([...parts, Buffer.from("\r\n--LIMIT--\r\n")]);
      send(response, 206, { "content-type": "multipart/byteranges; boundary=LIMIT" }, body, name);
    }
  }

  function send(response: ServerResponse, status: number, headers: Record<string, string>, body: Buffer, name: string): void {
    let sent = body;
    if (manners.damages?.(name) === true) {
      sent = Buffer.from(body);
      sent[sent.length >> 1]! ^= 1;
    }
    response.writeHead(status, {
      "content-type": TYPES[extname(name)] ?? "application/octet-stream",
      "content-length": String(sent.length),
      etag: `"${tag}"`,
      ...(manners.isolates === true ? ISOLATED : {}),
      ...headers,
    });
    if (manners.cutsOff?.(name) === true) {
      // Later, or what was sent may be lost on the way.
      response.write(sent.subarray(0, sent.length >> 1), () => setTimeout(() => response.destroy(), 200));
    } else {
      const half = sent.length >> 1;
      response.write(sent.subarray(0, half));
      found.bytes += sent.length;
      void Promise.resolve(manners.halts?.(name)).then(() => response.end(sent.subarray(half)));
    }
  }

  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  return Object.assign(found, {
    url: `http://127.0.0.1:${(server.address() as AddressInfo).port}`,
    close: async () => {
      server.closeAllConnections();
      await new Promise((resolve) => server.close(resolve));
    },
  });
}
