package io.pleexport

import java.nio.FloatBuffer

/** More guesses rarely come true. */
private const val TOKENS_PER_CALL = 16

/**
 * Guesses how one text goes on; a call of the graph checks many guesses at once.
 *
 * Each token is still chosen from the model's logits after the text before it, in the same order
 * and with the same random numbers. A guess only decides whether these logits are there already.
 * Source: arXiv 2211.17192, and for guesses from the text itself Saxena 2023, "Prompt lookup
 * decoding".
 */
fun interface Drafter {
    /**
     * Up to `most` tokens that may come next, the next one first.
     *
     * @param ids the text so far; what an earlier call was given, and more.
     * @param most 1 or more.
     */
    fun propose(ids: IntArray, most: Int): IntArray
}

/**
 * Drafts what followed the longest earlier piece of the text that reads like its end.
 *
 * As many tokens are drafted as agree already: few after a chance resemblance, many where a passage
 * is repeated. So a deviation costs little, and one accepted draft doubles the next. After a draft
 * of which nothing came true, twice as many tokens must agree, and half as many after a better one.
 * A text that only resembles itself by chance so costs next to nothing.
 *
 * @param fewest tokens that must agree at first, and at least.
 * @param most tokens that must agree at most.
 */
class PromptLookup(private val fewest: Int = 2, private val most: Int = 8) : Drafter {
    private var needed = fewest
    private var firstGuess: Guess? = null

    /** Which token was expected at a place of the text. */
    private class Guess(val place: Int, val token: Int)

    override fun propose(ids: IntArray, most: Int): IntArray {
        learn(ids)
        val last = ids.size - 1
        var longest = 0
        var begin = 0
        for (end in 0 until last) {
            if (ids[end] != ids[last]) continue
            val agreed = agreement(ids, end, enough = maxOf(most, needed))
            if (agreed >= longest) {
                longest = agreed
                begin = end + 1
            }
        }
        if (longest == 0 || longest < needed) return IntArray(0)
        firstGuess = Guess(ids.size, ids[begin])
        return ids.copyOfRange(begin, minOf(begin + minOf(longest, most), ids.size))
    }

    /** How many tokens up to a place are the last ones of the text, as far as that matters. */
    private fun agreement(ids: IntArray, end: Int, enough: Int): Int {
        var agreed = 1
        while (agreed < enough && agreed <= end && ids[end - agreed] == ids[ids.size - 1 - agreed]) {
            agreed++
        }
        return agreed
    }

    /** Asks for more agreement where nothing of the last draft came true, else for less. */
    private fun learn(ids: IntArray) {
        val guess = firstGuess ?: return
        firstGuess = null
        needed =
            if (ids[guess.place] == guess.token) maxOf(needed / 2, fewest)
            else minOf(2 * needed, most)
    }
}

/**
 * The drafter of a name, as command lines have it.
 *
 * @throws InputError the name is not known.
 */
internal fun drafterOf(name: String): () -> Drafter {
    if (name == "lookup") return ::PromptLookup
    throw InputError(
        "draft `$name` is not known; there is `lookup`",
        "leave it out to write a token a call",
    )
}

/**
 * A text that is read with guesses behind its end.
 *
 * @param drafter null to guess nothing.
 * @param stats counts calls, and what was drafted and accepted.
 */
internal class Drafting(
    private val reader: Reader,
    private val drafter: Drafter?,
    private val stats: Stats,
) {
    /** `[1 + drafted, vocab]` of the last call, which the next one overwrites. */
    private var logits = FloatBuffer.allocate(0)
    private var drafted = 0

    /**
     * Logits `[vocab]` after a text, of which the last token is new.
     *
     * @param wanted how many tokens may still come.
     */
    fun logitsAfter(ids: IntArray, wanted: Int): FloatBuffer {
        if (reader.guessed > 0 && reader.ids[reader.ids.size - reader.guessed] == ids.last()) {
            reader.accept()
            stats.acceptedTokens++
        } else {
            read(ids, wanted)
        }
        val vocab = logits.capacity() / (1 + drafted)
        val row = drafted - reader.guessed
        logits.limit((row + 1) * vocab).position(row * vocab)
        return logits
    }

    private fun read(ids: IntArray, wanted: Int) {
        reader.forgetGuesses()
        val unread = ids.copyOfRange(reader.ids.size, ids.size)
        val most = minOf(wanted - 1, minOf(TOKENS_PER_CALL, reader.chunk) - unread.size)
        val proposed = if (most > 0) drafter?.propose(ids, most) else null
        val guesses = proposed?.copyOf(minOf(proposed.size, most)) ?: IntArray(0)
        logits = reader.read(unread + guesses, keep = 1 + guesses.size, guessed = guesses.size)
        drafted = guesses.size
        stats.decodeCalls++
        stats.draftedTokens += drafted
    }
}
