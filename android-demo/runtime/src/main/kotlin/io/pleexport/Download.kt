package io.pleexport

import java.io.File
import java.io.FileNotFoundException
import java.io.IOException
import java.io.InputStream
import java.net.HttpURLConnection
import java.net.MalformedURLException
import java.net.URL
import java.security.MessageDigest
import java.security.PublicKey
import kotlinx.coroutines.CoroutineScope
import kotlinx.coroutines.Dispatchers
import kotlinx.coroutines.SupervisorJob
import kotlinx.coroutines.async
import kotlinx.coroutines.delay
import kotlinx.coroutines.flow.Flow
import kotlinx.coroutines.flow.FlowCollector
import kotlinx.coroutines.flow.flow
import kotlinx.coroutines.flow.flowOn
import kotlinx.coroutines.launch

private const val INDEX = "index.json"
private const val SIGNATURE = "index.json.sig"

/** An index lists tens of files; a longer one is something else. */
private const val MOST_INDEX_BYTES = 4 shl 20
private const val MOST_SIGNATURE_BYTES = 4096
private const val PIECE_BYTES = 1 shl 18

/** Answers that may be others a moment later. */
private val PASSING = setOf(408, 425, 429) + (500..599)

/**
 * How patient a download is.
 *
 * @property retries how often it goes on after a connection failed, when nothing more came since.
 * @property pauseMillis before the first of them; each further one waits twice as long.
 */
class Patience(
    val retries: Int = 5,
    val pauseMillis: Long = 1000,
    val connectMillis: Int = 15_000,
    val readMillis: Int = 30_000,
)

/**
 * Downloads a bundle that `pleexport package` wrote. Cold; a collector that is cancelled ends the
 * connection and leaves what has come, and the next call goes on from there.
 *
 * Every file is compared with its SHA-256 in the index. One that is damaged is fetched once more.
 *
 * @param url of its `index.json`.
 * @param into where the bundle takes its place.
 * @param key where one is given, the index has to be signed with it: `publicKey`.
 * @return ends with the bundle's folder. It throws DeliveryError where there is no connection, no
 *   storage, or no package, and CheckFailed where what is served is not what the index or the key
 *   says.
 */
fun download(
    url: String,
    into: BundleFolder,
    key: PublicKey? = null,
    patience: Patience = Patience(),
): Flow<Delivery> = flow { Download(url, into, key, patience).run(this) }.flowOn(Dispatchers.IO)

