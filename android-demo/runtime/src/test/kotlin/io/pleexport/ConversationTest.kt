package io.pleexport

import java.io.File
import kotlinx.coroutines.flow.take
import kotlinx.coroutines.flow.toList
import kotlinx.coroutines.runBlocking
import org.junit.jupiter.api.Assertions.assertEquals
import org.junit.jupiter.api.Assertions.assertTrue
import org.junit.jupiter.api.Test

class ConversationTest {
    private fun open(name: String) = Runner(File("../../conformance/$name"), threads = 1)

    private val options =
        GenerationOptions(GenerationConfig(maxNewTokens = 12), greedy = true)

    @Test
    fun `what was said takes part in the next answer`() =
        open("gemma4-fp32").use { runner ->
            val conversation = Conversation(runner)
            val first = runBlocking { conversation.ask("ab", options).toList().joinToString("") }
            assertEquals(listOf("user", "assistant"), conversation.messages.map { it.role })
            assertTrue(first in conversation.messages[1].content)
            val alone = runner.stats.promptTokens
            runBlocking { conversation.ask("cd", options).toList() }
            assertEquals(4, conversation.messages.size)
            assertTrue(runner.encodeChat(conversation.messages).size > 2 * alone)
            runner.reset()
            val fresh = runBlocking { Conversation(runner).ask("ab", options).toList() }
            assertEquals(first, fresh.joinToString(""))
        }

    @Test
    fun `of an answer that was stopped is kept what had come`() =
        open("gemma4-fp32").use { runner ->
            val conversation = Conversation(runner)
            runBlocking { conversation.ask("ab", options).take(3).toList() }
            assertEquals(2, conversation.messages.size)
            assertTrue(conversation.messages[1].content.isNotEmpty())
        }

    @Test
    fun `what cannot be asked leaves no trace`() =
        open("gemma4-fp32").use { runner ->
            val conversation = Conversation(runner)
            val long = "ab ".repeat(runner.context)
            val said =
                refusal<InputError> { runBlocking { conversation.ask(long, options).toList() } }
            assertTrue("exceed the bundle's context" in said, said)
            assertEquals(0, conversation.messages.size)
            open("rwkv8-fp32").use {
                val none = refusal<InputError> { runBlocking { Conversation(it).ask("a").toList() } }
                assertTrue("this bundle has no chat format" in none, none)
            }
        }
}
