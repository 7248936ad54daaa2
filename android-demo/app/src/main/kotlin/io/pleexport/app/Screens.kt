package io.pleexport.app

import android.annotation.SuppressLint
import android.content.Context
import android.text.InputType
import android.text.TextUtils
import android.view.Gravity
import android.view.View
import android.view.inputmethod.EditorInfo
import android.widget.Button
import android.widget.EditText
import android.widget.LinearLayout
import android.widget.LinearLayout.LayoutParams
import android.widget.PopupMenu
import android.widget.ProgressBar
import android.widget.ScrollView
import android.widget.TextView
import io.pleexport.chat.Chat
import io.pleexport.chat.Choice
import io.pleexport.chat.Entry
import io.pleexport.chat.Screen

// Fixed, so that Android keeps what was typed when the device is turned.
private const val MESSAGE_ID = 1001
private const val ADDRESS_ID = 1002
private const val STEPS = 1000

/** Which bundle to talk to, or where to get one. */
@SuppressLint("ViewConstructor")
internal class ChoosingView(
    context: Context,
    private val chat: Chat,
    private val remove: (String) -> Unit,
) : ScrollView(context) {
    private val content = context.column()
    private val address =
        EditText(context).apply {
            id = ADDRESS_ID
            minimumHeight = context.dp(TOUCH_DP)
            hint = "https://…/index.json"
            contentDescription = "Address of the package's index.json"
            inputType = InputType.TYPE_CLASS_TEXT or InputType.TYPE_TEXT_VARIATION_URI
            imeOptions = EditorInfo.IME_ACTION_GO
            setOnEditorActionListener { _, _, _ -> true.also { chat.bring(text.toString()) } }
        }

    init {
        addView(content)
    }

    fun show(screen: Screen.Choosing) {
        content.removeAllViews()
        screen.notice?.let { content.below(context.notice(it)) }
        screen.anyway?.let { name ->
            content.below(context.button("Open it anyway") { chat.chooseAnyway(name) })
        }
        content.below(context.heading("Choose a model"))
        if (screen.choices.isEmpty()) {
            content.below(context.text("There is none on this device yet."))
        }
        screen.choices.forEach { content.below(line(it)) }
        content.below(context.heading("Download one"))
        content.below(context.text("The address of a package that `pleexport package` wrote:"))
        content.below(address)
        content.below(context.button("Download") { chat.bring(address.text.toString()) })
    }

    private fun line(choice: Choice): View {
        val line = context.row()
        val words = if (choice.isHere) choice.name else "${choice.name} (came with the app)"
        val open = context.button(words) { chat.choose(choice.name) }
        open.contentDescription = "Talk to $words"
        line.beside(open, weight = 1f)
        if (choice.isHere) {
            val button = context.button("Remove") { remove(choice.name) }
            button.contentDescription = "Remove ${choice.name}"
            line.beside(button)
        }
        return line
    }
}

/** A bundle comes, or is being opened. */
@SuppressLint("ViewConstructor")
internal class WaitingView(context: Context, chat: Chat) : LinearLayout(context) {
    private val words = context.text(size = 18f)
    private val bar =
        ProgressBar(context, null, android.R.attr.progressBarStyleHorizontal).apply { max = STEPS }
    private val cancel = context.button("Cancel") { chat.stop() }

    init {
        orientation = VERTICAL
        gravity = Gravity.CENTER_VERTICAL
        words.accessibilityLiveRegion = ACCESSIBILITY_LIVE_REGION_POLITE
        below(words)
        below(bar)
        below(cancel)
    }

    fun show(screen: Screen.Bringing) {
        words.text = screen.text
        bar.isIndeterminate = screen.thousandths == 0
        bar.progress = screen.thousandths
        cancel.visibility = VISIBLE
    }

    fun show(screen: Screen.Opening) {
        words.text = if (screen.name.isEmpty()) "One moment …" else "Opening `${screen.name}` …"
        bar.isIndeterminate = true
        cancel.visibility = GONE
    }
}

