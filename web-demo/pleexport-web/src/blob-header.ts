import { BITS, CODED, codeBytes, endOf, type Segment } from "./blob-layout.js";
import { CHUNK_BYTES } from "./checksums.js";
import { BlobError, CheckFailed, COPY_AGAIN, NEWER } from "./errors.js";
import {
  atLeast,
  integer,
  list,
  MalformedJson,
  number,
  object,
  orNull,
  parseJson,
  string,
  type Convert,
  type Json,
} from "./json.js";
import { CHECKSUM_BYTES, HEADER_CHECKSUM, inOrder, type Safetensors } from "./safetensors.js";

const FORMAT = "pleexport-blob";
const VERSION = "2";
const SEGMENT_ALIGNMENT = 4;
const ROW_ALIGNMENT = 64;
const MINIMUM_PAGE_SIZE = 16_384;
const LARGEST_ROW = 2 ** 30;
const LARGEST_FLOAT = 3.4028234663852886e38;
const METADATA = [
  "format",
  "version",
  "page_size",
  "first_row",
  "num_rows_total",
  "row_aliases",
  "segments",
  "source_digest",
];

/** In the order of the file: name, dtype and number of dimensions. */
const TENSORS: readonly (readonly [string, string, number])[] = [
  [HEADER_CHECKSUM, "uint64", 1],
  ["rows", "uint8", 2],
  ["checksums", "uint64", 1],
];

/** What the header of a blob, or of a shard of one, says, checked. */
export interface BlobHeader {
  /** Token id of the file's first row. */
  readonly firstRow: number;
  readonly numRows: number;
  /** Rows of the whole blob. */
  readonly numRowsTotal: number;
  /** Bytes of a row. */
  readonly rowStride: number;
  /** Byte of the file at which its first row begins. */
  readonly rowsOffset: number;
  /** Byte of the file at which the checksums of chunks begin. */
  readonly checksumsOffset: number;
  readonly segments: readonly Segment[];
  /** By token id, the row that it selects. */
  readonly rowAliases: ReadonlyMap<number, number>;
  /** By table, its segments in the order of layers. */
  readonly runs: ReadonlyMap<string, readonly Segment[]>;
  readonly sourceDigest: string;
}

/**
 * Reads the header of a blob; a rule that it breaks is named as in docs/blob-format.md.
 *
 * @throws BlobError it breaks a rule.
 * @throws CheckFailed it does not match its checksum.
 */
export function readHeader(opened: Safetensors): BlobHeader {
  return new BlobHeaderReader(opened).read();
}

class BlobHeaderReader {
  constructor(private readonly opened: Safetensors) {}

  read(): BlobHeader {
    const { file, metadata, entries, headerIsDamaged } = this.opened;
    if (metadata.get("format") !== FORMAT) {
      throw this.broken("is a safetensors file, but not a blob (B-02)");
    }
    // Before the version: a damaged one must not look like a newer one.
    if (headerIsDamaged) {
      throw new CheckFailed(
        `\`${file.path}\` is damaged: its header does not match its checksum (B-11)`,
        COPY_AGAIN,
      );
    }
    this.checkVersion();
    this.checkNames();
    const [numRows, rowStride] = this.checkTensors();
    const [firstRow, numRowsTotal] = this.checkRange(numRows);
    const segments = this.readSegments();
    this.checkPlaces(segments, rowStride);
    return {
      firstRow,
      numRows,
      numRowsTotal,
      rowStride,
      rowsOffset: entries.get("rows")!.offset,
      checksumsOffset: entries.get("checksums")!.offset,
      segments,
      rowAliases: this.readAliases(numRowsTotal),
      runs: this.planRuns(segments),
      sourceDigest: metadata.get("source_digest")!,
    };
  }

  private broken(what: string, hint = COPY_AGAIN): BlobError {
    return new BlobError(`\`${this.opened.file.path}\`: ${what}`, hint);
  }

  private checkVersion(): void {
    const version = this.opened.metadata.get("version");
    if (version === VERSION) return;
    throw this.broken(
      `has blob version ${quoted(version)}; this reader knows ${VERSION} (B-03)`,
      version === "1" ? "build the bundle again from its checkpoint" : NEWER,
    );
  }

  private checkNames(): void {
    const { metadata, entries } = this.opened;
    const unknown = [
      ...[...metadata.keys()].filter((name) => !METADATA.includes(name)).sort(),
      ...[...entries.keys()].filter((name) => !TENSORS.some(([known]) => known === name)).sort(),
    ];
    if (unknown.length > 0) {
      throw this.broken(`has \`${unknown[0]}\`, which this reader does not know (B-04)`, NEWER);
    }
    const missing = [...METADATA].sort().find((name) => !metadata.has(name));
    if (missing !== undefined) throw this.broken(`lacks the metadata \`${missing}\` (B-05)`);
  }

