"""Texts, ids and conversations that the vectors ask about."""
# ruff: noqa: RUF001

from __future__ import annotations

TEXTS = (
    "",
    " ",
    "  ",
    "\n",
    "\t\r\n",
    "a",
    " a",
    "  a",
    "a ",
    "ab ab  ab",
    "Hello, world!",
    "can't won't I'm you'll 3.14 1,000",
    "é è e\u0301 ß İ ǆ",
    "中文字符，日本語のテキスト",
    "العربية ١٢٣ עברית",
    "😀 👩‍👩‍👧‍👦 🇩🇪",
    "\x00\x01\x7f\x80",
    "\u00a0\u2003\u200b\ufeff|",
    "\ufffd � \uffff \U0010ffff",
    "▁ ▁▁a Ġ Ċ",
    "<bos>a<eos> <pad>b<end>",
    "<bos >< bos><bos<bos>>",
    "<turn>a<|channel>b<channel|> <think>c</think>",
    "<tool> <wide> x <wide>y",
    "<0x0A> <0xC3><0xA9> <unk>",
    "a" * 60,
    "é" * 20,
    "\n" * 20,
)
# What RWKV's small vocabulary here has pieces for.
WORDS = ("", "the", " the", "then", "and  an", "\n\n\n", "é€", "€é the", "a12 +3", "thing")
# A prompt, the text behind it, and how many ids of this belong to the prompt too.
ID_SEQUENCES = (
    ("", "ab é€ b", 0),
    ("ab", " ab", 0),
    ("a", "é", 1),
    ("a", "€b", 1),
    ("a", "€b", 2),
    ("", "€", 0),
    ("", "a<eos>b<bos> a", 0),
    ("<bos>", " a", 0),
    ("", "ab\n\n  the and", 0),
)
# A text, and what ends it.
STOPS: tuple[tuple[str, list[str]], ...] = (
    ("ab ab ab", ["b a"]),
    ("ab ab ab", ["x", "ab a"]),
    ("aaab", ["aab"]),
    ("a aab", ["ab", "aa"]),
    ("a b", ["bb"]),
    ("aé€b", ["é€"]),
    ("ab", []),
    ("ab\n\nab", ["\n\n"]),
)


def _talk(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    roles = ("user", "assistant") * len(contents)
    said = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]
    return said if system is None else [{"role": "system", "content": system}, *said]


TALKS = (
    _talk("a"),
    _talk("  a b\n"),
    _talk("a", "b", "é"),
    _talk("a", system="ab"),
    _talk(" a", " b ", "a ", " ab", "b", system=" a\n"),
    _talk(""),
    _talk("a", "", "b"),
    _talk("a", system=""),
    _talk("a", "<think>b</think>\n\nab", "b"),
    _talk("a", "b</think>a</think> b", "<think>a</think>"),
    _talk("a", "<|channel>thought\nb<channel|> ab <|channel>a", "<|channel>a<channel|>b"),
    _talk("<bos><eos><turn>a", "<end_of_turn>", "<start_of_turn>"),
    _talk("中文 😀\u3000", "\u00a0a\u2003", "\ta\x1f"),
    _talk("a", "b"),
    [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}],
    [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}],
    [],
    [{"role": "tool", "content": "a"}],
    [{"role": "user", "content": None}],
    [{"role": "user", "content": "a", "tool_calls": []}],
)
