package io.pleexport

import java.io.BufferedOutputStream
import java.io.Closeable
import java.io.File
import java.io.FileOutputStream
import java.nio.ByteBuffer
import java.nio.ByteOrder
import java.nio.FloatBuffer

/** Writes a NumPy file of binary32 numbers `[rows, columns]`, piece by piece. */
internal class NpyWriter(file: File, rows: Int, columns: Int) : Closeable {
    private val out = BufferedOutputStream(FileOutputStream(file))

    init {
        val text = "{'descr': '<f4', 'fortran_order': False, 'shape': ($rows, $columns), }"
        // The data begin at a multiple of 64: 10 bytes, this text, and a line's end.
        val padded = text + " ".repeat(Math.floorMod(-(text.length + 11), 64)) + "\n"
        val head = ByteBuffer.allocate(10).order(ByteOrder.LITTLE_ENDIAN)
        head.put(byteArrayOf(0x93.toByte()) + "NUMPY".toByteArray() + byteArrayOf(1, 0))
        head.putShort(padded.length.toShort())
        out.write(head.array())
        out.write(padded.toByteArray())
    }

    fun write(values: FloatBuffer) {
        val bytes = ByteBuffer.allocate(4 * values.remaining()).order(ByteOrder.LITTLE_ENDIAN)
        bytes.asFloatBuffer().put(values)
        out.write(bytes.array())
    }

    override fun close() = out.close()
}
