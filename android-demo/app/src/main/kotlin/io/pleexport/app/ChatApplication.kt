package io.pleexport.app

import android.app.ActivityManager
import android.app.Application
import android.content.Context
import android.os.Build
import android.os.Handler
import android.os.Looper
import io.pleexport.chat.Chat
import io.pleexport.chat.Device
import io.pleexport.chat.Shipped
import io.pleexport.publicKey
import java.io.FileNotFoundException
import java.io.InputStream
import java.security.PublicKey
import java.util.concurrent.Executor
import kotlinx.coroutines.CoroutineScope
import kotlinx.coroutines.asCoroutineDispatcher

private const val BUNDLES = "bundles"

/** In the assets: the key that packages have to be signed with, where the app's maker has one. */
private const val PUBLIC_KEY = "public.pem"

/** Owns the chat, which outlives screens: turning the device ends none. */
class ChatApplication : Application() {
    /** Whether somebody sees the app now. */
    var isSeen = false

    val chat: Chat by lazy {
        Chat(filesDir, AssetBundles(this), Phone(this), trustedKey())
    }

    private fun trustedKey(): PublicKey? =
        try {
            assets.open(PUBLIC_KEY).use { publicKey(it.readBytes().toString(Charsets.UTF_8)) }
        } catch (err: FileNotFoundException) {
            null
        }
}

/** Runs what it is given on the main thread, one thing after the other. */
internal fun mainScope(): CoroutineScope {
    val handler = Handler(Looper.getMainLooper())
    return CoroutineScope(Executor { handler.post(it) }.asCoroutineDispatcher())
}

/** Bundles in the app's assets, a folder each. */
private class AssetBundles(private val context: Context) : Shipped {
    // Some versions of `list` name what lies deeper too.
    override fun names(): List<String> =
        context.assets.list(BUNDLES).orEmpty().map { it.substringBefore('/') }.distinct()

    override fun files(name: String): List<String> =
        context.assets.list("$BUNDLES/$name").orEmpty().toList()

    override fun open(name: String, file: String): InputStream =
        context.assets.open("$BUNDLES/$name/$file")
}

private class Phone(private val context: Context) : Device {
    override val abis: List<String>
        get() = Build.SUPPORTED_ABIS.toList()

    override fun availableBytes(): Long {
        val memory = ActivityManager.MemoryInfo()
        val manager = context.getSystemService(Context.ACTIVITY_SERVICE) as ActivityManager
        manager.getMemoryInfo(memory)
        return memory.availMem
    }
}