/** A conversation. */
@SuppressLint("ViewConstructor")
internal class TalkingView(
    context: Context,
    private val chat: Chat,
    settings: () -> Unit,
) : LinearLayout(context) {
    private val title = context.heading("")
    private val said = context.column()
    private val scroll = ScrollView(context).apply { addView(said) }
    private val notices = context.column()
    private val status = context.text(size = 13f)
    private val message =
        EditText(context).apply {
            id = MESSAGE_ID
            minimumHeight = context.dp(TOUCH_DP)
            hint = "Message"
            contentDescription = "Message"
            maxLines = 5
            inputType =
                InputType.TYPE_CLASS_TEXT or
                    InputType.TYPE_TEXT_FLAG_MULTI_LINE or
                    InputType.TYPE_TEXT_FLAG_CAP_SENTENCES
        }
    private val send: Button = context.button("Send", ::press)
    private var isAnswering = false
    private var entries = emptyList<Entry>()
    private var unsent: String? = null

    init {
        orientation = VERTICAL
        title.setSingleLine()
        title.ellipsize = TextUtils.TruncateAt.MIDDLE
        val top = context.row()
        top.beside(title, weight = 1f)
        top.beside(context.button("New") { chat.beginAnew() }.described("New conversation"))
        top.beside(menuButton(settings))
        below(top)
        below(scroll, weight = 1f)
        below(notices)
        status.setTextColor(context.themeColor(android.R.attr.textColorSecondary))
        below(status)
        val bottom = context.row()
        bottom.beside(message, weight = 1f)
        bottom.beside(send)
        below(bottom)
    }

    fun show(screen: Screen.Talking) {
        title.text = screen.name
        // Pieces would be read aloud over each other.
        val ended = isAnswering && !screen.isAnswering
        if (ended) screen.entries.lastOrNull()?.let { announceForAccessibility(it.text) }
        isAnswering = screen.isAnswering
        send.text = if (isAnswering) "Stop" else "Send"
        status.text = screen.status
        notices.removeAllViews()
        screen.notice?.let { notices.below(context.notice(it)) }
        show(screen.entries)
        // What could not be answered is given back once.
        if (screen.unsent != unsent) {
            unsent = screen.unsent
            if (unsent != null && message.text.isEmpty()) message.setText(unsent)
        }
    }

    /** Changes the last one, which grows, and adds those that are new. */
    private fun show(now: List<Entry>) {
        val atEnd = scroll.scrollY + scroll.height >= said.height - context.dp(48)
        val finished = entries.dropLast(1)
        val same = now.size >= entries.size && now.take(finished.size) == finished
        if (!same) said.removeAllViews()
        for (i in maxOf(0, said.childCount - 1) until now.size) {
            val bubble = said.getChildAt(i) as? TextView ?: bubble(now[i])
            val text = now[i].text.trim()
            if (bubble.text.toString() != text) {
                bubble.text = text
                bubble.contentDescription = if (now[i].isMine) "You: $text" else "Answer: $text"
            }
        }
        entries = now
        if (atEnd) scroll.post { scroll.fullScroll(FOCUS_DOWN) }
    }

    private fun bubble(entry: Entry): TextView {
        val bubble = context.text()
        val room = context.dp(12)
        bubble.setPadding(room, room, room, room)
        bubble.setTextIsSelectable(true)
        val color = if (entry.isMine) android.R.attr.colorAccent else android.R.attr.textColorSecondary
        bubble.background = rounded(dim(context.themeColor(color)), room)
        val place = LayoutParams(LayoutParams.WRAP_CONTENT, LayoutParams.WRAP_CONTENT)
        place.gravity = if (entry.isMine) Gravity.END else Gravity.START
        place.setMargins(0, room / 2, 0, room / 2)
        if (entry.isMine) place.marginStart = 4 * room else place.marginEnd = 4 * room
        said.addView(bubble, place)
        return bubble
    }

    /** What is seldom wanted, so that large letters leave room for the name. */
    private fun menuButton(settings: () -> Unit): Button {
        val button = context.button("⋮") {}.described("More")
        val menu = PopupMenu(context, button)
        menu.menu.add("Models").setOnMenuItemClickListener { true.also { chat.leave() } }
        menu.menu.add("Settings").setOnMenuItemClickListener { true.also { settings() } }
        button.minWidth = context.dp(TOUCH_DP)
        button.minimumWidth = button.minWidth
        button.setOnClickListener { menu.show() }
        return button
    }

    private fun press() {
        if (isAnswering) {
            chat.stop()
        } else {
            chat.say(message.text.toString())
            message.text.clear()
        }
    }
}

private fun Button.described(words: String): Button = apply { contentDescription = words }
