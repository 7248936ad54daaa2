package io.pleexport

import com.google.gson.JsonArray
import com.google.gson.JsonObject
import java.io.File
import java.nio.FloatBuffer
import java.nio.file.Path
import java.util.Base64
import kotlinx.coroutines.flow.toList
import kotlinx.coroutines.runBlocking
import org.junit.jupiter.api.Assertions.assertArrayEquals
import org.junit.jupiter.api.Assertions.assertEquals
import org.junit.jupiter.api.Assertions.assertThrows
import org.junit.jupiter.api.Assertions.assertTrue
import org.junit.jupiter.api.DynamicTest
import org.junit.jupiter.api.TestFactory
import org.junit.jupiter.api.io.TempDir

/**
 * The vectors that every runtime passes: docs/conformance.md. Nothing is left out.
 *
 * R8 shrinks this class in ../apk/test_apk.py, and takes no names with spaces.
 */
class ConformanceTest {
    @TempDir lateinit var temporary: Path

    private val folder = File("../../conformance")

    private fun eachOf(kind: String, check: (File, JsonObject) -> Unit): List<DynamicTest> =
        folder
            .listFiles { file -> file.extension == "json" }!!
            .sorted()
            .mapNotNull { file ->
                val vectors = readObject(file)
                assertEquals(
                    "pleexport-conformance 1",
                    "${vectors["format"].asString} ${vectors["version"].asString}",
                )
                if (!vectors.has(kind)) null
                else
                    DynamicTest.dynamicTest(file.nameWithoutExtension) {
                        check(File(folder, file.nameWithoutExtension), vectors)
                    }
            }
            .also { check(it.isNotEmpty()) { "no vectors of $kind" } }

    private fun cases(vectors: JsonObject, kind: String) =
        vectors.getAsJsonArray(kind).map { it.asJsonObject }

    private fun ids(value: JsonArray) = value.map { it.asInt }.toIntArray()

    private fun texts(value: JsonArray) = value.map { it.asString }

    private fun decoded(text: String): FloatArray {
        val floats = littleEndian(Base64.getDecoder().decode(text)).asFloatBuffer()
        return FloatArray(floats.remaining()).also { floats.get(it) }
    }

    private fun <T> open(bundle: File, use: (Runner) -> T): T = Runner(bundle, threads = 1).use(use)

    @TestFactory
    fun rowsAreEqualInEveryBit() =
        eachOf("rows") { bundle, vectors ->
            Bundle(bundle).openBlob().use { blob ->
                for (case in cases(vectors, "rows")) {
                    val expected = case.getAsJsonObject("vectors")
                    assertEquals(vectors.getAsJsonObject("tables").keySet(), expected.keySet())
                    for (table in expected.keySet()) {
                        val vector = decoded(expected[table].asString)
                        val out = FloatBuffer.allocate(vector.size)
                        blob.lookup(blob.rowIds(intArrayOf(case["id"].asInt)), listOf(table to out))
                        assertArrayEquals(
                            vector.map { it.toRawBits() }.toIntArray(),
                            out.array().map { it.toRawBits() }.toIntArray(),
                        )
                    }
                }
                for (id in ids(vectors.getAsJsonArray("refused_ids"))) refusal<InputError> {
                    blob.rowIds(intArrayOf(id))
                }
            }
        }

    @TestFactory
    fun logitsAreNearHoweverATextIsCut() =
        eachOf("logits") { bundle, vectors ->
            open(bundle) { runner ->
                for (case in cases(vectors, "logits")) {
                    val ids = ids(case.getAsJsonArray("ids"))
                    val whole = runner.logits(ids)
                    checkLogits(case, whole, runner.vocabSize)
                    for (lengths in listOf(intArrayOf(1, 7, 1, 22, 9), IntArray(ids.size) { 1 })) {
                        checkLogits(case, inPieces(runner, ids, lengths), runner.vocabSize)
                    }
                    // The control: other positions have other logits.
                    whole.reverse()
                    assertThrows(AssertionError::class.java) {
                        checkLogits(case, whole, runner.vocabSize)
                    }
                }
            }
        }

