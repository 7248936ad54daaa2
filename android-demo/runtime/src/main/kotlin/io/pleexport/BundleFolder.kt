package io.pleexport

import java.io.File
import java.io.FileOutputStream
import java.io.IOException

/** Left free for everything else that runs. */
private const val SPARE_BYTES = 64L shl 20

/**
 * The folder of a device that holds its bundles. A bundle takes its place all at once: what is
 * being downloaded or unpacked lies in hidden folders beside it.
 *
 * @param path made where it is not there.
 * @param freeBytes how much can still be written there.
 */
class BundleFolder(val path: File, private val freeBytes: (File) -> Long = File::getUsableSpace) {
    init {
        path.mkdirs()
        // A process that ended between the two steps of `put` left the old one aside.
        for (old in path.listFiles().orEmpty().filter { it.name.endsWith(OLD) }) {
            val place = File(path, old.name.removePrefix(".").removeSuffix(OLD))
            if (place.exists()) old.deleteRecursively() else old.renameTo(place)
        }
    }

    /** Names of the bundles, sorted. */
    fun names(): List<String> =
        path
            .listFiles()
            .orEmpty()
            .filter { !it.name.startsWith(".") && File(it, MANIFEST).isFile }
            .map { it.name }
            .sorted()

    /** The folder of a bundle, which `Runner` opens. */
    fun of(name: String): File = File(path, name)

    /** Deletes a bundle, and what was begun to be downloaded of it. */
    fun remove(name: String) {
        of(name).deleteRecursively()
        staging(name).deleteRecursively()
    }

    /** Where a bundle of that name is brought together; what is there is kept. */
    internal fun staging(name: String) = File(path, ".$name.partial")

    /**
     * Lets a folder take the place of a bundle, or of nothing.
     *
     * @throws PleexportError it is no whole bundle.
     * @throws DeliveryError the storage fails.
     */
    internal fun put(staged: File, name: String): File {
        Bundle(staged)
        val place = of(name)
        val old = File(path, ".$name$OLD")
        old.deleteRecursively()
        if (place.exists() && !place.renameTo(old)) throw storageFails(place, null)
        if (!staged.renameTo(place)) {
            old.renameTo(place)
            throw storageFails(place, null)
        }
        old.deleteRecursively()
        return place
    }

    /** @throws DeliveryError so much cannot be written. */
    internal fun checkRoom(bytes: Long, name: String) {
        val free = freeBytes(path)
        if (bytes > free - SPARE_BYTES) {
            throw DeliveryError(
                "`$name` needs ${megabytes(bytes + SPARE_BYTES)} of storage, and " +
                    "${megabytes(free)} are free",
                "delete something else first",
            )
        }
    }

    private companion object {
        const val OLD = ".old"
    }
}

/**
 * What has been brought of a bundle.
 *
 * @property bundle its name.
 * @property checking whether a file is being compared, which takes a while.
 * @property folder of the whole bundle, at the end; null before.
 */
class Delivery(
    val bundle: String,
    val bytes: Long,
    val ofBytes: Long,
    val checking: Boolean = false,
    val folder: File? = null,
)

internal fun megabytes(bytes: Long) = "${(bytes + 999_999) / 1_000_000} MB"

internal fun storageFails(place: File, err: IOException?): DeliveryError {
    val full = err?.message?.contains("No space left") == true
    return DeliveryError(
        if (full) "there is no space left for `${place.name}`"
        else "`$place` cannot be written or read" + (err?.let { " (${reason(it)})" } ?: ""),
        if (full) "delete something else first" else "restart the device if that goes on",
        err,
    )
}

/** Errors of the storage are not those of a connection: nobody tries again. */
internal fun <T> guarded(file: File, use: () -> T): T =
    try {
        use()
    } catch (err: IOException) {
        throw storageFails(file, err)
    }

/** Appends to a file, or writes it anew; it is on the disk when this returns. */
internal class StagedFile(private val file: File, append: Boolean) : AutoCloseable {
    private val out = guarded(file) { FileOutputStream(file, append) }

    fun write(data: ByteArray, count: Int) = guarded(file) { out.write(data, 0, count) }

    override fun close() = guarded(file) {
        out.use { it.fd.sync() }
    }
}
