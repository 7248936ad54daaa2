import { InputError } from "./errors.js";
import type { GenerationConfig } from "./generation-config.js";

/** Source: transformers, `TopHLogitsWarper`. */
const TOP_H_TOKENS = 100;
const TINY = 1e-300;

/** Gives numbers from 0 to below 1. */
export type Random = () => number;

/** Numbers that a seed repeats; in this package only. Source: Bryc's `sfc32`, of PractRand. */
export function seeded(seed: number | null): Random {
  const start = seed === null ? crypto.getRandomValues(new Uint32Array(2)) : [seed >>> 0, Math.floor(seed / 2 ** 32)];
  let [a, b, c, d] = [0x9e3779b9, start[0]! | 0, start[1]! | 0, 1];
  const next = (): number => {
    const sum = (((a + b) | 0) + d) | 0;
    d = (d + 1) | 0;
    a = b ^ (b >>> 9);
    b = (c + (c << 3)) | 0;
    c = (((c << 21) | (c >>> 11)) + sum) | 0;
    return sum >>> 0;
  };
  for (let i = 0; i < 16; i++) next();
  // 53 bits, as a binary64 number has.
  return () => ((next() >>> 5) * 2 ** 26 + (next() >>> 6)) / 2 ** 53;
}

/** Ids that may be chosen, likeliest first, and their probabilities. */
export interface Distribution {
  readonly ids: readonly number[];
  readonly probabilities: readonly number[];
}

/**
 * How to choose tokens. What is cut off is so in the order of docs/bundle-format.md
 * (GenerationConfig), whose fields say what each keeps. Distributions are those of the Python
 * library; random numbers are not.
 */
export class Sampling {
  /** 0 is greedy. */
  private readonly temperature: number;

  constructor(private readonly config: GenerationConfig) {
    this.temperature = config.doSample === true ? (config.temperature ?? 1) : 0;
  }

  /**
   * The next token's id.
   *
   * @param scores logits; minus infinity is a token that may not come.
   * @throws InputError no token may come.
   */
  choose(scores: Float32Array, random: Random): number {
    const best = argmax(scores);
    if (!Number.isFinite(scores[best])) {
      throw new InputError(
        "the generation options leave no token that may come next",
        "suppress or forbid fewer tokens, or generate greedily",
      );
    }
    if (this.temperature === 0) return best;
    const { ids, probabilities } = this.distribution(scores);
    // Every token waits for a time of its own, the likely ones less, and the first to come is chosen:
    // logits that differ by little give the same token. See the Python library.
    let [chosen, least] = [ids[0]!, Infinity];
    probabilities.forEach((probability, i) => {
      const wait = -Math.log(1 - random()) / probability;
      if (wait < least) [chosen, least] = [ids[i]!, wait];
    });
    return chosen;
  }

  distribution(scores: Float32Array): Distribution {
    const { topH, topK = 0, topP = 1, minP = 0 } = this.config;
    let ids = likeliest(scores, topH === undefined ? topK : TOP_H_TOKENS);
    if (topH !== undefined) ids = ids.slice(0, TOP_H_TOKENS);
    const most = scores[ids[0]!]!;
    let scaled = ids.map((id) => (scores[id]! - most) / this.temperature);
    // All but the last three keep a beginning of what is sorted.
    if (topH !== undefined) {
      scaled = scaled.slice(0, Math.max(1, countTopH(softmax(scaled), topH)));
      if (topK > 0) {
        const least = scaled[Math.min(topK, scaled.length) - 1]!;
        scaled = scaled.filter((score) => score >= least);
      }
    }
    const probabilities = softmax(scaled);
    let sum = 0;
    const kept = probabilities.filter((probability) => {
      // What lies before, as NumPy computes it: the sum with it, less itself.
      sum += probability;
      return sum - probability < topP && probability >= minP * probabilities[0]!;
    }).length;
    scaled = scaled.slice(0, Math.max(1, kept));
    ids = ids.slice(0, scaled.length);
    for (const keeps of [this.typical, this.aboveEpsilon, this.aboveEta]) {
      const isKept = keeps.call(this, softmax(scaled));
      ids = ids.filter((_, i) => isKept[i]);
      scaled = scaled.filter((_, i) => isKept[i]);
    }
    return { ids, probabilities: softmax(scaled) };
  }

