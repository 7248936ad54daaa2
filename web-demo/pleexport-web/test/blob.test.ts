import assert from "node:assert/strict";
import * as fs from "node:fs";
import { describe, test } from "node:test";

import { Blob } from "../src/blob.js";
import { InputError } from "../src/errors.js";
import { NodeFile } from "../src/node-files.js";
import { TiedRows } from "../src/tied.js";
import { xxh3, xxh3Hex } from "../src/xxh3.js";
import { readJson, refusal, ROOT } from "./vectors.js";

const VECTORS = `${ROOT}tests/vectors`;

function flat(value: unknown): number[] {
  return Array.isArray(value) ? value.flatMap(flat) : [value as number];
}

describe("vectors of blobs are matched exactly", () => {
  for (const file of fs.readdirSync(VECTORS).filter((name) => name.endsWith(".safetensors"))) {
    test(file, async () => {
      const expected = readJson(`${VECTORS}/${file.replace(".safetensors", ".json")}`);
      const blob = await Blob.open(new NodeFile(`${VECTORS}/${file}`));
      const ids = Array.from({ length: blob.numRows }, (_, id) => id);
      for (const [table, rows] of Object.entries(expected.tables as Record<string, unknown>)) {
        const vectors = Float32Array.from(flat(rows));
        const out = new Float32Array(vectors.length);
        await blob.lookup(blob.rowIds(ids), [{ table, out: () => out }]);
        assert.deepEqual(new Uint32Array(out.buffer), new Uint32Array(vectors.buffer));
      }
      await blob.verify();
      await refusal(InputError, () => blob.rowIds([blob.numRows]));
      await refusal(InputError, () => blob.rowIds([-1]));
      await refusal(InputError, () => blob.rowIds([0.5]));
      blob.close();
    });
  }
});

describe("vectors of tied heads are matched exactly", () => {
  for (const file of fs.readdirSync(`${VECTORS}/tied`).filter((name) => name.endsWith(".safetensors"))) {
    test(file, async () => {
      const expected = readJson(`${VECTORS}/tied/${file.replace(".safetensors", ".json")}`);
      const tied = await TiedRows.open(new NodeFile(`${VECTORS}/tied/${file}`));
      const rows = (expected.vectors ?? expected.rows) as number[][];
      assert.equal(tied.numRows, rows.length);
      for (const [i, row] of rows.entries()) {
        const out = new Float32Array(row.length);
        tied.decode(tied.checked(i, await tied.file.read(tied.rangesOf(i))), out, 0);
        assert.deepEqual(new Uint32Array(out.buffer), new Uint32Array(Float32Array.from(row).buffer));
      }
    });
  }
});

test("hashes of all kinds of lengths", () => {
  const { hashes } = readJson(`${VECTORS}/xxh3-64.json`);
  for (const [length, hash] of hashes as [number, string][]) {
    const bytes = Uint8Array.from({ length }, (_, i) => 131 * i + 17);
    assert.equal(xxh3Hex(bytes), hash);
    const half = length >> 1;
    const joined = xxh3(bytes.subarray(0, half), bytes.subarray(half));
    assert.equal(Buffer.from(joined.reverse()).toString("hex"), hash);
  }
});

test("rows that are kept are few, and the same", async () => {
  const blob = await Blob.open(new NodeFile(`${VECTORS}/int8.safetensors`));
  const [table] = [...blob.shapes.keys()] as [string];
  const elements = blob.shapes.get(table)!.reduce((a, b) => a * b, 1);
  const [first, again] = [new Float32Array(elements), new Float32Array(elements)];
  const [row] = blob.rowIds([0]) as [number];
  await blob.lookup([row], [{ table, out: () => first }]);
  assert.equal(blob.rowsFetched, 1);
  await blob.lookup([row, row], [{ table, out: () => new Float32Array(2 * elements) }]);
  await blob.lookup([row], [{ table, out: () => again }]);
  assert.equal(blob.rowsFetched, 1);
  assert.deepEqual(first, again);
});
