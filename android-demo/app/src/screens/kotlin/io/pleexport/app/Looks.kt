package io.pleexport.app

import android.graphics.Bitmap
import android.graphics.Canvas
import android.graphics.Color
import android.graphics.Rect
import android.view.View
import android.view.ViewGroup
import android.widget.Button
import android.widget.EditText
import android.widget.ProgressBar
import android.widget.SeekBar
import android.widget.TextView
import kotlin.math.max
import kotlin.math.min
import kotlin.math.pow
import org.junit.Assert.assertEquals

/** What a person's finger hits, and the contrast that WCAG 2 asks for (AA). */
private const val LEAST_TOUCH_DP = 48
private const val LEAST_CONTRAST = 4.5

internal fun View.all(): Sequence<View> =
    sequenceOf(this) +
        if (this is ViewGroup) (0 until childCount).asSequence().flatMap { getChildAt(it).all() }
        else emptySequence()

internal fun View.shown() = all().filter { it.isShown }

internal fun View.texts() = shown().filterIsInstance<TextView>().map { "${it.text}" }.toList()

/** What TalkBack calls a view. */
internal fun View.label(): String? {
    val text = this as? TextView
    return listOf(contentDescription, text?.text, text?.hint).firstOrNull { !it.isNullOrBlank() }?.toString()
}

/** What can be pressed or typed into. */
internal fun View.labelled(words: String): View? =
    shown().firstOrNull { it.takesTouch() && it.label() == words }

internal fun View.field(words: String) = labelled(words) as EditText

internal fun View.withText(words: String): TextView? =
    shown().filterIsInstance<TextView>().firstOrNull { words in it.text }

internal fun View.answers(): List<TextView> =
    shown().filterIsInstance<TextView>().filter { it.label()?.startsWith("Answer: ") == true }.toList()

internal inline fun <reified V : View> View.one(): V = shown().filterIsInstance<V>().single()

internal fun View.bar(): ProgressBar = one()

private fun View.takesTouch() = this is Button || this is EditText || this is SeekBar

internal fun View.place() = Rect().also { getGlobalVisibleRect(it) }

/** That everything here can be hit, has a name, and can be read whole. */
internal fun View.check() {
    val picture = rootView.drawn()
    val faults = shown().filter { it.place().height() == it.height }.flatMap { it.faults(picture) }
    assertEquals(emptyList<String>(), faults.toList())
}

internal fun View.drawn(): Bitmap =
    Bitmap.createBitmap(width, height, Bitmap.Config.ARGB_8888).also { draw(Canvas(it)) }

private fun View.faults(picture: Bitmap): List<String> {
    val faults = ArrayList<String>()
    val name = "${javaClass.simpleName} `${label()}`"
    val least = (LEAST_TOUCH_DP * resources.displayMetrics.density).toInt()
    val takesTouch = takesTouch()
    if (takesTouch && label() == null) faults += "$name has no name"
    if (takesTouch && (height < least || (this is Button && width < least))) {
        faults += "$name is too small: $width by $height"
    }
    if (this is TextView && text.isNotEmpty()) faults += faultsOfText(picture).map { "$name $it" }
    return faults
}

private fun TextView.faultsOfText(picture: Bitmap): List<String> {
    val faults = ArrayList<String>()
    val lines = layout ?: return listOf("has no layout")
    val room = height - compoundPaddingTop - compoundPaddingBottom
    if (lines.height > room && maxLines == Int.MAX_VALUE) faults += "is cut off: ${lines.height} in $room"
    // A word that is broken in two, where nothing but a letter stands beside the break.
    for (line in 0 until lines.lineCount - 1) {
        val end = lines.getLineEnd(line)
        if (text[end - 1].isLetterOrDigit() && text[end].isLetterOrDigit()) faults += "breaks a word, so it is cut off"
    }
    val place = Rect().also { getHitRect(it) }
    if (place.left < 0 || place.right > (parent as View).width) faults += "is cut off at a side"
    if (isEnabled) {
        val behind = mostOf(picture)
        val contrast = contrast(over(currentTextColor, behind), behind)
        if (contrast < LEAST_CONTRAST) faults += "has a contrast of %.1f".format(contrast)
    }
    return faults
}

/** The color that most of a view has, in a picture of all. */
private fun View.mostOf(picture: Bitmap): Int {
    val at = IntArray(2).also { getLocationInWindow(it) }
    val (right, bottom) = min(at[0] + width, picture.width) to min(at[1] + height, picture.height)
    val counts = HashMap<Int, Int>()
    for (y in max(0, at[1]) until bottom step 2) {
        for (x in max(0, at[0]) until right step 2) counts.merge(picture.getPixel(x, y), 1, Int::plus)
    }
    return counts.maxBy { it.value }.key
}

private fun over(front: Int, back: Int): Int {
    val alpha = Color.alpha(front) / 255.0
    fun mix(of: (Int) -> Int) = (of(front) * alpha + of(back) * (1 - alpha)).toInt()
    return Color.rgb(mix(Color::red), mix(Color::green), mix(Color::blue))
}

/** Relative luminance, as WCAG 2 defines it. */
internal fun brightness(color: Int): Double {
    fun part(value: Int): Double {
        val share = value / 255.0
        return if (share <= 0.03928) share / 12.92 else ((share + 0.055) / 1.055).pow(2.4)
    }
    return 0.2126 * part(Color.red(color)) + 0.7152 * part(Color.green(color)) + 0.0722 * part(Color.blue(color))
}

private fun contrast(one: Int, other: Int): Double {
    val (a, b) = brightness(one) to brightness(other)
    return (max(a, b) + 0.05) / (min(a, b) + 0.05)
}
