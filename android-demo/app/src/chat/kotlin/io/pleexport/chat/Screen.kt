package io.pleexport.chat

/** What went wrong, and what to do about it. */
data class Sentence(val text: String, val hint: String)

/** A bundle to choose; one that came with the app is unpacked first. */
data class Choice(val name: String, val isHere: Boolean)

/** What somebody said: the person, or the model. */
data class Entry(val isMine: Boolean, val text: String)

/** What a person sees. */
sealed class Screen {
    /** @property anyway a bundle that seems too large, and can be opened all the same. */
    data class Choosing(
        val choices: List<Choice>,
        val notice: Sentence? = null,
        val anyway: String? = null,
    ) : Screen()

    /**
     * A bundle is being downloaded or unpacked; `thousandths` of it are here.
     *
     * @property isDownload whether it may take long, and goes on while nobody looks.
     */
    data class Bringing(val text: String, val thousandths: Int, val isDownload: Boolean) : Screen()

    data class Opening(val name: String) : Screen()

    /**
     * A conversation.
     *
     * @property status how fast it is, and what it takes.
     * @property unsent what was said and could not be answered.
     */
    data class Talking(
        val name: String,
        val entries: List<Entry>,
        val isAnswering: Boolean = false,
        val status: String = "",
        val notice: Sentence? = null,
        val unsent: String? = null,
    ) : Screen()
}
