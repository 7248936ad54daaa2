// Graphs on WebGPU, by the public API of onnxruntime-web. A page loads this file where it needs it:
// with it comes a WebAssembly of its own.
import * as ort from "onnxruntime-web/webgpu";

import type { LocalFile } from "./files.js";
import { OrtFailure, shapesOf, type HeldTensor, type OpenGraph, type OpenTensor, type TensorType } from "./graph.js";
import { withWeights } from "./lazy-bytes.js";

const FLOAT_BYTES = 4;
const LONG_BYTES = 8;
const STORAGE_AND_COPIES = 0x80 | 0x04 | 0x08; // GPUBufferUsage: STORAGE, COPY_SRC, COPY_DST

/** What is called of WebGPU; TypeScript's own library does not have it. */
interface Device {
  readonly queue: { submit(commands: readonly object[]): void };
  createBuffer(description: { size: number; usage: number }): Buffer;
  createCommandEncoder(): Encoder;
}
interface Buffer {
  destroy(): void;
}
interface Encoder {
  clearBuffer(buffer: Buffer): void;
  copyBufferToBuffer(from: Buffer, at: number, into: Buffer, to: number, bytes: number): void;
  finish(): object;
}

/** Where ONNX Runtime's files for WebGPU are. */
export const gpuRuntimeFiles = {
  module: (): string => new URL("./ort-wasm-simd-threaded.asyncify.js", import.meta.url).href,
  wasm: (): string => new URL("./ort-wasm-simd-threaded.asyncify.wasm", import.meta.url).href,
};

/** Numbers in JavaScript's memory, which go to the GPU or come from there with each call. */
class Copied implements OpenTensor {
  private readonly data: ArrayBuffer;

  constructor(
    private readonly type: TensorType,
    private readonly dims: readonly number[],
  ) {
    const size = type === "int64" ? LONG_BYTES : FLOAT_BYTES;
    this.data = new ArrayBuffer(dims.reduce((product, n) => product * n, size));
  }

  get floats(): Float32Array<ArrayBuffer> {
    return new Float32Array(this.data);
  }

  get longs(): BigInt64Array<ArrayBuffer> {
    return new BigInt64Array(this.data);
  }

  get tensor(): ort.Tensor {
    return this.type === "int64"
      ? new ort.Tensor("int64", this.longs, this.dims)
      : new ort.Tensor("float32", this.floats, this.dims);
  }

  free(): void {}
}

/** A buffer of the GPU. */
class OnGpu implements HeldTensor {
  readonly bytes: number;
  readonly tensor: ort.Tensor;
  private readonly buffer: Buffer;

  constructor(
    private readonly device: Device,
    type: TensorType,
    readonly dims: readonly number[],
  ) {
    if (type !== "fp32") throw new OrtFailure(`on WebGPU a graph holds float32, not ${type}`);
    this.bytes = dims.reduce((product, n) => product * n, FLOAT_BYTES);
    this.buffer = device.createBuffer({ size: Math.ceil(this.bytes / 16) * 16, usage: STORAGE_AND_COPIES });
    this.tensor = ort.Tensor.fromGpuBuffer(this.buffer as never, { dataType: "float32", dims: [...dims] });
  }

  clear(): void {
    this.submit((encoder) => encoder.clearBuffer(this.buffer));
  }

  takeSlots(smaller: HeldTensor): void {
    const { buffer, bytes, dims } = smaller as OnGpu;
    const heads = dims[1]!;
    this.submit((encoder) => {
      for (let head = 0; head < heads; head++) {
        encoder.copyBufferToBuffer(
          buffer, (head * bytes) / heads, this.buffer, (head * this.bytes) / heads, bytes / heads,
        );
      }
    });
  }

  free(): void {
    this.tensor.dispose();
    this.buffer.destroy();
  }

  private submit(fill: (encoder: Encoder) => void): void {
    const encoder = this.device.createCommandEncoder();
    fill(encoder);
    this.device.queue.submit([encoder.finish()]);
  }
}

/** An open graph on WebGPU. */
export class GpuGraph implements OpenGraph {
  readonly heapBytes = null;

  private constructor(
    private readonly session: ort.InferenceSession,
    private readonly device: Device,
  ) {}

  /**
   * Opens a graph.
   *
   * @param model the graph without its weights.
   * @param weights by the name that the graph has for it, each file of weights.
   * @param heldOutputs names of the outputs that stay on the GPU.
   * @throws OrtFailure it is no graph, or its weights are not there.
   */
  static async open(
    model: Uint8Array,
    weights: ReadonlyMap<string, LocalFile>,
    heldOutputs: readonly string[],
  ): Promise<GpuGraph> {
    ort.env.logLevel = "error";
    ort.env.wasm.numThreads = 1; // what is left for the CPU is small
    ort.env.wasm.wasmPaths = { mjs: gpuRuntimeFiles.module(), wasm: gpuRuntimeFiles.wasm() };
    return withWeights(weights, null, async (externalData) => {
      const session = await ort.InferenceSession.create(model, {
        executionProviders: ["webgpu"],
        logSeverityLevel: 3,
        externalData,
        preferredOutputLocation: Object.fromEntries(heldOutputs.map((name) => [name, "gpu-buffer"])),
      });
      const device = (await ort.env.webgpu.device) as unknown as Device;
      return new GpuGraph(session, device);
    });
  }

  get inputs(): ReadonlyMap<string, readonly (number | string)[]> {
    return shapesOf(this.session.inputMetadata);
  }

  get outputs(): ReadonlyMap<string, readonly (number | string)[]> {
    return shapesOf(this.session.outputMetadata);
  }

  tensor(type: TensorType, dims: readonly number[]): OpenTensor {
    return new Copied(type, dims);
  }

  heldTensor(type: TensorType, dims: readonly number[]): HeldTensor {
    return new OnGpu(this.device, type, dims);
  }

  async run(
    inputs: ReadonlyMap<string, OpenTensor | HeldTensor>,
    outputs: ReadonlyMap<string, OpenTensor | HeldTensor>,
  ): Promise<void> {
    const feeds = Object.fromEntries([...inputs].map(([name, own]) => [name, (own as Copied | OnGpu).tensor]));
    // What is to be read here comes in a tensor of its own.
    const fetches = Object.fromEntries(
      [...outputs].map(([name, own]) => [name, own instanceof OnGpu ? own.tensor : null]),
    );
    try {
      const found = await this.session.run(feeds, fetches);
      for (const [name, own] of outputs) {
        if (own instanceof Copied) own.floats.set(found[name]!.data as Float32Array);
      }
    } catch (err) {
      throw new OrtFailure(err instanceof Error ? err.message : String(err), { cause: err });
    }
  }

  async close(): Promise<void> {
    await this.session.release();
  }
}
