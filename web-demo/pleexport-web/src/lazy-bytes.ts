import type { LocalFile } from "./files.js";
import { OrtFailure } from "./graph.js";

/** Of one call to a file. Arrays that a browser's file system has seen stay until garbage is collected. */
const READ_BYTES = 1 << 20;

/**
 * A file that ONNX Runtime takes for an array in memory. Of it, it asks for `byteLength`, and for
 * `subarray` once for each tensor, which it copies at once; so one buffer serves all. That is not
 * documented: it holds for the version that ort.ts names.
 */
class LazyBytes extends Uint8Array {
  failure: unknown = null;
  private buffered = new Uint8Array(0);
  private readonly piece = new Uint8Array(READ_BYTES);

  constructor(private readonly file: LocalFile) {
    super(0);
    Object.defineProperty(this, "byteLength", { value: file.size });
  }

  override subarray(begin: number, end: number): Uint8Array<ArrayBuffer> {
    if (this.buffered.length < end - begin) this.buffered = new Uint8Array(end - begin);
    const part = this.buffered.subarray(0, end - begin);
    try {
      for (let at = 0; at < part.length; at += READ_BYTES) {
        const piece = this.piece.subarray(0, Math.min(READ_BYTES, part.length - at));
        this.file.readInto(begin + at, piece);
        part.set(piece, at);
      }
    } catch (err) {
      this.failure = err;
      throw err;
    }
    return part;
  }

  free(): void {
    giveBack(this.buffered.buffer);
  }
}

/** Frees memory at once where a browser can: what is as large as a matrix is much to leave behind. */
export function giveBack(buffer: ArrayBuffer & { transfer?(bytes: number): ArrayBuffer }): void {
  buffer.transfer?.(0);
}

/**
 * Opens a graph with weights that are read when they are asked for.
 *
 * @param weights by the name that the graph has for it, each file of weights.
 * @throws OrtFailure it is no graph, or its weights are not there.
 */
export async function withWeights<T>(
  weights: ReadonlyMap<string, LocalFile>,
  open: (externalData: readonly { path: string; data: Uint8Array }[]) => Promise<T>,
): Promise<T> {
  const lazy = [...weights].map(([path, file]) => ({ path, data: new LazyBytes(file) }));
  try {
    return await open(lazy);
  } catch (err) {
    for (const { data } of lazy) if (data.failure !== null) throw data.failure;
    throw new OrtFailure(err instanceof Error ? err.message : String(err), { cause: err });
  } finally {
    for (const { data } of lazy) data.free();
  }
}
