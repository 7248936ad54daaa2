package io.pleexport

import com.google.gson.Strictness
import com.google.gson.stream.JsonReader
import com.google.gson.stream.JsonToken
import java.io.File
import java.io.IOException
import java.io.InputStreamReader
import java.nio.charset.CharacterCodingException
import java.util.regex.PatternSyntaxException

/**
 * A tokenizer.json: byte-pair encoding with the steps around it that models with per-layer
 * embeddings have. A file with other parts is refused, since it would give other ids.
 *
 * @param config its tokenizer_config.json.
 * @throws TokenizerError the file is malformed, or has parts that are not known here.
 */
internal class JsonTokenizer(file: File, config: Map<*, *>) : Tokenizer, Decoding {
    private val tokens: Array<String?>
    private val special: Map<Int, String>
    private val added: AddedTokens
    private val bpe: Bpe
    private val normalizers: List<(String) -> String>
    private val preTokenizers: List<(List<String>, Boolean) -> List<String>>
    private val decoders: List<(List<String>) -> List<String>>
    private val hasByteFallback: Boolean
    private val cleans: Boolean
    private val before: List<Int>
    private val after: List<Int>

    init {
        try {
            val parts = TokenizerFile(file)
            bpe = parts.bpe()
            normalizers = Step.all(parts["normalizer"], "normalizers").map(::normalizer)
            preTokenizers = Step.all(parts["pre_tokenizer"], "pretokenizers").map(::preTokenizer)
            val steps = Step.all(parts["decoder"], "decoders")
            hasByteFallback = steps.any { it.type == "ByteFallback" }
            decoders = steps.map(::tokenDecoder)
            val own = parts.addedTokens()
            special = own.filter { it.special }.associate { it.id to it.content }
            added = AddedTokens(own, ::normalized, config["split_special_tokens"] == true)
            tokens = parts.tokens(own)
            parts.surroundings().let { (front, end) ->
                before = front
                after = end
            }
        } catch (err: IOException) {
            throw TokenizerError("`$file` cannot be read: ${reason(err)}", AS_PUBLISHED, err)
        } catch (err: MalformedJson) {
            throw TokenizerError("`$file` cannot be read: ${err.message}", AS_PUBLISHED, err)
        } catch (err: UnknownPart) {
            throw TokenizerError(
                "`$file` has ${err.message}, which this library does not know",
                "pass token ids instead of text, or run the bundle with the Python library",
                err,
            )
        } catch (err: PatternSyntaxException) {
            throw TokenizerError(
                "`$file` has a pattern that is none: ${err.description}",
                AS_PUBLISHED,
                err,
            )
        }
        // transformers does not clean what BPE decodes, if it is not forced to.
        cleans = config[CLEANS] == true && config[CLEANS_BPE] == true
    }

    override val size: Int
        get() = tokens.size

    override fun encode(text: String, addSpecialTokens: Boolean): IntArray {
        checkUnicode(text)
        val out = IntList()
        if (addSpecialTokens) before.forEach(out::add)
        added.split(text) { piece, first, id ->
            if (id != null) out.add(id)
            else {
                val words =
                    preTokenizers.fold(listOf(piece)) { pieces, split -> split(pieces, first) }
                for (word in words) if (word.isNotEmpty()) bpe.encode(word, out)
            }
        }
        if (addSpecialTokens) after.forEach(out::add)
        return out.toIntArray()
    }

    override fun decode(ids: IntArray, withSpecials: Boolean): String {
        val text = decoded(ids.toList(), withSpecials)
        return if (cleans) clean(text) else text
    }

    override fun decode(ids: List<Int>): String = decoded(ids, withSpecials = false)

    override fun stream(promptIds: IntArray): TextStream {
        val raw = DecodedStream(this, promptIds)
        return if (cleans) CleanedStream(raw) else raw
    }

    override fun specialText(id: Int): String = special[id] ?: ""

    override val thoughtMarkers: List<Pair<String, String>> = markers(config)

    override fun isByte(id: Int): Boolean =
        hasByteFallback && tokens.getOrNull(id)?.let(::isByteToken) == true

    override fun isSilent(id: Int): Boolean = id in special || tokens.getOrNull(id) == null

    private fun decoded(ids: List<Int>, withSpecials: Boolean): String {
        val shown =
            ids.mapNotNull { id ->
                if (!withSpecials && id in special) null else tokens.getOrNull(id)
            }
        if (decoders.isEmpty()) return shown.joinToString(" ")
        return decoders.fold(shown) { pieces, decode -> decode(pieces) }.joinToString("")
    }