    private fun inPieces(runner: Runner, ids: IntArray, lengths: IntArray): FloatArray {
        runner.reset()
        var begin = 0
        val found = ArrayList<FloatArray>()
        for (length in lengths) {
            val end = minOf(begin + length, ids.size)
            for (at in begin until end step runner.chunk) {
                found += runner.feed(ids.copyOfRange(at, minOf(at + runner.chunk, end)), keep = 0)
            }
            begin = end
        }
        return found.fold(FloatArray(0), FloatArray::plus)
    }

    private fun checkLogits(case: JsonObject, logits: FloatArray, vocab: Int) {
        // Where inputs of matrices are not rounded, logits are right too.
        val shares =
            listOf("logits" to "tolerance", "unrounded" to "unrounded_tolerance")
                .filter { case.has(it.first) }
                .map { (expected, tolerance) ->
                    largestDifference(case, decoded(case[expected].asString), logits, vocab) /
                        case[tolerance].asFloat
                }
        assertTrue(shares.any { it <= 1 }, "$shares times the tolerance, more than 1")
    }

    private fun largestDifference(
        case: JsonObject,
        expected: FloatArray,
        logits: FloatArray,
        vocab: Int,
    ): Float {
        var largest = 0f
        ids(case.getAsJsonArray("positions")).forEachIndexed { i, position ->
            for (id in 0 until vocab) {
                val difference = Math.abs(expected[i * vocab + id] - logits[position * vocab + id])
                // Math.max keeps what is no number, which is never within a tolerance.
                largest = Math.max(largest, difference)
            }
        }
        return largest
    }

    @TestFactory
    fun greedyIdsAreEqual() =
        eachOf("greedy") { bundle, vectors ->
            open(bundle) { runner ->
                for (case in cases(vectors, "greedy")) {
                    val expected = ids(case.getAsJsonArray("ids"))
                    val options =
                        GenerationOptions(
                            GenerationConfig(maxNewTokens = expected.size),
                            greedy = true,
                            ignoreEos = true,
                        )
                    val tokens = runBlocking {
                        runner.generate(ids(case.getAsJsonArray("prompt_ids")), options).toList()
                    }
                    assertEquals(expected.toList(), tokens.map { it.id })
                }
            }
        }

    @TestFactory
    fun textsBecomeIdsAndIdsTexts() =
        eachOf("texts") { bundle, vectors ->
            val tokenizer = openTokenizer(Bundle(bundle))!!
            for (case in cases(vectors, "texts")) {
                assertEquals(
                    ids(case.getAsJsonArray("ids")).toList(),
                    tokenizer.encode(case["text"].asString).toList(),
                    "$case",
                )
            }
            for (case in cases(vectors, "decodings")) {
                val ids = ids(case.getAsJsonArray("ids"))
                assertEquals(case["text"].asString, tokenizer.decode(ids))
                assertEquals(
                    case["with_specials"].asString,
                    tokenizer.decode(ids, withSpecials = true),
                )
            }
        }

    @TestFactory
    fun streamsGiveTheSamePieces() =
        eachOf("streams") { bundle, vectors ->
            val tokenizer = openTokenizer(Bundle(bundle))!!
            for (case in cases(vectors, "streams")) {
                val stream = tokenizer.stream(ids(case.getAsJsonArray("prompt_ids")))
                val pieces = ids(case.getAsJsonArray("ids")).map(stream::push) + stream.flush()
                assertEquals(texts(case.getAsJsonArray("pieces")), pieces, "$case")
            }
            for (case in cases(vectors, "stops")) {
                val prompt = case.getAsJsonArray("prompt_ids")?.let(::ids) ?: IntArray(0)
                val answer =
                    AnswerText(tokenizer.stream(prompt), texts(case.getAsJsonArray("stop")))
                val pieces = ArrayList<String>()
                for (id in ids(case.getAsJsonArray("ids"))) if (!answer.stopped)
                    pieces += answer.push(id)
                if (!answer.stopped) pieces += answer.flush()
                assertEquals(texts(case.getAsJsonArray("pieces")), pieces, "$case")
                assertEquals(case["stopped"].asBoolean, answer.stopped)
            }
        }

