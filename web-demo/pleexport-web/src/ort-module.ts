// ONNX Runtime imports this file by its URL in place of its own module, which it starts; here we keep
// hold of what it has started. See ort.ts.
import create from "onnxruntime-web/ort-wasm-simd-threaded.mjs";

/** The running module of ONNX Runtime; null before the first session. */
export let instance: unknown = null;

export default async function createAndKeep(settings: object): Promise<unknown> {
  instance = await create(settings);
  return instance;
}
