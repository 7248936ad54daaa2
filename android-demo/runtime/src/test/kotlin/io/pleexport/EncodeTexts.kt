package io.pleexport

import java.io.File

/**
 * Reads a tokenizer.json and texts, a JSON string a line, and prints for each its ids, a semicolon,
 * and the text of these as a JSON string; tests/test_kotlin.py compares that, in a small heap.
 */
object EncodeTexts {
    @JvmStatic
    fun main(arguments: Array<String>) {
        val tokenizer = JsonTokenizer(File(arguments[0]), emptyMap<Any, Any>())
        val out = System.out.bufferedWriter()
        File(arguments[1]).forEachLine { line ->
            val ids = tokenizer.encode(parseJson(line.toByteArray()) as String)
            out.write(ids.joinToString(",") + ";" + com.google.gson.Gson().toJson(tokenizer.decode(ids)))
            out.newLine()
        }
        out.flush()
    }
}
