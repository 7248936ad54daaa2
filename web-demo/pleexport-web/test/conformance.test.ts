// The vectors that every runtime passes: docs/conformance.md. Nothing is left out.
import assert from "node:assert/strict";
import * as fs from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, describe, test } from "node:test";

import { render } from "../src/chat-format.js";
import { InputError, PleexportError } from "../src/errors.js";
import { openBundle } from "../src/node.js";
import { Runner } from "../src/runner.js";
import { AnswerText } from "../src/stopping.js";
import { openTokenizer, type Tokenizer } from "../src/tokenizer.js";
import { floatsOf, refusal, vectorsOf, type Case } from "./vectors.js";

const temporary = fs.mkdtempSync(join(tmpdir(), "pleexport-vectors-"));
after(() => fs.rmSync(temporary, { recursive: true }));

async function withRunner<T>(folder: string, use: (runner: Runner) => Promise<T>): Promise<T> {
  const runner = await Runner.open(await openBundle(folder), { threads: 1 });
  try {
    return await use(runner);
  } finally {
    await runner.close();
  }
}

async function tokenizerOf(folder: string): Promise<Tokenizer> {
  return (await openTokenizer(await openBundle(folder))).tokenizer!;
}

describe("rows are equal in every bit", () => {
  for (const { name, folder, vectors } of vectorsOf("rows")) {
    test(name, async () => {
      const blob = await (await openBundle(folder)).openBlob();
      for (const { id, vectors: expected } of vectors["rows"] as Case[]) {
        assert.deepEqual(Object.keys(expected).sort(), Object.keys(vectors["tables"]).sort());
        for (const [table, text] of Object.entries(expected as Record<string, string>)) {
          const vector = floatsOf(text);
          const out = new Float32Array(vector.length);
          await blob.lookup(blob.rowIds([id]), [{ table, out: () => out }]);
          assert.deepEqual(new Uint32Array(out.buffer), new Uint32Array(vector.buffer));
        }
      }
      for (const id of vectors["refused_ids"]) await refusal(InputError, () => blob.rowIds([id]));
      blob.close();
    });
  }
});

describe("logits are near, however a text is cut", () => {
  for (const { name, folder, vectors } of vectorsOf("logits")) {
    test(name, () =>
      withRunner(folder, async (runner) => {
        for (const own of vectors["logits"] as Case[]) {
          const ids = own["ids"] as number[];
          const whole = await runner.logits(ids);
          checkLogits(own, whole, runner.vocabSize);
          for (const lengths of [[1, 7, 1, 22, 9], ids.map(() => 1)]) {
            checkLogits(own, await inPieces(runner, ids, lengths), runner.vocabSize);
          }
          // The control: other positions have other logits.
          assert.throws(() => checkLogits(own, whole.reverse(), runner.vocabSize));
        }
      }),
    );
  }
});

async function inPieces(runner: Runner, ids: readonly number[], lengths: readonly number[]): Promise<Float32Array> {
  await runner.reset();
  const found = new Float32Array(ids.length * runner.vocabSize);
  let begin = 0;
  for (const length of lengths) {
    for (const end = begin + length; begin < end; ) {
      const piece = ids.slice(begin, Math.min(begin + runner.chunk, end));
      found.set(await runner.feed(piece, 0), begin * runner.vocabSize);
      begin += piece.length;
    }
  }
  return found;
}

function checkLogits(own: Case, logits: Float32Array, vocab: number): void {
  // WebAssembly does not round the inputs of matrices.
  const expected = floatsOf(own["unrounded"] ?? own["logits"]);
  const tolerance = own["unrounded_tolerance"] ?? own["tolerance"];
  (own["positions"] as number[]).forEach((position, i) => {
    let most = 0;
    for (let id = 0; id < vocab; id++) {
      most = Math.max(most, Math.abs(expected[i * vocab + id]! - logits[position * vocab + id]!));
    }
    assert.ok(most <= tolerance, `position ${position}: ${most}, at most ${tolerance}`);
  });
}

describe("greedy ids are equal", () => {
  for (const { name, folder, vectors } of vectorsOf("greedy")) {
    test(name, () =>
      withRunner(folder, async (runner) => {
        for (const { prompt_ids: prompt, ids } of vectors["greedy"] as Case[]) {
          const found: number[] = [];
          const options = { maxNewTokens: ids.length, greedy: true, ignoreEos: true };
          for await (const token of runner.generate(prompt, options)) found.push(token.id);
          assert.deepEqual(found, ids);
        }
      }),
    );
  }
});

