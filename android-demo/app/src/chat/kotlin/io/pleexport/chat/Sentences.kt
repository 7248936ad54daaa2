package io.pleexport.chat

import io.pleexport.Delivery
import io.pleexport.DeliveryError
import io.pleexport.FinishReason
import io.pleexport.InputError
import io.pleexport.PleexportError
import io.pleexport.ResidentMemory
import io.pleexport.Stats
import java.io.File
import java.util.Locale

private const val SMALLER = "Close other apps, or choose a smaller bundle."

/** What a person is told of a failure; paths are shown from `folder` on. */
internal fun sentenceOf(err: Throwable, device: Device, folder: File): Sentence {
    val causes = generateSequence(err) { it.cause }.take(8).toList()
    val message = presented((err.message ?: "$err").replace("${folder.path}/", ""))
    return when {
        causes.any { it is OutOfMemoryError } || "bad_alloc" in message ->
            Sentence("There is too little memory for this bundle.", SMALLER)
        causes.any { it is LinkageError } ->
            Sentence(
                "This app has no code for the processor of this device " +
                    "(${device.abis.joinToString()}).",
                "It is built for arm64-v8a: see android-demo/README.md for others.",
            )
        err is InputError && "exceed the bundle's context" in message ->
            Sentence("The conversation is longer than the bundle takes.", "Begin a new one.")
        err is InputError -> Sentence(message, presented(err.hint))
        err is DeliveryError -> Sentence(message, presented(err.hint))
        err is PleexportError -> Sentence(message, "Remove the bundle, and bring it again.")
        else -> Sentence("Something failed: $message", "Start the app again.")
    }
}

internal fun tooLarge(name: String, needed: Long, free: Long) =
    Sentence(
        "`$name` needs about ${megabytes(needed)} of memory, and ${megabytes(free)} are free.",
        SMALLER,
    )

internal fun endedWhileOpening(name: String) =
    Sentence(
        "The app was ended while it opened `$name`; the device may have too little memory.",
        SMALLER,
    )

internal fun progress(delivery: Delivery, isDownload: Boolean): Screen.Bringing {
    val whole = maxOf(delivery.ofBytes, 1)
    val verb =
        when {
            delivery.checking -> "checking"
            isDownload -> "downloading"
            else -> "unpacking"
        }
    val parts = "${megabytes(delivery.bytes)} of ${megabytes(delivery.ofBytes)}"
    return Screen.Bringing(
        "$verb `${delivery.bundle}`: $parts".replaceFirstChar(Char::uppercaseChar),
        (1000 * (delivery.bytes.toDouble() / whole)).toInt().coerceIn(0, 1000),
        isDownload,
    )
}

/** Speed, and memory in its two parts: what is the app's own, and files that can be dropped. */
internal fun status(stats: Stats, memory: ResidentMemory?): String {
    val speed = "%.1f tokens/s".format(Locale.ROOT, stats.decodeTokensPerSecond)
    val parts =
        memory?.let {
            "${megabytes(it.anonymous)} own memory + ${megabytes(it.fileBacked)} of mapped files"
        }
    val end = if (stats.finishReason == FinishReason.LENGTH) "cut at the set length" else null
    return listOfNotNull(speed, parts, end).joinToString(" · ")
}

internal fun fullConversation() =
    Sentence("The conversation fills what the bundle takes.", "Begin a new one.")

internal fun megabytes(bytes: Long) = "${(bytes + 500_000) / 1_000_000} MB"

private fun presented(text: String): String {
    val ended = if (text.last() in ".!?") text else "$text."
    return ended.replaceFirstChar(Char::uppercaseChar)
}
