import type { Bundle } from "./bundle.js";
import { AS_PUBLISHED, InputError, TokenizerError, wordsOf } from "./errors.js";
import { JsonTokenizer } from "./json-tokenizer.js";
import { decodeUtf8, MalformedJson } from "./json.js";
import type { TextStream } from "./text-stream.js";
import { VOCABULARY, WorldTokenizer } from "./world-tokenizer.js";

export const TOKENIZER = "tokenizer.json";
export const TOKENIZER_CONFIG = "tokenizer_config.json";
export const CHAT_TEMPLATE = "chat_template.jinja";
export const TOKENIZER_FILES = [TOKENIZER, TOKENIZER_CONFIG, CHAT_TEMPLATE, VOCABULARY];

/** The tokenizer of a bundle: text to token ids and back. */
export interface Tokenizer {
  /** Ids are below it. */
  readonly size: number;

  /**
   * Ids of a text.
   *
   * @param addSpecialTokens put those around it that the tokenizer has for that; true by default.
   * @throws InputError the text is not Unicode.
   */
  encode(text: string, options?: { addSpecialTokens?: boolean }): number[];

  /** The text of ids; special tokens are left out where nobody asks for them. */
  decode(ids: readonly number[], options?: { withSpecials?: boolean }): string;

  /** What makes text of the ids that follow a prompt, as they come. */
  stream(promptIds: readonly number[]): TextStream;

  /** The text of a special token; "" of any other. */
  specialText(id: number): string;

  /** What stands before and after thoughts, where the tokenizer's config says it in plain texts. */
  readonly thoughtMarkers: readonly (readonly [string, string])[];
}

/** `tokenizer_config.json`, of which a few fields are read. */
export type TokenizerConfig = Readonly<Record<string, unknown>>;

/** The tokenizer of a bundle, and what else its folder says. */
export interface OpenTokenizer {
  /** Null where the bundle has none. */
  readonly tokenizer: Tokenizer | null;
  readonly config: TokenizerConfig;
  /** The chat template; null where there is none. */
  readonly template: string | null;
}

/**
 * Opens the tokenizer of a bundle.
 *
 * @throws TokenizerError a file is malformed, or has parts that are not known here.
 * @throws CheckFailed a file does not match its checksums.
 */
export async function openTokenizer(bundle: Bundle): Promise<OpenTokenizer> {
  const read = async (name: string): Promise<string | null> =>
    bundle.has(name) ? textOf(bundle.pathOf(name), await bundle.readWhole(name)) : null;
  const template = await read(CHAT_TEMPLATE);
  const configText = await read(TOKENIZER_CONFIG);
  const parsed = configText === null ? {} : jsonOf(bundle.pathOf(TOKENIZER_CONFIG), configText);
  const config = isObject(parsed) ? parsed : {};
  const json = await read(TOKENIZER);
  const vocabulary = json === null ? await read(VOCABULARY) : null;
  return { tokenizer: made(bundle, json, vocabulary, config), config, template };
}

function made(
  bundle: Bundle,
  json: string | null,
  vocabulary: string | null,
  config: TokenizerConfig,
): Tokenizer | null {
  if (json !== null) {
    const path = bundle.pathOf(TOKENIZER);
    return new JsonTokenizer(path, jsonOf(path, json), config);
  }
  return vocabulary === null ? null : new WorldTokenizer(bundle.pathOf(VOCABULARY), vocabulary);
}

function textOf(path: string, bytes: Uint8Array): string {
  try {
    return decodeUtf8(bytes);
  } catch (err) {
    if (!(err instanceof MalformedJson)) throw err;
    throw new TokenizerError(`\`${path}\` cannot be read: ${err.message}`, AS_PUBLISHED, { cause: err });
  }
}

function jsonOf(path: string, text: string): unknown {
  try {
    return JSON.parse(text);
  } catch (err) {
    throw new TokenizerError(`\`${path}\` is not valid JSON (${wordsOf(err)})`, AS_PUBLISHED, { cause: err });
  }
}

export function isObject(value: unknown): value is Record<string, unknown> {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

/** @throws InputError the text holds half a surrogate pair. */
export function checkUnicode(text: string): void {
  if (/\p{Surrogate}/u.test(text)) {
    throw new InputError("the text is not UTF-8", "it holds half a surrogate pair; replace it");
  }
}
