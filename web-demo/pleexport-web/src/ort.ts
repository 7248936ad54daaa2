// All that leans on what onnxruntime-web does not document; it holds for the one version that
// package.json names, and test/ort.test.ts fails where that changes.
//
// The public API copies every tensor into the heap of WebAssembly and out of it again, at each call.
// Here tensors live in that heap, and one buffer is a graph's input and output at once.
import * as ort from "onnxruntime-web";

import type { LocalFile } from "./files.js";
import { OrtFailure, shapesOf, type HeldTensor, type OpenGraph, type OpenTensor, type TensorType } from "./graph.js";
import { withWeights } from "./lazy-bytes.js";

/** The version whose inside this file knows. */
export const ORT_VERSION = "1.30.0";

/** What is called of ONNX Runtime's module. Pointers may be negative: they are unsigned 32-bit numbers. */
interface OrtModule {
  readonly HEAPU8: Uint8Array<ArrayBuffer>;
  _malloc(bytes: number): number;
  _free(pointer: number): void;
  setValue(pointer: number, value: number, type: "i32" | "*"): void;
  getValue(pointer: number, type: "*"): number;
  UTF8ToString(pointer: number): string;
  _OrtCreateTensor(type: number, data: number, bytes: number, dims: number, rank: number, location: number): number;
  _OrtReleaseTensor(tensor: number): number;
  _OrtCreateRunOptions(severity: number, verbosity: number, terminate: boolean, tag: number): number;
  _OrtReleaseRunOptions(options: number): void;
  _OrtRun(
    session: number,
    inputNames: number,
    inputs: number,
    inputCount: number,
    outputNames: number,
    outputCount: number,
    outputs: number,
    options: number,
  ): number | Promise<number>;
  _OrtGetLastError(code: number, message: number): number;
}

/** By dtype: ONNX's number of it, and bytes of an element. */
const TYPES = { fp32: [1, 4], int8: [3, 1], int64: [7, 8], fp16: [10, 2] } as const;

const ON_CPU = 1;
const ALIGNMENT = 64;
const ERRORS_ONLY = 3;

/** Where ONNX Runtime's files are; a page sets its own before the first session. */
export const runtimeFiles = {
  module: (): string => new URL("./ort-module.js", import.meta.url).href,
  wasm: (): string => import.meta.resolve("onnxruntime-web/ort-wasm-simd-threaded.wasm"),
  /** The same, where a page has fetched and compiled it already. */
  compiled: async (): Promise<WebAssembly.Module | null> => null,
};

/** What ort-module.ts gives. */
interface Started {
  readonly instance: OrtModule;
  startWith(compiled: WebAssembly.Module): void;
}

/** A tensor in the heap of WebAssembly, with zeros at first. */
export class HeapTensor implements OpenTensor, HeldTensor {
  readonly bytes: number;
  readonly handle: number;
  private readonly block: number;
  private readonly begin: number;

  constructor(
    private readonly module: OrtModule,
    readonly type: TensorType,
    readonly dims: readonly number[],
  ) {
    const [code, size] = TYPES[type];
    this.bytes = dims.reduce((product, n) => product * n, size);
    this.block = module._malloc(this.bytes + ALIGNMENT) >>> 0;
    if (this.block === 0) throw new OrtFailure(`no memory for ${this.bytes} bytes`);
    this.begin = Math.ceil(this.block / ALIGNMENT) * ALIGNMENT;
    this.clear();
    const shape = module._malloc(4 * dims.length + 4);
    dims.forEach((n, i) => module.setValue(shape + 4 * i, n, "i32"));
    this.handle = module._OrtCreateTensor(code, this.begin, this.bytes, shape, dims.length, ON_CPU);
    module._free(shape);
    if (this.handle === 0) throw new OrtFailure("a tensor cannot be made");
  }

  /** Its bytes. Only until the next call of anything: the heap moves as it grows. */
  get data(): Uint8Array<ArrayBuffer> {
    return this.module.HEAPU8.subarray(this.begin, this.begin + this.bytes);
  }

  /** The same as numbers, of a tensor of such. */
  get floats(): Float32Array<ArrayBuffer> {
    return new Float32Array(this.module.HEAPU8.buffer, this.begin, this.bytes / 4);
  }

  get longs(): BigInt64Array<ArrayBuffer> {
    return new BigInt64Array(this.module.HEAPU8.buffer, this.begin, this.bytes / 8);
  }

  clear(): void {
    this.data.fill(0);
  }

