package io.pleexport

import com.google.gson.Gson
import java.io.BufferedOutputStream
import java.io.File
import java.io.IOException
import java.net.InetAddress
import java.net.ServerSocket
import java.net.Socket
import java.security.MessageDigest
import java.util.concurrent.ConcurrentLinkedQueue
import kotlin.concurrent.thread

/**
 * Serves a bundle as a package, on this machine, as badly as a test wants.
 *
 * @property cutAfter bytes of a body after which a connection is closed; negative for never.
 * @property ranges whether a part of a file can be had.
 * @property answer a status in place of a file, by the path.
 * @property body changes what is served of a path.
 */
internal class PackageServer(private val bundle: File, change: (MutableMap<String, Any>) -> Unit = {}) :
    AutoCloseable {
    @Volatile var cutAfter = -1
    @Volatile var ranges = true
    @Volatile var answer: (String) -> Int? = { null }
    @Volatile var body: (String, ByteArray) -> ByteArray = { _, data -> data }
    @Volatile var signature: ByteArray? = null

    /** What was asked for, and from which byte. */
    val asked = ConcurrentLinkedQueue<Pair<String, Long>>()

    val index: ByteArray

    private val socket = ServerSocket(0, 20, InetAddress.getLoopbackAddress())
    val url = "http://127.0.0.1:${socket.localPort}/some%20where/index.json"

    init {
        val files = bundle.listFiles()!!.sortedBy { it.name }
        val index =
            linkedMapOf<String, Any>(
                "format" to "pleexport-package",
                "version" to 1,
                "target" to "android",
                "bundle" to "phone",
                "bytes" to files.sumOf { it.length() },
                "files" to
                    files.map {
                        linkedMapOf(
                            "path" to "packs/a b/${it.name}",
                            "name" to it.name,
                            "bytes" to it.length(),
                            "sha256" to sha256(it),
                            "pack" to "a b",
                        )
                    },
            )
        change(index)
        this.index = Gson().toJson(index).toByteArray()
        thread(isDaemon = true) {
            while (!socket.isClosed) {
                val client =
                    try {
                        socket.accept()
                    } catch (err: IOException) {
                        break
                    }
                thread(isDaemon = true) { client.use(::serve) }
            }
        }
    }

    override fun close() = socket.close()

    private fun serve(client: Socket) {
        try {
            val lines = generateSequence { readLine(client) }.takeWhile { it.isNotEmpty() }.toList()
            val path = java.net.URLDecoder.decode(lines[0].split(" ")[1], "UTF-8")
            val range = lines.firstOrNull { it.startsWith("Range: bytes=") }
            val begin = range?.filter(Char::isDigit)?.toLong() ?: 0
            asked += path to begin
            val out = BufferedOutputStream(client.getOutputStream())
            val name = path.removePrefix("/some where/")
            val data =
                when {
                    name == "index.json" -> index
                    name == "index.json.sig" -> signature
                    name.startsWith("packs/a b/") -> File(bundle, name.substring(10)).readBytes()
                    else -> null
                }?.let { body(name, it) }
            val status = answer(name) ?: if (data == null) 404 else if (range != null && ranges) 206 else 200
            val from = if (status == 206) begin.toInt() else 0
            val sent = if (data == null || status >= 400) ByteArray(0) else data.drop(from).toByteArray()
            out.write("HTTP/1.1 $status Said\r\nContent-Length: ${sent.size}\r\nConnection: close\r\n".toByteArray())
            if (status == 206) {
                out.write("Content-Range: bytes $from-${data!!.size - 1}/${data.size}\r\n".toByteArray())
            }
            out.write("\r\n".toByteArray())
            val most = if (cutAfter < 0 || name.startsWith("index")) sent.size else minOf(cutAfter, sent.size)
            out.write(sent, 0, most)
            out.flush()
        } catch (err: IOException) {
            // The other side went away.
        }
    }

    private fun readLine(client: Socket): String? {
        val line = StringBuilder()
        while (true) {
            val byte = client.getInputStream().read()
            if (byte < 0) return null
            if (byte == '\n'.code) return line.toString().trimEnd('\r')
            line.append(byte.toChar())
        }
    }

    companion object {
        fun sha256(file: File): String =
            MessageDigest.getInstance("SHA-256").digest(file.readBytes()).joinToString("") {
                "%02x".format(it)
            }
    }
}
