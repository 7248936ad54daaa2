// transformers.js, in a worker as its guide advises.
export class Engine {
  #worker = new Worker(new URL("./transformersjs-worker.js", import.meta.url), { type: "module" });

  #ask(question) {
    return new Promise((resolve, reject) => {
      this.#worker.onmessage = ({ data: { result, error } }) => (error === undefined ? resolve(result) : reject(new Error(error)));
      this.#worker.onerror = ({ message }) => reject(new Error(message));
      this.#worker.postMessage(question);
    });
  }

  open(options) {
    return this.#ask({ options });
  }

  generate(ids, count) {
    return this.#ask({ ids, count });
  }
}
