declare module "onnxruntime-web/ort-wasm-simd-threaded.mjs" {
  const create: (settings: object) => Promise<unknown>;
  export default create;
}
