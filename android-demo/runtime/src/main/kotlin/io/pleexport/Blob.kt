package io.pleexport

import java.io.File
import java.nio.FloatBuffer
import java.util.concurrent.Callable
import java.util.concurrent.ExecutionException
import java.util.concurrent.ExecutorService
import java.util.concurrent.Executors

/**
 * A memory-mapped blob. Opening it reads its header only; every lookup checks its rows. One thread
 * at a time looks up.
 *
 * @throws BlobError the file breaks a rule of docs/blob-format.md.
 * @throws CheckFailed its header does not match its checksum.
 */
class Blob
internal constructor(files: List<File>, private val tied: TiedRows?, mapBytes: Long = MAP_BYTES) :
    AutoCloseable {
    /** A blob whose tables are all in it, in one file. */
    constructor(file: File) : this(listOf(file), null)

    /** The same in shards, in any order. */
    constructor(files: List<File>) : this(files, null)

    private val shards = openShards(files, mapBytes)
    private val header = shards[0].header
    private val decoders = header.runs.mapValues { (_, run) -> SegmentDecoder(run.first) }
    private val row = ByteArray(header.rowStride)
    private val readers: Lazy<ExecutorService> = lazy {
        Executors.newFixedThreadPool(READERS) { Thread(it, "rows").apply { isDaemon = true } }
    }

    /** The file, or the shard with the first rows. */
    val file: File = shards[0].file

    /** Of a row, those of the blob first. */
    val segments: List<Segment> = header.segments + listOfNotNull(tied?.segment)
    val numRows: Long
        get() = header.numRowsTotal

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
        val loads = readers.value.invokeAll(parts.map { Callable { it.forEach(::load) } })
        try {
            loads.forEach { it.get() }
        } catch (err: ExecutionException) {
            throw err.cause ?: err
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
            shardOf(rowId).read(rowId, row)
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
        shards.forEach(BlobShard::verify)
        tied?.verify()
    }

    override fun close() {
        if (readers.isInitialized()) readers.value.shutdown()
    }

    private fun shardOf(rowId: Long): BlobShard = shards.first { rowId < it.end }

    private fun load(rowId: Long) {
        shardOf(rowId).load(rowId)
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
    }
}
