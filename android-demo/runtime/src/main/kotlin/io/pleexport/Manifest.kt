package io.pleexport

import java.io.File
import java.io.IOException

internal const val MANIFEST = "manifest.json"
internal const val BLOB = "embeddings.safetensors"
internal const val DECODER = "decoder"
private const val SCHEMA = 2L

/** The backends that write bundles; this library runs the first. */
private val CONTRACTS = mapOf("onnx" to CONTRACT_ID, "executorch" to "pleexport.executorch/1")

/** A file of the bundle; size in bytes. */
data class FileRecord(val name: String, val size: Long, val sha256: String)

/**
 * `manifest.json`, whose fields are described in docs/bundle-format.md. A reader that meets an
 * unknown schema or field stops.
 *
 * @property context largest number of positions the bundle was built for.
 * @property generation how the checkpoint wants texts generated; null where it says nothing.
 * @property chatFormat the chat template as data; null where there is none, or it cannot be told
 *   so.
 * @property noChatFormat why it cannot, as a clause.
 * @property tablesDigest of the checkpoint's tables; the blob has it too.
 * @property blobShards names of the blob's files where it lies in several.
 * @property spin whether threads spin while they wait, unless a runner is told otherwise.
 */
class Manifest
internal constructor(
    val family: String,
    internal val graphs: Map<String, Artifact>,
    val context: Int,
    val eosTokenIds: List<Int>,
    val generation: GenerationConfig?,
    internal val chatFormat: ChatFormat?,
    val noChatFormat: String?,
    val tableDtype: String,
    val weightDtype: String,
    val cacheDtype: String,
    val target: String,
    val tablesDigest: String,
    internal val blobShards: List<String>,
    val spin: Boolean,
    val files: List<FileRecord>,
) {
    /** Names of the blob's files. */
    internal val blobFiles: List<String>
        get() = blobShards.ifEmpty { listOf(BLOB) }

    /** Names of the files of blob and graphs, without which there is no model. */
    internal val modelFiles: List<String>
        get() = blobFiles + graphs.values.flatMap { it.files }
}

/**
 * The manifest of a bundle's folder, checked.
 *
 * @throws BundleError there is none, or not one that this version reads.
 * @throws CheckFailed it does not match its checksum.
 */
internal fun readManifest(folder: File, checksums: Checksums?): Manifest {
    val path = File(folder, MANIFEST)
    val raw =
        try {
            path.readBytes()
        } catch (err: IOException) {
            throw BundleError(
                "`$folder` is not a bundle: `$MANIFEST` cannot be read (${reason(err)})",
                "`pleexport build CHECKPOINT --target NAME` writes a bundle",
                err,
            )
        }
    checksums?.let { checkBytes(raw, path, it) }
    val manifest =
        try {
            val json = parseJson(raw)
            val schema = (json as? Map<*, *>)?.get("schema")
            if (json is Map<*, *> && schema != SCHEMA) {
                val shown = if (schema is String) quoted(schema) else schema ?: "None"
                throw BundleError(
                    "`$path` has schema $shown; this version reads $SCHEMA",
                    "install the version of pleexport that wrote the bundle, or rebuild it",
                )
            }
            manifest(json)
        } catch (err: MalformedJson) {
            throw BundleError("`$path` is malformed: ${err.message}", COPY_AGAIN, err)
        }
    checkManifest(manifest, path)
    return manifest
}

