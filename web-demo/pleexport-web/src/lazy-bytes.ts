import { giveBack } from "./arrays.js";
import type { LocalFile } from "./files.js";
import { OrtFailure } from "./graph.js";

/** Of one call to a file. Arrays that a browser's file system has seen stay until garbage is collected. */
const READ_BYTES = 1 << 20;

/** Where ONNX Runtime copies tensors to: the memory of WebAssembly as it is at the moment. */
export type Heap = () => Uint8Array;

/**
 * A file that ONNX Runtime takes for an array in memory. Of it, it asks for `byteLength`, and for
 * `subarray` once for each tensor, which it copies at once. That is not documented: it holds for the
 * version that ort.ts names.
 */
class LazyBytes extends Uint8Array {
  failure: unknown = null;
  /** Whether a tensor was asked for, and its bytes were not copied yet. */
  private isWaiting = false;
  private buffered = new Uint8Array(0);
  private readonly piece = new Uint8Array(READ_BYTES);

  constructor(
    private readonly file: LocalFile,
    private readonly heap: Heap | null,
  ) {
    super(0);
    Object.defineProperty(this, "byteLength", { value: file.size });
  }

  override subarray(begin: number, end: number): Uint8Array<ArrayBuffer> {
    return this.orFailure(() => {
      this.checkCopied();
      return this.heap === null ? this.read(begin, end) : this.copiedLater(this.heap(), begin, end);
    });
  }

  /** Refuses to go on with a tensor that was never copied. */
  checkCopied(): void {
    if (this.isWaiting) throw new OrtFailure("the runtime takes weights in another way than is known of it");
  }

  free(): void {
    giveBack(this.buffered.buffer);
  }

  /** The bytes in a buffer that serves all tensors. */
  private read(begin: number, end: number): Uint8Array<ArrayBuffer> {
    if (this.buffered.length < end - begin) this.buffered = new Uint8Array(end - begin);
    const part = this.buffered.subarray(0, end - begin);
    this.readInto(part, begin);
    return part;
  }

  /**
   * An empty array: where it is copied to the heap, the file is read there, with no buffer as large as the
   * largest matrix between them.
   */
  private copiedLater(heap: Uint8Array, begin: number, end: number): Uint8Array<ArrayBuffer> {
    const given = new Uint8Array(0);
    const set = (from: ArrayLike<number>, at = 0): void => {
      delete (heap as { set?: unknown }).set;
      if (from !== given) return heap.set(from, at);
      this.isWaiting = false;
      this.orFailure(() => this.readInto(heap.subarray(at, at + end - begin), begin));
    };
    Object.defineProperty(heap, "set", { value: set, configurable: true });
    this.isWaiting = true;
    return given;
  }

  private readInto(into: Uint8Array, begin: number): void {
    for (let at = 0; at < into.length; at += READ_BYTES) {
      const piece = this.piece.subarray(0, Math.min(READ_BYTES, into.length - at));
      this.file.readInto(begin + at, piece);
      into.set(piece, at);
    }
  }

  private orFailure<T>(read: () => T): T {
    try {
      return read();
    } catch (err) {
      this.failure ??= err;
      throw err;
    }
  }
}

/**
 * Opens a graph with weights that are read when they are asked for.
 *
 * @param weights by the name that the graph has for it, each file of weights.
 * @param heap where tensors are copied to; null where that is not the memory of WebAssembly.
 * @throws OrtFailure it is no graph, or its weights are not there.
 */
export async function withWeights<T>(
  weights: ReadonlyMap<string, LocalFile>,
  heap: Heap | null,
  open: (externalData: readonly { path: string; data: Uint8Array }[]) => Promise<T>,
): Promise<T> {
  const lazy = [...weights].map(([path, file]) => ({ path, data: new LazyBytes(file, heap) }));
  try {
    const opened = await open(lazy);
    for (const { data } of lazy) data.checkCopied();
    return opened;
  } catch (err) {
    for (const { data } of lazy) if (data.failure !== null) throw data.failure;
    throw new OrtFailure(err instanceof Error ? err.message : String(err), { cause: err });
  } finally {
    for (const { data } of lazy) data.free();
  }
}
