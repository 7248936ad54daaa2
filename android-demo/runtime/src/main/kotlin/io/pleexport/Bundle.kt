package io.pleexport

import java.io.File

/**
 * A bundle on disk, the folder that ships; opening reads the manifest and checks that the files
 * have their sizes. Any number of runners may use one.
 *
 * @param path its folder.
 * @param verify compare with its checksums what is read, now and when weights are loaded.
 * @throws BundleError no bundle, another schema, a malformed manifest, or a missing file.
 * @throws CheckFailed the manifest is damaged, a file has another size than it says, or a small one
 *   does not match its checksum.
 */
class Bundle(val path: File, verify: Boolean = true) {
    val manifest: Manifest

    /** Of its files; null where nothing is compared. */
    internal val checksums: Checksums?

    init {
        if (verify && File(path, CHECKSUMS).exists()) {
            checksums = readChecksums(path)
            manifest = readManifest(path, checksums)
            checkNames(checksums)
        } else {
            manifest = readManifest(path, null)
            checksums = if (verify) readChecksums(path) else null // says that there are none
        }
        manifest.files.forEach(::checkSize)
        checksums?.let { checkFiles(smallFiles(), it) }
    }

    /** What is small and no part of the model; nothing else would compare most of it. */
    private fun smallFiles(): List<File> {
        val own = manifest.modelFiles
        return manifest.files
            .filter { it.name !in own && it.size <= CHUNK_BYTES }
            .map { File(path, it.name) }
    }

    /** The graph that computes logits. */
    internal val decoder: Artifact
        get() = manifest.graphs.getValue(DECODER)

    /** Size of the graph's files, which memory has to hold; rows are mapped. */
    val graphBytes: Long
        get() = decoder.files.let { own -> manifest.files.filter { it.name in own }.sumOf { it.size } }

    /** Size of all files, the manifest left out. */
    val bytes: Long
        get() = manifest.files.sumOf { it.size }

    /**
     * The blob, with the table that the decoder's files hold where they hold one.
     *
     * @throws BlobError a file breaks a rule of docs/blob-format.md.
     * @throws CheckFailed a header does not match its checksum.
     * @throws BundleError files of two bundles are mixed.
     */
    fun openBlob(): Blob {
        val tied = if (TIED in decoder.files) TiedRows(File(path, TIED)) else null
        if (tied != null && tied.weightsDigest != decoder.weightsDigest) {
            throw BundleError(
                "`${tied.file}` is of another bundle: its graph is not that of the manifest",
                COPY_AGAIN,
            )
        }
        val blob = Blob(manifest.blobFiles.map { File(path, it) }, tied)
        if (blob.sourceDigest != manifest.tablesDigest) {
            throw BundleError(
                "`${blob.file}` is the blob of another bundle: its tables are not those of the " +
                    "manifest",
                COPY_AGAIN,
            )
        }
        return blob
    }

    /**
     * Compares every file with its digest and its checksums, and every row with its own.
     *
     * @throws CheckFailed names the first that differs.
     */
    fun verify() {
        val expected = checksums ?: readChecksums(path)
        manifest.files.forEach { compare(it, expected) }
        openBlob().use(Blob::verify)
    }

    private fun compare(record: FileRecord, expected: Checksums) {
        val file = File(path, record.name)
        val (digest, found) = sha256AndChecksums(file)
        if (digest != record.sha256 || found != expected.files[record.name]) {
            val where = if (digest != record.sha256) "the manifest" else "`$CHECKSUMS`"
            throw CheckFailed("`$file` does not match its digest in $where", COPY_AGAIN)
        }
    }

    /** The file of that name; null where the manifest lists none. */
    internal fun file(name: String): File? =
        manifest.files.firstOrNull { it.name == name }?.let { File(path, name) }

    /** Refuses checksums of other files than those of the bundle. */
    private fun checkNames(checksums: Checksums) {
        val names = manifest.files.map { it.name }.toSet() + MANIFEST
        val other = ((names - checksums.files.keys) + (checksums.files.keys - names)).minOrNull()
        if (other != null) {
            throw CheckFailed(
                "`${File(path, CHECKSUMS)}` is damaged: it and the manifest disagree about `$other`",
                COPY_AGAIN,
            )
        }
    }

    private fun checkSize(record: FileRecord) {
        val file = File(path, record.name)
        if (!file.isFile) {
            throw BundleError(
                "`$path` lacks `${record.name}`, which its manifest lists",
                "the copy is incomplete; copy the bundle again, or rebuild it",
            )
        }
        if (file.length() != record.size) {
            throw CheckFailed(
                "`$file` has ${file.length()} bytes; the manifest says ${record.size}",
                "copy the bundle again, or rebuild it",
            )
        }
    }
}
