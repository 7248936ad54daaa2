package io.pleexport

import java.io.File
import java.nio.FloatBuffer
import java.util.concurrent.Callable
import java.util.concurrent.ExecutorService
import java.util.concurrent.Executors

/**
 * A memory-mapped blob. Opening it reads its header only; every lookup checks its rows. One thread
 * at a time looks up.
 *
 * @throws BlobError the file breaks a rule of docs/blob-format.md.
 * @throws CheckFailed its header does not match its checksum.
 */
class Blob internal constructor(val file: File, private val tied: TiedRows?, mapBytes: Long) :
    AutoCloseable {
    /** A blob whose tables are all in it. */
    constructor(file: File) : this(file, null, MAP_BYTES)

    internal constructor(file: File, tied: TiedRows?) : this(file, tied, MAP_BYTES)

    private val opened = SafetensorsFile(file)
    private val header = readHeader(opened)
    private val rows =
        MappedRows(file, opened.entry("rows").offset, header.rowStride, header.numRows, mapBytes)
    private val decoders = header.runs.mapValues { (_, run) -> SegmentDecoder(run.first) }
    private val row = ByteArray(header.rowStride)
    private val readers: Lazy<ExecutorService> = lazy {
        Executors.newFixedThreadPool(READERS) { Thread(it, "rows").apply { isDaemon = true } }
    }

    /** Of a row, those of the blob first. */
    val segments: List<Segment> = header.segments + listOfNotNull(tied?.segment)
    val numRows: Long
        get() = header.numRows

    val rowStride: Int
        get() = header.rowStride

    val sourceDigest: String
        get() = header.sourceDigest

    /** By token id, the row that it selects. */
    val rowAliases: Map<Long, Long>
        get() = header.rowAliases

    /** By table, the shape of what a token id looks up: `[width]` or `[layers, width]`. */
    val shapes: Map<String, List<Int>> =
        header.runs.mapValues { (_, run) -> run.shape } +
            listOfNotNull(tied?.segment?.let { it.table to listOf(it.width.toInt()) })

    init {
        tied?.let(::checkTied)
    }

    /**
     * The rows that token ids select, aliases replaced.
     *
     * @throws InputError an id has no row.
     */
    fun rowIds(ids: IntArray): LongArray =
        LongArray(ids.size) { i ->
            val id = ids[i].toLong()
            if (id !in 0 until numRows) {
                throw InputError(
                    "token id $id has no row; ids go from 0 to ${numRows - 1}",
                    "the ids may come from another model's tokenizer",
                )
            }
            rowAliases[id] ?: id
        }

    /** Asks the system to read the pages of all distinct rows, many at once. */
    fun prefetch(rowIds: LongArray) {
        val distinct = rowIds.distinct()
        if (distinct.size < ROWS_FOR_THREADS) return distinct.forEach(::load)
        val parts = distinct.chunked((distinct.size + READERS - 1) / READERS)
        readers.value.invokeAll(parts.map { part -> Callable { part.forEach(::load) } }).forEach {
            it.get()
        }
    }

    /**
     * Looks rows up, and puts their vectors behind each other, multiplied once.
     *
     * @param into tables, and where the vectors of each go: `[T, width]` or `[T, layers, width]`.
     * @throws CheckFailed a row does not match its checksum; the token id is named.
     */
    fun lookup(rowIds: LongArray, into: List<Pair<String, FloatBuffer>>) {
        for (rowId in rowIds) {
            read(rowId)
            for ((table, out) in into) {
                val run = header.runs[table]
                if (run == null) tied!!.decode(rowId, out)
                else
                    for (s in run.segments) {
                        decoders
                            .getValue(table)
                            .decode(row, s.offset.toInt(), s.scaleOffset?.toInt() ?: 0, out)
                    }
            }
        }
    }

    /**
     * Compares every row, in all files, and every chunk with its checksum.
     *
     * @throws CheckFailed names the first damaged row.
     */
    fun verify() {
        val entry = opened.entry("checksums")
        val stored = MappedRows(file, entry.offset, CHECKSUM_BYTES, header.numChunks)
        val chunk = ByteArray(CHUNK_BYTES)
        val checksum = ByteArray(CHECKSUM_BYTES)
        var filled = 0
        var number = 0L
        fun end(rowId: Long) {
            stored.read(number, checksum)
            if (Xxh3.hash(chunk, 0, filled) != littleEndian(checksum).getLong(0)) {
                throw CheckFailed(
                    "`$file` is damaged: the rows of token ids ${number * CHUNK_BYTES / rowStride} " +
                        "to $rowId lie in other places, or the checksum of their chunk is wrong (B-19)",
                    DAMAGED,
                )
            }
            number++
            filled = 0
        }
        for (rowId in 0 until numRows) {
            read(rowId)
            var at = 0
            while (at < rowStride) {
                val part = minOf(rowStride - at, CHUNK_BYTES - filled)
                row.copyInto(chunk, filled, at, at + part)
                filled += part
                at += part
                if (filled == CHUNK_BYTES) end(rowId)
            }
        }
        if (filled > 0) end(numRows - 1)
        tied?.verify()
    }

    override fun close() {
        if (readers.isInitialized()) readers.value.shutdown()
    }

    /** Takes a row from the file, and compares it with its checksum. */
    private fun read(rowId: Long) {
        rows.read(rowId, row)
        val body = rowStride - CHECKSUM_BYTES
        if (Xxh3.hash(row, 0, body) != littleEndian(row).getLong(body)) {
            throw CheckFailed(
                "`$file` is damaged: the row of token id $rowId does not match its checksum (B-16)",
                DAMAGED,
            )
        }
    }

    private fun load(rowId: Long) {
        rows.load(rowId)
        tied?.load(rowId)
    }

    private fun checkTied(tied: TiedRows) {
        val table = tied.segment.table
        val twice = table in header.runs
        if (twice || tied.numRows < numRows) {
            val problem = if (twice) "both have" else "it has ${tied.numRows} rows of"
            throw BlobError(
                "`${tied.file}` does not go with `$file`, which has $numRows rows: $problem table " +
                    "`$table` (T-07)",
                "files of two bundles may be mixed; copy the bundle again, or rebuild it",
            )
        }
    }

    private companion object {
        const val MAP_BYTES = 1L shl 30
        const val READERS = 8

        /** With fewer rows, handing them to threads takes longer than it saves. */
        const val ROWS_FOR_THREADS = 16
        const val DAMAGED = "copy the bundle again, or rebuild it"
    }
}
