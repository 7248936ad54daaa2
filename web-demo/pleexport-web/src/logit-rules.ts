import type { GenerationConfig } from "./generation-config.js";

const RULES = [
  "sequenceBias",
  "encoderRepetitionPenalty",
  "repetitionPenalty",
  "noRepeatNgramSize",
  "encoderNoRepeatNgramSize",
  "badWordsIds",
  "minLength",
  "minNewTokens",
  "exponentialDecayLengthPenalty",
  "suppressTokens",
  "beginSuppressTokens",
  "forcedBosTokenId",
  "forcedEosTokenId",
] as const;

/**
 * The rules of one answer: they change logits by what a text holds already. Which there are, and their
 * order, is in docs/bundle-format.md (GenerationConfig).
 */
export class LogitRules {
  private readonly minLength: number;
  /** Tokens that are forced before the first that is chosen. */
  private readonly forcedFirst: number;
  /** A later entry for the same ids replaces an earlier one. */
  private readonly biases: ReadonlyMap<string, readonly [readonly number[], number]>;
  /** An end of a text is never a bad word. */
  private readonly words: readonly (readonly number[])[];
  private readonly changes: boolean;

  /**
   * @param promptIds what is continued.
   * @param eos ids that end a text.
   * @param maxLength most tokens of prompt and answer.
   */
  constructor(
    private readonly config: GenerationConfig,
    private readonly promptIds: readonly number[],
    private readonly eos: ReadonlySet<number>,
    private readonly maxLength: number,
  ) {
    const { minNewTokens, minLength, forcedBosTokenId, sequenceBias = [], badWordsIds = [] } = config;
    this.minLength = minNewTokens === undefined ? (minLength ?? 0) : promptIds.length + minNewTokens;
    this.forcedFirst = promptIds.length === 1 && forcedBosTokenId !== undefined ? 1 : 0;
    this.biases = new Map(sequenceBias.map((entry) => [entry[0].join(), entry]));
    const words = new Map(badWordsIds.map((word) => [word.join(), word]));
    this.words = [...words.values()].filter((word) => word.length > 1 || !eos.has(word[0]!));
    this.changes = RULES.some((name) => config[name] !== undefined);
  }

  /**
   * Changes logits `[vocab]` in place; minus infinity is a token that may not come.
   *
   * @param ids the text so far, the prompt first.
   */
  apply(scores: Float32Array, ids: readonly number[]): void {
    if (!this.changes) return;
    const { config } = this;
    const added = ids.length - this.promptIds.length;
    for (const [sequence, bias] of this.biases.values()) addBias(scores, ids, sequence, bias);
    penalise(scores, this.promptIds, 1 / (config.encoderRepetitionPenalty ?? 1));
    penalise(scores, ids, config.repetitionPenalty ?? 1);
    forbid(scores, continuations(ids, ids, config.noRepeatNgramSize ?? 0));
    forbid(scores, continuations(this.promptIds, ids, config.encoderNoRepeatNgramSize ?? 0));
    for (const word of this.words) addBias(scores, ids, word, -Infinity);
    if (ids.length < this.minLength) forbid(scores, this.eos);
    if (config.forcedBosTokenId !== undefined && ids.length === 1) force(scores, [config.forcedBosTokenId]);
    if (config.forcedEosTokenId !== undefined && ids.length === this.maxLength - 1) {
      force(scores, config.forcedEosTokenId);
    }
    const [start, factor] = config.exponentialDecayLengthPenalty ?? [Infinity, 1];
    this.favourEnd(scores, factor, added - start);
    forbid(scores, config.suppressTokens ?? []);
    if (added === this.forcedFirst) forbid(scores, config.beginSuppressTokens ?? []);
  }

  /** Makes an end likelier by a factor for each token: adds what a logit's size grows by. */
  private favourEnd(scores: Float32Array, factor: number, tokens: number): void {
    if (tokens <= 0) return;
    const growth = Math.fround(factor ** tokens - 1);
    for (const id of this.eos) {
      const score = scores[id];
      if (score !== undefined && Number.isFinite(score)) {
        scores[id] = score + Math.fround(Math.abs(score) * growth);
      }
    }
  }
}

function addBias(scores: Float32Array, text: readonly number[], sequence: readonly number[], bias: number): void {
  const last = sequence.length - 1;
  const begin = text.length - last;
  const score = scores[sequence[last]!];
  if (begin < 0 || score === undefined) return;
  for (let i = 0; i < last; i++) if (text[begin + i] !== sequence[i]) return;
  scores[sequence[last]!] = score + Math.fround(bias);
}

function penalise(scores: Float32Array, ids: readonly number[], exact: number): void {
  const penalty = Math.fround(exact);
  if (penalty === 1) return;
  for (const id of new Set(ids)) {
    const score = scores[id];
    if (score !== undefined) scores[id] = score < 0 ? score * penalty : score / penalty;
  }
}

function forbid(scores: Float32Array, ids: Iterable<number>): void {
  for (const id of ids) if (id >= 0 && id < scores.length) scores[id] = -Infinity;
}

function force(scores: Float32Array, ids: readonly number[]): void {
  scores.fill(-Infinity);
  for (const id of ids) if (id >= 0 && id < scores.length) scores[id] = 0;
}

/** What follows in `source` wherever it has the last `size - 1` ids of the text. */
function continuations(source: readonly number[], text: readonly number[], size: number): number[] {
  if (size === 0 || source.length < size || text.length < size - 1) return [];
  const begin = text.length - size + 1;
  const found: number[] = [];
  for (let at = 0; at + size <= source.length; at++) {
    let same = 0;
    while (same < size - 1 && source[at + same] === text[begin + same]) same++;
    if (same === size - 1) found.push(source[at + size - 1]!);
  }
  return found;
}
