// ONNX Runtime imports this file by its URL in place of its own module, which it starts; here we keep
// hold of what it has started. See ort.ts.
import create from "onnxruntime-web/ort-wasm-simd-threaded.mjs";

/** The running module of ONNX Runtime; null before the first session. */
export let instance: unknown = null;

let compiled: WebAssembly.Module | null = null;

/** Starts with what is compiled already, in place of what it would fetch. */
export function startWith(module: WebAssembly.Module): void {
  compiled = module;
}

type Done = (instance: WebAssembly.Instance, module: WebAssembly.Module) => void;

export default async function createAndKeep(settings: object): Promise<unknown> {
  const module = compiled;
  const own = module === null ? {} : { instantiateWasm: (imports: WebAssembly.Imports, done: Done): void => {
    void WebAssembly.instantiate(module, imports).then((started) => done(started, module));
  } };
  instance = await create({ ...settings, ...own });
  return instance;
}
