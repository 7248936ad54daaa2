import { isBinary32, quoted } from "./blob-header.js";
import { BITS, CODED, type Segment } from "./blob-layout.js";
import { SegmentDecoder } from "./codes.js";
import { BlobError, CheckFailed, COPY_AGAIN, NEWER } from "./errors.js";
import type { BundleFile, Range } from "./files.js";
import { atLeast, MalformedJson, number, object, parseJson, string, type Convert } from "./json.js";
import { CHECKSUM_BYTES, HEADER_CHECKSUM, inOrder, readSafetensors, type Safetensors } from "./safetensors.js";
import { isChecksum } from "./xxh3.js";

/** The file's name in a bundle. */
export const TIED = "tied.safetensors";
const LARGEST_ROW = 2 ** 29;

/** In the order of the file: name, dtype and number of dimensions. */
const TENSORS: readonly (readonly [string, string, number])[] = [
  [HEADER_CHECKSUM, "uint64", 1],
  ["codes", "uint8", 2],
  ["scales", "fp32", 2],
  ["checksums", "uint64", 1],
];

/** A table whose rows are those of a matrix that is multiplied by too. */
export class TiedRows {
  readonly segment: Segment;
  readonly numRows: number;
  private readonly decoder: SegmentDecoder;

  private constructor(
    readonly file: BundleFile,
    private readonly opened: Safetensors,
    metadata: TiedMetadata,
    readonly weightsDigest: string,
  ) {
    this.numRows = opened.entries.get("codes")!.shape[0]!;
    this.segment = {
      name: metadata.table,
      table: metadata.table,
      layer: null,
      offset: 0,
      width: metadata.width,
      dtype: metadata.dtype,
      groupSize: metadata.groupSize,
      scaleDtype: "fp32",
      scaleOffset: this.bytesOf("codes"),
      multiplier: metadata.multiplier,
    };
    this.decoder = new SegmentDecoder(this.segment, true);
  }

  /**
   * Reads the file's header.
   *
   * @throws BlobError the file breaks a rule of docs/blob-format.md.
   * @throws CheckFailed its header does not match its checksum.
   */
  static async open(file: BundleFile): Promise<TiedRows> {
    const opened = await readSafetensors(file);
    const metadata = readMetadata(opened);
    return new TiedRows(file, opened, metadata, metadata.weightsDigest);
  }

  /** The parts of the file that are a row. */
  rangesOf(rowId: number): Range[] {
    return TENSORS.slice(1).map(([name]) => {
      const length = this.bytesOf(name);
      return { offset: this.opened.entries.get(name)!.offset + rowId * length, length };
    });
  }

  /**
   * A row as it is decoded: codes and scales.
   *
   * @param parts what lies at `rangesOf`.
   * @throws CheckFailed it does not match its checksum.
   */
  checked(rowId: number, parts: readonly Uint8Array[]): Uint8Array {
    const [codes, scales, stored] = parts as [Uint8Array, Uint8Array, Uint8Array];
    const number = new Uint8Array(CHECKSUM_BYTES);
    new DataView(number.buffer).setBigUint64(0, BigInt(rowId), true);
    if (!isChecksum(stored, codes, scales, number)) {
      throw new CheckFailed(
        `\`${this.file.path}\` is damaged: the row of token id ${rowId} does not match its ` +
          "checksum (T-09)",
        COPY_AGAIN,
      );
    }
    const row = new Uint8Array(codes.length + scales.length);
    row.set(codes);
    row.set(scales, codes.length);
    return row;
  }

  /** Puts the vector of a row at a place of `out`, multiplied once. */
  decode(row: Uint8Array, out: Float32Array, at: number): void {
    this.decoder.decode(row, 0, this.segment.scaleOffset!, out, at);
  }

  private bytesOf(name: string): number {
    return this.opened.entries.get(name)!.bytes / this.numRows;
  }
}

interface TiedMetadata {
  readonly table: string;
  readonly width: number;
  readonly dtype: string;
  readonly groupSize: number;
  readonly multiplier: number;
  readonly weightsDigest: string;
}

