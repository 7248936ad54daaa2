package io.pleexport

import java.io.File
import kotlinx.coroutines.flow.take
import kotlinx.coroutines.flow.toList
import kotlinx.coroutines.runBlocking
import org.junit.jupiter.api.Assertions.assertEquals
import org.junit.jupiter.api.Assertions.assertNotEquals
import org.junit.jupiter.api.Assertions.assertTrue
import org.junit.jupiter.api.Test
import org.junit.jupiter.params.ParameterizedTest
import org.junit.jupiter.params.provider.CsvSource
import org.junit.jupiter.params.provider.ValueSource

private const val NEW_TOKENS = 120
private const val WITHOUT_DRAFTS = NEW_TOKENS - 1

class DraftingTest {
    private val prompt = intArrayOf(5, 17, 40, 3)
    private val greedy = GenerationConfig(temperature = 0.0)

    private fun <T> open(name: String, use: (Runner) -> T): T =
        Runner(Bundle(File("../../conformance/$name")), threads = 1).use(use)

    private fun options(config: GenerationConfig, draft: (() -> Drafter)? = null) =
        GenerationOptions(
            config.copy(maxNewTokens = config.maxNewTokens ?: NEW_TOKENS),
            seed = 4,
            ignoreEos = true,
            draft = draft,
        )

    private fun Runner.written(options: GenerationOptions, of: IntArray = prompt): List<Token> {
        reset()
        return runBlocking { generate(of, options).toList() }
    }

    // The last piece of a text that is cut has what is still held back.
    private fun List<Token>.ids() = map { it.id }

    /** Drafts the text that is about to come, with every `wrong`-th token another. */
    private fun guesses(tokens: List<Token>, wrong: Int = 0): () -> Drafter {
        val text = prompt + tokens.ids().toIntArray()
        return {
            Drafter { ids, most ->
                assertTrue(most >= 1)
                IntArray(minOf(most, text.size - ids.size)) {
                    val at = ids.size + it
                    if (wrong > 0 && at % wrong == 0) (text[at] + 1) % 2 else text[at]
                }
            }
        }
    }

    @ParameterizedTest
    @ValueSource(strings = ["gemma4-fp32", "rwkv7b-fp16", "embformer-bf16"])
    fun `drafts change no text`(name: String) =
        open(name) { runner ->
            val sampled = GenerationConfig(temperature = 1.0)
            for (config in
                listOf(
                    greedy.copy(repetitionPenalty = 1.3),
                    sampled.copy(repetitionPenalty = 3.0),
                    GenerationConfig(temperature = 0.7, topK = 9, topP = 0.9, minP = 0.01),
                )) {
                val expected = runner.written(options(config))
                assertEquals(WITHOUT_DRAFTS, runner.stats.decodeCalls)
                assertEquals(0, runner.stats.draftedTokens)
                for (wrong in listOf(0, 1, 5)) {
                    val got = runner.written(options(config, guesses(expected, wrong)))
                    assertEquals(expected, got, "$config, $wrong")
                    checkCounts(runner.stats, wrong, again = runner.goesBackWhole)
                }
            }
            val plain = runner.written(options(greedy))
            assertEquals(plain, runner.written(options(greedy, ::PromptLookup)))
        }

    /** Whether a wrong guess has all of a call read again. */
    private val Runner.goesBackWhole: Boolean
        get() = bundle.decoder.contract.states.isNotEmpty()

    private fun checkCounts(stats: Stats, wrong: Int, again: Boolean) {
        assertEquals(WITHOUT_DRAFTS, stats.decodeCalls + stats.acceptedTokens)
        when (wrong) {
            0 -> {
                assertEquals(8, stats.decodeCalls) // 119 tokens, 16 a call
                assertEquals(1.0, stats.acceptance)
            }
            1 -> assertTrue(stats.acceptedTokens < stats.draftedTokens / 4)
            else -> assertTrue(stats.acceptedTokens in 1 until stats.draftedTokens)
        }
        val read = prompt.size + stats.decodeCalls + stats.draftedTokens
        assertTrue(if (again && wrong > 0) stats.rows >= read else stats.rows == read.toLong())
    }

    /** What one request writes, and why it ends; a session may be one that does otherwise. */
    private fun generated(
        name: String,
        request: Request,
        change: (Session) -> Session = { it },
    ): Pair<List<Token>, FinishReason?> {
        val bundle = Bundle(File("../../conformance/$name"))
        val session = change(openOnnxSession(bundle, threads = 1, spin = false))
        val stats = Stats()
        bundle.openBlob().use { blob ->
            val manifest = bundle.manifest
            Reader(blob, session, bundle.decoder.contract, manifest.context).use { reader ->
                val tokenizer = openTokenizer(bundle)
                val generation =
                    Generation(reader, blob.numRows, tokenizer, prompt, request, stats)
                return generateSequence { generation.next() }.toList() to stats.finishReason
            }
        }
    }

    private fun request(ends: Set<Int>, draft: (() -> Drafter)?, stop: List<String> = emptyList()) =
        Request(greedy, 60, 4, stop, ends, ends, draft?.invoke())

