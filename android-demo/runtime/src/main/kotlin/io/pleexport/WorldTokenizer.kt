package io.pleexport

import java.io.ByteArrayOutputStream
import java.io.File
import java.io.IOException

internal const val VOCABULARY = "rwkv_vocab_v20230424.txt"

/**
 * The World tokenizer of RWKV: the longest known piece of bytes at each place.
 *
 * Its vocabulary is a text file with a line for each token: an id, a Python literal of a string or
 * of bytes, and the number of its bytes. Id 0, which has no line, ends a text.
 *
 * @throws TokenizerError the vocabulary is malformed.
 */
internal class WorldTokenizer(private val file: File) : Tokenizer {
    private val pieces = HashMap<Int, ByteArray>()

    /** By bytes, a character each. */
    private val ids = HashMap<String, Int>()

    /** By first byte, the lengths of the pieces that begin with it, longest first. */
    private val lengths: Map<Char, List<Int>>

    init {
        try {
            for (line in decodeUtf8(file.readBytes()).split("\n")) readLine(line)
        } catch (err: IOException) {
            throw malformed(reason(err))
        } catch (err: MalformedJson) {
            throw malformed(err.message)
        }
        lengths =
            ids.keys.groupBy({ it[0] }, { it.length }).mapValues { (_, own) ->
                own.distinct().sortedDescending()
            }
        val missing = (0..255).firstOrNull { it.toChar().toString() !in ids }
        if (missing != null) {
            throw TokenizerError(
                "`$file` has no token for byte $missing, so some text has no ids",
                AS_PUBLISHED,
            )
        }
    }

    override val size: Int
        get() = pieces.keys.max() + 1

    override fun encode(text: String, addSpecialTokens: Boolean): IntArray {
        checkUnicode(text)
        val bytes = String(text.toByteArray(), Charsets.ISO_8859_1)
        val found = ArrayList<Int>()
        var at = 0
        while (at < bytes.length) {
            val length =
                lengths.getValue(bytes[at]).first {
                    at + it <= bytes.length && bytes.substring(at, at + it) in ids
                }
            found += ids.getValue(bytes.substring(at, at + length))
            at += length
        }
        return found.toIntArray()
    }

    override fun decode(ids: IntArray, withSpecials: Boolean): String {
        val bytes = ByteArrayOutputStream()
        for (id in ids) pieces[id]?.let { bytes.write(it, 0, it.size) }
        return decodeLossy(bytes.toByteArray())
    }

    override fun stream(promptIds: IntArray): TextStream =
        object : TextStream {
            private var held = ByteArray(0)

            override fun push(id: Int): String {
                held += pieces[id] ?: return ""
                val whole = held.size - unfinishedBytes(held)
                val text = decodeLossy(held.copyOf(whole))
                held = held.copyOfRange(whole, held.size)
                return text
            }

            override fun flush(): String = decodeLossy(held).also { held = ByteArray(0) }
        }

    override fun specialText(id: Int) = ""

    override val thoughtMarkers: List<Pair<String, String>> = emptyList()

    private fun readLine(line: String) {
        val first = line.indexOf(' ')
        val last = line.lastIndexOf(' ')
        if (first < 0) {
            if (line.isBlank()) return
            throw MalformedJson("`$line` is no token")
        }
        val id = line.substring(0, first).toIntOrNull()
        val size = line.substring(last + 1).trim().toIntOrNull()
        val piece =
            if (last > first) pythonLiteral(line.substring(first + 1, last).trim()) else null
        if (id == null || id < 0 || piece == null || piece.isEmpty() || piece.size != size) {
            throw MalformedJson(
                "token ${line.substring(0, first)} is not ${line.substring(last + 1)} bytes"
            )
        }
        pieces[id] = piece
        ids[String(piece, Charsets.ISO_8859_1)] = id
    }

    private fun malformed(why: String?) =
        TokenizerError("`$file` is not a vocabulary of RWKV's World tokenizer: $why", AS_PUBLISHED)
}

/** The bytes of a Python literal of a string (in UTF-8) or of bytes; null where it is none. */
private fun pythonLiteral(literal: String): ByteArray? {
    val isBytes = literal.startsWith("b")
    val text = if (isBytes) literal.substring(1) else literal
    if (text.length < 2 || text[0] !in "'\"" || text.last() != text[0]) return null
    val found = StringBuilder()
    var at = 1
    while (at < text.length - 1) {
        val character = text[at++]
        if (character != '\\') {
            if (character == text[0]) return null
            found.append(character)
            continue
        }
        val escaped = text[at++]
        val digits =
            when (escaped) {
                'x' -> 2
                'u' -> 4
                'U' -> 8
                else -> 0
            }
        if (digits == 0) {
            found.append(ESCAPES[escaped] ?: return null)
        } else {
            if (at + digits > text.length - 1) return null
            val code = text.substring(at, at + digits).toIntOrNull(16) ?: return null
            if (!Character.isValidCodePoint(code)) return null
            found.appendCodePoint(code)
            at += digits
        }
    }
    return found.toString().toByteArray(if (isBytes) Charsets.ISO_8859_1 else Charsets.UTF_8)
}

private val ESCAPES =
    mapOf(
        'n' to '\n',
        'r' to '\r',
        't' to '\t',
        '\\' to '\\',
        '\'' to '\'',
        '"' to '"',
        '0' to '\u0000',
        'a' to '\u0007',
        'b' to '\b',
        'f' to '\u000c',
        'v' to '\u000b',
    )
