"""Read tokens: look their rows up, and feed them to the graph."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from pleexport.backends.base import Session
from pleexport.contract import GraphContract, pieces
from pleexport.errors import BundleError, InputError
from pleexport.runtime.blob import Blob

_OWN_RUNNER = "take a `Runner` for each text at a time; they share what they map of the bundle"
Vectors = Mapping[str, NDArray[np.float32]]


class Reader:
    """One text: its ids so far, and a session that has read them.

    Args:
        context: most tokens of a text.
    Attributes:
        chunk: most tokens of one call.
        ids: the text so far.
        guessed: how many of the last ids are guesses that have not come true yet.
        rows_read: the rows that were looked up, call by call.
    Raises:
        BundleError: the blob has no table for a graph input, or one of another width.
    """

    def __init__(
        self, blob: Blob, session: Session, contract: GraphContract, *, context: int
    ) -> None:
        self.context = context
        self.chunk = session.chunk
        self.ids: list[int] = []
        self.guessed = 0
        self.rows_read: list[NDArray[np.int64]] = []
        self._lock, self._turn = threading.RLock(), 0
        self._blob = blob
        self._session = session
        self._contract = contract
        self._whole_text = {n.table for n in contract.lookup_inputs if n.whole_text}
        for lookup in contract.lookup_inputs:
            if blob.shapes.get(lookup.table) != tuple(lookup.shape[2:]):
                raise BundleError(
                    f"`{blob.path}` has no table `{lookup.table}` of shape {lookup.shape[2:]}",
                    hint="files of two bundles may be mixed; copy the bundle again, or rebuild it",
                )

    @contextmanager
    def alone(self, turn: int | None = None) -> Iterator[int]:
        """Keep other threads out, and other texts from what has been read.

        Args:
            turn: of a text that goes on, as it was given when it began; None for one that begins.
        Raises:
            InputError: another thread is at work, or another text has begun since.
        """
        if not self._lock.acquire(blocking=False):
            raise InputError("another thread is using this runner", hint=_OWN_RUNNER)
        try:
            if turn is None:
                self._turn += 1
            elif turn != self._turn:
                raise InputError(
                    "another call has used this runner since, so this text cannot go on",
                    hint=_OWN_RUNNER,
                )
            yield self._turn
        finally:
            self._lock.release()

    def read(
        self,
        token_ids: Sequence[int],
        *,
        keep: int,
        vectors: Vectors | None = None,
        guessed: int = 0,
    ) -> NDArray[np.float32]:
        """Logits `[n, vocab]` after the next tokens, fed in pieces; earlier guesses are forgotten.

        Args:
            keep: n, how many of the last piece's positions want logits; 0 for those of all pieces.
            vectors: by graph input, what it takes for each token in place of the blob's.
            guessed: how many of the last tokens are guesses, fewer than a call takes.
        Raises:
            InputError: an id without a row, or more tokens than the context has positions.
        """
        self.forget_guesses()
        rows = self._blob.row_ids(token_ids)
        self.check_length(len(self.ids) + len(rows))
        if vectors is None:
            # Page faults, one after the other, would take forty times as long from a cold disk.
            self._blob.prefetch(rows)
        logits = []
        for piece in pieces(len(rows), self.chunk):
            given = (
                self._vectors(rows[piece])
                if vectors is None
                else self._contract.cut(vectors, piece)
            )
            count = piece.stop - piece.start
            logits.append(self._session.feed(given, count, keep=keep))
            self.ids.extend(int(i) for i in token_ids[piece])
            self.rows_read.append(rows[piece])
            if count > 1:  # for each step it would cost up to a tenth of a small model's time
                self._blob.release_pages()
        self.guessed = guessed
        return np.concatenate(logits) if keep == 0 else logits[-1]

    def forget_guesses(self) -> None:
        """Go back to what is certain, or further where the session cannot stop there."""
        if self.guessed:
            forgotten = self._session.rewind(self.guessed)
            self.ids = self.ids[: len(self.ids) - forgotten]
            self.guessed = 0

    def reset(self) -> None:
        """Forget the text so far."""
        self.ids = []
        self.guessed = 0
        self.rows_read.clear()
        self._session.reset()

    def check_length(self, length: int) -> None:
        """Refuse a text of more tokens than the context has positions."""
        if length > self.context:
            raise InputError(
                f"{length} tokens exceed the bundle's context of {self.context}",
                hint="shorten the prompt, or build with a larger `--context`",
            )

    def _vectors(self, rows: NDArray[np.int64]) -> dict[str, NDArray[np.float32]]:
        """By graph input, what it takes for new tokens."""
        if self._whole_text:
            text = np.concatenate((self._blob.row_ids(self.ids), rows))
            found = self._blob.lookup(rows, self._blob.shapes.keys() - self._whole_text)
            found |= self._blob.lookup(text, self._whole_text)
        else:
            found = self._blob.lookup(rows)
        return {lookup.name: found[lookup.table] for lookup in self._contract.lookup_inputs}
