package io.pleexport

private const val FIRST_POSITIONS = 256

/**
 * How many slots of each cache a graph is told of; lists are in the contract's order.
 *
 * They double with the text, since a graph may look at all of them. Those of window layers grow up
 * to the size of their ring, which is reached before a position wraps around.
 *
 * @param context largest number of positions.
 * @param chunk most tokens of one call.
 */
internal class Slots(private val caches: List<CacheInput>, context: Int, chunk: Int) {
    // A chunk's first token must still find its window after the whole chunk was written.
    private val ring =
        minOf(
            (caches.mapNotNull { it.window }.maxOrNull() ?: 1).toLong() + chunk - 1,
            context.toLong(),
        )
    private val most = caches.map { if (it.window == null) context.toLong() else ring }
    private var positions = 0L

    /** Of the whole context. */
    val whole: List<Long> = caches.zip(most) { cache, slots -> align(slots, cache.block) }

    /** Room for a text of that many tokens: the slots of each cache, or null if they stay. */
    fun grow(needed: Int): List<Int>? {
        if (needed <= positions) return null
        positions = maxOf(FIRST_POSITIONS.toLong(), 2 * positions, needed.toLong())
        return caches.zip(most) { cache, slots ->
            align(minOf(positions, slots), cache.block).toInt()
        }
    }

    private fun align(count: Long, block: Int) = groups(count, block.toLong()) * block
}
