// Where `@huggingface/tokenizers` does otherwise than the original, and what it has that nobody has
// compared with it.
import type { Tokenizer as Library } from "@huggingface/tokenizers";

type Fields = Readonly<Record<string, unknown>>;

/** By part of a tokenizer.json, the steps that give the original's ids and texts. */
const KNOWN: Readonly<Record<string, readonly string[]>> = {
  normalizer: ["Sequence", "NFC", "NFD", "NFKC", "NFKD", "Replace", "Prepend"],
  pre_tokenizer: ["Sequence", "ByteLevel", "Split", "Digits", "Metaspace"],
  post_processor: ["Sequence", "ByteLevel", "TemplateProcessing"],
  decoder: ["Sequence", "ByteLevel", "ByteFallback", "Fuse", "Replace", "Strip", "Metaspace"],
};
const SEQUENCES = ["normalizers", "pretokenizers", "processors", "decoders"];
const ABSENT: readonly unknown[] = [undefined, null, "", 0];

function isFields(value: unknown): value is Fields {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

/** The steps of a part; those of a sequence stand behind it. */
export function stepsOf(part: unknown): Fields[] {
  if (!isFields(part)) return [];
  const lists = SEQUENCES.map((name) => part[name]).filter(Array.isArray);
  return [part, ...lists.flat().flatMap(stepsOf)];
}

/** The first part that is not known here; null where all are. */
export function unknownPart(file: Fields): string | null {
  const model = isFields(file["model"]) ? file["model"] : {};
  const type = model["type"] ?? "BPE";
  if (type !== "BPE" || Array.isArray(model["vocab"])) return `the model \`${String(type)}\``;
  for (const name of ["dropout", "continuing_subword_prefix", "end_of_word_suffix"]) {
    if (!ABSENT.includes(model[name])) return `\`${name}\``;
  }
  for (const [part, known] of Object.entries(KNOWN)) {
    const step = stepsOf(file[part]).find((own) => !known.includes(String(own["type"])));
    if (step !== undefined) return `the ${part.replace("_", "-")} \`${String(step["type"])}\``;
  }
  const added = Array.isArray(file["added_tokens"]) ? file["added_tokens"] : [];
  const single = added.find((token) => isFields(token) && token["single_word"] === true);
  return single === undefined ? null : `the single word \`${String(single["content"])}\``;
}

/** What is reached of the library's pre-tokenizers. */
interface PreTokenizer {
  readonly tokenizers?: readonly (PreTokenizer | null)[];
  readonly pattern?: RegExp | null;
  pre_tokenize_text(text: string, options?: unknown): string[];
}

/** What is reached of the library's decoders. */
interface Decoder {
  readonly decoders?: readonly (Decoder | null)[];
  /** Of byte-level tokens, by character. */
  readonly byte_decoder?: Readonly<Record<string, number | undefined>>;
  text_decoder?: { decode(bytes: Uint8Array): string };
  decode_chain(tokens: string[]): string[];
}

/** Makes the library do what the original does with a file. */
export function correct(library: Library, file: Fields): void {
  correctPreTokenizer(library.pre_tokenizer as PreTokenizer | null, file["pre_tokenizer"]);
  correctFirst(library as unknown as Pieces);
  correctDecoder(library.decoder as Decoder | null, file["decoder"]);
}

/** Drops the parsed file, which the library holds on to and does not look at again. */
export function release(library: Library): void {
  const { model } = library as unknown as { model: { config: unknown; merges: unknown } };
  Object.assign(library, { tokenizer: null });
  Object.assign(model, { config: null, merges: null });
}

/** What is reached of the library to know which piece begins a text. */
interface Pieces {
  pre_tokenizer: ((text: string, options: { section_index?: number }) => string[]) | null;
  readonly splitter_normalized: { split(text: string): string[] };
  readonly added_tokens_map: ReadonlyMap<string, { readonly lstrip: boolean }>;
}

/** Behind a token that was found in normalized text, the library takes a piece for a text's first. */
function correctFirst(library: Pieces): void {
  const { pre_tokenizer: words, splitter_normalized: splitter, added_tokens_map: added } = library;
  if (words === null) return;
  const splitBefore = splitter.split.bind(splitter);
  let isFirst = false;
  splitter.split = (text) => {
    const pieces = splitBefore(text);
    const [first = "", second = ""] = pieces;
    const left = added.get(second)?.lstrip === true ? first.trimEnd() : first;
    isFirst = left !== "" && !added.has(first);
    return pieces;
  };
  library.pre_tokenizer = (text, { section_index: section = 0 }) => {
    const index = isFirst ? section : section + 1;
    isFirst = false;
    return words(text, { section_index: index });
  };
}

function correctPreTokenizer(step: PreTokenizer | null, part: unknown): void {
  if (step === null || !isFields(part)) return;
  const own = Array.isArray(part["pretokenizers"]) ? part["pretokenizers"] : [];
  step.tokenizers?.forEach((inner, i) => correctPreTokenizer(inner, own[i]));
  if (part["type"] === "Digits") {
    const digits = part["individual_digits"] === true ? /\p{N}/gu : /\p{N}+/gu;
    step.pre_tokenize_text = (text) => split(text, digits, "Isolated");
  }
  if (part["type"] === "Split" && part["invert"] !== true && step.pattern instanceof RegExp) {
    const { pattern } = step;
    const behavior = String(part["behavior"]);
    step.pre_tokenize_text = (text) => split(text, pattern, behavior);
  }
  if (part["type"] === "Metaspace" && part["split"] !== false) {
    const marked = step.pre_tokenize_text.bind(step);
    const mark = new RegExp(escaped(String(part["replacement"] ?? "\u2581")), "gu");
    step.pre_tokenize_text = (text, options) => {
      return marked(text, options).flatMap((piece) => split(piece, mark, "MergedWithNext"));
    };
  }
}

function escaped(text: string): string {
  return text.replace(/[\\^$.*+?()[\]{}|/-]/g, "\\$&");
}

/** Parts a text at what a pattern matches. The library knows two behaviours of five. */
function split(text: string, pattern: RegExp, behavior: string): string[] {
  const parts: { text: string; isMatch: boolean }[] = [];
  let end = 0;
  for (const { 0: match, index } of text.matchAll(pattern)) {
    if (index > end) parts.push({ text: text.slice(end, index), isMatch: false });
    if (match !== "") parts.push({ text: match, isMatch: true });
    end = index + match.length;
  }
  if (end < text.length) parts.push({ text: text.slice(end), isMatch: false });
  const found: string[] = [];
  parts.forEach((part, i) => {
    const before = parts[i - 1];
    const joins =
      (behavior === "Contiguous" && part.isMatch && before?.isMatch) ||
      (behavior === "MergedWithPrevious" && part.isMatch && before?.isMatch === false) ||
      (behavior === "MergedWithNext" && !part.isMatch && before?.isMatch);
    if (joins) found.push(found.pop()! + part.text);
    else if (behavior !== "Removed" || !part.isMatch) found.push(part.text);
  });
  return found;
}

const LOSSY = new TextDecoder("utf-8", { ignoreBOM: true });
const STRICT = new TextDecoder("utf-8", { ignoreBOM: true, fatal: true });

function correctDecoder(step: Decoder | null, part: unknown): void {
  if (step === null || !isFields(part)) return;
  const own = Array.isArray(part["decoders"]) ? part["decoders"] : [];
  step.decoders?.forEach((inner, i) => correctDecoder(inner, own[i]));
  // Of a run that is not UTF-8 as a whole, each byte is one U+FFFD.
  if (part["type"] === "ByteFallback") step.text_decoder = { decode: allOrNothing };
  if (part["type"] === "ByteLevel") {
    // An added token too stands for bytes, where each of its characters does.
    const bytesOf = (token: string): Iterable<number> => {
      const bytes = [...token].map((character) => step.byte_decoder?.[character]);
      return bytes.every((byte) => byte !== undefined) ? (bytes as number[]) : new TextEncoder().encode(token);
    };
    step.decode_chain = (tokens) => [LOSSY.decode(Uint8Array.from(tokens.flatMap((token) => [...bytesOf(token)])))];
  }
  if (part["type"] === "Metaspace" && (part["prepend_scheme"] === "never" || part["add_prefix_space"] === false)) {
    const mark = String(part["replacement"] ?? "\u2581");
    step.decode_chain = (tokens) => tokens.map((token) => token.replaceAll(mark, " "));
  }
}

function allOrNothing(bytes: Uint8Array): string {
  try {
    return STRICT.decode(bytes);
  } catch {
    return "\uFFFD".repeat(bytes.length);
  }
}
