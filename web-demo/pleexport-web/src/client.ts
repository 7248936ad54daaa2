import type { Message } from "./chat-format.js";
import * as errors from "./errors.js";
import type { Progress } from "./progress.js";
import { READY, type Answer, type Facts, type Method } from "./protocol.js";
import type { GenerationOptions } from "./runner.js";
import type { Stats, Token } from "./stats.js";

export type { Message } from "./chat-format.js";
export { PleexportError } from "./errors.js";
export type { Progress } from "./progress.js";
export type { Facts } from "./protocol.js";
export type { GenerationOptions } from "./runner.js";
export type { Stats, Token } from "./stats.js";

interface Waiting {
  resolve(result: unknown): void;
  reject(err: Error): void;
  /** Takes what comes before the end. */
  onPart?: ((part: unknown) => void) | undefined;
  onNote?: ((sentence: string) => void) | undefined;
}

export interface OpenOptions {
  /** 0 for one a core, up to 4; one where the page is not isolated. */
  readonly threads?: number;
  /** Is told how far what is needed before the first word has come, mostly many times. */
  readonly onProgress?: (progress: Progress) => void;
  /** Is told in a sentence, before anything large is fetched, where the bundle is made for what is not here. */
  readonly onNote?: (sentence: string) => void;
}

/** A runner in a worker of its own, so that a page stays alive while it works. */
export class WorkerRunner {
  /** Of the last text. */
  stats: Partial<Stats> = {};
  private readonly waiting = new Map<number, Waiting>();
  private readonly isReady: Promise<void>;
  private ready = (): void => {};
  private last = READY;

  /** @param worker of `dist/browser/worker.js`, started as a module. */
  constructor(private readonly worker: Worker) {
    this.isReady = new Promise((resolve) => (this.ready = resolve));
    worker.onmessage = ({ data }: MessageEvent<Answer>) => this.take(data);
    worker.onerror = (event) => this.fail(new Error(event.message || "the worker cannot be started"));
  }

  /**
   * Opens a bundle on a server. What is needed is kept in the browser's private file system, and so are rows
   * that texts need. Where the server does not answer, the bundle is opened from what was kept.
   *
   * @param url of the bundle's folder.
   * @throws PleexportError it cannot be opened, in one sentence.
   */
  open(url: string, { threads = 0, onProgress, onNote }: OpenOptions = {}): Promise<Facts> {
    const count = globalThis.crossOriginIsolated === true ? threads : 1;
    const onPart = onProgress as ((part: unknown) => void) | undefined;
    return this.ask("open", [new URL(url, location.href).href, count], { onPart, onNote }) as Promise<Facts>;
  }

  facts(): Promise<Facts> {
    return this.ask("facts", []) as Promise<Facts>;
  }

  logits(ids: readonly number[]): Promise<Float32Array> {
    return this.ask("logits", [ids]) as Promise<Float32Array>;
  }

  feed(ids: readonly number[], keep = 1): Promise<Float32Array> {
    return this.ask("feed", [ids, keep]) as Promise<Float32Array>;
  }

  async reset(): Promise<void> {
    await this.ask("reset", []);
  }

  encode(text: string): Promise<number[]> {
    return this.ask("encode", [text]) as Promise<number[]>;
  }

  decode(ids: readonly number[]): Promise<string> {
    return this.ask("decode", [ids]) as Promise<string>;
  }

  encodeChat(messages: readonly Message[], thinking: boolean | null = null): Promise<number[]> {
    return this.ask("encodeChat", [messages, thinking]) as Promise<number[]>;
  }

  /** Continues a prompt; see `Runner.generate`. Who wants no more tokens ends the text. */
  generate(
    prompt: string | readonly number[],
    options: GenerationOptions = {},
  ): AsyncGenerator<Token, void, undefined> {
    return this.stream<Token>("generate", prompt, options);
  }

  /** Answers a conversation, piece by piece, without what the model thinks before; see `Runner.chat`. */
  chat(
    messages: readonly Message[],
    options: GenerationOptions & { readonly thinking?: boolean } = {},
  ): AsyncGenerator<string, void, undefined> {
    return this.stream<string>("chat", messages, options);
  }

  /**
   * Fetches all rows, so that every text can go on without a network.
   *
   * @param onProgress is told how many rows are here.
   * @param signal ends it; what was kept stays.
   * @throws PleexportError rows cannot be fetched, or kept.
   */
  async keepRows(onProgress: (rows: number) => void, signal?: AbortSignal): Promise<void> {
    for await (const rows of this.stream<number>("keepRows", null, { signal })) onProgress(rows);
  }

  /** Parts of an answer as they come. Who wants no more ends it. */
  private async *stream<T>(
    method: Method,
    about: unknown,
    { signal, ...options }: { readonly signal?: AbortSignal | undefined },
  ): AsyncGenerator<T, void, undefined> {
    const parts: T[] = [];
    let wake = (): void => {};
    let isDone = false;
    const id = this.last + 1;
    const onPart = (part: unknown): void => {
      parts.push(part as T);
      wake();
    };
    const done = this.ask(method, [about, options], { onPart }).finally(() => {
      isDone = true;
      wake();
    });
    done.catch(() => {}); // it is thrown below
    const stop = (): void => void this.ask("stop", [id]);
    signal?.addEventListener("abort", stop);
    if (signal?.aborted === true) stop();
    try {
      for (;;) {
        const part = parts.shift();
        if (part !== undefined) yield part;
        else if (isDone) break;
        else await new Promise<void>((resolve) => (wake = resolve));
      }
      const stats = await done;
      if (stats !== undefined) this.stats = stats as Partial<Stats>;
    } finally {
      signal?.removeEventListener("abort", stop);
      if (!isDone) {
        stop();
        await done.catch(() => {});
      }
    }
  }

  /** Gives all memory back. */
  async close(): Promise<void> {
    await this.ask("close", []);
    this.worker.terminate();
  }

  private ask(
    method: Method,
    args: readonly unknown[],
    { onPart, onNote }: Pick<Waiting, "onPart" | "onNote"> = {},
  ): Promise<unknown> {
    const id = ++this.last;
    return new Promise((resolve, reject) => {
      this.waiting.set(id, { resolve, reject, onPart, onNote });
      void this.isReady.then(() => this.worker.postMessage({ id, method, args }));
    });
  }

  private take({ id, part, note, result, error }: Answer): void {
    if (id === READY) this.ready();
    const own = this.waiting.get(id);
    if (part !== undefined) {
      own?.onPart?.(part);
      return;
    }
    if (note !== undefined) {
      own?.onNote?.(note);
      return;
    }
    this.waiting.delete(id);
    if (error === undefined) own?.resolve(result);
    else own?.reject(errorOf(error));
  }

  private fail(err: Error): void {
    for (const { reject } of this.waiting.values()) reject(err);
    this.waiting.clear();
  }
}

const KINDS = {
  BundleError: errors.BundleError,
  BlobError: errors.BlobError,
  TokenizerError: errors.TokenizerError,
  InputError: errors.InputError,
  CheckFailed: errors.CheckFailed,
};

function errorOf({ kind, message, hint }: NonNullable<Answer["error"]>): Error {
  if (kind === "AbortError") return new DOMException(message, "AbortError");
  const known = KINDS[kind as keyof typeof KINDS];
  return known === undefined ? new Error(message) : new known(message, hint);
}
