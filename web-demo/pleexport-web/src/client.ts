import type { Message } from "./chat-format.js";
import * as errors from "./errors.js";
import { READY, type Answer, type Facts, type Method } from "./protocol.js";
import type { GenerationOptions } from "./runner.js";
import type { Stats, Token } from "./stats.js";

export type { Facts } from "./protocol.js";

interface Waiting {
  resolve(result: unknown): void;
  reject(err: Error): void;
  onToken?: ((token: Token) => void) | undefined;
  onNote?: ((sentence: string) => void) | undefined;
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
   * Opens a bundle on a server. Weights are kept in the browser's private file system, and rows that texts
   * need.
   *
   * @param url of the bundle's folder.
   * @param threads 0 for one a core, up to 4; one where the page is not isolated.
   * @param onNote is told in a sentence, before anything large is fetched, where the bundle is made for what
   *   this browser lacks.
   */
  open(
    url: string,
    { threads = 0, onNote }: { threads?: number; onNote?: (sentence: string) => void } = {},
  ): Promise<Facts> {
    const count = globalThis.crossOriginIsolated === true ? threads : 1;
    return this.ask("open", [new URL(url, location.href).href, count], { onNote }) as Promise<Facts>;
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
  async *generate(
    prompt: string | readonly number[],
    { signal, ...options }: GenerationOptions = {},
  ): AsyncGenerator<Token, void, undefined> {
    const tokens: Token[] = [];
    let wake = (): void => {};
    let isDone = false;
    const id = this.last + 1;
    const onToken = (token: Token): void => {
      tokens.push(token);
      wake();
    };
    const done = this.ask("generate", [prompt, options], { onToken }).finally(() => {
      isDone = true;
      wake();
    });
    done.catch(() => {}); // it is thrown below
    const stop = (): void => void this.ask("stop", [id]);
    signal?.addEventListener("abort", stop);
    try {
      for (;;) {
        const token = tokens.shift();
        if (token !== undefined) yield token;
        else if (isDone) break;
        else await new Promise<void>((resolve) => (wake = resolve));
      }
      this.stats = (await done) as Partial<Stats>;
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
    { onToken, onNote }: Pick<Waiting, "onToken" | "onNote"> = {},
  ): Promise<unknown> {
    const id = ++this.last;
    return new Promise((resolve, reject) => {
      this.waiting.set(id, { resolve, reject, onToken, onNote });
      void this.isReady.then(() => this.worker.postMessage({ id, method, args }));
    });
  }

  private take({ id, token, note, result, error }: Answer): void {
    if (id === READY) this.ready();
    const own = this.waiting.get(id);
    if (token !== undefined) {
      own?.onToken?.(token);
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
