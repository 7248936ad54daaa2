"""Tell a model's thoughts from its answer, by the markers around them."""

from __future__ import annotations

from collections.abc import Sequence

from pleexport.runtime.stopping import overlap
from pleexport.runtime.tokenizer import Tokenizer

# What stands around thoughts in the text of models: in tags, and in Gemma 4's channel.
MARKERS = (("<think>", "</think>"), ("<|channel>thought", "<channel|>"))
# How many ids of a prompt can hold a marker at its end.
_PROMPT_IDS = 16


class ThoughtFilter:
    """Shows the text of an answer, and its thoughts where they are wanted.

    Args:
        tokenizer: knows special tokens, and what else its folder says about thoughts.
        prompt_ids: what the answer follows; it may have begun a thought.
        show: pass thoughts on, with their markers.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], *, show: bool) -> None:
        self._tokenizer, self._show = tokenizer, show
        self._markers = (*MARKERS, *tokenizer.thought_markers)
        prompt = tokenizer.decode(prompt_ids[-_PROMPT_IDS:], with_specials=True).rstrip()
        self._inside = any(prompt.endswith(begin) for begin, _ in self._markers)
        self._held = ""
        self._specials: set[str] = set()
        self._after_thought = False

    def push(self, token_id: int, text: str) -> str:
        """What people see of an id and the text that it completes."""
        # A marker may be a special token, whose text nobody sees otherwise.
        special = self._tokenizer.special_text(token_id)
        if special and any(special in marker for pair in self._markers for marker in pair):
            self._specials.add(special)
            text += special
        if self._show:
            return text
        self._held += text
        shown = ""
        while found := self._next_marker():
            shown += self._visible(self._held[: found[0]])
            self._held = self._held[found[1] :]
            self._inside = not self._inside
            self._after_thought = not self._inside
        keep = max(overlap(self._held, marker) for marker in self._expected())
        cut = len(self._held) - keep
        shown += self._visible(self._held[:cut])
        self._held = self._held[cut:]
        return shown

    def flush(self) -> str:
        """What is still held back when the answer ends."""
        shown, self._held = self._visible(self._held), ""
        return shown

    def _expected(self) -> list[str]:
        return [pair[self._inside] for pair in self._markers]

    def _next_marker(self) -> tuple[int, int] | None:
        """Where the next marker begins and ends."""
        places = [(self._held.find(marker), marker) for marker in self._expected()]
        found = [(at, at + len(marker)) for at, marker in places if at >= 0]
        return min(found, default=None)

    def _visible(self, text: str) -> str:
        if self._inside:
            return ""
        for special in self._specials:
            text = text.replace(special, "")
        if self._after_thought:
            text = text.lstrip()
            self._after_thought = not text
        return text
