// Answers of the Python library are in the folder PLEEXPORT_CASES, which tests/test_web.py makes.
import assert from "node:assert/strict";
import * as fs from "node:fs";
import { describe, test } from "node:test";

import { render, type Message } from "../src/chat-format.js";
import { renderTemplate } from "../src/chat-template.js";
import { InputError, TokenizerError } from "../src/errors.js";
import { generationConfig, outOfRange, overridden } from "../src/generation-config.js";
import { JsonTokenizer } from "../src/json-tokenizer.js";
import { parseJson } from "../src/json.js";
import { LogitRules } from "../src/logit-rules.js";
import { Sampling, seeded } from "../src/sampling.js";
import { StopStrings } from "../src/stopping.js";
import { ThoughtFilter } from "../src/thought-filter.js";
import type { Tokenizer } from "../src/tokenizer.js";
import { VOCABULARY, WorldTokenizer } from "../src/world-tokenizer.js";
import { readJson, refusal, type Case } from "./vectors.js";

const CASES = process.env["PLEEXPORT_CASES"];
const skip = CASES === undefined ? "PLEEXPORT_CASES is not set: run pytest tests/test_web.py" : false;
const casesOf = (name: string): any => readJson(`${CASES}/${name}`);

function configOf(own: Case): ReturnType<typeof generationConfig> {
  return generationConfig(parseJson(JSON.stringify(own["config"])), "$");
}

test("distributions are those of the Python library", { skip }, () => {
  for (const own of casesOf("sampling.json") as Case[]) {
    const found = new Sampling(configOf(own)).distribution(Float32Array.from(own["scores"]));
    const name = JSON.stringify(own["config"]);
    assert.deepEqual(found.ids, own["ids"], name);
    found.probabilities.forEach((value, i) => {
      assert.ok(Math.abs(value - own["probabilities"][i]) <= 1e-12, name);
    });
  }
});

test("rules change logits as in the Python library", { skip }, () => {
  for (const own of casesOf("rules.json") as Case[]) {
    const scores = Float32Array.from(own["scores"]);
    new LogitRules(configOf(own), own["prompt_ids"], new Set(own["eos"]), own["max_length"]).apply(scores, own["ids"]);
    (own["expected"] as (number | null)[]).forEach((value, i) => {
      const name = `${JSON.stringify(own["config"])}, id ${i}`;
      if (value === null) assert.equal(scores[i], -Infinity, name);
      else assert.ok(Math.abs(scores[i]! - value) <= 1e-6, name);
    });
  }
});

function tokenizerIn(folder: string): Tokenizer {
  const vocabulary = `${folder}/${VOCABULARY}`;
  if (fs.existsSync(vocabulary)) return new WorldTokenizer(vocabulary, fs.readFileSync(vocabulary, "utf8"));
  const config = `${folder}/tokenizer_config.json`;
  const path = `${folder}/tokenizer.json`;
  return new JsonTokenizer(path, readJson(path), fs.existsSync(config) ? readJson(config) : {});
}

describe("ids, texts and streams are those of the Python library", { skip }, () => {
  for (const name of CASES === undefined ? [] : fs.readdirSync(`${CASES}/tokenizers`).sort()) {
    test(name, () => {
      const folder = `${CASES}/tokenizers/${name}`;
      const tokenizer = tokenizerIn(folder);
      const cases = readJson(`${folder}/cases.json`);
      assert.equal(tokenizer.size, cases.size);
      for (const own of cases.texts as Case[]) {
        const { text } = own;
        assert.deepEqual(tokenizer.encode(text), own["ids"], `ids of ${JSON.stringify(text)}`);
        const plain = tokenizer.encode(text, { addSpecialTokens: false });
        assert.deepEqual(plain, own["plain"], `plain ids of ${JSON.stringify(text)}`);
        assert.equal(tokenizer.decode(plain), own["decoded"]);
        assert.equal(tokenizer.decode(plain, { withSpecials: true }), own["kept"]);
      }
      for (const own of cases.streams as Case[]) {
        const stream = tokenizer.stream(own["prompt"]);
        const pieces = (own["ids"] as number[]).map((id) => stream.push(id));
        assert.deepEqual([...pieces, stream.flush()], own["pieces"], JSON.stringify(own));
        assert.equal(tokenizer.decode(own["ids"]), own["decoded"]);
      }
    });
  }
});

