import { artifact, CONTRACT_ID, outOfForm, type Artifact } from "./contract.js";
import { chatFormat, contradiction, type ChatFormat } from "./chat-format.js";
import { BundleError, COPY_AGAIN } from "./errors.js";
import { generationConfig, outOfRange, type GenerationConfig } from "./generation-config.js";
import {
  boolean,
  count,
  integer,
  list,
  MalformedJson,
  map,
  number,
  object,
  oneOf,
  orNull,
  parseJson,
  string,
  text,
} from "./json.js";

export const MANIFEST = "manifest.json";
export const BLOB = "embeddings.safetensors";
export const DECODER = "decoder";
const SCHEMA = 2n;

/** The backends that write bundles; this package runs the first. */
const CONTRACTS: ReadonlyMap<string, string> = new Map([
  ["onnx", CONTRACT_ID],
  ["executorch", "pleexport.executorch/1"],
]);

/** A file of the bundle; size in bytes. */
export interface FileRecord {
  readonly name: string;
  readonly size: number;
  readonly sha256: string;
}

/**
 * `manifest.json`, whose fields are described in docs/bundle-format.md. A reader that meets an
 * unknown schema or field stops.
 */
export interface Manifest {
  readonly family: string;
  readonly graphs: ReadonlyMap<string, Artifact>;
  /** Largest number of positions the bundle was built for. */
  readonly context: number;
  readonly eosTokenIds: readonly number[];
  /** How the checkpoint wants texts generated; null where it says nothing. */
  readonly generation: GenerationConfig | null;
  /** The chat template as data; null where there is none, or it cannot be told so. */
  readonly chatFormat: ChatFormat | null;
  /** Why it cannot, as a clause. */
  readonly noChatFormat: string | null;
  readonly tableDtype: string;
  readonly weightDtype: string;
  readonly cacheDtype: string;
  readonly target: string;
  /** Of the checkpoint's tables; the blob has it too. */
  readonly tablesDigest: string;
  /** Names of the blob's files where it lies in several. */
  readonly blobShards: readonly string[];
  readonly files: readonly FileRecord[];
}

/** Names of the blob's files. */
export function blobFiles({ blobShards }: Manifest): readonly string[] {
  return blobShards.length === 0 ? [BLOB] : blobShards;
}

/** Names of the files of blob and graphs, without which there is no model. */
export function modelFiles(manifest: Manifest): string[] {
  return [...blobFiles(manifest), ...[...manifest.graphs.values()].flatMap(({ files }) => files)];
}

/**
 * Reads a manifest.
 *
 * @param path of the file, to name it.
 * @throws BundleError it is not one that this version reads.
 */
export function readManifest(raw: Uint8Array, path: string): Manifest {
  let manifest: Manifest;
  try {
    const json = parseJson(raw);
    const schema = json instanceof Map ? json.get("schema") : SCHEMA;
    if (schema !== SCHEMA) {
      const shown = typeof schema === "string" ? `'${schema}'` : (schema ?? "None");
      throw new BundleError(
        `\`${path}\` has schema ${String(shown)}; this version reads ${SCHEMA}`,
        "install the version of pleexport that wrote the bundle, or rebuild it",
      );
    }
    manifest = fieldsOfManifest(json, "$");
  } catch (err) {
    if (!(err instanceof MalformedJson)) throw err;
    throw new BundleError(`\`${path}\` is malformed: ${err.message}`, COPY_AGAIN, { cause: err });
  }
  checkManifest(manifest, path);
  return manifest;
}

const fileRecord = object<FileRecord>((fields) => ({
  name: fields.required("name", string),
  size: fields.required("size", integer),
  sha256: fields.required("sha256", string),
}));

const sourceFile = object((fields) => {
  fields.required("name", string);
  fields.required("size", integer);
  fields.required("digest", string);
});

const source = object((fields) => {
  fields.optional("repository", string);
  fields.optional("commit", string);
  fields.required("files", list(sourceFile));
});

const adapterRecord = object((fields) => {
  fields.required("name", string);
  fields.required("weight", number);
  fields.required("digest", string);
});

const paritySummary = object((fields) => {
  fields.required("checked", boolean);
  fields.optional("passed", boolean);
  fields.optional("max_logit_error", number);
});

