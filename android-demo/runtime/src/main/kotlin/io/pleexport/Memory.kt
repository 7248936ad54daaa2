package io.pleexport

import java.io.Closeable
import java.io.File
import java.io.IOException
import java.io.RandomAccessFile
import java.nio.ByteBuffer
import java.nio.ByteOrder
import java.nio.FloatBuffer
import java.nio.channels.FileChannel

/**
 * Buffers of zeros that take memory only where they are written: private maps of a file full of
 * holes, which has no name any more. Direct buffers of this size would be cleared as a whole, and
 * on Android lie in the heap.
 *
 * @param sizes bytes of each buffer, at most 2^31 - 1.
 * @throws BundleError the system does not give so much.
 */
internal class Memory(sizes: List<Long>) : Closeable {
    private val file: RandomAccessFile
    private val maps: List<ByteBuffer>

    init {
        try {
            val path = File.createTempFile("pleexport", ".zeros")
            try {
                file = RandomAccessFile(path, "rw")
                file.setLength(sizes.sumOf { aligned(it) })
                var begin = 0L
                maps =
                    sizes.map { bytes ->
                        file.channel.map(FileChannel.MapMode.PRIVATE, begin, bytes).also {
                            begin += aligned(bytes)
                        }
                    }
            } finally {
                if (!path.delete()) path.deleteOnExit()
            }
        } catch (err: IOException) {
            throw noRoom(sizes, err)
        } catch (err: IllegalArgumentException) { // beyond what one map holds
            throw noRoom(sizes, err)
        }
    }

    /** The first bytes of a buffer, in the order of this processor. */
    fun front(buffer: Int, bytes: Int): ByteBuffer {
        val view = maps[buffer].duplicate()
        view.limit(bytes)
        return view.slice().order(ByteOrder.nativeOrder())
    }

    /** Gives the memory back at once; a map would keep it until garbage is collected. */
    override fun close() {
        try {
            file.setLength(0)
        } catch (err: IOException) {
            // Systems that do not cut what is mapped give it back with the map.
        }
        file.close()
    }

    private companion object {
        const val PAGE = 65_536L

        fun aligned(bytes: Long) = groups(bytes, PAGE) * PAGE

        fun noRoom(sizes: List<Long>, cause: Exception) =
            BundleError(
                "this process cannot have a buffer of ${sizes.maxOrNull()} bytes for caches or inputs",
                "build with a smaller `--context`",
                cause,
            )
    }
}

/** Floats for a graph that grow and are kept: new ones for each call would cost page faults. */
internal class Floats : Closeable {
    private var memory: Memory? = null
    private var capacity = 0L

    /** The first `count` of them; their content is of no meaning. */
    fun front(count: Long): FloatBuffer {
        val bytes = Math.multiplyExact(count, 4L)
        if (bytes > capacity) {
            close()
            val larger = maxOf(bytes, minOf(2 * bytes, Int.MAX_VALUE.toLong()))
            memory = Memory(listOf(larger))
            capacity = larger
        }
        return memory!!.front(0, bytes.toInt()).asFloatBuffer()
    }

    override fun close() {
        memory?.close()
        memory = null
        capacity = 0
    }
}
