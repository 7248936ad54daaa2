package io.pleexport

import com.google.gson.JsonObject
import com.google.gson.JsonParser
import java.io.File
import org.junit.jupiter.api.Assumptions.assumeTrue

/** What tests/test_kotlin.py writes: the Python library's answers. */
internal object Cases {
    private val folder: File? =
        System.getProperty("pleexport.cases")?.takeIf { it.isNotEmpty() }?.let(::File)

    /** Skips the test where there are none: `mvn test` alone has none. */
    fun of(name: String): File {
        assumeTrue(folder != null, "set pleexport.cases; tests/test_kotlin.py does")
        return File(folder, name).also { check(it.exists()) { "$it is missing" } }
    }

    fun list(file: String): List<JsonObject> =
        JsonParser.parseString(of(file).readText()).asJsonArray.map { it.asJsonObject }
}
