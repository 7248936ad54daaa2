// The package in Debian's Chromium: a profile on disk, since a private one keeps files in memory.
import assert from "node:assert/strict";
import * as fs from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, afterEach, before, describe, test } from "node:test";

import { chromium, type BrowserContext, type Page } from "playwright-core";

import type { Progress } from "../src/progress.js";
import type { Facts } from "../src/protocol.js";
import { serve, type Manners, type RangeServer } from "./range-server.js";
import { floatsOf, ROOT, vectorsOf, type Case } from "./vectors.js";

const CHROMIUM = process.env["PLEEXPORT_CHROMIUM"] ?? "/usr/bin/chromium";
const profile = fs.mkdtempSync(join(tmpdir(), "pleexport-profile-"));
let server: RangeServer;
let browser: BrowserContext;

before(async () => {
  server = await serve(ROOT, { isolates: true });
  browser = await chromium.launchPersistentContext(profile, { executablePath: CHROMIUM, args: ["--no-sandbox"] });
});

afterEach(async () => {
  // What one test leaves open would be in the way of the next.
  for (const page of browser.pages().slice(1)) await page.close();
});

after(async () => {
  await browser.close();
  await server.close();
  fs.rmSync(profile, { recursive: true, force: true });
});

async function newPage(): Promise<Page> {
  const page = await browser.newPage();
  page.on("pageerror", (err) => console.error("page:", err));
  page.setDefaultTimeout(60_000);
  await page.goto(`${server.url}/web-demo/pleexport-web/test/page.html`);
  await page.waitForFunction("globalThis.isReady");
  return page;
}

/** Runs a function body in the page; `runner` is its runner. */
function within<T>(page: Page, body: string, ...args: unknown[]): Promise<T> {
  return page.evaluate(`(async (...args) => { ${body} })(...${JSON.stringify(args)})`) as Promise<T>;
}

function open(page: Page, name: string, threads = 1): Promise<Facts> {
  return within(page, "return start().open(args[0], { threads: args[1] })", `/conformance/${name}`, threads);
}

/** Forgets all that was kept. */
async function forget(page: Page): Promise<void> {
  await within(page, `
    const root = await navigator.storage.getDirectory();
    for await (const name of root.keys()) await root.removeEntry(name, { recursive: true });`);
}

/** What an error in the page says. */
function refused(page: Page, body: string, ...args: unknown[]): Promise<string> {
  const tried = `try { ${body} } catch (err) { return err.name + ": " + err.message; } return "nothing was refused";`;
  return within(page, tried, ...args);
}

async function close(page: Page): Promise<void> {
  await within(page, "await runner.close()");
  await page.close();
}

async function manners<T>(changes: Manners, use: () => Promise<T>): Promise<T> {
  Object.assign(server.manners, changes);
  try {
    return await use();
  } finally {
    for (const name of Object.keys(changes)) delete server.manners[name as keyof Manners];
    server.manners.isolates = true;
  }
}

describe("vectors in the page", () => {
  for (const { name, vectors } of vectorsOf("logits")) {
    test(name, async () => {
      const page = await newPage();
      await open(page, name);
      assert.equal(await page.evaluate("crossOriginIsolated"), true);
      const [own] = vectors["logits"] as [Case];
      const vocab = vectors["logits"] && (await within<Facts>(page, "return runner.facts()")).vocabSize;
      const logits = Float32Array.from(
        await within<number[]>(page, "return [...await runner.logits(args[0])]", own["ids"]),
      );
      const expected = floatsOf(own["unrounded"] ?? own["logits"]);
      const tolerance = own["unrounded_tolerance"] ?? own["tolerance"];
      (own["positions"] as number[]).forEach((position, i) => {
        for (let id = 0; id < vocab; id++) {
          const difference = Math.abs(expected[i * vocab + id]! - logits[position * vocab + id]!);
          assert.ok(difference <= tolerance, `position ${position}: ${difference}`);
        }
      });
      for (const { prompt_ids: prompt, ids } of vectors["greedy"] as Case[]) {
        const body = `
          const found = [];
          const options = { maxNewTokens: args[1], greedy: true, ignoreEos: true };
          for await (const token of runner.generate(args[0], options)) found.push(token.id);
          return found;`;
        assert.deepEqual(await within(page, body, prompt, ids.length), ids);
      }
      for (const { text, ids } of (vectors["texts"] ?? []) as Case[]) {
        assert.deepEqual(await within(page, "return runner.encode(args[0])", text), ids, text);
      }
      await close(page);
    });
  }
});

