package io.pleexport.chat

import io.pleexport.Bundle
import io.pleexport.BundleFolder
import io.pleexport.Delivery
import io.pleexport.FinishReason
import io.pleexport.Patience
import io.pleexport.PleexportError
import io.pleexport.Runner
import io.pleexport.download
import io.pleexport.residentMemory
import io.pleexport.unpack
import java.io.File
import java.security.PublicKey
import java.util.concurrent.Executors
import kotlinx.coroutines.CancellationException
import kotlinx.coroutines.CoroutineScope
import kotlinx.coroutines.Dispatchers
import kotlinx.coroutines.Job
import kotlinx.coroutines.NonCancellable
import kotlinx.coroutines.SupervisorJob
import kotlinx.coroutines.asCoroutineDispatcher
import kotlinx.coroutines.cancelAndJoin
import kotlinx.coroutines.ensureActive
import kotlinx.coroutines.flow.Flow
import kotlinx.coroutines.flow.MutableStateFlow
import kotlinx.coroutines.flow.StateFlow
import kotlinx.coroutines.flow.asStateFlow
import kotlinx.coroutines.flow.conflate
import kotlinx.coroutines.launch
import kotlinx.coroutines.withContext

/** Beside a graph's files: the runtime, caches, and the app itself. */
private const val BESIDE_GRAPH_BYTES = 150_000_000L

/** Tokens between two looks at the memory, which ask the system. */
private const val TOKENS_A_LOOK = 16

/**
 * The app without Android: what a person sees, and what each of their actions does to it. It
 * outlives a screen. Actions return at once, and are called on one thread.
 *
 * @param files the app's own folder.
 * @param key where there is one, only packages that are signed with it are downloaded.
 * @param freeBytes of storage, in a folder.
 */