  private checkTensors(): [number, number] {
    const { entries } = this.opened;
    for (const [name, dtype, dimensions] of TENSORS) {
      const entry = entries.get(name);
      if (entry?.dtype !== dtype || entry.shape.length !== dimensions) {
        throw this.broken(`needs tensor \`${name}\` of dtype ${dtype} (B-01)`);
      }
    }
    const names = inOrder(entries.values()).map((entry) => entry.name);
    const begins = entries.get(HEADER_CHECKSUM)!.shape[0] === 1;
    if (!begins || names.some((name, i) => name !== TENSORS[i]![0])) {
      throw this.broken(`does not begin with one \`${HEADER_CHECKSUM}\` and its rows (B-01)`);
    }
    const rows = entries.get("rows")!;
    const [numRows, stride] = rows.shape as [number, number];
    if (numRows === 0 || stride === 0 || stride % ROW_ALIGNMENT !== 0) {
      throw this.broken(`has ${numRows} rows of ${stride} bytes (B-01)`);
    }
    if (stride > LARGEST_ROW) {
      throw this.broken(`has rows of ${stride} bytes; this reader takes up to ${LARGEST_ROW}`);
    }
    const pageSize = this.whole("page_size");
    if (pageSize < MINIMUM_PAGE_SIZE || rows.offset % pageSize !== 0) {
      throw this.broken(
        `has rows at byte ${rows.offset}, which is not a multiple of a page size of at least ` +
          `${MINIMUM_PAGE_SIZE} (B-07)`,
      );
    }
    const chunks = entries.get("checksums")!.shape[0]!;
    if (chunks !== Math.ceil(rows.bytes / CHUNK_BYTES)) {
      throw this.broken(`has ${chunks} checksums, not one for each chunk (B-10)`);
    }
    return [numRows, stride];
  }

  private checkRange(numRows: number): [number, number] {
    const first = this.whole("first_row");
    const total = this.whole("num_rows_total");
    if (first > total - numRows) {
      throw this.broken(`says that it has ${numRows} rows from ${first} of ${total} (B-12)`);
    }
    return [first, total];
  }

  private json(name: string): Json {
    try {
      return parseJson(this.opened.metadata.get(name)!);
    } catch (err) {
      if (!(err instanceof MalformedJson)) throw err;
      throw this.broken(`has metadata \`${name}\` that is not valid JSON (B-05)`);
    }
  }

  private whole(name: string): number {
    try {
      return atLeast(0)(this.json(name), "$");
    } catch (err) {
      if (!(err instanceof MalformedJson)) throw err;
      throw this.broken(`has metadata \`${name}\` that is not a number of rows or bytes (B-05)`);
    }
  }

  private readSegments(): Segment[] {
    let segments: Segment[];
    try {
      segments = list(segment)(this.json("segments"), "$");
    } catch (err) {
      if (!(err instanceof MalformedJson)) throw err;
      throw this.broken(`has a malformed segment: ${err.message} (B-06)`);
    }
    if (segments.length === 0) throw this.broken("has no segments (B-06)");
    if (new Set(segments.map((own) => own.name)).size !== segments.length) {
      throw this.broken("has two segments of one name (B-06)");
    }
    for (const own of segments) {
      const problem = problemOf(own);
      if (problem !== null) throw this.broken(`segment \`${own.name}\` ${problem} (B-06)`);
    }
    return segments;
  }

  private checkPlaces(segments: readonly Segment[], stride: number): void {
    let position = 0;
    for (const own of segments) {
      const where = `segment \`${own.name}\``;
      const codesEnd = own.offset + codeBytes(own);
      const end = endOf(own);
      if (!Number.isSafeInteger(codesEnd) || !Number.isSafeInteger(end)) {
        throw this.broken(`${where} ends beyond any row (B-08)`);
      }
      const scalesBegin = own.scaleOffset ?? codesEnd;
      const alignment = own.scaleDtype === null ? 1 : BITS[own.scaleDtype]! / 8;
      this.checkAlignment(`${where} begins`, own.offset, SEGMENT_ALIGNMENT);
      this.checkAlignment(`${where} has scales`, scalesBegin, alignment);
      if (own.offset < position || scalesBegin < codesEnd) {
        throw this.broken(`${where} overlaps what lies before it (B-08)`);
      }
      if (end > stride - CHECKSUM_BYTES) {
        throw this.broken(
          `${where} ends at byte ${end} of rows of ${stride}, which end with a checksum (B-08)`,
        );
      }
      position = end;
    }
  }

