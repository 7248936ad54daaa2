package io.pleexport.chat

import com.google.gson.JsonObject
import com.google.gson.JsonParseException
import com.google.gson.JsonParser
import io.pleexport.GenerationConfig
import io.pleexport.GenerationOptions
import java.io.File
import java.io.IOException

/**
 * What a person sets.
 *
 * @property temperature 0 for the likeliest word each time; null for what the model's maker says.
 * @property maxNewTokens how long an answer may be.
 * @property threads of the runtime; 0 for one a core.
 * @property bundle the last one, which is opened at the next start.
 */
data class Settings(
    val temperature: Double? = null,
    val maxNewTokens: Int = 256,
    val threads: Int = minOf(MOST_DEFAULT_THREADS, Runtime.getRuntime().availableProcessors()),
    val bundle: String? = null,
) {
    internal fun options() =
        GenerationOptions(GenerationConfig(temperature = temperature, maxNewTokens = maxNewTokens))

    internal fun write(file: File) {
        val json = JsonObject()
        json.addProperty("temperature", temperature)
        json.addProperty("max_new_tokens", maxNewTokens)
        json.addProperty("threads", threads)
        json.addProperty("bundle", bundle)
        writeWhole(file, json.toString())
    }

    companion object {
        const val MOST_TEMPERATURE = 2.0
        const val MOST_NEW_TOKENS = 2048

        /** More seldom help: the cores of phones are of two or three kinds, and few are fast. */
        private const val MOST_DEFAULT_THREADS = 4
        private const val MOST_THREADS = 64

        /** Settings of before; the defaults where there are none, or none that can be read. */
        internal fun read(file: File): Settings {
            val json = readObject(file) ?: return Settings()
            val default = Settings()
            fun number(name: String) = runCatching { json[name].asDouble }.getOrNull()
            return Settings(
                temperature = number("temperature")?.takeIf { it in 0.0..MOST_TEMPERATURE },
                maxNewTokens =
                    number("max_new_tokens")?.toInt()?.takeIf { it in 1..MOST_NEW_TOKENS }
                        ?: default.maxNewTokens,
                threads =
                    number("threads")?.toInt()?.takeIf { it in 0..MOST_THREADS } ?: default.threads,
                bundle = runCatching { json["bundle"].asString }.getOrNull(),
            )
        }
    }
}

/** A file of the app's own; null where there is none, or it was damaged. */
internal fun readObject(file: File): JsonObject? =
    try {
        JsonParser.parseString(file.readText()) as? JsonObject
    } catch (err: IOException) {
        null
    } catch (err: JsonParseException) {
        null
    }

/** Writes a file that is never half there. What cannot be written is not kept, and nothing fails. */
internal fun writeWhole(file: File, text: String) {
    val staged = File(file.path + ".partial")
    try {
        file.parentFile?.mkdirs()
        staged.writeText(text)
        staged.renameTo(file)
    } catch (err: IOException) {
        staged.delete()
    }
}
