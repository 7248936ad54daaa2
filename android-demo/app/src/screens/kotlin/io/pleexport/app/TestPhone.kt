package io.pleexport.app

import android.app.ActivityManager
import android.app.AlertDialog
import android.content.Context
import android.graphics.Bitmap
import android.os.Looper
import android.view.View
import android.view.ViewGroup
import android.widget.EditText
import android.widget.TextView
import com.android.internal.view.menu.MenuItemImpl
import io.pleexport.chat.Chat
import io.pleexport.chat.Screen
import java.io.File
import org.robolectric.Robolectric
import org.robolectric.RuntimeEnvironment
import org.robolectric.Shadows.shadowOf
import org.robolectric.android.controller.ActivityController
import org.robolectric.shadows.ShadowDialog
import org.robolectric.shadows.ShadowPopupMenu

private const val WAIT_MILLIS = 60_000L

/** The bundle that came with the app. */
internal const val BUNDLE = "gemma4-kjv"

/** The likeliest words, so that an answer is always the same. */
internal const val LIKELIEST = """{"temperature": 0, "max_new_tokens": 64}"""

/** The app on a phone that a test looks at and presses. */
internal class TestPhone(memoryBytes: Long = 8_000_000_000, settings: String = LIKELIEST) :
    AutoCloseable {
    val app = RuntimeEnvironment.getApplication() as ChatApplication

    init {
        val manager = app.getSystemService(Context.ACTIVITY_SERVICE) as ActivityManager
        val memory = ActivityManager.MemoryInfo().apply { availMem = memoryBytes }
        shadowOf(manager).setMemoryInfo(memory)
        File(app.filesDir, "settings.json").writeText(settings)
    }

    val controller: ActivityController<ChatActivity> =
        Robolectric.buildActivity(ChatActivity::class.java).setup()

    val chat: Chat
        get() = app.chat

    val activity: ChatActivity
        get() = controller.get()

    val content: ViewGroup
        get() = activity.findViewById(android.R.id.content)

    val dialog: AlertDialog
        get() = ShadowDialog.getLatestDialog() as AlertDialog

    fun talking() = chat.screen.value as Screen.Talking

    fun idle() = shadowOf(Looper.getMainLooper()).idle()

    /** Presses `⋮`, and what opens there. */
    fun chooseFromMenu(item: String) {
        press("More")
        val menu = ShadowPopupMenu.getLatestPopupMenu().menu
        val found = (0 until menu.size()).map(menu::getItem).single { it.title == item }
        check((found as MenuItemImpl).invoke()) { "`$item` takes no press" }
        idle()
    }

    /** Waits until something can be seen. */
    fun <T : Any> wait(what: String, look: () -> T?): T {
        val end = System.currentTimeMillis() + WAIT_MILLIS
        while (true) {
            idle()
            look()?.let {
                return it
            }
            if (System.currentTimeMillis() > end) {
                error("no $what; there is ${chat.screen.value} with ${content.texts()}")
            }
            Thread.sleep(5)
        }
    }

    /** Waits until the chat and its screen are there. */
    inline fun <reified S : Screen> waitFor(crossinline enough: (S) -> Boolean = { true }): S =
        wait("${S::class.simpleName}") {
            (chat.screen.value as? S)?.takeIf { enough(it) }?.also { idle() }
        }

    fun press(words: String) {
        val view = wait("button `$words`") { content.labelled(words) }
        check(view.isShown && view.isEnabled && view.performClick()) { "`$words` takes no press" }
        idle()
    }

    fun type(label: String, text: String) {
        val field = wait("field `$label`") { content.labelled(label) as? EditText }
        field.setText(text)
    }

    fun says(words: String): TextView = wait("`$words`") { content.withText(words) }

    /** Everything a person sees, written into a PNG. */
    fun picture(name: String, view: View = activity.window.decorView): Bitmap {
        idle()
        val bitmap = view.drawn()
        val file = File(System.getProperty("screens.pictures"), "$name.png")
        file.parentFile!!.mkdirs()
        file.outputStream().use { bitmap.compress(Bitmap.CompressFormat.PNG, 100, it) }
        return bitmap
    }

    override fun close() {
        controller.pause().stop().destroy()
        chat.close()
    }
}

