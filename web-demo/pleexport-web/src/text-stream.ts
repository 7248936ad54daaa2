/** Ids to text as they come: what was said is never taken back, and all of it is what `decode` says. */
export interface TextStream {
  /** The text that this id completes; "" where what follows may still change it. */
  push(id: number): string;
  /** What is still held back when the text ends. */
  flush(): string;
}

/** What a stream has to know of its tokenizer. */
export interface Decoding {
  /** The text of ids, special tokens left out. */
  plainText(ids: readonly number[]): string;
  /** Whether an id is a byte of a byte-fallback decoder. */
  isByte(id: number): boolean;
  /** Whether `plainText` passes an id over. */
  isSilent(id: number): boolean;
}

/** A text ends with this where its last character is not whole yet, or never will be. */
const REPLACEMENT = "\uFFFD";
/** How much of a prompt is looked at for an id that can stand before a text. */
const PROMPT_IDS = 8;

/**
 * The text of ids by a decoder that is known by what it decodes.
 *
 * Joined, the pieces are what `decode` makes of all ids. After a prompt they are how its text goes on:
 * some decoders drop a space at the beginning of a text, and this is not one. Of a character that a
 * prompt has begun, only the ids that follow count.
 */
export class DecodedStream implements TextStream {
  private before: readonly number[];
  private ids: number[] = [];

  constructor(
    private readonly tokenizer: Decoding,
    promptIds: readonly number[],
  ) {
    this.before = this.anchor(promptIds);
  }

  push(id: number): string {
    if (this.tokenizer.isSilent(id)) return "";
    this.ids.push(id);
    if (this.tokenizer.isByte(id)) return ""; // the run may go on
    const text = this.text();
    return text === null || text.endsWith(REPLACEMENT) ? "" : this.said(text);
  }

  flush(): string {
    return this.said(this.text() ?? "");
  }

  /** What the waiting ids add to those before them; null where that is not settled yet. */
  private text(): string | null {
    const known = this.tokenizer.plainText(this.before);
    const text = this.tokenizer.plainText([...this.before, ...this.ids]);
    return text.startsWith(known) ? text.slice(known.length) : null;
  }

  private said(text: string): string {
    if (text !== "") {
      this.before = this.ids;
      this.ids = [];
    }
    return text;
  }

  /** The last id of the prompt that has a text of its own, so that it is not said again. */
  private anchor(promptIds: readonly number[]): number[] {
    for (const id of promptIds.slice(-PROMPT_IDS).reverse()) {
      if (this.tokenizer.isSilent(id) || this.tokenizer.isByte(id)) continue;
      const text = this.tokenizer.plainText([id]);
      if (text !== "" && !text.includes(REPLACEMENT)) return [id];
    }
    return [];
  }
}

/** What cleaning changes begins with a space and cannot reach across the end of such a word. */
const WORD_END = /[^\s.,?!']{3,}(?=\s)/gu;

/** A stream whose text is cleaned as `clean` does it. */
export class CleanedStream implements TextStream {
  private held = "";

  constructor(private readonly stream: TextStream) {}

  push(id: number): string {
    this.held += this.stream.push(id);
    const ends = [...this.held.matchAll(WORD_END)].map((match) => match.index + match[0].length);
    return this.shown(ends.at(-1) ?? 0);
  }

  flush(): string {
    this.held += this.stream.flush();
    return this.shown(this.held.length);
  }

  private shown(length: number): string {
    const text = this.held.slice(0, length);
    this.held = this.held.slice(length);
    return clean(text);
  }
}

/**
 * A text without the spaces that some decoders leave before punctuation.
 *
 * Source: `clean_up_tokenization` of transformers; the order counts.
 */
export function clean(text: string): string {
  let cleaned = text;
  for (const mark of [".", "?", "!", ","]) cleaned = cleaned.replaceAll(` ${mark}`, mark);
  cleaned = cleaned.replaceAll(" ' ", "'");
  for (const ending of ["n't", "'m", "'s", "'ve", "'re"]) cleaned = cleaned.replaceAll(` ${ending}`, ending);
  return cleaned;
}
