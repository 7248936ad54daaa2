import assert from "node:assert/strict";
import { test } from "node:test";

import { eachPart, wholeOf, type Rest } from "../src/download.js";
import { FileFailure, type LocalFile } from "../src/files.js";
import { OrtFailure } from "../src/graph.js";
import { withWeights } from "../src/lazy-bytes.js";

const BYTES = Uint8Array.from({ length: 700_000 }, (_, i) => i % 251);

/** A body of three parts, which may be read into an array of the reader's. */
function body(type: "bytes" | undefined, fails = false): Response {
  const parts = [BYTES.slice(0, 10), BYTES.slice(10, 600_000), BYTES.slice(600_000)];
  const source = {
    type,
    pull(controller: Partial<ReadableByteStreamController> & ReadableStreamDefaultController<Uint8Array>): void {
      const part = parts.shift();
      if (part !== undefined) return controller.enqueue(part);
      if (fails) return controller.error(new Error("it broke"));
      controller.close();
      controller.byobRequest?.respond(0);
    },
  };
  return new Response(new ReadableStream(source as UnderlyingDefaultSource<Uint8Array>));
}

test("a body is read the same way whether its reader may bring an array or not", async () => {
  for (const type of ["bytes", undefined] as const) {
    const rest = (size: number | null): Rest => {
      const response = body(type);
      return { from: 0, size, each: (take) => eachPart(response, take) };
    };
    for (const size of [null, 5, BYTES.length, 2 * BYTES.length]) {
      assert.deepEqual(await wholeOf(rest(size)), BYTES, "a server may say a wrong length");
    }
    await assert.rejects(eachPart(body(type, true), () => {}), (err) => {
      return err instanceof FileFailure && err.reason === "the connection ended too early: it broke";
    });
  }
});

const FILE: LocalFile = {
  path: "weights",
  size: BYTES.length,
  read: async () => [],
  readInto: (offset, into) => into.set(BYTES.subarray(offset, offset + into.length)),
  close: () => {},
};

test("weights are read to where the runtime copies them", async () => {
  const heap = new Uint8Array(1_000_000);
  await withWeights(new Map([["weights", FILE]]), () => heap, async ([weights]) => {
    for (const [begin, end, at] of [[100, 600_100, 1000], [0, 4, 8]] as const) {
      const part = weights!.data.subarray(begin, end); // first, as the runtime does
      heap.set(part, at);
    }
    heap.set([9, 9], 20);
  });
  const expected = new Uint8Array(1_000_000);
  expected.set(BYTES.subarray(100, 600_100), 1000);
  expected.set(BYTES.subarray(0, 4), 8);
  expected.set([9, 9], 20);
  assert.deepEqual(heap, expected);
});

test("weights that the runtime copies in another way are not taken for zeros", async () => {
  const words = /the runtime takes weights in another way than is known of it/;
  const heap = new Uint8Array(100);
  const open = (read: (data: Uint8Array) => void): Promise<void> =>
    withWeights(new Map([["weights", FILE]]), () => heap, async ([own]) => read(own!.data));
  const isTold = (err: unknown): boolean => err instanceof OrtFailure && words.test(err.message);
  await assert.rejects(open((data) => data.subarray(0, 4)), isTold);
  await assert.rejects(open((data) => [data.subarray(0, 4), data.subarray(4, 8)]), isTold);
});
