package io.pleexport

import com.google.gson.Strictness
import com.google.gson.stream.JsonReader
import com.google.gson.stream.JsonToken
import com.google.gson.stream.MalformedJsonException
import java.io.EOFException
import java.io.StringReader
import java.math.BigInteger
import java.nio.ByteBuffer
import java.nio.charset.CharacterCodingException
import java.nio.charset.CodingErrorAction

/** JSON that is not what its reader expects; those who know the file make an error of it. */
internal class MalformedJson(message: String) : Exception(message)

/**
 * Reads a JSON text strictly: no key twice, nothing behind the value.
 *
 * @return `Map`, `List`, `String`, `Long` (`BigInteger` where that is too small), `Double`,
 *   `Boolean` or null.
 * @throws MalformedJson it is no JSON.
 */
internal fun parseJson(text: String): Any? = malformedAsOne {
    val reader = JsonReader(StringReader(text))
    reader.strictness = Strictness.STRICT
    val value = reader.readValue()
    if (reader.peek() != JsonToken.END_DOCUMENT) throw MalformedJson("extra data behind the value")
    value
}

/** The same of UTF-8 bytes. */
internal fun parseJson(bytes: ByteArray): Any? = parseJson(decodeUtf8(bytes))

/** @throws MalformedJson the bytes are not UTF-8. */
internal fun decodeUtf8(bytes: ByteArray): String =
    try {
        Charsets.UTF_8.newDecoder()
            .onMalformedInput(CodingErrorAction.REPORT)
            .onUnmappableCharacter(CodingErrorAction.REPORT)
            .decode(ByteBuffer.wrap(bytes))
            .toString()
    } catch (err: CharacterCodingException) {
        throw MalformedJson("it is not UTF-8")
    }

/** Runs what reads JSON, and makes one exception of Gson's several. */
internal fun <T> malformedAsOne(read: () -> T): T =
    try {
        read()
    } catch (err: MalformedJsonException) {
        // Gson's own words are for programmers; where it stopped is for all.
        val where = (err.message ?: "").lineSequence().first().substringAfter(" at ", "its end")
        throw MalformedJson("it is no JSON at $where")
    } catch (err: EOFException) {
        throw MalformedJson("it ends too early")
    } catch (err: IllegalStateException) { // Gson: another kind of value than was asked for
        throw MalformedJson(err.message?.lineSequence()?.first() ?: "it is no such JSON")
    } catch (err: NumberFormatException) {
        throw MalformedJson("a number is out of range")
    }

/** The value that a reader stands at. */
internal fun JsonReader.readValue(): Any? =
    when (peek()) {
        JsonToken.BEGIN_OBJECT ->
            LinkedHashMap<String, Any?>().also { map ->
                beginObject()
                while (hasNext()) {
                    val name = nextName()
                    if (map.containsKey(name)) throw MalformedJson("a key appears twice")
                    map[name] = readValue()
                }
                endObject()
            }
        JsonToken.BEGIN_ARRAY ->
            ArrayList<Any?>().also { list ->
                beginArray()
                while (hasNext()) list.add(readValue())
                endArray()
            }
        JsonToken.STRING -> nextString()
        JsonToken.NUMBER ->
            nextString().let { number ->
                if (number.any { it in ".eE" }) number.toDouble()
                else number.toLongOrNull() ?: BigInteger(number)
            }
        JsonToken.BOOLEAN -> nextBoolean()
        JsonToken.NULL -> nextNull().let { null }
        else -> throw MalformedJson("it is no JSON")
    }

/**
 * An object whose fields are read one by one; the words of its errors are those of the Python
 * library's reader.
 *
 * @param path of the object in its text, such as `$.graphs`.
 */
internal class JsonFields(value: Any?, private val path: String = "$") {
    private val map: Map<*, *> = value as? Map<*, *> ?: throw expected("object", value, path)
    private val read = HashSet<String>()

    /** A field that has to be there. */
    fun <T> required(name: String, convert: (Any?, String) -> T): T {
        read += name
        if (!map.containsKey(name)) {
            throw MalformedJson("Object missing required field `$name`" + at(path))
        }
        return convert(map[name], "$path.$name")
    }

    /** A field that may be missing. */
    fun <T> optional(name: String, default: T, convert: (Any?, String) -> T): T =
        if (map.containsKey(name)) required(name, convert) else default

    /** Refuses what nobody has asked for. */
    fun end() {
        val unknown = map.keys.firstOrNull { it !in read } ?: return
        throw MalformedJson("Object contains unknown field `$unknown`" + at(path))
    }
}

/** Reads all fields of an object, and no others. */
internal fun <T> fieldsOf(value: Any?, path: String, read: JsonFields.() -> T): T =
    JsonFields(value, path).let { fields -> fields.read().also { fields.end() } }

internal fun string(value: Any?, path: String): String =
    value as? String ?: throw expected("str", value, path)

internal fun boolean(value: Any?, path: String): Boolean =
    value as? Boolean ?: throw expected("bool", value, path)

internal fun long(value: Any?, path: String): Long =
    value as? Long ?: throw expected("int", value, path)

internal fun int(value: Any?, path: String): Int =
    long(value, path).let { number ->
        if (number.toInt().toLong() != number)
            throw MalformedJson("Integer value out of range" + at(path))
        number.toInt()
    }

/** An integer that counts something. */
internal fun count(value: Any?, path: String): Int =
    int(value, path).also { if (it < 1) throw MalformedJson("Expected `int` >= 1" + at(path)) }

internal fun number(value: Any?, path: String): Double =
    when (value) {
        is Double -> value
        is Long -> value.toDouble()
        is BigInteger -> value.toDouble()
        else -> throw expected("float", value, path)
    }

internal fun <T> list(each: (Any?, String) -> T): (Any?, String) -> List<T> = { value, path ->
    (value as? List<*> ?: throw expected("array", value, path)).map { each(it, "$path[...]") }
}

internal fun <T> map(each: (Any?, String) -> T): (Any?, String) -> Map<String, T> = { value, path ->
    (value as? Map<*, *> ?: throw expected("object", value, path)).entries.associate { (name, held)
        ->
        name as String to each(held, "$path[...]")
    }
}

internal fun <T> orNull(convert: (Any?, String) -> T): (Any?, String) -> T? = { value, path ->
    if (value == null) null else convert(value, path)
}

internal fun oneOf(vararg choices: String): (Any?, String) -> String = { value, path ->
    string(value, path).also {
        if (it !in choices) throw MalformedJson("Invalid enum value '$it'" + at(path))
    }
}

private fun expected(kind: String, value: Any?, path: String): MalformedJson {
    val got =
        when (value) {
            null -> "null"
            is String -> "str"
            is Boolean -> "bool"
            is Long,
            is BigInteger -> "int"
            is Double -> "float"
            is List<*> -> "array"
            else -> "object"
        }
    return MalformedJson("Expected `$kind`, got `$got`" + at(path))
}

private fun at(path: String) = if (path == "$") "" else " - at `$path`"
