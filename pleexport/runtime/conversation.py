"""A conversation: what was said as the chat template wants it, and what people see of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pleexport.errors import PleexportError
from pleexport.runtime.runner import Runner
from pleexport.runtime.thoughts import ThoughtFilter


class Conversation:
    """Asks a runner, and keeps what was said.

    Special tokens stay in what it keeps: by these, templates take the thoughts of earlier answers
    out. People see neither special tokens nor, if not asked for, thoughts.

    Args:
        runner: of a bundle with a chat template.
        system: what the model is told first.
        template_arguments: see `Runner.encode`.
        show_thinking: let people see thoughts, with their markers.
        options: of `Runner.generate`.
    Attributes:
        messages: what was said, as the template takes it.
    """

    def __init__(
        self,
        runner: Runner,
        *,
        system: str | None = None,
        template_arguments: Mapping[str, Any] | None = None,
        show_thinking: bool = False,
        **options: Any,
    ) -> None:
        assert runner.tokenizer is not None, "there is no template without one"
        self._runner, self._tokenizer, self._options = runner, runner.tokenizer, options
        self._arguments, self._show_thinking = template_arguments, show_thinking
        self.messages: list[dict[str, Any]] = []
        if system is not None:
            self.messages.append({"role": "system", "content": system})

    def ask(self, content: str) -> Iterator[str]:
        """The answer to a message, as people see it, piece by piece.

        Raises:
            InputError: the conversation cannot be continued; it is as it was before.
        """
        self.messages.append({"role": "user", "content": content})
        answer: list[int] = []
        try:
            yield from self._answer(answer)
        except PleexportError:
            self.messages.pop()
            raise
        self.messages.append({"role": "assistant", "content": self._said(answer)})

    def _answer(self, answer: list[int]) -> Iterator[str]:
        """What people see of an answer; its ids are added to `answer`."""
        ids = self._runner.encode(self.messages, self._arguments)
        seen = ThoughtFilter(self._tokenizer, ids, show=self._show_thinking)
        for token in self._runner.generate(ids, **self._options):
            answer.append(token.id)
            yield seen.push(token.id, token.text)
        yield seen.flush()

    def _said(self, answer: list[int]) -> str:
        """An answer with its special tokens, up to what ended it."""
        ends = self._runner.bundle.manifest.eos_token_ids
        said = self._tokenizer.decode([i for i in answer if i not in ends], with_specials=True)
        stops = (*(self._options.get("stop") or ()), *self._runner.config.stops)
        # The first is what ended it, wherever it stands in the list.
        return min((said.partition(stop)[0] for stop in stops if stop), key=len, default=said)
