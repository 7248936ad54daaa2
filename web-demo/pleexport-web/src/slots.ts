import type { CacheInput } from "./contract.js";

const FIRST_POSITIONS = 256;

/**
 * How many slots of each cache a graph is told of; lists are in the contract's order.
 *
 * They double with the text, since a graph may look at all of them. Those of window layers grow up to
 * the size of their ring, which is reached before a position wraps around.
 */
export class Slots {
  private readonly most: readonly number[];
  private positions = 0;

  /**
   * @param context largest number of positions.
   * @param chunk most tokens of one call.
   */
  constructor(
    private readonly caches: readonly CacheInput[],
    context: number,
    chunk: number,
  ) {
    // A chunk's first token must still find its window after the whole chunk was written.
    const window = Math.max(1, ...caches.map((cache) => cache.window ?? 1));
    const ring = Math.min(window + chunk - 1, context);
    this.most = caches.map((cache) => (cache.window === null ? context : ring));
  }

  /** Begins with few slots again. */
  reset(): void {
    this.positions = 0;
  }

  /** Room for a text of that many tokens: the slots of each cache, or null if they stay. */
  grow(needed: number): number[] | null {
    if (needed <= this.positions) return null;
    this.positions = Math.max(FIRST_POSITIONS, 2 * this.positions, needed);
    return this.caches.map(({ block }, i) => {
      return Math.ceil(Math.min(this.positions, this.most[i]!) / block) * block;
    });
  }
}
