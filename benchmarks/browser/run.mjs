// Times one engine in Chromium, in a profile of its own; one JSON object. Called by browser.py.
//
//   node run.mjs '{"engine": "pleexport", "model": "build/benchmarks/...", "threads": 1, ...}'
import { mkdtempSync, readFileSync, readdirSync, rmSync } from "node:fs";
import { createServer } from "node:http";
import { createRequire } from "node:module";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";

import { answer } from "../../web-demo/serve.mjs";

const ROOT = fileURLToPath(new URL("../../", import.meta.url));
const { chromium } = createRequire(join(ROOT, "web-demo/pleexport-web/package.json"))("playwright-core");
const TICKS_PER_SECOND = 100;
const PAGE = "benchmarks/browser/page.html";

/** Serves the repository, and counts what is sent of the model. */
async function serving(model) {
  const sent = { requests: 0, bytes: 0 };
  const server = createServer((request, response) => {
    if (request.url.startsWith(`/${model}`)) {
      sent.requests++;
      const { write } = response;
      response.write = (part, ...rest) => {
        sent.bytes += part.length;
        return write.call(response, part, ...rest);
      };
    }
    answer(ROOT, request, response).catch(() => response.destroy());
  });
  await new Promise((resolve) => server.listen(0, "127.0.0.1", resolve));
  return { server, sent, url: `http://127.0.0.1:${server.address().port}` };
}

/** The processes below the browser of a profile, each with its id and its parent's. */
function processesOf(profile) {
  const all = readdirSync("/proc").filter((name) => /^\d+$/.test(name)).flatMap((pid) => {
    try {
      const stat = readFileSync(`/proc/${pid}/stat`, "latin1");
      const fields = stat.slice(stat.lastIndexOf(")") + 2).split(" ");
      return [{ pid, parent: fields[1], ticks: Number(fields[11]) + Number(fields[12]) }];
    } catch {
      return []; // it has ended
    }
  });
  const first = all.find(({ pid }) => {
    const words = readFileSync(`/proc/${pid}/cmdline`, "utf8");
    return words.includes(`--user-data-dir=${profile}`) && !words.includes("--type=");
  });
  const found = [first];
  for (const own of found) found.push(...all.filter(({ parent }) => parent === own.pid));
  return found;
}

/** The process that the page runs in: of those that render, the one with most memory. */
function rendererOf(profile) {
  const found = processesOf(profile).filter(({ pid }) => {
    return readFileSync(`/proc/${pid}/cmdline`, "utf8").includes("--type=renderer");
  });
  const peak = ({ pid }) => {
    return 1024 * Number(/VmHWM:\s+(\d+)/.exec(readFileSync(`/proc/${pid}/status`, "utf8"))?.[1] ?? 0);
  };
  const own = found.sort((a, b) => peak(b) - peak(a))[0];
  return { peakBytes: peak(own), seconds: own.ticks / TICKS_PER_SECOND };
}

/** Token ids that look like no text; the same for the same seed. */
function idsOf(count, vocab, seed) {
  let state = seed;
  return Array.from({ length: count }, () => (state = (state * 48271) % 2147483647) % vocab);
}

async function timed(page, profile, ids, count) {
  const before = rendererOf(profile).seconds;
  const found = await page.evaluate(([own, n]) => engine.generate(own, n), [ids, count]);
  return { ...found, processorSeconds: rendererOf(profile).seconds - before };
}

async function measure(page, profile, sent, wanted) {
  const started = performance.now();
  await page.evaluate((options) => engine.open(options), wanted);
  const result = { loadSeconds: (performance.now() - started) / 1e3 };
  const short = wanted.ids ?? idsOf(16, wanted.vocab, 5);
  const long = idsOf(wanted.promptTokens, wanted.vocab, 7);
  // The first texts warm up as well.
  const first = await timed(page, profile, short, 1);
  result.first = { ...sent };
  await timed(page, profile, [...short, ...first.ids], wanted.moreTokens);
  result.afterMore = { ...sent };
  result.runs = [];
  for (let i = 0; i < wanted.repeat; i++) {
    const prefill = await timed(page, profile, long, 1);
    result.runs.push({ prefill, decode: await timed(page, profile, long, wanted.decodeTokens) });
  }
  return { ...result, peakBytes: rendererOf(profile).peakBytes };
}

/** Steps of several bundles, in turn: the best of each. */
async function measureSteps(page, profile, wanted) {
  const ids = idsOf(64, wanted.vocab, 9);
  for (const model of wanted.models) await page.evaluate((options) => engine.open(options), { ...wanted, model });
  const best = wanted.models.map(() => Infinity);
  for (let i = 0; i <= wanted.repeat; i++) {
    for (const at of best.keys()) {
      const run = await page.evaluate(([own, n, which]) => engine.generate(own, n, which), [ids, wanted.decodeTokens, at]);
      if (i > 0) best[at] = Math.min(best[at], run.decodeSeconds / (run.ids.length - 1));
    }
  }
  return { stepSeconds: best };
}

const wanted = JSON.parse(process.argv[2]);
const { server, sent, url } = await serving(wanted.model);
const profile = mkdtempSync(join(tmpdir(), "pleexport-bench-"));
const executablePath = process.env["PLEEXPORT_CHROMIUM"] ?? "/usr/bin/chromium";
const browser = await chromium.launchPersistentContext(profile, { executablePath, args: ["--no-sandbox"] });
try {
  const page = await browser.newPage();
  page.setDefaultTimeout(0);
  page.on("pageerror", (err) => console.error(String(err)));
  await page.goto(`${url}/${PAGE}?engine=${wanted.engine}`);
  await page.waitForFunction("globalThis.engine !== undefined && crossOriginIsolated");
  const version = await page.evaluate("navigator.userAgent");
  const measured = wanted.models === undefined ? measure(page, profile, sent, wanted) : measureSteps(page, profile, wanted);
  console.log(JSON.stringify({ ...(await measured), browser: /Chrome\/([\d.]+)/.exec(version)[1] }));
} finally {
  await browser.close();
  rmSync(profile, { recursive: true, force: true });
  server.close();
  server.closeAllConnections();
}
