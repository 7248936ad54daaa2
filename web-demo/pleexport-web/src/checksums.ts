import { BundleError, CheckFailed, COPY_AGAIN } from "./errors.js";
import { FileFailure, type BundleFiles, type LocalFile } from "./files.js";
import { integer, list, map, MalformedJson, object, parseJson, string, type Convert } from "./json.js";
import { xxh3Hex } from "./xxh3.js";

export const CHECKSUMS = "checksums.json";
export const CHUNK_BYTES = 1 << 20;

/** By file name, the XXH3-64 of each chunk of 1 MiB, in order; 16 hexadecimal digits each. */
export type Checksums = ReadonlyMap<string, readonly string[]>;

const checksum: Convert<string> = (value, path) => {
  const found = string(value, path);
  if (!/^[0-9a-f]{16}$/.test(found)) {
    throw new MalformedJson(`Expected \`str\` matching regex '^[0-9a-f]{16}$' - at \`${path}\``);
  }
  return found;
};

function only(expected: string | number): Convert<void> {
  return (value, path) => {
    const found = typeof expected === "string" ? string(value, path) : integer(value, path);
    if (found !== expected) {
      const shown = typeof found === "string" ? `'${found}'` : found;
      throw new MalformedJson(`Invalid enum value ${shown} - at \`${path}\``);
    }
  };
}

const checksums = object<Checksums>((fields) => {
  fields.required("format", only("pleexport-checksums"));
  fields.required("version", only(1));
  fields.required("chunk_bytes", only(CHUNK_BYTES));
  return fields.required("files", map(list(checksum)));
});

/**
 * The checksums of a bundle's files; null where there are none.
 *
 * @throws BundleError they cannot be read.
 * @throws CheckFailed they are not in the form that this version reads.
 */
export async function readChecksums(files: BundleFiles): Promise<Checksums | FileFailure> {
  const path = `${files.path}/${CHECKSUMS}`;
  try {
    return checksums(parseJson(await files.readWhole(CHECKSUMS)), "$");
  } catch (err) {
    if (err instanceof FileFailure && err.isMissing) return err;
    if (err instanceof FileFailure) throw unreadable(path, err);
    if (err instanceof MalformedJson) {
      throw new CheckFailed(`\`${path}\` is damaged: ${err.message}`, COPY_AGAIN, { cause: err });
    }
    throw err;
  }
}

/** What is said where there are no checksums. */
export function unreadable(path: string, err: FileFailure): BundleError {
  return new BundleError(
    `\`${path}\` cannot be read (${err.reason}), so no file can be checked`,
    err.hint ?? COPY_AGAIN,
    { cause: err },
  );
}

/**
 * Compares the content of a file, which was read already.
 *
 * @param path of the file, to name it.
 * @throws CheckFailed names the first chunk that differs.
 */
export function checkBytes(data: Uint8Array, path: string, expected: readonly string[]): void {
  const chunks = Math.ceil(data.length / CHUNK_BYTES);
  for (let chunk = 0; chunk < Math.max(chunks, expected.length); chunk++) {
    const part = data.subarray(chunk * CHUNK_BYTES, (chunk + 1) * CHUNK_BYTES);
    if (chunk >= chunks || xxh3Hex(part) !== expected[chunk]) {
      throw damaged(path, chunk, expected.length);
    }
  }
}

/**
 * Compares an open file in little memory.
 *
 * @throws CheckFailed names the first chunk that differs.
 * @throws FileFailure it cannot be read.
 */
export function checkFile(file: LocalFile, expected: readonly string[]): void {
  if (Math.ceil(file.size / CHUNK_BYTES) !== expected.length) {
    throw damaged(file.path, 0, expected.length);
  }
  const buffer = new Uint8Array(Math.min(CHUNK_BYTES, file.size));
  expected.forEach((checksum, chunk) => {
    const begin = chunk * CHUNK_BYTES;
    const part = buffer.subarray(0, Math.min(CHUNK_BYTES, file.size - begin));
    file.readInto(begin, part);
    if (xxh3Hex(part) !== checksum) throw damaged(file.path, chunk, expected.length);
  });
}

function damaged(path: string, chunk: number, chunks: number): CheckFailed {
  const begin = (chunk * CHUNK_BYTES).toLocaleString("en-US");
  const where = chunks > 0 ? `chunk ${chunk} of ${chunks}, at byte ${begin},` : "the file";
  return new CheckFailed(
    `\`${path}\` is damaged: ${where} does not match its checksum in \`${CHECKSUMS}\``,
    COPY_AGAIN,
  );
}
