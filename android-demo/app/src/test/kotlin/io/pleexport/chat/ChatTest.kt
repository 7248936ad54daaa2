package io.pleexport.chat

import io.pleexport.Patience
import io.pleexport.ResidentMemory
import io.pleexport.Stats
import java.io.File
import java.io.InputStream
import java.net.InetAddress
import java.net.ServerSocket
import java.nio.file.Path
import kotlinx.coroutines.flow.first
import kotlinx.coroutines.runBlocking
import kotlinx.coroutines.withTimeoutOrNull
import org.junit.jupiter.api.AfterEach
import org.junit.jupiter.api.Assertions.assertEquals
import org.junit.jupiter.api.Assertions.assertNull
import org.junit.jupiter.api.Assertions.assertTrue
import org.junit.jupiter.api.Test
import org.junit.jupiter.api.io.TempDir

private const val WAIT_MILLIS = 30_000L

class ChatTest {
    @TempDir lateinit var temporary: Path

    private val conformance = File("../../conformance")
    private var opened: Chat? = null
    private var available = 8_000_000_000L
    private var free = 8_000_000_000L

    private val device =
        object : Device {
            override val abis = listOf("riscv64")

            override fun availableBytes() = available
        }

    private fun shipped(vararg names: String, change: (String, InputStream) -> InputStream) =
        object : Shipped {
            override fun names() = names.toList()

            override fun files(name: String) = File(conformance, name).list()!!.toList()

            override fun open(name: String, file: String) =
                change(file, File(conformance, "$name/$file").inputStream())
        }

    private fun start(
        vararg names: String,
        change: (String, InputStream) -> InputStream = { _, content -> content },
    ): Chat {
        close()
        val patience = Patience(retries = 1, pauseMillis = 1)
        val files = temporary.toFile()
        return Chat(files, shipped(*names, change = change), device, null, { free }, patience).also {
            it.wait<Screen> { screen -> screen is Screen.Choosing || screen is Screen.Talking }
            it.change(it.settings.copy(temperature = 0.0, maxNewTokens = 12))
            opened = it
        }
    }

    private inline fun <reified S : Screen> Chat.wait(
        crossinline enough: (S) -> Boolean = { true }
    ): S = runBlocking {
        withTimeoutOrNull(WAIT_MILLIS) { screen.first { it is S && enough(it) } as S }
            ?: error("${screen.value} stays")
    }

    private fun Chat.rest() = wait<Screen.Talking> { !it.isAnswering && it.status.isNotEmpty() }

    /** A chat whose first start is over. */
    private fun talking(name: String = "gemma4-fp32"): Chat =
        start(name).also { it.wait<Screen.Talking>() }

    @AfterEach
    fun close() {
        opened?.close()
        opened = null
    }

    @Test
    fun `the first start unpacks the bundle that came with the app, and opens it`() {
        val files = temporary.toFile()
        File(files, "settings.json").writeText("damaged")
        val first = Chat(files, shipped("gemma4-fp32") { _, it -> it }, device, freeBytes = { free })
        opened = first
        assertEquals("gemma4-fp32", first.wait<Screen.Talking>().name)
        first.leave()
        val choices = first.wait<Screen.Choosing>().choices
        assertEquals(listOf(Choice("gemma4-fp32", isHere = true)), choices)
        first.remove("gemma4-fp32")
        first.wait<Screen.Choosing> { !it.choices[0].isHere }
    }

    @Test
    fun `an answer comes in pieces, is kept, and a conversation goes on after a start`() {
        val chat = talking()
        chat.say("ab")
        val seen = chat.wait<Screen.Talking> { it.entries.size == 2 }
        assertEquals(Entry(isMine = true, "ab"), seen.entries[0])
        val first = chat.rest()
        assertTrue(first.entries[1].text.isNotEmpty())
        assertTrue(Regex("[\\d.]+ tokens/s · \\d+ MB own.* cut at the set length").matches(first.status))
        chat.say("  ")
        chat.say("cd")
        val second = chat.wait<Screen.Talking> { it.entries.size == 4 && !it.isAnswering }
        assertEquals(first.entries, second.entries.take(2))

        val again = start("gemma4-fp32")
        assertEquals(second.entries, again.wait<Screen.Talking>().entries)
        again.beginAnew()
        again.wait<Screen.Talking> { it.entries.isEmpty() }
        again.say("ab")
        again.wait<Screen.Talking> { it.entries.size == 2 && !it.isAnswering }
        assertEquals(first.entries, again.rest().entries)
    }

    @Test
    fun `an answer can be stopped, and what had come stays`() {
        val chat = talking()
        chat.change(chat.settings.copy(maxNewTokens = 2000))
        chat.say("ab")
        chat.wait<Screen.Talking> { it.isAnswering && (it.entries.lastOrNull()?.text?.length ?: 0) > 3 }
        chat.stop()
        val stopped = chat.wait<Screen.Talking> { !it.isAnswering && it.entries.size == 2 }
        assertTrue(stopped.entries[1].text.length > 3)
        assertNull(stopped.notice)
        chat.change(chat.settings.copy(maxNewTokens = 2))
        chat.say("cd")
        chat.wait<Screen.Talking> { !it.isAnswering && it.entries.size == 4 }
    }

    @Test
    fun `a text that is too long is given back, with what to do`() {
        val chat = talking()
        val long = "ab ".repeat(50_000)
        chat.say(long)
        val refused = chat.wait<Screen.Talking> { it.notice != null }
        assertEquals(
            Sentence("The conversation is longer than the bundle takes.", "Begin a new one."),
            refused.notice,
        )
        assertEquals(long, refused.unsent)
        assertEquals(emptyList<Entry>(), refused.entries)
    }

