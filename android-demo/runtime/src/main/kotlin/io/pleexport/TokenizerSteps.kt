package io.pleexport

import java.io.ByteArrayOutputStream
import java.text.Normalizer

/** A part of a tokenizer.json that is not known here. */
internal class UnknownPart(what: String) : Exception(what)

/** A step of a tokenizer.json, such as `{"type": "Replace", ...}`. */
internal class Step(private val fields: Map<*, *>) {
    val type: String
        get() = text("type")

    fun value(name: String): Any? = fields[name]

    fun text(name: String): String =
        fields[name] as? String ?: throw UnknownPart("a step `${fields["type"]}` without `$name`")

    fun textOr(name: String, default: String): String = fields[name] as? String ?: default

    fun flag(name: String, default: Boolean): Boolean = fields[name] as? Boolean ?: default

    fun number(name: String): Int =
        (fields[name] as? Long)?.toInt() ?: throw UnknownPart("a step `$type` without `$name`")

    /** What to look for: a text or a regular expression. */
    fun pattern(): Regex {
        val pattern =
            fields["pattern"] as? Map<*, *> ?: throw UnknownPart("a step `$type` without `pattern`")
        (pattern["String"] as? String)?.let {
            return Regex(Regex.escape(it))
        }
        return translated(pattern["Regex"] as? String ?: throw UnknownPart("a pattern of `$type`"))
    }

    fun unknown(kind: String) = UnknownPart("the $kind `$type`")

    companion object {
        /** The steps in a sequence, or the one that stands alone. */
        fun all(value: Any?, list: String): List<Step> {
            if (value == null) return emptyList()
            val step = Step(value as? Map<*, *> ?: throw UnknownPart("a step that is no object"))
            if (step.type != "Sequence") return listOf(step)
            val own =
                step.fields[list] as? List<*> ?: throw UnknownPart("a sequence without `$list`")
            return own.flatMap { all(it, list) }
        }
    }
}

/** What happens to a text before it is split. */
internal fun normalizer(step: Step): (String) -> String =
    when (step.type) {
        "Replace" -> {
            val pattern = step.pattern()
            val content = Regex.escapeReplacement(step.text("content"))
            val replaced = { text: String -> pattern.replace(text, content) }
            replaced
        }
        "Prepend" -> step.text("prepend").let { front -> { if (it.isEmpty()) it else front + it } }
        "NFC",
        "NFD",
        "NFKC",
        "NFKD" ->
            Normalizer.Form.valueOf(step.type).let { form -> { Normalizer.normalize(it, form) } }
        else -> throw step.unknown("normalizer")
    }

/**
 * What splits a text into words: pieces to pieces, of which the first begins the whole text or not.
 */
internal fun preTokenizer(step: Step): (List<String>, Boolean) -> List<String> =
    when (step.type) {
        "ByteLevel" -> {
            val prefixed = step.flag("add_prefix_space", true)
            val words = if (step.flag("use_regex", true)) translated(GPT2) else null;
            { pieces, _ ->
                pieces.flatMap { piece ->
                    val spaced = if (prefixed && !piece.startsWith(" ")) " $piece" else piece
                    val parts =
                        words?.let { split(spaced, it, "Isolated", false) } ?: listOf(spaced)
                    parts.map(ByteLevel::shown)
                }
            }
        }
        "Split" -> {
            val pattern = step.pattern()
            val behavior = step.text("behavior")
            if (behavior !in BEHAVIORS) throw UnknownPart("the behaviour `$behavior` of a split")
            val invert = step.flag("invert", false);
            { pieces, _ -> pieces.flatMap { split(it, pattern, behavior, invert) } }
        }
        "Digits" -> {
            val digits = Regex(if (step.flag("individual_digits", false)) "\\p{N}" else "\\p{N}+")
            val behavior = "Isolated";
            { pieces, _ -> pieces.flatMap { split(it, digits, behavior, false) } }
        }
        "Metaspace" -> metaspace(step)
        else -> throw step.unknown("pre-tokenizer")
    }

