package io.pleexport

import java.nio.FloatBuffer
import java.util.Random

/**
 * How to continue a prompt.
 *
 * @property eos ids that end the text.
 * @property ends ids that rules take for an end; as `eos`, unless these are to be passed over.
 * @property drafter guesses tokens that are read ahead, or null.
 */
internal class Request(
    val config: GenerationConfig,
    val maxNewTokens: Int,
    val seed: Long?,
    val stop: List<String>,
    val eos: Set<Int>,
    val ends: Set<Int>,
    val drafter: Drafter? = null,
)

/**
 * Continues a prompt, token by token. A prompt that begins with the whole text that was read has
 * only its new part read.
 *
 * @param stats filled while tokens come.
 */
internal class Generation(
    private val reader: Reader,
    private val numRows: Long,
    tokenizer: Tokenizer?,
    private val promptIds: IntArray,
    private val request: Request,
    private val stats: Stats,
) {
    private val random = request.seed?.let(::Random) ?: Random()
    private val sampling = Sampling.of(request.config)
    private val rules =
        LogitRules(
            request.config,
            promptIds,
            request.ends,
            maxLength = promptIds.size + request.maxNewTokens,
        )
    private val text = AnswerText(tokenizer?.stream(promptIds), request.stop)
    private val drafting = Drafting(reader, request.drafter, stats)
    private var ids = promptIds
    private var scores = FloatArray(0)
    private var started = 0L
    private var firstAt = 0L
    private var lastId = 0

    /** The turn of the reader; null before the prompt is read. */
    @Volatile private var turn: Long? = null

    @Volatile private var stopped = false

    /** The next token; null behind the last. */
    fun next(): Token? {
        if (stats.finishReason != null) return null
        if (turn == null) readPrompt() else readLast()
        rules.apply(scores, ids)
        val id = sampling.choose(scores, random)
        chosen()
        if (id in request.eos) {
            stats.finishReason = FinishReason.EOS
            finished()
            return text.flush().takeIf { it.isNotEmpty() }?.let { Token(lastId, it) }
        }
        ids += id
        lastId = id
        var piece = text.push(id)
        stats.finishReason = reason(id)
        if (stats.finishReason != null && stats.finishReason != FinishReason.STOP)
            piece += text.flush()
        if (text.stopped) stats.finishReason = FinishReason.STOP
        finished()
        return Token(id, piece)
    }

    /** Ends a call of `next` that another thread is in. */
    fun stop() {
        stopped = true
        turn?.let(reader::stop)
    }

    private fun reason(id: Int): FinishReason? =
        when {
            text.stopped -> FinishReason.STOP
            stats.generatedTokens == request.maxNewTokens -> FinishReason.LENGTH
            ids.size >= reader.context -> FinishReason.CONTEXT
            id >= numRows -> FinishReason.NO_ROW
            request.config.maxTime?.let { seconds(started) > it } == true -> FinishReason.TIME
            else -> null
        }

    private fun readPrompt() {
        started = System.nanoTime()
        reader.alone { now ->
            turn = now
            if (stopped) throw Stopped()
            reader.forgetGuesses()
            val known = reader.ids
            val goesOn =
                known.isNotEmpty() &&
                    known.size < ids.size &&
                    known.contentEquals(ids.copyOf(known.size))
            if (!goesOn) reader.reset()
            reader.countRows()
            val new = ids.copyOfRange(reader.ids.size, ids.size)
            stats.promptTokens = new.size
            take(reader.read(new, keep = 1))
        }
        stats.prefillSeconds = seconds(started)
    }

    private fun readLast() {
        val wanted =
            minOf(request.maxNewTokens - stats.generatedTokens, reader.context - ids.size)
        reader.alone(turn) { take(drafting.logitsAfter(ids, wanted)) }
    }

    /** Takes logits `[vocab]`, if they are numbers. */
    private fun take(logits: FloatBuffer) {
        if (scores.size != logits.remaining()) scores = FloatArray(logits.remaining())
        logits.get(scores)
        for (score in scores) {
            if (score.isNaN() || score.isInfinite()) {
                throw InputError(
                    "the model's logits are not finite",
                    "`pleexport verify BUNDLE` tells whether its files are damaged",
                )
            }
        }
    }

    private fun chosen() {
        stats.generatedTokens++
        if (stats.generatedTokens == 1) {
            firstAt = System.nanoTime()
            stats.firstTokenSeconds = seconds(started)
        }
    }

    private fun finished() {
        stats.decodeSeconds = seconds(firstAt)
        stats.rows = reader.rowsRead
    }

    private fun seconds(since: Long) = (System.nanoTime() - since) / 1e9
}
