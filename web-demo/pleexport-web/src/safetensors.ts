import { BlobError } from "./errors.js";
import { FileFailure, readRange, type BundleFile } from "./files.js";
import { MalformedJson, parseJson, type Json } from "./json.js";
import { isChecksum } from "./xxh3.js";

const MAX_HEADER_BYTES = 100_000_000;
const MAX_DIMENSIONS = 32;
/** What a first read takes: mostly all of the header, and the checksum behind it. */
const FIRST_BYTES = 16_384;
const DAMAGED = "the file may be damaged; fetch or copy it again";

/** By safetensors' name, ours and the bits of an element. */
const DTYPES: ReadonlyMap<string, readonly [string, number]> = new Map([
  ["F64", ["fp64", 64]],
  ["F32", ["fp32", 32]],
  ["F16", ["fp16", 16]],
  ["BF16", ["bf16", 16]],
  ["F8_E4M3", ["fp8_e4m3", 8]],
  ["F8_E5M2", ["fp8_e5m2", 8]],
  ["I64", ["int64", 64]],
  ["I32", ["int32", 32]],
  ["I16", ["int16", 16]],
  ["I8", ["int8", 8]],
  ["U64", ["uint64", 64]],
  ["U32", ["uint32", 32]],
  ["U16", ["uint16", 16]],
  ["U8", ["uint8", 8]],
  ["BOOL", ["bool", 8]],
]);

/** The first tensor of a checked file: the checksum of all bytes before it. */
export const HEADER_CHECKSUM = "header_checksum";
export const CHECKSUM_BYTES = 8;

/** Where one tensor lies: `bytes` bytes at byte `offset` of the file. */
export interface TensorEntry {
  readonly name: string;
  /** `uint8`, `fp32` and so on. */
  readonly dtype: string;
  readonly shape: readonly number[];
  readonly offset: number;
  readonly bytes: number;
}

/** The header of a safetensors file, checked; nothing else was read. */
export interface Safetensors {
  readonly file: BundleFile;
  readonly metadata: ReadonlyMap<string, string>;
  readonly entries: ReadonlyMap<string, TensorEntry>;
  /** It has a checksum of its header, which is not that of the header. */
  readonly headerIsDamaged: boolean;
}

/**
 * Reads the header of a safetensors file.
 *
 * @throws BlobError the file is truncated or malformed.
 */
export async function readSafetensors(file: BundleFile): Promise<Safetensors> {
  try {
    const first = await readRange(file, 0, Math.min(FIRST_BYTES, file.size));
    const length = headerLength(file, first);
    const end = Math.min(8 + length + CHECKSUM_BYTES, file.size);
    const start = end <= first.length ? first : await readRange(file, 0, end);
    return parse(file, start, 8 + length);
  } catch (err) {
    if (err instanceof FileFailure) {
      throw failure(file, `cannot be read: ${err.reason}`, err.hint ?? DAMAGED, err);
    }
    throw err;
  }
}

function failure(file: BundleFile, what: string, hint = DAMAGED, cause?: unknown): BlobError {
  return new BlobError(`\`${file.path}\` ${what}`, hint, { cause });
}

function headerLength(file: BundleFile, first: Uint8Array): number {
  if (new TextDecoder("latin1").decode(first.subarray(0, 23)) === "version https://git-lfs") {
    throw failure(file, "is a Git LFS pointer, not the file itself", "run `git lfs pull`");
  }
  const claimed = first.length < 8 ? 0n : viewOf(first).getBigUint64(0, true);
  if (first.length < 8 || claimed > Math.min(MAX_HEADER_BYTES, file.size - 8)) {
    throw failure(
      file,
      `is not a safetensors file: its header claims ${claimed} bytes of ${file.size}`,
      "the copy may be truncated; fetch it again",
    );
  }
  return Number(claimed);
}

