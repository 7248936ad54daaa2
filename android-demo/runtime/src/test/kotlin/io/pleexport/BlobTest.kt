package io.pleexport

import com.google.gson.JsonArray
import com.google.gson.JsonElement
import com.google.gson.JsonObject
import com.google.gson.JsonParser
import java.io.File
import java.io.RandomAccessFile
import java.nio.FloatBuffer
import java.nio.file.Path
import org.junit.jupiter.api.Assertions.assertArrayEquals
import org.junit.jupiter.api.Assertions.assertEquals
import org.junit.jupiter.api.Assertions.assertTrue
import org.junit.jupiter.api.DynamicTest
import org.junit.jupiter.api.Test
import org.junit.jupiter.api.TestFactory
import org.junit.jupiter.api.io.TempDir

class BlobTest {
    @TempDir lateinit var folder: Path

    @TestFactory
    fun `vectors are those of the specification, bit for bit`() =
        VECTORS.listFiles()!!.filter { it.extension == "safetensors" }
            .also { check(it.size == 8) }
            .map { file ->
                DynamicTest.dynamicTest(file.name) {
                    val expected = readObject(File(VECTORS, file.nameWithoutExtension + ".json"))
                    // Maps of a few rows each give what one map gives.
                    for (blob in listOf(Blob(file), Blob(listOf(file), null, mapBytes = 300))) blob.use {
                        it.verify()
                        val tables = expected.getAsJsonObject("tables")
                        assertEquals(tables.keySet(), it.shapes.keys)
                        for (table in tables.keySet()) {
                            assertArrayEquals(floats(tables[table]), lookup(it, table), table)
                        }
                    }
                }
            }

    @Test
    fun `a changed bit in a row names its token id`() {
        val file = copy("int8")
        val blob = Blob(file)
        flip(file, 16384 + 2L * blob.rowStride + 5)
        blob.lookup(longArrayOf(1), emptyList())
        assertTrue(
            "row of token id 2 does not match its checksum (B-16)" in
                refusal<CheckFailed> { blob.lookup(longArrayOf(2), emptyList()) }
        )
        assertTrue("token id 2" in refusal<CheckFailed> { blob.verify() })
    }

    @Test
    fun `rows in other places are found by their chunk`() {
        val file = copy("int8")
        val stride = Blob(file).rowStride
        val raw = file.readBytes()
        val first = raw.copyOfRange(16384, 16384 + stride)
        raw.copyInto(raw, 16384, 16384 + stride, 16384 + 2 * stride)
        first.copyInto(raw, 16384 + stride)
        file.writeBytes(raw)
        assertTrue("lie in other places" in refusal<CheckFailed> { Blob(file).verify() })
    }

    @Test
    fun `a changed bit in the header is found on opening`() {
        val file = copy("int8")
        flip(file, 200)
        val words = refusal<PleexportError> { Blob(file) }
        assertTrue("(B-11)" in words || "not valid JSON" in words, words)
    }

    @Test
    fun `ids without a row are refused`() {
        val blob = Blob(File(VECTORS, "int8.safetensors"))
        val most = blob.numRows.toInt()
        assertEquals(
            "token id $most has no row; ids go from 0 to ${most - 1}",
            refusal<InputError> { blob.rowIds(intArrayOf(0, most)) },
        )
        refusal<InputError> { blob.rowIds(intArrayOf(-1)) }
    }

