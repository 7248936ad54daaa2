// What the page needs of its browser.

const NEWER = "Update the browser, or take another one.";
/** A module with one instruction of SIMD. */
const SIMD = [
  0, 97, 115, 109, 1, 0, 0, 0, 1, 5, 1, 96, 0, 1, 123, 3, 2, 1, 0, 10, 10, 1, 8, 0, 65, 0, 253, 15, 253, 98, 11,
];

/** A sentence, and what to do about it. */
export interface Said {
  readonly sentence: string;
  readonly hint: string;
}

/** Why the model cannot run here; null where nothing is missing. */
export function missingFeature(): Said | null {
  if (!isSecureContext) {
    return { sentence: "This page was opened without https, so the browser lets it keep no files.", hint: "Open it by https, or on localhost." };
  }
  if (typeof WebAssembly !== "object" || !WebAssembly.validate(new Uint8Array(SIMD))) {
    return { sentence: "This browser has no WebAssembly with SIMD, which runs the model.", hint: NEWER };
  }
  if (typeof navigator.storage?.getDirectory !== "function") {
    return { sentence: "This browser has no private file system, where the model is kept.", hint: `${NEWER} A private window may have none.` };
  }
  return null;
}

/** Starts a worker that is a module; null where the browser knows none. */
export function moduleWorker(url: string): Worker | null {
  let isKnown = false;
  const options: WorkerOptions = {
    get type(): "module" {
      isKnown = true; // nobody else asks for it
      return "module";
    },
  };
  if (typeof Worker !== "function") return null;
  const worker = new Worker(url, options);
  if (isKnown) return worker;
  worker.terminate();
  return null;
}

export const NO_MODULES: Said = { sentence: "This browser has no workers that are modules, where the model runs.", hint: NEWER };

/**
 * Lets the page open without a network from now on.
 *
 * @param runtime that its bundle needs: "cpu" or "gpu".
 * @param onUpdate is called when a new version of the page is here; what it is given changes to it.
 */
export async function keepPage(runtime: "cpu" | "gpu", onUpdate: (change: () => void) => void): Promise<void> {
  if (!("serviceWorker" in navigator)) return;
  const found = await navigator.serviceWorker.register("service-worker.js");
  const tell = (worker: ServiceWorker): void => {
    onUpdate(() => {
      navigator.serviceWorker.addEventListener("controllerchange", () => location.reload(), { once: true });
      worker.postMessage("take over");
    });
  };
  if (found.waiting !== null && navigator.serviceWorker.controller !== null) tell(found.waiting);
  found.addEventListener("updatefound", () => {
    const coming = found.installing;
    coming?.addEventListener("statechange", () => {
      // The first version of all takes nothing's place.
      if (coming.state === "installed" && navigator.serviceWorker.controller !== null) tell(coming);
    });
  });
  (await navigator.serviceWorker.ready).active?.postMessage(runtime);
}
