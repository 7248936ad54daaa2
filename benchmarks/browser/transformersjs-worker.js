const MODULES = "/build/benchmarks/npm/node_modules";
const { AutoModelForCausalLM, BaseStreamer, Tensor, env } = await import(
  `${MODULES}/@huggingface/transformers/dist/transformers.min.js`
);
let model;

/** Notes when each token came; the first that is put is the prompt. */
class Clock extends BaseStreamer {
  times = [];

  put() {
    this.times.push(performance.now());
  }

  end() {}
}

async function open({ model: path, dtype, threads }) {
  const runtime = `${location.origin}${MODULES}/onnxruntime-web/dist/ort-wasm-simd-threaded.asyncify`;
  Object.assign(env, { allowLocalModels: true, allowRemoteModels: false, localModelPath: "/" });
  Object.assign(env.backends.onnx.wasm, { numThreads: threads });
  Object.assign(env.backends.onnx.wasm.wasmPaths, { mjs: `${runtime}.mjs`, wasm: `${runtime}.wasm` });
  model = await AutoModelForCausalLM.from_pretrained(path, {
    device: "wasm",
    dtype: { embed_tokens: "q8", decoder_model_merged: dtype },
  });
}

async function generate(ids, count) {
  const size = [1, ids.length];
  const streamer = new Clock();
  const started = performance.now();
  const found = await model.generate({
    input_ids: new Tensor("int64", BigInt64Array.from(ids, BigInt), size),
    attention_mask: new Tensor("int64", new BigInt64Array(ids.length).fill(1n), size),
    max_new_tokens: count,
    min_new_tokens: count,
    do_sample: false,
    streamer,
  });
  const [, first] = streamer.times;
  return {
    ids: Array.from(found.data, Number).slice(ids.length),
    prefillSeconds: (first - started) / 1e3,
    decodeSeconds: (streamer.times.at(-1) - first) / 1e3,
  };
}

onmessage = async ({ data: { options, ids, count } }) => {
  try {
    postMessage({ result: options === undefined ? await generate(ids, count) : await open(options) });
  } catch (err) {
    postMessage({ error: String(err?.stack ?? err) });
  }
};
