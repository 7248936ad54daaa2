package io.pleexport

import com.google.gson.GsonBuilder
import java.util.Random
import kotlinx.coroutines.runBlocking

/** Medians over the repetitions of one prompt length; seconds and tokens per second. */
internal class Timing(
    val promptTokens: Int,
    val decodeTokens: Int,
    val prefillTokensPerSecond: Double,
    val decodeTokensPerSecond: Double,
    val firstTokenSeconds: Double,
    val slowestFirstTokenSeconds: Double,
)

/** What was measured; memory in bytes at the end, null where the system does not tell. */
internal class BenchResult(
    val loadSeconds: Double,
    val loadToFirstTokenSeconds: Double,
    val repeat: Int,
    val timings: List<Timing>,
    val memory: ResidentMemory?,
) {
    /** The names are those of `pleexport bench --json`. */
    fun json(): String =
        GsonBuilder()
            .setPrettyPrinting()
            .serializeNulls()
            .create()
            .toJson(
                linkedMapOf(
                    "load_seconds" to loadSeconds,
                    "load_to_first_token_seconds" to loadToFirstTokenSeconds,
                    "repeat" to repeat,
                    "timings" to
                        timings.map {
                            linkedMapOf(
                                "prompt_tokens" to it.promptTokens,
                                "decode_tokens" to it.decodeTokens,
                                "prefill_tokens_per_second" to it.prefillTokensPerSecond,
                                "decode_tokens_per_second" to it.decodeTokensPerSecond,
                                "first_token_seconds" to it.firstTokenSeconds,
                                "slowest_first_token_seconds" to it.slowestFirstTokenSeconds,
                            )
                        },
                    "anonymous_bytes" to memory?.anonymous,
                    "file_backed_bytes" to memory?.fileBacked,
                )
            )

    fun describe(): String =
        timings.joinToString("\n") {
            "prompt %d: prefill %.0f tokens/s, decode %.1f tokens/s, first token after %.3f s"
                .format(
                    it.promptTokens,
                    it.prefillTokensPerSecond,
                    it.decodeTokensPerSecond,
                    it.firstTokenSeconds,
                )
        }
}

/**
 * Times a bundle on random token ids. The first run of each length warms up and is not counted.
 *
 * @throws InputError a prompt that does not fit, or a number below 1.
 */
internal fun bench(
    open: () -> Runner,
    promptTokens: List<Int>,
    decodeTokens: Int,
    repeat: Int,
): BenchResult {
    val counts =
        listOf("decode tokens" to decodeTokens, "repeat" to repeat) +
            promptTokens.map { "prompt tokens" to it }
    for ((name, value) in counts) {
        if (value < 1)
            throw InputError(
                "$name is $value; it must be 1 or more",
                "leave it out for the default",
            )
    }
    val started = System.nanoTime()
    open().use { runner ->
        val loaded = secondsSince(started)
        val longest = promptTokens.max() + decodeTokens
        if (longest > runner.context) {
            throw InputError(
                "$longest tokens of prompt and decoding exceed the bundle's context of ${runner.context}",
                "choose shorter prompts, or build with a larger `--context`",
            )
        }
        runOnce(runner, promptTokens[0], 1, Random(0))
        val first = secondsSince(started)
        val timings = promptTokens.map { time(runner, it, decodeTokens, repeat) }
        return BenchResult(loaded, first, repeat, timings, residentMemory())
    }
}

private fun time(runner: Runner, count: Int, decodeTokens: Int, repeat: Int): Timing {
    val random = Random(count.toLong())
    val runs = (0..repeat).map { runOnce(runner, count, decodeTokens, random) }.drop(1)
    return Timing(
        promptTokens = count,
        decodeTokens = decodeTokens,
        prefillTokensPerSecond = median(runs.map { it.prefillTokensPerSecond }),
        decodeTokensPerSecond = median(runs.map { it.decodeTokensPerSecond }),
        firstTokenSeconds = median(runs.map { it.firstTokenSeconds }),
        slowestFirstTokenSeconds = runs.maxOf { it.firstTokenSeconds },
    )
}

private fun runOnce(runner: Runner, count: Int, decodeTokens: Int, random: Random): Stats {
    val ids = IntArray(count) { random.nextInt(runner.numRows.toInt()) }
    val options =
        GenerationOptions(
            GenerationConfig(maxNewTokens = decodeTokens),
            greedy = true,
            ignoreEos = true,
        )
    runner.reset()
    runBlocking { runner.generate(ids, options).collect {} }
    return runner.stats
}

private fun median(values: List<Double>): Double =
    values.sorted().let { (it[(it.size - 1) / 2] + it[it.size / 2]) / 2 }

private fun secondsSince(start: Long) = (System.nanoTime() - start) / 1e9
