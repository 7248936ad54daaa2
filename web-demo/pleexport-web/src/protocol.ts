import type { Token } from "./stats.js";

export type Method =
  | "open"
  | "facts"
  | "logits"
  | "feed"
  | "reset"
  | "encode"
  | "decode"
  | "encodeChat"
  | "generate"
  | "stop"
  | "close";

/** What a worker says, by this id, when it listens. */
export const READY = 0;

/** What a page asks its worker. */
export interface Question {
  readonly id: number;
  readonly method: Method;
  readonly args: readonly unknown[];
}

/** What the worker answers: tokens as they come, and at the end a result or an error. */
export interface Answer {
  readonly id: number;
  readonly token?: Token;
  /** What is not as it should be, while a bundle is opened. */
  readonly note?: string;
  readonly result?: unknown;
  readonly error?: { readonly kind: string; readonly message: string; readonly hint: string };
}

/** Of an open bundle. */
export interface Facts {
  readonly vocabSize: number;
  readonly numRows: number;
  /** Most tokens of one `feed`. */
  readonly chunk: number;
  readonly context: number;
  readonly target: string;
  /** Of all files. */
  readonly bundleBytes: number;
  /** Of caches and states. */
  readonly heldBytes: number;
  /** Rows that a text needed, from the server or what was kept. */
  readonly rowsRead: number;
  /** Of the server, since the bundle was opened. */
  readonly requests: number;
  readonly bytes: number;
  /** Why rows are not kept for the next time; null where they are. */
  readonly notKept: string | null;
  readonly hasChatTemplate: boolean;
  readonly hasTokenizer: boolean;
}
