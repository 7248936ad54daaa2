// The chat page in Chromium, each test with a profile of its own. PLEEXPORT_SHOTS=FOLDER keeps pictures.
import assert from "node:assert/strict";
import { execFileSync, spawnSync } from "node:child_process";
import { createHash } from "node:crypto";
import * as fs from "node:fs";
import { createRequire } from "node:module";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, before, describe, test } from "node:test";

import { chromium, type BrowserContext, type Page } from "playwright-core";

import { CHUNK_BYTES } from "../src/checksums.js";
import { xxh3Hex } from "../src/xxh3.js";
import { serve, type Manners, type RangeServer } from "./range-server.js";
import { readJson, ROOT } from "./vectors.js";

const CHROMIUM = process.env["PLEEXPORT_CHROMIUM"] ?? "/usr/bin/chromium";
const SHOTS = process.env["PLEEXPORT_SHOTS"];
const SITE = "web-demo/pleexport-web/build/page";
const CHAT = "conformance/gemma4-fp32";
const TEXT = "conformance/rwkv7a-int8";
const LARGE = `${SITE}-large`;
const ENDLESS = `${SITE}-endless`;
const LARGE_BYTES = 5 * CHUNK_BYTES + 77;
const AXE = fs.readFileSync(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");
const OPTIONS = { executablePath: CHROMIUM, args: ["--no-sandbox"], viewport: { width: 1000, height: 720 } };
let server: RangeServer;

before(async () => {
  execFileSync("node", [join(ROOT, "web-demo/page/build.mjs"), join(ROOT, SITE)]);
  // Weights of several chunks: what is behind the last tensor counts for nothing.
  const weights = Buffer.alloc(LARGE_BYTES, fs.readFileSync(join(ROOT, CHAT, "model.onnx.data")));
  writeChanged(LARGE, { "model.onnx.data": weights }, () => {});
  const template = Buffer.from("{% for a in range(99999) %}".repeat(3) + "{% endfor %}".repeat(3));
  writeChanged(ENDLESS, { "chat_template.jinja": template }, (manifest) => {
    delete manifest.chat_format;
    manifest.no_chat_format = "it never ends";
  });
  server = await serve(ROOT, { isolates: true });
});

after(() => server.close());

/** Copies a bundle, with other files and another manifest. */
function writeChanged(bundle: string, files: Readonly<Record<string, Buffer>>, change: (manifest: any) => void): void {
  const folder = join(ROOT, bundle);
  fs.cpSync(join(ROOT, CHAT), folder, { recursive: true });
  const [manifest, checksums] = ["manifest.json", "checksums.json"].map((name) => readJson(join(folder, name)));
  for (const record of manifest.files) record.size = files[record.name]?.length ?? record.size;
  change(manifest);
  for (const [name, content] of Object.entries({ ...files, "manifest.json": Buffer.from(JSON.stringify(manifest)) })) {
    const chunks = Array.from({ length: Math.ceil(content.length / CHUNK_BYTES) }, (_, i) => i * CHUNK_BYTES);
    checksums.files[name] = chunks.map((at) => xxh3Hex(content.subarray(at, at + CHUNK_BYTES)));
    fs.writeFileSync(join(folder, name), content);
  }
  fs.writeFileSync(join(folder, "checksums.json"), JSON.stringify(checksums));
}

/** Runs a test in a browser that nothing was kept in, with a server of these manners. */
async function visited(
  manners: Manners,
  use: (page: Page, browser: BrowserContext) => Promise<void>,
  profile = fs.mkdtempSync(join(tmpdir(), "pleexport-profile-")),
): Promise<void> {
  const browser = await chromium.launchPersistentContext(profile, OPTIONS);
  browser.setDefaultTimeout(60_000);
  Object.assign(server.manners, { isolates: true }, manners);
  try {
    await use(await newPage(browser), browser);
  } finally {
    for (const name of Object.keys(server.manners)) delete server.manners[name as keyof Manners];
    await browser.close();
    fs.rmSync(profile, { recursive: true, force: true });
  }
}

async function newPage(browser: BrowserContext): Promise<Page> {
  const page = await browser.newPage();
  page.on("pageerror", (err) => assert.fail(`the page threw ${err}`));
  return page;
}

function go(page: Page, bundle = CHAT): Promise<unknown> {
  return page.goto(`${server.url}/${SITE}/?bundle=${encodeURIComponent(`/${bundle}`)}`);
}

/** Opens the page, with texts that do not change from one time to the next. */
async function opened(page: Page, bundle = CHAT): Promise<void> {
  await page.addInitScript(`localStorage.setItem("pleexport-settings", '{"temperature":0,"length":24}')`);
  await go(page, bundle);
  await isReady(page);
}

async function isReady(page: Page): Promise<void> {
  await page.waitForSelector("#welcome:visible, #failure:visible");
  assert.ok(await page.isHidden("#failure"), (await page.textContent("#failure"))!);
}

/** Waits until an expression is true; what waits in the page would evaluate it there, which its policy forbids. */
async function until(page: Page, expression: string): Promise<void> {
  for (const end = Date.now() + 60_000; !(await page.evaluate(expression)); ) {
    assert.ok(Date.now() < end, expression);
    await page.waitForTimeout(20);
  }
}

async function ask(page: Page, text: string): Promise<void> {
  await page.fill("#message", text);
  await page.press("#message", "Enter");
  await page.waitForSelector("#send:visible");
}

/** The page's own files are kept, so that it opens without a network, and of what computes, what the bundle needs. */
async function pageIsKept(page: Page): Promise<void> {
  await page.evaluate("navigator.serviceWorker.ready");
  for (const end = Date.now() + 60_000; !(await keptNames(page)).some((name) => name.endsWith(".wasm")); ) {
    assert.ok(Date.now() < end, "no runtime is kept");
    await page.waitForTimeout(20);
  }
  assert.deepEqual((await keptNames(page)).filter((name) => /^ort-/.test(name)), ["ort-module.js", "ort-wasm-simd-threaded.wasm"]);
}

/** Names of the page's files that are kept. */
async function keptNames(page: Page): Promise<string[]> {
  const urls = await page.evaluate<string[]>(`(async () => {
    const found = [];
    for (const name of await caches.keys()) found.push(...await (await caches.open(name)).keys());
    return found.map(({ url }) => url);
  })()`);
  return urls.map((url) => url.slice(url.lastIndexOf("/") + 1)).sort();
}

function texts(page: Page): Promise<string[]> {
  return page.locator(".turn .text").allTextContents();
}

async function shot(page: Page, name: string): Promise<void> {
  if (SHOTS === undefined) return;
  fs.mkdirSync(SHOTS, { recursive: true });
  await page.screenshot({ path: join(SHOTS, `${name}.png`) });
}

/** What breaks rules of accessibility, in either colour scheme. */
async function assertAccessible(page: Page): Promise<void> {
  for (const colorScheme of ["light", "dark"] as const) {
    await page.emulateMedia({ colorScheme });
    if (!(await page.evaluate("'axe' in globalThis"))) await page.evaluate(AXE);
    const found = await page.evaluate<string[]>(
      "axe.run().then(({ violations }) => violations.flatMap(({ id, nodes }) => nodes.map(({ html }) => `${id}: ${html}`)))",
    );
    assert.deepEqual(found, [], colorScheme);
  }
  await page.emulateMedia({ colorScheme: "light" });
}

/** What is asked of the bundle and of the page's own files, from a moment on. */
function counting(): () => { bundle: string[]; page: string[]; bytes: number } {
  const [first, bytes] = [server.asked.length, server.bytes];
  return () => {
    const names = server.asked.slice(first).map(([name]) => name);
    return {
      bundle: names.filter((name) => name.startsWith("conformance/")).map((name) => name.split("/").at(-1)!).sort(),
      page: names.filter((name) => name.startsWith(SITE)).map((name) => name.slice(SITE.length + 1)).sort(),
      bytes: server.bytes - bytes,
    };
  };
}

/** A gate that a test opens. */
function gate(): { isOpen: Promise<void>; open: () => void } {
  let open = (): void => {};
  const isOpen = new Promise<void>((resolve) => (open = resolve));
  return { isOpen, open };
}

const isBundle = (name: string): boolean => name.startsWith("conformance/");

test("a conversation by the keyboard alone", () =>
  visited({}, async (page) => {
    await opened(page);
    await shot(page, "ready");
    await assertAccessible(page);
    assert.equal(await page.evaluate("document.activeElement.id"), "message");
    await page.keyboard.type("ab");
    await page.keyboard.press("Shift+Enter");
    await page.keyboard.type("cd");
    assert.equal(await page.inputValue("#message"), "ab\ncd");
    await page.keyboard.press("Enter");
    await page.waitForSelector("#send:visible");
    const [question, answer] = await texts(page);
    assert.equal(question, "ab\ncd");
    assert.ok(answer!.length > 3);
    assert.match(await page.innerText(".turn .meta"), /because of its length, 24 tokens/);
    assert.notEqual(await page.textContent("#said"), "", "it is heard");
    await ask(page, "ef");
    assert.equal((await texts(page)).length, 4);
    await shot(page, "conversation");
    await assertAccessible(page);
    await page.emulateMedia({ colorScheme: "dark" });
    await shot(page, "dark");
    await page.setViewportSize({ width: 360, height: 640 });
    await shot(page, "narrow");
    assert.ok(await page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "nothing is wider than a phone");
    // The same question in a new conversation has the same answer: nothing of the old one is left.
    await page.click("#new");
    await ask(page, "ab\ncd");
    assert.deepEqual(await texts(page), [question, answer]);
    await page.focus("#new");
    await page.keyboard.press("Shift+Tab");
    assert.equal(await page.evaluate("document.activeElement.className"), "skip");
    await page.keyboard.press("Enter");
    assert.equal(await page.evaluate("document.activeElement.id"), "message");
  }));

test("a text is stopped by Escape, and what has come stays", () =>
  visited({}, async (page) => {
    await opened(page);
    await page.click("#settings-open");
    await page.fill("#length", "2000");
    await shot(page, "settings");
    await assertAccessible(page);
    await page.keyboard.press("Escape");
    await page.fill("#message", "ab");
    await page.press("#message", "Enter");
    await until(page, "document.querySelector('.model .text').textContent.length > 20");
    await page.keyboard.press("Escape");
    await page.waitForSelector("#send:visible");
    assert.equal(await page.innerText(".turn .meta"), "Stopped.");
    const [, answer] = await texts(page);
    assert.ok(answer!.length > 20);
    // Settings last; the conversation goes on.
    assert.equal(await page.inputValue("#length"), "2000");
    await page.click("#settings-open");
    await page.fill("#length", "8");
    await page.click("#settings-close");
    await ask(page, "cd");
    assert.equal((await texts(page)).length, 4);
  }));

test("a bundle without a chat format goes on with a text, and says so", () =>
  visited({}, async (page) => {
    await opened(page, TEXT);
    assert.match(await page.innerText("#welcome"), /not made for conversations: it goes on with what you write/);
    await ask(page, "ab");
    const [first] = await texts(page);
    assert.ok(first!.startsWith("ab") && first!.length > 3);
    await page.press("#message", "Enter");
    await page.waitForSelector("#send:visible");
    const [second] = await texts(page);
    assert.ok(second!.startsWith(first!) && second!.length > first!.length);
    await ask(page, "xy");
    assert.ok((await texts(page))[0]!.startsWith(second!));
    assert.deepEqual((await page.locator(".own").allTextContents()), ["ab", "xy"]);
    await assertAccessible(page);
  }));

test("a bundle without a tokenizer is refused in a sentence", () =>
  visited({}, async (page) => {
    await go(page, "conformance/gemma4-quantized");
    await page.waitForSelector("#failure:visible");
    assert.match(await page.innerText("#failure"), /This bundle has no tokenizer, so it cannot read texts/);
  }));

test("loading is told in bytes, and a slow network seen", () => {
  const [rest, more] = [gate(), gate()];
  const halts = (name: string): Promise<void> | undefined =>
    name.endsWith("model.onnx.data") ? rest.isOpen : name.endsWith(".wasm") ? more.isOpen : undefined;
  return visited({ halts }, async (page) => {
    await go(page);
    const words = (): Promise<string> => page.innerText("#progress-words");
    await until(page, "document.getElementById('progress').value > 0.48");
    const half = Number(await page.getAttribute("#progress", "value"));
    assert.ok(half > 0.4 && half < 0.6, `${half}`);
    assert.match(await words(), /^7\.\d MB of 14\.\d MB$/);
    assert.equal(await page.isDisabled("#message"), true);
    await shot(page, "loading");
    await assertAccessible(page);
    more.open();
    // All but the weights, which come in many parts before that.
    await until(page, "/^14\\.\\d MB of 14\\.\\d MB$/.test(document.getElementById('progress-words').innerText)");
    assert.equal(await page.isDisabled("#message"), true);
    rest.open();
    await isReady(page);
  });
});

test("the first start and the next ones, as the server counts them", () =>
  visited({}, async (page, browser) => {
    const cold = counting();
    await opened(page);
    await pageIsKept(page);
    const first = cold();
    const files = fs.readdirSync(join(ROOT, CHAT)).concat("starter.safetensors").filter((name) => name !== "parity.json");
    assert.deepEqual([...new Set(first.bundle)], files.sort(), "each once, and of the blob its beginning");
    assert.equal(first.bundle.length, files.length);
    const site = fs.readdirSync(join(ROOT, SITE)).map((name) => fs.statSync(join(ROOT, SITE, name)).size);
    const held = files.reduce((sum, name) => sum + (fs.statSync(join(ROOT, CHAT, name), { throwIfNoEntry: false })?.size ?? 0), 0);
    assert.ok(first.bytes <= site.reduce((sum, size) => sum + size, held), "nothing is sent twice");
    await ask(page, "ab");
    const [, answer] = await texts(page);
    await page.close();
    const warm = counting();
    const again = await newPage(browser);
    await opened(again);
    await ask(again, "ab");
    assert.deepEqual(await texts(again), ["ab", answer]);
    const { bundle, page: own } = warm();
    assert.deepEqual(bundle, ["checksums.json", "manifest.json"]);
    assert.deepEqual(own.filter((name) => name !== "service-worker.js"), [], "all else comes from this device");
    assert.match(await again.innerText("#facts"), /Requests\s+2\s/);
  }));

test("it opens and answers without a network, and says which rows are missing", () => {
  let isAway = false;
  return visited({ isAway: () => isAway }, async (page) => {
    await opened(page);
    await pageIsKept(page);
    await ask(page, "ab");
    const [, answer] = await texts(page);
    isAway = true;
    await page.reload();
    await isReady(page);
    assert.match(await page.innerText("#notes"), /There is no network: this is what was kept on this device/);
    await ask(page, "ab");
    assert.deepEqual(await texts(page), ["ab", answer]);
    await shot(page, "offline");
    await page.click("#new");
    await ask(page, "The quick brown fox jumps over 0123456789 lazy dogs: ÄÖÜ!");
    assert.match(await page.innerText(".wrong"), /^Rows of .* cannot be read: they are not kept on this device yet, and the server cannot be reached/);
    await shot(page, "row-missing");
    await assertAccessible(page);
    assert.match(await page.inputValue("#message"), /^The quick/, "what was written is not lost");
    // With a network it goes on, and all rows can be kept.
    isAway = false;
    await ask(page, await page.inputValue("#message"));
    assert.equal(await page.locator(".wrong").count(), 1, "none is new");
    await page.click("#settings-open");
    await page.click("#keep");
    await until(page, "document.getElementById('keep-words').textContent === 'All rows are kept.'");
    isAway = true;
    await page.reload();
    await isReady(page);
    await ask(page, "0123456789 ÄÖÜ ßéñ {}[]");
    assert.equal(await page.locator(".wrong").count(), 0);
  });
});

test("a text that the network fails stays as far as it has come", () => {
  let isAway = false;
  return visited({ isAway: () => isAway }, async (page) => {
    await page.addInitScript(`localStorage.setItem("pleexport-settings", '{"temperature":2,"length":1000}')`);
    await go(page);
    await isReady(page);
    await page.fill("#message", "ab");
    await page.press("#message", "Enter");
    await until(page, "document.querySelector('.model .text').textContent.length > 3");
    const [, before] = await texts(page);
    isAway = true;
    await page.waitForSelector("#send:visible");
    assert.match(await page.innerText(".wrong"), /not kept on this device yet, and the server cannot be reached/);
    assert.ok((await texts(page))[1]!.startsWith(before!));
    await shot(page, "broken-off");
  });
});

describe("what goes wrong is said in a sentence", () => {
  const failures: [string, Manners, RegExp][] = [
    ["a server without ranges", { ignoresRanges: () => true }, /answers a request for a part of embeddings\.safetensors with the whole file, 200 in place of 206.*\n+Serve the bundle from a server that answers requests for parts/],
    ["a damaged file", { damages: (name) => name.endsWith("model.onnx.data") }, /model\.onnx\.data is damaged: chunk 0 of 1, at byte 0, does not match/],
    ["a connection that ends", { cutsOff: (name) => name.endsWith("model.onnx.data") }, /model\.onnx\.data cannot be read \(the connection ended too early/],
    ["a server that fails", { status: (name) => (isBundle(name) ? 500 : undefined) }, /cannot be read \(the server answered 500\)/],
    ["no bundle", { status: (name) => (isBundle(name) ? 404 : undefined) }, /is not a bundle: manifest\.json cannot be read \(the server answered 404\)/],
  ];
  for (const [name, manners, words] of failures) {
    test(name, () =>
      visited(manners, async (page) => {
        const count = counting();
        await go(page);
        await page.waitForSelector("#failure:visible");
        assert.match(await page.innerText("#failure"), words);
        if (name === "a damaged file") {
          const { bundle } = count();
          assert.equal(bundle.filter((own) => own === "model.onnx.data").length, 2, "it was asked for twice");
          await shot(page, "failure");
          await assertAccessible(page);
        }
        for (const own of Object.keys(manners)) delete server.manners[own as keyof Manners];
        await page.click("#failure button");
        await isReady(page);
      }));
  }

  test("a file that is damaged once", () => {
    let count = 0;
    const damages = (name: string): boolean => name.endsWith("model.onnx.data") && ++count === 1;
    return visited({ damages }, async (page) => {
      await opened(page);
      assert.equal(count, 2);
    });
  });

  test("no space", () => {
    const full = "FileSystemSyncAccessHandle.prototype.write = function () { return 4294967288; };\n";
    const replaces = (name: string, data: Buffer): Buffer =>
      name.endsWith("/worker.js") ? Buffer.concat([Buffer.from(full), data]) : data;
    return visited({ replaces }, async (page) => {
      await go(page);
      await page.waitForSelector("#failure:visible");
      assert.match(await page.innerText("#failure"), /model\.onnx\.data cannot be read \(no space is left on this device to keep it\)\.\n+Free space on this device/);
    });
  });

  test("a disk that is full", async (context) => {
    const disk = fs.mkdtempSync(join(tmpdir(), "pleexport-disk-"));
    if (spawnSync("mount", ["-t", "tmpfs", "-o", "size=120m", "tmpfs", disk]).status !== 0) {
      context.skip("a file system of one's own needs the rights to mount it");
      return;
    }
    const filler = join(disk, "filler");
    try {
      await visited({}, async (page) => {
        await page.goto(`${server.url}/web-demo/pleexport-web/test/page.html`);
        const { bavail, bsize } = fs.statfsSync(disk);
        fs.writeFileSync(filler, Buffer.alloc(bavail * bsize - 2 * CHUNK_BYTES));
        await go(page, LARGE);
        await page.waitForSelector("#failure:visible");
        assert.match(await page.innerText("#failure"), /model\.onnx\.data cannot be read \(no space is left on this device to keep it\)\.\n+Free space on this device/);
        await shot(page, "full");
        // The control: with space it goes on.
        fs.rmSync(filler);
        await page.click("#failure button");
        await isReady(page);
        await ask(page, "ab");
        assert.equal(await page.locator(".wrong").count(), 0);
      }, join(disk, "profile"));
    } finally {
      spawnSync("umount", [disk]);
      fs.rmdirSync(disk);
    }
  });

  test("no space for rows", () => {
    const full = `
      const { write } = FileSystemSyncAccessHandle.prototype;
      FileSystemSyncAccessHandle.prototype.write = function (bytes, options) {
        return options.at > 20000 && bytes.length < 1000 ? 4294967288 : write.call(this, bytes, options);
      };\n`;
    const replaces = (name: string, data: Buffer): Buffer =>
      name.endsWith("/worker.js") ? Buffer.concat([Buffer.from(full), data]) : data;
    return visited({ replaces }, async (page) => {
      await opened(page);
      await ask(page, "The quick brown fox jumps over 0123456789 lazy dogs: ÄÖÜ!");
      assert.equal(await page.locator(".wrong").count(), 0);
      assert.match(await page.innerText("#notes"), /Rows are not kept for the next time: no space is left on this device/);
    });
  });

  test("a chat template that never ends", () =>
    visited({}, async (page) => {
      await opened(page, ENDLESS);
      for (const count of [1, 2]) {
        await ask(page, "ab");
        assert.equal(await page.locator(".wrong").count(), count);
        assert.match(await page.locator(".wrong").last().innerText(), /cannot render this conversation: it takes longer than 2 seconds/);
      }
    }));

  test("one thread", () =>
    visited({ isolates: false }, async (page) => {
      await opened(page);
      assert.match(await page.innerText("#notes"), /One thread only/);
      await ask(page, "ab");
    }));

  const features: [string, string, RegExp][] = [
    ["no WebAssembly", "delete globalThis.WebAssembly", /no WebAssembly with SIMD/],
    ["no private file system", "delete StorageManager.prototype.getDirectory", /no private file system/],
    ["no workers that are modules", "globalThis.Worker = class { terminate() {} }", /no workers that are modules/],
    ["no https", "Object.defineProperty(globalThis, 'isSecureContext', { value: false })", /opened without https/],
  ];
  for (const [name, script, words] of features) {
    test(name, () =>
      visited({}, async (page) => {
        const count = counting();
        await page.addInitScript(script);
        await go(page);
        await page.waitForSelector("#failure:visible");
        assert.match(await page.innerText("#failure"), words);
        assert.deepEqual(count().bundle, [], "before anything is fetched");
      }));
  }
});

describe("weights that break off", () => {
  const [bundle, bytes] = [LARGE, LARGE_BYTES];
  const isWeights = (name: string): boolean => name === `${LARGE}/model.onnx.data`;
  const ranges = (): (string | undefined)[] => server.asked.filter(([name]) => isWeights(name)).map(([, range]) => range);

  test("go on at the byte where they were, while the page is open", () => {
    let cuts = 0;
    return visited({ cutsOff: (name) => isWeights(name) && ++cuts <= 2 }, async (page) => {
      server.asked.length = 0;
      await opened(page, bundle);
      const half = bytes >> 1;
      assert.deepEqual(ranges(), [undefined, `bytes=${half}-`, `bytes=${half + ((bytes - half) >> 1)}-`]);
      await ask(page, "ab");
      assert.equal((await texts(page)).length, 2);
    });
  });

  /** Breaks a download off, does something to what is kept of it, and opens the page again. */
  async function brokenOff(page: Page, change: string, manners: Manners = {}): Promise<void> {
    let count = 0;
    server.asked.length = 0;
    Object.assign(server.manners, { cutsOff: isWeights, isAway: (name: string) => isWeights(name) && ++count > 1 });
    await go(page, bundle);
    await page.waitForSelector("#failure:visible");
    assert.match(await page.innerText("#failure"), /model\.onnx\.data cannot be read \(the connection ended too early/);
    await page.evaluate(`(async () => {
      const visit = async (folder) => {
        for await (const handle of folder.values()) {
          if (handle.kind === "directory") await visit(handle);
          else if (handle.name.endsWith(".partial")) {
            const data = new Uint8Array(await (await handle.getFile()).arrayBuffer());
            if (data.length !== ${bytes >> 1}) throw new Error("it has " + data.length + " bytes");
            ${change}
            const out = await handle.createWritable();
            await out.write(data);
            await out.close();
          }
        }
      };
      await visit(await navigator.storage.getDirectory());
    })()`);
    for (const name of ["cutsOff", "isAway"] as const) delete server.manners[name];
    Object.assign(server.manners, manners);
    server.asked.length = 0;
    await page.reload();
    await isReady(page);
  }

  test("go on behind the last whole chunk, when the page is opened again", () =>
    visited({}, async (page) => {
      await brokenOff(page, "");
      assert.deepEqual(ranges(), [`bytes=${2 * CHUNK_BYTES}-`]);
    }));

  test("go on behind the last chunk that matches its checksum", () =>
    visited({}, async (page) => {
      await brokenOff(page, `data[${CHUNK_BYTES} + 5] ^= 1;`);
      assert.deepEqual(ranges(), [`bytes=${CHUNK_BYTES}-`]);
    }));

  test("begin again where the server knows no ranges of them", () =>
    visited({}, async (page) => {
      await brokenOff(page, "", { ignoresRanges: isWeights });
      assert.deepEqual(ranges(), [`bytes=${2 * CHUNK_BYTES}-`]);
    }));

  test("come as a whole where the rest is damaged", () => {
    let count = 0;
    return visited({}, async (page) => {
      await brokenOff(page, "", { damages: (name) => isWeights(name) && ++count === 1 });
      assert.deepEqual(ranges(), [`bytes=${2 * CHUNK_BYTES}-`, undefined]);
    });
  });
});

test("two tabs at once: both answer, and one keeps no rows", () =>
  visited({}, async (page, browser) => {
    const other = await newPage(browser);
    await Promise.all([opened(page), opened(other)]);
    const notes = await Promise.all([page, other].map((own) => own.innerText("#notes")));
    assert.equal(notes.filter((note) => note.includes("Rows are not kept for the next time: another tab keeps them.")).length, 1);
    await ask(page, "ab");
    await ask(other, "ab");
    assert.deepEqual(await texts(other), await texts(page));
  }));

test("a tab that is closed while it loads is in nobody's way", () => {
  const [asked, rest] = [gate(), gate()];
  let isFirst = true;
  const halts = (name: string): Promise<void> | undefined => {
    if (!isFirst || !name.endsWith("model.onnx.data")) return undefined;
    isFirst = false;
    asked.open();
    return rest.isOpen;
  };
  return visited({ halts }, async (page, browser) => {
    await go(page);
    await asked.isOpen;
    await page.close();
    const again = await newPage(browser);
    await opened(again);
    await ask(again, "ab");
    rest.open();
  });
});

test("a new version of the page takes the old one's place when its reader says so", () => {
  const site = join(ROOT, SITE);
  const digest = (data: Buffer | string): string => createHash("sha256").update(data).digest("base64");
  const old = fs.readFileSync(join(site, "app.js"));
  const next = Buffer.concat([old, Buffer.from("\nglobalThis.isNext = true;\n")]);
  let isNew = false;
  const replaces = (name: string, data: Buffer): Buffer => {
    if (!isNew || !name.startsWith(SITE)) return data;
    if (name.endsWith("/app.js")) return next;
    if (!name.endsWith("/service-worker.js")) return data;
    // As the build would have written it: another digest of the file, and of all.
    const text = data.toString().replace(digest(old), digest(next));
    const all = /"pleexport-page-",\w+=\w+\+"([^"]+)"/.exec(text)![1]!;
    return Buffer.from(text.replace(all, digest(text)));
  };
  return visited({ replaces }, async (page) => {
    await opened(page);
    await pageIsKept(page);
    isNew = true;
    await page.reload();
    await isReady(page);
    assert.equal(await page.evaluate("globalThis.isNext"), undefined, "the old version is whole");
    await Promise.all([page.waitForEvent("load"), page.click("#notes button")]);
    await isReady(page);
    assert.equal(await page.evaluate("globalThis.isNext"), true);
    assert.equal((await page.evaluate<string[]>("caches.keys()")).length, 1, "nothing of the old one is left");
  });
});
