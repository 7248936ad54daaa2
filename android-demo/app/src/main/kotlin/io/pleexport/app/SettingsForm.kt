package io.pleexport.app

import android.annotation.SuppressLint
import android.content.Context
import android.widget.CheckBox
import android.widget.ScrollView
import android.widget.SeekBar
import android.widget.TextView
import io.pleexport.chat.Settings

/** Temperatures have one decimal. */
private const val TENTHS = 10
private const val TOKENS_A_STEP = 64

/** What can be set. */
@SuppressLint("ViewConstructor")
internal class SettingsForm(context: Context, private val before: Settings) : ScrollView(context) {
    private val content = context.column()
    private val fromModel = CheckBox(context)
    private val temperature: SeekBar
    private val tokens: SeekBar
    private val threads: SeekBar

    init {
        val room = context.dp(24)
        content.setPadding(room, room / 2, room, room / 2)
        fromModel.text = "Temperature as the model's maker set it"
        fromModel.minHeight = context.dp(TOUCH_DP)
        fromModel.isChecked = before.temperature == null
        content.below(fromModel)
        val most = (Settings.MOST_TEMPERATURE * TENTHS).toInt()
        val now = ((before.temperature ?: 1.0) * TENTHS).toInt()
        temperature =
            slider("Temperature", 0, most, now) {
                if (it == 0) "the likeliest word each time" else "${it / TENTHS.toDouble()}"
            }
        temperature.isEnabled = !fromModel.isChecked
        fromModel.setOnCheckedChangeListener { _, checked -> temperature.isEnabled = !checked }
        val steps = Settings.MOST_NEW_TOKENS / TOKENS_A_STEP
        tokens =
            slider(
                "Length of an answer",
                1,
                steps,
                before.maxNewTokens / TOKENS_A_STEP,
            ) {
                "up to ${it * TOKENS_A_STEP} tokens"
            }
        val cores = Runtime.getRuntime().availableProcessors()
        threads =
            slider(
                "Threads",
                1,
                cores,
                if (before.threads == 0) cores else before.threads,
            ) {
                "$it of $cores cores"
            }
        addView(content)
    }

    /** What is set now. */
    fun settings(): Settings =
        before.copy(
            temperature =
                if (fromModel.isChecked) null else temperature.progress / TENTHS.toDouble(),
            maxNewTokens = (tokens.progress + 1) * TOKENS_A_STEP,
            threads = threads.progress + 1,
        )

    /** A slider begins at 0, so that what it means is `least` more. */
    private fun slider(
        name: String,
        least: Int,
        most: Int,
        now: Int,
        words: (Int) -> String,
    ): SeekBar {
        val label: TextView = context.text()
        val slider = SeekBar(context)
        fun tell() {
            label.text = "$name: ${words(slider.progress + least)}"
            slider.contentDescription = label.text
        }
        slider.max = most - least
        slider.progress = now.coerceIn(least, most) - least
        slider.setOnSeekBarChangeListener(
            object : SeekBar.OnSeekBarChangeListener {
                override fun onProgressChanged(bar: SeekBar, value: Int, byPerson: Boolean) = tell()

                override fun onStartTrackingTouch(bar: SeekBar) = Unit

                override fun onStopTrackingTouch(bar: SeekBar) = Unit
            }
        )
        tell()
        content.below(label)
        content.addView(slider, LayoutParams(LayoutParams.MATCH_PARENT, context.dp(TOUCH_DP)))
        return slider
    }
}
