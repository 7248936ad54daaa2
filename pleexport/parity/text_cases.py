"""Texts, conversations and ids that are hard to get right; data, and what makes more of it."""
# ruff: noqa: RUF001

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

TEXTS = (
    "",
    " ",
    "  ",
    "\n",
    "\n\n\n",
    "\t",
    "\r\n",
    "a",
    " a",
    "a ",
    "  a  b   c    d",
    "Hello, world!",
    "HELLO wOrLd's can't won't I'm you'll they've we're",
    "1 12 123 1234 12345 3.14159 1,000,000 0x1F 1e-10 ½ ² ③",
    "def f(x):\n\treturn x ** 2  # why?\n\n\n    if x != 0 and y <= 1: pass",
    "a.b,c;d:e!f?g-h_i(j)[k]{l}<m>/n\\o|p~q@r#s$t%u^v&w*x+y=z`\"'",
    "https://example.org/a?b=c&d=e#f user@example.org C:\\temp\\x.txt",
    "Füße, naïve, Ærøskøbing, Łódź, İstanbul, ıiIİ, ǆ ǅ Ǆ, ﬁ ﬂ",
    "Ελληνικά Σίσυφος, русский язык, ქართული, հայերեն",
    "العربية ١٢٣, עִבְרִית, فارسی, اردو \u200f\u200e",
    "हिन्दी, বাংলা, தமிழ், తెలుగు, ไทย, မြန်မာ, ខ្មែរ, བོད་ཡིག, አማርኛ",
    "中文字符，日本語のテキスト、ひらがな カタカナ ｶﾀｶﾅ，한국어 조선말 \u1112\u1161\u11ab",
    "𝒜𝓁𝓅𝒽𝒶 𝔣𝔯𝔞𝔨𝔱𝔲𝔯 𐍈 𒀀 \U00020000 \U0010ffff",
    "😀 👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇩🇪 ☺️ ❤",
    "e\u0301 \u00e9 a\u0308\u0323 \u1e9b\u0323 q\u0307\u0323 Z̸̢̛͎͇̖͈̱͚",
    "\u00a0\u1680\u2000\u2003\u2009\u200a\u202f\u205f\u3000|",
    "\u200b\u200c\u200d\u2060\ufeff\u00ad\u061c\u2028\u2029\u0085|",
    "\x00\x01\x07\x08\x0b\x0c\x1b\x1f\x7f\x80\x9f",
    "\ufffd \ufffe \uffff \ue000 \ufdd0",
    "▁ ▁▁ a▁b Ġ Ċ ĠĠ âĢĶ </w> ## ##a @@",
    "<0x0A> <0xC3><0xA9> <0xFF> <0x> <unk> <s> </s> <pad> [CLS] [MASK] <|endoftext|>",
    "<bos><start_of_turn>user\nhi<end_of_turn>\n<think>hm</think> <|channel>thought\n<channel|>",
    "<b >< bos> <bos<bos>> &lt;bos&gt; <BOS>",
    "a" * 1000,
    " " * 300,
    "\n" * 120,
    "ab" * 400,
    "na " * 200,
    "!?" * 100,
    "é" * 200,
    "我" * 200,
    "😀" * 60,
    "0" * 150,
    "Lorem ipsum dolor sit amet, consectetur adipiscing elit. " * 12,
)

_HELLO: dict[str, Any] = {"role": "user", "content": "Hello!"}
_ANSWER: dict[str, Any] = {"role": "assistant", "content": "Hi. What can I do?"}
_SYSTEM: dict[str, Any] = {"role": "system", "content": "You are terse.  "}
_NEXT: dict[str, Any] = {
    "role": "user",
    "content": '  Tell me about Ærø,\n\n please: 1 < 2 & "q". ',
}
_THOUGHT: dict[str, Any] = {
    "role": "assistant",
    "content": "<think>\nEasy.\n</think>\n\nFine.",
}
_MARKED: dict[str, Any] = {
    "role": "assistant",
    "content": "<|channel>thought\nEasy.<channel|>Fine.",
}
_REASONED: dict[str, Any] = {
    "role": "assistant",
    "content": "Fine.",
    "reasoning_content": "Easy.",
}
_PARTS: dict[str, Any] = {
    "role": "user",
    "content": [{"type": "text", "text": "One."}, {"type": "text", "text": "Two."}],
}
_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": 'The weather at a place, in "words".',
        "parameters": {
            "type": "object",
            "properties": {
                "place": {"type": "string", "description": "Where: Ærø & more", "enum": ["a", "b"]},
                "days": {"type": "integer", "default": 3},
            },
            "required": ["place"],
        },
    },
}
_CALL: dict[str, Any] = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {
            "type": "function",
            "id": "call00001",
            "function": {"name": "weather", "arguments": {"place": "Ærø", "days": 2}},
        }
    ],
}
_RESULT: dict[str, Any] = {
    "role": "tool",
    "name": "weather",
    "tool_call_id": "call00001",
    "content": '{"sky": "blue"}',
}

