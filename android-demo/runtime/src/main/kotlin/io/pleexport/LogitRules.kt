package io.pleexport

/**
 * The rules of one answer: they change logits by what a text holds already. Which there are, and
 * their order, is in docs/bundle-format.md (GenerationConfig).
 *
 * @param promptIds what is continued.
 * @param eos ids that end a text.
 * @param maxLength most tokens of prompt and answer.
 */
internal class LogitRules(
    private val config: GenerationConfig,
    private val promptIds: IntArray,
    private val eos: Set<Int>,
    private val maxLength: Int,
) {
    private val minLength =
        config.minNewTokens?.let { promptIds.size + it } ?: config.minLength ?: 0

    /** Tokens that are forced before the first that is chosen. */
    private val forcedFirst = if (promptIds.size == 1 && config.forcedBosTokenId != null) 1 else 0

    // A later entry for the same ids replaces an earlier one. An end of a text is never a bad word.
    private val biases = (config.sequenceBias ?: emptyList()).toMap()
    private val words = (config.badWordsIds ?: emptyList()).toSet() - eos.map { listOf(it) }.toSet()
    private val changes =
        config.run {
            listOf(
                    sequenceBias,
                    encoderRepetitionPenalty,
                    repetitionPenalty,
                    noRepeatNgramSize,
                    encoderNoRepeatNgramSize,
                    badWordsIds,
                    minLength,
                    minNewTokens,
                    exponentialDecayLengthPenalty,
                    suppressTokens,
                    beginSuppressTokens,
                    forcedBosTokenId,
                    forcedEosTokenId,
                )
                .any { it != null }
        }

    /**
     * Changes logits `[vocab]` in place; minus infinity is a token that may not come.
     *
     * @param ids the text so far, the prompt first.
     */
    fun apply(scores: FloatArray, ids: IntArray) {
        if (!changes) return
        val new = ids.size - promptIds.size
        for ((sequence, bias) in biases) bias(scores, ids, sequence, bias.toFloat())
        penalise(scores, promptIds, (1 / (config.encoderRepetitionPenalty ?: 1.0)).toFloat())
        penalise(scores, ids, (config.repetitionPenalty ?: 1.0).toFloat())
        forbid(scores, continuations(ids, ids, config.noRepeatNgramSize ?: 0))
        forbid(scores, continuations(promptIds, ids, config.encoderNoRepeatNgramSize ?: 0))
        for (word in words) bias(scores, ids, word, NEVER)
        if (ids.size < minLength) forbid(scores, eos)
        config.forcedBosTokenId?.let { if (ids.size == 1) force(scores, listOf(it)) }
        config.forcedEosTokenId?.let { if (ids.size == maxLength - 1) force(scores, it) }
        config.exponentialDecayLengthPenalty?.let { (start, factor) ->
            favour(scores, factor, tokens = new - start)
        }
        forbid(scores, config.suppressTokens ?: emptyList())
        if (new == forcedFirst) forbid(scores, config.beginSuppressTokens ?: emptyList())
    }

    private fun bias(scores: FloatArray, text: IntArray, sequence: List<Int>, bias: Float) {
        val begin = text.size - (sequence.size - 1)
        if (begin < 0 || sequence.last() !in scores.indices) return
        for (i in 0 until sequence.size - 1) if (text[begin + i] != sequence[i]) return
        scores[sequence.last()] += bias
    }

    private fun penalise(scores: FloatArray, ids: IntArray, penalty: Float) {
        if (penalty == 1f) return
        for (id in ids.toSet()) if (id in scores.indices) {
            scores[id] = if (scores[id] < 0) scores[id] * penalty else scores[id] / penalty
        }
    }

    private fun forbid(scores: FloatArray, ids: Collection<Int>) {
        for (id in ids) if (id in scores.indices) scores[id] = NEVER
    }

    private fun force(scores: FloatArray, ids: List<Int>) {
        scores.fill(NEVER)
        for (id in ids) if (id in scores.indices) scores[id] = 0f
    }

    /** Makes an end likelier by a factor for each token: adds what a logit's size grows by. */
    private fun favour(scores: FloatArray, factor: Double, tokens: Int) {
        if (tokens <= 0) return
        val growth = (Math.pow(factor, tokens.toDouble()) - 1).toFloat()
        for (id in eos) if (id in scores.indices && !scores[id].isInfinite()) {
            scores[id] += Math.abs(scores[id]) * growth
        }
    }

    /** What follows in `source` wherever it has the last `size - 1` ids of the text. */
    private fun continuations(source: IntArray, text: IntArray, size: Int): List<Int> {
        if (size == 0 || source.size < size || text.size < size - 1) return emptyList()
        val begin = text.size - size + 1
        return (0..source.size - size)
            .filter { at -> (0 until size - 1).all { source[at + it] == text[begin + it] } }
            .map { source[it + size - 1] }
    }

    private companion object {
        const val NEVER = Float.NEGATIVE_INFINITY
    }
}
