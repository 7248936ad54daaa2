package io.pleexport

private val ROLES = listOf("system", "user", "assistant")

/** A message of a conversation: `system`, `user` or `assistant`, and what was said. */
data class Message(val role: String, val content: String)

/**
 * What stands between two messages, before the first, or before the answer.
 *
 * @property previous, next roles of the messages around it; `start` and `answer` at the ends.
 * @property trimPrevious characters that are taken off the end of the message before it.
 * @property trimNext characters that are taken off the beginning of the message behind it.
 */
internal class Joint(
    val previous: String,
    val next: String,
    val text: String,
    val trimPrevious: String,
    val trimNext: String,
)

/**
 * How thoughts are taken out of what the assistant said before.
 *
 * @property open what a thought begins with; null where all up to the last `close` is one.
 */
internal class Thoughts(
    private val open: String?,
    private val close: String,
    private val trimStart: String,
    private val trimEnd: String,
) {
    /** An answer without its thoughts. */
    fun cut(content: String): String {
        val left =
            if (open == null) content.substringAfterLast(close)
            else content.split(close).joinToString("") { it.substringBefore(open) }
        return if (left == content) content else strip(left, trimStart, trimEnd)
    }
}

/**
 * A chat template as data: for conversations of plain texts, without tools. See
 * docs/bundle-format.md, ChatFormat.
 */
internal class ChatFormat(
    private val joints: List<Joint>,
    private val thinkingOn: List<Joint>,
    private val thinkingOff: List<Joint>,
    private val thoughts: Thoughts?,
    private val needText: List<String>,
    private val systemMoves: Boolean,
) {
    /** What contradicts itself, as a clause; null where nothing does. */
    fun contradiction(): String? {
        for ((name, own) in
            listOf(
                "joints" to joints,
                "thinking_on" to thinkingOn,
                "thinking_off" to thinkingOff,
            )) {
            val twice =
                own.groupBy { it.previous to it.next }
                    .filter { it.value.size > 1 }
                    .keys
                    .firstOrNull()
            if (twice != null)
                return "`$name` has two joints from `${twice.first}` to `${twice.second}`"
        }
        return null
    }

    /**
     * The text of a conversation, up to where the answer begins.
     *
     * @param thinking whether the model should; null leaves it to the format.
     * @throws InputError the format has no place for a message.
     */
    fun render(messages: List<Message>, thinking: Boolean? = null): String {
        val switched =
            if (thinking == null) emptyList() else if (thinking) thinkingOn else thinkingOff
        val between = (joints + switched).associateBy { it.previous to it.next }
        messages.forEach(::checkRole)
        val said = if (systemMoves) moved(messages) else messages
        val rendered = StringBuilder()
        var previous = "start"
        var content = ""
        var trimStart = ""
        for ((role, following) in said + Message("answer", "")) {
            val joint =
                between[previous to role]
                    ?: throw InputError(
                        "the bundle's chat format has no place for ${named(role)} ${behind(previous)}",
                        "after the system's message, user and assistant take turns",
                    )
            content = strip(content, trimStart, joint.trimPrevious)
            if (previous == "assistant" && thoughts != null) content = thoughts.cut(content)
            if (content.isEmpty() && previous in needText) {
                throw InputError(
                    "the bundle's chat format has no place for an empty message of `$previous`",
                    "leave the message out, or write something in it",
                )
            }
            rendered.append(content).append(joint.text)
            previous = role
            content = following
            trimStart = joint.trimNext
        }
        return rendered.toString()
    }

    /** Messages with the system's before the last of the user's. */
    private fun moved(messages: List<Message>): List<Message> {
        if (messages.drop(1).any { it.role == "system" }) {
            throw InputError(
                "the bundle's chat format has no place for a message of `system` after another",
                "let the system speak first, and once",
            )
        }
        val last = messages.indexOfLast { it.role == "user" }
        if (last <= 0 || messages[0].role != "system") return messages
        return messages.subList(1, last) + messages[0] + messages.subList(last, messages.size)
    }

    private fun checkRole(message: Message) {
        if (message.role !in ROLES) {
            throw InputError(
                "the bundle's chat format knows no role `${message.role}`",
                "roles are ${ROLES.joinToString()}",
            )
        }
    }

    private fun named(role: String) = if (role == "answer") "an answer" else "a message of `$role`"

    private fun behind(previous: String) =
        if (previous == "start") "at the beginning" else "after one of `$previous`"
}

internal fun chatFormat(value: Any?, path: String) =
    fieldsOf(value, path) {
        val joints = limited(16, list(::joint))
        ChatFormat(
                joints = required("joints", joints),
                thinkingOn = optional("thinking_on", emptyList(), joints),
                thinkingOff = optional("thinking_off", emptyList(), joints),
                thoughts = optional("thoughts", null, orNull(::thoughts)),
                needText =
                    optional(
                        "need_text",
                        emptyList(),
                        limited(3, list(oneOf(*ROLES.toTypedArray()))),
                    ),
                systemMoves = optional("system_moves", false, ::boolean),
            )
            .also { optional("end_ids", emptyList(), limited(16, list(::int))) }
    }

private fun joint(value: Any?, path: String) =
    fieldsOf(value, path) {
        Joint(
            previous = required("previous", oneOf("start", "system", "user", "assistant")),
            next = required("next", oneOf("system", "user", "assistant", "answer")),
            text = required("text", text(0, 1 shl 16)),
            trimPrevious = optional("trim_previous", "", text(0, 64)),
            trimNext = optional("trim_next", "", text(0, 64)),
        )
    }

private fun thoughts(value: Any?, path: String) =
    fieldsOf(value, path) {
        Thoughts(
            open = optional("open", null, orNull(text(1, 64))),
            close = required("close", text(1, 64)),
            trimStart = optional("trim_start", "", text(0, 64)),
            trimEnd = optional("trim_end", "", text(0, 64)),
        )
    }

/** A string of some length, in characters as Unicode counts them. */
internal fun text(least: Int, most: Int): (Any?, String) -> String = { value, path ->
    string(value, path).also {
        if (it.codePointCount(0, it.length) !in least..most) {
            throw MalformedJson("Expected `str` of length $least to $most - at `$path`")
        }
    }
}

private fun <T> limited(most: Int, read: (Any?, String) -> List<T>): (Any?, String) -> List<T> =
    { value, path ->
        read(value, path).also {
            if (it.size > most)
                throw MalformedJson("Expected `array` of length <= $most - at `$path`")
        }
    }

/** A text without these characters at its start and its end. */
private fun strip(text: String, start: String, end: String): String =
    text.trimStart { it in start }.trimEnd { it in end }
