import { BlobError } from "./errors.js";
import type { BundleFile, Range } from "./files.js";
import { readSafetensors, viewOf } from "./safetensors.js";

/** The rows that texts use most, beside a bundle that was packaged for the web: docs/packaging.md. */
export const STARTER = "starter.safetensors";

export interface Starter {
  /** Of the blob that the rows are of. */
  readonly sourceDigest: string;
  /** Bytes of a row. */
  readonly rowStride: number;
  /** Token ids with their rows, the most used first. Nothing of them is checked. */
  rows(): Iterable<readonly [number, Uint8Array]>;
}

/**
 * Reads a starter.
 *
 * @param path names it in errors.
 * @throws BlobError it is malformed, damaged, or of another version.
 */
export async function readStarter(bytes: Uint8Array, path: string): Promise<Starter> {
  const { metadata, entries, headerIsDamaged } = await readSafetensors(new Bytes(bytes, path));
  const [ids, rows] = [entries.get("token_ids"), entries.get("rows")];
  const sourceDigest = metadata.get("source_digest");
  const isStarter =
    metadata.get("format") === "pleexport-starter" &&
    metadata.get("version") === "1" &&
    sourceDigest !== undefined &&
    ids?.dtype === "int64" &&
    ids.shape.length === 1 &&
    rows?.dtype === "uint8" &&
    rows.shape.length === 2 &&
    rows.shape[0] === ids.shape[0];
  if (!isStarter || headerIsDamaged) {
    const problem = headerIsDamaged ? "is damaged: its header does not match its checksum" : "is no starter";
    throw new BlobError(`\`${path}\` ${problem}`, "package the bundle again, or remove the file");
  }
  const [count, rowStride] = rows.shape as [number, number];
  return {
    sourceDigest,
    rowStride,
    *rows() {
      const view = viewOf(bytes);
      for (let i = 0; i < count; i++) {
        const begin = rows.offset + i * rowStride;
        yield [Number(view.getBigInt64(ids.offset + 8 * i, true)), bytes.subarray(begin, begin + rowStride)];
      }
    },
  };
}

/** A file that is in memory. */
class Bytes implements BundleFile {
  constructor(
    private readonly bytes: Uint8Array,
    readonly path: string,
  ) {}

  get size(): number {
    return this.bytes.length;
  }

  async read(ranges: readonly Range[]): Promise<Uint8Array[]> {
    return ranges.map(({ offset, length }) => this.bytes.subarray(offset, offset + length));
  }

  close(): void {}
}