    @TestFactory
    fun `each rule refuses a header`(): List<DynamicTest> {
        fun segment(change: (JsonObject) -> Unit): (JsonObject) -> Unit = { header ->
            header.changeMetadata("segments") { text ->
                val segments = JsonParser.parseString(text).asJsonArray
                change(segments[0].asJsonObject)
                segments.toString()
            }
        }
        fun metadata(name: String, value: String): (JsonObject) -> Unit = {
            it.changeMetadata(name) { value }
        }
        return mapOf<String, (JsonObject) -> Unit>(
                "B-01" to { it.getAsJsonObject("rows").addProperty("dtype", "I8") },
                "B-02" to metadata("format", "other"),
                "B-03" to metadata("version", "3"),
                "B-04" to { it.getAsJsonObject("__metadata__").addProperty("extra", "") },
                "B-05" to { it.getAsJsonObject("__metadata__").remove("source_digest") },
                "B-05 " to metadata("first_row", "-1"),
                "B-05  " to metadata("row_aliases", "[[0, 0]"),
                "B-06" to metadata("segments", "[]"),
                "B-06 " to segment { it.addProperty("dtype", "int3") },
                "B-06  " to segment { it.addProperty("surprise", 1) },
                "B-06   " to segment { it.add("group_size", null) },
                "B-06    " to segment { it.addProperty("multiplier", 1e300) },
                "B-06     " to segment { it.addProperty("width", 1.5) },
                "B-07" to metadata("page_size", "4096"),
                "B-08" to segment { it.addProperty("offset", 2) },
                "B-08 " to segment { it.addProperty("width", 1 shl 20) },
                "B-08  " to segment { it.addProperty("width", Long.MAX_VALUE / 2) },
                "B-08   " to segment { it.addProperty("layer", 7) },
                "B-09" to metadata("row_aliases", "[[0,1],[1,2]]"),
                "B-09 " to metadata("row_aliases", "[[0,99999]]"),
                "B-12" to metadata("first_row", "5"),
                "B-12 " to metadata("num_rows_total", "999"),
            )
            .map { (rule, change) ->
                DynamicTest.dynamicTest(rule) {
                    val file = copy("int8")
                    changeHeader(file, change)
                    val words = refusal<BlobError> { Blob(file) }
                    assertTrue("(${rule.trim()})" in words, words)
                }
            }
    }

    @Test
    fun `files that are not the shards of one blob are refused`() {
        val shards = listOf(0L to 3, 3L to 2, 5L to 4).map { (first, rows) -> shard(first, rows) }
        val (first, second, third) = shards
        Blob(shards.reversed()).use { blob ->
            blob.verify()
            assertEquals(9, blob.numRows)
            assertEquals(first, blob.file)
            // Row i has the code i.
            assertArrayEquals(FloatArray(9) { it * 0.5f }, lookup(blob, "t").filterIndexed { i, _ -> i % 4 == 0 }.toFloatArray())
            blob.prefetch(LongArray(9) { it.toLong() })
        }
        fun refused(vararg files: File) = refusal<BlobError> { Blob(files.toList()) }
        assertEquals(
            "`$third` begins at row 5, and the shards before it end at 3 (B-12)",
            refused(first, third),
        )
        assertEquals(
            "`$second` begins at row 3, and the shards before it end at 0 (B-12)",
            refused(third, second),
        )
        assertEquals(
            "`$second` is the last shard and ends at row 5 of 9 (B-12)",
            refused(first, second),
        )
        assertEquals(
            "`$second`: is a shard, rows 3 to 4 of 9; this reader takes whole blobs (B-12)",
            refused(second),
        )
        flip(third, 16384 + 2L * 64 + 1)
        assertEquals(
            "`$third` is damaged: the row of token id 7 does not match its checksum (B-16)",
            refusal<CheckFailed> { Blob(shards).lookup(longArrayOf(2, 6, 7), emptyList()) },
        )
        refusal<CheckFailed> { Blob(shards).verify() }
        changeHeader(second) { it.changeMetadata("source_digest") { "other" } }
        assertEquals(
            "`$second` is no shard of the blob of `$first`: they disagree about `source_digest` " +
                "(B-12)",
            refused(first, second, third),
        )
    }

    private fun shard(first: Long, rows: Int): File {
        val file = folder.resolve("rows-$first.safetensors").toFile()
        val codes = (0L until rows).associateWith { (first + it).toInt() }
        writeSparseBlob(file, rows.toLong(), 64, codes, first, total = 9)
        return file
    }

