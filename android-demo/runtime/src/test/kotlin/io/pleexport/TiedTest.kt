package io.pleexport

import java.io.File
import java.io.RandomAccessFile
import java.nio.FloatBuffer
import java.nio.file.Path
import org.junit.jupiter.api.Assertions.assertArrayEquals
import org.junit.jupiter.api.Assertions.assertTrue
import org.junit.jupiter.api.DynamicTest
import org.junit.jupiter.api.Test
import org.junit.jupiter.api.TestFactory
import org.junit.jupiter.api.io.TempDir

class TiedTest {
    @TempDir lateinit var folder: Path

    @TestFactory
    fun `vectors are those of the specification, bit for bit`() =
        listOf("int8", "int4", "int2").map { name ->
            DynamicTest.dynamicTest(name) {
                val tied = TiedRows(File(VECTORS, "tied/$name.safetensors"))
                tied.verify()
                val expected = floats(readObject(File(VECTORS, "tied/$name.json"))["vectors"])
                val out = FloatBuffer.allocate(expected.size)
                for (row in 0 until tied.numRows) {
                    tied.load(row)
                    tied.decode(row, out)
                }
                assertArrayEquals(expected, out.array())
            }
        }

    @Test
    fun `a changed bit in codes, scales or checksums names the token id`() {
        val file = copy()
        val size = file.length()
        for (position in listOf(16384L, size - 1, size - 8 * TiedRows(file).numRows - 1)) {
            copy()
            flip(file, position)
            assertTrue(
                "does not match its checksum (T-09)" in
                    refusal<CheckFailed> { TiedRows(file).verify() }
            )
        }
    }

    @TestFactory
    fun `each rule refuses a header`() =
        mapOf<String, (com.google.gson.JsonObject) -> Unit>(
                "T-01" to { it.getAsJsonObject("codes").addProperty("dtype", "I8") },
                "T-02" to { it.changeMetadata("format") { "other" } },
                "T-03" to { it.changeMetadata("version") { "2" } },
                "T-04" to { it.getAsJsonObject("__metadata__").remove("table") },
                "T-04 " to { it.changeMetadata("dtype") { "int3" } },
                "T-04  " to { it.changeMetadata("width") { "0" } },
                "T-05" to { it.changeMetadata("width") { "99" } },
            )
            .map { (rule, change) ->
                DynamicTest.dynamicTest(rule) {
                    val file = copy()
                    changeHeader(file, change)
                    val words = refusal<BlobError> { TiedRows(file) }
                    assertTrue("(${rule.trim()})" in words, words)
                }
            }

    @Test
    fun `a changed bit in the header is found on opening`() {
        val file = copy()
        RandomAccessFile(file, "rw").use {
            it.seek(15_000)
            it.write(9)
        } // a tab for a space
        assertTrue("(T-06)" in refusal<CheckFailed> { TiedRows(file) })
    }

    private fun copy(): File =
        File(VECTORS, "tied/int4.safetensors")
            .copyTo(folder.resolve("t.safetensors").toFile(), overwrite = true)
}
