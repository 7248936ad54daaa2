package io.pleexport

import java.io.File
import java.io.RandomAccessFile
import java.nio.file.Path
import java.util.Collections
import java.util.Random
import java.util.concurrent.CountDownLatch
import java.util.concurrent.TimeUnit
import kotlin.concurrent.thread
import kotlinx.coroutines.cancelAndJoin
import kotlinx.coroutines.delay
import kotlinx.coroutines.flow.take
import kotlinx.coroutines.flow.toList
import kotlinx.coroutines.launch
import kotlinx.coroutines.runBlocking
import org.junit.jupiter.api.Assertions.assertArrayEquals
import org.junit.jupiter.api.Assertions.assertEquals
import org.junit.jupiter.api.Assertions.assertNull
import org.junit.jupiter.api.Assertions.assertTrue
import org.junit.jupiter.api.Test
import org.junit.jupiter.api.io.TempDir
import org.junit.jupiter.params.ParameterizedTest
import org.junit.jupiter.params.provider.ValueSource

/** Of the range of the logits. */
private const val TOLERANCE = 1e-4f

class SessionTest {
    @TempDir lateinit var folder: Path

    private val random = Random(5)

    private fun bundle(name: String) = Bundle(File("../../conformance/$name"))

    private fun open(name: String) = Runner(bundle(name), threads = 1)

    private fun text(runner: Runner, count: Int) =
        IntArray(count) { random.nextInt(runner.numRows.toInt()) }

    private fun assertClose(expected: FloatArray, got: FloatArray) {
        assertEquals(expected.size, got.size)
        assertTrue(error(expected, got) < TOLERANCE, "${error(expected, got)}")
    }

    private fun error(expected: FloatArray, got: FloatArray): Float {
        val range = expected.max() - expected.min()
        return expected.indices.maxOf { Math.abs(expected[it] - got[it]) } / range
    }

    @ParameterizedTest
    @ValueSource(strings = ["gemma4-fp32", "rwkv7b-fp16", "embformer-bf16", "lckv-fp16"])
    fun `pieces of any length give the logits of the whole`(name: String) =
        open(name).use { runner ->
            val ids = text(runner, 300)
            val whole = runner.logits(ids)
            runner.reset()
            val vocab = runner.vocabSize
            var at = 0
            for (length in sequenceOf(1, 7, 1, 32, 3, 100, 156)) {
                for (begin in at until at + length step runner.chunk) {
                    val end = minOf(begin + runner.chunk, at + length)
                    val logits = runner.feed(ids.copyOfRange(begin, end), keep = 0)
                    assertClose(whole.copyOfRange(begin * vocab, end * vocab), logits)
                }
                at += length
            }
            // The control: another text has other logits.
            assertTrue(error(whole, runner.logits(text(runner, 300))) > 100 * TOLERANCE)
        }

    @ParameterizedTest
    @ValueSource(strings = ["gemma4-fp32", "rwkv7b-fp16"])
    fun `what was taken back leaves no trace`(name: String) {
        val bundle = bundle(name)
        val ids = open(name).use { text(it, 40) }
        val whole = open(name).use { it.logits(ids) }
        val vocab = bundle.decoder.contract.vocabSize
        bundle.openBlob().use { blob ->
            openOnnxSession(bundle, threads = 1, spin = false).use { session ->
                fun feed(text: IntArray): FloatArray {
                    val rows = blob.rowIds(text)
                    val logits =
                        session.feed(text.size, 1) { into ->
                            blob.lookup(
                                rows,
                                bundle.decoder.contract.lookupInputs.map {
                                    it.table to into.getValue(it.name)
                                },
                            )
                        }
                    return FloatArray(vocab).also { logits.get(it) }
                }
                feed(ids.copyOf(20))
                feed(ids.copyOfRange(20, 25) + ids.copyOf(6)) // six wrong ones
                val forgotten = session.rewind(6)
                val logits = feed(ids.copyOfRange(31 - forgotten, 40))
                assertClose(whole.copyOfRange(39 * vocab, 40 * vocab), logits)
            }
        }
    }

