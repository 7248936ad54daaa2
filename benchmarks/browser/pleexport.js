// Our package, as a page uses it.
import { WorkerRunner } from "../../web-demo/pleexport-web/dist/browser/client.js";

const WORKER = new URL("../../web-demo/pleexport-web/dist/browser/worker.js", import.meta.url);

export class Engine {
  #runners = [];

  async open({ model, threads }) {
    const runner = new WorkerRunner(new Worker(WORKER, { type: "module" }));
    await runner.open(`/${model}`, { threads });
    this.#runners.push(runner);
  }

  async generate(ids, count, which = 0) {
    const runner = this.#runners[which];
    const found = [];
    const options = { maxNewTokens: count, greedy: true, ignoreEos: true };
    for await (const token of runner.generate(ids, options)) found.push(token.id);
    const { prefillSeconds, decodeSeconds } = runner.stats;
    return { ids: found, prefillSeconds, decodeSeconds };
  }
}
