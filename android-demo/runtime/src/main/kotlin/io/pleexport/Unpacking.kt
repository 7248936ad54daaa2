package io.pleexport

import java.io.File
import java.io.IOException
import java.io.InputStream
import kotlinx.coroutines.Dispatchers
import kotlinx.coroutines.currentCoroutineContext
import kotlinx.coroutines.ensureActive
import kotlinx.coroutines.flow.Flow
import kotlinx.coroutines.flow.flow
import kotlinx.coroutines.flow.flowOn

private const val PIECE_BYTES = 1 shl 20

/**
 * Copies a bundle out of an app's assets, or out of anything else that gives streams: graphs and
 * rows are mapped by path, so they have to be files. Cold; a collector that is cancelled leaves
 * nothing.
 *
 * @param name of the bundle.
 * @param files names of all its files.
 * @param into where it takes its place.
 * @param open the content of a file, by its name.
 * @return ends with the bundle's folder. It throws DeliveryError where the storage is full or
 *   fails, and CheckFailed and BundleError where what was shipped is no whole bundle.
 */
fun unpack(
    name: String,
    files: Collection<String>,
    into: BundleFolder,
    open: (String) -> InputStream,
): Flow<Delivery> =
    flow {
            val staging = into.staging(name)
            staging.deleteRecursively()
            staging.mkdirs()
            try {
                if (MANIFEST in files) open(MANIFEST).use { it.copyTo(File(staging, MANIFEST)) }
                val listed = readManifest(staging, null).files
                val total = listed.sumOf { it.size }
                into.checkRoom(total, name)
                var done = 0L
                for (file in files.filter { it != MANIFEST }) {
                    val piece = ByteArray(PIECE_BYTES)
                    StagedFile(File(staging, file), append = false).use { out ->
                        open(file).use { input ->
                            while (true) {
                                currentCoroutineContext().ensureActive()
                                val count = input.read(piece)
                                if (count < 0) break
                                out.write(piece, count)
                                done += count
                                emit(Delivery(name, done, total))
                            }
                        }
                    }
                }
                emit(Delivery(name, total, total, folder = into.put(staging, name)))
            } catch (err: IOException) {
                throw DeliveryError(
                    "`$name` cannot be read out of the app (${reason(err)})",
                    "install the app again",
                    err,
                )
            } finally {
                staging.deleteRecursively()
            }
        }
        .flowOn(Dispatchers.IO)

private fun InputStream.copyTo(file: File) {
    val piece = ByteArray(PIECE_BYTES)
    StagedFile(file, append = false).use { out ->
        while (true) {
            val count = read(piece)
            if (count < 0) break
            out.write(piece, count)
        }
    }
}
