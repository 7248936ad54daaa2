package io.pleexport

internal const val CHUNK_BYTES = 1 shl 20

/** Bits of a stored element, by dtype. */
internal val BITS =
    mapOf("fp32" to 32, "fp16" to 16, "bf16" to 16, "int8" to 8, "int4" to 4, "int2" to 2)
internal val CODED = setOf("int8", "int4", "int2")

/** How many groups of a size it takes. */
internal fun groups(count: Long, size: Long): Long = count / size + if (count % size == 0L) 0 else 1

/**
 * One table's slice of a row; docs/blob-format.md says what its fields mean.
 *
 * @property offset byte of the row at which the codes begin.
 * @property layer null for a table that belongs to no layer.
 * @property groupSize elements that share a scale; null for floating-point dtypes, like the next
 *   two.
 * @property multiplier applied once to the decoded values.
 */
data class Segment(
    val name: String,
    val table: String,
    val layer: Long?,
    val offset: Long,
    val width: Long,
    val dtype: String,
    val groupSize: Long?,
    val scaleDtype: String?,
    val scaleOffset: Long?,
    val multiplier: Double,
) {
    /** Bytes of the codes. */
    internal val codeBytes: Long
        get() = groups(Math.multiplyExact(width, BITS.getValue(dtype).toLong()), 8)

    /** First byte of the row behind the segment. */
    internal val end: Long
        get() {
            if (groupSize == null || scaleDtype == null || scaleOffset == null) {
                return Math.addExact(offset, codeBytes)
            }
            val bytes = groups(width, groupSize) * (BITS.getValue(scaleDtype) / 8)
            return Math.addExact(scaleOffset, bytes)
        }
}

/** The segments of one table, in the order of layers. */
internal class Run(val segments: List<Segment>) {
    val first: Segment
        get() = segments[0]

    /** What a token id looks up: `[width]` or `[layers, width]`. */
    val shape: List<Int>
        get() =
            if (first.layer == null) listOf(first.width.toInt())
            else listOf(segments.size, first.width.toInt())
}
