// What onnxruntime-web does not document, and ort.ts leans on.
import assert from "node:assert/strict";
import { createRequire } from "node:module";
import { dirname } from "node:path";
import { describe, test } from "node:test";

import { openBundle } from "../src/node.js";
import { Folder } from "../src/node-files.js";
import { Graph, ORT_VERSION, type HeapTensor } from "../src/ort.js";
import { Slots } from "../src/slots.js";
import { CONFORMANCE, readJson, ROOT } from "./vectors.js";

const PACKAGE = `${ROOT}web-demo/pleexport-web`;

test("the version is the one whose inside is known", () => {
  const named = readJson(`${PACKAGE}/package.json`).dependencies["onnxruntime-web"];
  const entry = createRequire(import.meta.url).resolve("onnxruntime-web");
  const installed = readJson(`${dirname(dirname(entry))}/package.json`).version;
  assert.deepEqual([named, installed], [ORT_VERSION, ORT_VERSION]);
});

async function graphOf(name: string): Promise<Graph> {
  const bundle = await openBundle(`${CONFORMANCE}/${name}`);
  const files = new Folder(bundle.path);
  const [model, ...rest] = bundle.decoder.files as [string, ...string[]];
  const weights = await Promise.all(rest.map(async (file) => [file, await files.open(file)] as const));
  return Graph.open(await files.readWhole(model), new Map(weights), 1);
}

describe("caches are written in place", () => {
  for (const name of ["lckv-fp16", "gemma4-int4"]) {
    test(name, async () => {
      const { contract } = (await openBundle(`${CONFORMANCE}/${name}`)).decoder;
      const graph = await graphOf(name);
      const inputs = new Map<string, HeapTensor>();
      const outputs = new Map<string, HeapTensor>();
      const apart = new Map<string, HeapTensor>();
      const slots = new Slots(contract.caches, 256, 1).grow(1)!;
      contract.caches.forEach(({ input, output, shape, dtype }, i) => {
        const dims = shape.map((n) => (typeof n === "number" ? n : slots[i]!));
        inputs.set(input, graph.tensor(dtype, dims));
        outputs.set(output, inputs.get(input)!);
        apart.set(output, graph.tensor(dtype, dims));
      });
      for (const { name: input, shape } of contract.lookupInputs) {
        const tensor = graph.tensor("fp32", shape.map((n) => (typeof n === "number" ? n : 1)));
        tensor.floats.fill(0.5);
        inputs.set(input, tensor);
      }
      inputs.set("position_ids", graph.tensor("int64", [1, 1]));
      inputs.set("num_logits_to_keep", graph.tensor("int64", []));
      outputs.set("logits", graph.tensor("fp32", [1, 1, contract.vocabSize]));
      const [first] = contract.caches as [(typeof contract.caches)[0]];
      const [cache, own] = [inputs.get(first.input)!, apart.get(first.output)!];
      assert.ok(cache.data.every((byte) => byte === 0));
      // The control: with a buffer of its own, the output is a copy, and the input stays as it is.
      await graph.run(inputs, new Map([...outputs, ...apart]));
      assert.ok(cache.data.every((byte) => byte === 0));
      assert.ok(own.data.some((byte) => byte !== 0));
      const written = own.data.slice();
      await graph.run(inputs, outputs);
      assert.deepEqual(cache.data.slice(), written, "the new slot is written into the input");
      assert.ok(outputs.get("logits")!.floats.some((logit) => logit !== 0));
      for (const tensor of new Set([...inputs.values(), ...outputs.values(), ...apart.values()])) tensor.free();
      await graph.close();
    });
  }
});
