import type { Blob } from "./blob.js";
import type { Bundle } from "./bundle.js";
import { render, type Message } from "./chat-format.js";
import { renderTemplate } from "./chat-template.js";
import { BundleError, InputError } from "./errors.js";
import { Generation, type Request } from "./generation.js";
import { outOfRange, overridden, type GenerationConfig } from "./generation-config.js";
import { Reader } from "./reader.js";
import { openSession, placeOf, type Session } from "./session.js";
import { Stats, type Token } from "./stats.js";
import { openTokenizer, type OpenTokenizer, type Tokenizer } from "./tokenizer.js";

const DEFAULT_TOKENS = 256;

export interface RunnerOptions {
  /** Of the runtime; 0 for one a core, up to 4. Those of the first runner count for all. */
  readonly threads?: number;
  /** Is told in a sentence, before anything large is fetched, where a bundle is made for what is not here. */
  readonly onNote?: (sentence: string) => void;
}

/**
 * What a text is to be like, beside the checkpoint's defaults: what a `GenerationConfig` says is
 * wanted in place of what the bundle's manifest says.
 */
export interface GenerationOptions extends GenerationConfig {
  /**
   * The likeliest token each time, whatever the checkpoint says: nothing of its defaults counts but
   * the ends of a text.
   */
  readonly greedy?: boolean;
  /** Makes sampling repeatable. */
  readonly seed?: number;
  /** Strings that end the text, beside the checkpoint's; they are not part of it. */
  readonly stop?: readonly string[];
  /** Go on past end-of-text ids, for timing. */
  readonly ignoreEos?: boolean;
  /** Ends the text; what was read before stays, and the next text goes on from there. */
  readonly signal?: AbortSignal | undefined;
}

/** Runs a bundle, one text at a time. */
export class Runner {
  /** Of the last text. */
  stats = new Stats();

  private constructor(
    readonly bundle: Bundle,
    private readonly blob: Blob,
    private readonly text: OpenTokenizer,
    private readonly session: Session,
    private readonly reader: Reader,
  ) {}

  /**
   * Opens a bundle for running.
   *
   * @throws BundleError the bundle cannot be run here.
   * @throws CheckFailed files are damaged.
   * @throws InputError an impossible number of threads.
   */
  static async open(bundle: Bundle, { threads = 0, onNote = () => {} }: RunnerOptions = {}): Promise<Runner> {
    const { backend, contract } = bundle.decoder;
    if (backend !== "onnx") {
      throw new BundleError(
        `\`${bundle.path}\` is for the backend \`${backend}\`, and this library runs \`onnx\``,
        "build the bundle with `--backend onnx`",
      );
    }
    const place = await placeOf(bundle, onNote);
    const blob = await bundle.openBlob();
    try {
      const text = await openTokenizer(bundle);
      const session = await openSession(bundle, threads, place);
      try {
        const reader = new Reader(blob, session, contract, bundle.manifest.context);
        return new Runner(bundle, blob, text, session, reader);
      } catch (err) {
        await session.close();
        throw err;
      }
    } catch (err) {
      blob.close();
      throw err;
    }
  }

  /** The bundle's tokenizer; null where it takes token ids only. */
  get tokenizer(): Tokenizer | null {
    return this.text.tokenizer;
  }

  /** Whether conversations have a form of their own, which `chat` may know or not. */
  get hasChatTemplate(): boolean {
    const { chatFormat, noChatFormat } = this.bundle.manifest;
    return chatFormat !== null || noChatFormat !== null || this.text.template !== null;
  }

  /** Most tokens of a text. */
  get context(): number {
    return this.reader.context;
  }

  /** Most tokens of one `feed`. */
  get chunk(): number {
    return this.reader.chunk;
  }

  /** Token ids that have a row are below it. */
  get numRows(): number {
    return this.blob.numRows;
  }

  /** Width of the logits. */
  get vocabSize(): number {
    return this.bundle.decoder.contract.vocabSize;
  }

  /** Bytes of caches and states. */
  get heldBytes(): number {
    return this.session.heldBytes;
  }

  /** Bytes of the memory that WebAssembly has, which never shrinks; null where the graph is on a GPU. */
  get heapBytes(): number | null {
    return this.session.heapBytes;
  }

  /** Rows that were taken from the blob's file. */
  get rowsFetched(): number {
    return this.blob.rowsFetched;
  }

  /** Rows of a server that are kept for the next time. */
  get rowsKept(): number {
    return this.blob.rowsKept;
  }

  /** Reads all rows once, so that those of a server are kept; see `Blob.readAll`. */
  readAllRows(each: (rows: number) => void): Promise<void> {
    return this.blob.readAll(each);
  }

  /**
   * Logits at every position of a text, from a fresh state: `[T, vocab]`.
   *
   * @throws InputError no ids, an id without a row, or more than the bundle's context.
   */
  async logits(tokenIds: readonly number[]): Promise<Float32Array> {
    const found = new Float32Array(tokenIds.length * this.vocabSize);
    let at = 0;
    await this.eachLogits(tokenIds, (piece) => {
      found.set(piece, at);
      at += piece.length;
    });
    return found;
  }

  /** The same, piece by piece: `[n, vocab]`, of no use when `each` has returned. */
  async eachLogits(tokenIds: readonly number[], each: (logits: Float32Array) => void): Promise<void> {
    if (tokenIds.length === 0) throw emptyPrompt();
    await this.reader.alone(null, async () => {
      this.reader.checkLength(tokenIds.length);
      this.reader.reset();
      await this.reader.read(tokenIds, 0, { each });
    });
  }