    @ParameterizedTest
    @ValueSource(strings = ["gemma4-fp32", "rwkv7b-fp16"])
    fun `a text that was stopped in a prompt goes on as if it had not been`(name: String) =
        open(name).use { runner ->
            val ids = text(runner, 1000)
            val options =
                GenerationOptions(
                    GenerationConfig(maxNewTokens = 5),
                    greedy = true,
                    ignoreEos = true,
                )
            val expected = runBlocking { runner.generate(ids, options).toList() }
            runner.reset()
            runBlocking {
                val job = launch { runner.generate(ids, options).collect {} }
                delay(8)
                job.cancelAndJoin()
            }
            assertEquals(expected, runBlocking { runner.generate(ids, options).toList() })
        }

    @Test
    fun `a collector that wants no more ends a text`() =
        open("gemma4-fp32").use { runner ->
            val options = GenerationOptions(greedy = true, ignoreEos = true)
            val ids = text(runner, 9)
            val three = runBlocking { runner.generate(ids, options).take(3).toList() }
            assertEquals(3, three.size)
            assertNull(runner.stats.finishReason)
            // The next turn continues what was read: all but the last token.
            val next = ids + three.map { it.id }.toIntArray() + 5
            runBlocking { runner.generate(next, options).take(1).toList() }
            assertTrue(runner.stats.promptTokens <= 2, "${runner.stats.promptTokens}")
        }

    @Test
    fun `texts end for a reason`() =
        open("gemma4-fp32").use { runner ->
            fun reason(count: Int, config: GenerationConfig): FinishReason? {
                runner.reset()
                val options = GenerationOptions(config, greedy = true, ignoreEos = true)
                runBlocking { runner.generate(text(runner, count), options).collect {} }
                return runner.stats.finishReason
            }
            assertEquals(FinishReason.LENGTH, reason(3, GenerationConfig(maxNewTokens = 2)))
            assertEquals(
                FinishReason.CONTEXT,
                reason(runner.context - 2, GenerationConfig(maxNewTokens = 9)),
            )
            assertEquals(
                FinishReason.TIME,
                reason(3, GenerationConfig(maxNewTokens = 9, maxTime = 1e-9)),
            )
        }

    @Test
    fun `what cannot be asked for is refused before anything is read`() =
        open("gemma4-fp32").use { runner ->
            val most = runner.numRows.toInt()
            assertEquals(
                "the prompt is empty",
                refusal<InputError> { runner.generate(IntArray(0)) },
            )
            assertTrue("has no row" in refusal<InputError> { runner.generate(intArrayOf(most)) })
            assertTrue(
                "exceed the bundle's context" in
                    refusal<InputError> { runner.generate(IntArray(runner.context + 1)) }
            )
            assertTrue("feed 1 to 256" in refusal<InputError> { runner.feed(IntArray(257)) })
            assertTrue(
                "keep is 3" in refusal<InputError> { runner.feed(intArrayOf(1, 2), keep = 3) }
            )
            assertTrue(
                "top_k is -1" in
                    refusal<InputError> {
                        runner.generate(
                            intArrayOf(1),
                            GenerationOptions(GenerationConfig(topK = -1)),
                        )
                    }
            )
            open("rwkv8-fp32").use {
                assertEquals(
                    "this bundle has no tokenizer",
                    refusal<InputError> { it.generate("text") },
                )
                assertEquals(
                    "this bundle has no chat format",
                    refusal<InputError> { it.chat(listOf(Message("user", "a"))) },
                )
            }
            assertTrue(
                "threads is 999" in
                    refusal<InputError> { Runner(bundle("gemma4-fp32"), threads = 999) }
            )
        }

    @Test
    fun `runners on one bundle do not disturb each other, and one serves one thread`() {
        val bundle = bundle("gemma4-fp32")
        Runner(bundle, threads = 1).use { first ->
            Runner(bundle, threads = 1).use { second ->
                val ids = text(first, 30)
                val expected = first.logits(ids)
                second.feed(ids.copyOf(7))
                assertArrayEquals(expected, first.logits(ids))
            }
            val inside = CountDownLatch(1)
            val asked = CountDownLatch(1)
            val busy = thread {
                first.logits(text(first, 5)) {
                    inside.countDown()
                    asked.await(10, TimeUnit.SECONDS)
                }
            }
            inside.await()
            assertEquals(
                "another thread is using this runner",
                refusal<InputError> { first.reset() },
            )
            asked.countDown()
            busy.join()
        }
    }

    @Test
    fun `a closed runner says so`() {
        val runner = open("gemma4-fp32")
        runner.close()
        runner.close()
        assertEquals("this runner is closed", refusal<InputError> { runner.reset() })
    }