  takeSlots(smaller: HeldTensor): void {
    const { data: from, bytes, dims } = smaller as HeapTensor;
    const into = this.data;
    const [heads, oldBytes, newBytes] = [dims[1]!, bytes / dims[1]!, this.bytes / dims[1]!];
    for (let head = 0; head < heads; head++) {
      into.set(from.subarray(head * oldBytes, (head + 1) * oldBytes), head * newBytes);
    }
  }

  free(): void {
    this.module._OrtReleaseTensor(this.handle);
    this.module._free(this.block);
  }
}

/** An open graph on WebAssembly. */
export class Graph implements OpenGraph {
  private readonly names = new Map<string, number>();
  private readonly options: number;

  private constructor(
    private readonly session: ort.InferenceSession,
    private readonly module: OrtModule,
  ) {
    this.options = module._OrtCreateRunOptions(ERRORS_ONLY, 0, false, 0);
  }

  /**
   * Opens a graph.
   *
   * @param model the graph without its weights.
   * @param weights by the name that the graph has for it, each file of weights.
   * @param threads those of the first graph count for all.
   * @throws OrtFailure it is no graph, or its weights are not there.
   */
  static async open(
    model: Uint8Array,
    weights: ReadonlyMap<string, LocalFile>,
    threads: number,
  ): Promise<Graph> {
    ort.env.logLevel = "error";
    ort.env.wasm.numThreads = threads;
    ort.env.wasm.wasmPaths = { mjs: runtimeFiles.module(), wasm: runtimeFiles.wasm() };
    const started = (await import(runtimeFiles.module())) as Started;
    const compiled = await runtimeFiles.compiled();
    if (compiled !== null) started.startWith(compiled);
    return withWeights(weights, () => started.instance.HEAPU8, async (externalData) => {
      const session = await ort.InferenceSession.create(model, {
        executionProviders: ["wasm"],
        logSeverityLevel: ERRORS_ONLY,
        externalData,
      });
      return new Graph(session, started.instance);
    });
  }

  get inputs(): ReadonlyMap<string, readonly (number | string)[]> {
    return shapesOf(this.session.inputMetadata);
  }

  get outputs(): ReadonlyMap<string, readonly (number | string)[]> {
    return shapesOf(this.session.outputMetadata);
  }

  get heapBytes(): number {
    return this.module.HEAPU8.length;
  }

  tensor(type: TensorType, dims: readonly number[]): HeapTensor {
    return new HeapTensor(this.module, type, dims);
  }

  heldTensor(type: TensorType, dims: readonly number[]): HeapTensor {
    return this.tensor(type, dims);
  }

  async run(
    inputs: ReadonlyMap<string, OpenTensor | HeldTensor>,
    outputs: ReadonlyMap<string, OpenTensor | HeldTensor>,
  ): Promise<void> {
    const { module } = this;
    const session = (this.session as unknown as { handler: { sessionId: number } }).handler.sessionId;
    const count = inputs.size + outputs.size;
    const names = module._malloc(8 * count);
    const handles = names + 4 * count;
    [...inputs, ...outputs].forEach(([name, tensor], i) => {
      module.setValue(names + 4 * i, this.nameOf(name), "*");
      module.setValue(handles + 4 * i, (tensor as HeapTensor).handle, "*");
    });
    const [outputNames, outputHandles] = [names + 4 * inputs.size, handles + 4 * inputs.size];
    try {
      const failed = await module._OrtRun(
        session, names, handles, inputs.size, outputNames, outputs.size, outputHandles, this.options,
      );
      if (failed !== 0) throw new OrtFailure(this.lastError());
    } finally {
      module._free(names);
    }
  }

  async close(): Promise<void> {
    await this.session.release();
    this.module._OrtReleaseRunOptions(this.options);
    for (const name of this.names.values()) this.module._free(name);
  }

  private nameOf(text: string): number {
    const known = this.names.get(text);
    if (known !== undefined) return known;
    const bytes = new TextEncoder().encode(`${text}\0`);
    const pointer = this.module._malloc(bytes.length);
    this.module.HEAPU8.set(bytes, pointer >>> 0);
    this.names.set(text, pointer);
    return pointer;
  }

  private lastError(): string {
    const place = this.module._malloc(8);
    this.module._OrtGetLastError(place, place + 4);
    const message = this.module.UTF8ToString(this.module.getValue(place + 4, "*"));
    this.module._free(place);
    return message;
  }
}