  private checkAlignment(what: string, place: number, unit: number): void {
    if (place % unit !== 0) {
      throw this.broken(`${what} at byte ${place}, which is no multiple of ${unit} (B-08)`);
    }
  }

  private planRuns(segments: readonly Segment[]): Map<string, Segment[]> {
    const runs = new Map<string, Segment[]>();
    for (const own of segments) runs.set(own.table, [...(runs.get(own.table) ?? []), own]);
    for (const [table, run] of runs) this.checkRun(table, run);
    return runs;
  }

  private checkRun(table: string, run: readonly Segment[]): void {
    const first = run[0]!;
    const pitch = run.length > 1 ? run[1]!.offset - first.offset : 0;
    run.forEach((own, i) => {
      const expected: Segment = {
        ...first,
        name: own.name,
        layer: first.layer === null ? null : i,
        offset: first.offset + i * pitch,
        scaleOffset: first.scaleOffset === null ? null : first.scaleOffset + i * pitch,
      };
      const fields = Object.keys(expected) as (keyof Segment)[];
      const isAlone = run.length === 1 || first.layer !== null;
      if (!isAlone || fields.some((field) => own[field] !== expected[field])) {
        throw this.broken(`segment \`${own.name}\` breaks the even order of table \`${table}\` (B-08)`);
      }
    });
  }

  private readAliases(numRows: number): Map<number, number> {
    let pairs: [number, number][];
    try {
      pairs = list(alias)(this.json("row_aliases"), "$");
    } catch (err) {
      if (!(err instanceof MalformedJson)) throw err;
      throw this.broken(`has malformed row aliases: ${err.message} (B-09)`);
    }
    const isRow = (n: number): boolean => n >= 0 && n < numRows;
    for (const [id, row] of pairs) {
      if (!isRow(id) || !isRow(row)) {
        throw this.broken(`has row alias ${id} -> ${row} outside its rows (B-09)`);
      }
    }
    const aliases = new Map(pairs);
    if (aliases.size !== pairs.length || pairs.some(([, row]) => aliases.has(row))) {
      throw this.broken("has row aliases that can be read in two ways (B-09)");
    }
    return aliases;
  }
}

/** What a segment says of itself that cannot be. */
function problemOf(own: Segment): string | null {
  if (!(own.dtype in BITS)) return `has dtype \`${own.dtype}\`, which this reader does not know`;
  if (!isBinary32(own.multiplier)) return `has multiplier ${own.multiplier}`;
  const coded = CODED.has(own.dtype);
  const scaling = { group_size: own.groupSize, scale_dtype: own.scaleDtype, scale_offset: own.scaleOffset };
  for (const [field, value] of Object.entries(scaling)) {
    if (value === null && coded) return `of dtype \`${own.dtype}\` needs scales, but \`${field}\` is null`;
    if (value !== null && !coded) {
      return `of dtype \`${own.dtype}\` has no scales, but \`${field}\` is not null`;
    }
  }
  if (own.scaleDtype !== null && own.scaleDtype !== "fp16" && own.scaleDtype !== "fp32") {
    return `has scales of dtype \`${own.scaleDtype}\`, which this reader does not know`;
  }
  if ((own.groupSize ?? 1) > own.width) {
    return `has groups of ${own.groupSize} of its ${own.width} elements`;
  }
  return null;
}

/** Whether a number is finite when it is rounded to a binary32. */
export function isBinary32(value: number): boolean {
  return Math.abs(value) <= LARGEST_FLOAT;
}

const segment = object<Segment>((fields) => ({
  name: fields.required("name", string),
  table: fields.required("table", string),
  layer: fields.required("layer", orNull(atLeast(0))),
  offset: fields.required("offset", atLeast(0)),
  width: fields.required("width", atLeast(1)),
  dtype: fields.required("dtype", string),
  groupSize: fields.required("group_size", orNull(atLeast(1))),
  scaleDtype: fields.required("scale_dtype", orNull(string)),
  scaleOffset: fields.required("scale_offset", orNull(atLeast(0))),
  multiplier: fields.required("multiplier", number),
}));

const alias: Convert<[number, number]> = (value, path) => {
  const pair = list(integer)(value, path);
  if (pair.length !== 2) {
    throw new MalformedJson(`Expected \`array\` of length 2, got ${pair.length} - at \`${path}\``);
  }
  return pair as [number, number];
};

/** A text or a missing one as the Python library writes it. */
export function quoted(text: string | undefined): string {
  return text === undefined ? "None" : `'${text}'`;
}
