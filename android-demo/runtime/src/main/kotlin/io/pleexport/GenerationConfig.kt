package io.pleexport

/**
 * What decoding one text obeys, by the meanings that docs/bundle-format.md has for them; null is
 * that nothing is said.
 *
 * In the manifest these are the checkpoint's defaults; a call says what it wants otherwise.
 */
data class GenerationConfig(
    val doSample: Boolean? = null,
    val temperature: Double? = null,
    val topK: Int? = null,
    val topP: Double? = null,
    val minP: Double? = null,
    val topH: Double? = null,
    val typicalP: Double? = null,
    val epsilonCutoff: Double? = null,
    val etaCutoff: Double? = null,
    val sequenceBias: List<Pair<List<Int>, Double>>? = null,
    val encoderRepetitionPenalty: Double? = null,
    val repetitionPenalty: Double? = null,
    val noRepeatNgramSize: Int? = null,
    val encoderNoRepeatNgramSize: Int? = null,
    val badWordsIds: List<List<Int>>? = null,
    val minLength: Int? = null,
    val minNewTokens: Int? = null,
    val exponentialDecayLengthPenalty: Pair<Int, Double>? = null,
    val suppressTokens: List<Int>? = null,
    val beginSuppressTokens: List<Int>? = null,
    val forcedBosTokenId: Int? = null,
    val forcedEosTokenId: List<Int>? = null,
    val maxNewTokens: Int? = null,
    val maxLength: Int? = null,
    val maxTime: Double? = null,
    val stopStrings: List<String>? = null,
) {
    /** The same with what another one says in place of it; a temperature says whether to sample. */
    fun overridden(by: GenerationConfig): GenerationConfig =
        GenerationConfig(
            doSample = by.temperature?.let { it > 0 } ?: by.doSample ?: doSample,
            temperature = by.temperature ?: temperature,
            topK = by.topK ?: topK,
            topP = by.topP ?: topP,
            minP = by.minP ?: minP,
            topH = by.topH ?: topH,
            typicalP = by.typicalP ?: typicalP,
            epsilonCutoff = by.epsilonCutoff ?: epsilonCutoff,
            etaCutoff = by.etaCutoff ?: etaCutoff,
            sequenceBias = by.sequenceBias ?: sequenceBias,
            encoderRepetitionPenalty = by.encoderRepetitionPenalty ?: encoderRepetitionPenalty,
            repetitionPenalty = by.repetitionPenalty ?: repetitionPenalty,
            noRepeatNgramSize = by.noRepeatNgramSize ?: noRepeatNgramSize,
            encoderNoRepeatNgramSize = by.encoderNoRepeatNgramSize ?: encoderNoRepeatNgramSize,
            badWordsIds = by.badWordsIds ?: badWordsIds,
            minLength = by.minLength ?: minLength,
            minNewTokens = by.minNewTokens ?: minNewTokens,
            exponentialDecayLengthPenalty =
                by.exponentialDecayLengthPenalty ?: exponentialDecayLengthPenalty,
            suppressTokens = by.suppressTokens ?: suppressTokens,
            beginSuppressTokens = by.beginSuppressTokens ?: beginSuppressTokens,
            forcedBosTokenId = by.forcedBosTokenId ?: forcedBosTokenId,
            forcedEosTokenId = by.forcedEosTokenId ?: forcedEosTokenId,
            maxNewTokens = by.maxNewTokens ?: maxNewTokens,
            maxLength = by.maxLength ?: maxLength.takeIf { by.maxNewTokens == null },
            maxTime = by.maxTime ?: maxTime,
            stopStrings = by.stopStrings ?: stopStrings,
        )

    /**
     * What is wrong with the first field that has an impossible value, such as "top_k is -1; it
     * must be 0 or more"; null where nothing is.
     */
    fun outOfRange(): String? {
        val share: (Double) -> Boolean = { it in 0.0..1.0 }
        val penalty: (Double) -> Boolean = { it in 1e-3..1e3 }
        val positiveShare: (Double) -> Boolean = { it > 0 && it <= 1 }
        val cutoff: (Double) -> Boolean = { it >= 0 && it < 1 }
        val sequences: (List<List<Int>>) -> Boolean = { words -> words.none { it.isEmpty() } }
        return sequenceOf(
                wrong("temperature", temperature, "0 or more") { it >= 0 && it < INFINITE },
                wrong("top_k", topK, COUNT) { it >= 0 },
                wrong("top_p", topP, SHARE, share),
                wrong("min_p", minP, SHARE, share),
                wrong("top_h", topH, POSITIVE_SHARE, positiveShare),
                wrong("typical_p", typicalP, POSITIVE_SHARE, positiveShare),
                wrong("epsilon_cutoff", epsilonCutoff, CUTOFF, cutoff),
                wrong("eta_cutoff", etaCutoff, CUTOFF, cutoff),
                wrong(
                    "sequence_bias",
                    sequenceBias,
                    "pairs of one or more token ids and a finite number",
                ) { pairs ->
                    sequences(pairs.map { it.first }) &&
                        pairs.all { Math.abs(it.second) < INFINITE }
                },
                wrong("encoder_repetition_penalty", encoderRepetitionPenalty, PENALTY, penalty),
                wrong("repetition_penalty", repetitionPenalty, PENALTY, penalty),
                wrong("no_repeat_ngram_size", noRepeatNgramSize, COUNT) { it >= 0 },
                wrong("encoder_no_repeat_ngram_size", encoderNoRepeatNgramSize, COUNT) { it >= 0 },
                wrong("bad_words_ids", badWordsIds, "lists of one or more token ids", sequences),
                wrong("min_length", minLength, COUNT) { it >= 0 },
                wrong("min_new_tokens", minNewTokens, COUNT) { it >= 0 },
                wrong(
                    "exponential_decay_length_penalty",
                    exponentialDecayLengthPenalty,
                    "a number of tokens, 0 or more, and a factor above 0",
                ) {
                    it.first >= 0 && it.second > 0 && it.second < INFINITE
                },
                wrong("max_new_tokens", maxNewTokens, "1 or more") { it >= 1 },
                wrong("max_length", maxLength, "1 or more") { it >= 1 },
                wrong("max_time", maxTime, "above 0") { it > 0 && it < INFINITE },
            )
            .firstOrNull { it != null }
    }

    /** Asks for what is valid: a NaN is nothing of it. */
    private fun <T : Any> wrong(
        name: String,
        value: T?,
        expected: String,
        valid: (T) -> Boolean,
    ): String? = value?.takeUnless(valid)?.let { "$name is $it; it must be $expected" }

    private companion object {
        const val INFINITE = Double.POSITIVE_INFINITY
        const val COUNT = "0 or more"
        const val SHARE = "from 0 to 1"
        const val POSITIVE_SHARE = "above 0 and at most 1"
        const val CUTOFF = "from 0 and below 1"
        const val PENALTY = "from 0.001 to 1000"
    }
}

