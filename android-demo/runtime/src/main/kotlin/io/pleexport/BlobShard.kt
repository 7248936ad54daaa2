package io.pleexport

import java.io.File

/**
 * One file of a blob: the rows of a range of token ids. A whole blob is the one shard of all.
 * Opening it reads its header only; rows are those of the blob. One thread at a time reads.
 *
 * @property first its first row.
 * @property end the row behind its last one.
 * @throws BlobError the file breaks a rule of docs/blob-format.md.
 * @throws CheckFailed its header does not match its checksum.
 */
internal class BlobShard(val file: File, mapBytes: Long) {
    private val opened = SafetensorsFile(file)
    val header = readHeader(opened)
    val first = header.firstRow
    val end = first + header.numRows
    private val stride = header.rowStride
    private val rows =
        MappedRows(file, opened.entry("rows").offset, stride, header.numRows, mapBytes)

    /** What all shards of a blob agree in, by name. */
    val shared: Map<String, String> =
        opened.metadata - "first_row" + ("row_stride" to stride.toString())

    /** Takes a row from the file, and compares it with its checksum. */
    fun read(rowId: Long, into: ByteArray) {
        rows.read(rowId - first, into)
        val body = stride - CHECKSUM_BYTES
        if (Xxh3.hash(into, 0, body) != littleEndian(into).getLong(body)) {
            throw CheckFailed(
                "`$file` is damaged: the row of token id $rowId does not match its checksum (B-16)",
                COPY_AGAIN,
            )
        }
    }

    /** Asks the system for the pages of a row, and waits for them. */
    fun load(rowId: Long) = rows.load(rowId - first)

    /**
     * Compares every row and every chunk with its checksum.
     *
     * @throws CheckFailed names the first damaged row.
     */
    fun verify() {
        val entry = opened.entry("checksums")
        val stored = MappedRows(file, entry.offset, CHECKSUM_BYTES, header.numChunks)
        val row = ByteArray(stride)
        val chunk = ByteArray(CHUNK_BYTES)
        val checksum = ByteArray(CHECKSUM_BYTES)
        var filled = 0
        var number = 0L
        fun end(rowId: Long) {
            stored.read(number, checksum)
            if (Xxh3.hash(chunk, 0, filled) != littleEndian(checksum).getLong(0)) {
                throw CheckFailed(
                    "`$file` is damaged: the rows of token ids " +
                        "${first + number * CHUNK_BYTES / stride} to $rowId lie in other places, " +
                        "or the checksum of their chunk is wrong (B-19)",
                    COPY_AGAIN,
                )
            }
            number++
            filled = 0
        }
        for (rowId in first until this.end) {
            read(rowId, row)
            var at = 0
            while (at < stride) {
                val part = minOf(stride - at, CHUNK_BYTES - filled)
                row.copyInto(chunk, filled, at, at + part)
                filled += part
                at += part
                if (filled == CHUNK_BYTES) end(rowId)
            }
        }
        if (filled > 0) end(this.end - 1)
    }
}

private const val MIXED = "files of two bundles may be mixed; copy the bundle again, or rebuild it"

/**
 * The files of one blob, in the order of their rows.
 *
 * @param files in any order.
 * @throws BlobError one breaks a rule of docs/blob-format.md, or together they are not one blob.
 * @throws CheckFailed a header does not match its checksum.
 */
internal fun openShards(files: List<File>, mapBytes: Long): List<BlobShard> {
    val shards = files.map { BlobShard(it, mapBytes) }.sortedBy { it.first }
    val total = shards[0].header.numRowsTotal
    if (shards.size == 1) {
        checkWhole(shards[0], total)
        return shards
    }
    val expected = shards[0].shared
    var place = 0L
    for (shard in shards) {
        val other = expected.keys.filter { shard.shared[it] != expected[it] }.minOrNull()
        if (other != null) {
            throw BlobError(
                "`${shard.file}` is no shard of the blob of `${shards[0].file}`: they disagree " +
                    "about `$other` (B-12)",
                MIXED,
            )
        }
        if (shard.first != place) {
            throw BlobError(
                "`${shard.file}` begins at row ${shard.first}, and the shards before it end at " +
                    "$place (B-12)",
                MIXED,
            )
        }
        place = shard.end
    }
    if (place != total) {
        throw BlobError(
            "`${shards.last().file}` is the last shard and ends at row $place of $total (B-12)",
            COPY_AGAIN,
        )
    }
    return shards
}

private fun checkWhole(shard: BlobShard, total: Long) {
    if (shard.header.numRows != total) {
        throw BlobError(
            "`${shard.file}`: is a shard, rows ${shard.first} to ${shard.end - 1} of $total; this " +
                "reader takes whole blobs (B-12)",
            "give all shards of the blob, or build the bundle again from its checkpoint",
        )
    }
}
