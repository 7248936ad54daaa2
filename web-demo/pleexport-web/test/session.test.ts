import assert from "node:assert/strict";
import { describe, test } from "node:test";

import { BundleError, InputError } from "../src/errors.js";
import { residentMemory } from "../src/memory.js";
import { openBundle } from "../src/node.js";
import { Runner, type GenerationOptions } from "../src/runner.js";
import { seeded } from "../src/sampling.js";
import type { Token } from "../src/stats.js";
import { CONFORMANCE, refusal } from "./vectors.js";

/** Of the range of the logits. */
const TOLERANCE = 1e-4;
const random = seeded(5);

async function open(name: string): Promise<Runner> {
  return Runner.open(await openBundle(`${CONFORMANCE}/${name}`), { threads: 1 });
}

function textOf(runner: Runner, count: number): number[] {
  return Array.from({ length: count }, () => Math.floor(random() * runner.numRows));
}

function errorOf(expected: Float32Array, got: Float32Array): number {
  let [least, most, error] = [Infinity, -Infinity, 0];
  expected.forEach((value, i) => {
    [least, most] = [Math.min(least, value), Math.max(most, value)];
    error = Math.max(error, Math.abs(value - got[i]!));
  });
  return error / (most - least);
}

async function tokensOf(runner: Runner, ids: number[], options: GenerationOptions): Promise<Token[]> {
  const found: Token[] = [];
  for await (const token of runner.generate(ids, options)) found.push(token);
  return found;
}

describe("pieces of any length give the logits of the whole", () => {
  for (const name of ["gemma4-fp32", "rwkv7b-fp16", "embformer-bf16", "lckv-fp16"]) {
    test(name, async () => {
      const runner = await open(name);
      const ids = textOf(runner, 300);
      const whole = await runner.logits(ids);
      await runner.reset();
      let at = 0;
      for (const length of [1, 7, 1, 32, 3, 100, 156]) {
        for (const end = at + length; at < end; ) {
          const piece = ids.slice(at, Math.min(at + runner.chunk, end));
          const expected = whole.subarray(at * runner.vocabSize, (at + piece.length) * runner.vocabSize);
          assert.ok(errorOf(expected, await runner.feed(piece, 0)) < TOLERANCE);
          at += piece.length;
        }
      }
      // The control: another text has other logits.
      assert.ok(errorOf(whole, await runner.logits(textOf(runner, 300))) > 100 * TOLERANCE);
      await runner.close();
    });
  }
});

test("a text goes on from what was read, and begins anew where it is another", async () => {
  const runner = await open("gemma4-fp32");
  const options = { greedy: true, ignoreEos: true, maxNewTokens: 5 };
  const ids = textOf(runner, 20);
  const first = await tokensOf(runner, ids, options);
  assert.equal(runner.stats.promptTokens, 20);
  assert.equal(runner.stats.finishReason, "length");
  const next = [...ids, ...first.map(({ id }) => id), 7, 8];
  const continued = await tokensOf(runner, next, options);
  assert.equal(runner.stats.promptTokens, 3, "the last token, which was not read, and two new ones");
  await runner.reset();
  assert.deepEqual(await tokensOf(runner, next, options), continued);
  assert.deepEqual(await tokensOf(runner, ids, options), first);
  assert.equal(runner.stats.promptTokens, 20);
  await runner.close();
});

test("that there is no WebGPU is said before anything large is read", async () => {
  const bundle = await openBundle(`${CONFORMANCE}/gemma4-int4`);
  const contract = bundle.decoder.contract as { processor: string };
  const read: string[] = [];
  const notes: string[] = [];
  const methods = ["openFile", "openLocal", "readWhole"] as const;
  for (const name of methods) {
    const own = bundle[name].bind(bundle) as (file: string) => Promise<never>;
    bundle[name] = (file) => {
      read.push(file);
      return own(file);
    };
  }
  const onNote = (sentence: string): void => {
    assert.deepEqual(read, []);
    notes.push(sentence);
  };
  await (await Runner.open(bundle, { threads: 1, onNote })).close();
  assert.deepEqual(notes, [], "it is made for a CPU");
  read.length = 0;
  contract.processor = "gpu";
  const runner = await Runner.open(bundle, { threads: 1, onNote });
  assert.equal(notes.length, 1);
  assert.match(notes[0]!, /^`.*gemma4-int4` is made for WebGPU, which is not here: WebAssembly computes it/);
  assert.equal((await runner.logits([2, 5])).length, 2 * runner.vocabSize);
  await runner.close();
});

test("a seed repeats a text", async () => {
  const runner = await open("gemma4-fp32");
  const ids = textOf(runner, 5);
  const drawn = async (seed: number): Promise<number[]> => {
    await runner.reset();
    const options = { temperature: 2, seed, ignoreEos: true, maxNewTokens: 12, topK: 0 };
    return (await tokensOf(runner, ids, options)).map(({ id }) => id);
  };
  const first = await drawn(3);
  assert.deepEqual(await drawn(3), first);
  assert.notDeepEqual(await drawn(4), first);
  await runner.close();
});

