import { BITS, type Segment } from "./blob-layout.js";
import { viewOf } from "./safetensors.js";

/** By its bits, each binary16 as a binary32. */
const HALVES = Float32Array.from({ length: 1 << 16 }, (_, bits) => {
  const sign = bits & 0x8000 ? -1 : 1;
  const exponent = (bits >> 10) & 31;
  const fraction = bits & 1023;
  if (exponent === 0) return sign * fraction * 2 ** -24;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return sign * (1 + fraction / 1024) * 2 ** (exponent - 15);
});

/** Turns stored elements into values, as docs/blob-format.md says: in binary32, in its order. */
export class SegmentDecoder {
  private readonly values: Float32Array;
  private readonly bits: Uint32Array;
  private readonly multiplier: Float32Array;

  /** @param storedPlus128 codes of 8 bits are so in the file of a tied head, and signed in a blob. */
  constructor(
    private readonly segment: Segment,
    private readonly storedPlus128 = false,
  ) {
    this.values = new Float32Array(segment.width);
    this.bits = new Uint32Array(this.values.buffer);
    this.multiplier = Float32Array.of(segment.multiplier);
  }

  /**
   * Puts the vector of a segment at a place of `out`.
   *
   * @param row its bytes.
   * @param codes byte at which the codes begin.
   * @param scales byte at which the scales begin; of no meaning for floating-point dtypes.
   */
  decode(row: Uint8Array, codes: number, scales: number, out: Float32Array, at: number): void {
    const { values, bits } = this;
    const { dtype, width } = this.segment;
    const view = viewOf(row);
    switch (dtype) {
      case "fp32":
        // As bits: a number that is none keeps them.
        for (let e = 0; e < width; e++) bits[e] = view.getUint32(codes + 4 * e, true);
        break;
      case "fp16":
        for (let e = 0; e < width; e++) values[e] = HALVES[view.getUint16(codes + 2 * e, true)]!;
        break;
      case "bf16":
        for (let e = 0; e < width; e++) bits[e] = view.getUint16(codes + 2 * e, true) << 16;
        break;
      default:
        this.unpack(row, codes);
        this.scale(view, scales);
    }
    const multiplier = this.multiplier[0]!;
    // A product of two binary32 numbers is exact in binary64, and rounded once when it is stored.
    for (let e = 0; e < width; e++) out[at + e] = values[e]! * multiplier;
  }

  private unpack(row: Uint8Array, codes: number): void {
    const { values } = this;
    const { dtype, width } = this.segment;
    if (dtype === "int8") {
      const flip = this.storedPlus128 ? 0x80 : 0;
      for (let e = 0; e < width; e++) values[e] = ((row[codes + e]! ^ flip) << 24) >> 24;
    } else if (dtype === "int4") {
      for (let e = 0; e < width; e++) {
        values[e] = ((row[codes + (e >> 1)]! >> ((e & 1) << 2)) & 15) - 8;
      }
    } else {
      for (let e = 0; e < width; e++) {
        values[e] = ((row[codes + (e >> 2)]! >> ((e & 3) << 1)) & 3) - 2;
      }
    }
  }

  private scale(view: DataView, scales: number): void {
    const { values } = this;
    const { width, scaleDtype } = this.segment;
    const size = Math.min(this.segment.groupSize!, width);
    const bytes = BITS[scaleDtype!]! / 8;
    for (let begin = 0, place = scales; begin < width; begin += size, place += bytes) {
      const scale = bytes === 2 ? HALVES[view.getUint16(place, true)]! : view.getFloat32(place, true);
      const end = Math.min(begin + size, width);
      for (let e = begin; e < end; e++) values[e] = values[e]! * scale;
    }
  }
}
