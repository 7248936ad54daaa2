import { InputError } from "./errors.js";
import { residentMemory, type ResidentMemory } from "./memory.js";
import type { Runner } from "./runner.js";
import { seeded, type Random } from "./sampling.js";
import type { Stats } from "./stats.js";

/** Medians over the repetitions of one prompt length; seconds and tokens per second. */
interface Timing {
  readonly promptTokens: number;
  readonly decodeTokens: number;
  readonly prefillTokensPerSecond: number;
  readonly decodeTokensPerSecond: number;
  readonly firstTokenSeconds: number;
  readonly slowestFirstTokenSeconds: number;
}

/** What was measured; memory in bytes at the end, null where the system does not tell. */
export interface BenchResult {
  readonly loadSeconds: number;
  readonly loadToFirstTokenSeconds: number;
  readonly repeat: number;
  readonly timings: readonly Timing[];
  readonly memory: ResidentMemory | null;
}

export interface BenchOptions {
  readonly promptTokens: readonly number[];
  readonly decodeTokens: number;
  readonly repeat: number;
}

/**
 * Times a bundle on random token ids. The first run of each length warms up and is not counted.
 *
 * @throws InputError a prompt that does not fit, or a number below 1.
 */
export async function bench(
  open: () => Promise<Runner>,
  { promptTokens, decodeTokens, repeat }: BenchOptions,
): Promise<BenchResult> {
  const counts = [["decode tokens", decodeTokens], ["repeat", repeat], ...promptTokens.map((n) => ["prompt tokens", n])];
  for (const [name, value] of counts) {
    if ((value as number) < 1) {
      throw new InputError(`${name} is ${value}; it must be 1 or more`, "leave it out for the default");
    }
  }
  const started = performance.now();
  const runner = await open();
  try {
    const loadSeconds = secondsSince(started);
    const longest = Math.max(...promptTokens) + decodeTokens;
    if (longest > runner.context) {
      throw new InputError(
        `${longest} tokens of prompt and decoding exceed the bundle's context of ${runner.context}`,
        "choose shorter prompts, or build with a larger `--context`",
      );
    }
    await runOnce(runner, promptTokens[0]!, 1, seeded(0));
    const loadToFirstTokenSeconds = secondsSince(started);
    const timings: Timing[] = [];
    for (const count of promptTokens) timings.push(await time(runner, count, decodeTokens, repeat));
    return { loadSeconds, loadToFirstTokenSeconds, repeat, timings, memory: residentMemory() };
  } finally {
    await runner.close();
  }
}

/** The names are those of `pleexport bench --json`. */
export function benchJson(result: BenchResult): string {
  const timings = result.timings.map((timing) => ({
    prompt_tokens: timing.promptTokens,
    decode_tokens: timing.decodeTokens,
    prefill_tokens_per_second: timing.prefillTokensPerSecond,
    decode_tokens_per_second: timing.decodeTokensPerSecond,
    first_token_seconds: timing.firstTokenSeconds,
    slowest_first_token_seconds: timing.slowestFirstTokenSeconds,
  }));
  const all = {
    load_seconds: result.loadSeconds,
    load_to_first_token_seconds: result.loadToFirstTokenSeconds,
    repeat: result.repeat,
    timings,
    anonymous_bytes: result.memory?.anonymous ?? null,
    file_backed_bytes: result.memory?.fileBacked ?? null,
  };
  return JSON.stringify(all, null, 2);
}

/** The same for people. */
export function describeBench(result: BenchResult): string {
  const lines = result.timings.map((timing) =>
    [
      `prompt ${timing.promptTokens}: prefill ${timing.prefillTokensPerSecond.toFixed(0)} tokens/s`,
      `decode ${timing.decodeTokensPerSecond.toFixed(1)} tokens/s`,
      `first token after ${timing.firstTokenSeconds.toFixed(3)} s`,
    ].join(", "),
  );
  return lines.join("\n");
}

async function time(runner: Runner, promptTokens: number, decodeTokens: number, repeat: number): Promise<Timing> {
  const random = seeded(promptTokens);
  const runs: Stats[] = [];
  await runOnce(runner, promptTokens, decodeTokens, random);
  for (let i = 0; i < repeat; i++) runs.push(await runOnce(runner, promptTokens, decodeTokens, random));
  const firsts = runs.map(({ firstTokenSeconds }) => firstTokenSeconds);
  return {
    promptTokens,
    decodeTokens,
    prefillTokensPerSecond: median(runs.map((stats) => stats.prefillTokensPerSecond)),
    decodeTokensPerSecond: median(runs.map((stats) => stats.decodeTokensPerSecond)),
    firstTokenSeconds: median(firsts),
    slowestFirstTokenSeconds: Math.max(...firsts),
  };
}

async function runOnce(runner: Runner, promptTokens: number, decodeTokens: number, random: Random): Promise<Stats> {
  const ids = Array.from({ length: promptTokens }, () => Math.floor(random() * runner.numRows));
  await runner.reset();
  for await (const _ of runner.generate(ids, { maxNewTokens: decodeTokens, greedy: true, ignoreEos: true }));
  return runner.stats;
}

function median(values: readonly number[]): number {
  const sorted = [...values].sort((a, b) => a - b);
  const half = sorted.length >> 1;
  return sorted.length % 2 === 1 ? sorted[half]! : (sorted[half - 1]! + sorted[half]!) / 2;
}

function secondsSince(startMs: number): number {
  return (performance.now() - startMs) / 1e3;
}