test("a signal ends a text within its prompt, and the next one goes on", async () => {
  const runner = await open("lckv-fp16");
  const ids = textOf(runner, 300);
  const options = { greedy: true, ignoreEos: true, maxNewTokens: 5 };
  const expected = await tokensOf(runner, ids, options);
  await runner.reset();
  const stopping = new AbortController();
  setTimeout(() => stopping.abort(), 5);
  await assert.rejects(tokensOf(runner, ids, { ...options, signal: stopping.signal }), { name: "AbortError" });
  assert.deepEqual(await tokensOf(runner, ids, options), expected);
  assert.ok(runner.stats.promptTokens < 300, `${runner.stats.promptTokens} were left to read`);
  await runner.close();
});

test("who wants no more tokens leaves the runner to others", async () => {
  const runner = await open("gemma4-fp32");
  for await (const _ of runner.generate(textOf(runner, 9), { ignoreEos: true })) break;
  assert.equal(runner.stats.finishReason, null);
  await runner.reset();
  await runner.close();
});

test("texts end for a reason", async () => {
  const runner = await open("gemma4-fp32");
  const reason = async (count: number, options: GenerationOptions): Promise<string | null> => {
    await runner.reset();
    await tokensOf(runner, textOf(runner, count), { greedy: true, ignoreEos: true, ...options });
    return runner.stats.finishReason;
  };
  assert.equal(await reason(3, { maxNewTokens: 2 }), "length");
  assert.equal(await reason(runner.context - 2, { maxNewTokens: 9 }), "context");
  assert.equal(await reason(3, { maxNewTokens: 9, maxTime: 1e-9 }), "time");
  await runner.close();
});

test("what cannot be asked for is refused before anything is read", async () => {
  const runner = await open("gemma4-fp32");
  const refused = (act: () => unknown): Promise<string> => refusal(InputError, act);
  assert.equal(await refused(() => runner.generate([])), "the prompt is empty");
  assert.match(await refused(() => runner.generate([runner.numRows])), /has no row/);
  assert.match(await refused(() => runner.generate(new Array(runner.context + 1).fill(1))), /exceed the bundle's context/);
  assert.match(await refused(() => runner.feed(new Array(65).fill(1))), /feed 1 to 64/);
  assert.match(await refused(() => runner.feed([1, 2], 3)), /keep is 3/);
  assert.match(await refused(() => runner.generate([1], { topK: -1 })), /top_k is -1/);
  assert.match(await refused(() => runner.generate([1], { greedy: true, temperature: 1 })), /greedy text has no temperature/);
  await runner.close();
  assert.equal(await refused(() => runner.reset()), "this runner is closed");
  const other = await open("rwkv8-fp32");
  assert.equal(await refused(() => other.generate("text")), "this bundle has no tokenizer");
  assert.equal(await refused(() => other.chat([{ role: "user", content: "a" }])), "this bundle has no chat format");
  assert.match(await refused(() => other.generate([1], { stop: ["x"] })), /stop strings need a tokenizer/);
  await other.close();
  const bundle = await openBundle(`${CONFORMANCE}/rwkv8-fp32`);
  assert.match(await refused(() => Runner.open(bundle, { threads: 999 })), /threads is 999/);
  assert.match(await refusal(BundleError, () => openBundle("/nowhere")), /`\/nowhere` is not a bundle/);
});

test("a bundle whose template is no data has the template rendered", async () => {
  const runner = await open("embformer-bf16");
  assert.ok(runner.hasChatTemplate);
  assert.ok(runner.encodeChat([{ role: "user", content: "ab" }]).length > 0);
  await runner.close();
});

test("runners on one bundle do not disturb each other, and one serves one call", async () => {
  const bundle = await openBundle(`${CONFORMANCE}/gemma4-fp32`);
  const [first, second] = [await Runner.open(bundle, { threads: 1 }), await Runner.open(bundle, { threads: 1 })];
  const ids = textOf(first, 30);
  const expected = await first.logits(ids);
  await second.feed(ids.slice(0, 7));
  assert.deepEqual(await first.logits(ids), expected);
  const [busy, refused] = await Promise.allSettled([first.logits(ids), first.reset()]);
  assert.equal(busy.status, "fulfilled");
  assert.equal(refused.status === "rejected" && refused.reason.message, "another call is using this runner");
  const text = first.generate(ids, { ignoreEos: true });
  await text.next();
  await first.reset();
  await first.feed([1]);
  assert.match(await refusal(InputError, () => text.next()), /so this text cannot go on/);
  await first.close();
  await second.close();
});

test("opening and closing many times takes no memory", async () => {
  const cycle = async (): Promise<void> => {
    const runner = await open("lckv-fp16");
    await runner.logits(textOf(runner, 20));
    await runner.close();
  };
  for (let i = 0; i < 10; i++) await cycle();
  const before = residentMemory()!.anonymous;
  for (let i = 0; i < 20; i++) await cycle();
  const grown = residentMemory()!.anonymous - before;
  assert.ok(grown < 24 << 20, `${grown} bytes`);
});
