package io.pleexport

import java.io.File
import org.junit.jupiter.api.Assertions.assertEquals
import org.junit.jupiter.api.Test

class Xxh3Test {
    private val data = ByteArray(3 shl 20) { ((131L * it + 17) % 256).toByte() }

    @Test
    fun `hashes of the vectors`() {
        val hashes = readObject(File(VECTORS, "xxh3-64.json")).getAsJsonArray("hashes")
        check(hashes.size() > 20)
        for (pair in hashes) {
            val length = pair.asJsonArray[0].asInt
            assertEquals(
                pair.asJsonArray[1].asString,
                Xxh3.hex(Xxh3.hash(data, 0, length)),
                "$length bytes",
            )
        }
    }

    /** The witness is Python's xxhash: the hash of the hashes of all beginnings, as u64. */
    @Test
    fun `hashes of all lengths`() {
        val all = ByteArray(8 * 4200)
        for (length in 0 until 4200) longBytes(Xxh3.hash(data, 0, length)).copyInto(all, 8 * length)
        assertEquals("3bc8f65c79dd2b6c", Xxh3.hex(Xxh3.hash(all)))
    }

    @Test
    fun `a hash of a part begins where it is told to`() {
        assertEquals(Xxh3.hash(data.copyOfRange(5, 305)), Xxh3.hash(data, 5, 300))
    }
}
