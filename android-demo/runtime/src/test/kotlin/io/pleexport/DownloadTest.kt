package io.pleexport

import com.sun.net.httpserver.HttpServer
import java.io.ByteArrayInputStream
import java.io.File
import java.io.IOException
import java.net.InetAddress
import java.net.InetSocketAddress
import java.net.ServerSocket
import java.nio.file.Path
import java.security.KeyFactory
import java.security.KeyPairGenerator
import java.security.PublicKey
import java.security.Signature
import java.security.spec.ECGenParameterSpec
import java.security.spec.X509EncodedKeySpec
import java.util.Base64
import kotlinx.coroutines.cancelAndJoin
import kotlinx.coroutines.delay
import kotlinx.coroutines.flow.first
import kotlinx.coroutines.flow.toList
import kotlinx.coroutines.launch
import kotlinx.coroutines.runBlocking
import org.junit.jupiter.api.Assertions.assertEquals
import org.junit.jupiter.api.Assertions.assertTrue
import org.junit.jupiter.api.Test
import org.junit.jupiter.api.io.TempDir

class DownloadTest {
    @TempDir lateinit var temporary: Path

    private val original = File("../../conformance/gemma4-fp32")
    private val place by lazy { BundleFolder(temporary.resolve("bundles").toFile()) }
    private val weights = "packs/a b/model.onnx.data"

    private fun fetch(
        server: PackageServer,
        into: BundleFolder = place,
        key: PublicKey? = null,
        retries: Int = 3,
    ): List<Delivery> = fetch(server.url, into, key, retries)

    private fun fetch(url: String, into: BundleFolder, key: PublicKey?, retries: Int) = runBlocking {
        val patience = Patience(retries, pauseMillis = 1, connectMillis = 2000, readMillis = 2000)
        download(url, into, key, patience).toList()
    }

    private fun assertWhole(folder: File) {
        val names = original.list()!!.sorted()
        assertEquals(names, folder.list()!!.sorted())
        for (name in names) {
            assertTrue(File(original, name).readBytes().contentEquals(File(folder, name).readBytes()))
        }
        Bundle(folder).verify()
    }

    @Test
    fun `a package becomes the bundle that it was made of`() =
        PackageServer(original).use { server ->
            val seen = fetch(server)
            assertWhole(seen.last().folder!!)
            assertEquals(listOf("phone"), place.names())
            val total = original.listFiles()!!.sumOf { it.length() }
            assertTrue(seen.all { it.ofBytes == total && it.bundle == "phone" })
            assertEquals(total, seen.last().bytes)
            assertEquals(seen.map { it.bytes }.sorted(), seen.map { it.bytes })
            assertEquals(listOf("phone"), place.path.list()!!.toList()) // nothing hidden is left
            place.remove("phone")
            assertEquals(emptyList<String>(), place.names())
        }

    @Test
    fun `a package that Python wrote and signed becomes a bundle`() {
        val written = Cases.of("signature")
        val server = HttpServer.create(InetSocketAddress(InetAddress.getLoopbackAddress(), 0), 0)
        server.createContext("/") { exchange ->
            val data = File(written, exchange.requestURI.path).readBytes()
            exchange.sendResponseHeaders(200, data.size.toLong())
            exchange.responseBody.use { it.write(data) }
        }
        server.start()
        try {
            val encoded = X509EncodedKeySpec(File(written, "public.der").readBytes())
            val key = KeyFactory.getInstance("EC").generatePublic(encoded)
            val url = "http://127.0.0.1:${server.address.port}/index.json"
            val folder = fetch(url, place, key, retries = 0).last().folder!!
            val bundle = Bundle(folder)
            bundle.verify()
            assertEquals("embformer", bundle.manifest.family)
        } finally {
            server.stop(0)
        }
    }

    @Test
    fun `a connection that is cut goes on where it was`() =
        PackageServer(original).use { server ->
            server.cutAfter = 40_000
            assertWhole(fetch(server).last().folder!!)
            val starts = server.asked.filter { it.first.endsWith("model.onnx.data") }.map { it.second }
            assertTrue(starts.size > 2, "$starts")
            assertEquals(starts.indices.map { it * 40_000L }, starts)
        }

    @Test
    fun `a server that gives no ranges begins anew, and is given up where it makes no way`() =
        PackageServer(original).use { server ->
            server.ranges = false
            var cuts = 0
            server.body = { name, data ->
                server.cutAfter = if (name == weights && cuts++ < 2) 40_000 else -1
                data
            }
            assertWhole(fetch(server).last().folder!!)
            assertEquals(3, cuts)
            place.remove("phone")
            server.body = { name, data -> data.also { server.cutAfter = if (name == weights) 9 else -1 } }
            server.asked.clear()
            assertTrue("cannot be reached" in refusal<DeliveryError> { fetch(server) })
            assertTrue(server.asked.count { it.first.endsWith("onnx.data") } <= 5)
        }