private fun metaspace(step: Step): (List<String>, Boolean) -> List<String> {
    val mark = step.text("replacement")
    // Older files say `add_prefix_space` in place of a scheme.
    val scheme =
        step.textOr(
            "prepend_scheme",
            if (step.flag("add_prefix_space", true)) "always" else "never",
        )
    if (scheme !in listOf("always", "first", "never"))
        throw UnknownPart("the scheme `$scheme` of Metaspace")
    val splits = if (step.flag("split", true)) Regex(Regex.escape(mark)) else null
    return { pieces, first ->
        pieces.flatMapIndexed { i, piece ->
            val marked = piece.replace(" ", mark)
            val prepends = scheme == "always" || (scheme == "first" && first && i == 0)
            val whole = if (prepends && !marked.startsWith(mark)) mark + marked else marked
            splits?.let { split(whole, it, "MergedWithNext", false) } ?: listOf(whole)
        }
    }
}

/** What makes text of tokens: tokens to tokens, joined at the end. */
internal fun tokenDecoder(step: Step): (List<String>) -> List<String> =
    when (step.type) {
        "ByteLevel" -> { tokens -> listOf(decodeLossy(ByteLevel.bytes(tokens))) }
        "ByteFallback" -> ::joinBytes
        "Fuse" -> { tokens -> listOf(tokens.joinToString("")) }
        "Replace" -> normalizer(step).let { replaced -> { tokens -> tokens.map(replaced) } }
        "Strip" -> {
            val content = step.text("content").single()
            val start = step.number("start")
            val stop = step.number("stop");
            { tokens ->
                tokens.map { token ->
                    val begin = token.take(start).takeWhile { it == content }.length
                    val cut = token.takeLast(stop).takeLastWhile { it == content }.length
                    if (begin < token.length - cut) token.substring(begin, token.length - cut)
                    else ""
                }
            }
        }
        "Metaspace" -> {
            val mark = step.text("replacement").single()
            val scheme =
                step.textOr(
                    "prepend_scheme",
                    if (step.flag("add_prefix_space", true)) "always" else "never",
                );
            { tokens ->
                tokens.mapIndexed { i, token ->
                    if (i == 0 && scheme != "never") token.filter { it != mark }
                    else token.replace(mark, ' ')
                }
            }
        }
        else -> throw step.unknown("decoder")
    }

/** Whether a token stands for one byte of a byte-fallback decoder. */
internal fun isByteToken(token: String): Boolean = byteOf(token) != null

private fun byteOf(token: String): Byte? {
    if (token.length != 6 || !token.startsWith("<0x") || token[5] != '>') return null
    val digits = token.substring(3, 5)
    return if (digits.all { it in "0123456789abcdefABCDEF" }) digits.toInt(16).toByte() else null
}

/** Runs of byte tokens as text; a run that is no UTF-8 is one replacement character a byte. */
private fun joinBytes(tokens: List<String>): List<String> {
    val joined = ArrayList<String>()
    val run = ByteArrayOutputStream()
    fun end() {
        if (run.size() == 0) return
        joined +=
            try {
                decodeUtf8(run.toByteArray())
            } catch (err: MalformedJson) {
                "\uFFFD".repeat(run.size())
            }
        run.reset()
    }
    for (token in tokens) {
        val byte = byteOf(token)
        if (byte != null) run.write(byte.toInt())
        else {
            end()
            joined += token
        }
    }
    end()
    return joined
}

/** Bytes as characters that can be seen, as GPT-2 has them. */
private object ByteLevel {
    private val characters = CharArray(256)
    private val bytes = HashMap<Char, Byte>()

    init {
        var extra = 256
        for (byte in 0..255) {
            val isShown = byte in 33..126 || byte in 161..172 || byte in 174..255
            characters[byte] = (if (isShown) byte else extra++).toChar()
            bytes[characters[byte]] = byte.toByte()
        }
    }

    fun shown(text: String): String {
        val raw = text.toByteArray()
        return String(CharArray(raw.size) { characters[raw[it].toInt() and 0xff] })
    }