# Name, messages, and the arguments of the template.
CONVERSATIONS: tuple[tuple[str, list[dict[str, Any]], dict[str, Any]], ...] = (
    ("one turn", [_HELLO], {"add_generation_prompt": True}),
    ("one turn, closed", [_HELLO], {}),
    ("several turns", [_HELLO, _ANSWER, _NEXT], {"add_generation_prompt": True}),
    ("system", [_SYSTEM, _HELLO], {"add_generation_prompt": True}),
    ("system, several turns", [_SYSTEM, _HELLO, _ANSWER, _NEXT], {"add_generation_prompt": True}),
    ("assistant last", [_HELLO, _ANSWER], {}),
    ("assistant goes on", [_HELLO, _ANSWER], {"continue_final_message": True}),
    ("empty message", [{"role": "user", "content": ""}], {"add_generation_prompt": True}),
    ("parts", [_PARTS], {"add_generation_prompt": True}),
    ("thinking on", [_HELLO], {"add_generation_prompt": True, "enable_thinking": True}),
    ("thinking off", [_HELLO], {"add_generation_prompt": True, "enable_thinking": False}),
    (
        "thinking on, system",
        [_SYSTEM, _HELLO],
        {"add_generation_prompt": True, "enable_thinking": True},
    ),
    ("thoughts in tags", [_HELLO, _THOUGHT, _NEXT], {"add_generation_prompt": True}),
    ("thoughts in a channel", [_HELLO, _MARKED, _NEXT], {"add_generation_prompt": True}),
    ("thoughts apart", [_HELLO, _REASONED, _NEXT], {"add_generation_prompt": True}),
    ("tools", [_HELLO], {"add_generation_prompt": True, "tools": [_TOOL]}),
    ("tools, system", [_SYSTEM, _HELLO], {"add_generation_prompt": True, "tools": [_TOOL]}),
    (
        "a tool called",
        [_HELLO, _CALL, _RESULT],
        {"add_generation_prompt": True, "tools": [_TOOL]},
    ),
    (
        "a tool called, answered",
        [_HELLO, _CALL, _RESULT, _ANSWER, _NEXT],
        {"add_generation_prompt": True, "tools": [_TOOL], "enable_thinking": True},
    ),
    ("no tools", [_HELLO], {"add_generation_prompt": True, "tools": []}),
    (
        "documents",
        [_HELLO],
        {"add_generation_prompt": True, "documents": [{"title": "T", "text": "Once."}]},
    ),
)

_SEQUENCES = 400
_LONGEST = 16


def texts_around(tokens: Sequence[str]) -> Iterator[str]:
    """Every token alone in a text, and all of them together."""
    for token in tokens:
        yield f"a {token} b{token}c"
    yield "".join(tokens)
    yield " ".join(tokens)


def id_sequences(size: int, pools: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Ids as a model might write them, sensible or not; always the same.

    Args:
        size: ids are below it.
        pools: ids that half of the choices are made among, for they are rare otherwise.
    """
    generator = random.Random(0)
    pools = [pool for pool in pools if pool]
    for _ in range(_SEQUENCES):
        chosen = generator.choice(pools) if pools and generator.random() < 0.5 else range(size)
        pair = (chosen, range(size))
        length = generator.randrange(1, _LONGEST)
        yield [generator.choice(pair[generator.random() < 0.3]) for _ in range(length)]
