package io.pleexport

import java.io.File
import java.io.IOException

/**
 * A generated token.
 *
 * @property text the whole characters that it completes, "" while one is incomplete.
 */
data class Token(val id: Int, val text: String)

/** Why a text ended; the names are those of the Python library. */
enum class FinishReason(val label: String) {
    EOS("eos"),
    STOP("stop"),
    LENGTH("length"),
    TIME("time"),
    CONTEXT("context"),
    NO_ROW("no row"),
}

/**
 * What generating took.
 *
 * @property finishReason null while it runs.
 * @property promptTokens tokens that were prefilled; those of an earlier turn are not read again.
 * @property decodeCalls calls of the graph after the prompt; fewer than tokens where drafts come true.
 * @property draftedTokens guesses that were read ahead.
 * @property acceptedTokens guesses that came true.
 * @property firstTokenSeconds from the call to the first token.
 * @property rows rows looked up.
 */
class Stats {
    var finishReason: FinishReason? = null
        internal set

    var promptTokens = 0
        internal set

    var generatedTokens = 0
        internal set

    var decodeCalls = 0
        internal set

    var draftedTokens = 0
        internal set

    var acceptedTokens = 0
        internal set

    var prefillSeconds = 0.0
        internal set

    var decodeSeconds = 0.0
        internal set

    var firstTokenSeconds = 0.0
        internal set

    var rows = 0L
        internal set

    /** Prompt tokens per second. */
    val prefillTokensPerSecond: Double
        get() = if (prefillSeconds > 0) promptTokens / prefillSeconds else 0.0

    /** Tokens per second after the first. */
    val decodeTokensPerSecond: Double
        get() = if (decodeSeconds > 0) (generatedTokens - 1) / decodeSeconds else 0.0

    /** Tokens after the first for each call that gave some. */
    val tokensPerCall: Double
        get() = if (decodeCalls > 0) (generatedTokens - 1.0) / decodeCalls else 0.0

    /** The share of guesses that came true. */
    val acceptance: Double
        get() = if (draftedTokens > 0) acceptedTokens.toDouble() / draftedTokens else 0.0
}

/** Resident memory of this process in bytes: its own, and pages of files, which can be dropped. */
data class ResidentMemory(val anonymous: Long, val fileBacked: Long)

/** Resident memory; null where the system does not tell. */
fun residentMemory(): ResidentMemory? =
    try {
        val lines = File("/proc/self/status").readLines()
        fun bytes(name: String): Long? =
            lines
                .firstOrNull { it.startsWith("$name:") }
                ?.filter(Char::isDigit)
                ?.toLongOrNull()
                ?.times(1024)
        val anonymous = bytes("RssAnon")
        val file = bytes("RssFile")
        if (anonymous == null || file == null) null else ResidentMemory(anonymous, file)
    } catch (err: IOException) {
        null
    }