describe("texts become ids and ids texts", () => {
  for (const { name, folder, vectors } of vectorsOf("texts")) {
    test(name, async () => {
      const tokenizer = await tokenizerOf(folder);
      for (const own of vectors["texts"] as Case[]) {
        assert.deepEqual(tokenizer.encode(own["text"]), own["ids"], JSON.stringify(own));
      }
      for (const own of vectors["decodings"] as Case[]) {
        assert.equal(tokenizer.decode(own["ids"]), own["text"]);
        assert.equal(tokenizer.decode(own["ids"], { withSpecials: true }), own["with_specials"]);
      }
    });
  }
});

describe("streams give the same pieces", () => {
  for (const { name, folder, vectors } of vectorsOf("streams")) {
    test(name, async () => {
      const tokenizer = await tokenizerOf(folder);
      for (const own of vectors["streams"] as Case[]) {
        const stream = tokenizer.stream(own["prompt_ids"]);
        const pieces = (own["ids"] as number[]).map((id) => stream.push(id));
        assert.deepEqual([...pieces, stream.flush()], own["pieces"], JSON.stringify(own));
      }
      for (const own of vectors["stops"] as Case[]) {
        const answer = new AnswerText(tokenizer.stream(own["prompt_ids"] ?? []), own["stop"]);
        const pieces: string[] = [];
        for (const id of own["ids"]) if (!answer.stopped) pieces.push(answer.push(id));
        if (!answer.stopped) pieces.push(answer.flush());
        assert.deepEqual(pieces, own["pieces"], JSON.stringify(own));
        assert.equal(answer.stopped, own["stopped"]);
      }
    });
  }
});

describe("conversations are rendered or refused", () => {
  for (const { name, folder, vectors } of vectorsOf("conversations")) {
    test(name, async () => {
      const bundle = await openBundle(folder);
      const { tokenizer } = await openTokenizer(bundle);
      const format = bundle.manifest.chatFormat!;
      for (const own of vectors["conversations"] as Case[]) {
        const rendered = (): string => render(format, own["messages"], own["thinking"] ?? null);
        if (own["text"] === null) await refusal(InputError, rendered);
        else {
          assert.equal(rendered(), own["text"]);
          assert.deepEqual(tokenizer!.encode(rendered(), { addSpecialTokens: false }), own["ids"]);
        }
      }
    });
  }
});

describe("malformed bundles are refused by the rule that they break", () => {
  for (const { name, folder, vectors } of vectorsOf("malformed")) {
    test(name, async () => {
      const others: string[] = [];
      for (const own of vectors["malformed"] as Case[]) {
        const copy = join(temporary, "copy");
        fs.rmSync(copy, { recursive: true, force: true });
        fs.cpSync(folder, copy, { recursive: true });
        for (const change of own["changes"] as Case[]) changed(copy, change);
        const said = (await wordsAbout(own, copy)).replace(copy, "BUNDLE");
        // Python's reader of JSON takes NaN for a number; the format, and ours, do not.
        const isNan = own["name"] === "blob: a multiplier that is no number";
        const rule = isNan ? "B-05" : (own["rule"] as string);
        const expected = own["message"] as string;
        const namesRule = said.includes(`(${rule})`) || !/^[BT]-\d\d$/.test(rule) || !expected.includes(`(${rule})`);
        if (!namesRule || (said !== expected && !isNan)) others.push(`${expected}\n    ${said}`);
      }
      assert.deepEqual(others.filter((both) => !isOfLibraries(both)), [], "words of the Python library, and ours");
    });
  }
});

async function wordsAbout(own: Case, copy: string): Promise<string> {
  if (own["when"] === "open") {
    return refusal(PleexportError, () => withRunner(copy, async () => {}));
  }
  return withRunner(copy, async (runner) => {
    for (const other of [own["id"] - 1, own["id"] + 1]) await runner.feed([other]);
    return refusal(PleexportError, () => runner.feed([own["id"]]));
  });
}

/** What JSON readers and other libraries say of a text is their own; ours says what is wrong too. */
function isOfLibraries(both: string): boolean {
  const [theirs, ours] = both.split("\n") as [string, string];
  const all = ["malformed", "not valid JSON", "cannot be read", "damaged: ", "(T-04)", "has multiplier"];
  return all.some((words) => theirs.includes(words) && ours.includes(words));
}

function changed(copy: string, change: Case): void {
  const file = join(copy, change["file"]);
  if (change["delete"]) {
    fs.rmSync(file);
    return;
  }
  let bytes = fs.readFileSync(file);
  for (const [at, removed, added] of (change["splices"] as [number, number, string][]).toReversed()) {
    bytes = Buffer.concat([bytes.subarray(0, at), Buffer.from(added, "hex"), bytes.subarray(at + removed)]);
  }
  fs.writeFileSync(file, bytes);
}
