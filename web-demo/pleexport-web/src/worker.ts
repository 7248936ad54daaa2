// Runs in a worker of a page: it owns bundle and runner, and answers the messages of client.ts.
import { Bundle } from "./bundle.js";
import type { Message } from "./chat-format.js";
import { PleexportError, wordsOf } from "./errors.js";
import { HttpFiles } from "./http-files.js";
import { PrivateFiles } from "./opfs-files.js";
import { runtimeFiles } from "./ort.js";
import { READY, type Answer, type Facts, type Question } from "./protocol.js";
import { Runner, type GenerationOptions } from "./runner.js";

runtimeFiles.module = () => new URL("./ort-module.js", import.meta.url).href;
runtimeFiles.wasm = () => new URL("./ort-wasm-simd-threaded.wasm", import.meta.url).href;

let opened: { files: HttpFiles; store: PrivateFiles; runner: Runner } | null = null;
const stopping = new Map<number, AbortController>();

function tell(answer: Answer): void {
  postMessage(answer);
}

async function open(id: number, url: string, threads: number): Promise<Facts> {
  await close();
  const store = await PrivateFiles.open();
  const files = new HttpFiles(url, store);
  try {
    const runner = await Runner.open(await Bundle.openFiles(files), {
      threads,
      onNote: (note) => tell({ id, note }),
    });
    opened = { files, store, runner };
  } catch (err) {
    files.close();
    throw err;
  }
  return facts();
}

function facts(): Facts {
  const { files, store, runner } = needed();
  return {
    vocabSize: runner.vocabSize,
    numRows: runner.numRows,
    chunk: runner.chunk,
    context: runner.context,
    target: runner.bundle.manifest.target,
    bundleBytes: runner.bundle.bytes,
    heldBytes: runner.heldBytes,
    rowsRead: runner.rowsFetched,
    requests: files.traffic.requests,
    bytes: files.traffic.bytes,
    notKept: store.notKept,
    hasChatTemplate: runner.hasChatTemplate,
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

async function generate(id: number, prompt: string | readonly number[], options: GenerationOptions): Promise<unknown> {
  const { runner } = needed();
  const stop = new AbortController();
  stopping.set(id, stop);
  try {
    for await (const token of runner.generate(prompt, { ...options, signal: stop.signal })) {
      tell({ id, token });
    }
  } finally {
    stopping.delete(id);
  }
  const { stats } = runner;
  return { ...stats, decodeTokensPerSecond: stats.decodeTokensPerSecond };
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
    const isStop = err instanceof DOMException && err.name === "AbortError";
    const [kind, hint] = err instanceof PleexportError ? [err.name, err.hint] : [isStop ? "AbortError" : "Error", ""];
    tell({ id: data.id, error: { kind, message: wordsOf(err), hint } });
  }
};

// A module waits for others before it can listen, and what was said before is lost.
tell({ id: READY });
