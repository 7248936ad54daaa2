import { readHeader, type BlobHeader } from "./blob-header.js";
import { shapeOf, type Segment } from "./blob-layout.js";
import { CHUNK_BYTES } from "./checksums.js";
import { SegmentDecoder } from "./codes.js";
import { BlobError, BundleError, CheckFailed, COPY_AGAIN, InputError, MIXED } from "./errors.js";
import { FileFailure, readRange, type BundleFile } from "./files.js";
import { CHECKSUM_BYTES, readSafetensors } from "./safetensors.js";
import { TiedRows } from "./tied.js";
import { isChecksum } from "./xxh3.js";

/** Rows that were looked up are kept up to so many bytes: a text says the same words again. */
const KEPT_BYTES = 32 << 20;

/** A row that matches its checksum, with that of the tied head where there is one. */
interface CheckedRow {
  readonly row: Uint8Array;
  readonly tied: Uint8Array | null;
}

/** Where the vectors of a table go: `[T, width]` or `[T, layers, width]`. */
export interface LookupTarget {
  readonly table: string;
  /** Asked when rows are there: memory of WebAssembly moves while one waits for them. */
  readonly out: () => Float32Array;
}

/** A blob. Opening it reads its header only; every row that is taken from the file is checked. */
export class Blob {
  /** Of a row, those of the blob first. */
  readonly segments: readonly Segment[];
  /** By table, the shape of what a token id looks up: `[width]` or `[layers, width]`. */
  readonly shapes: ReadonlyMap<string, readonly number[]>;
  /** How many rows were taken from the file. */
  rowsFetched = 0;
  private readonly decoders: ReadonlyMap<string, SegmentDecoder>;
  /** By row; what was used last is behind. */
  private readonly kept = new Map<number, CheckedRow>();
  private readonly mostKept: number;

  private constructor(
    readonly file: BundleFile,
    private readonly header: BlobHeader,
    private readonly tied: TiedRows | null,
  ) {
    const segments = tied === null ? [] : [tied.segment];
    this.segments = [...header.segments, ...segments];
    this.shapes = new Map<string, readonly number[]>([
      ...[...header.runs].map(([table, run]): [string, number[]] => [table, shapeOf(run)]),
      ...segments.map((own): [string, number[]] => [own.table, [own.width]]),
    ]);
    this.decoders = new Map([...header.runs].map(([table, run]) => [table, new SegmentDecoder(run[0]!)]));
    this.mostKept = Math.max(1, Math.floor(KEPT_BYTES / header.rowStride));
  }

  /**
   * Opens a blob.
   *
   * @param tied of the tied head, where a table is in its file.
   * @throws BlobError the file breaks a rule of docs/blob-format.md.
   * @throws CheckFailed its header does not match its checksum.
   */
  static async open(file: BundleFile, tied: TiedRows | null = null): Promise<Blob> {
    const header = readHeader(await readSafetensors(file));
    if (tied !== null) checkTied(file, header, tied);
    return new Blob(file, header, tied);
  }

  get numRows(): number {
    return this.header.numRows;
  }

  /** Bytes of a row. */
  get rowStride(): number {
    return this.header.rowStride;
  }

  get sourceDigest(): string {
    return this.header.sourceDigest;
  }

  /** By token id, the row that it selects. */
  get rowAliases(): ReadonlyMap<number, number> {
    return this.header.rowAliases;
  }

  /**
   * The rows that token ids select, aliases replaced.
   *
   * @throws InputError an id has no row.
   */
  rowIds(ids: readonly number[]): number[] {
    return ids.map((id) => {
      if (!(Number.isInteger(id) && id >= 0 && id < this.numRows)) {
        throw new InputError(
          `token id ${id} has no row; ids go from 0 to ${this.numRows - 1}`,
          "the ids may come from another model's tokenizer",
        );
      }
      return this.rowAliases.get(id) ?? id;
    });
  }

  /**
   * Looks rows up, and puts their vectors behind each other, multiplied once.
   *
   * @throws CheckFailed a row does not match its checksum; the token id is named.
   * @throws BundleError a row cannot be read.
   */
  async lookup(rowIds: readonly number[], into: readonly LookupTarget[]): Promise<void> {
    const rows = await this.rowsOf(rowIds);
    for (const { table, out: place } of into) {
      const out = place();
      const run = this.header.runs.get(table);
      const [width] = this.shapes.get(table)!.slice(-1) as [number];
      let at = 0;
      for (const rowId of rowIds) {
        const { row, tied } = rows.get(rowId)!;
        if (run === undefined) {
          this.tied!.decode(tied!, out, at);
          at += width;
        } else {
          const decoder = this.decoders.get(table)!;
          for (const own of run) {
            decoder.decode(row, own.offset, own.scaleOffset ?? 0, out, at);
            at += width;
          }
        }
      }
    }
  }

