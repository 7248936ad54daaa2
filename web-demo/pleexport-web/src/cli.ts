import { bench, benchJson, describeBench } from "./bench.js";
import type { Bundle } from "./bundle.js";
import { InputError, PleexportError } from "./errors.js";
import { openBundle } from "./node.js";
import { NpyWriter } from "./npy.js";
import { Options } from "./options.js";
import { Runner, type GenerationOptions } from "./runner.js";
import type { Stats } from "./stats.js";
import { ThoughtFilter } from "./thought-filter.js";

const USAGE = `usage: pleexport-web COMMAND BUNDLE [OPTIONS]

BUNDLE is a folder, or the http(s) URL of one.

  logits BUNDLE --ids 1,2,3 --out FILE.npy     logits of all positions, float32 [T, vocab]
  run BUNDLE --prompt TEXT --max-new-tokens N  continue a text; --ids 1,2,3 continues token ids
      [--temperature X] [--top-k N] [--top-p X] [--min-p X] [--repetition-penalty X] [--greedy]
      [--seed N] [--stop TEXT] [--no-chat] [--stats]
  bench BUNDLE --prompt-tokens 128,512 --decode-tokens 64 [--repeat 3] [--json]
  encode BUNDLE --text TEXT                    token ids of a text
  decode BUNDLE --ids 1,2,3                    the text of token ids
  verify BUNDLE                                compare every file with its checksums

options of all commands: --threads N, --no-verify

  pleexport-web run build/gemma4-web --prompt "In the beginning" --max-new-tokens 40
`;

const RUN = [
  "prompt",
  "ids",
  "max-new-tokens",
  "temperature",
  "top-k",
  "top-p",
  "min-p",
  "repetition-penalty",
  "seed",
  "stop",
];

/** Where a command writes: data, and everything else. */
export interface Output {
  data(text: string): void;
  note(text: string): void;
}

/** Runs a command; the exit code: 0, or 2 after one sentence. */
export async function runCommand(words: readonly string[], output: Output): Promise<number> {
  const [command = "", ...rest] = words;
  try {
    await commandNamed(command)(rest, output);
    return 0;
  } catch (err) {
    if (!(err instanceof PleexportError)) throw err;
    // Names and texts of files are not trusted: what steers a terminal is not printed.
    output.note(`error: ${plain(err.message)}\n\nhint: ${plain(err.hint)}\n`);
    return 2;
  }
}

type Command = (words: readonly string[], output: Output) => Promise<void>;

function commandNamed(name: string): Command {
  switch (name) {
    case "logits":
      return logits;
    case "run":
      return generate;
    case "bench":
      return timed;
    case "encode":
      return encode;
    case "decode":
      return decode;
    case "verify":
      return verify;
    case "-h":
    case "--help":
      return async (_, output) => output.data(USAGE);
    default:
      throw new InputError(`\`${name}\` is no command`, "`--help` lists all commands");
  }
}

const logits: Command = async (words, output) => {
  const options = new Options(words, ["ids", "out"]);
  const [ids, out] = [options.neededIds("ids"), options.needed("out")];
  await withRunner(options, output, async (runner) => {
    let file: NpyWriter | null = null;
    try {
      await runner.eachLogits(ids, (piece) => {
        // Only here is it known that the ids can be read.
        file ??= new NpyWriter(out, ids.length, runner.vocabSize);
        file.write(piece);
      });
    } finally {
      (file as NpyWriter | null)?.close();
    }
  });
};

const generate: Command = async (words, output) => {
  const options = new Options(words, RUN, ["greedy", "stats", "no-chat"]);
  const given = options.ids("ids");
  const prompt = given === null ? options.needed("prompt") : "";
  const wanted = generationOptions(options);
  await withRunner(options, output, async (runner) => {
    const asChat = given === null && !options.has("no-chat") && runner.hasChatTemplate;
    const ids =
      given ?? (asChat ? runner.encodeChat([{ role: "user", content: prompt }]) : runner.encode(prompt));
    const { tokenizer } = runner;
    const filter = asChat && tokenizer !== null ? new ThoughtFilter(tokenizer, ids) : null;
    for await (const token of runner.generate(ids, wanted)) {
      output.data(filter?.push(token) ?? (tokenizer === null ? `${token.id} ` : token.text));
    }
    output.data(`${filter?.flush() ?? ""}\n`);
    if (options.has("stats")) output.note(`${describe(runner.stats)}\n`);
  });
};

