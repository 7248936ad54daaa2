package io.pleexport

import org.junit.jupiter.api.Assertions.assertEquals
import org.junit.jupiter.api.Assertions.assertTrue
import org.junit.jupiter.api.Test

class ChatFormatTest {
    private fun format(text: String) = chatFormat(parseJson(text), "$")

    private val plain =
        """{"previous": "start", "next": "user", "text": "<u>", "trim_next": " "},
        {"previous": "user", "next": "answer", "text": "</u><a>", "trim_previous": " \n"},
        {"previous": "user", "next": "assistant", "text": "</u><a>"},
        {"previous": "assistant", "next": "user", "text": "</a><u>"},
        {"previous": "start", "next": "system", "text": "<s>"},
        {"previous": "system", "next": "user", "text": "</s><u>"}"""

    @Test
    fun `messages stand between joints, trimmed`() {
        val format = format("""{"joints": [$plain]}""")
        assertEquals("<u>Hi</u><a>", format.render(listOf(Message("user", "  Hi  "))))
        val turns =
            listOf(
                Message("system", "S"),
                Message("user", "a"),
                Message("assistant", " b "),
                Message("user", "c\n"),
            )
        assertEquals("<s>S</s><u>a</u><a> b </a><u>c</u><a>", format.render(turns))
    }

    @Test
    fun `thoughts are cut, and thinking has joints of its own`() {
        val format =
            format(
                """{"joints": [$plain], "thinking_on": [{"previous": "user", "next": "answer", "text": "</u><a><think>"}],
            "thoughts": {"open": "<t>", "close": "</t>", "trim_start": " "}}"""
            )
        val turns =
            listOf(
                Message("user", "a"),
                Message("assistant", "x<t>no</t> yes<t>no</t>"),
                Message("user", "b"),
            )
        assertEquals(
            "<u>a</u><a>x yes</a><u>b</u><a><think>",
            format.render(turns, thinking = true),
        )
        val all = Thoughts(null, "</t>", " ", "")
        assertEquals("yes", all.cut("no</t>no</t> yes"))
        assertEquals(" yes", all.cut(" yes"))
    }

    @Test
    fun `the system's message moves before the user's last`() {
        val format =
            format(
                """{"joints": [$plain, {"previous": "assistant", "next": "system", "text": "</a><s>"}],
            "system_moves": true}"""
            )
        val turns =
            listOf(
                Message("system", "S"),
                Message("user", "a"),
                Message("assistant", "b"),
                Message("user", "c"),
            )
        assertEquals("<u>a</u><a>b</a><s>S</s><u>c</u><a>", format.render(turns))
        assertTrue(
            "after another" in refusal<InputError> { format.render(turns.drop(1) + turns[0]) }
        )
    }

    @Test
    fun `what has no place is refused`() {
        val format = format("""{"joints": [$plain], "need_text": ["user"]}""")
        assertEquals(
            "the bundle's chat format has no place for a message of `assistant` at the beginning",
            refusal<InputError> { format.render(listOf(Message("assistant", "a"))) },
        )
        assertTrue(
            "empty message of `user`" in
                refusal<InputError> { format.render(listOf(Message("user", " "))) }
        )
        assertTrue(
            "an answer at the beginning" in refusal<InputError> { format.render(emptyList()) }
        )
        assertTrue(
            "knows no role `tool`" in
                refusal<InputError> { format.render(listOf(Message("tool", "a"))) }
        )
        assertEquals(
            "`joints` has two joints from `start` to `user`",
            format("""{"joints": [$plain, {"previous": "start", "next": "user", "text": ""}]}""")
                .contradiction(),
        )
    }
}