const NAME = "gemma4-int4";
const isBundle = (name: string): boolean => name.startsWith("conformance");
const IDS = [2, 5, 250, 7];

test("weights and rows are kept for the next time", async () => {
  const asked = (): string[] => server.asked.map(([name]) => name).filter((name) => name.includes(NAME));
  const page = await newPage();
  await forget(page);
  const first = await open(page, NAME);
  assert.equal(first.notKept, null);
  const cold = await within<number[]>(page, "return [...await runner.logits(args[0])]", IDS);
  await close(page);
  const before = asked().length;
  const again = await newPage();
  await open(again, NAME);
  const warm = await within<number[]>(again, "return [...await runner.logits(args[0])]", IDS);
  assert.deepEqual(warm, cold);
  const heads = [`conformance/${NAME}/checksums.json`, `conformance/${NAME}/manifest.json`];
  assert.deepEqual(asked().slice(before).sort(), heads);
  await close(again);
});

test("what was kept opens without a network", async () => {
  const page = await newPage();
  await open(page, NAME);
  const body = "return [...await runner.logits(args[0])]";
  const logits = await within(page, body, IDS);
  await close(page);
  const again = await newPage();
  await manners({ isAway: isBundle }, async () => {
    assert.equal((await open(again, NAME)).isOffline, true);
    assert.deepEqual(await within(again, body, IDS), logits);
    const said = await refused(again, "await runner.feed([9, 3, 77])");
    assert.match(said, /^BundleError: rows of .* cannot be read: they are not kept on this device yet, and the server/);
    const other = "await start().open('/conformance/rwkv7b-fp16')";
    assert.match(await refused(await newPage(), other), /^BundleError: .*cannot be read \(the server cannot be reached/);
  });
  await within(again, "await runner.close()");
  await open(again, NAME);
  await within(again, "await runner.feed([9, 3, 77])");
  const facts = await within<Facts>(again, "await runner.keepRows(() => {}); return runner.facts()");
  assert.equal(facts.rowsKept, facts.numRows);
  await within(again, "await runner.close()");
  await manners({ isAway: isBundle }, async () => {
    await open(again, NAME);
    await within(again, "await runner.feed([11, 4, 78])");
  });
  await close(again);
});

test("a bundle that takes another's place replaces what was kept", async () => {
  const [name, other] = ["rwkv7b-fp16", "rwkv8-fp32"];
  const body = "return [...await runner.logits(args[0])]";
  const logits = async (): Promise<unknown> => within(page, body, [2, 5, 25, 7]);
  const page = await newPage();
  await forget(page);
  await open(page, other);
  const expected = await logits();
  await within(page, "await runner.close()");
  await open(page, name);
  assert.notDeepEqual(await logits(), expected);
  const swapped = (own: string, data: Buffer): Buffer =>
    own.startsWith(`conformance/${name}/`) ? fs.readFileSync(join(ROOT, own.replace(name, other))) : data;
  await manners({ replaces: swapped }, async () => {
    const late = await refused(page, "await runner.feed([60])");
    assert.match(late, /^BundleError: rows of .* cannot be read: the server has another bundle by now/);
    await within(page, "await runner.close()");
    await open(page, name);
    assert.deepEqual(await logits(), expected);
    const count = `
      const all = await (await navigator.storage.getDirectory()).getDirectoryHandle("pleexport");
      const counts = [];
      for await (const folder of all.values()) {
        let count = 0;
        for await (const _ of folder.keys()) count++;
        counts.push(count);
      }
      return counts;`;
    assert.deepEqual(await within(page, count), [1, 1], "of each URL, one bundle");
    await within(page, "await runner.close()");
  });
  await manners({ isAway: isBundle }, async () => {
    await open(page, name);
    assert.deepEqual(await logits(), expected);
  });
  await close(page);
});

test("how far it has come is told", async () => {
  const page = await newPage();
  await forget(page);
  const body = `
    const told = [];
    await start().open(args[0], { onProgress: (progress) => told.push(progress) });
    await runner.close();
    return told;`;
  const sizes = fs.readdirSync(join(ROOT, "conformance", NAME))
    .filter((name) => name !== "embeddings.safetensors")
    .map((name) => fs.statSync(join(ROOT, "conformance", NAME, name)).size);
  const runtime = fs.statSync(join(ROOT, "web-demo/pleexport-web/dist/browser/ort-wasm-simd-threaded.wasm")).size;
  const all = sizes.reduce((sum, size) => sum + size, runtime);
  const cold = await within<Progress[]>(page, body, `/conformance/${NAME}`);
  assert.deepEqual(cold.at(-1), { neededBytes: all, hereBytes: all, keptBytes: 0 });
  assert.ok(cold.every(({ hereBytes }, i) => hereBytes >= (cold[i - 1]?.hereBytes ?? 0)));
  const warm = await within<Progress[]>(page, body, `/conformance/${NAME}`);
  const heads = ["manifest.json", "checksums.json"].map((name) => fs.statSync(join(ROOT, "conformance", NAME, name)).size);
  assert.deepEqual(warm.at(-1), { neededBytes: all, hereBytes: all, keptBytes: all - runtime - heads[0]! - heads[1]! });
  await page.close();
});

test("a conversation is answered as its ids are continued", async () => {
  const page = await newPage();
  await open(page, "gemma4-fp32");
  const body = `
    const messages = [{ role: "user", content: "ab" }];
    let [answer, text] = ["", ""];
    for await (const piece of runner.chat(messages, { greedy: true, maxNewTokens: 20 })) answer += piece;
    const ids = await runner.encodeChat(messages);
    for await (const token of runner.generate(ids, { greedy: true, maxNewTokens: 20 })) text += token.text;
    return [answer, text];`;
  const [answer, text] = await within<[string, string]>(page, body);
  assert.equal(answer, text);
  assert.ok(answer.length > 3);
  await close(page);
});

test("a starter that is none is left out, and said", async () => {
  const page = await newPage();
  await forget(page);
  await manners({ status: (name) => (name.endsWith("starter.safetensors") ? 500 : undefined) }, async () => {
    const facts = await open(page, NAME);
    assert.match(facts.notes[0]!, /starter\.safetensors` cannot be read \(the server answered 500\); rows come when/);
  });
  await close(page);
});

/** A package for the web below the repository, whose starter has the rows of a text. */
const PACKAGE = process.env["PLEEXPORT_PACKAGE"];

test("rows of a starter are not asked for", { skip: PACKAGE === undefined }, async () => {
  const asked = (): string[] => server.asked.map(([name]) => name).filter((name) => name.startsWith(PACKAGE!));
  const rows = (names: string[]): number => names.filter((name) => name.endsWith("embeddings.safetensors")).length;
  const opening = "await start().open(args[0], { threads: 1 })";
  const page = await newPage();
  await within(page, opening, `/${PACKAGE}`);
  assert.equal(asked().filter((name) => name.endsWith("starter.safetensors")).length, 1);
  const before = asked().length;
  const ids = await within<number[]>(page, "return runner.encode(args[0])", process.env["PLEEXPORT_TEXT"]);
  await within(page, "await runner.logits(args[0])", ids);
  assert.equal(asked().length, before);
  const others = Array.from({ length: 40 }, (_, id) => id).filter((id) => !ids.includes(id));
  await within(page, "await runner.feed(args[0])", others);
  assert.equal(rows(asked().slice(before)), 1, "one request for all that is missing");
  await close(page);
  const again = await newPage();
  const then = asked().length;
  await within(again, opening, `/${PACKAGE}`);
  assert.ok(!asked().slice(then).some((name) => name.endsWith("starter.safetensors")), "its rows are kept");
  await close(again);
});

test("a second tab works, and keeps no rows", async () => {
  const [one, two] = [await newPage(), await newPage()];
  assert.equal((await open(one, NAME)).notKept, null);
  assert.notEqual((await open(two, NAME)).notKept, null);
  const body = "return [...await runner.logits(args[0])]";
  assert.deepEqual(await within(two, body, IDS), await within(one, body, IDS));
  await close(one);
  await close(two);
});

test("what was kept and is damaged is fetched again", async () => {
  const page = await newPage();
  const damage = `
    let count = 0;
    const visit = async (folder) => {
    for await (const handle of folder.values()) {
      if (handle.kind === "directory") {
        await visit(handle);
        continue;
      }
      const data = new Uint8Array(await (await handle.getFile()).arrayBuffer());
      if (data.length === 0) continue;
      data[data.length >> 1] ^= 1;
      const out = await handle.createWritable();
      await out.write(data);
      await out.close();
      count++;
    }
    };
    await visit(await navigator.storage.getDirectory());
    return count;`;
  await open(page, NAME);
  await within(page, "await runner.logits(args[0]); await runner.close()", IDS);
  assert.ok((await within<number>(page, damage)) >= 5);
  await open(page, NAME);
  await within(page, "await runner.logits(args[0])", IDS);
  await close(page);
});

test("what goes wrong on the way is said", async () => {
  const page = await newPage();
  const opening = "await start().open('/conformance/rwkv8-fp32', { threads: 1 })";
  const said = (changes: Manners): Promise<string> => manners(changes, () => refused(page, opening));
  await forget(page);
  assert.match(await said({ ignoresRanges: () => true }), /^BundleError: .* with the whole file, 200 in place of 206/);
  assert.match(await said({ damages: (name) => name.endsWith(".data") }), /^CheckFailed: .*model\.onnx\.data` is damaged/);
  assert.match(await said({ cutsOff: (name) => name.endsWith(".data") }), /^BundleError: .*the connection ended too early/);
  assert.match(await said({ status: (name) => (name.startsWith("conformance") ? 500 : undefined) }), /^BundleError: .*the server answered 500/);
  await within(page, opening);
  assert.match(await refused(page, "await runner.feed([999999])"), /^InputError: token id 999999 has no row/);
  await within(page, "await runner.feed([6])"); // the header is compared
  await manners({ damages: () => true }, async () => {
    assert.match(await refused(page, "await runner.feed([5])"), /^CheckFailed: .* the row of token id 5 does not match/);
  });
  await within(page, "await runner.feed([5])");
  await close(page);
});

test("a text that is stopped ends, and the next one is whole", async () => {
  const page = await newPage();
  await open(page, "gemma4-fp32");
  const body = `
    const options = { greedy: true, ignoreEos: true, maxNewTokens: 200 };
    const stopping = new AbortController();
    let count = 0;
    try {
      for await (const _ of runner.generate([2, 5], { ...options, signal: stopping.signal })) if (++count === 3) stopping.abort();
      return "it was not stopped";
    } catch (err) {
      if (err.name !== "AbortError") throw err;
    }
    for await (const _ of runner.generate([2, 5], options)) if (++count > 5) break;
    let whole = 0;
    for await (const _ of runner.generate([2, 5], { ...options, maxNewTokens: 9 })) whole++;
    return [count < 200, whole, runner.stats.finishReason];`;
  assert.deepEqual(await within(page, body), [true, 9, "length"]);
  await close(page);
});

test("threads are used where the page may have them", async () => {
  const page = await newPage();
  await open(page, "gemma4-fp32", 2);
  const body = "return [...await runner.logits(args[0])]";
  const two = await within<number[]>(page, body, IDS);
  await close(page);
  await manners({ isolates: false }, async () => {
    const other = await newPage();
    assert.equal(await other.evaluate("crossOriginIsolated"), false);
    await open(other, "gemma4-fp32", 2);
    const one = await within<number[]>(other, body, IDS);
    const most = Math.max(...two.map((logit, i) => Math.abs(logit - one[i]!)));
    assert.ok(most < 1e-4, `${most}`);
    await close(other);
  });
});