function parse(file: BundleFile, start: Uint8Array, headBytes: number): Safetensors {
  let header: Json;
  try {
    header = parseJson(start.subarray(8, headBytes));
  } catch (err) {
    if (!(err instanceof MalformedJson)) throw err;
    throw failure(file, `has a header that is not valid JSON (${err.message})`);
  }
  if (!(header instanceof Map)) throw failure(file, "has a header that is not a JSON object");
  const metadata = checkedMetadata(file, header.get("__metadata__") ?? new Map());
  const entries = new Map<string, TensorEntry>();
  for (const [name, value] of header) {
    if (name !== "__metadata__") entries.set(name, checkedEntry(file, headBytes, name, value));
  }
  checkLayout(file, headBytes, [...entries.values()]);
  const own = entries.get(HEADER_CHECKSUM);
  const isChecked =
    own !== undefined && own.dtype === "uint64" && own.shape.length === 1 && own.shape[0] === 1;
  const stored = start.subarray(headBytes, headBytes + CHECKSUM_BYTES);
  return {
    file,
    metadata,
    entries,
    headerIsDamaged:
      isChecked && !(own.offset === headBytes && isChecksum(stored, start.subarray(0, headBytes))),
  };
}

function checkedMetadata(file: BundleFile, value: Json): Map<string, string> {
  if (!(value instanceof Map) || [...value.values()].some((held) => typeof held !== "string")) {
    throw failure(file, "has `__metadata__` that is not a map from string to string");
  }
  return value as Map<string, string>;
}

function checkedEntry(file: BundleFile, headBytes: number, name: string, value: Json): TensorEntry {
  const fields = value instanceof Map ? value : new Map<string, Json>();
  const dtype = fields.get("dtype");
  const shape = integers(fields.get("shape"));
  const offsets = integers(fields.get("data_offsets"));
  if (
    typeof dtype !== "string" ||
    shape === null ||
    offsets?.length !== 2 ||
    shape.length > MAX_DIMENSIONS
  ) {
    throw failure(file, `has a malformed header entry for tensor \`${name}\``);
  }
  const known = DTYPES.get(dtype);
  if (known === undefined) {
    throw failure(file, `has tensor \`${name}\` of unknown dtype \`${dtype}\``);
  }
  const [begin, end] = offsets as [number, number];
  const expected = shape.reduce((product, n) => product * n, known[1]) / 8;
  if (end - begin !== expected) {
    throw failure(
      file,
      `gives tensor \`${name}\` ${end - begin} bytes; ${dtype} [${shape.join(", ")}] needs ${expected}`,
    );
  }
  if (end > file.size - headBytes) {
    throw failure(
      file,
      `ends at byte ${file.size}, before tensor \`${name}\` (byte ${headBytes + end})`,
      "the copy is truncated; fetch it again",
    );
  }
  return { name, dtype: known[0], shape, offset: headBytes + begin, bytes: expected };
}

function integers(value: Json | undefined): number[] | null {
  if (!Array.isArray(value)) return null;
  const found = value.map((n) => (typeof n === "bigint" && n >= 0n ? Number(n) : NaN));
  return found.every(Number.isSafeInteger) ? found : null;
}

function checkLayout(file: BundleFile, headBytes: number, entries: TensorEntry[]): void {
  let position = headBytes;
  for (const entry of inOrder(entries)) {
    if (entry.offset !== position) {
      const problem = entry.offset < position ? "overlaps another tensor" : "follows a hole";
      throw failure(file, `has tensor \`${entry.name}\` at a place that ${problem}`);
    }
    position += entry.bytes;
  }
  if (position !== file.size) {
    throw failure(file, `has ${file.size - position} bytes that belong to no tensor`);
  }
}

/** Tensors as they lie in the file. */
export function inOrder(entries: Iterable<TensorEntry>): TensorEntry[] {
  return [...entries].sort((a, b) => a.offset - b.offset || a.bytes - b.bytes);
}

export function viewOf(bytes: Uint8Array): DataView {
  return new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
}