private fun manifest(value: Any?) =
    fieldsOf(value, "$") {
        required("schema", ::long)
        Manifest(
                family = required("family", ::string),
                graphs = required("graphs", map(::artifact)),
                context = required("context", ::count),
                eosTokenIds = required("eos_token_ids", list(::int)),
                generation = optional("generation", null, orNull(::generationConfig)),
                chatFormat = optional("chat_format", null, orNull(::chatFormat)),
                noChatFormat = optional("no_chat_format", null, orNull(text(0, 4096))),
                tableDtype = required("table_dtype", ::string),
                weightDtype = required("weight_dtype", ::string),
                cacheDtype = required("cache_dtype", oneOf("fp32", "fp16", "int8", "none")),
                target = required("target", ::string),
                tablesDigest = required("tables_digest", ::string),
                blobShards = optional("blob_shards", emptyList(), list(::string)),
                spin = optional("spin", true, ::boolean),
                files = required("files", list(::fileRecord)),
            )
            .also {
                // What says how the bundle was built is of no use here, but has to be there and of
                // its type.
                optional("table_dtypes", emptyMap(), map(::string))
                optional("weight_dtypes", emptyMap(), map(::string))
                optional("max_bytes", null, orNull(::long))
                required("head_dtype", ::string)
                required("block_size", ::int)
                required("symmetric", ::boolean)
                optional("trained_grid", false, ::boolean)
                optional("per_channel", false, ::boolean)
                optional("activation_rounding", true, ::boolean)
                required("calibration_tokens", ::int)
                optional("source", null, orNull(::source))
                optional("adapters", emptyList(), list(::adapterRecord))
                required("versions", map(::string))
                required("parity", ::paritySummary)
            }
    }

private fun fileRecord(value: Any?, path: String) =
    fieldsOf(value, path) {
        FileRecord(
            required("name", ::string),
            required("size", ::long),
            required("sha256", ::string),
        )
    }

private fun source(value: Any?, path: String) =
    fieldsOf(value, path) {
        optional("repository", null, orNull(::string))
        optional("commit", null, orNull(::string))
        required("files", list(::sourceFile))
    }

private fun sourceFile(value: Any?, path: String) =
    fieldsOf(value, path) {
        required("name", ::string)
        required("size", ::long)
        required("digest", ::string)
    }

private fun adapterRecord(value: Any?, path: String) =
    fieldsOf(value, path) {
        required("name", ::string)
        required("weight", ::number)
        required("digest", ::string)
    }

private fun paritySummary(value: Any?, path: String) =
    fieldsOf(value, path) {
        required("checked", ::boolean)
        optional("passed", null, orNull(::boolean))
        optional("max_logit_error", null, orNull(::number))
    }

private fun checkManifest(manifest: Manifest, path: File) {
    val listed = manifest.files.map { it.name }.toSet()
    for (name in listed) {
        // A backslash parts folders on some systems.
        if (name.isEmpty() || name == "." || name == ".." || name.any { it == '/' || it == '\\' }) {
            throw BundleError(
                "`$path` points outside the bundle: `$name`",
                "do not use this bundle",
            )
        }
    }
    if (DECODER !in manifest.graphs) {
        throw BundleError(
            "`$path` has no graph `$DECODER`",
            "rebuild the bundle; nothing else runs it",
        )
    }
    for ((role, graph) in manifest.graphs) checkGraph(role, graph, path)
    manifest.generation?.outOfRange()?.let {
        throw BundleError("`$path` has impossible defaults for generation: $it", COPY_AGAIN)
    }
    manifest.chatFormat?.contradiction()?.let {
        throw BundleError("`$path` has an impossible chat format: $it", COPY_AGAIN)
    }
    for (name in manifest.modelFiles) {
        if (name !in listed)
            throw BundleError("`$path` does not list `$name` among its files", "rebuild the bundle")
    }
}

private fun checkGraph(role: String, graph: Artifact, path: File) {
    val known =
        CONTRACTS[graph.backend]
            ?: throw BundleError(
                "`$path` has graph `$role` of backend `${graph.backend}`; this version knows " +
                    CONTRACTS.keys.joinToString(),
                "install the version of pleexport that wrote the bundle",
            )
    if (graph.contract.id != known) {
        throw BundleError(
            "`$path` follows the graph contract `${graph.contract.id}`; this version knows `$known`",
            "install the version of pleexport that wrote the bundle, or rebuild it",
        )
    }
    if (graph.backend == "onnx") {
        graph.contract.outOfForm()?.let {
            throw BundleError("`$path` is malformed: $it", COPY_AGAIN)
        }
    }
    if (graph.files.isEmpty()) {
        throw BundleError("`$path` is malformed: graph `$role` has no files", COPY_AGAIN)
    }
}
