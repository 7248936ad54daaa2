package io.pleexport

import java.security.GeneralSecurityException
import java.security.KeyFactory
import java.security.PublicKey
import java.security.Signature
import java.security.interfaces.ECPublicKey
import java.security.spec.X509EncodedKeySpec
import java.util.Base64

private const val CURVE_BITS = 256
private const val SERVE_AGAIN = "write the package again with `pleexport package`, and serve that"

/** A file of a package: where it lies below the index, and what it is in the bundle. */
internal class PackagedFile(
    val path: String,
    val name: String,
    val bytes: Long,
    val sha256: String,
)

/** `index.json` of a package: docs/packaging.md. */
internal class PackageIndex(val bundle: String, val bytes: Long, val files: List<PackagedFile>)

/**
 * Reads an index; it is not trusted.
 *
 * @param source what it was read from.
 * @throws DeliveryError it is none, or breaks a rule of docs/packaging.md.
 */
internal fun readIndex(raw: ByteArray, source: String): PackageIndex {
    try {
        val index =
            fieldsOf(parseJson(raw), "$") {
                required("format", oneOf("pleexport-package"))
                val version = required("version", ::long)
                if (version != 1L)
                    throw MalformedJson("it has version $version; this version reads 1")
                required("target", ::string)
                PackageIndex(
                    bundle = required("bundle", ::plainName),
                    bytes = required("bytes", ::size),
                    files = required("files", list(::packagedFile)),
                )
            }
        contradiction(index)?.let { throw MalformedJson(it) }
        return index
    } catch (err: MalformedJson) {
        throw DeliveryError("`$source` is no index of a package: ${err.message}", SERVE_AGAIN, err)
    }
}

/**
 * Compares an index with its signature.
 *
 * @throws CheckFailed it is not what the key's owner signed.
 */
internal fun checkSignature(raw: ByteArray, signature: ByteArray, key: PublicKey, source: String) {
    val right =
        try {
            Signature.getInstance("SHA256withECDSA").run {
                initVerify(key)
                update(raw)
                verify(signature)
            }
        } catch (err: GeneralSecurityException) { // no signature at all
            false
        }
    if (!right) {
        throw CheckFailed(
            "`$source` is not signed with the key that this app trusts",
            "somebody else may have written it; do not use what it names",
        )
    }
}

/**
 * The public key that indexes are signed with, of the text of a PEM file.
 *
 * @throws InputError it is no public key of the curve P-256.
 */
fun publicKey(pem: String): PublicKey {
    val body = pem.lineSequence().filter { !it.startsWith("-----") }.joinToString("") { it.trim() }
    val key =
        try {
            KeyFactory.getInstance("EC")
                .generatePublic(X509EncodedKeySpec(Base64.getDecoder().decode(body)))
        } catch (err: GeneralSecurityException) {
            null
        } catch (err: IllegalArgumentException) { // no base64
            null
        }
    if ((key as? ECPublicKey)?.params?.curve?.field?.fieldSize != CURVE_BITS) {
        throw InputError(
            "this is no public key of the curve P-256",
            "`openssl ec -in key.pem -pubout` writes the public key of a private one",
        )
    }
    return key
}

private fun packagedFile(value: Any?, path: String) =
    fieldsOf(value, path) {
        PackagedFile(
                path = required("path", ::relativePath),
                name = required("name", ::plainName),
                bytes = required("bytes", ::size),
                sha256 = required("sha256", ::sha256),
            )
            .also { required("pack", ::string) }
    }

private fun contradiction(index: PackageIndex): String? {
    val names = index.files.map { it.name }
    val twice = names.groupBy { it }.values.firstOrNull { it.size > 1 }?.first()
    val absent = listOf(MANIFEST, CHECKSUMS).firstOrNull { it !in names }
    val sum = index.files.fold(0.0) { total, file -> total + file.bytes } // cannot overflow
    return when {
        twice != null -> "it lists `$twice` twice"
        absent != null -> "it does not list `$absent`"
        sum != index.bytes.toDouble() ->
            "its files have %.0f bytes together, and it says %d"
                .format(java.util.Locale.ROOT, sum, index.bytes)
        else -> null
    }
}

/** A name that leads nowhere else and is not hidden. */
private fun plainName(value: Any?, path: String): String =
    string(value, path).also { name ->
        if (name.isEmpty() || name[0] == '.' || name.any { it == '/' || it == '\\' || it < ' ' }) {
            throw MalformedJson("`$name` is no plain name - at `$path`")
        }
    }

private fun relativePath(value: Any?, path: String): String =
    string(value, path).also { text ->
        if (text.split('/', '\\').any { it.isEmpty() || it == "." || it == ".." }) {
            throw MalformedJson("`$text` leads out of the package - at `$path`")
        }
    }

private fun size(value: Any?, path: String): Long =
    long(value, path).also {
        if (it < 0) throw MalformedJson("Expected `int` >= 0 - at `$path`")
    }

private fun sha256(value: Any?, path: String): String =
    string(value, path).also { text ->
        if (text.length != 64 || text.any { it !in "0123456789abcdef" }) {
            throw MalformedJson("Expected `str` matching regex '^[0-9a-f]{64}\$' - at `$path`")
        }
    }
