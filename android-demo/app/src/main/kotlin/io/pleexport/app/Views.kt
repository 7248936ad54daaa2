package io.pleexport.app

import android.content.Context
import android.graphics.drawable.GradientDrawable
import android.os.Build
import android.view.Gravity
import android.view.View
import android.view.ViewGroup.LayoutParams.MATCH_PARENT
import android.view.ViewGroup.LayoutParams.WRAP_CONTENT
import android.view.WindowInsets
import android.widget.Button
import android.widget.LinearLayout
import android.widget.TextView
import io.pleexport.chat.Sentence

/** Smaller things are hard to hit. */
internal const val TOUCH_DP = 48
private const val DIM = 0x33

internal fun Context.dp(count: Int): Int = (count * resources.displayMetrics.density).toInt()

/** A colour of the theme, which is another one in the dark. */
internal fun Context.themeColor(attribute: Int): Int {
    val values = obtainStyledAttributes(intArrayOf(attribute))
    try {
        return values.getColor(0, 0)
    } finally {
        values.recycle()
    }
}

internal fun Context.column(): LinearLayout =
    LinearLayout(this).apply { orientation = LinearLayout.VERTICAL }

internal fun Context.row(): LinearLayout =
    LinearLayout(this).apply {
        orientation = LinearLayout.HORIZONTAL
        gravity = Gravity.CENTER_VERTICAL
    }

internal fun Context.text(content: String = "", size: Float = 16f): TextView =
    TextView(this).apply {
        text = content
        textSize = size
        setTextColor(themeColor(android.R.attr.textColorPrimary))
    }

internal fun Context.heading(content: String): TextView =
    text(content, 20f).apply {
        if (Build.VERSION.SDK_INT >= 28) isAccessibilityHeading = true
        setPadding(0, dp(12), 0, dp(8))
    }

internal fun Context.button(content: String, press: () -> Unit): Button =
    Button(this).apply {
        text = content
        isAllCaps = false
        minHeight = dp(TOUCH_DP)
        setOnClickListener { press() }
    }

/** What went wrong, which is read aloud as it appears. */
internal fun Context.notice(sentence: Sentence): TextView =
    text("${sentence.text}\n${sentence.hint}").apply {
        val room = dp(12)
        setPadding(room, room, room, room)
        background = rounded(dim(themeColor(android.R.attr.colorAccent)), dp(8))
        setTextIsSelectable(true)
        accessibilityLiveRegion = View.ACCESSIBILITY_LIVE_REGION_POLITE
    }

internal fun rounded(color: Int, radius: Int): GradientDrawable =
    GradientDrawable().apply {
        setColor(color)
        cornerRadius = radius.toFloat()
    }

internal fun dim(color: Int): Int = (color and 0xFFFFFF) or (DIM shl 24)

/** Adds a view that is as wide as this. */
internal fun LinearLayout.below(view: View, weight: Float = 0f) =
    addView(
        view,
        LinearLayout.LayoutParams(MATCH_PARENT, if (weight > 0) 0 else WRAP_CONTENT, weight),
    )

/** Adds a view to the right, which takes a share of the width that is left. */
internal fun LinearLayout.beside(view: View, weight: Float = 0f) =
    addView(
        view,
        LinearLayout.LayoutParams(if (weight > 0) 0 else WRAP_CONTENT, WRAP_CONTENT, weight),
    )

/** Keeps content clear of the system's bars, of cut-outs and of the keyboard. */
internal fun View.keepClear(room: Int) {
    setPadding(room, room / 2, room, room / 2)
    setOnApplyWindowInsetsListener { view, insets ->
        if (Build.VERSION.SDK_INT >= 30) {
            val types =
                WindowInsets.Type.systemBars() or
                    WindowInsets.Type.displayCutout() or
                    WindowInsets.Type.ime()
            val taken = insets.getInsets(types)
            view.setPadding(
                taken.left + room,
                taken.top + room / 2,
                taken.right + room,
                taken.bottom + room / 2,
            )
        } else {
            @Suppress("DEPRECATION")
            view.setPadding(
                insets.systemWindowInsetLeft + room,
                insets.systemWindowInsetTop + room / 2,
                insets.systemWindowInsetRight + room,
                insets.systemWindowInsetBottom + room / 2,
            )
        }
        insets
    }
}
