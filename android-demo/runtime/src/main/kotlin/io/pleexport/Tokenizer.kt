package io.pleexport

import java.io.File
import java.io.IOException

internal const val TOKENIZER = "tokenizer.json"
internal const val TOKENIZER_CONFIG = "tokenizer_config.json"
internal const val CHAT_TEMPLATE = "chat_template.jinja"
internal const val AS_PUBLISHED = "fetch the file again; it is published with the model"

/** The tokenizer of a bundle: text to token ids and back. */
interface Tokenizer {
    /** Ids are below it. */
    val size: Int

    /**
     * Ids of a text.
     *
     * @param addSpecialTokens put those around it that the tokenizer has for that.
     * @throws InputError the text is not Unicode.
     */
    fun encode(text: String, addSpecialTokens: Boolean = true): IntArray

    /** The text of ids; special tokens are left out where nobody asks for them. */
    fun decode(ids: IntArray, withSpecials: Boolean = false): String

    /** What makes text of the ids that follow a prompt, as they come. */
    fun stream(promptIds: IntArray): TextStream

    /** The text of a special token; "" of any other. */
    fun specialText(id: Int): String

    /**
     * What stands before and after thoughts, where the tokenizer's config says it in plain texts.
     */
    val thoughtMarkers: List<Pair<String, String>>
}

/**
 * The tokenizer of a bundle; null where it has none.
 *
 * @throws TokenizerError a file is malformed, or has parts that are not known here.
 * @throws CheckFailed a file does not match its checksums.
 */
internal fun openTokenizer(bundle: Bundle): Tokenizer? {
    // The template is not read, but the chat format was made from it.
    val names = listOf(TOKENIZER, VOCABULARY, TOKENIZER_CONFIG, CHAT_TEMPLATE)
    val files = names.mapNotNull(bundle::file)
    bundle.checksums?.let { checkFiles(files, it) }
    val json = bundle.file(TOKENIZER)
    if (json != null) return JsonTokenizer(json, readConfig(bundle.file(TOKENIZER_CONFIG)))
    return bundle.file(VOCABULARY)?.let(::WorldTokenizer)
}

private fun readConfig(file: File?): Map<*, *> {
    if (file == null) return emptyMap<Any, Any>()
    try {
        return parseJson(file.readBytes()) as? Map<*, *> ?: emptyMap<Any, Any>()
    } catch (err: IOException) {
        throw TokenizerError("`$file` cannot be read: ${reason(err)}", AS_PUBLISHED, err)
    } catch (err: MalformedJson) {
        throw TokenizerError("`$file` is not valid JSON (${err.message})", AS_PUBLISHED, err)
    }
}

/** @throws InputError the text holds half a surrogate pair. */
internal fun checkUnicode(text: String) {
    var at = 0
    while (at < text.length) {
        val code = text.codePointAt(at)
        if (code in 0xD800..0xDFFF) {
            throw InputError("the text is not UTF-8", "it holds half a surrogate pair; replace it")
        }
        at += Character.charCount(code)
    }
}
