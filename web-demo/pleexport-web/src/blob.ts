import type { BlobHeader } from "./blob-header.js";
import { shapeOf, type Segment } from "./blob-layout.js";
import { openShards, type Shard } from "./blob-shard.js";
import { SegmentDecoder } from "./codes.js";
import { BlobError, BundleError, CheckFailed, COPY_AGAIN, InputError, MIXED } from "./errors.js";
import { FileFailure, type BundleFile } from "./files.js";
import type { Starter } from "./starter.js";
import type { TiedRows } from "./tied.js";

/** Rows that were looked up are kept up to so many bytes: a text says the same words again. */
const KEPT_BYTES = 32 << 20;
/** Where all rows are read, so many bytes of them come at a time. */
const PIECE_BYTES = 1 << 20;

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

  private readonly header: BlobHeader;

  private constructor(
    private readonly shards: readonly Shard[],
    private readonly tied: TiedRows | null,
  ) {
    const { header } = shards[0]!;
    this.header = header;
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
   * @param files the file, or all shards in any order.
   * @param tied of the tied head, where a table is in its file.
   * @throws BlobError the file breaks a rule of docs/blob-format.md.
   * @throws CheckFailed its header does not match its checksum.
   */
  static async open(files: readonly BundleFile[], tied: TiedRows | null = null): Promise<Blob> {
    const shards = await openShards(files);
    if (tied !== null) checkTied(shards[0]!, tied);
    return new Blob(shards, tied);
  }

  /** Path or URL of the file, or of the shard with the first rows. */
  get path(): string {
    return this.shards[0]!.file.path;
  }

  get numRows(): number {
    return this.header.numRowsTotal;
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

  /** Whether rows that were looked up are kept for the next time, and none is yet. */
  get wantsStarter(): boolean {
    return this.shards.every(({ file }) => file.numKept === 0);
  }

  /** How many rows are kept for the next time. */
  get rowsKept(): number {
    return this.shards.reduce((sum, { file }) => sum + (file.numKept ?? 0), 0);
  }

  /**
   * Reads all rows once, so that those of a server are kept.
   *
   * @param each is told how many rows were read so far; it may throw to end it.
   * @throws CheckFailed a row does not match its checksum.
   * @throws BundleError a row cannot be read.
   */
  async readAll(each: (rows: number) => void): Promise<void> {
    const count = Math.max(1, Math.floor(PIECE_BYTES / this.rowStride));
    for (const shard of this.shards) {
      for (let first = shard.first; first < shard.end; first += count) {
        const end = Math.min(first + count, shard.end);
        const ids = Array.from({ length: end - first }, (_, i) => first + i);
        const rows = await orError(shard.file, () => shard.file.read(ids.map((id) => shard.rangeOf(id))));
        for (const [i, id] of ids.entries()) await checkedRow(shard, id, rows[i]!);
        each(end);
      }
    }
  }

  /** Keeps the rows of a starter; one of another blob is left out, and so is a damaged row. */
  takeStarter({ sourceDigest, rowStride, rows }: Starter): void {
    if (sourceDigest !== this.sourceDigest || rowStride !== this.rowStride) return;
    for (const [tokenId, row] of rows()) {
      const rowId = this.rowAliases.get(tokenId) ?? tokenId;
      const shard = this.shards.find(({ first, end }) => rowId >= first && rowId < end);
      if (shard?.isRow(row) === true) shard.file.take?.(shard.rangeOf(rowId).offset, row);
    }
  }

  /**
   * Compares every row, in all files, and every chunk with its checksum.
   *
   * @throws CheckFailed names the first damaged row.
   */
  async verify(): Promise<void> {
    for (const shard of this.shards) await shard.verify();
    const { tied } = this;
    for (let rowId = 0; tied !== null && rowId < tied.numRows; rowId++) {
      tied.checked(rowId, await tied.file.read(tied.rangesOf(rowId)));
    }
  }

  close(): void {
    this.kept.clear();
    for (const { file } of this.shards) file.close();
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
    const { tied } = this;
    const found = new Map<number, CheckedRow>();
    await Promise.all(
      this.shards.map(async (shard) => {
        const own = rowIds.filter((id) => id >= shard.first && id < shard.end);
        if (own.length === 0) return;
        const [rows, tiedParts] = await orError(shard.file, () =>
          Promise.all([
            shard.file.read(own.map((id) => shard.rangeOf(id))),
            tied === null ? [] : tied.file.read(own.flatMap((id) => tied.rangesOf(id))),
          ]),
        );
        for (const [i, id] of own.entries()) {
          const parts = tiedParts.slice(3 * i, 3 * i + 3);
          found.set(id, {
            row: await checkedRow(shard, id, rows[i]!),
            tied: tied?.checked(id, parts) ?? null,
          });
        }
        this.rowsFetched += own.length;
      }),
    );
    return found;
  }
}

/** A row that matches its checksum. One that was kept and is damaged is read from its source once more. */
async function checkedRow(shard: Shard, id: number, row: Uint8Array): Promise<Uint8Array> {
  try {
    shard.check(id, row);
    return row;
  } catch (err) {
    const ranges = [shard.rangeOf(id)];
    if (!(err instanceof CheckFailed) || shard.file.forget === undefined) throw err;
    shard.file.forget(ranges);
    const [again] = await orError(shard.file, () => shard.file.read(ranges));
    shard.check(id, again!);
    return again!;
  }
}

async function orError<T>(file: BundleFile, read: () => Promise<T>): Promise<T> {
  try {
    return await read();
  } catch (err) {
    if (!(err instanceof FileFailure)) throw err;
    const what = `rows of \`${file.path}\` cannot be read: ${err.reason}`;
    throw new BundleError(what, err.hint ?? COPY_AGAIN, { cause: err });
  }
}

function checkTied({ file, header }: Shard, tied: TiedRows): void {
  const { table } = tied.segment;
  const twice = header.runs.has(table);
  if (!twice && tied.numRows >= header.numRowsTotal) return;
  const problem = twice ? "both have" : `it has ${tied.numRows} rows of`;
  throw new BlobError(
    `\`${tied.file.path}\` does not go with \`${file.path}\`, which has ${header.numRowsTotal} rows: ` +
      `${problem} table \`${table}\` (T-07)`,
    MIXED,
  );
}
