package io.pleexport

import java.io.File
import java.io.IOException
import java.io.RandomAccessFile
import java.nio.ByteBuffer
import java.nio.MappedByteBuffer
import java.nio.channels.FileChannel

/**
 * Rows of equal length in a file, mapped. A map ends at 2 GiB, so there are several of at most 1
 * GiB, each of whole rows.
 *
 * Nothing is read through the channel: an interrupted thread would close it for all.
 *
 * @param begin byte of the file at which row 0 begins.
 * @param rowBytes at most 1 GiB.
 * @param mapBytes of one map; smaller ones are for tests.
 */
internal class MappedRows(
    private val file: File,
    begin: Long,
    val rowBytes: Int,
    val numRows: Long,
    mapBytes: Long = 1L shl 30,
) {
    private val rowsOfMap = maxOf(1, mapBytes / rowBytes)
    private val maps: List<MappedByteBuffer>

    init {
        maps =
            try {
                RandomAccessFile(file, "r").use { opened ->
                    (0 until groups(numRows, rowsOfMap)).map { i ->
                        val first = i * rowsOfMap
                        val bytes = minOf(rowsOfMap, numRows - first) * rowBytes
                        opened.channel.map(
                            FileChannel.MapMode.READ_ONLY,
                            begin + first * rowBytes,
                            bytes,
                        )
                    }
                }
            } catch (err: IOException) {
                throw BlobError(
                    "`$file` cannot be mapped: ${reason(err)}",
                    "the file may be damaged; fetch or copy it again",
                    err,
                )
            }
    }

    /** Copies a row's bytes. */
    fun read(row: Long, into: ByteArray, at: Int = 0) {
        view(row).get(into, at, rowBytes)
    }

    /**
     * Asks the system for the pages of a row, and waits for them. On the JVM this asks for all of
     * the row at once, where a copy through the map would wait for one page fault after the other.
     */
    fun load(row: Long) {
        (view(row).slice() as MappedByteBuffer).load()
    }

    private fun view(row: Long): ByteBuffer {
        val map = maps[(row / rowsOfMap).toInt()].duplicate()
        val begin = (row % rowsOfMap).toInt() * rowBytes
        map.limit(begin + rowBytes)
        map.position(begin)
        return map
    }
}
