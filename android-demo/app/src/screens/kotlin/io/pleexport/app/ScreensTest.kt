package io.pleexport.app

import android.content.DialogInterface
import android.graphics.Bitmap
import android.graphics.Insets
import android.view.ViewGroup
import android.view.WindowInsets
import android.view.WindowInsets.Type
import android.widget.Button
import android.widget.CheckBox
import android.widget.SeekBar
import io.pleexport.chat.Screen
import io.pleexport.chat.Settings
import java.io.File
import org.junit.After
import org.junit.Assert.assertEquals
import org.junit.Assert.assertFalse
import org.junit.Assert.assertNotNull
import org.junit.Assert.assertNull
import org.junit.Assert.assertTrue
import org.junit.Assert.assertThrows
import org.junit.Test
import org.junit.runner.RunWith
import org.robolectric.RobolectricTestRunner
import org.robolectric.RuntimeEnvironment
import org.robolectric.annotation.Config
import org.robolectric.annotation.GraphicsMode

private const val QUESTION = "In the beginning"

/** The app's own screens, drawn and pressed. What they are drawn as lies in `build/apk/screens`. */
@RunWith(RobolectricTestRunner::class)
@Config(sdk = [35], qualifiers = "w360dp-h740dp-xhdpi")
@GraphicsMode(GraphicsMode.Mode.NATIVE)
class ScreensTest {
    private var opened: TestPhone? = null

    private fun phone(memoryBytes: Long = 8_000_000_000, settings: String = LIKELIEST) =
        TestPhone(memoryBytes, settings).also { opened = it }

    @After
    fun close() {
        opened?.close()
    }

    @Test
    fun `an answer is written piece by piece, and what was said stays when the device is turned`() {
        val phone = phone()
        phone.waitFor<Screen.Talking>()
        phone.picture("empty")
        val lengths = HashSet<Int>()
        phone.content.viewTreeObserver.addOnGlobalLayoutListener {
            phone.content.answers().lastOrNull()?.let { lengths += it.text.length }
        }
        phone.type("Message", QUESTION)
        phone.press("Send")
        assertEquals("", phone.content.field("Message").text.toString())
        phone.waitFor<Screen.Talking> { !it.isAnswering && it.entries.size == 2 }
        assertTrue("seen at $lengths", lengths.size > 3)
        val answer = phone.talking().entries[1].text.trim()
        assertEquals(listOf(answer), phone.content.answers().map { "${it.text}" })
        phone.says("tokens/s")
        phone.picture("light")
        phone.content.check()

        phone.type("Message", "not sent yet")
        RuntimeEnvironment.setQualifiers("+w740dp-h360dp-land")
        phone.controller.recreate()
        assertEquals(listOf(answer), phone.content.answers().map { "${it.text}" })
        assertEquals("not sent yet", phone.content.field("Message").text.toString())
        phone.picture("turned")
        phone.content.check()
    }

    @Test
    fun `an answer is stopped, and a conversation begun anew`() {
        val phone = phone(settings = """{"temperature": 0, "max_new_tokens": 900}""")
        phone.waitFor<Screen.Talking>()
        phone.type("Message", QUESTION)
        phone.press("Send")
        phone.waitFor<Screen.Talking> { it.isAnswering && it.entries.lastOrNull()?.text?.isNotEmpty() == true }
        phone.press("Stop")
        phone.says("Send")
        assertEquals(2, phone.waitFor<Screen.Talking> { !it.isAnswering }.entries.size)
        phone.press("New conversation")
        phone.wait("an empty screen") { phone.content.takeIf { it.answers().isEmpty() } }
        assertNull(phone.content.withText(QUESTION))
    }

    @Test
    fun `what cannot be answered is given back with a sentence`() {
        val phone = phone()
        phone.waitFor<Screen.Talking>()
        val long = "ab ".repeat(5000)
        phone.type("Message", long)
        phone.press("Send")
        phone.says("The conversation is longer than the bundle takes.\nBegin a new one.")
        assertEquals(long, phone.content.field("Message").text.toString())
        phone.picture("too-long")
    }

    @Test
    fun `settings are shown, kept and used`() {
        val phone = phone()
        phone.waitFor<Screen.Talking>()
        phone.chooseFromMenu("Settings")
        val dialog = phone.dialog
        val form = dialog.window!!.decorView
        val bars = form.shown().filterIsInstance<SeekBar>().toList()
        assertEquals(listOf(0, 0), bars.take(2).map { it.progress })
        phone.picture("settings", form)
        form.check()
        form.one<CheckBox>().performClick()
        assertFalse(bars[0].isEnabled)
        bars[1].progress = 1
        assertEquals("Length of an answer: up to 128 tokens", bars[1].contentDescription)
        dialog.getButton(DialogInterface.BUTTON_POSITIVE).performClick()
        phone.wait("settings") { phone.chat.settings.takeIf { it.maxNewTokens == 128 } }
        assertNull(Settings.read(File(phone.app.filesDir, "settings.json")).temperature)
    }

