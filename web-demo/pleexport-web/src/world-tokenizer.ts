import { AS_PUBLISHED, TokenizerError } from "./errors.js";
import type { TextStream } from "./text-stream.js";
import { checkUnicode, type Tokenizer } from "./tokenizer.js";

export const VOCABULARY = "rwkv_vocab_v20230424.txt";

/**
 * The World tokenizer of RWKV: the longest known piece of bytes at each place.
 *
 * Its vocabulary is a text file with a line for each token: an id, a Python literal of a string or of
 * bytes, and the number of its bytes. Id 0, which has no line, ends a text.
 */
export class WorldTokenizer implements Tokenizer {
  readonly size: number;
  readonly thoughtMarkers = [];
  private readonly pieces = new Map<number, Uint8Array>();
  /** By bytes, a character each. */
  private readonly ids = new Map<string, number>();
  /** By first byte, the lengths of the pieces that begin with it, longest first. */
  private readonly lengths: ReadonlyMap<string, readonly number[]>;

  /**
   * @param path of the file, to name it.
   * @throws TokenizerError the vocabulary is malformed.
   */
  constructor(
    private readonly path: string,
    vocabulary: string,
  ) {
    for (const line of vocabulary.split("\n")) this.readLine(line);
    const lengths = new Map<string, Set<number>>();
    for (const piece of this.ids.keys()) {
      const own = lengths.get(piece[0]!) ?? new Set();
      lengths.set(piece[0]!, own.add(piece.length));
    }
    this.lengths = new Map([...lengths].map(([first, own]) => [first, [...own].sort((a, b) => b - a)]));
    for (let byte = 0; byte < 256; byte++) {
      if (!this.ids.has(String.fromCharCode(byte))) {
        const what = `has no token for byte ${byte}, so some text has no ids`;
        throw new TokenizerError(`\`${path}\` ${what}`, AS_PUBLISHED);
      }
    }
    this.size = [...this.pieces.keys()].reduce((most, id) => Math.max(most, id), 0) + 1;
  }

  encode(text: string): number[] {
    checkUnicode(text);
    const bytes = characters(new TextEncoder().encode(text));
    const found: number[] = [];
    for (let at = 0; at < bytes.length; ) {
      for (const length of this.lengths.get(bytes[at]!)!) {
        const id = at + length <= bytes.length ? this.ids.get(bytes.slice(at, at + length)) : undefined;
        if (id === undefined) continue;
        found.push(id);
        at += length;
        break;
      }
    }
    return found;
  }

  decode(ids: readonly number[]): string {
    const stream = this.stream();
    return ids.map((id) => stream.push(id)).join("") + stream.flush();
  }

  stream(): TextStream {
    const decoder = new TextDecoder("utf-8", { ignoreBOM: true });
    return {
      push: (id) => decoder.decode(this.pieces.get(id) ?? new Uint8Array(0), { stream: true }),
      flush: () => decoder.decode(),
    };
  }

  specialText(): string {
    return "";
  }

  private readLine(line: string): void {
    const [first, last] = [line.indexOf(" "), line.lastIndexOf(" ")];
    if (first < 0) {
      if (line.trim() === "") return;
      throw this.malformed(`\`${line}\` is no token`);
    }
    const [id, size] = [wholeNumber(line.slice(0, first)), wholeNumber(line.slice(last + 1).trim())];
    const piece = last > first ? pythonLiteral(line.slice(first + 1, last).trim()) : null;
    if (id === null || piece === null || piece.length === 0 || piece.length !== size) {
      throw this.malformed(`token ${line.slice(0, first)} is not ${line.slice(last + 1)} bytes`);
    }
    this.pieces.set(id, piece);
    this.ids.set(characters(piece), id);
  }

  private malformed(why: string): TokenizerError {
    const what = `is not a vocabulary of RWKV's World tokenizer: ${why}`;
    return new TokenizerError(`\`${this.path}\` ${what}`, AS_PUBLISHED);
  }
}

function wholeNumber(text: string): number | null {
  return /^[0-9]{1,9}$/.test(text) ? Number(text) : null;
}

/** Bytes as a text with a character for each. */
function characters(bytes: Uint8Array): string {
  let text = "";
  for (const byte of bytes) text += String.fromCharCode(byte);
  return text;
}

const ESCAPES: ReadonlyMap<string, string> = new Map([
  ["n", "\n"],
  ["r", "\r"],
  ["t", "\t"],
  ["\\", "\\"],
  ["'", "'"],
  ['"', '"'],
  ["0", "\0"],
  ["a", "\x07"],
  ["b", "\b"],
  ["f", "\f"],
  ["v", "\v"],
]);
const DIGITS: ReadonlyMap<string, number> = new Map([
  ["x", 2],
  ["u", 4],
  ["U", 8],
]);

/** The bytes of a Python literal of a string (in UTF-8) or of bytes; null where it is none. */
function pythonLiteral(literal: string): Uint8Array | null {
  const isBytes = literal.startsWith("b");
  const text = isBytes ? literal.slice(1) : literal;
  const quote = text[0];
  if (text.length < 2 || (quote !== "'" && quote !== '"') || text.at(-1) !== quote) return null;
  let found = "";
  for (let at = 1; at < text.length - 1; ) {
    const character = text[at++]!;
    if (character !== "\\") {
      if (character === quote) return null;
      found += character;
      continue;
    }
    const escaped = text[at++]!;
    const digits = DIGITS.get(escaped);
    if (digits === undefined) {
      const meant = ESCAPES.get(escaped);
      if (meant === undefined) return null;
      found += meant;
    } else {
      const code = text.slice(at, Math.min(at + digits, text.length - 1));
      const number = /^[0-9A-Fa-f]+$/.test(code) && code.length === digits ? parseInt(code, 16) : Infinity;
      if (number > 0x10ffff) return null;
      found += String.fromCodePoint(number);
      at += digits;
    }
  }
  if (!isBytes) return new TextEncoder().encode(found);
  const codes = [...found].map((character) => character.codePointAt(0)!);
  return codes.every((code) => code < 256) ? Uint8Array.from(codes) : null;
}