const MODEL = { type: "BPE", vocab: { a: 0, b: 1, ab: 2 }, merges: ["a b"] };

test("half a surrogate pair is no text", async () => {
  const tokenizer = new JsonTokenizer("t", { model: MODEL }, {});
  assert.deepEqual(tokenizer.encode("ab"), [2]);
  assert.equal(await refusal(InputError, () => tokenizer.encode("a\ud800")), "the text is not UTF-8");
});

describe("what a chat format does not know is refused", () => {
  const joints = [
    { previous: "start", next: "user", text: "<", trimPrevious: "", trimNext: "" },
    { previous: "user", next: "answer", text: ">", trimPrevious: "", trimNext: "" },
  ] as const;
  const nothing = { thinkingOn: [], thinkingOff: [], thoughts: null, needText: [], systemMoves: false };
  const format = { joints, ...nothing };
  const hello = { role: "user", content: "a" } as const;
  for (const [message, words] of [
    [{ role: "tool", content: "a" }, "the bundle's chat format knows no role `tool`"],
    [{ role: "user", content: [] }, "the `content` of a message of `user` is no text"],
    [
      { ...hello, tool_calls: [] },
      "the bundle's chat format knows `role` and `content` of a message, not `tool_calls`",
    ],
  ] as const) {
    test(words, async () => {
      const said = await refusal(InputError, () => render(format, [message as unknown as Message]));
      assert.equal(said, words);
    });
  }
  test("and what it knows is not", () => assert.equal(render(format, [hello]), "<a>"));
});

describe("malformed tokenizers are refused", () => {
  const step = { type: "TemplateProcessing", single: [{ SpecialToken: { id: "x", type_id: 0 } }], special_tokens: {} };
  for (const file of [
    [],
    {},
    { model: { ...MODEL, vocab: { a: "b" } } },
    { model: { ...MODEL, vocab: { a: -1 } } },
    { model: { ...MODEL, merges: ["a c"] } },
    { model: { ...MODEL, merges: [["a"]] } },
    { model: MODEL, added_tokens: [{ id: "x" }] },
    { model: MODEL, added_tokens: 3 },
    { model: MODEL, post_processor: step },
    { model: MODEL, post_processor: { ...step, single: [{ Sequence: { id: "B", type_id: 0 } }] } },
  ]) {
    test(JSON.stringify(file), async () => {
      await refusal(TokenizerError, () => new JsonTokenizer("t", file, {}));
    });
  }
  test("a template of one text is read", () => {
    const single = [{ Sequence: { id: "A", type_id: 0 } }];
    new JsonTokenizer("t", { model: MODEL, post_processor: { ...step, single } }, {});
  });
});

describe("parts that are not known are refused by name", () => {
  for (const [file, what] of [
    [{ model: { type: "WordPiece", vocab: {} } }, "the model `WordPiece`"],
    [{ model: { type: "Unigram", vocab: [["a", 0]] } }, "the model `Unigram`"],
    [{ model: { ...MODEL, end_of_word_suffix: "</w>" } }, "`end_of_word_suffix`"],
    [{ model: MODEL, normalizer: { type: "Lowercase" } }, "the normalizer `Lowercase`"],
    [{ model: MODEL, pre_tokenizer: { type: "Whitespace" } }, "the pre-tokenizer `Whitespace`"],
    [{ model: MODEL, decoder: { type: "CTC" } }, "the decoder `CTC`"],
    [{ model: MODEL, post_processor: { type: "BertProcessing" } }, "the post-processor `BertProcessing`"],
    [{ model: MODEL, added_tokens: [{ id: 1, content: "x", single_word: true }] }, "the single word `x`"],
  ] as const) {
    test(what, async () => {
      const words = await refusal(TokenizerError, () => new JsonTokenizer("t", file, {}));
      assert.equal(words, `\`t\` has ${what}, which this library does not know`);
    });
  }
});

describe("malformed vocabularies are refused", () => {
  for (const text of ["", "1 'a' 1\n", "x 'a' 1\n", "1 'a' 2\n", "1 a 1\n", "no\n", "1 b'\\xzz' 1\n"]) {
    test(JSON.stringify(text), async () => {
      await refusal(TokenizerError, () => new WorldTokenizer("t", text));
    });
  }
});

test("greedy takes the first of the likeliest", () => {
  assert.equal(new Sampling({}).choose(Float32Array.of(0, 3, 3), seeded(0)), 1);
});

