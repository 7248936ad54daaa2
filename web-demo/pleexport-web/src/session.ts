import type { Bundle } from "./bundle.js";
import {
  ALL_TOKENS,
  LOGITS,
  NUM_LOGITS_TO_KEEP,
  POSITION_IDS,
  takesWholeText,
  type CacheInput,
  type GraphContract,
} from "./contract.js";
import { BundleError, InputError, MIXED, wordsOf } from "./errors.js";
import type { LocalFile } from "./files.js";
import { OrtFailure, type HeldTensor, type OpenGraph, type OpenTensor } from "./graph.js";
import { Graph } from "./ort.js";
import { Slots } from "./slots.js";
import { hasWebGpu } from "./webgpu.js";

/** Tokens of one call: more are no faster here, and between calls a text can be stopped. */
const PREFILL_CHUNK = 64;
/**
 * The same on WebGPU. Of 32 tokens and more, onnxruntime-web 1.30 computes attention by another shader,
 * whose results are wrong where few threads run in step, as in SwiftShader.
 */
const PREFILL_CHUNK_ON_GPU = 31;
const MOST_THREADS = 256;
const DAMAGED = "`pleexport verify BUNDLE` tells whether its files are damaged";

/** Puts looked-up vectors into the graph's inputs, by name. */
export type Fill = (into: ReadonlyMap<string, OpenTensor>) => Promise<void>;

/** Where a graph is computed. */
export type Place = "WebAssembly" | "WebGPU";

/**
 * Where the graph of a bundle is to be computed: on WebGPU, if it is made for a GPU and there is one.
 *
 * @param onNote is told in a sentence where it is made for one, and there is none.
 */
export async function placeOf(bundle: Bundle, onNote: (sentence: string) => void): Promise<Place> {
  if (bundle.decoder.contract.processor === "cpu") return "WebAssembly";
  if (await hasWebGpu()) return "WebGPU";
  onNote(
    `\`${bundle.path}\` is made for WebGPU, which is not here: WebAssembly computes it many times slower ` +
      "than a bundle for the target `web`",
  );
  return "WebAssembly";
}

/**
 * Opens the graph of a bundle.
 *
 * @param threads 0 for one a core.
 * @throws InputError an impossible number of threads.
 * @throws BundleError the files cannot be loaded, or contradict the contract.
 * @throws CheckFailed a file does not match its checksums.
 */
export async function openSession(bundle: Bundle, threads: number, place: Place): Promise<Session> {
  if (!Number.isInteger(threads) || threads < 0 || threads > MOST_THREADS) {
    throw new InputError(
      `threads is ${threads}; it must be 0 to ${MOST_THREADS}`,
      "0 takes one for each core",
    );
  }
  const { contract, files } = bundle.decoder;
  const [graphName, ...weightNames] = files as [string, ...string[]];
  const path = bundle.pathOf(graphName);
  // Of a damaged file ONNX Runtime would say things of its own.
  const model = await bundle.readWhole(graphName);
  const weights = new Map<string, LocalFile>();
  try {
    for (const name of weightNames) {
      weights.set(name, await bundle.openChecked(name));
    }
    const graph =
      place === "WebGPU"
        ? await openOnGpu(model, weights, contract)
        : await Graph.open(model, weights, threads || defaultThreads());
    try {
      checkGraph(graph, contract, path);
      const most = place === "WebGPU" ? PREFILL_CHUNK_ON_GPU : PREFILL_CHUNK;
      return new Session(graph, contract, bundle.manifest.context, most, path);
    } catch (err) {
      await graph.close();
      throw err;
    }
  } catch (err) {
    if (!(err instanceof OrtFailure)) throw err;
    throw new BundleError(`\`${path}\` cannot be loaded: ${wordsOf(err)}`, DAMAGED, { cause: err });
  } finally {
    for (const file of weights.values()) file.close();
  }
}

async function openOnGpu(
  model: Uint8Array,
  weights: ReadonlyMap<string, LocalFile>,
  { caches, states }: GraphContract,
): Promise<OpenGraph> {
  const { GpuGraph } = await import("./ort-gpu.js");
  const held = [...caches.flatMap(({ outputs }) => outputs), ...states.map(({ output }) => output)];
  return GpuGraph.open(model, weights, held);
}