    @Test
    fun `a download that was cancelled goes on later`() =
        PackageServer(original).use { server ->
            runBlocking {
                download(server.url, place).first { it.bytes > 100_000 }
            }
            assertEquals(emptyList<String>(), place.names())
            server.asked.clear()
            assertWhole(fetch(server).last().folder!!)
            assertTrue(server.asked.size < original.list()!!.size, "${server.asked}")
        }

    @Test
    fun `who cancels does not wait for a server that is silent`() =
        ServerSocket(0, 1, InetAddress.getLoopbackAddress()).use { silent ->
            val begun = System.nanoTime()
            runBlocking {
                val job = launch {
                    download("http://127.0.0.1:${silent.localPort}/index.json", place).collect {}
                }
                delay(300)
                job.cancelAndJoin()
            }
            assertTrue((System.nanoTime() - begun) / 1e9 < 5)
        }

    @Test
    fun `what is damaged is fetched again, and told where it stays so`() =
        PackageServer(original).use { server ->
            var served = 0
            fun damage(times: Int) {
                served = 0
                server.body = { name, data ->
                    if (name == weights && served++ < times) data[5] = (data[5] + 1).toByte()
                    data
                }
            }
            damage(1)
            assertWhole(fetch(server).last().folder!!)
            assertEquals(2, served)
            place.remove("phone")
            damage(99)
            val said = refusal<CheckFailed> { fetch(server) }
            assertTrue("a%20b/model.onnx.data` is damaged where it is served" in said, said)
            assertEquals(2, served)
            assertEquals(emptyList<String>(), place.names())
            // What an earlier call left may be what is wrong: that costs no try.
            runBlocking { download(server.url, place).first { it.bytes > 150_000 } }
            damage(0)
            place.path.walk().filter { it.isFile && it.name.length == 64 }.forEach { part ->
                part.writeBytes(part.readBytes().also { it[0] = (it[0] + 1).toByte() })
            }
            assertWhole(fetch(server).last().folder!!)
        }

    @Test
    fun `a file of another length is refused before it is stored`() =
        PackageServer(original).use { server ->
            server.body = { name, data -> if (name == weights) data + 1 else data }
            val said = refusal<CheckFailed> { fetch(server) }
            assertTrue("bytes; the index says" in said, said)
        }

    @Test
    fun `a new package replaces the old bundle, and an old index trusts nothing`() {
        PackageServer(original).use { fetch(it) }
        val other = File("../../conformance/lckv-fp16")
        PackageServer(other).use { server ->
            server.answer = { if (it == weights) 404 else null }
            refusal<DeliveryError> { fetch(server) }
            assertWhole(place.of("phone")) // the old one stays until the new one is whole
            server.answer = { null }
            val folder = fetch(server).last().folder!!
            assertEquals(other.list()!!.sorted(), folder.list()!!.sorted())
        }
        // Half of one package is no part of another.
        PackageServer(original).use { server ->
            runBlocking { download(server.url, place).first { it.bytes > 100_000 } }
        }
        PackageServer(other).use { server ->
            val folder = fetch(server).last().folder!!
            assertEquals(other.list()!!.sorted(), folder.list()!!.sorted())
            Bundle(folder).verify()
        }
    }

    @Test
    fun `a bundle that was put aside comes back`() {
        PackageServer(original).use { fetch(it) }
        place.of("phone").renameTo(File(place.path, ".phone.old"))
        assertEquals(listOf("phone"), BundleFolder(place.path).names())
    }

    @Test
    fun `storage is asked for before anything is fetched`() =
        PackageServer(original).use { server ->
            val small = BundleFolder(place.path) { 64L shl 20 }
            val said = refusal<DeliveryError> { fetch(server, into = small) }
            assertTrue(Regex("`phone` needs 6\\d MB of storage, and 68 MB are free").matches(said), said)
            assertEquals(1, server.asked.size)
        }

    @Test
    fun `storage that fails is told`() =
        PackageServer(original).use { server ->
            val said =
                refusal<DeliveryError> {
                    runBlocking {
                        download(server.url, place).collect {
                            place.path.listFiles()!!.forEach(File::deleteRecursively)
                        }
                    }
                }
            assertTrue("cannot be written or read" in said, said)
            val full = storageFails(File("x"), IOException("write failed: No space left on device"))
            assertEquals("there is no space left for `x`", full.message)
        }

    @Test
    fun `answers that are no files are told`() =
        PackageServer(original).use { server ->
            fun said(status: Int): String {
                server.answer = { if (it == weights) status else null }
                server.asked.clear()
                return refusal<DeliveryError> { fetch(server) }
            }
            assertTrue("onnx.data` answers 404" in said(404))
            assertEquals(1, server.asked.count { it.first.endsWith("onnx.data") })
            assertTrue("onnx.data` cannot be reached" in said(503))
            assertEquals(4, server.asked.count { it.first.endsWith("onnx.data") })
            server.close()
            assertTrue("cannot be reached" in refusal<DeliveryError> { fetch(server) })
        }