test("chosen as often as likely, and again with the same seed", () => {
  const scores = Float32Array.of(0, Math.log(3), -Infinity);
  const drawn = (seed: number): number[] => {
    const random = seeded(seed);
    const sampling = new Sampling({ doSample: true, temperature: 1 });
    return Array.from({ length: 4000 }, () => sampling.choose(scores, random));
  };
  const ids = drawn(7);
  assert.ok(Math.abs(ids.filter((id) => id === 1).length - 3000) < 100);
  assert.ok(!ids.includes(2));
  assert.deepEqual(ids, drawn(7));
  assert.notDeepEqual(ids, drawn(8));
});

test("nothing that may come is an error", async () => {
  const none = new Float32Array(4).fill(-Infinity);
  const words = await refusal(InputError, () => new Sampling({}).choose(none, seeded(0)));
  assert.equal(words, "the generation options leave no token that may come next");
});

test("impossible values are named", () => {
  assert.equal(outOfRange({ topK: -1 }), "top_k is -1; it must be 0 or more");
  assert.equal(outOfRange({ topP: NaN }), "top_p is NaN; it must be from 0 to 1");
  assert.equal(outOfRange({ topK: 5, topP: 0.5, temperature: 1 }), null);
});

test("a temperature says whether to sample", () => {
  const defaults = { doSample: true, topK: 64, maxLength: 100 };
  assert.equal(overridden(defaults, { temperature: 0 }).doSample, false);
  assert.deepEqual(overridden(defaults, { maxNewTokens: 5 }), { doSample: true, topK: 64, maxNewTokens: 5 });
});

test("stop strings are held back and never shown", () => {
  const stops = new StopStrings(["END", "."]);
  assert.deepEqual(["a E", "x", "EN", "D and more"].map((text) => stops.push(text)), ["a ", "Ex", "", ""]);
  assert.ok(stops.hit);
  const others = new StopStrings(["END"]);
  assert.deepEqual([others.push("aEN"), others.flush()], ["a", "EN"]);
});

test("thoughts are not shown", () => {
  const tokenizer = { decode: () => "", specialText: () => "", thoughtMarkers: [["[t]", "[/t]"]] } as unknown as Tokenizer;
  const filter = new ThoughtFilter(tokenizer, []);
  const shown = ["a<th", "ink>b</thi", "nk>\n c[", "t]d[/t] e<"].map((text) => filter.push({ id: 0, text }));
  assert.equal(shown.join("") + filter.flush(), "ac" + "e<");
});

test("a template is rendered where there is no format", async () => {
  const template =
    "{{ bos_token }}{% for message in messages %}\n<{{ message.role }}>{{ message.content }}{% endfor %}\n" +
    "{%- if add_generation_prompt %}<model>{% endif %}{% if enable_thinking %}!{% endif %}";
  const messages = [{ role: "user", content: "a" }];
  assert.equal(renderTemplate(template, messages, true, { bos_token: "<s>" }), "<s><user>a<model>!");
  assert.equal(renderTemplate(template, messages, null, {}), "<user>a<model>");
  const words = await refusal(InputError, () => renderTemplate("{% if %}", messages, null, {}));
  assert.match(words, /^the chat template cannot render this conversation: /);
  const refused = "{{ raise_exception('no') }}";
  assert.match(await refusal(InputError, () => renderTemplate(refused, messages, null, {})), /: no$/);
});

test("a chat template that never ends is stopped", async () => {
  const said = (template: string): Promise<string> => refusal(InputError, () => renderTemplate(template, [], null, {}));
  const loops = "{% for a in range(99999) %}".repeat(3) + "{% endfor %}".repeat(3);
  const started = performance.now();
  assert.match(await said(loops), /^the chat template cannot render this conversation: it takes longer than 2 seconds/);
  assert.ok(performance.now() - started < 6000);
  for (const range of ["1000000000000", "5, 1000000000000, 2", "0, -1000000000000, -1"]) {
    assert.match(await said(`{{ range(${range}) | length }}`), /: a range of more than 100,000 numbers is too long$/);
  }
  assert.match(await said("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}"), /cannot render/);
  // The next one has its own time.
  assert.equal(renderTemplate("{{ range(3) | length }}{{ range(2, 8, 3) | length }}", [], null, {}), "32");
});