  private typical(probabilities: readonly number[]): boolean[] {
    const { typicalP = 1 } = this.config;
    if (typicalP >= 1) return probabilities.map(() => true);
    const information = probabilities.map((probability) => -Math.log(Math.max(probability, TINY)));
    const expected = sumOf(probabilities.map((probability, i) => probability * information[i]!));
    const distance = information.map((own) => Math.abs(own - expected));
    const order = distance.map((_, i) => i).sort((a, b) => distance[a]! - distance[b]!);
    let sum = 0;
    const reached = order.filter((i) => (sum += probabilities[i]!) < typicalP).length;
    const most = distance[order[Math.min(reached, order.length - 1)]!]!;
    return distance.map((own) => own <= most);
  }

  private aboveEpsilon(probabilities: readonly number[]): boolean[] {
    return areAtLeast(probabilities, this.config.epsilonCutoff ?? 0);
  }

  private aboveEta(probabilities: readonly number[]): boolean[] {
    const { etaCutoff = 0 } = this.config;
    if (etaCutoff === 0) return probabilities.map(() => true);
    const entropy = -sumOf(probabilities.map((own) => own * Math.log(Math.max(own, TINY))));
    return areAtLeast(probabilities, Math.min(etaCutoff, Math.sqrt(etaCutoff) * Math.exp(-entropy)));
  }
}

/** The first of the largest. */
export function argmax(scores: Float32Array): number {
  let best = 0;
  for (let id = 1; id < scores.length; id++) if (scores[id]! > scores[best]!) best = id;
  return best;
}

/** Which are that likely; the likeliest always is. */
function areAtLeast(probabilities: readonly number[], least: number): boolean[] {
  const enough = Math.min(least, probabilities.reduce((a, b) => Math.max(a, b), 0));
  return probabilities.map((probability) => probability >= enough);
}

function countTopH(probabilities: readonly number[], share: number): number {
  const entropies = probabilities.map((own) => -own * Math.log(Math.max(own, TINY)));
  const whole = sumOf(entropies);
  let sum = 0;
  return entropies.filter((own) => (sum += own) <= share * whole).length;
}

/** Ids that may come, best first: at least `count`, with what is as good as the last; 0: all. */
function likeliest(scores: Float32Array, count: number): number[] {
  const least = count > 0 && count < scores.length ? kthLargest(scores, count) : -Infinity;
  const found: number[] = [];
  for (let id = 0; id < scores.length; id++) {
    if (scores[id]! >= least && scores[id]! > -Infinity) found.push(id);
  }
  return found.sort((a, b) => scores[b]! - scores[a]! || a - b);
}

/** The k-th largest number, by parting what is left again and again. */
function kthLargest(scores: Float32Array, k: number): number {
  let left = scores;
  let wanted = k;
  for (;;) {
    const pivot = left[left.length >> 1]!;
    const above = left.filter((score) => score > pivot);
    if (wanted <= above.length) left = above;
    else {
      const below = left.filter((score) => score < pivot);
      const upToPivot = left.length - below.length;
      if (wanted <= upToPivot) return pivot;
      wanted -= upToPivot;
      left = below;
    }
  }
}

function softmax(scores: readonly number[]): number[] {
  const most = scores.reduce((a, b) => Math.max(a, b), -Infinity);
  const exponentials = scores.map((score) => Math.exp(score - most));
  const sum = sumOf(exponentials);
  return exponentials.map((own) => own / sum);
}

function sumOf(values: readonly number[]): number {
  return values.reduce((sum, value) => sum + value, 0);
}