private class Download(
    private val url: String,
    private val into: BundleFolder,
    private val key: PublicKey?,
    private val patience: Patience,
) {
    private val server = Server(patience)

    suspend fun run(progress: FlowCollector<Delivery>) {
        val raw = server.small(url, MOST_INDEX_BYTES)
        if (key != null) checkSignature(raw, signature(), key, url)
        val index = readIndex(raw, url)
        val staging = into.staging(index.bundle)
        val whole = File(staging, "bundle").apply { mkdirs() }
        val trusted = sameIndex(File(staging, INDEX), raw)
        clean(staging, whole, index)

        val open = index.files.filter { !isDone(File(whole, it.name), it, trusted) }
        into.checkRoom(open.sumOf { it.bytes - part(staging, it).length() }, index.bundle)
        write(File(staging, INDEX), raw)
        var done = index.bytes - open.sumOf { it.bytes }
        for (file in open) {
            val part = part(staging, file)
            fetch(file, part) { bytes, checking ->
                progress.emit(Delivery(index.bundle, done + bytes, index.bytes, checking))
            }
            if (!part.renameTo(File(whole, file.name))) throw storageFails(whole, null)
            done += file.bytes
        }
        val folder = into.put(whole, index.bundle)
        staging.deleteRecursively()
        progress.emit(Delivery(index.bundle, index.bytes, index.bytes, folder = folder))
    }

    private suspend fun signature(): ByteArray =
        try {
            server.small(beside(SIGNATURE), MOST_SIGNATURE_BYTES)
        } catch (err: DeliveryError) {
            if (err.cause !is NotServed) throw err
            throw CheckFailed(
                "`$url` is not signed, and this app takes nothing unsigned",
                "write the package with `--sign`, and serve `$SIGNATURE` beside it",
                err,
            )
        }

    /** A file's first bytes lie under its digest, so that they cannot be those of another. */
    private fun part(staging: File, file: PackagedFile) = File(staging, file.sha256)

    private fun sameIndex(file: File, raw: ByteArray) =
        file.isFile &&
            file.length() == raw.size.toLong() &&
            guarded(file) { file.readBytes() }.contentEquals(raw)

    /** Deletes what the index does not name. */
    private fun clean(staging: File, whole: File, index: PackageIndex) {
        val parts = index.files.map { it.sha256 } + listOf(INDEX, whole.name)
        staging.listFiles().orEmpty().filter { it.name !in parts }.forEach(File::deleteRecursively)
        val names = index.files.map { it.name }
        whole.listFiles().orEmpty().filter { it.name !in names }.forEach(File::deleteRecursively)
    }

    /** Whether a file is there. Under another index it is compared again. */
    private fun isDone(file: File, wanted: PackagedFile, trusted: Boolean): Boolean {
        val done =
            file.isFile &&
                file.length() == wanted.bytes &&
                (trusted || sha256(file) == wanted.sha256)
        if (!done) file.delete()
        return done
    }

    /** Fetches a file until it is whole and right. */
    private suspend fun fetch(
        file: PackagedFile,
        part: File,
        progress: suspend (Long, Boolean) -> Unit,
    ) {
        val address = beside(file.path)
        // What an earlier call left may be damaged too, and costs no try.
        var tries = if (part.length() > 0) 2 else 1
        while (true) {
            server.fetch(address, part, file.bytes) { progress(it, false) }
            progress(file.bytes, true)
            if (sha256(part) == file.sha256) return
            part.delete()
            if (tries-- == 0) {
                throw CheckFailed(
                    "`$address` is damaged where it is served: its SHA-256 is not that of the index",
                    "copy the package to the server again",
                )
            }
        }
    }

    /** The address of a path below the folder of the index. */
    private fun beside(path: String): String =
        url.substringBefore('?').substringBefore('#').substringBeforeLast('/') +
            path.split('/').joinToString("") { "/" + percentEncoded(it) }

    private fun write(file: File, data: ByteArray) =
        StagedFile(file, append = false).use { it.write(data, data.size) }
}

/** The server will not give a file. */
private class NotServed(url: String, status: Int) : IOException("`$url` answers $status")

/** Asks a server, again where a connection fails. */
private class Server(private val patience: Patience) {
    /** Where a thread may wait for the network longer than its caller does. */
    private val waiting = CoroutineScope(SupervisorJob() + Dispatchers.IO)

    /** A whole small file. */
    suspend fun small(url: String, most: Int): ByteArray {
        val checked = checkedUrl(url)
        var failures = 0
        while (true) {
            try {
                return connected(checked, 0) { connection ->
                    val data = connection.inputStream.use { it.readAtMost(most + 1) }
                    if (data.size > most) {
                        throw DeliveryError(
                            "`$url` has more than $most bytes",
                            "this is the address of something else than an index",
                        )
                    }
                    data
                }
            } catch (err: IOException) {
                pause(++failures, url, err)
            }
        }
    }

    /** Appends what a file still lacks; it has its size when this returns. */
    suspend fun fetch(url: String, part: File, size: Long, progress: suspend (Long) -> Unit) {
        val checked = checkedUrl(url)
        var failures = 0
        var best = part.length()
        if (part.length() > size) part.delete()
        if (size == 0L) guarded(part) { part.createNewFile() }
        while (part.length() < size) {
            try {
                transfer(checked, part, size, progress)
            } catch (err: IOException) {
                // A server that always begins anew makes no way by what it repeats.
                if (part.length() > best) failures = 0
                best = maxOf(best, part.length())
                pause(++failures, url, err)
            }
        }
    }

