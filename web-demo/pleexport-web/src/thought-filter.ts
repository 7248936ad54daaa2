import { overlap } from "./stopping.js";
import type { Token } from "./stats.js";
import type { Tokenizer } from "./tokenizer.js";

type Marker = readonly [open: string, close: string];

/** What stands around thoughts in the text of models: in tags, and in Gemma 4's channel. */
const MARKERS: readonly Marker[] = [
  ["<think>", "</think>"],
  ["<|channel>thought", "<channel|>"],
];
/** How many ids of a prompt can hold a marker at its end. */
const PROMPT_IDS = 16;

/** Shows the text of an answer without the model's thoughts. */
export class ThoughtFilter {
  private readonly markers: readonly Marker[];
  private readonly specials = new Set<string>();
  private held = "";
  private isInside: boolean;
  private isAfterThought = false;

  /**
   * @param tokenizer knows special tokens, and what else its folder says about thoughts.
   * @param promptIds what the answer follows; it may have begun a thought.
   */
  constructor(
    private readonly tokenizer: Tokenizer,
    promptIds: readonly number[],
  ) {
    this.markers = [...MARKERS, ...tokenizer.thoughtMarkers];
    const prompt = tokenizer.decode(promptIds.slice(-PROMPT_IDS), { withSpecials: true }).trimEnd();
    this.isInside = this.markers.some(([open]) => prompt.endsWith(open));
  }

  /** What people see of a token. */
  push(token: Token): string {
    // A marker may be a special token, whose text nobody sees otherwise.
    const special = this.tokenizer.specialText(token.id);
    const isPart = special !== "" && this.markers.flat().some((marker) => marker.includes(special));
    if (isPart) this.specials.add(special);
    this.held += token.text + (isPart ? special : "");
    let shown = "";
    for (let found = this.next(); found !== null; found = this.next()) {
      shown += this.visible(this.held.slice(0, found.begin));
      this.held = this.held.slice(found.begin + found.marker.length);
      this.isInside = !this.isInside;
      this.isAfterThought = !this.isInside;
    }
    const cut = this.held.length - Math.max(...this.expected().map((marker) => overlap(this.held, marker)));
    shown += this.visible(this.held.slice(0, cut));
    this.held = this.held.slice(cut);
    return shown;
  }

  /** What is still held back when the answer ends. */
  flush(): string {
    const shown = this.visible(this.held);
    this.held = "";
    return shown;
  }

  /** The first marker that is held; of those at one place, the shortest. */
  private next(): { begin: number; marker: string } | null {
    const found = this.expected()
      .map((marker) => ({ begin: this.held.indexOf(marker), marker }))
      .filter(({ begin }) => begin >= 0)
      .sort((a, b) => a.begin - b.begin || a.marker.length - b.marker.length);
    return found[0] ?? null;
  }

  private expected(): string[] {
    return this.markers.map(([open, close]) => (this.isInside ? close : open));
  }

  private visible(given: string): string {
    if (this.isInside) return "";
    let text = given;
    for (const special of this.specials) text = text.replaceAll(special, "");
    if (this.isAfterThought) {
      text = text.trimStart();
      this.isAfterThought = text === "";
    }
    return text;
  }
}