  /**
   * Compares every row, in all files, and every chunk with its checksum.
   *
   * @throws CheckFailed names the first damaged row.
   */
  async verify(): Promise<void> {
    const { numRows, rowStride, checksumsOffset } = this.header;
    const bytes = numRows * rowStride;
    const checksums = await readRange(
      this.file,
      checksumsOffset,
      CHECKSUM_BYTES * Math.ceil(bytes / CHUNK_BYTES),
    );
    const row = new Uint8Array(rowStride);
    let filled = 0;
    for (let chunk = 0, begin = 0; begin < bytes; chunk++, begin += CHUNK_BYTES) {
      const length = Math.min(CHUNK_BYTES, bytes - begin);
      const part = await readRange(this.file, this.header.rowsOffset + begin, length);
      for (let at = 0; at < length; ) {
        const taken = Math.min(rowStride - filled, length - at);
        row.set(part.subarray(at, at + taken), filled);
        filled = (filled + taken) % rowStride;
        at += taken;
        if (filled === 0) this.checkRow((begin + at) / rowStride - 1, row);
      }
      const stored = checksums.subarray(CHECKSUM_BYTES * chunk, CHECKSUM_BYTES * (chunk + 1));
      if (!isChecksum(stored, part)) {
        const [first, last] = [begin, begin + length - 1].map((at) => Math.floor(at / rowStride));
        throw new CheckFailed(
          `\`${this.file.path}\` is damaged: the rows of token ids ${first} to ${last} lie in ` +
            "other places, or the checksum of their chunk is wrong (B-19)",
          COPY_AGAIN,
        );
      }
    }
    const { tied } = this;
    for (let rowId = 0; tied !== null && rowId < tied.numRows; rowId++) {
      tied.checked(rowId, await tied.file.read(tied.rangesOf(rowId)));
    }
  }

  close(): void {
    this.kept.clear();
    this.file.close();
    this.tied?.file.close();
  }

  private async rowsOf(rowIds: readonly number[]): Promise<Map<number, CheckedRow>> {
    const found = new Map<number, CheckedRow>();
    const missing: number[] = [];
    for (const rowId of new Set(rowIds)) {
      const kept = this.kept.get(rowId);
      if (kept === undefined) missing.push(rowId);
      else {
        found.set(rowId, kept);
        this.kept.delete(rowId);
        this.kept.set(rowId, kept);
      }
    }
    for (const [rowId, row] of await this.fetch(missing)) {
      found.set(rowId, row);
      this.kept.set(rowId, row);
    }
    for (const oldest of this.kept.keys()) {
      if (this.kept.size <= this.mostKept) break;
      this.kept.delete(oldest);
    }
    return found;
  }

  private async fetch(rowIds: readonly number[]): Promise<Map<number, CheckedRow>> {
    const { rowsOffset, rowStride } = this.header;
    const { tied } = this;
    if (rowIds.length === 0) return new Map();
    try {
      const [rows, tiedParts] = await Promise.all([
        this.file.read(rowIds.map((id) => ({ offset: rowsOffset + id * rowStride, length: rowStride }))),
        tied === null ? [] : tied.file.read(rowIds.flatMap((id) => tied.rangesOf(id))),
      ]);
      this.rowsFetched += rowIds.length;
      return new Map(
        rowIds.map((id, i) => {
          this.checkRow(id, rows[i]!);
          const parts = tiedParts.slice(3 * i, 3 * i + 3);
          return [id, { row: rows[i]!, tied: tied?.checked(id, parts) ?? null }];
        }),
      );
    } catch (err) {
      if (!(err instanceof FileFailure)) throw err;
      throw new BundleError(
        `rows of \`${this.file.path}\` cannot be read: ${err.reason}`,
        err.hint ?? COPY_AGAIN,
        { cause: err },
      );
    }
  }

  private checkRow(rowId: number, row: Uint8Array): void {
    const end = row.length - CHECKSUM_BYTES;
    if (!isChecksum(row.subarray(end), row.subarray(0, end))) {
      throw new CheckFailed(
        `\`${this.file.path}\` is damaged: the row of token id ${rowId} does not match its ` +
          "checksum (B-16)",
        COPY_AGAIN,
      );
    }
  }
}

function checkTied(file: BundleFile, header: BlobHeader, tied: TiedRows): void {
  const { table } = tied.segment;
  const twice = header.runs.has(table);
  if (!twice && tied.numRows >= header.numRows) return;
  const problem = twice ? "both have" : `it has ${tied.numRows} rows of`;
  throw new BlobError(
    `\`${tied.file.path}\` does not go with \`${file.path}\`, which has ${header.numRows} rows: ` +
      `${problem} table \`${table}\` (T-07)`,
    MIXED,
  );
}