    @Test
    fun `an address that is none is told`() {
        for (url in listOf("", "phone", "ftp://host/index.json", "https:///index.json", "file:///etc/x")) {
            val said = refusal<DeliveryError> { runBlocking { download(url, place).collect {} } }
            assertEquals("`$url` is no address of the web", said)
        }
    }

    @Test
    fun `an index that breaks a rule is refused, and nothing is fetched`() {
        fun said(change: (MutableMap<String, Any>) -> Unit): String =
            PackageServer(original, change).use { server ->
                refusal<DeliveryError> { fetch(server) }.also { assertEquals(1, server.asked.size) }
            }
        @Suppress("UNCHECKED_CAST")
        fun first(index: Map<String, Any>) = (index["files"] as List<MutableMap<String, Any>>)[0]
        for (name in listOf("../x", "/etc/x", "a/b", "..", "", "a\\b", ".hidden")) {
            assertTrue("is no plain name" in said { first(it)["name"] = name })
            assertTrue("is no plain name" in said { it["bundle"] = name })
        }
        for (path in listOf("../x", "/x", "a//b", "a/./b", "https://host/x", "a\\..\\b", "")) {
            assertTrue("leads out of the package" in said { first(it)["path"] = path })
        }
        assertTrue("matching regex" in said { first(it)["sha256"] = "A".repeat(64) })
        assertTrue("Expected `int` >= 0" in said { first(it)["bytes"] = -1 })
        assertTrue("bytes together, and it says 7" in said { it["bytes"] = 7 })
        assertTrue("Invalid enum value" in said { it["format"] = "other" })
        assertTrue("it has version 2" in said { it["version"] = 2 })
        assertTrue("unknown field `more`" in said { it["more"] = 1 })
        assertTrue("missing required field `pack`" in said { first(it).remove("pack") })
        assertTrue("does not list `manifest.json`" in said { it["files"] = emptyList<Any>() })
        assertTrue("twice" in said { index -> index["files"] = listOf(first(index), first(index)) })
        PackageServer(original).use { server ->
            server.body = { _, _ -> ByteArray(5 shl 20) { ' '.code.toByte() } }
            assertTrue("has more than 4194304 bytes" in refusal<DeliveryError> { fetch(server) })
            server.body = { _, _ -> "<html>".toByteArray() }
            assertTrue("is no index of a package" in refusal<DeliveryError> { fetch(server) })
        }
    }

    @Test
    fun `an index is taken with the right signature only`() =
        PackageServer(original).use { server ->
            val pair =
                KeyPairGenerator.getInstance("EC")
                    .apply { initialize(ECGenParameterSpec("secp256r1")) }
                    .generateKeyPair()
            val pem = "-----BEGIN PUBLIC KEY-----\n${Base64.getMimeEncoder().encodeToString(pair.public.encoded)}\n-----END PUBLIC KEY-----\n"
            val key = publicKey(pem)
            assertTrue("is not signed, and" in refusal<CheckFailed> { fetch(server, key = key) })
            val signer = Signature.getInstance("SHA256withECDSA").apply { initSign(pair.private) }
            val signature = signer.apply { update(server.index) }.sign()
            signer.update(server.index + 1)
            for (wrong in listOf(signer.sign(), ByteArray(0), "no signature".toByteArray())) {
                server.signature = wrong
                val said = refusal<CheckFailed> { fetch(server, key = key) }
                assertTrue("is not signed with the key that this app trusts" in said, said)
            }
            assertTrue(server.asked.none { "packs" in it.first })
            server.signature = signature
            assertWhole(fetch(server, key = key).last().folder!!)
            for (text in listOf("", "no key", pem.replace('M', 'N'))) {
                assertEquals(
                    "this is no public key of the curve P-256",
                    refusal<InputError> { publicKey(text) },
                )
            }
        }

    @Test
    fun `a bundle is unpacked out of streams, staged`() {
        val names = original.list()!!.toList()
        fun unpack(open: (String) -> java.io.InputStream, into: BundleFolder = place) = runBlocking {
            unpack("inside", names, into, open).toList().last().folder!!
        }
        assertWhole(unpack({ File(original, it).inputStream() }))
        assertEquals(listOf("inside"), place.path.list()!!.toList())
        place.remove("inside")
        val short =
            refusal<CheckFailed> {
                unpack({ name ->
                    if (name == "model.onnx.data") ByteArrayInputStream(ByteArray(7))
                    else File(original, name).inputStream()
                })
            }
        assertTrue("has 7 bytes; the manifest says" in short, short)
        val gone = refusal<DeliveryError> { unpack({ throw IOException("gone") }) }
        assertEquals("`inside` cannot be read out of the app (gone)", gone)
        val full = BundleFolder(place.path) { 1000 }
        val said = refusal<DeliveryError> { unpack({ File(original, it).inputStream() }, full) }
        assertTrue("of storage, and 1 MB are free" in said, said)
        assertEquals(0, place.path.list()!!.size)
    }
}
