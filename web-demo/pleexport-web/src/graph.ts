import type { InferenceSession } from "onnxruntime-web";

export type TensorType = "fp32" | "fp16" | "int8" | "int64";

/** A tensor whose numbers are read and written here. */
export interface OpenTensor {
  /** Only until the next call of anything: memory moves as it grows. */
  readonly floats: Float32Array<ArrayBuffer>;
  /** The same, of a tensor of integers. */
  readonly longs: BigInt64Array<ArrayBuffer>;
  free(): void;
}

/** A tensor that one call of a graph hands to the next, with zeros at first. */
export interface HeldTensor {
  readonly dims: readonly number[];
  readonly bytes: number;
  /** Makes all of it zero. */
  clear(): void;
  /** Takes the slots of a smaller one to its front; both are `[1, heads, slots, width]`. */
  takeSlots(smaller: HeldTensor): void;
  free(): void;
}

/** An open graph, whose tensors are its own kinds of these. */
export interface OpenGraph {
  /** By name, the shape of each input: numbers, and names where the size changes. */
  readonly inputs: ReadonlyMap<string, readonly (number | string)[]>;
  readonly outputs: ReadonlyMap<string, readonly (number | string)[]>;
  /** Bytes of WebAssembly's memory, in which all tensors are; null where these are on a GPU. */
  readonly heapBytes: number | null;
  tensor(type: TensorType, dims: readonly number[]): OpenTensor;
  heldTensor(type: TensorType, dims: readonly number[]): HeldTensor;
  /**
   * Runs the graph; outputs are written into the tensors given.
   *
   * @throws OrtFailure
   */
  run(
    inputs: ReadonlyMap<string, OpenTensor | HeldTensor>,
    outputs: ReadonlyMap<string, OpenTensor | HeldTensor>,
  ): Promise<void>;
  close(): Promise<void>;
}

/** A graph is refused by ONNX Runtime, or fails while it runs; its words are the message. */
export class OrtFailure extends Error {}

export function shapesOf(
  metadata: readonly InferenceSession.ValueMetadata[],
): Map<string, readonly (number | string)[]> {
  return new Map(metadata.map((value) => [value.name, value.isTensor ? value.shape : []]));
}
