import assert from "node:assert/strict";
import { test } from "node:test";

import { MalformedJson, parseJson } from "../src/json.js";

test("values of JSON, with integers apart from other numbers", () => {
  assert.deepEqual(parseJson(' {"a": [1, -2.5, 1e3, "\\u00e9\\n", true, false, null], "__proto__": {}} '), new Map<string, unknown>([
    ["a", [1n, -2.5, 1000, "é\n", true, false, null]],
    ["__proto__", new Map()],
  ]));
});

for (const text of [
  "", "{", "[1,]", "{\"a\": 1,}", '{"a": 1, "a": 2}', "1 2", "01", "1.", ".5", "NaN", "Infinity", "nul", "'a'",
  '"a', '"\n"', '"\\x"', "{a: 1}", '{"a" 1}', "[1 2]", "-", "1e", "[".repeat(5000), "9".repeat(500),
]) {
  test(`${JSON.stringify(text.slice(0, 20))} is no JSON`, () => {
    assert.throws(() => parseJson(text), MalformedJson);
  });
}

test("bytes that are no UTF-8 are refused", () => {
  assert.throws(() => parseJson(Uint8Array.of(0x22, 0xff, 0x22)), MalformedJson);
});