/** More threads than these wait for each other more than they help. */
const DEFAULT_THREADS = 4;

export function defaultThreads(): number {
  return Math.max(1, Math.min(DEFAULT_THREADS, globalThis.navigator?.hardwareConcurrency ?? 1));
}

/** Tensors of calls of one shape, which are made again when it changes. */
interface Call {
  readonly count: number;
  readonly total: number | null;
  readonly keep: number;
  readonly vectors: ReadonlyMap<string, OpenTensor>;
  readonly positions: OpenTensor;
  readonly logits: OpenTensor;
}

/** An open graph with the caches and states of one text. One call at a time. */
export class Session {
  /** Most tokens of one call. */
  readonly chunk: number;
  private readonly held: HeldTensors;
  private readonly inputs = new Map<string, OpenTensor | HeldTensor>();
  private readonly outputs = new Map<string, OpenTensor | HeldTensor>();
  private readonly numLogits: OpenTensor;
  private call: Call | null = null;
  private position = 0;

  constructor(
    private readonly graph: OpenGraph,
    private readonly contract: GraphContract,
    context: number,
    most: number,
    private readonly path: string,
  ) {
    this.chunk = Math.min(most, contract.tokensPerCall ?? most);
    this.held = new HeldTensors(graph, contract, context, this.chunk);
    this.numLogits = graph.tensor("int64", []);
  }

  /** Bytes of caches and states. */
  get heldBytes(): number {
    return this.held.bytes;
  }

  /** Bytes of the memory that WebAssembly has; null where the graph is on a GPU. */
  get heapBytes(): number | null {
    return this.graph.heapBytes;
  }

  /**
   * Logits after the next tokens.
   *
   * @param count how many tokens.
   * @param keep how many of the last positions want logits; 0 for all.
   * @returns `[n, vocab]`, in the heap: only until the next call.
   * @throws BundleError the graph fails.
   */
  async feed(count: number, keep: number, fill: Fill): Promise<Float32Array> {
    try {
      this.held.bind(this.position + count, this.inputs, this.outputs);
      const call = this.callFor(count, keep);
      await fill(call.vectors);
      call.positions.longs.forEach((_, i, longs) => (longs[i] = BigInt(this.position + i)));
      this.numLogits.longs[0] = BigInt(keep);
      await this.graph.run(this.inputs, this.outputs);
      this.held.swap();
      this.position += count;
      return call.logits.floats;
    } catch (err) {
      if (!(err instanceof OrtFailure)) throw err;
      throw new BundleError(`\`${this.path}\` cannot be run: ${wordsOf(err)}`, DAMAGED, { cause: err });
    }
  }

  /** Forgets the text so far. */
  reset(): void {
    this.position = 0;
    this.held.clear();
  }

  async close(): Promise<void> {
    await this.graph.close();
    this.freeCall();
    this.numLogits.free();
    this.held.free();
  }

  private callFor(count: number, keep: number): Call {
    const { contract, graph, inputs, outputs } = this;
    const total = contract.lookupInputs.some(takesWholeText) ? this.position + count : null;
    const last = this.call;
    if (last?.count === count && last.total === total && last.keep === keep) return last;
    this.freeCall();
    const vectors = new Map<string, OpenTensor>();
    for (const { name, shape } of contract.lookupInputs) {
      const dims = shape.map((n) => (typeof n === "number" ? n : n === ALL_TOKENS ? total! : count));
      vectors.set(name, graph.tensor("fp32", dims));
    }
    const positions = graph.tensor("int64", [1, count]);
    const logits = graph.tensor("fp32", [1, keep || count, contract.vocabSize]);
    for (const [name, tensor] of vectors) inputs.set(name, tensor);
    inputs.set(POSITION_IDS, positions);
    inputs.set(NUM_LOGITS_TO_KEEP, this.numLogits);
    outputs.set(LOGITS, logits);
    return (this.call = { count, total, keep, vectors, positions, logits });
  }