    private fun markers(config: Map<*, *>): List<Pair<String, String>> {
        val fields = (config["response_template"] as? Map<*, *>)?.get("fields") as? Map<*, *>
        return THOUGHTS.mapNotNull { name ->
            val own = fields?.get(name) as? Map<*, *>
            val open = own?.get("open") as? String
            val close = own?.get("close") as? String
            if (open.isNullOrEmpty() || close.isNullOrEmpty()) null else open to close
        }
    }

    private fun normalized(text: String): String =
        normalizers.fold(text) { held, step -> step(held) }

    private companion object {
        val THOUGHTS = listOf("reasoning_content", "thinking", "reasoning")
        const val CLEANS = "clean_up_tokenization_spaces"
        const val CLEANS_BPE = "${CLEANS}_for_bpe_even_though_it_will_corrupt_output"
    }
}

/** A token that was added to a vocabulary; it is found in a text before anything else. */
internal class AddedToken(
    val id: Int,
    val content: String,
    val special: Boolean,
    val normalized: Boolean,
    val stripsLeft: Boolean,
    val stripsRight: Boolean,
)

/**
 * Finds added tokens: first those that stand for themselves, and between them those that are looked
 * for in the normalized text.
 *
 * @param keepsSpecials special tokens in a text are plain text.
 */
internal class AddedTokens(
    tokens: List<AddedToken>,
    private val normalize: (String) -> String,
    private val keepsSpecials: Boolean,
) {
    private val plain = byFirst(tokens.filter { !it.normalized }) { it }
    private val normalized = byFirst(tokens.filter { it.normalized }, normalize)

    /**
     * Calls `each` with the normalized pieces of a text, whether one begins it, and ids of tokens.
     */
    fun split(text: String, each: (piece: String, first: Boolean, id: Int?) -> Unit) {
        split(text, plain) { piece, begin, id ->
            if (id != null) each(piece, begin == 0, id)
            else
                split(normalize(piece), normalized) { part, from, found ->
                    each(part, begin == 0 && from == 0, found)
                }
        }
    }

    private fun split(
        text: String,
        tokens: Map<Char, List<Pair<String, AddedToken>>>,
        each: (piece: String, begin: Int, id: Int?) -> Unit,
    ) {
        var from = 0
        var at = 0
        while (at < text.length) {
            val (content, token) =
                tokens[text[at]]?.firstOrNull { text.startsWith(it.first, at) } ?: (null to null)
            if (content == null || token == null) {
                at++
                continue
            }
            if (keepsSpecials && token.special) {
                at += content.length
                continue
            }
            var begin = at
            if (token.stripsLeft) while (begin > from && isWhiteSpace(text[begin - 1])) begin--
            at += content.length
            if (token.stripsRight) while (at < text.length && isWhiteSpace(text[at])) at++
            if (begin > from) each(text.substring(from, begin), from, null)
            each(content, begin, token.id)
            from = at
        }
        if (from < text.length) each(text.substring(from), from, null)
    }

    /** Longer ones first: of those that begin at one place, the longest is taken. */
    private fun byFirst(tokens: List<AddedToken>, content: (String) -> String) =
        tokens
            .map { content(it.content) to it }
            .filter { it.first.isNotEmpty() }
            .sortedByDescending { it.first.length }
            .groupBy { it.first[0] }
}

/**
 * The parts of a tokenizer.json. Vocabulary and merges are taken as they come: as a tree they would
 * take 300 MB for 262,144 tokens.
 */
private class TokenizerFile(file: File) {
    private val parts = HashMap<String, Any?>()
    private val model = HashMap<String, Any?>()
    private val vocabulary = HashMap<String, Int>()
    private val merges = IntList()
    private val early = ArrayList<Pair<String, String>>()

    init {
        val decoder = Charsets.UTF_8.newDecoder()
        malformedAsOne {
            try {
                JsonReader(InputStreamReader(file.inputStream(), decoder)).use { reader ->
                    reader.strictness = Strictness.STRICT
                    reader.members { name ->
                        if (name == "model") members(::readModel) else parts[name] = readValue()
                    }
                }
            } catch (err: CharacterCodingException) {
                throw MalformedJson("it is not UTF-8")
            }
        }
        for ((left, right) in early) merge(left, right)
    }

    operator fun get(name: String): Any? = parts[name]