function generationOptions(options: Options): GenerationOptions {
  const said = {
    temperature: options.number("temperature"),
    topK: options.integer("top-k"),
    topP: options.number("top-p"),
    minP: options.number("min-p"),
    repetitionPenalty: options.number("repetition-penalty"),
    maxNewTokens: options.integer("max-new-tokens"),
    seed: options.integer("seed"),
  };
  const stop = options.get("stop");
  return {
    ...Object.fromEntries(Object.entries(said).filter(([, value]) => value !== null)),
    greedy: options.has("greedy"),
    stop: stop === null ? [] : [stop],
  };
}

const timed: Command = async (words, output) => {
  const options = new Options(words, ["prompt-tokens", "decode-tokens", "repeat"], ["json"]);
  const result = await bench(() => open(options), {
    promptTokens: options.ids("prompt-tokens") ?? [128, 512],
    decodeTokens: options.integer("decode-tokens") ?? 64,
    repeat: options.integer("repeat") ?? 3,
  });
  output.data(`${options.has("json") ? benchJson(result) : describeBench(result)}\n`);
};

const encode: Command = async (words, output) => {
  const options = new Options(words, ["text"]);
  const text = options.needed("text");
  await withRunner(options, output, async (runner) => output.data(`${runner.encode(text).join(",")}\n`));
};

const decode: Command = async (words, output) => {
  const options = new Options(words, ["ids"]);
  const ids = options.neededIds("ids");
  await withRunner(options, output, async ({ tokenizer }) => {
    if (tokenizer === null) {
      throw new InputError("this bundle has no tokenizer", "it takes and gives token ids only");
    }
    output.data(`${tokenizer.decode(ids)}\n`);
  });
};

const verify: Command = async (words, output) => {
  const options = new Options(words, []);
  const bundle = await openBundle(options.place, { verify: !options.has("no-verify") });
  try {
    await bundle.verify();
  } finally {
    bundle.close();
  }
  output.data("Files are intact.\n");
};

async function open(options: Options): Promise<Runner> {
  const bundle = await openBundle(options.place, { verify: !options.has("no-verify") });
  try {
    return await Runner.open(bundle, { threads: options.integer("threads") ?? 0 });
  } catch (err) {
    bundle.close();
    throw err;
  }
}

async function withRunner(
  options: Options,
  output: Output,
  use: (runner: Runner) => Promise<void>,
): Promise<void> {
  const runner = await open(options);
  try {
    await use(runner);
    // At the end, so that an error stands alone.
    const slow = slowFormOf(runner.bundle);
    if (slow !== null) output.note(`note: ${slow}\n`);
  } finally {
    await runner.close();
    runner.bundle.close();
  }
}

/** What is said of a bundle whose weights have a form that WebAssembly is slow with; null of others. */
function slowFormOf({ manifest, decoder, path }: Bundle): string | null {
  const isForHere = manifest.target.startsWith("web") && decoder.contract.processor === "cpu";
  if (isForHere || manifest.weightDtype === "fp32") return null;
  return (
    `\`${plain(path)}\` was built for the target \`${plain(manifest.target)}\`, whose form of weights is ` +
    "slow in WebAssembly; build it with `--target web` for here"
  );
}

function plain(text: string): string {
  return text.replace(/\p{Cc}/gu, "?");
}

function describe(stats: Stats): string {
  return [
    `finished: ${stats.finishReason ?? ""}`,
    `prefill: ${stats.promptTokens} tokens, ${stats.prefillTokensPerSecond.toFixed(0)} tokens/s`,
    `decode: ${stats.generatedTokens} tokens, ${stats.decodeTokensPerSecond.toFixed(0)} tokens/s`,
    `rows: ${stats.rows}`,
  ].join("\n");
}