    @Test
    fun `runners on one bundle write the same texts at the same time`() {
        val bundle = bundle("gemma4-int4")
        val ids = Runner(bundle, threads = 1).use { text(it, 40) }
        val options =
            GenerationOptions(GenerationConfig(maxNewTokens = 30), greedy = true, ignoreEos = true)
        fun written() =
            Runner(bundle, threads = 1).use { runBlocking { it.generate(ids, options).toList() } }
        val expected = written()
        val found = Collections.synchronizedList(ArrayList<List<Token>>())
        List(4) { thread { repeat(2) { found += written() } } }.forEach { it.join() }
        assertEquals(List(8) { expected }, found)
    }

    @Test
    fun `a row that is damaged while it is mapped is told, and others still work`() {
        val copy = folder.resolve("copy").toFile()
        File("../../conformance/gemma4-int4").copyRecursively(copy)
        Runner(copy, threads = 1).use { runner ->
            val expected = runner.logits(intArrayOf(5, 6))
            val rows = SafetensorsFile(File(copy, BLOB)).entry("rows")
            val stride = rows.bytes / runner.numRows
            RandomAccessFile(File(copy, BLOB), "rw").use { file ->
                file.seek(rows.offset + 7 * stride + 3)
                val byte = file.read()
                file.seek(rows.offset + 7 * stride + 3)
                file.write(byte xor 16)
            }
            assertEquals(
                "`${File(copy, BLOB)}` is damaged: the row of token id 7 does not match its " +
                    "checksum (B-16)",
                refusal<CheckFailed> { runner.logits(intArrayOf(5, 7)) },
            )
            assertArrayEquals(expected, runner.logits(intArrayOf(5, 6)))
            // Another opens: only rows that are read are compared.
            Runner(copy, threads = 1).use {
                assertArrayEquals(expected, it.logits(intArrayOf(5, 6)))
            }
        }
    }

    @Test
    fun `a file of rows that is cut while it is mapped is told`() {
        val copy = folder.resolve("copy").toFile()
        File("../../conformance/gemma4-int4").copyRecursively(copy)
        Runner(copy, threads = 1).use { runner ->
            RandomAccessFile(File(copy, BLOB), "rw").use { it.setLength(4096) }
            for (count in listOf(1, 100)) {
                assertEquals(
                    "`${File(copy, BLOB)}` is damaged: a file of rows has become shorter while " +
                        "it was open",
                    refusal<CheckFailed> { runner.logits(IntArray(count) { 200 + it % 50 }) },
                )
            }
        }
    }

    /** What opening takes of the system: memory of any kind, files and threads. */
    private class Taken(val bytes: Long, val files: Int, val threads: Int, val maps: Int)

    private fun taken(): Taken {
        repeat(2) {
            System.gc() // maps end when garbage is collected, by a thread of its own
            Thread.sleep(100)
        }
        fun count(what: String) = File("/proc/self/$what").list()!!.size
        val maps = File("/proc/self/maps").readLines()
        return Taken(
            residentMemory()!!.anonymous,
            count("fd"),
            count("task"),
            maps.count { "pleexport" in it || BLOB in it || "model.onnx" in it },
        )
    }

    @Test
    fun `opening and closing many times takes no memory, files or threads`() {
        fun cycle() = open("lckv-fp16").use { it.logits(text(it, 20)) }
        repeat(10) { cycle() }
        val before = taken()
        val cycles = System.getProperty("pleexport.cycles").toInt()
        repeat(cycles) { cycle() }
        val after = taken()
        // The heap does not grow: what did would be ONNX Runtime's, or maps.
        val grown = after.bytes - before.bytes
        assertTrue(grown < 16L shl 20, "$grown bytes")
        assertTrue(after.files <= before.files + 2, "${before.files} to ${after.files} files")
        assertTrue(after.threads <= before.threads + 2, "${before.threads} to ${after.threads}")
        // A cycle has several, and those of the last one may still be there.
        assertTrue(after.maps < before.maps + cycles, "${before.maps} to ${after.maps} maps")
        // The control: what stays open counts.
        val kept = List(20) { open("lckv-fp16").also { it.logits(text(it, 20)) } }
        val open = taken()
        assertTrue(open.bytes > after.bytes + (1L shl 20), "${open.bytes - after.bytes} bytes")
        assertTrue(open.maps >= after.maps + kept.size, "${open.maps} maps")
        kept.forEach(Runner::close)
    }
}