    @Test
    fun `models are chosen and removed`() {
        val phone = phone()
        phone.waitFor<Screen.Talking>()
        phone.chooseFromMenu("Models")
        phone.says("Choose a model")
        phone.picture("choosing")
        phone.content.check()
        phone.press("Remove $BUNDLE")
        phone.dialog.getButton(DialogInterface.BUTTON_NEGATIVE).performClick()
        assertNotNull(phone.content.labelled("Talk to $BUNDLE"))
        phone.press("Remove $BUNDLE")
        phone.dialog.getButton(DialogInterface.BUTTON_POSITIVE).performClick()
        phone.press("Talk to $BUNDLE (came with the app)")
        phone.waitFor<Screen.Talking>()
    }

    @Test
    fun `too little memory is a sentence, and can be tried all the same`() {
        val phone = phone(memoryBytes = 100_000_000)
        phone.says("of memory, and 100 MB are free.\nClose other apps, or choose a smaller bundle.")
        phone.picture("too-little-memory")
        phone.content.check()
        phone.press("Open it anyway")
        phone.waitFor<Screen.Talking>()
    }

    @Test
    fun `letters of twice the size leave everything in its place`() {
        RuntimeEnvironment.setFontScale(2f)
        checkScreens("large")
    }

    @Test
    fun `in the dark`() {
        RuntimeEnvironment.setQualifiers("+night")
        val picture = checkScreens("dark")
        assertTrue(brightness(picture.getPixel(2, picture.height / 2)) < 0.1)
    }

    @Test
    fun `from right to left`() {
        RuntimeEnvironment.setQualifiers("+ar-ldrtl")
        checkScreens("right-to-left")
        val phone = opened!!
        phone.press("Talk to $BUNDLE")
        phone.waitFor<Screen.Talking>()
        val send = phone.content.labelled("Send")!!
        assertTrue(send.place().right <= phone.content.field("Message").place().left)
    }

    @Test
    @Config(sdk = [26])
    fun `on the oldest Android`() {
        checkScreens("android-8")
    }

    @Test
    fun `nothing lies under the system's bars`() {
        val phone = phone()
        phone.waitFor<Screen.Talking>()
        val bars = Insets.of(10, 100, 20, 60)
        val insets = WindowInsets.Builder().setInsets(Type.systemBars(), bars).build()
        val root = phone.content.getChildAt(0)
        root.dispatchApplyWindowInsets(insets)
        phone.controller.get().window.decorView.requestLayout()
        phone.idle()
        val send = phone.content.labelled("Send")!!.place()
        assertTrue("$send", send.bottom <= phone.content.height - 60)
        assertTrue(phone.content.labelled("More")!!.place().top >= 100)
    }

    @Test
    fun `the checks of screens find what is wrong`() {
        val phone = phone()
        phone.waitFor<Screen.Talking>()
        val send = phone.content.labelled("Send") as Button
        phone.content.check()
        fun finds(fault: String, change: () -> Unit) {
            change()
            send.requestLayout()
            phone.idle()
            val said = assertThrows(AssertionError::class.java) { phone.content.check() }.message!!
            assertTrue(said, fault in said)
        }
        finds("has a contrast of") { send.setTextColor(0xFFCCCCCC.toInt()) }
        send.setTextColor(0xFF000000.toInt())
        finds("is too small") { send.layoutParams.height = 40 }
        send.layoutParams.height = ViewGroup.LayoutParams.WRAP_CONTENT
        finds("has no name") { send.text = "" }
        finds("is cut off") { send.text = "Send it all now, please".repeat(9).also { send.maxHeight = 200 } }
    }

    /** All screens with one look of them; the picture of a conversation. */
    private fun checkScreens(name: String): Bitmap {
        val phone = phone()
        phone.waitFor<Screen.Talking>()
        phone.type("Message", QUESTION)
        phone.press("Send")
        phone.waitFor<Screen.Talking> { !it.isAnswering && it.entries.size == 2 }
        phone.says("tokens/s")
        val picture = phone.picture(name)
        phone.content.check()
        phone.chooseFromMenu("Settings")
        phone.picture("$name-settings", phone.dialog.window!!.decorView)
        phone.dialog.window!!.decorView.check()
        phone.dialog.dismiss()
        phone.chooseFromMenu("Models")
        phone.says("Choose a model")
        phone.picture("$name-choosing")
        phone.content.check()
        return picture
    }
}
