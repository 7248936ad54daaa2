"""Guess how a text goes on, and have many guesses checked by one call of the graph.

Each token is still chosen from the model's logits after the text before it, in the same order and
with the same random numbers. A guess only decides whether these logits are there already. Source:
arXiv 2211.17192, and for guesses from the text itself Saxena 2023, "Prompt lookup decoding".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from pleexport.errors import InputError
from pleexport.runtime.reader import Reader
from pleexport.runtime.stats import Stats

# An ExecuTorch program has logits of so many positions a call, and more guesses rarely come true.
TOKENS_PER_CALL = 16


class Drafter(Protocol):
    """Guesses how one text goes on."""

    def propose(self, ids: Sequence[int], most: int) -> Sequence[int]:
        """Up to `most` tokens that may come next, the next one first.

        Args:
            ids: the text so far; what an earlier call was given, and more.
            most: 1 or more.
        """
        ...


class PromptLookup:
    """Drafts what followed the longest earlier piece of the text that reads like its end.

    As many tokens are drafted as agree already: few after a chance resemblance, many where a
    passage is repeated. So a deviation costs little, and one accepted draft doubles the next.
    After a draft of which nothing came true, twice as many tokens must agree, and half as many
    after a better one. A text that only resembles itself by chance so costs next to nothing.

    Args:
        fewest: tokens that must agree at first, and at least.
        most: tokens that must agree at most.
    """

    def __init__(self, *, fewest: int = 2, most: int = 8) -> None:
        self._fewest, self._most, self._needed = fewest, most, fewest
        self._text: NDArray[np.int64] = np.empty(0, dtype=np.int64)
        self._first_guess: tuple[int, int] | None = None

    def propose(self, ids: Sequence[int], most: int) -> Sequence[int]:
        """See `Drafter.propose`."""
        self._text = np.append(self._text, np.asarray(ids[len(self._text) :], dtype=np.int64))
        text, last = self._text, len(self._text) - 1
        self._learn()
        # Where the last token stood before; then those of these that agree one further back.
        ends, agreed = np.flatnonzero(text[:last] == text[last]), 1
        while len(ends) and agreed < max(most, self._needed):
            longer = ends[ends >= agreed]
            longer = longer[text[longer - agreed] == text[last - agreed]]
            if not len(longer):
                break
            ends, agreed = longer, agreed + 1
        if not len(ends) or agreed < self._needed:
            return []
        begin = int(ends[-1]) + 1
        drafted: list[int] = text[begin : begin + min(agreed, most)].tolist()
        self._first_guess = len(text), drafted[0]
        return drafted

    def _learn(self) -> None:
        """Ask for more agreement where nothing of the last draft came true, else for less."""
        if self._first_guess is None:
            return
        (place, token), self._first_guess = self._first_guess, None
        if self._text[place] == token:
            self._needed = max(self._needed // 2, self._fewest)
        else:
            self._needed = min(2 * self._needed, self._most)


DRAFTERS: dict[str, Callable[[], Drafter]] = {"lookup": PromptLookup}


def open_drafter(draft: str | Drafter | None, *, chunk: int) -> Drafter | None:
    """The drafter of a text.

    Args:
        draft: a name of `DRAFTERS`, one of your own, or None for none.
        chunk: most tokens of one call of the graph.
    Raises:
        InputError: the name is not known, or the graph cannot check drafts.
    """
    if draft is None:
        return None
    if isinstance(draft, str) and draft not in DRAFTERS:
        raise InputError(
            f"draft `{draft}` is not known; there is {', '.join(f'`{name}`' for name in DRAFTERS)}",
            hint="leave it out to write a token a call",
        )
    if chunk < 2:
        raise InputError(
            "drafts are checked several tokens a call, and this bundle's graph takes one",
            hint="leave `--draft` out: in such a model a token passes all layers before the next",
        )
    return DRAFTERS[draft]() if isinstance(draft, str) else draft


class Drafting:
    """A text that is read with guesses behind its end.

    Args:
        drafter: None to guess nothing.
        stats: counts calls, and what was drafted and accepted.
    """

    def __init__(self, reader: Reader, drafter: Drafter | None, stats: Stats) -> None:
        self._reader, self._drafter, self._stats = reader, drafter, stats
        self._logits: NDArray[np.float32] = np.empty((0, 0), dtype=np.float32)

    def logits_after(self, ids: list[int], *, wanted: int) -> NDArray[np.float32]:
        """Logits `[vocab]` after a text, of which the last token is new.

        Args:
            wanted: how many tokens may still come.
        """
        reader, stats = self._reader, self._stats
        if reader.guessed and reader.ids[-reader.guessed] == ids[-1]:
            reader.guessed -= 1
            stats.accepted_tokens += 1
            return self._logits[-1 - reader.guessed, :]
        reader.forget_guesses()
        unread = ids[len(reader.ids) :]
        most = min(wanted - 1, min(TOKENS_PER_CALL, reader.chunk) - len(unread))
        drafted: list[int] = []
        if self._drafter is not None and most > 0:
            drafted = list(self._drafter.propose(ids, most))[:most]
        guessed = len(drafted)
        self._logits = reader.read([*unread, *drafted], keep=1 + guessed, guessed=guessed)
        stats.decode_calls += 1
        stats.drafted_tokens += guessed
        return self._logits[0, :]
