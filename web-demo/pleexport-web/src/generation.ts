import { InputError } from "./errors.js";
import type { GenerationConfig } from "./generation-config.js";
import { LogitRules } from "./logit-rules.js";
import type { Reader } from "./reader.js";
import { Sampling, seeded, type Random } from "./sampling.js";
import type { FinishReason, Stats, Token } from "./stats.js";
import { AnswerText } from "./stopping.js";
import type { Tokenizer } from "./tokenizer.js";

/** How to continue a prompt. */
export interface Request {
  readonly config: GenerationConfig;
  readonly maxNewTokens: number;
  readonly seed: number | null;
  readonly stop: readonly string[];
  /** Ids that end the text. */
  readonly eos: ReadonlySet<number>;
  /** Ids that rules take for an end; as `eos`, unless these are to be passed over. */
  readonly ends: ReadonlySet<number>;
  readonly signal: AbortSignal | undefined;
}

/**
 * Continues a prompt, token by token. A prompt that begins with the whole text that was read has only
 * its new part read.
 */
export class Generation {
  private readonly random: Random;
  private readonly sampling: Sampling;
  private readonly rules: LogitRules;
  private readonly text: AnswerText;
  private readonly ids: number[];
  private scores = new Float32Array(0);
  private startedMs = 0;
  private firstMs = 0;
  private turn: number | null = null;

  /**
   * @param numRows token ids that have a row are below it.
   * @param stats filled while tokens come.
   */
  constructor(
    private readonly reader: Reader,
    private readonly numRows: number,
    tokenizer: Tokenizer | null,
    promptIds: readonly number[],
    private readonly request: Request,
    private readonly stats: Stats,
  ) {
    this.random = seeded(request.seed);
    this.sampling = new Sampling(request.config);
    const most = promptIds.length + request.maxNewTokens;
    this.rules = new LogitRules(request.config, promptIds, request.ends, most);
    this.text = new AnswerText(tokenizer?.stream(promptIds) ?? null, request.stop);
    this.ids = [...promptIds];
  }

  /** All tokens. */
  async *tokens(): AsyncGenerator<Token, void, undefined> {
    const { stats, request, text } = this;
    await this.readPrompt();
    for (;;) {
      this.rules.apply(this.scores, this.ids);
      const id = this.sampling.choose(this.scores, this.random);
      this.countToken();
      if (request.eos.has(id)) {
        const held = text.flush();
        this.finish("eos");
        if (held !== "") yield { id: this.ids.at(-1)!, text: held };
        return;
      }
      this.ids.push(id);
      let piece = text.push(id);
      const reason = this.reasonToEnd(id);
      if (reason !== null && reason !== "stop") piece += text.flush();
      this.finish(text.stopped ? "stop" : reason);
      yield { id, text: piece };
      if (stats.finishReason !== null) return;
      await this.reader.alone(this.turn, async () => {
        this.take(await this.reader.read([id], 1, { signal: request.signal }));
      });
    }
  }

  private async readPrompt(): Promise<void> {
    const { reader, stats, ids } = this;
    this.startedMs = performance.now();
    await reader.alone(null, async (turn) => {
      this.turn = turn;
      const known = reader.ids;
      const goesOn = known.length > 0 && known.length < ids.length && known.every((id, i) => id === ids[i]);
      if (!goesOn) reader.reset();
      reader.countRows();
      const added = ids.slice(reader.ids.length);
      stats.promptTokens = added.length;
      this.take(await reader.read(added, 1, { signal: this.request.signal }));
    });
    stats.prefillSeconds = secondsSince(this.startedMs);
  }

  private reasonToEnd(id: number): FinishReason | null {
    const { request, stats, reader } = this;
    if (this.text.stopped) return "stop";
    if (stats.generatedTokens === request.maxNewTokens) return "length";
    if (this.ids.length >= reader.context) return "context";
    if (id >= this.numRows) return "no row";
    if (secondsSince(this.startedMs) > (request.config.maxTime ?? Infinity)) return "time";
    return null;
  }

  /** Takes logits `[1, vocab]`, if they are numbers. */
  private take(logits: Float32Array): void {
    if (this.scores.length !== logits.length) this.scores = new Float32Array(logits.length);
    this.scores.set(logits);
    if (!this.scores.every(Number.isFinite)) {
      throw new InputError(
        "the model's logits are not finite",
        "`pleexport verify BUNDLE` tells whether its files are damaged",
      );
    }
  }

  private countToken(): void {
    this.stats.generatedTokens++;
    if (this.stats.generatedTokens > 1) return;
    this.firstMs = performance.now();
    this.stats.firstTokenSeconds = secondsSince(this.startedMs);
  }

  private finish(reason: FinishReason | null): void {
    this.stats.finishReason = reason;
    this.stats.decodeSeconds = secondsSince(this.firstMs);
    this.stats.rows = this.reader.rowsRead;
  }
}

function secondsSince(startMs: number): number {
  return (performance.now() - startMs) / 1e3;
}
