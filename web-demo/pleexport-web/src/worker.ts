// Runs in a worker of a page: it owns bundle and runner, and answers the messages of client.ts.
import { giveBack } from "./arrays.js";
import { Bundle } from "./bundle.js";
import type { Message } from "./chat-format.js";
import { eachPart } from "./download.js";
import { BundleError, isAbort, PleexportError, wordsOf } from "./errors.js";
import { FileFailure } from "./files.js";
import { HttpFiles } from "./http-files.js";
import { PrivateFiles } from "./opfs-files.js";
import { runtimeFiles } from "./ort.js";
import { Loading } from "./progress.js";
import { READY, type Answer, type Facts, type Question } from "./protocol.js";
import { Runner, type GenerationOptions } from "./runner.js";
import { defaultThreads } from "./session.js";
import { ThoughtFilter } from "./thought-filter.js";

/** Of the file of the runtime; the build puts it in. */
declare const RUNTIME_BYTES: number;
const RUNTIME = "ort-wasm-simd-threaded.wasm";

runtimeFiles.module = () => new URL("./ort-module.js", import.meta.url).href;
runtimeFiles.wasm = () => new URL(`./${RUNTIME}`, import.meta.url).href;

interface Opened {
  readonly files: HttpFiles;
  readonly store: PrivateFiles;
  readonly runner: Runner;
  readonly threads: number;
}

let opened: Opened | null = null;
const stopping = new Map<number, AbortController>();

function tell(answer: Answer): void {
  postMessage(answer);
}

async function open(id: number, url: string, threads: number): Promise<Facts> {
  await close();
  const loading = new Loading((part) => tell({ id, part }));
  const store = await privateFiles(url);
  const files = new HttpFiles(url, store, loading);
  try {
    if (!isRuntimeHere) loading.need(RUNTIME, RUNTIME_BYTES); // the largest first: progress never goes back
    const bundle = await Bundle.openFiles(files);
    if (bundle.decoder.contract.processor === "gpu") {
      loading.leaveOut(RUNTIME); // it has another
    } else {
      const runtime = runtimeOf(loading);
      runtime.catch(() => {}); // it is thrown where the runtime is needed
      runtimeFiles.compiled = () => runtime;
    }
    for (const { name, size } of bundle.neededFiles) loading.need(name, size);
    const runner = await Runner.open(bundle, { threads, onNote: (note) => tell({ id, note }) });
    await store.complete();
    opened = { files, store, runner, threads: threads || defaultThreads() };
  } catch (err) {
    files.close();
    throw err;
  }
  return facts();
}

async function privateFiles(url: string): Promise<PrivateFiles> {
  try {
    return await PrivateFiles.open(url);
  } catch (err) {
    if (!(err instanceof FileFailure)) throw err;
    throw new BundleError(`\`${url}\` cannot be opened: ${err.reason}`, err.hint ?? "", { cause: err });
  }
}

let isRuntimeHere = false;

/** Fetches and compiles what is largest of the runtime, once, where others can be told how far it has come. */
async function runtimeOf(loading: Loading): Promise<WebAssembly.Module | null> {
  if (isRuntimeHere) return null;
  const bytes = new Uint8Array(RUNTIME_BYTES);
  let compiled: WebAssembly.Module;
  let at = 0;
  try {
    const response = await fetch(runtimeFiles.wasm());
    if (!response.ok) throw new Error(`the server answered ${response.status}`);
    await eachPart(response, (part) => {
      bytes.set(part, at);
      at += part.length;
      loading.arrived(RUNTIME, part.length);
    });
    if (at !== bytes.length) throw new Error(`it has ${at} bytes in place of ${bytes.length}`);
    compiled = await WebAssembly.compile(bytes);
    giveBack(bytes.buffer);
  } catch (err) {
    const what = `the runtime, \`${RUNTIME}\`, cannot be fetched: ${wordsOf(err)}`;
    throw new BundleError(what, "open the page again; look at the network if it happens again", { cause: err });
  }
  isRuntimeHere = true;
  return compiled;
}

