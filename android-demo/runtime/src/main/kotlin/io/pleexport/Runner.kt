package io.pleexport

import java.io.File
import java.nio.FloatBuffer
import kotlinx.coroutines.CancellationException
import kotlinx.coroutines.Dispatchers
import kotlinx.coroutines.async
import kotlinx.coroutines.coroutineScope
import kotlinx.coroutines.flow.Flow
import kotlinx.coroutines.flow.flow

private const val DEFAULT_TOKENS = 256

/**
 * What a text is to be like, beside the checkpoint's defaults.
 *
 * @property config what is wanted otherwise than the bundle's manifest says.
 * @property greedy the likeliest token each time, whatever the checkpoint says: nothing of its
 *   defaults counts but the ends of a text.
 * @property seed makes sampling repeatable.
 * @property stop strings that end the text, beside the checkpoint's; they are not part of it.
 * @property ignoreEos go on past end-of-text ids, for timing.
 * @property draft makes what guesses how a text goes on, so that a call of the graph may write
 *   several tokens. `::PromptLookup` reads ahead what followed when the text had these words before.
 */
data class GenerationOptions(
    val config: GenerationConfig = GenerationConfig(),
    val greedy: Boolean = false,
    val seed: Long? = null,
    val stop: List<String> = emptyList(),
    val ignoreEos: Boolean = false,
    val draft: (() -> Drafter)? = null,
)

/**
 * Runs a bundle, one text at a time.
 *
 * A call from another thread is refused while one is at work, and a text whose runner was used for
 * another meanwhile does not go on. Any number of runners may be open on one bundle.
 *
 * @param threads of the runtime; by default as many as there are cores.
 * @param spin whether threads spin while they wait for work, which is fast where nothing else runs
 *   and slow beside another busy process; by default what the bundle's target says.
 * @throws BundleError the bundle cannot be run here.
 * @throws CheckFailed files are damaged.
 * @throws InputError an impossible number of threads.
 */
class Runner(val bundle: Bundle, threads: Int = 0, spin: Boolean? = null) : AutoCloseable {
    /** The same, on a folder. */
    constructor(
        folder: File,
        threads: Int = 0,
        spin: Boolean? = null,
    ) : this(Bundle(folder), threads, spin)

    /** The bundle's tokenizer; null where it takes token ids only. */
    val tokenizer: Tokenizer?

    /** Whether conversations have a form of their own, which `chat` may know or not. */
    val hasChatTemplate: Boolean
        get() =
            bundle.manifest.run { chatFormat != null || noChatFormat != null } ||
                bundle.file(CHAT_TEMPLATE) != null

    /** Of the last text. */
    var stats = Stats()
        private set

    private val blob: Blob
    private val reader: Reader

    init {
        val artifact = bundle.decoder
        if (artifact.backend != "onnx") {
            throw BundleError(
                "`${bundle.path}` is for the backend `${artifact.backend}`, and this library runs `onnx`",
                "build the bundle with `--backend onnx`",
            )
        }
        blob = bundle.openBlob()
        tokenizer = openTokenizer(bundle)
        val session = openOnnxSession(bundle, threads, spin ?: bundle.manifest.spin)
        reader =
            try {
                Reader(blob, session, artifact.contract, bundle.manifest.context)
            } catch (err: PleexportError) {
                session.close()
                throw err
            }
    }

    /** Most tokens of a text. */
    val context: Int
        get() = reader.context

    /** Most tokens of one `feed`. */
    val chunk: Int
        get() = reader.chunk

    /** Token ids that have a row are below it. */
    val numRows: Long
        get() = blob.numRows

    /** Width of the logits. */
    val vocabSize: Int
        get() = bundle.decoder.contract.vocabSize

    /**
     * Logits at every position of a text, from a fresh state.
     *
     * @param tokenIds T ids.
     * @param each gets `[n, vocab]`, piece by piece; of no use when it has returned.
     * @throws InputError no ids, an id without a row, or more than the bundle's context.
     */
    fun logits(tokenIds: IntArray, each: (FloatBuffer) -> Unit) {
        if (tokenIds.isEmpty()) throw InputError("the prompt is empty", "pass at least one token")
        reader.alone {
            reader.checkLength(tokenIds.size)
            reader.reset()
            reader.read(tokenIds, keep = 0, each = each)
        }
    }

    /** The same, `[T, vocab]` in one array. */
    fun logits(tokenIds: IntArray): FloatArray {
        val found = FloatBuffer.allocate(Math.multiplyExact(tokenIds.size, vocabSize))
        logits(tokenIds) { found.put(it) }
        return found.array()
    }

    /**
     * Logits `[n, vocab]` after the next tokens, at most `chunk` of them.
     *
     * @param keep n, how many of the last positions want logits; 0 for all.
     * @throws InputError no tokens or too many, an id without a row, or an impossible `keep`.
     */
    fun feed(tokenIds: IntArray, keep: Int = 1): FloatArray {
        if (tokenIds.size !in 1..chunk) {
            throw InputError(
                "${tokenIds.size} tokens at once; feed 1 to $chunk",
                "`Runner.chunk` says how many one call takes",
            )
        }
        if (keep !in 0..tokenIds.size) {
            throw InputError(
                "keep is $keep; it must be 0 to ${tokenIds.size}",
                "0 keeps all logits",
            )
        }
        return reader.alone {
            val logits = reader.read(tokenIds, keep)
            FloatArray(logits.remaining()).also { logits.get(it) }
        }
    }