    private suspend fun transfer(url: URL, part: File, size: Long, progress: suspend (Long) -> Unit) {
        val have = part.length()
        opened(url, have) { connection ->
            val goesOn = connection.responseCode == HttpURLConnection.HTTP_PARTIAL
            if (goesOn && !connection.begins(have)) {
                part.delete()
                throw IOException("`$url` gives another range than was asked for")
            }
            if (!goesOn && connection.contentLengthLong !in setOf(-1, size)) {
                throw CheckFailed(
                    "`$url` has ${connection.contentLengthLong} bytes; the index says $size",
                    "copy the package to the server again",
                )
            }
            var at = if (goesOn) have else 0L
            val piece = ByteArray(PIECE_BYTES)
            StagedFile(part, append = goesOn).use { out ->
                val input = connection.inputStream
                while (at < size) {
                    val most = minOf(piece.size.toLong(), size - at).toInt()
                    val count = whileActive { input.read(piece, 0, most) }
                    if (count < 0) throw IOException("the connection ended at byte $at")
                    out.write(piece, count)
                    at += count
                    progress(at)
                }
            }
        }
    }

    private suspend fun <T> connected(url: URL, from: Long, use: (HttpURLConnection) -> T): T =
        opened(url, from) { connection -> whileActive { use(connection) } }

    /** Connects, and leaves the connection closed. */
    private suspend fun <T> opened(
        url: URL,
        from: Long,
        use: suspend (HttpURLConnection) -> T,
    ): T {
        val connection = url.openConnection() as HttpURLConnection
        connection.connectTimeout = patience.connectMillis
        connection.readTimeout = patience.readMillis
        // Bytes are counted as they are stored.
        connection.setRequestProperty("Accept-Encoding", "identity")
        if (from > 0) connection.setRequestProperty("Range", "bytes=$from-")
        try {
            val status = whileActive { connection.responseCode }
            if (status in PASSING) throw IOException("`$url` answers $status")
            if (status !in listOf(HttpURLConnection.HTTP_OK, HttpURLConnection.HTTP_PARTIAL)) {
                throw NotServed("$url", status)
            }
            return use(connection)
        } finally {
            // Where a read is going on, the JDK lets this wait for it.
            waiting.launch { connection.disconnect() }
        }
    }

    /** Waits for the network; who is cancelled meanwhile waits no longer. */
    private suspend fun <T> whileActive(wait: () -> T): T =
        waiting.async { runCatching(wait) }.await().getOrThrow()

    /** Waits before another try, or gives up. */
    private suspend fun pause(failures: Int, url: String, err: IOException) {
        if (err is NotServed || err is FileNotFoundException) {
            throw DeliveryError(err.message ?: "`$url` is not there", "check the address", err)
        }
        if (failures > patience.retries) {
            throw DeliveryError(
                "`$url` cannot be reached (${reason(err)})",
                "check the connection and try again; what has come is kept",
                err,
            )
        }
        delay(patience.pauseMillis shl (failures - 1))
    }
}

private fun checkedUrl(url: String): URL {
    val checked =
        try {
            URL(url)
        } catch (err: MalformedURLException) {
            null
        }
    if (checked?.protocol !in listOf("http", "https") || checked?.host.isNullOrEmpty()) {
        throw DeliveryError(
            "`$url` is no address of the web",
            "it begins with `https://` and ends with `$INDEX`",
        )
    }
    return checked
}

/** Whether an answer begins at a byte, as it says. */
private fun HttpURLConnection.begins(at: Long) =
    getHeaderField("Content-Range")?.startsWith("bytes $at-") == true

private fun InputStream.readAtMost(most: Int): ByteArray {
    val data = ByteArray(most)
    var filled = 0
    while (filled < most) {
        val count = read(data, filled, most - filled)
        if (count < 0) break
        filled += count
    }
    return data.copyOf(filled)
}

private fun percentEncoded(name: String): String =
    name.toByteArray().joinToString("") { byte ->
        val code = byte.toInt() and 0xFF
        val plain = code.toChar().let { it in 'a'..'z' || it in 'A'..'Z' || it in '0'..'9' || it in "-._~" }
        if (plain) "${code.toChar()}" else "%%%02X".format(java.util.Locale.ROOT, code)
    }

private fun sha256(file: File): String {
    val digest = MessageDigest.getInstance("SHA-256")
    val piece = ByteArray(PIECE_BYTES)
    guarded(file) {
        file.inputStream().use { input ->
            while (true) {
                val count = input.read(piece)
                if (count < 0) break
                digest.update(piece, 0, count)
            }
        }
    }
    return hexadecimal(digest.digest())
}
