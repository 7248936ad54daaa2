import { atLeast, count, integer, list, map, object, oneOf, orNull, string, type Convert } from "./json.js";

export const CONTRACT_ID = "pleexport.decoder/1";
export const TOKENS = "sequence_length";
export const ALL_TOKENS = "total_sequence_length";
export const POSITION_IDS = "position_ids";
export const NUM_LOGITS_TO_KEEP = "num_logits_to_keep";
export const LOGITS = "logits";

/** A dimension: a number of elements, or the name of one that changes from call to call. */
export type Dimension = number | string;

/** A graph input that takes looked-up vectors of one table. */
export interface LookupInput {
  readonly name: string;
  readonly table: string;
  readonly shape: readonly Dimension[];
}

/** A tensor of a cache: graph input and output of one shape, which share a buffer. */
export interface CacheInput {
  readonly input: string;
  readonly output: string;
  /** `[1, heads, slots, width]`. */
  readonly shape: readonly Dimension[];
  readonly dtype: "fp32" | "fp16" | "int8";
  /** The number of slots is a multiple of it. */
  readonly block: number;
  /** Positions that a token sees, its own included, of a ring; null where it has slots for all. */
  readonly window: number | null;
  /** Outputs that share the buffer: its own, and those of layers that write it once more. */
  readonly outputs: readonly string[];
}

/** A float32 tensor that a call gives and the next call takes; zeros before a text. */
export interface StateInput {
  readonly input: string;
  readonly output: string;
  readonly shape: readonly number[];
}

/** What a runner must know of the graph: docs/bundle-format.md. */
export interface GraphContract {
  readonly id: string;
  readonly lookupInputs: readonly LookupInput[];
  readonly caches: readonly CacheInput[];
  readonly states: readonly StateInput[];
  /** Most tokens of one call; null for any number. */
  readonly tokensPerCall: number | null;
  readonly vocabSize: number;
  /** What its operators are chosen for. */
  readonly processor: "cpu" | "gpu";
}

/** A graph of a bundle, as its backend wrote it. */
export interface Artifact {
  readonly backend: string;
  readonly contract: GraphContract;
  /** Names in the bundle's folder, the one to open first. */
  readonly files: readonly string[];
  readonly weightsDigest: string;
}

/** Whether an input takes the vectors of all tokens so far, not of the new ones only. */
export function takesWholeText(lookup: LookupInput): boolean {
  return lookup.shape[1] === ALL_TOKENS;
}

const dimension: Convert<Dimension> = (value, path) =>
  typeof value === "string" ? value : count(value, path);

const lookupInput = object<LookupInput>((fields) => ({
  name: fields.required("name", string),
  table: fields.required("table", string),
  shape: fields.required("shape", list(dimension)),
}));

const cacheInput = object<CacheInput>((fields) => {
  fields.required("layer", integer);
  const output = fields.required("output", string);
  return {
    input: fields.required("input", string),
    output,
    outputs: [output, ...fields.orElse("shared_outputs", [], list(string))],
    shape: fields.required("shape", list(dimension)),
    dtype: fields.required("dtype", oneOf("fp32", "fp16", "int8")),
    block: fields.required("block", count),
    window: fields.required("window", orNull(count)),
  };
});

const stateInput = object<StateInput>((fields) => ({
  input: fields.required("input", string),
  output: fields.required("output", string),
  shape: fields.required("shape", list(atLeast(1))),
}));

const contract = object<GraphContract>((fields) => {
  fields.required("num_layers", integer);
  fields.orElse("bounds", new Map(), map(integer));
  return {
    id: fields.required("id", string),
    lookupInputs: fields.required("lookup_inputs", list(lookupInput)),
    caches: fields.required("caches", list(cacheInput)),
    states: fields.required("states", list(stateInput)),
    tokensPerCall: fields.required("tokens_per_call", orNull(count)),
    vocabSize: fields.required("vocab_size", count),
    processor: fields.orElse("processor", "cpu", oneOf("cpu", "gpu")),
  };
});

export const artifact = object<Artifact>((fields) => {
  fields.required("versions", map(string));
  return {
    backend: fields.required("backend", string),
    contract: fields.required("contract", contract),
    files: fields.required("files", list(string)),
    weightsDigest: fields.required("weights_digest", string),
  };
});

/** The first shape that docs/bundle-format.md does not have, as a clause; null where all are right. */
export function outOfForm(contract: GraphContract): string | null {
  const isNumber = (size: Dimension | undefined): boolean => typeof size === "number";
  for (const { name, shape } of contract.lookupInputs) {
    const isKnown = shape[1] === TOKENS || shape[1] === ALL_TOKENS;
    const isSized = (shape.length === 3 || shape.length === 4) && shape.slice(2).every(isNumber);
    if (shape[0] !== 1 || !isKnown || !isSized) {
      return `\`${name}\` has the shape [${shape.join(", ")}]`;
    }
  }
  for (const { input, shape } of contract.caches) {
    const isSized = shape.length === 4 && isNumber(shape[1]) && isNumber(shape[3]);
    if (shape[0] !== 1 || !isSized || isNumber(shape[2])) {
      return `\`${input}\` has the shape [${shape.join(", ")}]`;
    }
  }
  return null;
}
