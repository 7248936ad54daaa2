package io.pleexport

import java.util.PriorityQueue

/**
 * Byte-pair encoding: a word's characters, merged in the order in which the pairs were learned.
 *
 * @property vocabulary ids by token.
 * @param merges three ids for each pair: left, right, and what they make; in the order of their
 *   ranks.
 * @property byteFallback characters without a token are spelled in tokens `<0x00>` to `<0xFF>`.
 * @property fuseUnknown several unknown characters make one token.
 * @property ignoreMerges a word that is a token is that token.
 */
internal class Bpe(
    private val vocabulary: Map<String, Int>,
    merges: IntList,
    private val byteFallback: Boolean,
    private val fuseUnknown: Boolean,
    private val ignoreMerges: Boolean,
    private val unknown: Int?,
) {
    private val merged = IntArray(merges.size / 3) { merges[3 * it + 2] }
    private val ranks = Ranks(merged.size)
    private val bytes =
        IntArray(256) { vocabulary["<0x%02X>".format(java.util.Locale.ROOT, it)] ?: -1 }

    init {
        for (rank in merged.indices) ranks.put(pair(merges[3 * rank], merges[3 * rank + 1]), rank)
    }

    /** Appends the ids of a word. */
    fun encode(word: String, out: IntList) {
        if (ignoreMerges)
            vocabulary[word]?.let {
                return out.add(it)
            }
        val symbols = symbols(word)
        Merging(symbols.toIntArray()).run(out)
    }

    private fun symbols(word: String): IntList {
        val symbols = IntList()
        var unknowns = 0
        fun flush() {
            repeat(if (fuseUnknown) minOf(unknowns, 1) else unknowns) { symbols.add(unknown!!) }
            unknowns = 0
        }
        var at = 0
        while (at < word.length) {
            val end = at + Character.charCount(word.codePointAt(at))
            val character = word.substring(at, end)
            val id = vocabulary[character]
            val spelled = if (id == null && byteFallback) spelled(character) else null
            if (id != null) {
                flush()
                symbols.add(id)
            } else if (spelled != null) {
                spelled.forEach(symbols::add)
            } else if (unknown != null) {
                unknowns++
            }
            at = end
        }
        flush()
        return symbols
    }

    private fun spelled(character: String): List<Int>? =
        character.toByteArray().map { bytes[it.toInt() and 0xff] }.takeIf { -1 !in it }

    private class Candidate(val rank: Int, val at: Int)

    /** The symbols of one word, linked so that merging takes no copies. */
    private inner class Merging(private val ids: IntArray) {
        private val next = IntArray(ids.size) { it + 1 }
        private val previous = IntArray(ids.size) { it - 1 }
        private val queue =
            PriorityQueue<Candidate>(
                ids.size + 1,
                Comparator { a, b ->
                    if (a.rank != b.rank) a.rank.compareTo(b.rank) else a.at.compareTo(b.at)
                },
            )

        fun run(out: IntList) {
            for (at in 0 until ids.size - 1) offer(at)
            while (true) {
                val best = queue.poll() ?: break
                val right = next[best.at]
                if (ids[best.at] < 0 || right >= ids.size) continue
                val rank = ranks[pair(ids[best.at], ids[right])]
                if (rank < 0 || merged[rank] != merged[best.rank]) continue // out of date
                ids[best.at] = merged[rank]
                ids[right] = -1
                next[best.at] = next[right]
                if (next[right] < ids.size) previous[next[right]] = best.at
                if (previous[best.at] >= 0) offer(previous[best.at])
                offer(best.at)
            }
            var at = 0
            while (at < ids.size) {
                out.add(ids[at])
                at = next[at]
            }
        }

        private fun offer(at: Int) {
            if (next[at] >= ids.size) return
            val rank = ranks[pair(ids[at], ids[next[at]])]
            if (rank >= 0) queue += Candidate(rank, at)
        }
    }
}

private fun pair(left: Int, right: Int): Long = (left.toLong() shl 32) or right.toLong()

/** A growing list of numbers, which takes 4 bytes for each. */
internal class IntList {
    private var values = IntArray(16)
    var size = 0
        private set

    operator fun get(i: Int): Int = values[i]

    fun add(value: Int) {
        if (size == values.size) values = values.copyOf(2 * size)
        values[size++] = value
    }

    fun toIntArray(): IntArray = values.copyOf(size)
}

/** Ranks of pairs of ids; boxed in a map of the library they would take four times as much. */
private class Ranks(count: Int) {
    private val mask = Integer.highestOneBit(maxOf(8, count)) * 4 - 1
    private val keys = LongArray(mask + 1) { EMPTY }
    private val ranks = IntArray(mask + 1)

    /** Of a pair that comes twice, the last rank counts. */
    fun put(key: Long, rank: Int) {
        val slot = slot(key)
        keys[slot] = key
        ranks[slot] = rank
    }

    /** -1 where there is none. */
    operator fun get(key: Long): Int {
        val slot = slot(key)
        return if (keys[slot] == key) ranks[slot] else -1
    }

    private fun slot(key: Long): Int {
        var slot = (key * SPREAD ushr 32).toInt() and mask
        while (keys[slot] != EMPTY && keys[slot] != key) slot = (slot + 1) and mask
        return slot
    }

    private companion object {
        const val EMPTY = -1L
        const val SPREAD = -7046029254386353131L // 2^64 divided by the golden ratio
    }
}