    @TestFactory
    fun conversationsAreRenderedOrRefused() =
        eachOf("conversations") { bundle, vectors ->
            open(bundle) { runner ->
                for (case in cases(vectors, "conversations")) {
                    val messages = case.getAsJsonArray("messages").map { it.asJsonObject }
                    val thinking = case["thinking"]?.takeIf { !it.isJsonNull }?.asBoolean
                    // Messages of other fields or types cannot be made here.
                    val fits =
                        messages.all {
                            it.keySet() == setOf("role", "content") &&
                                it.entrySet().all { (_, v) -> v.isJsonPrimitive }
                        }
                    val render = {
                        runner.encodeChat(
                            messages.map { Message(it["role"].asString, it["content"].asString) },
                            thinking,
                        )
                    }
                    if (!case["ids"].isJsonNull)
                        assertEquals(
                            ids(case.getAsJsonArray("ids")).toList(),
                            render().toList(),
                            "$case",
                        )
                    else if (fits) refusal<InputError> { render() }
                }
            }
        }

    @TestFactory
    fun malformedBundlesAreRefusedByTheRuleThatTheyBreak() =
        eachOf("malformed") { bundle, vectors ->
            val others = ArrayList<String>()
            for (case in cases(vectors, "malformed")) {
                val copy = temporary.resolve("copy").toFile()
                copy.deleteRecursively()
                bundle.copyRecursively(copy)
                case.getAsJsonArray("changes").forEach { change(copy, it.asJsonObject) }
                val expected = case["message"].asString
                val words =
                    if (case["when"].asString == "open")
                        refusal<PleexportError> { Runner(copy, threads = 1).close() }
                    else
                        open(copy) { runner ->
                            val id = case["id"].asInt
                            for (other in
                                listOf(id - 1, id + 1).filter {
                                    it in 0 until runner.numRows.toInt()
                                }) runner.feed(intArrayOf(other))
                            refusal<PleexportError> { runner.feed(intArrayOf(id)) }
                        }
                // Python's reader of JSON takes NaN for a number; the format, and ours, do not.
                val isNaN = case["name"].asString == "blob: a multiplier that is no number"
                val rule = if (isNaN) "B-05" else case["rule"].asString
                val said = words.replace(copy.path, "BUNDLE")
                val namesRule = "($rule)" in said || "($rule)" !in expected || !rule.matches(Regex("[BT]-\\d\\d"))
                if (!namesRule || (said != expected && !isNaN)) others += "$expected\n    $said"
            }
            assertEquals(
                emptyList<String>(),
                others.filterNot(::isOfLibraries),
                "words of the Python library, and ours",
            )
        }

    /**
     * What JSON readers and other libraries say of a text is their own; ours says what is wrong
     * too.
     */
    private fun isOfLibraries(both: String) =
        listOf("malformed", "not valid JSON", "cannot be read", "damaged: ", "(T-04)", "has multiplier").any {
            it in both.substringBefore("\n") && it in both.substringAfter("\n")
        }

    private fun change(copy: File, change: JsonObject) {
        if (change.has("delete") && change["delete"].asBoolean) {
            check(File(copy, change["file"].asString).delete())
            return
        }
        val file = File(copy, change["file"].asString)
        var bytes = file.readBytes()
        for (splice in change.getAsJsonArray("splices").map { it.asJsonArray }.reversed()) {
            val at = splice[0].asInt
            val added = splice[2].asString.chunked(2).map { it.toInt(16).toByte() }.toByteArray()
            bytes = bytes.copyOf(at) + added + bytes.copyOfRange(at + splice[1].asInt, bytes.size)
        }
        file.writeBytes(bytes)
    }
}
