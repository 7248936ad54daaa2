package io.pleexport

import com.google.gson.Gson
import com.google.gson.JsonObject
import com.google.gson.JsonParser
import java.io.File
import java.nio.ByteBuffer
import java.nio.ByteOrder
import org.junit.jupiter.api.Assertions.assertThrows

/** What the specification comes with; the Python library holds itself to the same files. */
internal val VECTORS = File("../../tests/vectors")

internal fun readObject(file: File): JsonObject =
    JsonParser.parseString(file.readText()).asJsonObject

/** Runs what has to fail, and gives its words. */
internal inline fun <reified E : PleexportError> refusal(crossinline body: () -> Unit): String =
    assertThrows(E::class.java) { body() }.message

/** Changes what a header says, and makes its checksum right again; all data stays where it is. */
internal fun changeHeader(file: File, change: (JsonObject) -> Unit) {
    val raw = file.readBytes()
    val length = littleEndian(raw).getLong(0).toInt()
    val header = JsonParser.parseString(String(raw, 8, length)).asJsonObject
    change(header)
    val text = Gson().toJson(header).toByteArray()
    check(text.size <= length)
    text.copyInto(raw, 8)
    raw.fill(' '.code.toByte(), 8 + text.size, 8 + length)
    littleEndian(raw).putLong(8 + length, Xxh3.hash(raw, 0, 8 + length))
    file.writeBytes(raw)
}

/** Changes JSON text that is the value of a metadata key. */
internal fun JsonObject.changeMetadata(name: String, change: (String) -> String) {
    val metadata = getAsJsonObject("__metadata__")
    metadata.addProperty(name, change(metadata[name].asString))
}

internal fun longBytes(value: Long): ByteArray =
    ByteBuffer.allocate(8).order(ByteOrder.LITTLE_ENDIAN).putLong(value).array()
