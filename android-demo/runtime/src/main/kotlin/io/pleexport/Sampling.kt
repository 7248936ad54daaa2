package io.pleexport

import java.util.PriorityQueue
import java.util.Random
import java.util.SplittableRandom
import kotlin.math.exp
import kotlin.math.ln
import kotlin.math.sqrt

/** Source: transformers, `TopHLogitsWarper`. */
private const val TOP_H_TOKENS = 100

/**
 * How to choose tokens; the default is greedy. What is cut off is so in this order; the fields of
 * docs/bundle-format.md (GenerationConfig) say what each keeps.
 *
 * Distributions are those of the Python library. Random numbers are not: a seed repeats a text in
 * this library only.
 */
data class Sampling(
    val temperature: Double = 0.0,
    val topH: Double? = null,
    val topK: Int = 0,
    val topP: Double = 1.0,
    val minP: Double = 0.0,
    val typicalP: Double = 1.0,
    val epsilonCutoff: Double = 0.0,
    val etaCutoff: Double = 0.0,
) {
    /**
     * The next token's id.
     *
     * @param scores logits; minus infinity is a token that may not come.
     * @throws InputError no token may come.
     */
    fun choose(scores: FloatArray, random: Random): Int {
        var best = 0
        for (id in scores.indices) if (scores[id] > scores[best]) best = id
        if (scores[best].isInfinite() || scores[best].isNaN()) {
            throw InputError(
                "the generation options leave no token that may come next",
                "suppress or forbid fewer tokens, or generate greedily",
            )
        }
        if (temperature == 0.0) return best
        val (ids, probabilities) = distribution(scores)
        // Every token waits for a time of its own, the likely ones less, and the first to come is
        // chosen. The time follows from the id and one number a step, wherever the token stands:
        // logits that differ by little, as those of a token alone and of one among many do, so give
        // the same token.
        val step = random.nextLong()
        val waits =
            DoubleArray(ids.size) {
                -ln(1 - SplittableRandom(step + ids[it]).nextDouble()) / probabilities[it]
            }
        return ids[waits.indices.minByOrNull { waits[it] }!!]
    }

    /** The ids that may be chosen, likeliest first, and their probabilities. */
    fun distribution(scores: FloatArray): Pair<IntArray, DoubleArray> {
        var ids = likeliest(scores, if (topH != null) TOP_H_TOKENS else topK)
        if (topH != null) ids = ids.copyOf(minOf(ids.size, TOP_H_TOKENS))
        var scaled =
            DoubleArray(ids.size) { (scores[ids[it]].toDouble() - scores[ids[0]]) / temperature }
        // All but the last three keep a beginning of what is sorted.
        if (topH != null) {
            scaled = scaled.copyOf(maxOf(1, countTopH(softmax(scaled), topH)))
            if (topK > 0) {
                val least = scaled[minOf(topK, scaled.size) - 1]
                scaled = scaled.copyOf(scaled.count { it >= least })
            }
        }
        val probabilities = softmax(scaled)
        var sum = 0.0
        val kept =
            probabilities.indices.count { i ->
                // What lies before, as NumPy computes it: the sum with it, less itself.
                sum += probabilities[i]
                sum - probabilities[i] < topP && probabilities[i] >= minP * probabilities[0]
            }
        scaled = scaled.copyOf(maxOf(1, kept))
        ids = ids.copyOf(scaled.size)
        for (keeps in listOf(::typical, ::aboveEpsilon, ::aboveEta)) {
            val isKept = keeps(softmax(scaled))
            ids = ids.filterIndexed { i, _ -> isKept[i] }.toIntArray()
            scaled = scaled.filterIndexed { i, _ -> isKept[i] }.toDoubleArray()
        }
        return ids to softmax(scaled)
    }

    private fun countTopH(probabilities: DoubleArray, share: Double): Int {
        val entropies = probabilities.map { -it * ln(maxOf(it, TINY)) }
        val whole = entropies.sum()
        var sum = 0.0
        return entropies.count {
            sum += it
            sum <= share * whole
        }
    }

    private fun typical(probabilities: DoubleArray): BooleanArray {
        if (typicalP >= 1) return BooleanArray(probabilities.size) { true }
        val information = DoubleArray(probabilities.size) { -ln(maxOf(probabilities[it], TINY)) }
        val expected = probabilities.indices.sumOf { probabilities[it] * information[it] }
        val distance = DoubleArray(probabilities.size) { Math.abs(information[it] - expected) }
        val order = distance.indices.sortedBy { distance[it] }
        var sum = 0.0
        val reached =
            order.count {
                sum += probabilities[it]
                sum < typicalP
            }
        val most = distance[order[minOf(reached, order.size - 1)]]
        return BooleanArray(distance.size) { distance[it] <= most }
    }

    private fun aboveEpsilon(probabilities: DoubleArray) = atLeast(probabilities, epsilonCutoff)

    private fun aboveEta(probabilities: DoubleArray): BooleanArray {
        if (etaCutoff == 0.0) return BooleanArray(probabilities.size) { true }
        val entropy = -probabilities.sumOf { it * ln(maxOf(it, TINY)) }
        return atLeast(probabilities, minOf(etaCutoff, sqrt(etaCutoff) * exp(-entropy)))
    }

    /** Which are that likely; the likeliest always is. */
    private fun atLeast(probabilities: DoubleArray, least: Double): BooleanArray {
        val enough = minOf(least, probabilities.max())
        return BooleanArray(probabilities.size) { probabilities[it] >= enough }
    }

    /**
     * Ids that may come, best first: at least `count`, with what is as good as the last; 0: all.
     */
    private fun likeliest(scores: FloatArray, count: Int): IntArray {
        var least = -Float.MAX_VALUE
        if (count in 1 until scores.size) least = maxOf(least, largest(scores, count))
        // Sorted as numbers of 64 bits: the score, reversed, and below it the id.
        val keys = LongArray(scores.count { it >= least })
        var filled = 0
        for (id in scores.indices) if (scores[id] >= least) {
            keys[filled++] = (descending(scores[id]).toLong() shl 32) or id.toLong()
        }
        keys.sort()
        return IntArray(keys.size) { keys[it].toInt() }
    }

    /** The `count`-th largest, without sorting the others. */
    private fun largest(scores: FloatArray, count: Int): Float {
        val kept = PriorityQueue<Float>(count)
        var least = Float.NEGATIVE_INFINITY
        for (score in scores) {
            if (kept.size == count) {
                if (score <= least) continue
                kept.poll()
            }
            kept.add(score)
            least = kept.peek()
        }
        return least
    }

    /** Numbers that order as floats do, the largest first; 0 and -0 are equal. */
    private fun descending(score: Float): Int {
        val bits = (score + 0f).toRawBits()
        return if (bits < 0) bits and Int.MAX_VALUE else bits.inv()
    }

    private fun softmax(scores: DoubleArray): DoubleArray {
        val most = scores.max()
        val exponentials = DoubleArray(scores.size) { exp(scores[it] - most) }
        val sum = exponentials.sum()
        return DoubleArray(scores.size) { exponentials[it] / sum }
    }

    companion object {
        private const val TINY = 1e-300

        /** What a config asks for. */
        fun of(config: GenerationConfig): Sampling {
            if (config.doSample != true) return Sampling()
            return Sampling(
                temperature = config.temperature ?: 1.0,
                topH = config.topH,
                topK = config.topK ?: 0,
                topP = config.topP ?: 1.0,
                minP = config.minP ?: 0.0,
                typicalP = config.typicalP ?: 1.0,
                epsilonCutoff = config.epsilonCutoff ?: 0.0,
                etaCutoff = config.etaCutoff ?: 0.0,
            )
        }
    }
}