    @ParameterizedTest
    @ValueSource(strings = ["gemma4-fp32", "rwkv7b-fp16"])
    fun `a wrong draft that is not taken back changes the text`(name: String) {
        val (expected, _) = generated(name, request(emptySet(), null))
        val wrong = guesses(expected, wrong = 5)
        assertEquals(expected, generated(name, request(emptySet(), wrong)).first)
        val (others, _) =
            generated(name, request(emptySet(), wrong)) {
                object : Session by it {
                    override fun rewind(count: Int) = count
                }
            }
        assertNotEquals(expected, others)
    }

    @Test
    fun `an end inside a draft ends the text`() {
        val name = "gemma4-fp32"
        val (plain, _) = generated(name, request(emptySet(), null))
        val guesses = guesses(plain)
        val firsts = plain.indices.filter { i -> plain.indexOfFirst { it.id == plain[i].id } == i }
        for (place in listOf(firsts[1], firsts[firsts.size / 2], firsts.last())) {
            val ends = setOf(plain[place].id)
            val expected = generated(name, request(ends, null))
            assertEquals(FinishReason.EOS, expected.second)
            assertEquals(expected, generated(name, request(ends, guesses)))
        }
        assertTrue(firsts.size > 3)
        val all = plain.joinToString("") { it.text }
        for (stop in listOf(all.substring(9, 12), all.substring(20, 23)).map { listOf(it) }) {
            val expected = generated(name, request(emptySet(), null, stop))
            assertEquals(FinishReason.STOP, expected.second)
            assertEquals(expected, generated(name, request(emptySet(), guesses, stop)))
        }
    }

    @ParameterizedTest
    @ValueSource(ints = [1, 2, 15, 16, 17, 18])
    fun `no more is drafted than may come`(most: Int) =
        open("gemma4-fp32") { runner ->
            val plain = runner.written(options(greedy))
            val config = greedy.copy(maxNewTokens = most)
            assertEquals(plain.ids().take(most), runner.written(options(config, guesses(plain))).ids())
            assertEquals((prompt.size + most - 1).toLong(), runner.stats.rows)
            assertEquals(FinishReason.LENGTH, runner.stats.finishReason)
        }

    @ParameterizedTest
    @CsvSource("1", "2", "5", "16", "18")
    fun `a text that is left inside a draft goes on from there`(taken: Int) =
        open("gemma4-fp32") { runner ->
            val plain = runner.written(options(greedy))
            runner.reset()
            val left = runBlocking {
                runner.generate(prompt, options(greedy, guesses(plain))).take(taken).toList()
            }
            assertEquals(plain.take(taken), left)
            val longer = prompt + left.map { it.id } + intArrayOf(11, 12)
            val got = runBlocking { runner.generate(longer, options(greedy)).toList() }
            assertEquals(3, runner.stats.promptTokens)
            assertEquals(runner.written(options(greedy), longer), got)
        }

    @Test
    fun `a call by hand after a draft goes on from what is certain`() =
        open("gemma4-fp32") { runner ->
            val plain = runner.written(options(greedy))
            fun fed(draft: (() -> Drafter)?): FloatArray {
                runner.reset()
                runBlocking { runner.generate(prompt, options(greedy, draft)).take(4).toList() }
                return runner.feed(intArrayOf(3, 1), keep = 0)
            }
            val expected = fed(null)
            val got = fed(guesses(plain))
            assertTrue(expected.indices.all { Math.abs(expected[it] - got[it]) < 1e-4f })
        }

    @Test
    fun `what is drafted, and how often the graph is called, is as in Python`() {
        val cases = readObject(Cases.of("drafting.json"))
        for (case in cases.getAsJsonArray("proposals").map { it.asJsonObject }) {
            val ids = case.getAsJsonArray("ids").map { it.asInt }.toIntArray()
            val drafter = PromptLookup()
            for ((i, expected) in case.getAsJsonArray("proposed").withIndex()) {
                val got = drafter.propose(ids.copyOf(i + 1), case["most"].asInt)
                assertEquals(expected.asJsonArray.map { it.asInt }, got.toList(), "$i of $ids")
            }
        }
        for (case in cases.getAsJsonArray("texts").map { it.asJsonObject }) {
            open(case["bundle"].asString) { runner ->
                val given = case.getAsJsonArray("prompt_ids").map { it.asInt }.toIntArray()
                val ids = runner.written(options(greedy, ::PromptLookup), given).map { it.id }
                assertEquals(case.getAsJsonArray("ids").map { it.asInt }, ids)
                val counts = runner.stats.run { listOf(decodeCalls, draftedTokens, acceptedTokens) }
                assertEquals(case.getAsJsonArray("counts").map { it.asInt }, counts)
                assertTrue(runner.stats.acceptedTokens > 0 && runner.stats.tokensPerCall > 1)
            }
        }
    }

    @Test
    fun `drafts that cannot be are refused`() {
        open("lckv-fp16") { runner ->
            assertEquals(
                "drafts are checked several tokens a call, and this bundle's graph takes one",
                refusal<InputError> { runner.generate(prompt, options(greedy, ::PromptLookup)) },
            )
        }
        assertEquals(
            "draft `model` is not known; there is `lookup`",
            refusal<InputError> { drafterOf("model") },
        )
        assertTrue(drafterOf("lookup")() is PromptLookup)
    }
}
