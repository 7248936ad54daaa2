import assert from "node:assert/strict";
import { test } from "node:test";

import type { CacheInput } from "../src/contract.js";
import { Slots } from "../src/slots.js";

function cache(window: number | null): CacheInput {
  const shape = [1, 1, "slots", 4];
  return { input: "past", output: "present", outputs: ["present"], shape, dtype: "fp32", window, block: 16 };
}

test("slots double with a text, and begin small again with the next", () => {
  const slots = new Slots([cache(null), cache(100)], 4096, 64);
  const first = slots.grow(1);
  assert.deepEqual(first, [256, 176]); // a ring of a window and a chunk, in whole blocks
  assert.equal(slots.grow(256), null, "they are enough");
  assert.deepEqual(slots.grow(257), [512, 176]);
  assert.deepEqual(slots.grow(3000), [3008, 176]);
  assert.deepEqual(slots.grow(3500), [4096, 176], "no more than the context");
  // The control: without a new text they stay as large as they are.
  assert.equal(slots.grow(1), null);
  slots.reset();
  assert.deepEqual(slots.grow(1), first);
});