    /** Forgets the text so far. */
    fun reset() = reader.alone { reader.reset() }

    /**
     * Token ids of a text, with the special tokens that the tokenizer puts around it.
     *
     * @throws InputError text without a tokenizer.
     */
    fun encode(text: String): IntArray =
        tokenizer?.encode(text)
            ?: throw InputError("this bundle has no tokenizer", "pass token ids instead of text")

    /** Continues a text; see the other `generate`. */
    fun generate(prompt: String, options: GenerationOptions = GenerationOptions()): Flow<Token> =
        generate(encode(prompt), options)

    /**
     * Token ids of a conversation, ready for the model's answer.
     *
     * @param thinking whether the model should; null leaves it to the bundle.
     * @throws InputError the bundle has no chat format, or it has no place for a message.
     */
    fun encodeChat(messages: List<Message>, thinking: Boolean? = null): IntArray {
        val format = bundle.manifest.chatFormat
        val opened = tokenizer
        if (format == null || opened == null) {
            val reason = bundle.manifest.noChatFormat
            throw InputError(
                if (reason == null) "this bundle has no chat format"
                else "this bundle has no chat format: $reason",
                "pass plain text instead",
            )
        }
        return opened.encode(format.render(messages, thinking), addSpecialTokens = false)
    }

    /** Answers a conversation; see the other `generate`. What it says may begin with thoughts. */
    fun chat(
        messages: List<Message>,
        options: GenerationOptions = GenerationOptions(),
        thinking: Boolean? = null,
    ): Flow<Token> = generate(encodeChat(messages, thinking), options)

    /**
     * Continues a prompt, token by token; a collector that is cancelled ends a call of the graph,
     * also within a prompt.
     *
     * A prompt that begins with the whole text so far only has its new part read. What `options`
     * leave open is as the checkpoint's `generation_config.json` had it, and where that says
     * nothing either: greedy, up to 256 tokens.
     *
     * @throws InputError a prompt or option that cannot be used; before anything is generated.
     */
    fun generate(
        promptIds: IntArray,
        options: GenerationOptions = GenerationOptions(),
    ): Flow<Token> {
        if (promptIds.isEmpty()) throw InputError("the prompt is empty", "pass at least one token")
        reader.checkLength(promptIds.size)
        blob.rowIds(promptIds)
        val request = request(promptIds.size, options)
        return flow {
            stats = Stats()
            val generation =
                Generation(reader, blob.numRows, tokenizer, promptIds.copyOf(), request, stats)
            while (true) emit(next(generation) ?: break)
        }
    }

    private suspend fun next(generation: Generation): Token? = coroutineScope {
        val token = async(Dispatchers.Default) { generation.next() }
        try {
            token.await()
        } catch (err: CancellationException) {
            generation.stop()
            throw err
        }
    }

    private fun request(promptTokens: Int, options: GenerationOptions): Request {
        if (options.stop.isNotEmpty() && tokenizer == null) {
            throw InputError(
                "stop strings need a tokenizer, and this bundle has none",
                "leave them out, or build with `--tokenizer PATH`",
            )
        }
        if (options.greedy && (options.config.temperature ?: 0.0) > 0) {
            throw InputError(
                "greedy text has no temperature, and ${options.config.temperature} was given",
                "leave one of the two out",
            )
        }
        val defaults =
            bundle.manifest.generation.takeUnless { options.greedy } ?: GenerationConfig()
        val config = defaults.overridden(options.config)
        config.outOfRange()?.let { throw InputError(it, "leave it out for the default") }
        val ends = bundle.manifest.eosTokenIds.toSet()
        return Request(
            config = config,
            maxNewTokens = room(config, promptTokens),
            seed = options.seed,
            stop = options.stop + (config.stopStrings ?: emptyList()),
            eos = if (options.ignoreEos) emptySet() else ends,
            ends = ends,
            drafter = options.draft?.let(::drafter),
        )
    }

    private fun drafter(draft: () -> Drafter): Drafter {
        if (chunk < 2) {
            throw InputError(
                "drafts are checked several tokens a call, and this bundle's graph takes one",
                "leave drafts out: in such a model a token passes all layers before the next",
            )
        }
        return draft()
    }

    /** How many tokens an answer may have. */
    private fun room(config: GenerationConfig, promptTokens: Int): Int {
        config.maxNewTokens?.let {
            return it
        }
        val most = config.maxLength ?: return DEFAULT_TOKENS
        if (promptTokens >= most) {
            throw InputError(
                "the prompt has $promptTokens tokens, and by the checkpoint's generation config " +
                    "prompt and answer have $most at most",
                "say how long the answer may be with `maxNewTokens`",
            )
        }
        return most - promptTokens
    }

    /** Ends what runs, and gives all memory back; the runner cannot be used afterwards. */
    override fun close() {
        reader.close()
        blob.close()
    }
}
