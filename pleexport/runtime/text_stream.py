"""Ids to text as they come: what was said is never taken back, and all of it is what `decode` says.

A decoder of a tokenizer looks beyond one token. Bytes make a character together, and a run of bytes
that is not UTF-8 as a whole is one replacement character a byte. So text is held back while what
follows could change it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Protocol

# A text ends with this where its last character is not whole yet, or never will be.
_REPLACEMENT = "\ufffd"
# How much of a prompt is looked at for an id that can stand before a text.
_PROMPT_IDS = 8
_ENDINGS = (" n't", " 'm", " 's", " 've", " 're")
# What cleaning changes begins with a space and cannot reach across the end of such a word.
_WORD_END = re.compile(r"[^\s.,?!']{3,}(?=\s)")


class Stream(Protocol):
    """Text of ids as they come."""

    def push(self, token_id: int) -> str:
        """The text that this id completes; "" where what follows may still change it."""
        ...

    def flush(self) -> str:
        """What is still held back when the text ends."""
        ...


class TextStream:
    """The text of ids by a decoder that is known by what it decodes.

    Joined, the pieces are what `decode` makes of all ids. After a prompt they are how its text goes
    on: some decoders drop a space at the beginning of a text, and this is not one. Of a character
    that a prompt has begun, only the ids that follow count.

    Args:
        decode: the text of ids.
        prompt_ids: what the text follows.
        is_byte: whether an id is a byte of a byte-fallback decoder.
        is_silent: whether `decode` passes an id over.
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        prompt_ids: Sequence[int],
        *,
        is_byte: Callable[[int], bool],
        is_silent: Callable[[int], bool],
    ) -> None:
        self._decode, self._is_byte, self._is_silent = decode, is_byte, is_silent
        self._before = self._anchor(prompt_ids)
        self._ids: list[int] = []

    def push(self, token_id: int) -> str:
        """The text that this id completes."""
        if self._is_silent(token_id):
            return ""
        self._ids.append(token_id)
        if self._is_byte(token_id):
            return ""  # the run may go on
        text = self._text()
        if text is None or text.endswith(_REPLACEMENT):
            return ""
        return self._said(text)

    def flush(self) -> str:
        """What is still held back when the text ends."""
        return self._said(self._text() or "")

    def _text(self) -> str | None:
        """What the waiting ids add to those before them; None where that is not settled yet."""
        known, text = self._decode(self._before), self._decode([*self._before, *self._ids])
        return text[len(known) :] if text.startswith(known) else None

    def _said(self, text: str) -> str:
        if text:
            self._before, self._ids = self._ids, []
        return text

    def _anchor(self, prompt_ids: Sequence[int]) -> list[int]:
        """The last id of the prompt that has a text of its own, so that it is not said again."""
        for token_id in reversed(prompt_ids[-_PROMPT_IDS:]):
            if self._is_silent(token_id) or self._is_byte(token_id):
                continue
            text = self._decode([token_id])
            if text and _REPLACEMENT not in text:
                return [token_id]
        return []


class CleanedStream:
    """A stream whose text is cleaned as `clean` does it."""

    def __init__(self, stream: Stream) -> None:
        self._stream, self._held = stream, ""

    def push(self, token_id: int) -> str:
        """See `Stream`."""
        self._held += self._stream.push(token_id)
        ends = [match.end() for match in _WORD_END.finditer(self._held)]
        return self._shown(ends[-1] if ends else 0)

    def flush(self) -> str:
        """See `Stream`."""
        self._held += self._stream.flush()
        return self._shown(len(self._held))

    def _shown(self, length: int) -> str:
        shown, self._held = self._held[:length], self._held[length:]
        return clean(shown)


def clean(text: str) -> str:
    """A text without the spaces that some decoders leave before punctuation.

    Source: `clean_up_tokenization` of transformers; the order counts.
    """
    for mark in ".?!,":
        text = text.replace(f" {mark}", mark)
    text = text.replace(" ' ", "'")
    for ending in _ENDINGS:
        text = text.replace(ending, ending[1:])
    return text
