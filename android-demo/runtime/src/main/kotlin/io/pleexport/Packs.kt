package io.pleexport

import java.io.File
import java.io.FileOutputStream
import java.io.IOException
import java.nio.file.Files

/** Folders that hold the files of one bundle together, as `pleexport package` writes them. */
object Packs {
    /**
     * Lays all files of packs into one folder, which is the bundle then. Where the system lets a
     * file have two names, nothing is copied; the packs stay as they are.
     *
     * The folder is made under a hidden name beside its place, and takes it when it is complete.
     * One thread at a time joins into a place.
     *
     * @param packs their folders, in any order.
     * @param into takes the bundle, and is not there yet.
     * @throws BundleError a file is in no pack, or `into` is there or cannot be written.
     * @throws CheckFailed a file has another size than the manifest says, or manifest or checksums
     *   are damaged.
     */
    @JvmStatic
    fun join(packs: List<File>, into: File) {
        if (into.exists()) {
            throw BundleError("`$into` exists already", "open it as a bundle, or remove it first")
        }
        val place = into.absoluteFile
        val staging = File(place.parentFile, ".${place.name}.partial")
        remove(staging)
        try {
            if (!staging.mkdirs()) throw IOException("no such folder can be made")
            lay(find(packs, MANIFEST), staging)
            lay(find(packs, CHECKSUMS), staging)
            for (record in readManifest(staging, readChecksums(staging)).files) {
                val file = find(packs, record.name)
                if (file.length() != record.size) {
                    throw CheckFailed(
                        "`$file` has ${file.length()} bytes; the manifest says ${record.size}",
                        "fetch the pack again",
                    )
                }
                lay(file, staging)
            }
            if (!staging.renameTo(place)) throw IOException("the folder cannot get its name")
        } catch (err: IOException) {
            throw BundleError(
                "`$into` cannot be written: ${reason(err)}",
                "free some space, or choose another folder",
                err,
            )
        } finally {
            remove(staging)
        }
    }

    private fun find(packs: List<File>, name: String): File =
        packs.map { File(it, name) }.firstOrNull(File::isFile)
            ?: throw BundleError(
                "no pack holds `$name`, which the bundle needs",
                "fetch all packs of the bundle, and give all their folders",
            )

    /** Gives a file a second name in a folder, or copies it there. */
    private fun lay(file: File, folder: File) {
        val to = File(folder, file.name)
        try {
            Files.createLink(to.toPath(), file.canonicalFile.toPath())
        } catch (err: IOException) {
            copy(file, to)
        } catch (err: UnsupportedOperationException) {
            copy(file, to)
        } catch (err: SecurityException) {
            copy(file, to)
        }
    }

    private fun copy(file: File, to: File) {
        FileOutputStream(to).use { out ->
            file.inputStream().use { it.copyTo(out, CHUNK_BYTES) }
            out.fd.sync()
        }
    }

    private fun remove(folder: File) {
        folder.deleteRecursively()
    }
}
