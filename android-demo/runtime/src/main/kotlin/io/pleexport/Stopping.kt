package io.pleexport

/** Holds text back while it may be the beginning of a stop string. */
internal class StopStrings(stops: List<String>) {
    private val stops = stops.filter { it.isNotEmpty() }
    private var held = ""

    /** Whether a stop string was met. */
    var hit = false
        private set

    /** Text that is safe to show. */
    fun push(text: String): String {
        held += text
        val found = stops.map { held.indexOf(it) }.filter { it >= 0 }.minOrNull()
        if (found != null) {
            hit = true
            return held.substring(0, found).also { held = "" }
        }
        val keep = stops.maxOfOrNull { overlap(held, it) } ?: 0
        val shown = held.substring(0, held.length - keep)
        held = held.substring(shown.length)
        return shown
    }

    /** What is still held back when the text ends. */
    fun flush(): String = held.also { held = "" }
}

/**
 * The text of an answer as its ids come, up to a stop string.
 *
 * @param stream makes text of ids; without one there is none.
 */
internal class AnswerText(private val stream: TextStream?, stops: List<String>) {
    private val stops = StopStrings(stops)

    /** Whether a stop string was met. */
    val stopped: Boolean
        get() = stops.hit

    /** Text that is safe to show. */
    fun push(id: Int): String = stream?.let { stops.push(it.push(id)) } ?: ""

    /** What is still held back when the text ends. */
    fun flush(): String {
        if (stream == null || stopped) return ""
        val shown = stops.push(stream.flush())
        return if (stopped) shown else shown + stops.flush()
    }
}

/** Length of the longest end of a text that begins a marker, and is not all of it. */
internal fun overlap(text: String, marker: String): Int =
    (minOf(text.length, marker.length - 1) downTo 1).firstOrNull {
        marker.startsWith(text.takeLast(it))
    } ?: 0
