package io.pleexport

import java.io.File
import java.io.IOException
import java.io.RandomAccessFile
import java.security.MessageDigest
import java.util.concurrent.ExecutionException
import java.util.concurrent.Executors
import java.util.concurrent.Future

internal const val CHECKSUMS = "checksums.json"

/**
 * `checksums.json` of a bundle: what is read into a model is compared with it.
 *
 * @property files by name, the XXH3-64 of each chunk of 1 MiB, in order; 16 hexadecimal digits
 *   each.
 */
internal class Checksums(val files: Map<String, List<String>>)

/**
 * The checksums of a folder's files.
 *
 * @throws BundleError there are none.
 * @throws CheckFailed they are not in the form that this version reads.
 */
internal fun readChecksums(folder: File): Checksums {
    val path = File(folder, CHECKSUMS)
    try {
        return fieldsOf(parseJson(path.readBytes()), "$") {
            required("format", oneOf("pleexport-checksums"))
            if (required("version", ::long) != 1L)
                throw MalformedJson("Invalid enum value for version")
            if (required("chunk_bytes", ::long) != CHUNK_BYTES.toLong()) {
                throw MalformedJson("Invalid enum value for chunk_bytes")
            }
            Checksums(required("files", map(list(::checksum))))
        }
    } catch (err: IOException) {
        throw BundleError(
            "`$path` cannot be read (${reason(err)}), so no file can be checked",
            COPY_AGAIN,
            err,
        )
    } catch (err: MalformedJson) {
        throw CheckFailed("`$path` is damaged: ${err.message}", COPY_AGAIN, err)
    }
}

/**
 * A file's SHA-256 in hexadecimal digits, and its checksums.
 *
 * @throws BundleError it cannot be read.
 */
internal fun sha256AndChecksums(path: File): Pair<String, List<String>> {
    val digest = MessageDigest.getInstance("SHA-256")
    val buffer = ByteArray(CHUNK_BYTES)
    try {
        RandomAccessFile(path, "r").use { file ->
            val checksums =
                (0 until groups(file.length(), CHUNK_BYTES.toLong())).map {
                    val filled =
                        minOf(CHUNK_BYTES.toLong(), file.length() - file.filePointer).toInt()
                    file.readFully(buffer, 0, filled)
                    digest.update(buffer, 0, filled)
                    Xxh3.hex(Xxh3.hash(buffer, 0, filled))
                }
            return hexadecimal(digest.digest()) to checksums
        }
    } catch (err: IOException) {
        throw BundleError("`$path` cannot be read (${reason(err)})", COPY_AGAIN, err)
    }
}

/** Bytes as hexadecimal digits. */
internal fun hexadecimal(bytes: ByteArray): String =
    bytes.joinToString("") { "%02x".format(java.util.Locale.ROOT, it) }

/**
 * Compares the content of a file, which was read already.
 *
 * @throws CheckFailed names the first chunk that differs.
 */
internal fun checkBytes(data: ByteArray, path: File, checksums: Checksums) {
    val expected = checksums.files[path.name] ?: emptyList()
    val found =
        (data.indices step CHUNK_BYTES).map {
            Xxh3.hex(Xxh3.hash(data, it, minOf(CHUNK_BYTES, data.size - it)))
        }
    if (found != expected) {
        val wrong = found.zip(expected).indexOfFirst { (a, b) -> a != b }
        throw damaged(
            path,
            if (wrong < 0) minOf(found.size, expected.size) else wrong,
            expected.size,
        )
    }
}

/**
 * Compares files in little memory. They are read, not mapped: what is mapped counts as memory of
 * the process.
 *
 * @throws CheckFailed names the first chunk that differs.
 */
internal fun checkFiles(paths: Collection<File>, checksums: Checksums) {
    val buffer = ByteArray(CHUNK_BYTES)
    for (path in paths) {
        val expected = checksums.files[path.name] ?: emptyList()
        try {
            RandomAccessFile(path, "r").use { file ->
                if (expected.size.toLong() != groups(file.length(), CHUNK_BYTES.toLong())) {
                    throw damaged(path, 0, expected.size)
                }
                expected.forEachIndexed { chunk, checksum ->
                    val filled =
                        minOf(CHUNK_BYTES.toLong(), file.length() - file.filePointer).toInt()
                    file.readFully(buffer, 0, filled)
                    if (Xxh3.hex(Xxh3.hash(buffer, 0, filled)) != checksum) {
                        throw damaged(path, chunk, expected.size)
                    }
                }
            }
        } catch (err: IOException) {
            throw BundleError("`$path` cannot be read (${reason(err)})", COPY_AGAIN, err)
        }
    }
}

/**
 * Compares files while the body loads them; damage is what is said, whatever the body says.
 *
 * @param checksums null to compare nothing.
 * @throws CheckFailed names the first chunk that differs.
 */
internal fun <T : AutoCloseable> checkedBeside(
    paths: List<File>,
    checksums: Checksums?,
    body: () -> T,
): T {
    if (checksums == null) return body()
    val thread =
        Executors.newSingleThreadExecutor { Thread(it, "checksums").apply { isDaemon = true } }
    val checked: Future<*> = thread.submit { checkFiles(paths, checksums) }
    thread.shutdown()
    val loaded = runCatching(body)
    try {
        checked.get()
    } catch (err: ExecutionException) {
        loaded.getOrNull()?.close()
        throw err.cause ?: err
    }
    return loaded.getOrThrow()
}

private fun checksum(value: Any?, path: String): String =
    string(value, path).also { text ->
        if (text.length != 16 || text.any { it !in "0123456789abcdef" }) {
            throw MalformedJson("Expected `str` matching regex '^[0-9a-f]{16}\$' - at `$path`")
        }
    }

private fun damaged(path: File, chunk: Int, chunks: Int): CheckFailed {
    val begin = "%,d".format(java.util.Locale.ROOT, chunk.toLong() * CHUNK_BYTES)
    val where = if (chunks > 0) "chunk $chunk of $chunks, at byte $begin," else "the file"
    return CheckFailed(
        "`$path` is damaged: $where does not match its checksum in `$CHECKSUMS`",
        COPY_AGAIN,
    )
}

internal const val COPY_AGAIN = "copy the bundle again, or rebuild it"