function facts(): Facts {
  const { files, store, runner, threads } = needed();
  const { family, generation } = runner.bundle.manifest;
  return {
    family,
    vocabSize: runner.vocabSize,
    numRows: runner.numRows,
    chunk: runner.chunk,
    context: runner.context,
    target: runner.bundle.manifest.target,
    threads,
    bundleBytes: runner.bundle.bytes,
    heldBytes: runner.heldBytes,
    heapBytes: runner.heapBytes,
    rowsRead: runner.rowsFetched,
    rowsKept: runner.rowsKept,
    keptBytes: store.keptBytes,
    requests: files.traffic.requests,
    bytes: files.traffic.bytes,
    isOffline: files.isOffline,
    notKept: store.notKept,
    notes: runner.bundle.notes,
    hasChatTemplate: runner.hasChatTemplate,
    hasSamplingAdvice: generation?.doSample !== undefined || generation?.temperature !== undefined,
    hasTokenizer: runner.tokenizer !== null,
  };
}

function needed(): NonNullable<typeof opened> {
  if (opened === null) throw new Error("no bundle is open");
  return opened;
}

async function close(): Promise<void> {
  const old = opened;
  opened = null;
  await old?.runner.close();
  old?.files.close();
}

/** Does what a question of this id can be stopped in. */
async function stoppable<T>(id: number, body: (signal: AbortSignal) => Promise<T>): Promise<T> {
  const stop = new AbortController();
  stopping.set(id, stop);
  try {
    return await body(stop.signal);
  } finally {
    stopping.delete(id);
  }
}

async function generate(id: number, prompt: string | readonly number[], options: GenerationOptions): Promise<unknown> {
  const { runner } = needed();
  await stoppable(id, async (signal) => {
    for await (const token of runner.generate(prompt, { ...options, signal })) tell({ id, part: token });
  });
  return statsOf(runner);
}

async function chat(
  id: number,
  messages: readonly Message[],
  { thinking, ...options }: GenerationOptions & { readonly thinking?: boolean },
): Promise<unknown> {
  const { runner } = needed();
  const ids = runner.encodeChat(messages, thinking ?? null);
  const filter = new ThoughtFilter(runner.tokenizer!, ids);
  const show = (text: string): void => void (text === "" || tell({ id, part: text }));
  await stoppable(id, async (signal) => {
    for await (const token of runner.generate(ids, { ...options, signal })) show(filter.push(token));
  });
  show(filter.flush());
  return statsOf(runner);
}

function statsOf({ stats }: Runner): unknown {
  return { ...stats, decodeTokensPerSecond: stats.decodeTokensPerSecond };
}

async function keepRows(id: number): Promise<void> {
  const { runner, store } = needed();
  await stoppable(id, (signal) =>
    runner.readAllRows((rows) => {
      signal.throwIfAborted();
      const { notKept } = store;
      if (notKept !== null) throw new BundleError(`rows cannot be kept: ${notKept}`, "close other tabs, or free space");
      tell({ id, part: rows });
    }),
  );
}

async function answer(question: Question): Promise<unknown> {
  const { id, method, args } = question;
  switch (method) {
    case "open":
      return open(id, args[0] as string, args[1] as number);
    case "facts":
      return facts();
    case "logits":
      return needed().runner.logits(args[0] as number[]);
    case "feed":
      return needed().runner.feed(args[0] as number[], args[1] as number);
    case "reset":
      return needed().runner.reset();
    case "encode":
      return needed().runner.encode(args[0] as string);
    case "decode":
      return needed().runner.tokenizer?.decode(args[0] as number[]) ?? "";
    case "encodeChat":
      return needed().runner.encodeChat(args[0] as Message[], args[1] as boolean | null);
    case "generate":
      return generate(id, args[0] as string | number[], args[1] as GenerationOptions);
    case "chat":
      return chat(id, args[0] as Message[], args[1] as GenerationOptions);
    case "keepRows":
      return keepRows(id);
    case "stop":
      return stopping.get(args[0] as number)?.abort();
    case "close":
      return close();
  }
}

onmessage = async ({ data }: MessageEvent<Question>) => {
  try {
    tell({ id: data.id, result: await answer(data) });
  } catch (err) {
    const isOwn = err instanceof PleexportError;
    const [kind, hint] = isOwn ? [err.name, err.hint] : [isAbort(err) ? "AbortError" : "Error", ""];
    tell({ id: data.id, error: { kind, message: wordsOf(err), hint } });
  }
};

// A module waits for others before it can listen, and what was said before is lost.
tell({ id: READY });
