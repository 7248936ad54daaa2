const MODULES = "/build/benchmarks/npm/node_modules";
// Not awaited here: a module that waits does not listen yet, and what it is asked would be lost.
const library = import(`${MODULES}/@huggingface/transformers/dist/transformers.min.js`);
let model;

async function open({ model: path, dtype, threads }) {
  const { AutoModelForCausalLM, env } = await library;
  const runtime = `${location.origin}${MODULES}/onnxruntime-web/dist/ort-wasm-simd-threaded.asyncify`;
  const [, folder, name] = /^(.*\/)([^/]+)$/.exec(path);
  Object.assign(env, { allowLocalModels: true, allowRemoteModels: false, localModelPath: `/${folder}` });
  Object.assign(env.backends.onnx.wasm, { numThreads: threads });
  Object.assign(env.backends.onnx.wasm.wasmPaths, { mjs: `${runtime}.mjs`, wasm: `${runtime}.wasm` });
  model = await AutoModelForCausalLM.from_pretrained(name, {
    device: "wasm",
    dtype: { embed_tokens: "q8", decoder_model_merged: dtype },
  });
}

async function generate(ids, count) {
  const { Tensor } = await library;
  const size = [1, ids.length];
  const times = [];
  // The first that is put is the prompt.
  const streamer = { put: () => times.push(performance.now()), end: () => {} };
  const started = performance.now();
  const found = await model.generate({
    input_ids: new Tensor("int64", BigInt64Array.from(ids, BigInt), size),
    attention_mask: new Tensor("int64", new BigInt64Array(ids.length).fill(1n), size),
    max_new_tokens: count,
    min_new_tokens: count,
    do_sample: false,
    streamer,
  });
  const [, first] = times;
  return {
    ids: Array.from(found.data, Number).slice(ids.length),
    prefillSeconds: (first - started) / 1e3,
    decodeSeconds: (times.at(-1) - first) / 1e3,
  };
}

onmessage = async ({ data: { options, ids, count } }) => {
  try {
    postMessage({ result: options === undefined ? await generate(ids, count) : await open(options) });
  } catch (err) {
    postMessage({ error: String(err?.stack ?? err) });
  }
};
