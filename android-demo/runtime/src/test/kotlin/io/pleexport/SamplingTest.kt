package io.pleexport

import com.google.gson.JsonObject
import java.util.Random
import org.junit.jupiter.api.Assertions.assertArrayEquals
import org.junit.jupiter.api.Assertions.assertEquals
import org.junit.jupiter.api.Assertions.assertTrue
import org.junit.jupiter.api.Test

class SamplingTest {
    private fun config(case: JsonObject): GenerationConfig =
        generationConfig(parseJson(case["config"].toString()), "$")

    private fun ids(case: JsonObject, name: String) =
        case.getAsJsonArray(name).map { it.asInt }.toIntArray()

    @Test
    fun `distributions are those of the Python library`() {
        for (case in Cases.list("sampling.json")) {
            val config = config(case)
            val (ids, probabilities) = Sampling.of(config).distribution(floats(case["scores"]))
            assertArrayEquals(ids(case, "ids"), ids, "$config")
            val expected = case.getAsJsonArray("probabilities").map { it.asDouble }.toDoubleArray()
            assertArrayEquals(expected, probabilities, 1e-12, "$config")
        }
    }

    @Test
    fun `rules change logits as in the Python library`() {
        for (case in Cases.list("rules.json")) {
            val scores = floats(case["scores"])
            val rules =
                LogitRules(
                    config(case),
                    ids(case, "prompt_ids"),
                    ids(case, "eos").toSet(),
                    case["max_length"].asInt,
                )
            rules.apply(scores, ids(case, "ids"))
            // JSON has no infinity: null is minus infinity.
            val expected =
                case
                    .getAsJsonArray("expected")
                    .map { if (it.isJsonNull) Float.NEGATIVE_INFINITY else it.asFloat }
                    .toFloatArray()
            assertArrayEquals(expected, scores, 1e-6f, case["config"].toString())
        }
    }

    @Test
    fun `greedy takes the first of the likeliest`() {
        assertEquals(1, Sampling().choose(floatArrayOf(0f, 3f, 3f), Random(0)))
    }

    @Test
    fun `chosen as often as likely`() {
        val random = Random(7)
        val counts = IntArray(3)
        val scores = floatArrayOf(0f, Math.log(3.0).toFloat(), Float.NEGATIVE_INFINITY)
        repeat(4000) { counts[Sampling(temperature = 1.0).choose(scores, random)]++ }
        assertEquals(3000.0, counts[1].toDouble(), 100.0)
        assertEquals(0, counts[2])
    }

    @Test
    fun `tokens that change places in the order are chosen all the same`() {
        val scores = FloatArray(200) { (it * 37 % 200) / 100f }
        val near = FloatArray(200) { scores[it] + if (it % 2 == 0) 6e-3f else -6e-3f }
        val sampling = Sampling(temperature = 1.0)
        assertTrue(!sampling.distribution(scores).first.contentEquals(sampling.distribution(near).first))
        val same =
            (0L until 300).count { seed ->
                sampling.choose(scores, Random(seed)) == sampling.choose(near, Random(seed))
            }
        assertTrue(same > 290, "$same of 300")
    }

    @Test
    fun `the likeliest are those of a full sort`() {
        val random = Random(3)
        val scores = FloatArray(5000) { Math.round(random.nextGaussian() * 40) / 16f }
        scores[7] = Float.NEGATIVE_INFINITY
        scores[8] = -0f
        val sorted = scores.indices.filter { it != 7 }.sortedByDescending { scores[it] + 0f }
        for (count in listOf(0, 1, 2, 64, 4000)) {
            val least = if (count == 0) -1e9f else scores[sorted[count - 1]]
            val (ids, _) = Sampling(temperature = 1.0, topK = count).distribution(scores)
            assertEquals(sorted.filter { scores[it] >= least }, ids.toList())
        }
    }

    @Test
    fun `nothing that may come is an error`() {
        val words =
            refusal<InputError> {
                Sampling().choose(FloatArray(4) { Float.NEGATIVE_INFINITY }, Random(0))
            }
        assertEquals("the generation options leave no token that may come next", words)
    }

    @Test
    fun `impossible values are named`() {
        assertEquals("top_k is -1; it must be 0 or more", GenerationConfig(topK = -1).outOfRange())
        assertEquals(
            "top_p is NaN; it must be from 0 to 1",
            GenerationConfig(topP = Double.NaN).outOfRange(),
        )
        assertEquals(null, GenerationConfig(topK = 5, topP = 0.5, temperature = 1.0).outOfRange())
    }

    @Test
    fun `a temperature says whether to sample`() {
        val defaults = GenerationConfig(doSample = true, topK = 64, maxLength = 100)
        assertEquals(false, defaults.overridden(GenerationConfig(temperature = 0.0)).doSample)
        val longer = defaults.overridden(GenerationConfig(maxNewTokens = 5))
        assertEquals(null, longer.maxLength)
        assertTrue(longer.doSample == true && longer.topK == 64)
    }

    @Test
    fun `stop strings are held back and never shown`() {
        val stops = StopStrings(listOf("END", "."))
        assertEquals("a ", stops.push("a E"))
        assertEquals("Ex", stops.push("x"))
        assertEquals("", stops.push("EN"))
        assertEquals("", stops.push("D and more"))
        assertTrue(stops.hit)
        val others = StopStrings(listOf("END"))
        assertEquals("a", others.push("aEN"))
        assertEquals("EN", others.flush())
    }
}
