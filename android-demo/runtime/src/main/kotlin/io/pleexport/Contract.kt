package io.pleexport

internal const val CONTRACT_ID = "pleexport.decoder/1"
internal const val TOKENS = "sequence_length"
internal const val ALL_TOKENS = "total_sequence_length"
internal const val POSITION_IDS = "position_ids"
internal const val NUM_LOGITS_TO_KEEP = "num_logits_to_keep"
internal const val LOGITS = "logits"

/** A dimension: a number of elements, or the name of one that changes from call to call. */
internal class Dimension(val size: Long?, val name: String?) {
    override fun toString() = name ?: size.toString()
}

/** A graph input that takes looked-up vectors of one table. */
internal class LookupInput(val name: String, val table: String, val shape: List<Dimension>) {
    /** Whether it takes those of all tokens so far, not of the new ones only. */
    val wholeText: Boolean
        get() = shape[1].name == ALL_TOKENS

    /** Elements of one token. */
    val tokenElements: Long
        get() = shape.drop(2).fold(1L) { all, n -> Math.multiplyExact(all, n.size!!) }
}

/** What a call takes from the one before and hands on. */
internal sealed class Held(val input: String, val output: String)

/**
 * A tensor of a cache: graph input and output of one shape, which share a buffer.
 *
 * @property shape `[1, heads, slots, width]`.
 * @property block the number of slots is a multiple of it.
 * @property window positions that a token sees, its own included, of a ring; null where it has slots
 *   for all.
 * @property sharedOutputs further outputs that share the buffer.
 */
internal class CacheInput(
    input: String,
    output: String,
    val shape: List<Dimension>,
    val dtype: String,
    val block: Int,
    val window: Int?,
    val sharedOutputs: List<String>,
) : Held(input, output) {
    val outputs: List<String>
        get() = listOf(output) + sharedOutputs

    val heads: Int
        get() = shape[1].size!!.toInt()

    val width: Int
        get() = shape[3].size!!.toInt()

    val elementBytes: Int
        get() =
            when (dtype) {
                "fp32" -> 4
                "fp16" -> 2
                else -> 1
            }
}

/** A float32 tensor that a call gives and the next call takes; zeros before a text. */
internal class StateInput(input: String, output: String, val shape: LongArray) :
    Held(input, output)

/**
 * What a runner must know of the graph: docs/bundle-format.md.
 *
 * @property tokensPerCall most tokens of one call; null for any number.
 */
internal class GraphContract(
    val id: String,
    val lookupInputs: List<LookupInput>,
    val caches: List<CacheInput>,
    val states: List<StateInput>,
    val tokensPerCall: Int?,
    val vocabSize: Int,
)

/**
 * A graph of a bundle, as its backend wrote it.
 *
 * @property files names in the bundle's folder, the one to open first.
 */
internal class Artifact(
    val backend: String,
    val contract: GraphContract,
    val files: List<String>,
    val weightsDigest: String,
)

internal fun artifact(value: Any?, path: String): Artifact =
    fieldsOf(value, path) {
        val backend = required("backend", ::string)
        Artifact(
                backend = backend,
                contract = required("contract", ::contract),
                files = required("files", list(::string)),
                weightsDigest = required("weights_digest", ::string),
            )
            .also { required("versions", map(::string)) }
    }

private fun contract(value: Any?, path: String) =
    fieldsOf(value, path) {
        GraphContract(
                id = required("id", ::string),
                lookupInputs = required("lookup_inputs", list(::lookupInput)),
                caches = required("caches", list(::cacheInput)),
                states = required("states", list(::stateInput)),
                tokensPerCall = required("tokens_per_call", orNull(::count)),
                vocabSize = required("vocab_size", ::count),
            )
            .also {
                required("num_layers", ::int)
                optional("bounds", emptyMap(), map(::int))
                optional("processor", "cpu", oneOf("cpu", "gpu"))
            }
    }

private fun lookupInput(value: Any?, path: String) =
    fieldsOf(value, path) {
        LookupInput(
            required("name", ::string),
            required("table", ::string),
            required("shape", ::shape),
        )
    }

private fun cacheInput(value: Any?, path: String) =
    fieldsOf(value, path) {
        CacheInput(
                input = required("input", ::string),
                output = required("output", ::string),
                shape = required("shape", ::shape),
                dtype = required("dtype", oneOf("fp32", "fp16", "int8")),
                block = required("block", ::count),
                window = required("window", orNull(::count)),
                sharedOutputs = optional("shared_outputs", emptyList(), list(::string)),
            )
            .also { required("layer", ::int) }
    }

private fun stateInput(value: Any?, path: String) =
    fieldsOf(value, path) {
        StateInput(
            required("input", ::string),
            required("output", ::string),
            required("shape", list(atLeast(1))).toLongArray(),
        )
    }

private fun shape(value: Any?, path: String): List<Dimension> =
    list { size, at ->
        if (size is String) Dimension(null, size) else Dimension(count(size, at).toLong(), null)
    }(value, path)

/** Refuses shapes that docs/bundle-format.md does not have. */
internal fun GraphContract.outOfForm(): String? {
    for (lookup in lookupInputs) {
        val names = lookup.shape.map { it.name }
        if (
            lookup.shape.size !in 3..4 ||
                lookup.shape[0].size != 1L ||
                names[1] !in listOf(TOKENS, ALL_TOKENS) ||
                names.drop(2).any { it != null }
        ) {
            return "`${lookup.name}` has the shape ${lookup.shape}"
        }
    }
    for (cache in caches) {
        val names = cache.shape.map { it.name }
        if (
            cache.shape.size != 4 ||
                cache.shape[0].size != 1L ||
                names[1] != null ||
                names[2] == null ||
                names[3] != null
        ) {
            return "`${cache.input}` has the shape ${cache.shape}"
        }
    }
    return null
}
