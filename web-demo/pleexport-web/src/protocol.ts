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
  | "chat"
  | "keepRows"
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

/** What the worker answers: parts as they come, and at the end a result or an error. */
export interface Answer {
  readonly id: number;
  /** Of `open`, a `Progress`; of `generate`, a `Token`; of `chat`, text; of `keepRows`, a number of rows. */
  readonly part?: unknown;
  /** What is not as it should be, while a bundle is opened. */
  readonly note?: string;
  readonly result?: unknown;
  readonly error?: { readonly kind: string; readonly message: string; readonly hint: string };
}

/** Of an open bundle. */
export interface Facts {
  readonly family: string;
  readonly vocabSize: number;
  readonly numRows: number;
  /** Most tokens of one `feed`. */
  readonly chunk: number;
  readonly context: number;
  readonly target: string;
  /** Of the runtime. */
  readonly threads: number;
  /** Of all files. */
  readonly bundleBytes: number;
  /** Of caches and states. */
  readonly heldBytes: number;
  /** Of the memory that WebAssembly has: weights, caches and all else. Null where these are on a GPU. */
  readonly heapBytes: number | null;
  /** Rows that a text needed, from the server or what was kept. */
  readonly rowsRead: number;
  /** Rows that are kept on this device. */
  readonly rowsKept: number;
  /** Of the bundle that are kept on this device. */
  readonly keptBytes: number;
  /** Of the server, since the bundle was opened. */
  readonly requests: number;
  readonly bytes: number;
  /** Whether the server did not answer when the bundle was opened, so that it is what was kept. */
  readonly isOffline: boolean;
  /** Why rows are not kept for the next time; null where they are. */
  readonly notKept: string | null;
  /** What is not as it should be, and no reason to stop. */
  readonly notes: readonly string[];
  readonly hasChatTemplate: boolean;
  /** Whether the bundle says how to choose among likely tokens. */
  readonly hasSamplingAdvice: boolean;
  readonly hasTokenizer: boolean;
}
