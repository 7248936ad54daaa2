/** How far what a page needs before its first word has come, in bytes. */
export interface Progress {
  /** Of all that is needed: runtime, graph and weights, tokenizer, and rows that texts use most. */
  readonly neededBytes: number;
  /** Of these, what is here. */
  readonly hereBytes: number;
  /** Of what is here, what was kept from an earlier time. */
  readonly keptBytes: number;
}

/** Tells how far files have come. */
export class Loading {
  /** By name. */
  private readonly files = new Map<string, { size: number; here: number; isKept: boolean }>();

  constructor(private readonly tell: (progress: Progress) => void) {}

  /** A file will be needed. */
  need(name: string, size: number): void {
    if (!this.files.has(name)) this.set(name, size, 0, false);
  }

  /** A file will not be needed after all. */
  leaveOut(name: string): void {
    if (this.files.delete(name)) this.tellSums();
  }

  /** A file begins to arrive, or the rest of one; its size is null where nobody says it. */
  begin(name: string, size: number | null, here = 0): void {
    this.set(name, size ?? this.files.get(name)?.size ?? 0, here, false);
  }

  /** More bytes of a file have arrived. */
  arrived(name: string, bytes: number): void {
    const { size, here } = this.files.get(name) ?? { size: 0, here: 0 };
    this.set(name, Math.max(size, here + bytes), here + bytes, false);
  }

  /** A file is here from an earlier time. */
  kept(name: string, size: number): void {
    this.set(name, size, size, true);
  }

  private set(name: string, size: number, here: number, isKept: boolean): void {
    this.files.set(name, { size, here, isKept });
    this.tellSums();
  }

  private tellSums(): void {
    const sum = (of: (file: { size: number; here: number; isKept: boolean }) => number): number =>
      [...this.files.values()].reduce((total, file) => total + of(file), 0);
    this.tell({
      neededBytes: sum((file) => file.size),
      hereBytes: sum((file) => file.here),
      keptBytes: sum((file) => (file.isKept ? file.here : 0)),
    });
  }
}
