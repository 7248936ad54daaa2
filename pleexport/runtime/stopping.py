"""End a text at a string, and show none of it."""

from __future__ import annotations

from collections.abc import Sequence

from pleexport.runtime.text_stream import Stream


class StopStrings:
    """Holds text back while it may be the beginning of a stop string."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.hit = False

    def push(self, text: str) -> str:
        """Text that is safe to show; `hit` is set once a stop string was met."""
        self._held += text
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.hit = True
            shown, self._held = self._held[: min(found)], ""
            return shown
        keep = max((overlap(self._held, stop) for stop in self._stops), default=0)
        shown, self._held = self._held[: len(self._held) - keep], self._held[-keep:] * bool(keep)
        return shown

    def flush(self) -> str:
        """What is still held back when the text ends."""
        shown, self._held = self._held, ""
        return shown


class AnswerText:
    """The text of an answer as its ids come, up to a stop string.

    Args:
        stream: makes text of ids; without one there is none.
        stops: strings that end the text.
    """

    def __init__(self, stream: Stream | None, stops: Sequence[str]) -> None:
        self._stream, self._stops = stream, StopStrings(stops)

    @property
    def stopped(self) -> bool:
        """Whether a stop string was met."""
        return self._stops.hit

    def push(self, token_id: int) -> str:
        """Text that is safe to show."""
        return self._stops.push(self._stream.push(token_id)) if self._stream else ""

    def flush(self) -> str:
        """What is still held back when the text ends."""
        if self._stream is None or self.stopped:
            return ""
        shown = self._stops.push(self._stream.flush())
        return shown if self.stopped else shown + self._stops.flush()


def overlap(text: str, marker: str) -> int:
    """Length of the longest end of a text that begins a marker, and is not all of it."""
    lengths = range(min(len(text), len(marker) - 1), 0, -1)
    return next((n for n in lengths if marker.startswith(text[-n:])), 0)
