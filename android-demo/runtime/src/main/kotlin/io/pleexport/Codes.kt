package io.pleexport

import java.nio.FloatBuffer

/** Turns stored elements into values, as docs/blob-format.md says: in binary32, in its order. */
internal class SegmentDecoder(private val segment: Segment, zeroPoint: Boolean = false) {
    private val width = segment.width.toInt()
    private val values = FloatArray(width)
    private val multiplier = segment.multiplier.toFloat()
    private val groupSize = segment.groupSize?.coerceAtMost(segment.width)?.toInt() ?: width
    private val scaleBytes = segment.scaleDtype?.let { BITS.getValue(it) / 8 } ?: 0

    // Codes of 8 bits are signed in a blob, and stored plus 128 in the file of a tied head.
    private val flip = if (zeroPoint) 0x80 else 0

    /**
     * Appends the vector of a segment.
     *
     * @param row its bytes.
     * @param codes byte at which the codes begin.
     * @param scales byte at which the scales begin; of no meaning for floating-point dtypes.
     */
    fun decode(row: ByteArray, codes: Int, scales: Int, out: FloatBuffer) {
        when (segment.dtype) {
            "fp32" -> for (e in 0 until width) values[e] = fp32(row, codes + 4 * e)
            "fp16" -> for (e in 0 until width) values[e] = fp16(row, codes + 2 * e)
            "bf16" ->
                for (e in 0 until width) {
                    values[e] = Float.fromBits(u16(row, codes + 2 * e) shl 16)
                }
            "int8" ->
                scaled(row, scales) { e -> (row[codes + e].toInt() xor flip).toByte().toInt() }
            "int4" ->
                scaled(row, scales) { e ->
                    ((row[codes + (e shr 1)].toInt() shr ((e and 1) shl 2)) and 15) - 8
                }
            else ->
                scaled(row, scales) { e ->
                    ((row[codes + (e shr 2)].toInt() shr ((e and 3) shl 1)) and 3) - 2
                }
        }
        for (e in 0 until width) values[e] *= multiplier
        out.put(values, 0, width)
    }

    private inline fun scaled(row: ByteArray, scales: Int, code: (Int) -> Int) {
        var element = 0
        var place = scales
        while (element < width) {
            val scale = if (scaleBytes == 2) fp16(row, place) else fp32(row, place)
            val end = minOf(element + groupSize, width)
            while (element < end) {
                values[element] = code(element) * scale
                element++
            }
            place += scaleBytes
        }
    }
}

private fun u16(row: ByteArray, at: Int): Int =
    (row[at].toInt() and 0xff) or ((row[at + 1].toInt() and 0xff) shl 8)

private fun fp32(row: ByteArray, at: Int): Float =
    Float.fromBits(u16(row, at) or (u16(row, at + 2) shl 16))

/** A binary16; neither JDK 17 nor Android before API 26 converts one. */
private fun fp16(row: ByteArray, at: Int): Float {
    val bits = u16(row, at)
    val sign = (bits and 0x8000) shl 16
    val exponent = (bits shr 10) and 31
    val fraction = bits and 1023
    return when (exponent) {
        // Subnormal: the fraction in units of 2^-24.
        0 -> Float.fromBits(sign or (fraction * 5.9604645E-8f).toRawBits())
        31 -> Float.fromBits(sign or 0x7f800000 or (fraction shl 13))
        else -> Float.fromBits(sign or ((exponent + 112) shl 23) or (fraction shl 13))
    }
}
