export { Blob } from "./blob.js";
export type { Segment } from "./blob-layout.js";
export { Bundle, type BundleOptions } from "./bundle.js";
export type { Message } from "./chat-format.js";
export {
  BlobError,
  BundleError,
  CheckFailed,
  InputError,
  PleexportError,
  TokenizerError,
} from "./errors.js";
export { FileFailure, type BundleFile, type BundleFiles, type LocalFile, type Range } from "./files.js";
export type { GenerationConfig } from "./generation-config.js";
export { HttpFiles, type FileStore, type Heads, type Traffic } from "./http-files.js";
export type { FileRecord, Manifest } from "./manifest.js";
export { Loading, type Progress } from "./progress.js";
export { Runner, type GenerationOptions, type RunnerOptions } from "./runner.js";
export { Stats, type FinishReason, type Token } from "./stats.js";
export type { TextStream } from "./text-stream.js";
export { ThoughtFilter } from "./thought-filter.js";
export type { Tokenizer } from "./tokenizer.js";
