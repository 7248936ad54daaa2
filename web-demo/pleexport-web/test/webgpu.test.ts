// Bundles for a GPU in Debian's Chromium: on WebGPU, which a processor stands in for (SwiftShader), and
// where there is none.
import assert from "node:assert/strict";
import { execFileSync } from "node:child_process";
import * as fs from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, before, describe, test } from "node:test";

import { chromium, type BrowserContext, type Page } from "playwright-core";

import { serve, type RangeServer } from "./range-server.js";
import { floatsOf, readJson, ROOT } from "./vectors.js";

/** A folder below the repository: bundles, and beside each what Python computes with it. */
const FOLDER = process.env["PLEEXPORT_GPU"]!;
const CHROMIUM = process.env["PLEEXPORT_CHROMIUM"] ?? "/usr/bin/chromium";
const WEBGPU = [
  "--enable-unsafe-webgpu",
  "--enable-features=Vulkan",
  "--use-webgpu-adapter=swiftshader",
  "--use-angle=swiftshader",
];
/** Of the range of the logits. */
const TOLERANCE = 1e-4;

interface Vectors {
  readonly ids: number[];
  readonly logits: string;
  readonly prompt: number[];
  readonly greedy: number[];
}

const bundles = fs
  .readdirSync(join(ROOT, FOLDER))
  .filter((file) => file.endsWith(".json"))
  .map((file) => ({ name: file.slice(0, -5), vectors: readJson(join(ROOT, FOLDER, file)) as Vectors }));
let server: RangeServer;

before(async () => {
  server = await serve(ROOT, { isolates: true });
});

after(async () => server.close());

/** Opens a bundle in a new page, and gives what was noted. */
async function inPage<T>(
  flags: readonly string[],
  name: string,
  use: (page: Page, notes: string[]) => Promise<T>,
): Promise<T> {
  const profile = fs.mkdtempSync(join(tmpdir(), "pleexport-profile-"));
  const browser: BrowserContext = await chromium.launchPersistentContext(profile, {
    executablePath: CHROMIUM,
    args: ["--no-sandbox", ...flags],
  });
  try {
    const page = await browser.newPage();
    page.on("pageerror", (err) => console.error("page:", err));
    page.setDefaultTimeout(300_000);
    await page.goto(`${server.url}/web-demo/pleexport-web/test/page.html`);
    await page.waitForFunction("globalThis.isReady");
    const notes: string[] = [];
    const begin = server.asked.length;
    await page.exposeFunction("noted", (sentence: string) => notes.push(sentence));
    const body = "start().open(args[0], { threads: 1, onNote: (sentence) => noted(sentence) })";
    await within(page, `return ${body}`, `/${FOLDER}/${name}`);
    const asked = server.asked.slice(begin).map(([file]) => file);
    const onGpu = asked.some((file) => file.endsWith("asyncify.wasm"));
    assert.equal(onGpu, flags.length > 0, "which WebAssembly was loaded");
    return await use(page, notes);
  } finally {
    await browser.close();
    fs.rmSync(profile, { recursive: true, force: true });
  }
}

function within<T>(page: Page, body: string, ...args: unknown[]): Promise<T> {
  return page.evaluate(`(async (...args) => { ${body} })(...${JSON.stringify(args)})`) as Promise<T>;
}

function errorOf(expected: Float32Array, got: readonly number[]): number {
  let [least, most, error] = [Infinity, -Infinity, 0];
  assert.equal(got.length, expected.length);
  expected.forEach((value, i) => {
    [least, most] = [Math.min(least, value), Math.max(most, value)];
    const difference = Math.abs(value - got[i]!);
    if (!(difference <= error)) error = difference;
  });
  return error / (most - least);
}