  /**
   * Logits `[n, vocab]` after the next tokens, at most `chunk` of them.
   *
   * @param keep n, how many of the last positions want logits; 0 for all.
   * @throws InputError no tokens or too many, an id without a row, or an impossible `keep`.
   */
  async feed(tokenIds: readonly number[], keep = 1): Promise<Float32Array> {
    const count = tokenIds.length;
    if (count < 1 || count > this.chunk) {
      throw new InputError(
        `${count} tokens at once; feed 1 to ${this.chunk}`,
        "`Runner.chunk` says how many one call takes",
      );
    }
    if (!Number.isInteger(keep) || keep < 0 || keep > count) {
      throw new InputError(`keep is ${keep}; it must be 0 to ${count}`, "0 keeps all logits");
    }
    return this.reader.alone(null, async () => (await this.reader.read(tokenIds, keep)).slice());
  }

  /** Forgets the text so far. */
  async reset(): Promise<void> {
    await this.reader.alone(null, async () => this.reader.reset());
  }

  /**
   * Token ids of a text, with the special tokens that the tokenizer puts around it.
   *
   * @throws InputError text without a tokenizer.
   */
  encode(text: string): number[] {
    if (this.tokenizer === null) {
      throw new InputError("this bundle has no tokenizer", "pass token ids instead of text");
    }
    return this.tokenizer.encode(text);
  }

  /**
   * Token ids of a conversation, ready for the model's answer.
   *
   * A bundle whose chat template cannot be told as data has the template itself rendered, by a library
   * that runs it.
   *
   * @param thinking whether the model should; null leaves it to the bundle.
   * @throws InputError the bundle has no chat format, or it has no place for a message.
   */
  encodeChat(messages: readonly Message[], thinking: boolean | null = null): number[] {
    const { chatFormat, noChatFormat } = this.bundle.manifest;
    const { template, config } = this.text;
    if (this.tokenizer === null || (chatFormat === null && template === null)) {
      const reason = noChatFormat === null ? "" : `: ${noChatFormat}`;
      throw new InputError(`this bundle has no chat format${reason}`, "pass plain text instead");
    }
    const text =
      chatFormat === null
        ? renderTemplate(template!, messages, thinking, config)
        : render(chatFormat, messages, thinking);
    return this.tokenizer.encode(text, { addSpecialTokens: false });
  }

  /** Answers a conversation; see `generate`. What it says may begin with thoughts. */
  chat(
    messages: readonly Message[],
    options: GenerationOptions & { readonly thinking?: boolean } = {},
  ): AsyncGenerator<Token, void, undefined> {
    return this.generate(this.encodeChat(messages, options.thinking ?? null), options);
  }

  /**
   * Continues a prompt, token by token.
   *
   * A prompt that begins with the whole text so far only has its new part read. What `options` leave
   * open is as the checkpoint's `generation_config.json` had it, and where that says nothing either:
   * greedy, up to 256 tokens. A signal that is aborted ends it with the signal's reason.
   *
   * @param prompt a text, or its token ids.
   * @throws InputError a prompt or option that cannot be used; before anything is generated.
   */
  generate(
    prompt: string | readonly number[],
    options: GenerationOptions = {},
  ): AsyncGenerator<Token, void, undefined> {
    const ids = typeof prompt === "string" ? this.encode(prompt) : prompt;
    if (ids.length === 0) throw emptyPrompt();
    this.reader.checkLength(ids.length);
    this.blob.rowIds(ids);
    const request = this.requestOf(ids.length, options);
    this.stats = new Stats();
    return new Generation(this.reader, this.numRows, this.tokenizer, ids, request, this.stats).tokens();
  }

  /** Gives all memory back; the runner cannot be used afterwards. */
  async close(): Promise<void> {
    await this.reader.close();
    this.blob.close();
  }

  private requestOf(promptTokens: number, options: GenerationOptions): Request {
    const { greedy = false, seed = null, stop = [], ignoreEos = false, signal, ...wanted } = options;
    if (stop.length > 0 && this.tokenizer === null) {
      throw new InputError(
        "stop strings need a tokenizer, and this bundle has none",
        "leave them out, or build with `--tokenizer PATH`",
      );
    }
    if (greedy && (wanted.temperature ?? 0) > 0) {
      throw new InputError(
        `greedy text has no temperature, and ${wanted.temperature} was given`,
        "leave one of the two out",
      );
    }
    const { generation, eosTokenIds } = this.bundle.manifest;
    const config = overridden(greedy ? {} : (generation ?? {}), wanted);
    const problem = outOfRange(config);
    if (problem !== null) throw new InputError(problem, "leave it out for the default");
    const ends = new Set(eosTokenIds);
    return {
      config,
      maxNewTokens: roomFor(config, promptTokens),
      seed,
      stop: [...stop, ...(config.stopStrings ?? [])],
      eos: ignoreEos ? new Set() : ends,
      ends,
      signal,
    };
  }
}

function emptyPrompt(): InputError {
  return new InputError("the prompt is empty", "pass at least one token");
}

/** How many tokens an answer may have. */
function roomFor({ maxNewTokens, maxLength }: GenerationConfig, promptTokens: number): number {
  if (maxNewTokens !== undefined) return maxNewTokens;
  if (maxLength === undefined) return DEFAULT_TOKENS;
  if (promptTokens >= maxLength) {
    throw new InputError(
      `the prompt has ${promptTokens} tokens, and by the checkpoint's generation config prompt and ` +
        `answer have ${maxLength} at most`,
      "say how long the answer may be with `maxNewTokens`",
    );
  }
  return maxLength - promptTokens;
}
