import assert from "node:assert/strict";
import * as fs from "node:fs";
import { tmpdir } from "node:os";
import { describe, test } from "node:test";

import { BlobError, BundleError, CheckFailed, PleexportError } from "../src/errors.js";
import { openBundle } from "../src/node.js";
import { Runner } from "../src/runner.js";
import { serve, type Manners, type RangeServer } from "./range-server.js";
import { CONFORMANCE, refusal } from "./vectors.js";

const NAME = "gemma4-int4";
const IDS = [2, 5, 250, 7, 5, 90, 170];

async function served<T>(manners: Manners, use: (url: string, server: RangeServer) => Promise<T>): Promise<T> {
  const server = await serve(CONFORMANCE, manners);
  try {
    return await use(`${server.url}/${NAME}`, server);
  } finally {
    await server.close();
  }
}

async function logitsOf(place: string): Promise<Float32Array> {
  const bundle = await openBundle(place);
  try {
    const runner = await Runner.open(bundle, { threads: 1 });
    const found = await runner.logits(IDS);
    await runner.close();
    return found;
  } finally {
    bundle.close();
  }
}

describe("logits over a network are those of the folder", () => {
  for (const several of ["all", "first", "whole"] as const) {
    test(`a server that answers several parts with ${several}`, () =>
      served({ several }, async (url, server) => {
        assert.deepEqual(await logitsOf(`${url}/`), await logitsOf(`${CONFORMANCE}/${NAME}`));
        const ranges = server.asked.filter(([name]) => name.endsWith("embeddings.safetensors"));
        assert.ok(ranges.every(([, range]) => range !== undefined), "only parts of the blob");
        const others = server.asked.map(([name]) => name).filter((name) => !name.endsWith("embeddings.safetensors"));
        assert.equal(new Set(others).size, others.length, "nothing is fetched twice");
      }));
  }
});

test("near rows are one part, and known ones are not asked for", () =>
  served({}, async (url, server) => {
    const bundle = await openBundle(url);
    const blob = await bundle.openBlob();
    const [table] = [...blob.shapes.keys()] as [string];
    const out = (): Float32Array => new Float32Array(1000);
    const before = server.asked.length;
    await blob.lookup([3, 1, 2, 240, 3], [{ table, out }]);
    await blob.lookup([2, 3], [{ table, out }]);
    const asked = server.asked.slice(before);
    assert.equal(asked.length, 1, "rows are near each other in so small a blob");
    assert.match(asked[0]![1]!, /^bytes=\d+-\d+$/);
    blob.close();
    bundle.close();
  }));

test("a connection that the server has closed meanwhile is made again", () => {
  let count = 0;
  const isAway = (name: string): boolean => name.endsWith("model.onnx.data") && ++count === 1;
  return served({ isAway }, async (url) => {
    await logitsOf(url);
    assert.equal(count, 2);
  });
});

test("nothing stays behind of what was brought here", async () => {
  const left = (): string[] => fs.readdirSync(tmpdir()).filter((name) => name.startsWith("pleexport-web-"));
  const before = left();
  await served({}, (url) => logitsOf(url));
  assert.deepEqual(left(), before);
});

describe("what goes wrong is said", () => {
  const cases: [string, Manners, typeof PleexportError, RegExp][] = [
    ["a server without parts", { ignoresRanges: () => true }, BundleError, /with the whole file, 200 in place of 206/],
    ["no bundle", { status: () => 404 }, BundleError, /is not a bundle: `manifest.json` cannot be read \(the server answered 404\)/],
    ["a server that fails", { status: (name) => (name.endsWith(".onnx") ? 503 : undefined) }, BundleError, /model\.onnx` cannot be read \(the server answered 503\)/],
    ["a missing file", { status: (name) => (name.endsWith(".data") ? 404 : undefined) }, BundleError, /lacks `model\.onnx\.data`/],
    ["damaged weights", { damages: (name) => name.endsWith(".data") }, CheckFailed, /model\.onnx\.data` is damaged: chunk 0/],
    ["a damaged header", { damages: (name) => name.endsWith("embeddings.safetensors") }, BlobError, /embeddings\.safetensors` has a header that is not/],
    ["a damaged manifest", { damages: (name) => name.endsWith("manifest.json") }, CheckFailed, /manifest\.json` is damaged/],
    ["a damaged tokenizer", { damages: (name) => name.endsWith("tokenizer.json") }, CheckFailed, /tokenizer\.json` is damaged/],
    ["a cut connection", { cutsOff: (name) => name.endsWith(".data") }, BundleError, /the connection ended too early/],
  ];
  for (const [name, manners, kind, words] of cases) {
    test(name, () =>
      served(manners, async (url) => {
        assert.match(await refusal(kind, () => logitsOf(url)), words);
      }));
  }

  test("a damaged row", () =>
    served({}, async (url, server) => {
      const runner = await Runner.open(await openBundle(url), { threads: 1 });
      Object.assign(server.manners, { damages: () => true } satisfies Manners);
      const before = server.asked.length;
      assert.match(await refusal(CheckFailed, () => runner.feed([250])), /the row of token id 250 does not match/);
      assert.equal(server.asked.length, before + 2, "it was asked for twice");
      Object.assign(server.manners, { damages: () => server.asked.length === before + 3 } satisfies Manners);
      await runner.feed([250]);
      assert.equal(server.asked.length, before + 4, "the second answer is sound");
      await runner.close();
    }));

  test("no server", async () => {
    const words = await refusal(PleexportError, () => openBundle("http://127.0.0.1:9/bundle"));
    assert.match(words, /the server cannot be reached/);
  });
});

