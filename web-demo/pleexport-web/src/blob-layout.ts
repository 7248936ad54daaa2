/** Bits of a stored element, by dtype. */
export const BITS: Readonly<Record<string, number>> = Object.assign(Object.create(null), {
  fp32: 32,
  fp16: 16,
  bf16: 16,
  int8: 8,
  int4: 4,
  int2: 2,
});
export const CODED: ReadonlySet<string> = new Set(["int8", "int4", "int2"]);

/** One table's slice of a row; docs/blob-format.md says what its fields mean. */
export interface Segment {
  readonly name: string;
  readonly table: string;
  /** Null for a table that belongs to no layer. */
  readonly layer: number | null;
  /** Byte of the row at which the codes begin. */
  readonly offset: number;
  readonly width: number;
  readonly dtype: string;
  /** Elements that share a scale; null for floating-point dtypes, like the next two. */
  readonly groupSize: number | null;
  readonly scaleDtype: string | null;
  readonly scaleOffset: number | null;
  /** Applied once to the decoded values. */
  readonly multiplier: number;
}

/** Bytes of the codes. */
export function codeBytes(segment: Segment): number {
  return Math.ceil((segment.width * BITS[segment.dtype]!) / 8);
}

/** First byte of the row behind the segment. */
export function endOf(segment: Segment): number {
  const { groupSize, scaleDtype, scaleOffset } = segment;
  if (groupSize === null || scaleDtype === null || scaleOffset === null) {
    return segment.offset + codeBytes(segment);
  }
  return scaleOffset + (Math.ceil(segment.width / groupSize) * BITS[scaleDtype]!) / 8;
}

/** What a token id looks up in the segments of one table: `[width]` or `[layers, width]`. */
export function shapeOf(run: readonly Segment[]): number[] {
  const first = run[0]!;
  return first.layer === null ? [first.width] : [run.length, first.width];
}
