package io.pleexport

import com.google.gson.JsonArray
import com.google.gson.JsonObject
import java.io.File
import java.nio.file.Path
import org.junit.jupiter.api.Assertions.assertArrayEquals
import org.junit.jupiter.api.Assertions.assertEquals
import org.junit.jupiter.api.Assertions.assertTrue
import org.junit.jupiter.api.DynamicTest
import org.junit.jupiter.api.Test
import org.junit.jupiter.api.TestFactory
import org.junit.jupiter.api.io.TempDir

class TokenizerTest {
    @TempDir lateinit var folder: Path

    private fun ids(array: JsonArray) = array.map { it.asInt }.toIntArray()

    private fun open(folder: File): Tokenizer {
        val vocabulary = File(folder, VOCABULARY)
        if (vocabulary.exists()) return WorldTokenizer(vocabulary)
        val config = File(folder, TOKENIZER_CONFIG).takeIf { it.exists() }
        return JsonTokenizer(
            File(folder, TOKENIZER),
            config?.let { parseJson(it.readBytes()) as Map<*, *> } ?: emptyMap<Any, Any>(),
        )
    }

    @TestFactory
    fun `ids, texts and streams are those of the Python library`(): List<DynamicTest> =
        Cases.of("tokenizers").listFiles()!!.sorted().map { own ->
            DynamicTest.dynamicTest(own.name) {
                val tokenizer = open(own)
                val cases = readObject(File(own, "cases.json"))
                assertEquals(cases["size"].asInt, tokenizer.size)
                for (case in cases.getAsJsonArray("texts").map { it.asJsonObject }) checkText(
                    tokenizer,
                    case,
                )
                for (case in cases.getAsJsonArray("streams").map { it.asJsonObject }) checkStream(
                    tokenizer,
                    case,
                )
            }
        }

    private fun checkText(tokenizer: Tokenizer, case: JsonObject) {
        val text = case["text"].asString
        assertArrayEquals(ids(case.getAsJsonArray("ids")), tokenizer.encode(text), "ids of `$text`")
        val plain = tokenizer.encode(text, addSpecialTokens = false)
        assertArrayEquals(ids(case.getAsJsonArray("plain")), plain, "plain ids of `$text`")
        assertEquals(case["decoded"].asString, tokenizer.decode(plain), "text of `$text`")
        assertEquals(
            case["kept"].asString,
            tokenizer.decode(plain, withSpecials = true),
            "text of `$text`",
        )
    }

    private fun checkStream(tokenizer: Tokenizer, case: JsonObject) {
        val ids = ids(case.getAsJsonArray("ids"))
        val stream = tokenizer.stream(ids(case.getAsJsonArray("prompt")))
        val pieces = ids.map(stream::push) + stream.flush()
        assertEquals(
            case.getAsJsonArray("pieces").map { it.asString },
            pieces,
            ids.toList().toString(),
        )
        assertEquals(case["decoded"].asString, tokenizer.decode(ids))
    }

    @Test
    fun `half a surrogate pair is no text`() {
        val tokenizer = write("""{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}""")
        assertEquals("the text is not UTF-8", refusal<InputError> { tokenizer.encode("a\uD800") })
    }

    @TestFactory
    fun `parts that are not known are refused by name`() =
        mapOf(
                """{"model": {"type": "WordPiece", "vocab": {}}}""" to "the model `WordPiece`",
                """{"model": {"type": "Unigram", "vocab": [["a", 0.0]]}}""" to
                    "a model with scores",
                """{"model": {"type": "BPE", "vocab": {}, "merges": [], "end_of_word_suffix": "</w>"}}""" to
                    "`end_of_word_suffix`",
                """{"normalizer": {"type": "Lowercase"}, $MODEL}""" to "the normalizer `Lowercase`",
                """{"pre_tokenizer": {"type": "Whitespace"}, $MODEL}""" to
                    "the pre-tokenizer `Whitespace`",
                """{"decoder": {"type": "CTC"}, $MODEL}""" to "the decoder `CTC`",
                """{"post_processor": {"type": "BertProcessing"}, $MODEL}""" to
                    "the post-processor `BertProcessing`",
                """{"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "\\b"}, "behavior": "Isolated"}, $MODEL}""" to
                    "`\\b` in a regular expression",
                """{"added_tokens": [{"id": 1, "content": "x", "single_word": true}], $MODEL}""" to
                    "the single word `x`",
            )
            .map { (text, what) ->
                DynamicTest.dynamicTest(what) {
                    val words = refusal<TokenizerError> { write(text) }
                    assertTrue("has $what, which this library does not know" in words, words)
                }
            }

    @TestFactory
    fun `malformed files are refused`() =
        listOf(
                "{",
                "[]",
                """{"model": {"vocab": {"a": "b"}}}""",
                """{"model": {"vocab": {"a": -1}}}""",
                """{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}}""",
                """{"added_tokens": [{"id": "x"}], $MODEL}""",
                """{"added_tokens": 3, $MODEL}""",
                template("B"),
            )
            .map { text ->
                DynamicTest.dynamicTest(text) { refusal<TokenizerError> { write(text) } }
            }

    @Test
    fun `a template of one text is read`() {
        write(template("A"))
    }

    /** A file whose template has the text of that name. */
    private fun template(text: String) =
        """{"post_processor": {"type": "TemplateProcessing", "special_tokens": {},
            "single": [{"Sequence": {"id": "$text", "type_id": 0}}]}, $MODEL}"""

    private fun write(text: String): Tokenizer {
        val file = folder.resolve("tokenizer.json").toFile()
        file.writeText(text)
        return JsonTokenizer(file, emptyMap<Any, Any>())
    }

    @Test
    fun `bytes that are no text are replaced as Python does it`() {
        fun text(vararg bytes: Int) = decodeLossy(ByteArray(bytes.size) { bytes[it].toByte() })
        assertEquals("\uFFFD\uFFFD\uFFFDa", text(0xED, 0xA0, 0x80, 0x61))
        assertEquals("\uFFFDa", text(0xF0, 0x9F, 0x99, 0x61))
        assertEquals("\uFFFD\uFFFDé", text(0xC0, 0x80, 0xC3, 0xA9))
        assertEquals("🙂", text(0xF0, 0x9F, 0x99, 0x82))
        assertEquals(
            3,
            unfinishedBytes(byteArrayOf(0x61, 0xF0.toByte(), 0x9F.toByte(), 0x99.toByte())),
        )
        assertEquals(0, unfinishedBytes(byteArrayOf(0x61, 0xED.toByte(), 0xA0.toByte())))
    }

    private companion object {
        const val MODEL = """"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}"""
    }
}
