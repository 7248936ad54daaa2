import { readHeader, type BlobHeader } from "./blob-header.js";
import { CHUNK_BYTES } from "./checksums.js";
import { BlobError, CheckFailed, COPY_AGAIN, MIXED } from "./errors.js";
import { readRange, type BundleFile, type Range } from "./files.js";
import { CHECKSUM_BYTES, readSafetensors } from "./safetensors.js";
import { isChecksum } from "./xxh3.js";

/** One file of a blob: the rows of a range of token ids. A whole blob is the one shard of all. */
export class Shard {
  private constructor(
    readonly file: BundleFile,
    readonly header: BlobHeader,
    private readonly metadata: ReadonlyMap<string, string>,
  ) {}

  /**
   * Reads the file's header; rows are those of the blob.
   *
   * @throws BlobError the file breaks a rule of docs/blob-format.md.
   * @throws CheckFailed its header does not match its checksum.
   */
  static async open(file: BundleFile): Promise<Shard> {
    const opened = await readSafetensors(file);
    return new Shard(file, readHeader(opened), opened.metadata);
  }

  /** Its first row. */
  get first(): number {
    return this.header.firstRow;
  }

  /** The row behind its last one. */
  get end(): number {
    return this.first + this.header.numRows;
  }

  /** What all shards of a blob agree in, by name. */
  get shared(): ReadonlyMap<string, string | number> {
    return new Map<string, string | number>([
      ["row_stride", this.header.rowStride],
      ...[...this.metadata].filter(([name]) => name !== "first_row"),
    ]);
  }

  /** Where a row of the blob lies in the file. */
  rangeOf(rowId: number): Range {
    const { rowsOffset, rowStride } = this.header;
    return { offset: rowsOffset + (rowId - this.first) * rowStride, length: rowStride };
  }

  /** Whether a row matches its checksum. */
  isRow(row: Uint8Array): boolean {
    const end = row.length - CHECKSUM_BYTES;
    return isChecksum(row.subarray(end), row.subarray(0, end));
  }

  /** @throws CheckFailed a row does not match its checksum; the token id is named. */
  check(rowId: number, row: Uint8Array): void {
    if (this.isRow(row)) return;
    throw new CheckFailed(
      `\`${this.file.path}\` is damaged: the row of token id ${rowId} does not match its checksum (B-16)`,
      COPY_AGAIN,
    );
  }

  /**
   * Compares every row and every chunk with its checksum.
   *
   * @throws CheckFailed names the first damaged row.
   */
  async verify(): Promise<void> {
    const { numRows, rowStride, rowsOffset, checksumsOffset } = this.header;
    const bytes = numRows * rowStride;
    const chunks = Math.ceil(bytes / CHUNK_BYTES);
    const checksums = await readRange(this.file, checksumsOffset, CHECKSUM_BYTES * chunks);
    const row = new Uint8Array(rowStride);
    let filled = 0;
    for (let chunk = 0, begin = 0; begin < bytes; chunk++, begin += CHUNK_BYTES) {
      const length = Math.min(CHUNK_BYTES, bytes - begin);
      const part = await readRange(this.file, rowsOffset + begin, length);
      for (let at = 0; at < length; ) {
        const taken = Math.min(rowStride - filled, length - at);
        row.set(part.subarray(at, at + taken), filled);
        filled = (filled + taken) % rowStride;
        at += taken;
        if (filled === 0) this.check(this.first + (begin + at) / rowStride - 1, row);
      }
      const stored = checksums.subarray(CHECKSUM_BYTES * chunk, CHECKSUM_BYTES * (chunk + 1));
      if (!isChecksum(stored, part)) {
        const [first, last] = [begin, begin + length - 1].map((at) => Math.floor(at / rowStride) + this.first);
        throw new CheckFailed(
          `\`${this.file.path}\` is damaged: the rows of token ids ${first} to ${last} lie in other places, ` +
            "or the checksum of their chunk is wrong (B-19)",
          COPY_AGAIN,
        );
      }
    }
  }
}

/**
 * The files of one blob, in the order of their rows.
 *
 * @param files in any order.
 * @throws BlobError one breaks a rule of docs/blob-format.md, or together they are not one blob.
 * @throws CheckFailed a header does not match its checksum.
 */
export async function openShards(files: readonly BundleFile[]): Promise<Shard[]> {
  const shards = (await Promise.all(files.map((file) => Shard.open(file)))).sort((a, b) => a.first - b.first);
  const [first, last] = [shards[0]!, shards.at(-1)!];
  const total = first.header.numRowsTotal;
  if (shards.length === 1) {
    if (first.header.numRows === total) return shards;
    throw new BlobError(
      `\`${first.file.path}\`: is a shard, rows ${first.first} to ${first.end - 1} of ${total}; this reader ` +
        "takes whole blobs (B-12)",
      "give all shards of the blob, or build the bundle again from its checkpoint",
    );
  }
  let place = 0;
  for (const shard of shards) {
    const other = [...first.shared].filter(([name, value]) => shard.shared.get(name) !== value).sort()[0];
    if (other !== undefined) {
      throw new BlobError(
        `\`${shard.file.path}\` is no shard of the blob of \`${first.file.path}\`: they disagree about ` +
          `\`${other[0]}\` (B-12)`,
        MIXED,
      );
    }
    if (shard.first !== place) {
      throw new BlobError(
        `\`${shard.file.path}\` begins at row ${shard.first}, and the shards before it end at ${place} (B-12)`,
        MIXED,
      );
    }
    place = shard.end;
  }
  if (place === total) return shards;
  throw new BlobError(
    `\`${last.file.path}\` is the last shard and ends at row ${place} of ${total} (B-12)`,
    COPY_AGAIN,
  );
}