function jsonText<T>(convert: Convert<T>): Convert<T> {
  return (value, path) => convert(parseJson(string(value, path)), path);
}

const tiedMetadata = object<TiedMetadata>((fields) => {
  fields.required("format", string);
  fields.required("version", string);
  return {
    table: fields.required("table", string),
    width: fields.required("width", jsonText(atLeast(1))),
    dtype: fields.required("dtype", string),
    groupSize: fields.required("group_size", jsonText(atLeast(1))),
    multiplier: fields.required("multiplier", jsonText(number)),
    weightsDigest: fields.required("weights_digest", string),
  };
});

function broken(opened: Safetensors, what: string, hint = COPY_AGAIN): BlobError {
  return new BlobError(`\`${opened.file.path}\`: ${what}`, hint);
}

function readMetadata(opened: Safetensors): TiedMetadata {
  if (opened.metadata.get("format") !== "pleexport-tied") {
    throw broken(opened, "is a safetensors file, but none of a matrix with rows (T-02)");
  }
  // Before the version: a damaged one must not look like a newer one.
  if (opened.headerIsDamaged) {
    throw new CheckFailed(
      `\`${opened.file.path}\` is damaged: its header does not match its checksum (T-06)`,
      COPY_AGAIN,
    );
  }
  const version = opened.metadata.get("version");
  if (version !== "1") {
    throw broken(opened, `has version ${quoted(version)}; this reader knows 1 (T-03)`, NEWER);
  }
  let metadata: TiedMetadata;
  try {
    metadata = tiedMetadata(new Map(opened.metadata), "$");
  } catch (err) {
    if (!(err instanceof MalformedJson)) throw err;
    throw broken(opened, `has malformed metadata: ${err.message} (T-04)`);
  }
  if (!CODED.has(metadata.dtype)) {
    const what = `has dtype \`${metadata.dtype}\`, which this reader does not know (T-04)`;
    throw broken(opened, what, NEWER);
  }
  if (!isBinary32(metadata.multiplier)) {
    throw broken(opened, `has multiplier ${metadata.multiplier} (T-04)`);
  }
  checkTensors(opened, metadata);
  return metadata;
}

function checkTensors(opened: Safetensors, metadata: TiedMetadata): void {
  const found = inOrder(opened.entries.values());
  const known = TENSORS.every(([name, dtype, dimensions], i) => {
    const entry = found[i];
    return entry?.name === name && entry.dtype === dtype && entry.shape.length === dimensions;
  });
  if (!known || found.length !== TENSORS.length) {
    const names = TENSORS.map(([name]) => name).join(", ");
    throw broken(opened, `does not have the tensors ${names}, in order (T-01)`);
  }
  const rows = opened.entries.get("codes")!.shape[0]!;
  if (rows === 0) throw broken(opened, "has no rows (T-05)");
  const numGroups = Math.ceil(metadata.width / metadata.groupSize);
  const codeBytes = Math.ceil((numGroups * metadata.groupSize * BITS[metadata.dtype]!) / 8);
  const shapes: [string, number[]][] = [
    [HEADER_CHECKSUM, [1]],
    ["codes", [rows, codeBytes]],
    ["scales", [rows, numGroups]],
    ["checksums", [rows]],
  ];
  for (const [name, shape] of shapes) {
    const own = opened.entries.get(name)!.shape;
    if (own.some((size, i) => size !== shape[i])) {
      throw broken(
        opened,
        `has tensor \`${name}\` of shape [${own.join(", ")}]; a row of ${metadata.width} ` +
          `elements in groups of ${metadata.groupSize} needs [${shape.join(", ")}] (T-05)`,
      );
    }
  }
  if (codeBytes > LARGEST_ROW || numGroups > LARGEST_ROW / 4) {
    throw broken(opened, `has rows of ${codeBytes} bytes; this reader takes up to ${LARGEST_ROW}`);
  }
}
