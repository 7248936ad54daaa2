package io.pleexport

/** What stands around thoughts in the text of models: in tags, and in Gemma 4's channel. */
private val MARKERS = listOf("<think>" to "</think>", "<|channel>thought" to "<channel|>")

/** How many ids of a prompt can hold a marker at its end. */
private const val PROMPT_IDS = 16

/**
 * Shows the text of an answer without the model's thoughts.
 *
 * @param tokenizer knows special tokens, and what else its folder says about thoughts.
 * @param promptIds what the answer follows; it may have begun a thought.
 */
class ThoughtFilter(private val tokenizer: Tokenizer, promptIds: IntArray) {
    private val markers = MARKERS + tokenizer.thoughtMarkers
    private val specials = HashSet<String>()
    private var held = ""
    private var afterThought = false
    private var inside: Boolean

    init {
        val last = promptIds.takeLast(PROMPT_IDS).toIntArray()
        val prompt = tokenizer.decode(last, withSpecials = true).trimEnd(::isWhiteSpace)
        inside = markers.any { prompt.endsWith(it.first) }
    }

    /** What people see of a token. */
    fun push(token: Token): String {
        // A marker may be a special token, whose text nobody sees otherwise.
        val special = tokenizer.specialText(token.id)
        val isPart =
            special.isNotEmpty() && markers.any { special in it.first || special in it.second }
        if (isPart) specials += special
        held += token.text + if (isPart) special else ""
        val shown = StringBuilder()
        while (true) {
            val (begin, marker) =
                expected()
                    .map { held.indexOf(it) to it }
                    .filter { it.first >= 0 }
                    .minWithOrNull(compareBy({ it.first }, { it.first + it.second.length }))
                    ?: break
            shown.append(visible(held.substring(0, begin)))
            held = held.substring(begin + marker.length)
            inside = !inside
            afterThought = !inside
        }
        val cut = held.length - expected().maxOf { overlap(held, it) }
        shown.append(visible(held.substring(0, cut)))
        held = held.substring(cut)
        return shown.toString()
    }

    /** What is still held back when the answer ends. */
    fun flush(): String = visible(held).also { held = "" }

    private fun expected() = markers.map { if (inside) it.second else it.first }

    private fun visible(given: String): String {
        if (inside) return ""
        var text = specials.fold(given) { left, special -> left.replace(special, "") }
        if (afterThought) {
            text = text.trimStart(::isWhiteSpace)
            afterThought = text.isEmpty()
        }
        return text
    }
}
