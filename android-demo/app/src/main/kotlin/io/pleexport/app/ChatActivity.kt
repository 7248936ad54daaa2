package io.pleexport.app

import android.app.Activity
import android.app.AlertDialog
import android.os.Bundle
import android.os.Handler
import android.os.Looper
import android.view.View
import android.view.WindowManager
import android.widget.FrameLayout
import io.pleexport.chat.Chat
import io.pleexport.chat.Screen
import java.util.concurrent.Executor
import kotlinx.coroutines.CoroutineScope
import kotlinx.coroutines.Job
import kotlinx.coroutines.asCoroutineDispatcher
import kotlinx.coroutines.launch

private const val ROOM_DP = 16

/** Shows what the chat says, and tells it what is pressed. */
class ChatActivity : Activity() {
    private val chat: Chat
        get() = (application as ChatApplication).chat

    private val handler = Handler(Looper.getMainLooper())
    private val scope = CoroutineScope(Executor { handler.post(it) }.asCoroutineDispatcher())
    private var watching: Job? = null
    private lateinit var root: FrameLayout

    override fun onCreate(state: Bundle?) {
        super.onCreate(state)
        root = FrameLayout(this)
        root.keepClear(dp(ROOM_DP))
        setContentView(root)
        // The view that holds what was typed has to be there before Android puts it back.
        show(chat.screen.value)
    }

    override fun onStart() {
        super.onStart()
        watching = scope.launch { chat.screen.collect(::show) }
    }

    override fun onStop() {
        watching?.cancel()
        super.onStop()
    }

    private fun show(screen: Screen) {
        keepAwake(screen is Screen.Bringing)
        when (screen) {
            is Screen.Choosing -> view { ChoosingView(this, chat, ::askAndRemove) }.show(screen)
            is Screen.Bringing -> view { WaitingView(this, chat) }.show(screen)
            is Screen.Opening -> view { WaitingView(this, chat) }.show(screen)
            is Screen.Talking -> view { TalkingView(this, chat, ::showSettings) }.show(screen)
        }
    }

    /** The view that is shown if it is of that kind, else a new one. */
    private inline fun <reified V : View> view(make: () -> V): V {
        (root.getChildAt(0) as? V)?.let {
            return it
        }
        root.removeAllViews()
        return make().also(root::addView)
    }

    /** A download stops when the device sleeps. */
    private fun keepAwake(isBringing: Boolean) {
        val flag = WindowManager.LayoutParams.FLAG_KEEP_SCREEN_ON
        if (isBringing) window.addFlags(flag) else window.clearFlags(flag)
    }

    private fun askAndRemove(name: String) {
        AlertDialog.Builder(this)
            .setMessage("Remove `$name` and its conversation from this device?")
            .setPositiveButton("Remove") { _, _ -> chat.remove(name) }
            .setNegativeButton("Keep", null)
            .show()
    }

    private fun showSettings() {
        val form = SettingsForm(this, chat.settings)
        AlertDialog.Builder(this)
            .setTitle("Settings")
            .setView(form)
            .setPositiveButton("Save") { _, _ -> chat.change(form.settings()) }
            .setNegativeButton("Cancel", null)
            .show()
    }
}
