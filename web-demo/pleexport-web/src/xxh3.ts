import { createXXHash3 } from "hash-wasm";

/** One hasher serves all: nothing waits between its calls. */
const hasher = await createXXHash3();

/** The 64-bit hash XXH3 with seed 0 of bytes that lie behind each other: 8 bytes, lowest first. */
export function xxh3(...parts: Uint8Array[]): Uint8Array {
  hasher.init();
  for (const part of parts) hasher.update(part);
  return hasher.digest("binary").reverse();
}

/** The same as 16 hexadecimal digits, as `checksums.json` has them. */
export function xxh3Hex(...parts: Uint8Array[]): string {
  hasher.init();
  for (const part of parts) hasher.update(part);
  return hasher.digest("hex");
}

/** Whether 8 bytes are the checksum of what they follow. */
export function isChecksum(stored: Uint8Array, ...parts: Uint8Array[]): boolean {
  return xxh3(...parts).every((byte, i) => byte === stored[i]);
}
