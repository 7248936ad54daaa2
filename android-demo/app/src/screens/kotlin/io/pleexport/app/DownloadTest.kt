package io.pleexport.app

import android.Manifest
import android.app.Notification
import android.app.NotificationManager
import android.content.Intent
import com.google.gson.Gson
import com.sun.net.httpserver.HttpServer
import io.pleexport.chat.Screen
import java.io.File
import java.net.InetAddress
import java.net.InetSocketAddress
import java.security.MessageDigest
import java.util.concurrent.Executors
import java.util.concurrent.Semaphore
import org.junit.After
import org.junit.Assert.assertEquals
import org.junit.Assert.assertFalse
import org.junit.Assert.assertNull
import org.junit.Assert.assertTrue
import org.junit.Test
import org.junit.runner.RunWith
import org.robolectric.Robolectric
import org.robolectric.RobolectricTestRunner
import org.robolectric.Shadows.shadowOf
import org.robolectric.android.controller.ServiceController
import org.robolectric.annotation.Config
import org.robolectric.annotation.GraphicsMode
import org.robolectric.shadows.ShadowPowerManager

private const val PIECE_BYTES = 1 shl 18

/** A download as a person sees it, with the app on the screen and away from it. */
@RunWith(RobolectricTestRunner::class)
@Config(sdk = [35], qualifiers = "w360dp-h740dp-xhdpi")
@GraphicsMode(GraphicsMode.Mode.NATIVE)
class DownloadTest {
    private val bundle = File(System.getProperty("screens.bundle"))
    private val phone = TestPhone()
    private val server = HttpServer.create(InetSocketAddress(InetAddress.getLoopbackAddress(), 0), 0)
    private val url = "http://127.0.0.1:${server.address.port}/index.json"

    /** How many pieces may be served. */
    private val pieces = Semaphore(0)
    private val threads = Executors.newCachedThreadPool { Thread(it).apply { isDaemon = true } }
    private var damaged = ""

    private val notifications
        get() = phone.app.getSystemService(NotificationManager::class.java)

    init {
        server.createContext("/") { exchange ->
            val name = exchange.requestURI.path.removePrefix("/")
            val data = if (name == "index.json") index() else File(bundle, name).readBytes()
            if (name == damaged) data[100] = (data[100] + 1).toByte()
            exchange.sendResponseHeaders(200, data.size.toLong())
            exchange.responseBody.use { out ->
                for (begin in data.indices step PIECE_BYTES) {
                    if (name != "index.json") pieces.acquire()
                    out.write(data, begin, minOf(PIECE_BYTES, data.size - begin))
                    out.flush()
                }
            }
        }
        server.executor = threads
        server.start()
    }

    private fun index(): ByteArray {
        val files = bundle.listFiles()!!.sortedBy { it.name }
        val listed = files.map {
            val digest = MessageDigest.getInstance("SHA-256").digest(it.readBytes())
            val sha256 = digest.joinToString("") { byte -> "%02x".format(byte) }
            mapOf(
                "path" to it.name, "name" to it.name, "bytes" to it.length(), "sha256" to sha256, "pack" to "a",
            )
        }
        val index = mapOf(
            "format" to "pleexport-package", "version" to 1, "target" to "android", "bundle" to "phone",
            "bytes" to files.sumOf { it.length() }, "files" to listed,
        )
        return Gson().toJson(index).toByteArray()
    }

    @After
    fun close() {
        pieces.release(10_000)
        phone.close()
        server.stop(0)
        threads.shutdownNow()
    }

    private fun begin(): ServiceController<DownloadService> {
        phone.waitFor<Screen.Talking>()
        phone.chooseFromMenu("Models")
        phone.type("Address of the package's index.json", url)
        phone.press("Download")
        phone.waitFor<Screen.Bringing>()
        val intent = phone.wait("a service") { shadowOf(phone.app).nextStartedService }
        assertEquals(DownloadService::class.java.name, intent.component!!.className)
        return Robolectric.buildService(DownloadService::class.java, intent).create().startCommand(0, 1)
    }

    private fun title(notification: Notification?) =
        notification?.extras?.getString(Notification.EXTRA_TITLE)

    private fun shown() = title(notifications.activeNotifications.firstOrNull { it.id == 1 }?.notification)

    private fun ServiceController<DownloadService>.waitForEnd() {
        phone.wait("an end of the service") { true.takeIf { shadowOf(get()).isStoppedBySelf } }
        destroy()
        assertFalse(ShadowPowerManager.getLatestWakeLock().isHeld)
    }

    @Test
    fun `goes on behind a notification when the app is left, and says that it is done`() {
        val service = begin()
        val asked = shadowOf(phone.activity).lastRequestedPermission.requestedPermissions
        assertEquals(listOf(Manifest.permission.POST_NOTIFICATIONS), asked.toList())
        assertTrue(ShadowPowerManager.getLatestWakeLock().isHeld)
        pieces.release(8)
        val half = phone.waitFor<Screen.Bringing> { it.thousandths in 200..800 }
        phone.wait("progress") { true.takeIf { phone.content.bar().progress == half.thousandths } }
        phone.picture("downloading")
        phone.content.check()

        phone.controller.pause().stop()
        pieces.release(5)
        phone.waitFor<Screen.Bringing> { it.thousandths > half.thousandths && it.text == shown() }
        pieces.release(10_000)
        service.waitForEnd()
        assertEquals("phone", phone.waitFor<Screen.Talking>().name)
        assertNull(shown())
        assertEquals("`phone` is here", title(shadowOf(notifications).getNotification(2)))
        // Who comes back finds the bundle open.
        phone.controller.start().resume()
        phone.says("phone")
    }

    @Test
    fun `is cancelled by the notification`() {
        val service = begin()
        pieces.release(4)
        phone.waitFor<Screen.Bringing> { it.thousandths > 0 }
        val shown = phone.wait("an action") {
            notifications.activeNotifications.firstOrNull()?.notification?.actions?.firstOrNull()
        }
        assertEquals("Cancel", shown.title)
        service.withIntent(shadowOf(shown.actionIntent).savedIntent).startCommand(0, 2)
        phone.waitFor<Screen.Choosing>()
        service.waitForEnd()
        // Seen on the screen, it needs no notification.
        assertEquals(emptyList<Notification>(), shadowOf(notifications).allNotifications)
    }

    @Test
    fun `tells in a sentence why it failed`() {
        damaged = "model.onnx"
        val service = begin()
        phone.controller.pause().stop()
        pieces.release(10_000)
        service.waitForEnd()
        val told = shadowOf(notifications).getNotification(2)
        assertEquals("The download has stopped", title(told))
        val why = told.extras.getString(Notification.EXTRA_TEXT)!!
        assertTrue(why, "model.onnx" in why && why.endsWith("."))
        phone.controller.start().resume()
        phone.says(why)
        phone.picture("damaged")
        phone.content.check()
    }

    @Test
    fun `ends when Android grants it no more time`() {
        val service = begin()
        service.get().onTimeout(1, 1)
        phone.waitFor<Screen.Choosing>()
        service.waitForEnd()
    }
}
