import { Tokenizer as Library } from "@huggingface/tokenizers";

import { AS_PUBLISHED, TokenizerError, wordsOf } from "./errors.js";
import { correct, release, stepsOf, unknownPart } from "./library-parts.js";
import { clean, CleanedStream, DecodedStream, type Decoding, type TextStream } from "./text-stream.js";
import { checkUnicode, isObject, type Tokenizer, type TokenizerConfig } from "./tokenizer.js";

const THOUGHTS = ["reasoning_content", "thinking", "reasoning"];
const CLEANS = "clean_up_tokenization_spaces";
const CLEANS_BPE = `${CLEANS}_for_bpe_even_though_it_will_corrupt_output`;
/** A token of a byte-fallback decoder that stands for one byte. */
const BYTE = /^<0x[0-9A-Fa-f]{2}>$/;

/** A tokenizer.json, as transformers uses one. */
export class JsonTokenizer implements Tokenizer, Decoding {
  readonly size: number;
  readonly thoughtMarkers: readonly (readonly [string, string])[];
  private readonly library: Library;
  /** Takes special tokens in a text for plain text, where the config wants that. */
  private readonly encoder: Library;
  private readonly special: ReadonlyMap<number, string>;
  private readonly hasByteFallback: boolean;
  private readonly cleans: boolean;

  /**
   * @param path of the file, to name it.
   * @param json what it holds.
   * @param config its tokenizer_config.json.
   * @throws TokenizerError the file is malformed, or has parts that are not known here.
   */
  constructor(
    private readonly path: string,
    json: unknown,
    config: TokenizerConfig,
  ) {
    const file = isObject(json) ? json : {};
    const problem = problemOf(file);
    if (problem !== null) throw this.malformed(problem);
    const unknown = unknownPart(file);
    if (unknown !== null) {
      throw new TokenizerError(
        `\`${path}\` has ${unknown}, which this library does not know`,
        "pass token ids instead of text, or run the bundle with the Python library",
      );
    }
    this.library = this.opened(file);
    this.encoder =
      config["split_special_tokens"] === true ? this.opened(withoutSpecials(file)) : this.library;
    const added = [...this.library.get_added_tokens_decoder().values()];
    this.special = new Map(added.filter(({ special }) => special).map(({ id, content }) => [id, content]));
    this.size = maximum(this.library.get_vocab(true).values()) + 1;
    this.hasByteFallback = stepsOf(file["decoder"]).some(({ type }) => type === "ByteFallback");
    // transformers does not clean what BPE decodes, if it is not forced to.
    this.cleans = config[CLEANS] === true && config[CLEANS_BPE] === true;
    this.thoughtMarkers = markersOf(config);
  }

  encode(text: string, { addSpecialTokens = true } = {}): number[] {
    checkUnicode(text);
    return this.readable(() => this.encoder.encode(text, { add_special_tokens: addSpecialTokens }).ids);
  }

  decode(ids: readonly number[], { withSpecials = false } = {}): string {
    const text = this.textOf(ids, withSpecials);
    return this.cleans ? clean(text) : text;
  }

  stream(promptIds: readonly number[]): TextStream {
    const raw = new DecodedStream(this, promptIds);
    return this.cleans ? new CleanedStream(raw) : raw;
  }

  specialText(id: number): string {
    return this.special.get(id) ?? "";
  }

  plainText(ids: readonly number[]): string {
    return this.textOf(ids, false);
  }

  isByte(id: number): boolean {
    return this.hasByteFallback && BYTE.test(this.library.id_to_token(id) ?? "");
  }

  isSilent(id: number): boolean {
    return this.special.has(id) || this.library.id_to_token(id) === undefined;
  }

  private textOf(ids: readonly number[], withSpecials: boolean): string {
    // The library would put the unknown token for an id that is none.
    const shown = ids.filter((id) => {
      return this.library.id_to_token(id) !== undefined && (withSpecials || !this.special.has(id));
    });
    if (shown.length === 0) return "";
    const options = { skip_special_tokens: false, clean_up_tokenization_spaces: false };
    return this.readable(() => this.library.decode(shown, options));
  }

