package io.pleexport.chat

import com.google.gson.JsonArray
import com.google.gson.JsonObject
import io.pleexport.Conversation
import io.pleexport.GenerationOptions
import io.pleexport.Message
import io.pleexport.PleexportError
import io.pleexport.Runner
import java.io.File
import kotlinx.coroutines.flow.Flow
import kotlinx.coroutines.flow.map

/**
 * A conversation with an open bundle, which is kept in a file. A bundle without a chat template has
 * its text continued.
 */
internal class Talk(val name: String, val runner: Runner, private val file: File) : AutoCloseable {
    private var conversation = Conversation(runner)
    private val own = ArrayList<Entry>()

    val entries: List<Entry>
        get() = own.toList()

    init {
        readObject(file)?.let { runCatching { restore(it) } }
    }

    /**
     * Asks, and tells of each piece of the answer.
     *
     * @throws PleexportError it cannot be answered; the conversation is as it was.
     */
    suspend fun ask(text: String, options: GenerationOptions, changed: () -> Unit) {
        val before = own.size
        val answer = answer(text, options)
        own += Entry(isMine = true, text)
        own += Entry(isMine = false, "")
        changed()
        try {
            answer.collect { piece ->
                own[own.lastIndex] = own.last().copy(text = own.last().text + piece)
                changed()
            }
        } catch (err: PleexportError) {
            while (own.size > before) own.removeAt(own.lastIndex)
            throw err
        } finally {
            write()
        }
    }

    /** Begins anew. */
    fun clear() {
        conversation = Conversation(runner)
        own.clear()
        file.delete()
    }

    override fun close() = runner.close()

    private fun answer(text: String, options: GenerationOptions): Flow<String> =
        if (runner.hasChatTemplate) conversation.ask(text, options)
        else runner.generate(own.joinToString("") { it.text } + text, options).map { it.text }

    private fun write() {
        val messages = JsonArray()
        for (message in conversation.messages) {
            messages.add(fields("role" to message.role, "content" to message.content))
        }
        val entries = JsonArray()
        for (entry in own) {
            entries.add(fields("by" to if (entry.isMine) "me" else "model", "text" to entry.text))
        }
        val whole = JsonObject()
        whole.add("messages", messages)
        whole.add("entries", entries)
        writeWhole(file, whole.toString())
    }

    private fun fields(vararg pairs: Pair<String, String>) =
        JsonObject().apply { pairs.forEach { (name, value) -> addProperty(name, value) } }

    private fun restore(whole: JsonObject) {
        val messages =
            whole.getAsJsonArray("messages").map {
                Message(it.asJsonObject["role"].asString, it.asJsonObject["content"].asString)
            }
        val entries =
            whole.getAsJsonArray("entries").map {
                Entry(it.asJsonObject["by"].asString == "me", it.asJsonObject["text"].asString)
            }
        conversation = Conversation(runner, messages)
        own += entries
    }
}