internal fun generationConfig(value: Any?, path: String) =
    fieldsOf(value, path) {
        fun whole(name: String) = optional(name, null, orNull(::int))
        fun real(name: String) = optional(name, null, orNull(::number))
        fun ids(name: String) = optional(name, null, orNull(list(::int)))
        GenerationConfig(
            doSample = optional("do_sample", null, orNull(::boolean)),
            temperature = real("temperature"),
            topK = whole("top_k"),
            topP = real("top_p"),
            minP = real("min_p"),
            topH = real("top_h"),
            typicalP = real("typical_p"),
            epsilonCutoff = real("epsilon_cutoff"),
            etaCutoff = real("eta_cutoff"),
            sequenceBias =
                optional("sequence_bias", null, orNull(list(pair(list(::int), ::number)))),
            encoderRepetitionPenalty = real("encoder_repetition_penalty"),
            repetitionPenalty = real("repetition_penalty"),
            noRepeatNgramSize = whole("no_repeat_ngram_size"),
            encoderNoRepeatNgramSize = whole("encoder_no_repeat_ngram_size"),
            badWordsIds = optional("bad_words_ids", null, orNull(list(list(::int)))),
            minLength = whole("min_length"),
            minNewTokens = whole("min_new_tokens"),
            exponentialDecayLengthPenalty =
                optional("exponential_decay_length_penalty", null, orNull(pair(::int, ::number))),
            suppressTokens = ids("suppress_tokens"),
            beginSuppressTokens = ids("begin_suppress_tokens"),
            forcedBosTokenId = whole("forced_bos_token_id"),
            forcedEosTokenId = optional("forced_eos_token_id", null, orNull(oneOrMore(::int))),
            maxNewTokens = whole("max_new_tokens"),
            maxLength = whole("max_length"),
            maxTime = real("max_time"),
            stopStrings = optional("stop_strings", null, orNull(oneOrMore(::string))),
        )
    }

private fun <A, B> pair(
    first: (Any?, String) -> A,
    second: (Any?, String) -> B,
): (Any?, String) -> Pair<A, B> = { value, path ->
    val both = list { held, _ -> held }(value, path)
    if (both.size != 2) throw MalformedJson("Expected `array` of length 2 - at `$path`")
    first(both[0], "$path[0]") to second(both[1], "$path[1]")
}

private fun <T> oneOrMore(each: (Any?, String) -> T): (Any?, String) -> List<T> = { value, path ->
    if (value is List<*>) list(each)(value, path) else listOf(each(value, path))
}