  private freeCall(): void {
    if (this.call === null) return;
    const { vectors, positions, logits } = this.call;
    for (const tensor of [...vectors.values(), positions, logits]) tensor.free();
    this.call = null;
  }
}

/** The tensors that a call hands to the next: caches in place, states in two sets that change roles. */
class HeldTensors {
  private readonly slots: Slots;
  private readonly caches: (HeldTensor | null)[];
  private taken: HeldTensor[];
  private given: HeldTensor[];

  constructor(
    private readonly graph: OpenGraph,
    private readonly contract: GraphContract,
    context: number,
    chunk: number,
  ) {
    this.slots = new Slots(contract.caches, context, chunk);
    this.caches = contract.caches.map(() => null);
    this.taken = contract.states.map(({ shape }) => graph.heldTensor("fp32", shape));
    this.given = contract.states.map(({ shape }) => graph.heldTensor("fp32", shape));
  }

  get bytes(): number {
    return [...this.caches, ...this.taken, ...this.given].reduce((sum, own) => sum + (own?.bytes ?? 0), 0);
  }

  /** Makes room for a text of `positions`, and names what the next call takes and gives. */
  bind(
    positions: number,
    inputs: Map<string, OpenTensor | HeldTensor>,
    outputs: Map<string, OpenTensor | HeldTensor>,
  ): void {
    this.slots.grow(positions)?.forEach((slots, i) => {
      const cache = this.contract.caches[i]!;
      const grown = this.grown(cache, this.caches[i]!, slots);
      this.caches[i] = grown;
      inputs.set(cache.input, grown);
      for (const output of cache.outputs) outputs.set(output, grown);
    });
    this.contract.states.forEach(({ input, output }, i) => {
      inputs.set(input, this.taken[i]!);
      outputs.set(output, this.given[i]!);
    });
  }

  /** Takes up what the call gave. */
  swap(): void {
    [this.taken, this.given] = [this.given, this.taken];
  }

  /** Begins a text. Caches begin small again, since a step takes the longer the more slots there are. */
  clear(): void {
    for (const tensor of this.taken) tensor.clear();
    for (const cache of this.caches) cache?.free();
    this.caches.fill(null);
    this.slots.reset();
  }

  free(): void {
    for (const tensor of [...this.caches, ...this.taken, ...this.given]) tensor?.free();
  }

  /** A cache of more slots, with what the old one holds in front. */
  private grown(cache: CacheInput, old: HeldTensor | null, slots: number): HeldTensor {
    const [one, heads, , width] = cache.shape as [number, number, string, number];
    if (old?.dims[2] === slots) return old;
    const grown = this.graph.heldTensor(cache.dtype, [one, heads, slots, width]);
    if (old !== null) {
      grown.takeSlots(old);
      old.free();
    }
    return grown;
  }
}

/** Refuses a graph whose inputs and outputs are not those of the contract. */
function checkGraph(graph: OpenGraph, contract: GraphContract, path: string): void {
  const held = [...contract.caches, ...contract.states];
  const shapes = new Map<string, string>([
    ...contract.lookupInputs.map(({ name, shape }): [string, string] => [name, shape.join()]),
    ...held.map(({ input, shape }): [string, string] => [input, shape.join()]),
  ]);
  const { inputs, outputs } = graph;
  const expected = new Set([...shapes.keys(), POSITION_IDS, NUM_LOGITS_TO_KEEP]);
  const names = new Set([
    ...[...expected, ...inputs.keys()].filter((name) => !expected.has(name) || !inputs.has(name)),
    ...[...shapes].filter(([name, shape]) => inputs.get(name)?.join() !== shape).map(([name]) => name),
    ...held.filter(({ output }) => !outputs.has(output)).map(({ input }) => input),
    ...contract.caches.flatMap((cache) => cache.outputs.slice(1)).filter((name) => !outputs.has(name)),
    ...(outputs.get(LOGITS)?.at(-1) === contract.vocabSize ? [] : [LOGITS]),
  ]);
  if (names.size > 0) {
    throw new BundleError(
      `\`${path}\` and the manifest disagree about ${[...names].sort().join(", ")}`,
      MIXED,
    );
  }
}