    @Test
    fun `a bundle without a chat template has its text continued, and one without words says so`() {
        val chat = talking("rwkv7a-int8")
        chat.say("ab")
        chat.wait<Screen.Talking> { it.entries.size == 2 && !it.isAnswering }
        chat.say("cd")
        val seen = chat.wait<Screen.Talking> { it.entries.size == 4 && !it.isAnswering }
        assertEquals(listOf(true, false, true, false), seen.entries.map { it.isMine })
        chat.remove("rwkv7a-int8")
        chat.wait<Screen.Choosing>()

        val mute = talking("gemma4-quantized")
        mute.say("ab")
        val notice = mute.wait<Screen.Talking> { it.notice != null }.notice!!
        assertEquals("This bundle has no tokenizer.", notice.text)
    }

    @Test
    fun `too little memory is told before a bundle is opened, which it can be all the same`() {
        available = 120_000_000
        val chat = start("gemma4-fp32", "lckv-fp16")
        chat.choose("gemma4-fp32")
        val told = chat.wait<Screen.Choosing> { it.notice != null }
        assertTrue("of memory, and 120 MB are free." in told.notice!!.text)
        assertEquals("gemma4-fp32", told.anyway)
        chat.chooseAnyway("gemma4-fp32")
        chat.wait<Screen.Talking>()
    }

    @Test
    fun `who is ended while a bundle opens is told so at the next start`() {
        File(temporary.toFile(), "opening").writeText("huge")
        val chat = Chat(temporary.toFile(), shipped("lckv-fp16") { _, it -> it }, device)
        opened = chat
        val notice = chat.wait<Screen.Choosing> { it.notice != null }.notice!!
        assertTrue("ended while it opened `huge`" in notice.text)
        chat.choose("lckv-fp16")
        chat.wait<Screen.Talking>()
        assertTrue(!File(temporary.toFile(), "opening").exists())
    }

    @Test
    fun `every failure is a sentence on the choice of bundles`() {
        fun told(chat: Chat): Sentence = chat.wait<Screen.Choosing> { it.notice != null }.notice!!
        free = 67_000_000
        val full = start("gemma4-fp32", "lckv-fp16")
        full.choose("gemma4-fp32")
        assertTrue("of storage, and 67 MB are free." in told(full).text)
        assertEquals("Delete something else first.", told(full).hint)

        free = 8_000_000_000
        val short =
            start("gemma4-fp32", "lckv-fp16") { name, content ->
                if (name == "model.onnx") "gone".byteInputStream() else content
            }
        short.choose("gemma4-fp32")
        assertTrue("`.gemma4-fp32.partial/model.onnx` has 4 bytes" in told(short).text)

        val damaged = start("gemma4-fp32", "lckv-fp16")
        damaged.choose("gemma4-fp32")
        damaged.wait<Screen.Talking>()
        damaged.leave()
        damaged.wait<Screen.Choosing>()
        val weights = File(temporary.toFile(), "bundles/gemma4-fp32/model.onnx.data")
        weights.writeBytes(weights.readBytes().also { it[900] = (it[900] + 1).toByte() })
        damaged.choose("gemma4-fp32")
        val said = told(damaged)
        damaged.remove("gemma4-fp32")
        damaged.wait<Screen.Choosing> { it.notice == null }
        assertTrue("`gemma4-fp32/model.onnx.data` is damaged" in said.text, said.text)
        assertEquals("Remove the bundle, and bring it again.", said.hint)

        val port = ServerSocket(0, 1, InetAddress.getLoopbackAddress()).use { it.localPort }
        val nowhere = start("gemma4-fp32", "lckv-fp16")
        nowhere.bring("http://127.0.0.1:$port/index.json")
        assertTrue("cannot be reached" in told(nowhere).text)
        nowhere.bring("nothing")
        nowhere.wait<Screen.Choosing> { it.notice?.text == "`nothing` is no address of the web." }
    }

    @Test
    fun `what comes can be cancelled`() =
        ServerSocket(0, 1, InetAddress.getLoopbackAddress()).use { silent ->
            val chat = start("gemma4-fp32", "lckv-fp16")
            chat.bring("http://127.0.0.1:${silent.localPort}/index.json")
            chat.wait<Screen.Bringing>()
            chat.stop()
            assertNull(chat.wait<Screen.Choosing>().notice)
        }

    @Test
    fun `failures of the machine have sentences too`() {
        fun said(err: Throwable) = sentenceOf(err, device, temporary.toFile()).text
        assertTrue("too little memory" in said(OutOfMemoryError()))
        val abi = said(RuntimeException("loading", UnsatisfiedLinkError("no onnxruntime")))
        assertTrue("no code for the processor of this device (riscv64)" in abi)
        assertEquals("Something failed: Odd.", said(IllegalStateException("Odd")).replaceFirst("odd", "Odd"))
        val memory = ResidentMemory(anonymous = 123_400_000, fileBacked = 45_600_000)
        assertEquals(
            "0.0 tokens/s · 123 MB own memory + 46 MB of mapped files",
            status(Stats(), memory),
        )
    }

    @Test
    fun `settings are kept, and impossible ones are not taken`() {
        val file = File(temporary.toFile(), "kept.json")
        val own = Settings(temperature = 0.7, maxNewTokens = 512, threads = 3, bundle = "a")
        own.write(file)
        assertEquals(own, Settings.read(file))
        file.writeText("""{"temperature": -1, "max_new_tokens": 0, "threads": 1e9, "bundle": {}}""")
        assertEquals(Settings(), Settings.read(file))
    }
}
