package io.pleexport

import java.io.File
import java.io.IOException
import java.io.RandomAccessFile
import java.nio.ByteBuffer
import java.nio.ByteOrder

/**
 * Where one tensor lies: `bytes` bytes at byte `offset` of the file.
 *
 * @property dtype `uint8`, `fp32` and so on.
 */
internal class TensorEntry(
    val name: String,
    val dtype: String,
    val shape: List<Long>,
    val offset: Long,
    val bytes: Long,
)

/**
 * The header of a safetensors file, checked; nothing else is read.
 *
 * @throws BlobError the file is missing, truncated or malformed.
 */
internal class SafetensorsFile(val file: File) {
    val metadata: Map<String, String>
    val entries: Map<String, TensorEntry>
    val fileBytes: Long

    /** All bytes before the first tensor. */
    val head: ByteArray

    init {
        try {
            RandomAccessFile(file, "r").use {
                fileBytes = it.length()
                head = readHead(it)
            }
        } catch (err: IOException) {
            throw failure("cannot be read: ${reason(err)}", cause = err)
        }
        val header =
            try {
                parseJson(head.copyOfRange(8, head.size))
            } catch (err: MalformedJson) {
                throw failure("has a header that is not valid JSON (${err.message})")
            }
        if (header !is Map<*, *>) throw failure("has a header that is not a JSON object")
        metadata = checkedMetadata(header["__metadata__"] ?: emptyMap<String, String>())
        entries =
            header
                .filterKeys { it != "__metadata__" }
                .entries
                .associate { (name, value) -> name as String to checkedEntry(name, value) }
        checkLayout()
    }

    /** The entry of that name; its presence was checked before. */
    fun entry(name: String): TensorEntry = entries.getValue(name)

    private fun failure(
        what: String,
        hint: String = "the file may be damaged; fetch or copy it again",
        cause: Throwable? = null,
    ) = BlobError("`$file` $what", hint, cause)

    private fun readHead(opened: RandomAccessFile): ByteArray {
        val start = ByteArray(minOf(24L, fileBytes).toInt())
        opened.readFully(start)
        if (String(start, Charsets.ISO_8859_1).startsWith("version https://git-lfs")) {
            throw failure("is a Git LFS pointer, not the file itself", "run `git lfs pull`")
        }
        val claimed = if (start.size < 8) 0 else littleEndian(start).getLong(0)
        if (start.size < 8 || claimed < 0 || claimed > minOf(MAX_HEADER_BYTES, fileBytes - 8)) {
            throw failure(
                "is not a safetensors file: its header claims " +
                    "${java.lang.Long.toUnsignedString(claimed)} bytes of $fileBytes",
                "the copy may be truncated; fetch it again",
            )
        }
        opened.seek(0)
        return ByteArray(8 + claimed.toInt()).also(opened::readFully)
    }

    private fun checkedMetadata(value: Any?): Map<String, String> {
        if (value !is Map<*, *> || value.values.any { it !is String }) {
            throw failure("has `__metadata__` that is not a map from string to string")
        }
        return value.entries.associate { (name, text) -> name as String to text as String }
    }

    private fun checkedEntry(name: String, value: Any?): TensorEntry {
        val malformed = "has a malformed header entry for tensor `$name`"
        val fields = value as? Map<*, *> ?: throw failure(malformed)
        val dtype = fields["dtype"] as? String ?: throw failure(malformed)
        val shape = integers(fields["shape"]) ?: throw failure(malformed)
        val (begin, end) =
            integers(fields["data_offsets"])?.takeIf { it.size == 2 } ?: throw failure(malformed)
        if (shape.size > MAX_DIMENSIONS) throw failure(malformed)
        val (known, bits) =
            DTYPES[dtype] ?: throw failure("has tensor `$name` of unknown dtype `$dtype`")
        val expected =
            try {
                if (0L in shape) 0L
                else shape.fold(bits.toLong()) { product, n -> Math.multiplyExact(product, n) } / 8
            } catch (err: ArithmeticException) {
                throw failure(malformed, cause = err)
            }
        if (end - begin != expected) {
            throw failure(
                "gives tensor `$name` ${end - begin} bytes; $dtype $shape needs $expected"
            )
        }
        if (end > fileBytes - head.size) {
            throw failure(
                "ends at byte $fileBytes, before tensor `$name` (byte ${head.size + end})",
                "the copy is truncated; fetch it again",
            )
        }
        return TensorEntry(name, known, shape, head.size + begin, expected)
    }

    private fun integers(value: Any?): List<Long>? =
        (value as? List<*>)?.map { number -> (number as? Long)?.takeIf { it >= 0 } ?: return null }

    private fun checkLayout() {
        var position = head.size.toLong()
        for (entry in entries.values.sortedWith(compareBy({ it.offset }, { it.bytes }))) {
            if (entry.offset != position) {
                val problem =
                    if (entry.offset < position) "overlaps another tensor" else "follows a hole"
                throw failure("has tensor `${entry.name}` at a place that $problem")
            }
            position += entry.bytes
        }
        if (position != fileBytes) {
            throw failure("has ${fileBytes - position} bytes that belong to no tensor")
        }
    }

    private companion object {
        const val MAX_HEADER_BYTES = 100_000_000L
        const val MAX_DIMENSIONS = 32

        /** By safetensors' name, ours and the bits of an element. */
        val DTYPES =
            mapOf(
                "F64" to ("fp64" to 64),
                "F32" to ("fp32" to 32),
                "F16" to ("fp16" to 16),
                "BF16" to ("bf16" to 16),
                "F8_E4M3" to ("fp8_e4m3" to 8),
                "F8_E5M2" to ("fp8_e5m2" to 8),
                "I64" to ("int64" to 64),
                "I32" to ("int32" to 32),
                "I16" to ("int16" to 16),
                "I8" to ("int8" to 8),
                "U64" to ("uint64" to 64),
                "U32" to ("uint32" to 32),
                "U16" to ("uint16" to 16),
                "U8" to ("uint8" to 8),
                "BOOL" to ("bool" to 8),
            )
    }
}

internal fun littleEndian(bytes: ByteArray): ByteBuffer =
    ByteBuffer.wrap(bytes).order(ByteOrder.LITTLE_ENDIAN)

/** What a system says of a failure, without the file's name, which is said already. */
internal fun reason(err: IOException): String =
    err.message?.substringAfterLast(" (")?.removeSuffix(")") ?: err.javaClass.simpleName
