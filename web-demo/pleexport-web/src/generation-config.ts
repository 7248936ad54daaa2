import { boolean, integer, list, number, object, pair, string, type Convert } from "./json.js";

/**
 * What decoding one text obeys, by the meanings that docs/bundle-format.md has for them. What is
 * missing is not said.
 *
 * In the manifest these are the checkpoint's defaults; a call says what it wants otherwise.
 */
export interface GenerationConfig {
  readonly doSample?: boolean;
  readonly temperature?: number;
  readonly topK?: number;
  readonly topP?: number;
  readonly minP?: number;
  readonly topH?: number;
  readonly typicalP?: number;
  readonly epsilonCutoff?: number;
  readonly etaCutoff?: number;
  readonly sequenceBias?: readonly (readonly [readonly number[], number])[];
  readonly encoderRepetitionPenalty?: number;
  readonly repetitionPenalty?: number;
  readonly noRepeatNgramSize?: number;
  readonly encoderNoRepeatNgramSize?: number;
  readonly badWordsIds?: readonly (readonly number[])[];
  readonly minLength?: number;
  readonly minNewTokens?: number;
  readonly exponentialDecayLengthPenalty?: readonly [number, number];
  readonly suppressTokens?: readonly number[];
  readonly beginSuppressTokens?: readonly number[];
  readonly forcedBosTokenId?: number;
  readonly forcedEosTokenId?: readonly number[];
  readonly maxNewTokens?: number;
  readonly maxLength?: number;
  readonly maxTime?: number;
  readonly stopStrings?: readonly string[];
}

function oneOrMore<T>(each: Convert<T>): Convert<T[]> {
  return (value, path) => (Array.isArray(value) ? list(each)(value, path) : [each(value, path)]);
}

const ids = list(integer);

/** By our name, the field's name in the manifest, and what it holds. */
const FIELDS: { readonly [K in keyof Required<GenerationConfig>]: readonly [string, Convert<Required<GenerationConfig>[K]>] } = {
  doSample: ["do_sample", boolean],
  temperature: ["temperature", number],
  topK: ["top_k", integer],
  topP: ["top_p", number],
  minP: ["min_p", number],
  topH: ["top_h", number],
  typicalP: ["typical_p", number],
  epsilonCutoff: ["epsilon_cutoff", number],
  etaCutoff: ["eta_cutoff", number],
  sequenceBias: ["sequence_bias", list(pair(ids, number))],
  encoderRepetitionPenalty: ["encoder_repetition_penalty", number],
  repetitionPenalty: ["repetition_penalty", number],
  noRepeatNgramSize: ["no_repeat_ngram_size", integer],
  encoderNoRepeatNgramSize: ["encoder_no_repeat_ngram_size", integer],
  badWordsIds: ["bad_words_ids", list(ids)],
  minLength: ["min_length", integer],
  minNewTokens: ["min_new_tokens", integer],
  exponentialDecayLengthPenalty: ["exponential_decay_length_penalty", pair(integer, number)],
  suppressTokens: ["suppress_tokens", ids],
  beginSuppressTokens: ["begin_suppress_tokens", ids],
  forcedBosTokenId: ["forced_bos_token_id", integer],
  forcedEosTokenId: ["forced_eos_token_id", oneOrMore(integer)],
  maxNewTokens: ["max_new_tokens", integer],
  maxLength: ["max_length", integer],
  maxTime: ["max_time", number],
  stopStrings: ["stop_strings", oneOrMore(string)],
};

type Name = keyof GenerationConfig;
type Held = Partial<Record<Name, unknown>>;

export const generationConfig: Convert<GenerationConfig> = object((fields) => {
  const found: Held = {};
  for (const [ours, [theirs, convert]] of Object.entries(FIELDS)) {
    const value = fields.optional<unknown>(theirs, convert);
    if (value !== null) found[ours as Name] = value;
  }
  return found as GenerationConfig;
});

/** A config with what another one says in place of it; a temperature says whether to sample. */
export function overridden(config: GenerationConfig, by: GenerationConfig): GenerationConfig {
  const said = Object.entries(by).filter(([, value]) => value !== undefined && value !== null);
  const { maxLength, ...rest } = config;
  return {
    ...rest,
    ...(maxLength === undefined || by.maxNewTokens !== undefined ? {} : { maxLength }),
    ...(Object.fromEntries(said) as GenerationConfig),
    ...(by.temperature === undefined ? {} : { doSample: by.temperature > 0 }),
  };
}

const COUNT = "0 or more";
const SHARE = "from 0 to 1";
const POSITIVE_SHARE = "above 0 and at most 1";
const CUTOFF = "from 0 and below 1";
const PENALTY = "from 0.001 to 1000";

const isCount = (value: number): boolean => Number.isInteger(value) && value >= 0;
const isPositive = (value: number): boolean => Number.isInteger(value) && value >= 1;
const isShare = (value: number): boolean => value >= 0 && value <= 1;
const isPositiveShare = (value: number): boolean => value > 0 && value <= 1;
const isCutoff = (value: number): boolean => value >= 0 && value < 1;
const isPenalty = (value: number): boolean => value >= 1e-3 && value <= 1e3;
const isSequence = (value: readonly number[]): boolean => value.length > 0 && value.every(Number.isInteger);

type Limits = { readonly [K in Name]?: readonly [(value: Required<GenerationConfig>[K]) => boolean, string] };

/** What each field has to be; a NaN is nothing of it. */
const LIMITS: Limits = {
  temperature: [(value) => value >= 0 && value < Infinity, COUNT],
  topK: [isCount, COUNT],
  topP: [isShare, SHARE],
  minP: [isShare, SHARE],
  topH: [isPositiveShare, POSITIVE_SHARE],
  typicalP: [isPositiveShare, POSITIVE_SHARE],
  epsilonCutoff: [isCutoff, CUTOFF],
  etaCutoff: [isCutoff, CUTOFF],
  sequenceBias: [
    (value) => value.every(([sequence, bias]) => isSequence(sequence) && Number.isFinite(bias)),
    "pairs of one or more token ids and a finite number",
  ],
  encoderRepetitionPenalty: [isPenalty, PENALTY],
  repetitionPenalty: [isPenalty, PENALTY],
  noRepeatNgramSize: [isCount, COUNT],
  encoderNoRepeatNgramSize: [isCount, COUNT],
  badWordsIds: [(value) => value.every(isSequence), "lists of one or more token ids"],
  minLength: [isCount, COUNT],
  minNewTokens: [isCount, COUNT],
  exponentialDecayLengthPenalty: [
    ([start, factor]) => isCount(start) && factor > 0 && factor < Infinity,
    "a number of tokens, 0 or more, and a factor above 0",
  ],
  maxNewTokens: [isPositive, "1 or more"],
  maxLength: [isPositive, "1 or more"],
  maxTime: [(value) => value > 0 && value < Infinity, "above 0"],
};

/**
 * What is wrong with the first field that has an impossible value, such as "top_k is -1; it must
 * be 0 or more"; null where nothing is.
 */
export function outOfRange(config: GenerationConfig): string | null {
  for (const [name, limit] of Object.entries(LIMITS)) {
    const value = (config as Held)[name as Name];
    const [isValid, expected] = limit as readonly [(value: unknown) => boolean, string];
    if (value !== undefined && !isValid(value)) {
      const shown = Array.isArray(value) ? JSON.stringify(value) : String(value);
      return `${FIELDS[name as Name][0]} is ${shown}; it must be ${expected}`;
    }
  }
  return null;
}
