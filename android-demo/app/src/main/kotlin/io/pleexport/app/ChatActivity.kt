package io.pleexport.app

import android.Manifest
import android.app.Activity
import android.app.AlertDialog
import android.content.Intent
import android.content.pm.PackageManager
import android.os.Build
import android.os.Bundle
import android.view.View
import android.widget.FrameLayout
import io.pleexport.chat.Chat
import io.pleexport.chat.Screen
import kotlinx.coroutines.Job
import kotlinx.coroutines.launch

private const val ROOM_DP = 16

/** Shows what the chat says, and tells it what is pressed. */
class ChatActivity : Activity() {
    private val chat: Chat
        get() = (application as ChatApplication).chat

    private val scope = mainScope()
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
        (application as ChatApplication).isSeen = true
        watching = scope.launch { chat.screen.collect(::show) }
    }

    override fun onStop() {
        watching?.cancel()
        (application as ChatApplication).isSeen = false
        super.onStop()
    }

    private fun show(screen: Screen) {
        if (screen is Screen.Bringing && screen.isDownload) goOnUnseen()
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

    /** Lets a download go on when the app is left. Where notifications are refused, unseen. */
    private fun goOnUnseen() {
        if (DownloadService.isRunning) return
        val permission = Manifest.permission.POST_NOTIFICATIONS
        val isGranted = checkSelfPermission(permission) == PackageManager.PERMISSION_GRANTED
        if (Build.VERSION.SDK_INT >= 33 && !isGranted) requestPermissions(arrayOf(permission), 0)
        startService(Intent(this, DownloadService::class.java))
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
