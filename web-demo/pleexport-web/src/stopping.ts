import type { TextStream } from "./text-stream.js";

/** Holds text back while it may be the beginning of a stop string. */
export class StopStrings {
  /** Whether a stop string was met. */
  hit = false;
  private readonly stops: readonly string[];
  private held = "";

  constructor(stops: readonly string[]) {
    this.stops = stops.filter((stop) => stop !== "");
  }

  /** Text that is safe to show. */
  push(text: string): string {
    this.held += text;
    const found = this.stops.map((stop) => this.held.indexOf(stop)).filter((at) => at >= 0);
    if (found.length > 0) {
      this.hit = true;
      const shown = this.held.slice(0, Math.min(...found));
      this.held = "";
      return shown;
    }
    const keep = Math.max(0, ...this.stops.map((stop) => overlap(this.held, stop)));
    const shown = this.held.slice(0, this.held.length - keep);
    this.held = this.held.slice(shown.length);
    return shown;
  }

  /** What is still held back when the text ends. */
  flush(): string {
    const shown = this.held;
    this.held = "";
    return shown;
  }
}

/** The text of an answer as its ids come, up to a stop string. */
export class AnswerText {
  private readonly stops: StopStrings;

  /** @param stream makes text of ids; without one there is none. */
  constructor(
    private readonly stream: TextStream | null,
    stops: readonly string[],
  ) {
    this.stops = new StopStrings(stops);
  }

  /** Whether a stop string was met. */
  get stopped(): boolean {
    return this.stops.hit;
  }

  /** Text that is safe to show. */
  push(id: number): string {
    return this.stream === null ? "" : this.stops.push(this.stream.push(id));
  }

  /** What is still held back when the text ends. */
  flush(): string {
    if (this.stream === null || this.stopped) return "";
    const shown = this.stops.push(this.stream.flush());
    return this.stopped ? shown : shown + this.stops.flush();
  }
}

/** Length of the longest end of a text that begins a marker, and is not all of it. */
export function overlap(text: string, marker: string): number {
  for (let length = Math.min(text.length, marker.length - 1); length > 0; length--) {
    if (marker.startsWith(text.slice(text.length - length))) return length;
  }
  return 0;
}
