import type { Blob } from "./blob.js";
import { takesWholeText, type GraphContract, type LookupInput } from "./contract.js";
import { BundleError, InputError, MIXED } from "./errors.js";
import type { OpenTensor } from "./graph.js";
import type { Session } from "./session.js";

const OWN_RUNNER = "take a `Runner` for each text at a time";

/** One text: its ids so far, and a session that has read them. */
export class Reader {
  /** The text so far. */
  ids: number[] = [];
  /** How many rows were looked up since `countRows`. */
  rowsRead = 0;
  private turn = 0;
  private isBusy = false;
  private isClosed = false;

  /**
   * @param context most tokens of a text.
   * @throws BundleError the blob has no table for a graph input, or one of another width.
   */
  constructor(
    private readonly blob: Blob,
    private readonly session: Session,
    private readonly contract: GraphContract,
    readonly context: number,
  ) {
    for (const { table, shape } of contract.lookupInputs) {
      const wanted = shape.slice(2).join(", ");
      if (blob.shapes.get(table)?.join(", ") !== wanted) {
        throw new BundleError(`\`${blob.path}\` has no table \`${table}\` of shape [${wanted}]`, MIXED);
      }
    }
  }

  /** Most tokens of one call of the graph. */
  get chunk(): number {
    return this.session.chunk;
  }

  /**
   * Keeps other calls out, and other texts from what has been read.
   *
   * @param turn of a text that goes on, as it was given when it began; null for one that begins.
   * @throws InputError another call is at work, or another text has begun since.
   */
  async alone<T>(turn: number | null, body: (turn: number) => Promise<T>): Promise<T> {
    if (this.isClosed) throw new InputError("this runner is closed", "open another one on the bundle");
    if (this.isBusy) throw new InputError("another call is using this runner", OWN_RUNNER);
    if (turn !== null && turn !== this.turn) {
      throw new InputError(
        "another call has used this runner since, so this text cannot go on",
        OWN_RUNNER,
      );
    }
    this.isBusy = true;
    try {
      return await body(turn ?? ++this.turn);
    } finally {
      this.isBusy = false;
      if (this.isClosed) await this.session.close();
    }
  }

  /**
   * Logits `[n, vocab]` after the next tokens, fed in pieces; overwritten by the next call.
   *
   * @param keep n, how many of the last piece's positions want logits; 0 for all of every piece.
   * @param each gets the logits of every piece.
   * @param signal ends the text between two pieces; what was read stays.
   * @throws InputError an id without a row, or more tokens than the context has positions.
   */
  async read(
    tokenIds: readonly number[],
    keep: number,
    { each, signal }: { each?: (logits: Float32Array) => void; signal?: AbortSignal | undefined } = {},
  ): Promise<Float32Array> {
    const rows = this.blob.rowIds(tokenIds);
    this.checkLength(this.ids.length + rows.length);
    let logits: Float32Array = new Float32Array(0);
    for (let begin = 0; begin < rows.length; begin += this.chunk) {
      signal?.throwIfAborted();
      const piece = rows.slice(begin, begin + this.chunk);
      logits = await this.session.feed(piece.length, keep, (into) => this.lookup(piece, into));
      this.ids.push(...tokenIds.slice(begin, begin + this.chunk));
      this.rowsRead += piece.length;
      each?.(logits);
      if (signal !== undefined) await breath();
    }
    return logits;
  }

  /** Forgets the text so far. */
  reset(): void {
    this.ids = [];
    this.session.reset();
  }

  /** Counts rows from here on. */
  countRows(): void {
    this.rowsRead = 0;
  }

  /** Refuses a text of more tokens than the context has positions. */
  checkLength(length: number): void {
    if (length <= this.context) return;
    throw new InputError(
      `${length} tokens exceed the bundle's context of ${this.context}`,
      "shorten the prompt, or build with a larger `--context`",
    );
  }

  /** Gives everything back; a call that is at work ends first. */
  async close(): Promise<void> {
    if (this.isClosed) return;
    this.isClosed = true;
    if (!this.isBusy) await this.session.close();
  }

  /** Puts into each graph input the vectors of the new tokens, or of all tokens so far. */
  private async lookup(rows: readonly number[], into: ReadonlyMap<string, OpenTensor>): Promise<void> {
    const whole = this.contract.lookupInputs.filter(takesWholeText);
    const own = this.contract.lookupInputs.filter((lookup) => !takesWholeText(lookup));
    await this.put(rows, own, into);
    if (whole.length > 0) await this.put([...this.blob.rowIds(this.ids), ...rows], whole, into);
  }

  private async put(
    rows: readonly number[],
    lookups: readonly LookupInput[],
    into: ReadonlyMap<string, OpenTensor>,
  ): Promise<void> {
    await this.blob.lookup(
      rows,
      lookups.map(({ name, table }) => ({ table, out: () => into.get(name)!.floats })),
    );
  }
}

/** Lets messages and timers in, such as one that asks to stop. */
function breath(): Promise<void> {
  return new Promise((resolve) => {
    if (typeof setImmediate === "function") setImmediate(resolve);
    else {
      const channel = new MessageChannel();
      channel.port1.onmessage = () => resolve();
      channel.port2.postMessage(null);
    }
  });
}
