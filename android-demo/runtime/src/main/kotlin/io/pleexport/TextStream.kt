package io.pleexport

/**
 * Ids to text as they come: what was said is never taken back, and all of it is what `decode` says.
 */
interface TextStream {
    /** The text that this id completes; "" where what follows may still change it. */
    fun push(id: Int): String

    /** What is still held back when the text ends. */
    fun flush(): String
}

/** What a stream has to know of its tokenizer. */
internal interface Decoding {
    /** The text of ids, special tokens left out. */
    fun decode(ids: List<Int>): String

    /** Whether an id is a byte of a byte-fallback decoder. */
    fun isByte(id: Int): Boolean

    /** Whether `decode` passes an id over. */
    fun isSilent(id: Int): Boolean
}

/**
 * The text of ids by a decoder that is known by what it decodes.
 *
 * Joined, the pieces are what `decode` makes of all ids. After a prompt they are how its text goes
 * on: some decoders drop a space at the beginning of a text, and this is not one. Of a character
 * that a prompt has begun, only the ids that follow count.
 */
internal class DecodedStream(private val tokenizer: Decoding, promptIds: IntArray) : TextStream {
    private var before: List<Int> = anchor(promptIds)
    private var ids: List<Int> = emptyList()

    override fun push(id: Int): String {
        if (tokenizer.isSilent(id)) return ""
        ids = ids + id
        if (tokenizer.isByte(id)) return "" // the run may go on
        val text = text()
        return if (text == null || text.endsWith(REPLACEMENT)) "" else said(text)
    }

    override fun flush(): String = said(text() ?: "")

    /** What the waiting ids add to those before them; null where that is not settled yet. */
    private fun text(): String? {
        val known = tokenizer.decode(before)
        val text = tokenizer.decode(before + ids)
        return if (text.startsWith(known)) text.substring(known.length) else null
    }

    private fun said(text: String): String {
        if (text.isNotEmpty()) {
            before = ids
            ids = emptyList()
        }
        return text
    }

    /** The last id of the prompt that has a text of its own, so that it is not said again. */
    private fun anchor(promptIds: IntArray): List<Int> {
        for (id in promptIds.takeLast(PROMPT_IDS).reversed()) {
            if (tokenizer.isSilent(id) || tokenizer.isByte(id)) continue
            val text = tokenizer.decode(listOf(id))
            if (text.isNotEmpty() && REPLACEMENT !in text) return listOf(id)
        }
        return emptyList()
    }

    private companion object {
        /** A text ends with this where its last character is not whole yet, or never will be. */
        const val REPLACEMENT = '\uFFFD'

        /** How much of a prompt is looked at for an id that can stand before a text. */
        const val PROMPT_IDS = 8
    }
}

/** A stream whose text is cleaned as `clean` does it. */
internal class CleanedStream(private val stream: TextStream) : TextStream {
    private var held = ""

    override fun push(id: Int): String {
        held += stream.push(id)
        return shown((held.length - 1 downTo WORD).firstOrNull(::isBehindWord) ?: 0)
    }

    override fun flush(): String {
        held += stream.flush()
        return shown(held.length)
    }

    private fun shown(length: Int): String {
        val text = held.substring(0, length)
        held = held.substring(length)
        return clean(text)
    }

    /** What cleaning changes begins with a space and cannot reach across the end of such a word. */
    private fun isBehindWord(at: Int): Boolean {
        if (!isWhiteSpace(held[at]) || held.codePointCount(0, at) < WORD) return false
        return (held.offsetByCodePoints(at, -WORD) until at).none {
            isWhiteSpace(held[it]) || held[it] in ".,?!'"
        }
    }

    private companion object {
        /** Characters of such a word, at least. */
        const val WORD = 3
    }
}

/**
 * A text without the spaces that some decoders leave before punctuation.
 *
 * Source: `clean_up_tokenization` of transformers; the order counts.
 */
internal fun clean(text: String): String {
    var cleaned = text
    for (mark in listOf(".", "?", "!", ",")) cleaned = cleaned.replace(" $mark", mark)
    cleaned = cleaned.replace(" ' ", "'")
    for (ending in listOf("n't", "'m", "'s", "'ve", "'re")) cleaned =
        cleaned.replace(" $ending", ending)
    return cleaned
}