class Chat(
    private val files: File,
    private val shipped: Shipped,
    private val device: Device,
    private val key: PublicKey? = null,
    freeBytes: (File) -> Long = File::getUsableSpace,
    private val patience: Patience = Patience(),
) : AutoCloseable {
    private val bundles = BundleFolder(File(files, "bundles"), freeBytes)
    private val thread =
        Executors.newSingleThreadExecutor { Thread(it, "chat").apply { isDaemon = true } }
            .asCoroutineDispatcher()
    private val scope = CoroutineScope(SupervisorJob() + thread)
    private val shown = MutableStateFlow<Screen>(Screen.Opening(""))
    private val settingsFile = File(files, "settings.json")

    /** Says which bundle is being opened: who runs out of memory is ended without a word. */
    private val opening = File(files, "opening")
    private var work: Job? = null
    private var talk: Talk? = null

    /** What a person sees now. */
    val screen: StateFlow<Screen> = shown.asStateFlow()

    @Volatile
    var settings: Settings = Settings.read(settingsFile)
        private set

    init {
        begin { start() }
    }

    /** Opens a bundle; one that came with the app is unpacked first. */
    fun choose(name: String) = begin { open(name, anyway = false) }

    /** Opens a bundle that seems too large. */
    fun chooseAnyway(name: String) = begin { open(name, anyway = true) }

    /** Downloads a bundle by the address of its index, and opens it. */
    fun bring(url: String) = begin {
        shown.value = Screen.Bringing("Asking the server", 0, isDownload = true)
        val deliveries = download(url.trim(), bundles, key, patience)
        open(brought(deliveries, isDownload = true), anyway = false)
    }

    /** Deletes a bundle, with its conversation. */
    fun remove(name: String) = begin {
        closeTalk()
        withContext(Dispatchers.IO) {
            bundles.remove(name)
            conversation(name).delete()
        }
        chooseAgain()
    }

    /** Ends what is being brought, or answered. What has come is kept. */
    fun stop() = begin { if (shown.value !is Screen.Talking) chooseAgain() }

    /** Leaves a conversation, which is kept, for the choice of bundles. */
    fun leave() = begin {
        closeTalk()
        chooseAgain()
    }

    fun say(text: String) {
        if (text.isBlank() || (shown.value as? Screen.Talking)?.isAnswering != false) return
        begin { answer(text) }
    }

    fun beginAnew() = begin {
        talk?.clear()
        show()
    }

    /** Takes new settings; a bundle that is open is opened again where threads have changed. */
    fun change(to: Settings) {
        val threads = settings.threads
        settings = to.copy(bundle = settings.bundle)
        settings.write(settingsFile)
        if (to.threads != threads) begin { talk?.let { open(it.name, anyway = true) } }
    }

    override fun close() {
        begin { closeTalk() }
        work?.invokeOnCompletion { thread.close() }
    }

    /** Ends what was begun before, and begins something else. */
    private fun begin(body: suspend () -> Unit) {
        val before = work
        work =
            scope.launch {
                before?.cancelAndJoin()
                try {
                    body()
                } catch (err: CancellationException) {
                    throw err
                } catch (err: Throwable) { // of memory too, and of native code
                    chooseAgain(sentenceOf(err, device, bundles.path))
                }
            }
    }

    private suspend fun start() {
        if (opening.exists()) {
            val name = opening.readText()
            opening.delete()
            return chooseAgain(endedWhileOpening(name))
        }
        val here = bundles.names()
        val inside = shipped.names()
        val name =
            settings.bundle.takeIf { it in here }
                ?: if (here.isEmpty() && inside.size == 1) inside[0] else null
        if (name == null) chooseAgain() else open(name, anyway = false)
    }

    private suspend fun chooseAgain(notice: Sentence? = null, anyway: String? = null) {
        closeTalk()
        val here = bundles.names()
        val choices = here.map { Choice(it, true) } + (shipped.names() - here).map { Choice(it, false) }
        shown.value = Screen.Choosing(choices.sortedBy { it.name }, notice, anyway)
    }

    private suspend fun open(name: String, anyway: Boolean) {
        closeTalk()
        if (name !in bundles.names() && name in shipped.names()) {
            val deliveries = unpack(name, shipped.files(name), bundles) { shipped.open(name, it) }
            brought(deliveries, isDownload = false)
        }
        shown.value = Screen.Opening(name)
        val bundle = withContext(Dispatchers.IO) { Bundle(bundles.of(name)) }
        val needed = bundle.graphBytes + BESIDE_GRAPH_BYTES
        val free = device.availableBytes()
        if (!anyway && needed > free) return chooseAgain(tooLarge(name, needed, free), anyway = name)
        // A runner that nobody waits for any more has to be closed all the same.
        withContext(NonCancellable) {
            writeWhole(opening, name)
            try {
                val runner =
                    withContext(Dispatchers.IO) { Runner(bundle, threads = settings.threads) }
                talk = Talk(name, runner, conversation(name))
            } finally {
                opening.delete()
            }
        }
        settings = settings.copy(bundle = name)
        settings.write(settingsFile)
        show()
    }

    /** Shows how far a bundle has come; its name, at the end. */
    private suspend fun brought(deliveries: Flow<Delivery>, isDownload: Boolean): String {
        var name = ""
        deliveries.conflate().collect {
            shown.value = progress(it, isDownload)
            name = it.bundle
        }
        return name
    }

    private suspend fun answer(text: String) {
        val talk = talk ?: return
        var tokens = 0
        var memory = residentMemory()
        fun look(isAnswering: Boolean, notice: Sentence? = null, unsent: String? = null) {
            if (tokens++ % TOKENS_A_LOOK == 0 || !isAnswering) memory = residentMemory()
            val stats = status(talk.runner.stats, memory)
            shown.value =
                Screen.Talking(talk.name, talk.entries, isAnswering, stats, notice, unsent)
        }
        try {
            talk.ask(text, settings.options()) { look(isAnswering = true) }
            val full = talk.runner.stats.finishReason == FinishReason.CONTEXT
            look(isAnswering = false, if (full) fullConversation() else null)
        } catch (err: CancellationException) {
            look(isAnswering = false)
            throw err
        } catch (err: PleexportError) {
            look(isAnswering = false, sentenceOf(err, device, bundles.path), unsent = text)
        }
    }

    private fun show() {
        val talk = talk ?: return
        shown.value = Screen.Talking(talk.name, talk.entries)
    }

    private suspend fun closeTalk() {
        val old = talk ?: return
        talk = null
        withContext(NonCancellable + Dispatchers.IO) { old.close() }
    }

    private fun conversation(name: String) = File(File(files, "conversations"), "$name.json")
}
