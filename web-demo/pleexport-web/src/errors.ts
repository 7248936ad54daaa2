/** Base of all errors that are shown to users as one sentence; the words are those of the Python library. */
export class PleexportError extends Error {
  /** What to do about it. */
  readonly hint: string;
  /** Not that of the class, which has another in a program that was made smaller. */
  override readonly name: string = "PleexportError";

  constructor(message: string, hint: string, options?: ErrorOptions) {
    super(message, options);
    this.hint = hint;
  }
}

/** The folder is not a bundle, or not one that this version reads. */
export class BundleError extends PleexportError {
  override readonly name = "BundleError";
}

/** The blob breaks a rule of docs/blob-format.md. */
export class BlobError extends PleexportError {
  override readonly name = "BlobError";
}

/** A tokenizer's files are malformed, or have parts that are not known here. */
export class TokenizerError extends PleexportError {
  override readonly name = "TokenizerError";
}

/** A prompt, id, text or option that cannot be used. */
export class InputError extends PleexportError {
  override readonly name = "InputError";
}

/** A file does not match its checksum or its size. */
export class CheckFailed extends PleexportError {
  override readonly name = "CheckFailed";
}

export const COPY_AGAIN = "copy the bundle again, or rebuild it";
export const MIXED = "files of two bundles may be mixed; copy the bundle again, or rebuild it";
export const AS_PUBLISHED = "fetch the file again; it is published with the model";
export const NEWER = "install a newer pleexport";

/** Whether what was thrown says that somebody stopped it. */
export function isAbort(err: unknown): boolean {
  return err instanceof DOMException && err.name === "AbortError";
}

/** What another library says of a failure, as the end of a sentence. */
export function wordsOf(err: unknown): string {
  const words = err instanceof Error ? err.message : String(err);
  return words.split("\n", 1)[0]!.slice(0, 300);
}
