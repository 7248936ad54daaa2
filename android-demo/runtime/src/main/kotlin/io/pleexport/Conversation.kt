package io.pleexport

import kotlinx.coroutines.CancellationException
import kotlinx.coroutines.flow.Flow
import kotlinx.coroutines.flow.flow

/**
 * Asks a runner, and keeps what was said.
 *
 * Special tokens stay in what it keeps: by these, the thoughts of earlier answers are taken out.
 * People see neither special tokens nor thoughts.
 *
 * @param runner of a bundle with a chat format.
 * @param said messages of before.
 */
class Conversation(private val runner: Runner, said: List<Message> = emptyList()) {
    private val own = said.toMutableList()

    /** What was said, as the chat format takes it. */
    val messages: List<Message>
        get() = own.toList()

    /**
     * The answer to a message, as people see it, piece by piece. What has come of an answer that is
     * cancelled is kept; of one that fails, or that has not begun, the question is not kept either.
     *
     * @return throws InputError where the conversation cannot be continued.
     */
    fun ask(content: String, options: GenerationOptions = GenerationOptions()): Flow<String> =
        flow {
            val question = Message("user", content)
            val ids = runner.encodeChat(own + question)
            val tokenizer = runner.tokenizer!! // encodeChat had one
            val seen = ThoughtFilter(tokenizer, ids)
            val answer = ArrayList<Int>()
            fun keep() {
                own += question
                own += Message("assistant", text(tokenizer, answer, options.stop))
            }
            try {
                runner.generate(ids, options).collect { token ->
                    answer += token.id
                    emit(seen.push(token))
                }
                emit(seen.flush())
            } catch (err: CancellationException) {
                if (answer.isNotEmpty()) keep()
                throw err
            }
            keep()
        }

    /** An answer with its special tokens, up to what ended it. */
    private fun text(tokenizer: Tokenizer, answer: List<Int>, stop: List<String>): String {
        val manifest = runner.bundle.manifest
        val ids = answer.filter { it !in manifest.eosTokenIds }.toIntArray()
        val said = tokenizer.decode(ids, withSpecials = true)
        val stops = stop + (manifest.generation?.stopStrings ?: emptyList())
        // The first is what ended it, wherever it stands in the list.
        return stops.filter { it.isNotEmpty() }.map { said.substringBefore(it) }.minByOrNull {
            it.length
        } ?: said
    }
}