  private opened(file: Record<string, unknown>): Library {
    return this.readable(() => {
      const parts = { normalizer: null, pre_tokenizer: null, post_processor: null, decoder: null };
      const opened = new Library({ ...parts, added_tokens: [], ...file }, {});
      correct(opened, file);
      release(opened);
      return opened;
    });
  }

  /** Says in a sentence what the library says of a file in its own ways. */
  private readable<T>(read: () => T): T {
    try {
      return read();
    } catch (err) {
      if (err instanceof TokenizerError) throw err;
      throw this.malformed(`cannot be read: ${wordsOf(err)}`, err);
    }
  }

  private malformed(what: string, cause?: unknown): TokenizerError {
    return new TokenizerError(`\`${this.path}\` ${what}`, AS_PUBLISHED, { cause });
  }
}

/** What is missing or wrong in a file, and would not be noticed before ids are. */
function problemOf(file: Record<string, unknown>): string | null {
  const { model, added_tokens: added = [] } = file;
  if (!isObject(model)) return "has no model";
  if (!Array.isArray(added)) return "has `added_tokens` that are no list";
  const isId = (id: unknown): boolean => Number.isInteger(id) && (id as number) >= 0;
  for (const token of added) {
    if (!isObject(token) || !isId(token["id"]) || typeof token["content"] !== "string") {
      return "has an added token without an id or a text";
    }
  }
  const { vocab, merges } = model;
  if (isObject(vocab)) {
    const bad = Object.entries(vocab).find(([, id]) => !isId(id));
    if (bad !== undefined) return `gives token \`${bad[0]}\` no number`;
    for (const merge of Array.isArray(merges) ? merges : []) {
      const parts: unknown[] = typeof merge === "string" ? halves(merge) : Array.isArray(merge) ? merge : [];
      const pieces = parts.length === 2 ? [...parts, parts.join("")] : [undefined];
      const unknown = pieces.find((piece) => typeof piece !== "string" || !Object.hasOwn(vocab, piece));
      if (pieces.includes(undefined) || unknown !== undefined) {
        return `merges \`${String(unknown ?? merge)}\`, which is not in its vocabulary`;
      }
    }
  }
  for (const step of stepsOf(file["post_processor"])) {
    const known = isObject(step["special_tokens"]) ? step["special_tokens"] : {};
    for (const piece of Array.isArray(step["single"]) ? step["single"] : []) {
      const token: unknown = isObject(piece) ? piece["SpecialToken"] : null;
      const id: unknown = isObject(token) ? token["id"] : undefined;
      if (id !== undefined && !Object.hasOwn(known, String(id))) {
        return `puts \`${String(id)}\` around a text, and does not say its ids`;
      }
      const text: unknown = isObject(piece) && isObject(piece["Sequence"]) ? piece["Sequence"]["id"] : "A";
      if (text !== "A") return `puts a text \`${String(text)}\` where there is only one, \`A\``;
    }
  }
  return null;
}

function halves(merge: string): string[] {
  const at = merge.indexOf(" ");
  return at < 0 ? [merge] : [merge.slice(0, at), merge.slice(at + 1)];
}

function withoutSpecials(file: Record<string, unknown>): Record<string, unknown> {
  const added = Array.isArray(file["added_tokens"]) ? file["added_tokens"] : [];
  return { ...file, added_tokens: added.filter((token) => !isObject(token) || token["special"] !== true) };
}

function maximum(values: Iterable<number>): number {
  let most = -1;
  for (const value of values) most = Math.max(most, value);
  return most;
}

function markersOf(config: TokenizerConfig): [string, string][] {
  const template = config["response_template"];
  const fields = isObject(template) ? template["fields"] : null;
  if (!isObject(fields)) return [];
  return THOUGHTS.flatMap((name) => {
    const own = fields[name];
    const [open, close] = isObject(own) ? [own["open"], own["close"]] : [null, null];
    const isText = (text: unknown): text is string => typeof text === "string" && text !== "";
    return isText(open) && isText(close) ? [[open, close] as [string, string]] : [];
  });
}
