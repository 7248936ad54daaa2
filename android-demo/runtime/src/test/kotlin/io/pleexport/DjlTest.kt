package io.pleexport

import ai.djl.huggingface.tokenizers.HuggingFaceTokenizer
import com.google.gson.JsonObject
import java.io.File
import java.util.Random
import org.junit.jupiter.api.Assertions.assertEquals
import org.junit.jupiter.api.Assertions.assertTrue
import org.junit.jupiter.api.DynamicTest
import org.junit.jupiter.api.TestFactory

/** The tokenizers of Hugging Face, as DJL brings them to the JVM, read the same files. */
class DjlTest {
    private fun opened(file: File): HuggingFaceTokenizer =
        // Without these it cuts at 512 tokens, and says nothing.
        HuggingFaceTokenizer.newInstance(
            file.toPath(),
            mapOf("truncation" to "false", "padding" to "false", "addSpecialTokens" to "true"),
        )

    private fun ids(ids: LongArray) = ids.map { it.toInt() }

    /** Texts of the conformance vectors and of the samples, and what nobody writes. */
    private val texts: List<String> by lazy {
        val vectors = File("../../conformance").listFiles { f -> f.extension == "json" }!!.sorted()
        val cases =
            vectors.flatMap { file ->
                val all = readObject(file).getAsJsonArray("texts") ?: return@flatMap emptyList()
                all.map { (it as JsonObject)["text"].asString }
            }
        val heldout = File("../../samples/heldout.txt").readText()
        val passages = listOf(0, 1000, 5000).map { heldout.substring(it, it + 4000) }
        val random = Random(8)
        val alphabet = "ab é\u00A0\u200Bだ🙂👩\u200D👧\u0301\t\n<>'09.,_▁Ġİß\uFDFA"
        val points = alphabet.codePoints().toArray()
        val made =
            List(200) {
                IntArray(random.nextInt(40)) { points[random.nextInt(points.size)] }
                    .let { String(it, 0, it.size) }
            }
        (cases + passages + made).distinct()
    }

    private fun files(): List<File> {
        val bundles = File("../../conformance").listFiles()!!.map { File(it, TOKENIZER) }
        val samples = File("../../samples").listFiles()!!.map { File(it, TOKENIZER) }
        return (bundles + samples).filter { it.isFile }.sorted()
    }

    @TestFactory
    fun `ids and texts are those of the tokenizers of Hugging Face`(): List<DynamicTest> {
        assertTrue(files().size >= 6 && texts.size > 200)
        return files().map { file ->
            DynamicTest.dynamicTest(file.parentFile.name) {
                val own = JsonTokenizer(file, emptyMap<Any, Any>())
                opened(file).use { witness ->
                    for (text in texts) {
                        val ids = witness.encode(text).ids
                        assertEquals(ids(ids), own.encode(text).toList(), text)
                        val plain = witness.encode(text, false, false).ids
                        assertEquals(ids(plain), own.encode(text, false).toList(), text)
                        for (skip in listOf(true, false)) {
                            assertEquals(
                                witness.decode(plain, skip),
                                own.decode(ids(plain).toIntArray(), withSpecials = !skip),
                                text,
                            )
                        }
                    }
                }
            }
        }
    }
}