describe("on WebGPU", () => {
  for (const { name, vectors } of bundles) {
    test(name, async () => {
      const expected = floatsOf(vectors.logits);
      await inPage(WEBGPU, name, async (page, notes) => {
        assert.deepEqual(notes, []);
        const all = "return [...await runner.logits(args[0])]";
        const error = errorOf(expected, await within(page, all, vectors.ids));
        console.log(`${name}: ${error.toExponential(1)} of the range`);
        assert.ok(error < TOLERANCE, `${error}`);
        const pieces = `
          await runner.reset();
          const found = [];
          let at = 0;
          const { chunk } = await runner.facts();
          for (const length of [1, 7, 30, 1, 1])
            for (const end = at + length; at < end; ) {
              const next = Math.min(at + chunk, end);
              found.push(...await runner.feed(args[0].slice(at, next), 0));
              at = next;
            }
          return found;`;
        const vocab = expected.length / vectors.ids.length;
        const fed = await within<number[]>(page, pieces, vectors.ids);
        assert.ok(errorOf(expected.subarray(0, fed.length), fed) < TOLERANCE);
        assert.equal(fed.length, 40 * vocab);
        // Layers that share keys compute the last positions only, where these are all that is wanted.
        const last = `
          await runner.reset();
          if ((await runner.facts()).chunk === 1) for (const id of args[0].slice(0, 20)) await runner.feed([id], 1);
          else await runner.feed(args[0].slice(0, 20), 1);
          return [...await runner.feed(args[0].slice(20, 21), 1)];`;
        const next = expected.subarray(20 * vocab, 21 * vocab);
        const range = errorOf(next, await within(page, last, vectors.ids));
        assert.ok(range < TOLERANCE, `${range}`);
        const greedy = `
          const found = [];
          const options = { maxNewTokens: args[1], greedy: true, ignoreEos: true };
          for await (const token of runner.generate(args[0], options)) found.push(token.id);
          return found;`;
        assert.deepEqual(await within(page, greedy, vectors.prompt, vectors.greedy.length), vectors.greedy);
        // The control: one id is another.
        const ids = vectors.ids.slice(0, 9).with(3, (vectors.ids[3]! + 1) % 60);
        assert.ok(errorOf(expected.subarray(0, 9 * vocab), await within(page, all, ids)) > 10 * TOLERANCE);
      });
    });
  }
});

test("the page opens without a network, and keeps what WebGPU needs and nothing else", async () => {
  const site = "web-demo/pleexport-web/build/page";
  execFileSync("node", [join(ROOT, "web-demo/page/build.mjs"), join(ROOT, site)]);
  const profile = fs.mkdtempSync(join(tmpdir(), "pleexport-profile-"));
  const options = { executablePath: CHROMIUM, args: ["--no-sandbox", ...WEBGPU] };
  const browser = await chromium.launchPersistentContext(profile, options);
  try {
    const page = await browser.newPage();
    page.setDefaultTimeout(300_000);
    const isReady = async (): Promise<void> => {
      await page.waitForSelector("#welcome:visible, #failure:visible");
      assert.ok(await page.isHidden("#failure"), (await page.textContent("#failure"))!);
    };
    const answer = async (): Promise<string> => {
      await page.fill("#message", "ab");
      await page.press("#message", "Enter");
      await page.waitForSelector("#send:visible");
      assert.equal(await page.locator(".wrong").count(), 0, await page.innerText("#log"));
      return (await page.locator(".turn .text").allTextContents()).join("");
    };
    await page.addInitScript(`localStorage.setItem("pleexport-settings", '{"temperature":0,"length":6}')`);
    await page.goto(`${server.url}/${site}/?bundle=/${FOLDER}/page`);
    await isReady();
    assert.match(await page.innerText("#facts"), /GPU/);
    const expected = await answer();
    assert.ok(expected.length > 2);
    const names = `caches.keys()
      .then((all) => Promise.all(all.map(async (name) => (await caches.open(name)).keys())))
      .then((found) => found.flat().map(({ url }) => url.slice(url.lastIndexOf("/") + 1)).filter((name) => name.startsWith("ort-")).sort())`;
    const wanted = ["ort-gpu.js", "ort-wasm-simd-threaded.asyncify.js", "ort-wasm-simd-threaded.asyncify.wasm"];
    for (const end = Date.now() + 60_000; (await page.evaluate<string[]>(names)).length < 3 && Date.now() < end; ) await page.waitForTimeout(50);
    assert.deepEqual(await page.evaluate(names), wanted);
    server.manners.isAway = () => true;
    await page.reload();
    await isReady();
    assert.match(await page.innerText("#notes"), /There is no network/);
    assert.equal(await answer(), expected);
    // The control: without what is kept of the runtime, it cannot.
    await page.evaluate(`caches.keys().then((all) => Promise.all(all.map(async (name) => {
      const cache = await caches.open(name);
      for (const request of await cache.keys()) if (request.url.includes("asyncify")) await cache.delete(request);
    })))`);
    await page.reload();
    await page.waitForSelector("#failure:visible");
  } finally {
    delete server.manners.isAway;
    await browser.close();
    fs.rmSync(profile, { recursive: true, force: true });
  }
});

test("without WebGPU it is said, and WebAssembly computes the same", async () => {
  const { name, vectors } = bundles[0]!;
  await inPage([], name, async (page, notes) => {
    assert.equal(notes.length, 1);
    assert.match(notes[0]!, /is made for WebGPU, which is not here: WebAssembly computes it/);
    const logits = await within<number[]>(page, "return [...await runner.logits(args[0])]", vectors.ids);
    assert.ok(errorOf(floatsOf(vectors.logits), logits) < TOLERANCE);
  });
});