const fieldsOfManifest = object<Manifest>((fields) => {
  fields.required("schema", integer);
  // What says how the bundle was built is of no use here, but has to be there and of its type.
  fields.orElse("table_dtypes", new Map(), map(string));
  fields.orElse("weight_dtypes", new Map(), map(string));
  fields.optional("max_bytes", integer);
  fields.required("head_dtype", string);
  fields.required("block_size", integer);
  fields.required("symmetric", boolean);
  fields.orElse("trained_grid", false, boolean);
  fields.orElse("per_channel", false, boolean);
  fields.orElse("activation_rounding", true, boolean);
  fields.required("calibration_tokens", integer);
  fields.orElse("spin", true, boolean);
  fields.optional("source", source);
  fields.orElse("adapters", [], list(adapterRecord));
  fields.required("versions", map(string));
  fields.required("parity", paritySummary);
  return {
    family: fields.required("family", string),
    graphs: fields.required("graphs", map(artifact)),
    context: fields.required("context", count),
    eosTokenIds: fields.required("eos_token_ids", list(integer)),
    generation: fields.orElse("generation", null, orNull(generationConfig)),
    chatFormat: fields.orElse("chat_format", null, orNull(chatFormat)),
    noChatFormat: fields.orElse("no_chat_format", null, orNull(text(0, 4096))),
    tableDtype: fields.required("table_dtype", string),
    weightDtype: fields.required("weight_dtype", string),
    cacheDtype: fields.required("cache_dtype", oneOf("fp32", "fp16", "int8", "none")),
    target: fields.required("target", string),
    tablesDigest: fields.required("tables_digest", string),
    blobShards: fields.orElse("blob_shards", [], list(string)),
    files: fields.required("files", list(fileRecord)),
  };
});

function checkManifest(manifest: Manifest, path: string): void {
  const listed = new Set(manifest.files.map(({ name }) => name));
  for (const name of listed) {
    // A backslash parts folders on some systems; a URL would lead elsewhere with the others.
    if (name === "" || name === "." || name === ".." || /[/\\?#%\0]/.test(name)) {
      throw new BundleError(`\`${path}\` points outside the bundle: \`${name}\``, "do not use this bundle");
    }
  }
  if (!manifest.graphs.has(DECODER)) {
    const hint = "rebuild the bundle; nothing else runs it";
    throw new BundleError(`\`${path}\` has no graph \`${DECODER}\``, hint);
  }
  for (const [role, graph] of manifest.graphs) checkGraph(role, graph, path);
  const impossible = manifest.generation === null ? null : outOfRange(manifest.generation);
  if (impossible !== null) {
    const what = `has impossible defaults for generation: ${impossible}`;
    throw new BundleError(`\`${path}\` ${what}`, COPY_AGAIN);
  }
  const contrary = manifest.chatFormat === null ? null : contradiction(manifest.chatFormat);
  if (contrary !== null) {
    throw new BundleError(`\`${path}\` has an impossible chat format: ${contrary}`, COPY_AGAIN);
  }
  for (const name of modelFiles(manifest)) {
    if (!listed.has(name)) {
      throw new BundleError(`\`${path}\` does not list \`${name}\` among its files`, "rebuild the bundle");
    }
  }
}

function checkGraph(role: string, graph: Artifact, path: string): void {
  const known = CONTRACTS.get(graph.backend);
  if (known === undefined) {
    throw new BundleError(
      `\`${path}\` has graph \`${role}\` of backend \`${graph.backend}\`; this version knows ` +
        [...CONTRACTS.keys()].join(", "),
      "install the version of pleexport that wrote the bundle",
    );
  }
  if (graph.contract.id !== known) {
    throw new BundleError(
      `\`${path}\` follows the graph contract \`${graph.contract.id}\`; this version knows \`${known}\``,
      "install the version of pleexport that wrote the bundle, or rebuild it",
    );
  }
  const problem =
    (graph.backend === "onnx" ? outOfForm(graph.contract) : null) ??
    (graph.files.length === 0 ? `graph \`${role}\` has no files` : null);
  if (problem !== null) throw new BundleError(`\`${path}\` is malformed: ${problem}`, COPY_AGAIN);
}
