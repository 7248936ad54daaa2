/** A generated token. */
export interface Token {
  readonly id: number;
  /** The whole characters that it completes, "" while one is incomplete. */
  readonly text: string;
}

/** Why a text ended; the names are those of the Python library. */
export type FinishReason = "eos" | "stop" | "length" | "time" | "context" | "no row";

/** What generating took. */
export class Stats {
  /** Null while it runs. */
  finishReason: FinishReason | null = null;
  /** Tokens that were prefilled; those of an earlier turn are not read again. */
  promptTokens = 0;
  generatedTokens = 0;
  prefillSeconds = 0;
  decodeSeconds = 0;
  /** From the call to the first token. */
  firstTokenSeconds = 0;
  /** Rows looked up. */
  rows = 0;

  /** Prompt tokens per second. */
  get prefillTokensPerSecond(): number {
    return this.prefillSeconds > 0 ? this.promptTokens / this.prefillSeconds : 0;
  }

  /** Tokens per second after the first. */
  get decodeTokensPerSecond(): number {
    return this.decodeSeconds > 0 ? (this.generatedTokens - 1) / this.decodeSeconds : 0;
  }
}