    /** A token with a character that stands for no byte is its own text. */
    fun bytes(tokens: List<String>): ByteArray {
        val out = ByteArrayOutputStream()
        for (token in tokens) {
            val own = token.map { bytes[it] }
            if (null in own) out.write(token.toByteArray(), 0, token.toByteArray().size)
            else own.forEach { out.write(it!!.toInt()) }
        }
        return out.toByteArray()
    }
}

/** Splits a text at what matches a pattern; `invert` takes what lies between for the matches. */
private fun split(text: String, pattern: Regex, behavior: String, invert: Boolean): List<String> {
    val parts = ArrayList<Pair<String, Boolean>>()
    var from = 0
    for (match in pattern.findAll(text)) {
        if (match.value.isEmpty()) continue
        if (match.range.first > from) parts += text.substring(from, match.range.first) to invert
        parts += match.value to !invert
        from = match.range.last + 1
    }
    if (from < text.length) parts += text.substring(from) to invert
    val out = ArrayList<String>()
    parts.forEachIndexed { i, (part, isMatch) ->
        val beforeIsMatch = i > 0 && parts[i - 1].second
        when (behavior) {
            "Removed" -> if (!isMatch) out += part
            "Isolated" -> out += part
            "Contiguous" ->
                if (i > 0 && isMatch == beforeIsMatch) out[out.size - 1] += part else out += part
            "MergedWithPrevious" ->
                if (i > 0 && isMatch && !beforeIsMatch) out[out.size - 1] += part else out += part
            else ->
                if (i > 0 && beforeIsMatch && !isMatch) out[out.size - 1] += part else out += part
        }
    }
    return out
}

/**
 * A regular expression of tokenizers as Java has it. `\s`, `\d` and `\w` are Unicode's there, and
 * on Android, but ASCII's on the JVM; so they are written out.
 */
private fun translated(pattern: String): Regex {
    val out = StringBuilder()
    var inside = false
    var at = 0
    while (at < pattern.length) {
        val character = pattern[at]
        if (character == '\\' && at + 1 < pattern.length) {
            out.append(translatedEscape(pattern[at + 1], inside))
            at += 2
            continue
        }
        if (inside && (character == '[' || pattern.startsWith("&&", at))) {
            throw UnknownPart("the regular expression `$pattern`")
        }
        if (character == '[') inside = true
        if (character == ']') inside = false
        out.append(character)
        at++
    }
    // Without `u`, only ASCII letters are alike in both cases.
    return Regex(out.toString().replace("(?i:", "(?iu:").replace("(?i)", "(?iu)"))
}

private fun translatedEscape(letter: Char, inside: Boolean): String {
    val own =
        when (letter) {
            's' -> WHITE_SPACE
            'd' -> "\\p{Nd}"
            'w' -> "\\p{L}\\p{M}\\p{N}\\p{Pc}"
            'S',
            'D',
            'W' -> {
                if (inside) throw UnknownPart("`\\$letter` in a class of a regular expression")
                return "[^${translatedEscape(letter.lowercaseChar(), true)}]"
            }
            'p',
            'P',
            'n',
            'r',
            't' -> return "\\$letter"
            else -> {
                if (letter.isLetterOrDigit())
                    throw UnknownPart("`\\$letter` in a regular expression")
                return "\\$letter"
            }
        }
    return if (inside) own else "[$own]"
}

/** Unicode's white space, for a class of a regular expression. */
private const val WHITE_SPACE =
    "\\u0009-\\u000d\\u0020\\u0085\\u00a0\\u1680\\u2000-\\u200a\\u2028\\u2029\\u202f\\u205f\\u3000"

/** Whether Unicode has it for white space. */
internal fun isWhiteSpace(character: Char): Boolean =
    when (character) {
        in '\u0009'..'\u000d',
        ' ',
        '\u0085',
        '\u00a0',
        '\u1680',
        in '\u2000'..'\u200a' -> true
        '\u2028',
        '\u2029',
        '\u202f',
        '\u205f',
        '\u3000' -> true
        else -> false
    }

private val BEHAVIORS =
    setOf("Removed", "Isolated", "Contiguous", "MergedWithPrevious", "MergedWithNext")
private const val GPT2 =
    "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+"
