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
import { Graph, HeapTensor, OrtFailure } from "./ort.js";
import { Slots } from "./slots.js";

/** Tokens of one call: more are no faster here, and between calls a text can be stopped. */
const PREFILL_CHUNK = 64;
const MOST_THREADS = 256;
const DAMAGED = "`pleexport verify BUNDLE` tells whether its files are damaged";

/** Puts looked-up vectors into the graph's inputs, by name. */
export type Fill = (into: ReadonlyMap<string, HeapTensor>) => Promise<void>;

/**
 * Opens the graph of a bundle.
 *
 * @param threads 0 for one a core.
 * @throws InputError an impossible number of threads.
 * @throws BundleError the files cannot be loaded, or contradict the contract.
 * @throws CheckFailed a file does not match its checksums.
 */
export async function openSession(bundle: Bundle, threads: number): Promise<Session> {
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
    const graph = await Graph.open(model, weights, threads || defaultThreads());
    try {
      checkGraph(graph, contract, path);
      return new Session(graph, contract, bundle.manifest.context);
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
  readonly vectors: ReadonlyMap<string, HeapTensor>;
  readonly positions: HeapTensor;
  readonly logits: HeapTensor;
}

/** An open graph with the caches and states of one text. One call at a time. */
export class Session {
  /** Most tokens of one call. */
  readonly chunk: number;
  private readonly held: HeldTensors;
  private readonly inputs = new Map<string, HeapTensor>();
  private readonly outputs = new Map<string, HeapTensor>();
  private readonly numLogits: HeapTensor;
  private call: Call | null = null;
  private position = 0;

  constructor(
    private readonly graph: Graph,
    private readonly contract: GraphContract,
    context: number,
  ) {
    this.chunk = Math.min(PREFILL_CHUNK, contract.tokensPerCall ?? PREFILL_CHUNK);
    this.held = new HeldTensors(graph, contract, context, this.chunk);
    this.numLogits = graph.tensor("int64", []);
  }

  /** Bytes of caches and states. */
  get heldBytes(): number {
    return this.held.bytes;
  }

  /** Bytes of the memory that WebAssembly has. */
  get heapBytes(): number {
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
      throw new BundleError(`the graph cannot be run: ${wordsOf(err)}`, DAMAGED, { cause: err });
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
    const vectors = new Map<string, HeapTensor>();
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
  private readonly caches: (HeapTensor | null)[];
  private taken: HeapTensor[];
  private given: HeapTensor[];

  constructor(
    private readonly graph: Graph,
    private readonly contract: GraphContract,
    context: number,
    chunk: number,
  ) {
    this.slots = new Slots(contract.caches, context, chunk);
    this.caches = contract.caches.map(() => null);
    this.taken = contract.states.map(({ shape }) => graph.tensor("fp32", shape));
    this.given = contract.states.map(({ shape }) => graph.tensor("fp32", shape));
  }

  get bytes(): number {
    return [...this.caches, ...this.taken, ...this.given].reduce((sum, own) => sum + (own?.bytes ?? 0), 0);
  }

  /** Makes room for a text of `positions`, and names what the next call takes and gives. */
  bind(positions: number, inputs: Map<string, HeapTensor>, outputs: Map<string, HeapTensor>): void {
    this.slots.grow(positions)?.forEach((slots, i) => {
      const cache = this.contract.caches[i]!;
      const grown = this.grown(cache, this.caches[i]!, slots);
      this.caches[i] = grown;
      inputs.set(cache.input, grown);
      outputs.set(cache.output, grown);
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

  /** Begins a text. Caches mask what an old one left. */
  clear(): void {
    for (const tensor of this.taken) tensor.data.fill(0);
  }

  free(): void {
    for (const tensor of [...this.caches, ...this.taken, ...this.given]) tensor?.free();
  }

  /** A cache of more slots, with what the old one holds in front. */
  private grown(cache: CacheInput, old: HeapTensor | null, slots: number): HeapTensor {
    const [one, heads, , width] = cache.shape as [number, number, string, number];
    if (old?.dims[2] === slots) return old;
    const grown = this.graph.tensor(cache.dtype, [one, heads, slots, width]);
    if (old !== null) {
      const [from, into] = [old.data, grown.data];
      const [oldBytes, newBytes] = [old.bytes / heads, grown.bytes / heads];
      for (let head = 0; head < heads; head++) {
        into.set(from.subarray(head * oldBytes, (head + 1) * oldBytes), head * newBytes);
      }
      old.free();
    }
    return grown;
  }
}

/** Refuses a graph whose inputs and outputs are not those of the contract. */
function checkGraph(graph: Graph, contract: GraphContract, path: string): void {
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
    ...(outputs.get(LOGITS)?.at(-1) === contract.vocabSize ? [] : [LOGITS]),
  ]);
  if (names.size > 0) {
    throw new BundleError(
      `\`${path}\` and the manifest disagree about ${[...names].sort().join(", ")}`,
      MIXED,
    );
  }
}
