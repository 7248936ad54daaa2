package io.pleexport

/**
 * The text of bytes; each part that is no UTF-8 is one U+FFFD, as Python and Rust have it. (Java's
 * own decoder takes half a surrogate pair for one such part, and they take it for three.)
 */
internal fun decodeLossy(bytes: ByteArray): String {
    val text = StringBuilder(bytes.size)
    var at = 0
    while (at < bytes.size) {
        val length = sequenceLength(bytes, at)
        if (length > 0) text.append(String(bytes, at, length, Charsets.UTF_8))
        else text.append('\uFFFD')
        at += Math.abs(length)
    }
    return text.toString()
}

/** How many bytes at the end begin a character and may go on. */
internal fun unfinishedBytes(bytes: ByteArray): Int {
    for (back in 1..minOf(3, bytes.size)) {
        val begin = bytes.size - back
        if (continues(bytes[begin])) continue
        val length = sequenceLength(bytes, begin)
        // All that follows belongs to it, and there is too little.
        return if (length == -back && neededBytes(bytes[begin]) > back) back else 0
    }
    return 0
}

/** Bytes of the character that begins here; where none does, minus those of the part to replace. */
private fun sequenceLength(bytes: ByteArray, at: Int): Int {
    val first = bytes[at].toInt() and 0xff
    val needed = neededBytes(bytes[at])
    if (needed <= 1) return if (first < 0x80) 1 else -1
    for (i in 1 until needed) {
        val next = bytes.getOrNull(at + i)?.toInt()?.and(0xff) ?: return -i
        val least =
            if (i > 1) 0x80 else if (first == 0xE0) 0xA0 else if (first == 0xF0) 0x90 else 0x80
        val most =
            if (i > 1) 0xBF else if (first == 0xED) 0x9F else if (first == 0xF4) 0x8F else 0xBF
        if (next !in least..most) return -i
    }
    return needed
}

private fun neededBytes(first: Byte): Int =
    when (first.toInt() and 0xff) {
        in 0xC2..0xDF -> 2
        in 0xE0..0xEF -> 3
        in 0xF0..0xF4 -> 4
        else -> 1
    }

private fun continues(byte: Byte) = byte.toInt() and 0xC0 == 0x80