    fun bpe(): Bpe {
        val type = model["type"] as? String ?: "BPE"
        if (type != "BPE") throw UnknownPart("the model `$type`")
        for (name in listOf("dropout", "continuing_subword_prefix", "end_of_word_suffix")) {
            if (model[name] !in listOf(null, "", 0L, 0.0)) throw UnknownPart("`$name`")
        }
        val unknown = model["unk_token"] as? String
        if (unknown != null && unknown !in vocabulary) throw MalformedJson("`$unknown` is no token")
        return Bpe(
            vocabulary,
            merges,
            byteFallback = model["byte_fallback"] == true,
            fuseUnknown = model["fuse_unk"] == true,
            ignoreMerges = model["ignore_merges"] == true,
            unknown = unknown?.let(vocabulary::getValue),
        )
    }

    fun addedTokens(): List<AddedToken> =
        ((parts["added_tokens"] ?: emptyList<Any>()) as? List<*>
                ?: throw MalformedJson("added_tokens is no list"))
            .map { value ->
                val fields =
                    value as? Map<*, *> ?: throw MalformedJson("an added token is no object")
                val id = (fields["id"] as? Long)?.takeIf { it in 0..LARGEST_ID }
                val content = fields["content"] as? String
                if (id == null || content == null)
                    throw MalformedJson("an added token has no id or text")
                if (fields["single_word"] == true) throw UnknownPart("the single word `$content`")
                AddedToken(
                    id = id.toInt(),
                    content = content,
                    special = fields["special"] == true,
                    normalized = fields["normalized"] == true,
                    stripsLeft = fields["lstrip"] == true,
                    stripsRight = fields["rstrip"] == true,
                )
            }

    /** All tokens by id. */
    fun tokens(added: List<AddedToken>): Array<String?> {
        val most = maxOf(vocabulary.values.maxOrNull() ?: -1, added.maxOfOrNull { it.id } ?: -1)
        val tokens = arrayOfNulls<String>(most + 1)
        for ((token, id) in vocabulary) tokens[id] = token
        for (token in added) tokens[token.id] = token.content
        return tokens
    }

    /** The ids that stand before and behind a text. */
    fun surroundings(): Pair<List<Int>, List<Int>> {
        val before = ArrayList<Int>()
        val after = ArrayList<Int>()
        for (step in Step.all(parts["post_processor"], "processors")) {
            if (step.type == "ByteLevel") continue // changes places in the text only
            if (step.type != "TemplateProcessing") throw step.unknown("post-processor")
            val ids = step.value("special_tokens") as? Map<*, *> ?: emptyMap<Any, Any>()
            var behind = false
            val pieces =
                step.value("single") as? List<*>
                    ?: throw MalformedJson("a template without `single`")
            for (piece in pieces) {
                val token = (piece as? Map<*, *>)?.get("SpecialToken") as? Map<*, *>
                val text = (piece as? Map<*, *>)?.get("Sequence") as? Map<*, *>
                if (text != null && text["id"] != "A") {
                    throw MalformedJson("a template with a second text")
                }
                if (token == null) behind = true
                else {
                    val own =
                        (ids[token["id"]] as? Map<*, *>)?.get("ids") as? List<*>
                            ?: throw MalformedJson("a template with an unknown token")
                    (if (behind) after else before) += own.map { (it as? Long)?.toInt() ?: 0 }
                }
            }
        }
        return before to after
    }

    private fun readModel(reader: JsonReader, name: String) {
        when (name) {
            "vocab" ->
                if (reader.peek() == JsonToken.BEGIN_OBJECT)
                    reader.members { token ->
                        val id = nextInt()
                        if (id !in 0..LARGEST_ID)
                            throw MalformedJson("token `$token` has the id $id")
                        vocabulary[token] = id
                    }
                else throw UnknownPart("a model with scores") // Unigram
            "merges" -> {
                reader.beginArray()
                while (reader.hasNext()) readMerge(reader)
                reader.endArray()
            }
            else -> model[name] = reader.readValue()
        }
    }

    private fun readMerge(reader: JsonReader) {
        val left: String
        val right: String
        if (reader.peek() == JsonToken.STRING) {
            val text = reader.nextString()
            left = text.substringBefore(' ')
            right = text.substringAfter(' ', "")
        } else {
            reader.beginArray()
            left = reader.nextString()
            right = reader.nextString()
            reader.endArray()
        }
        // Ids need no memory, but the vocabulary may come later.
        if (vocabulary.isEmpty()) early += left to right else merge(left, right)
    }

    private fun merge(left: String, right: String) {
        for (token in listOf(left, right, left + right)) {
            merges.add(vocabulary[token] ?: throw MalformedJson("Token `$token` out of vocabulary"))
        }
    }

    private fun JsonReader.members(each: JsonReader.(String) -> Unit) {
        beginObject()
        while (hasNext()) each(nextName())
        endObject()
    }

    private companion object {
        const val LARGEST_ID = 1 shl 23
    }
}