    @Test
    fun `safetensors files that are none are refused`() {
        val file = copy("int8")
        val raw = file.readBytes()
        file.writeBytes(raw.copyOf(raw.size - 8))
        assertTrue("before tensor `checksums`" in refusal<BlobError> { Blob(file) })
        file.writeBytes(raw + 0)
        assertTrue("1 bytes that belong to no tensor" in refusal<BlobError> { Blob(file) })
        file.writeBytes(ByteArray(8) { -1 } + raw)
        assertTrue("header claims 18446744073709551615 bytes" in refusal<BlobError> { Blob(file) })
        file.writeText("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
        assertTrue("Git LFS pointer" in refusal<BlobError> { Blob(file) })
        assertTrue("cannot be read: No such file" in refusal<BlobError> { Blob(File("/nowhere")) })
    }

    /** Rows behind the 2^31st byte; the file has holes, and takes a few pages. */
    @Test
    fun `rows are read past what one map holds`() {
        val file = folder.resolve("large.safetensors").toFile()
        val stride = 11_264
        val rows = 300_000L // 3.4 GB
        writeSparseBlob(
            file,
            rows,
            stride,
            mapOf(7L to 3, rows - 1 to 5, (1L shl 31) / stride + 1 to 9),
        )
        val blob = Blob(file)
        blob.prefetch(longArrayOf(7, rows - 1))
        for ((id, code) in mapOf(7L to 3, rows - 1 to 5, (1L shl 31) / stride + 1 to 9)) {
            val out = FloatBuffer.allocate(4)
            blob.lookup(blob.rowIds(intArrayOf(id.toInt())), listOf("t" to out))
            assertEquals(code * 0.5f, out.get(0))
        }
        // The control: what lies in a hole does not match a checksum.
        refusal<CheckFailed> { blob.lookup(longArrayOf(rows - 2), emptyList()) }
    }

    private fun writeSparseBlob(
        file: File,
        rows: Long,
        stride: Int,
        codes: Map<Long, Int>,
        first: Long = 0,
        total: Long = rows,
    ) {
        val segments =
            """[{"name":"t","table":"t","layer":null,"offset":0,"width":4,"dtype":"int8",""" +
                """"group_size":4,"scale_dtype":"fp32","scale_offset":4,"multiplier":1.0}]"""
        val chunks = groups(rows * stride, 1L shl 20)
        val end = 8 + rows * stride
        val metadata =
            mapOf(
                "format" to "pleexport-blob",
                "version" to "2",
                "page_size" to "16384",
                "first_row" to "$first",
                "num_rows_total" to "$total",
                "row_aliases" to "[]",
                "segments" to segments,
                "source_digest" to "none",
            )
        val text =
            com.google.gson
                .Gson()
                .toJson(
                    mapOf(
                        "__metadata__" to metadata,
                        "header_checksum" to tensor("U64", listOf(1), 0, 8),
                        "rows" to tensor("U8", listOf(rows, stride), 8, end),
                        "checksums" to tensor("U64", listOf(chunks), end, end + 8 * chunks),
                    )
                )
        val length = 16384 - 8 - 8
        val head = longBytes(length.toLong()) + text.padEnd(length).toByteArray()
        RandomAccessFile(file, "rw").use {
            it.write(head + longBytes(Xxh3.hash(head)))
            it.setLength(16384 + rows * stride + 8 * chunks)
            for ((row, code) in codes) {
                val body = ByteArray(stride - 8)
                body[0] = code.toByte()
                littleEndian(body).putFloat(4, 0.5f)
                it.seek(16384 + row * stride)
                it.write(body + longBytes(Xxh3.hash(body)))
            }
            if (codes.size.toLong() == rows) {
                val all = ByteArray((rows * stride).toInt())
                it.seek(16384)
                it.readFully(all)
                it.write(longBytes(Xxh3.hash(all)))
            }
        }
    }

    private fun tensor(dtype: String, shape: List<Any>, begin: Long, end: Long) =
        mapOf("dtype" to dtype, "shape" to shape, "data_offsets" to listOf(begin, end))

    private fun copy(name: String): File =
        File(VECTORS, "$name.safetensors")
            .copyTo(folder.resolve("blob.safetensors").toFile(), overwrite = true)
}

internal fun flip(file: File, position: Long) =
    RandomAccessFile(file, "rw").use {
        it.seek(position)
        val byte = it.read()
        it.seek(position)
        it.write(byte xor 4)
    }

/** The vectors of all token ids. */
internal fun lookup(blob: Blob, table: String): FloatArray {
    val elements = blob.shapes.getValue(table).fold(1, Int::times)
    val out = FloatBuffer.allocate(blob.numRows.toInt() * elements)
    blob.lookup(blob.rowIds(IntArray(blob.numRows.toInt()) { it }), listOf(table to out))
    return out.array()
}

/** All numbers of nested lists. */
internal fun floats(value: JsonElement): FloatArray {
    val found = ArrayList<Float>()
    fun walk(element: JsonElement) {
        if (element is JsonArray) element.forEach(::walk) else found += element.asFloat
    }
    walk(value)
    return found.toFloatArray()
}
