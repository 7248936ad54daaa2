import assert from "node:assert/strict";
import * as fs from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, describe, test } from "node:test";

import { Blob } from "../src/blob.js";
import { BlobError, CheckFailed, InputError } from "../src/errors.js";
import { NodeFile } from "../src/node-files.js";
import { readStarter } from "../src/starter.js";
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
      const blob = await Blob.open([new NodeFile(`${VECTORS}/${file}`)]);
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

/** A blob whose rows are kept by their place, as the browser's file system keeps them. */
async function keeping(kept: Map<number, Uint8Array>): Promise<Blob> {
  const file = new NodeFile(`${VECTORS}/int8.safetensors`);
  return Blob.open([
    Object.assign(file, {
      numKept: 0,
      take: (offset: number, part: Uint8Array) => void kept.set(offset, part),
    }),
  ]);
}

describe("a starter", () => {
  const path = `${VECTORS}/starter/int8.safetensors`;
  const bytes = (): Uint8Array => new Uint8Array(fs.readFileSync(path));

  test("gives rows as the blob has them, aliases followed", async () => {
    const kept = new Map<number, Uint8Array>();
    const blob = await keeping(kept);
    assert.equal(blob.wantsStarter, true);
    blob.takeStarter(await readStarter(bytes(), path));
    const whole = fs.readFileSync(`${VECTORS}/int8.safetensors`);
    assert.equal(kept.size, 3);
    for (const [offset, row] of kept) {
      assert.deepEqual([...row], [...whole.subarray(offset, offset + row.length)]);
    }
    blob.close();
  });

  test("of another blob, or damaged rows, are left out", async () => {
    const kept = new Map<number, Uint8Array>();
    const blob = await keeping(kept);
    const starter = await readStarter(bytes(), path);
    blob.takeStarter({ ...starter, sourceDigest: "xxh3-64:0" });
    blob.takeStarter({ ...starter, rowStride: starter.rowStride + 8 });
    assert.equal(kept.size, 0);
    const damaged = bytes();
    damaged[damaged.length - 20]! ^= 1;
    blob.takeStarter(await readStarter(damaged, path));
    assert.equal(kept.size, 2);
    blob.close();
  });

  test("that is malformed is refused", async () => {
    const changed = bytes();
    changed[40]! ^= 1;
    await refusal(BlobError, () => readStarter(changed, path));
    const other = new Uint8Array(fs.readFileSync(`${VECTORS}/int8.safetensors`));
    const message = await refusal(BlobError, () => readStarter(other, path));
    assert.match(message, /is no starter$/);
  });
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
  const blob = await Blob.open([new NodeFile(`${VECTORS}/int8.safetensors`)]);
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

/** A shard of a blob, written as docs/blob-format.md says; small enough for one chunk. */
function shardOf(whole: Buffer, begin: number, end: number, change: (metadata: Record<string, string>) => void = () => {}): Buffer {
  const size = Number(whole.readBigUInt64LE(0));
  const header = JSON.parse(whole.toString("utf8", 8, 8 + size));
  const stride = header.rows.shape[1] as number;
  const start = 8 + size + (header.rows.data_offsets[0] as number);
  const rows = whole.subarray(start + begin * stride, start + end * stride);
  header.rows = { dtype: "U8", shape: [end - begin, stride], data_offsets: [8, 8 + rows.length] };
  header.checksums = { dtype: "U64", shape: [1], data_offsets: [8 + rows.length, 16 + rows.length] };
  header.__metadata__.first_row = String(begin);
  change(header.__metadata__);
  const head = Buffer.concat([whole.subarray(0, 8), Buffer.from(JSON.stringify(header).padEnd(size))]);
  assert.equal(head.length, 8 + size);
  return Buffer.concat([head, xxh3(head), rows, xxh3(rows)]);
}

describe("shards", () => {
  const whole = fs.readFileSync(`${VECTORS}/int8.safetensors`);
  const folder = fs.mkdtempSync(join(tmpdir(), "pleexport-shards-"));
  after(() => fs.rmSync(folder, { recursive: true }));
  const opened = (...shards: Buffer[]): Promise<Blob> => {
    const files = shards.map((data, i) => {
      fs.writeFileSync(join(folder, `${i}`), data);
      return new NodeFile(join(folder, `${i}`));
    });
    return Blob.open(files);
  };

  test("in any order give the rows of the whole", async () => {
    const one = await Blob.open([new NodeFile(`${VECTORS}/int8.safetensors`)]);
    const all = one.numRows;
    const several = await opened(shardOf(whole, 2, all), shardOf(whole, 0, 2));
    assert.equal(several.numRows, all);
    await several.verify();
    const rows = Array.from({ length: all }, (_, id) => id);
    for (const [table, shape] of one.shapes) {
      const [a, b] = [one, several].map(() => new Float32Array(all * shape.reduce((x, y) => x * y, 1)));
      await one.lookup(rows, [{ table, out: () => a! }]);
      await several.lookup(rows, [{ table, out: () => b! }]);
      assert.deepEqual(a, b);
    }
    several.close();
  });

  test("that are no blob together are refused", async () => {
    const all = (await Blob.open([new NodeFile(`${VECTORS}/int8.safetensors`)])).numRows;
    const words = (...shards: Buffer[]): Promise<string> => refusal(BlobError, () => opened(...shards));
    assert.match(await words(shardOf(whole, 0, 2)), /is a shard, rows 0 to 1 of \d+; .* \(B-12\)$/);
    assert.match(await words(shardOf(whole, 0, 2), shardOf(whole, 3, all)), /begins at row 3, and the shards before it end at 2 \(B-12\)$/);
    assert.match(await words(shardOf(whole, 0, 2), shardOf(whole, 2, 3)), /is the last shard and ends at row 3 of \d+ \(B-12\)$/);
    const other = shardOf(whole, 2, all, (metadata) => (metadata["source_digest"] = "other"));
    assert.match(await words(shardOf(whole, 0, 2), other), /they disagree about `source_digest` \(B-12\)$/);
  });

  test("that are damaged name their token ids", async () => {
    const second = shardOf(whole, 2, 3);
    const size = Number(second.readBigUInt64LE(0));
    second[16 + size + 1]! ^= 1;
    const all = (await Blob.open([new NodeFile(`${VECTORS}/int8.safetensors`)])).numRows;
    const blob = await opened(shardOf(whole, 0, 2), second, shardOf(whole, 3, all));
    assert.match(await refusal(CheckFailed, () => blob.verify()), /the row of token id 2 does not match/);
    blob.close();
  });
});
