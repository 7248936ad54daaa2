import assert from "node:assert/strict";
import * as fs from "node:fs";
import { fileURLToPath } from "node:url";

import { PleexportError } from "../src/errors.js";

/** The repository; compiled tests lie in build/test/test. */
export const ROOT = fileURLToPath(new URL("../../../../../", import.meta.url));
export const CONFORMANCE = `${ROOT}conformance`;

export type Case = Record<string, any>;

export function readJson(path: string): any {
  return JSON.parse(fs.readFileSync(path, "utf8"));
}

/** Bundles that have vectors of a kind. */
export function vectorsOf(kind: string): { name: string; folder: string; vectors: Case }[] {
  const found = fs
    .readdirSync(CONFORMANCE)
    .filter((file) => file.endsWith(".json"))
    .sort()
    .map((file) => {
      const vectors: Case = readJson(`${CONFORMANCE}/${file}`);
      assert.equal(`${vectors.format} ${vectors.version}`, "pleexport-conformance 1");
      const name = file.slice(0, -5);
      return { name, folder: `${CONFORMANCE}/${name}`, vectors };
    })
    .filter(({ vectors }) => kind in vectors);
  assert.ok(found.length > 0, `no vectors of ${kind}`);
  return found;
}

/** Base64 of little-endian binary32 numbers. */
export function floatsOf(text: string): Float32Array {
  const bytes = Buffer.from(text, "base64");
  return new Float32Array(bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.length));
}

/** The words of an error that is to come; it has a hint. */
export async function refusal(
  kind: typeof PleexportError,
  act: () => unknown,
): Promise<string> {
  try {
    await act();
  } catch (err) {
    if (!(err instanceof kind)) throw err;
    assert.ok(err.hint.length > 0);
    assert.ok(!err.message.includes("\n"));
    return err.message;
  }
  assert.fail("nothing was refused");
}
