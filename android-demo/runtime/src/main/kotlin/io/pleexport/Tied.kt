package io.pleexport

import java.io.File
import java.nio.FloatBuffer

/** The file's name in a bundle. */
internal const val TIED = "tied.safetensors"

/**
 * A table whose rows are those of a mapped matrix that is multiplied by too. Opening it reads its
 * header only.
 *
 * @throws BlobError the file breaks a rule of docs/blob-format.md.
 * @throws CheckFailed its header does not match its checksum.
 */
internal class TiedRows(val file: File) {
    val segment: Segment
    val weightsDigest: String
    val numRows: Long
    private val codes: MappedRows
    private val scales: MappedRows
    private val checksums: MappedRows
    private val decoder: SegmentDecoder
    private val row: ByteArray

    init {
        val opened = SafetensorsFile(file)
        val metadata = TiedHeader(opened).read()
        weightsDigest = metadata.weightsDigest
        numRows = opened.entry("codes").shape[0]
        codes = rows(opened, "codes")
        scales = rows(opened, "scales")
        checksums = rows(opened, "checksums")
        segment =
            Segment(
                name = metadata.table,
                table = metadata.table,
                layer = null,
                offset = 0,
                width = metadata.width,
                dtype = metadata.dtype,
                groupSize = metadata.groupSize,
                scaleDtype = "fp32",
                scaleOffset = codes.rowBytes.toLong(),
                multiplier = metadata.multiplier,
            )
        decoder = SegmentDecoder(segment, zeroPoint = true)
        row = ByteArray(codes.rowBytes + scales.rowBytes + 8)
    }

    /**
     * Appends the vector of a row, multiplied once.
     *
     * @throws CheckFailed the row does not match its checksum.
     */
    fun decode(rowId: Long, out: FloatBuffer) {
        read(rowId)
        decoder.decode(row, 0, codes.rowBytes, out)
    }

    /** Compares a row with its checksum, and leaves its codes and scales in `row`. */
    private fun read(rowId: Long) {
        val checksumAt = codes.rowBytes + scales.rowBytes
        checksums.read(rowId, row, checksumAt)
        val stored = littleEndian(row).getLong(checksumAt)
        codes.read(rowId, row)
        scales.read(rowId, row, codes.rowBytes)
        littleEndian(row).putLong(checksumAt, rowId)
        if (Xxh3.hash(row) != stored) {
            throw CheckFailed(
                "`$file` is damaged: the row of token id $rowId does not match its checksum (T-09)",
                "copy the bundle again, or rebuild it",
            )
        }
    }

    /** Asks for the pages of a row, in all three places. */
    fun load(rowId: Long) {
        codes.load(rowId)
        scales.load(rowId)
        checksums.load(rowId)
    }

    /** Compares every row with its checksum. */
    fun verify() {
        for (rowId in 0 until numRows) read(rowId)
    }

    private fun rows(opened: SafetensorsFile, name: String): MappedRows {
        val entry = opened.entry(name)
        return MappedRows(file, entry.offset, (entry.bytes / numRows).toInt(), numRows)
    }
}

private class TiedMetadata(
    val table: String,
    val width: Long,
    val dtype: String,
    val groupSize: Long,
    val multiplier: Double,
    val weightsDigest: String,
)

private class TiedHeader(private val file: SafetensorsFile) {
    fun read(): TiedMetadata {
        if (file.metadata["format"] != "pleexport-tied") {
            throw broken("is a safetensors file, but none of a matrix with rows (T-02)")
        }
        // Before the version: a damaged one must not look like a newer one.
        if (headerIsDamaged(file)) {
            throw CheckFailed(
                "`${file.file}` is damaged: its header does not match its checksum (T-06)",
                DAMAGED,
            )
        }
        val version = file.metadata["version"]
        if (version != "1") {
            throw broken("has version ${quoted(version)}; this reader knows 1 (T-03)", NEWER)
        }
        val metadata =
            try {
                metadata()
            } catch (err: MalformedJson) {
                throw broken("has malformed metadata: ${err.message} (T-04)")
            }
        if (metadata.dtype !in CODED) {
            throw broken(
                "has dtype `${metadata.dtype}`, which this reader does not know (T-04)",
                NEWER,
            )
        }
        if (!(Math.abs(metadata.multiplier) <= Float.MAX_VALUE)) {
            throw broken("has multiplier ${metadata.multiplier} (T-04)")
        }
        checkTensors(metadata)
        return metadata
    }

    private fun metadata() =
        fieldsOf(file.metadata, "$") {
            required("format", ::string)
            required("version", ::string)
            TiedMetadata(
                table = required("table", ::string),
                width = required("width") { text, path -> atLeast(1)(parsed(text), path) },
                dtype = required("dtype", ::string),
                groupSize = required("group_size") { text, path -> atLeast(1)(parsed(text), path) },
                multiplier = required("multiplier") { text, path -> number(parsed(text), path) },
                weightsDigest = required("weights_digest", ::string),
            )
        }

    private fun parsed(text: Any?): Any? = parseJson(text as String)

    private fun checkTensors(metadata: TiedMetadata) {
        val inOrder = file.entries.values.sortedBy { it.offset }
        if (inOrder.map { it.name to (it.dtype to it.shape.size) } != TENSORS) {
            val names = TENSORS.joinToString { it.first }
            throw broken("does not have the tensors $names, in order (T-01)")
        }
        val rows = file.entry("codes").shape[0]
        if (rows == 0L) throw broken("has no rows (T-05)")
        val numGroups = groups(metadata.width, metadata.groupSize)
        val codeBytes =
            try {
                val elements = Math.multiplyExact(numGroups, metadata.groupSize)
                groups(Math.multiplyExact(elements, BITS.getValue(metadata.dtype).toLong()), 8)
            } catch (err: ArithmeticException) {
                Long.MAX_VALUE
            }
        val shapes =
            mapOf(
                HEADER_CHECKSUM to listOf(1L),
                "codes" to listOf(rows, codeBytes),
                "scales" to listOf(rows, numGroups),
                "checksums" to listOf(rows),
            )
        for ((name, shape) in shapes) {
            if (file.entry(name).shape != shape) {
                throw broken(
                    "has tensor `$name` of shape ${file.entry(name).shape}; a row of " +
                        "${metadata.width} elements in groups of ${metadata.groupSize} needs " +
                        "$shape (T-05)"
                )
            }
        }
        if (codeBytes > LARGEST || numGroups > LARGEST / 4) {
            throw broken("has rows of $codeBytes bytes; this reader maps up to $LARGEST at once")
        }
    }

    private fun broken(what: String, hint: String = DAMAGED) =
        BlobError("`${file.file}`: $what", hint)

    private companion object {
        const val DAMAGED = "copy the bundle again, or rebuild it"
        const val NEWER = "install a newer pleexport"
        const val LARGEST = 1L shl 29
        val TENSORS =
            listOf(
                HEADER_CHECKSUM to ("uint64" to 1),
                "codes" to ("uint8" to 2),
                "scales" to ("fp32" to 2),
                "checksums" to ("uint64" to 1),
            )
    }
}
