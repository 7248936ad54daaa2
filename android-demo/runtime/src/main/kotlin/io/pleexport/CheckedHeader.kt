package io.pleexport

import java.io.RandomAccessFile

/** The first tensor of a checked file: the checksum of all bytes before it. */
internal const val HEADER_CHECKSUM = "header_checksum"
internal const val CHECKSUM_BYTES = 8

/** Whether a file has such a checksum, and a header that it is not the checksum of. */
internal fun headerIsDamaged(file: SafetensorsFile): Boolean {
    val entry = file.entries[HEADER_CHECKSUM] ?: return false
    if (entry.dtype != "uint64" || entry.shape != listOf(1L)) return false
    val stored = ByteArray(CHECKSUM_BYTES)
    RandomAccessFile(file.file, "r").use {
        it.seek(entry.offset)
        it.readFully(stored)
    }
    return littleEndian(stored).getLong(0) != Xxh3.hash(file.head)
}
