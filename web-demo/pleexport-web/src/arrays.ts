/** Frees memory at once where a browser can: what is as large as a matrix is much to leave behind. */
export function giveBack(buffer: ArrayBufferLike & { transfer?(bytes: number): ArrayBuffer }): void {
  buffer.transfer?.(0);
}
