"""What many inputs have in common, worked out once in a process.

Tracing a model takes most of the time of a small build, and depends on no weight; reading a format
off a chat template takes half a second, and depends on no tensor. What an input changes of what
they depend on has them worked out anew.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

_MOST = 40


class _Kept:
    """Results by key; the oldest goes when there are too many."""

    def __init__(self) -> None:
        self._found: dict[Hashable, Any] = {}

    def of(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """The result of a key; made where it is not there. What raises is not kept."""
        if key not in self._found:
            self._found[key] = make()
            if len(self._found) > _MOST:
                del self._found[next(iter(self._found))]
        return self._found[key]


_traces, _graphs, _formats = _Kept(), _Kept(), _Kept()


@contextmanager
def remembering(place: Path) -> Iterator[None]:
    """Let builds of a checkpoint take the traces, graphs and chat formats of earlier ones."""
    from pleexport.backends.onnx import lower
    from pleexport.export import builder
    from pleexport.families import trace

    with ExitStack() as patches:
        for module, name, remembered in (
            (trace, "trace", functools.partial(_trace, trace.trace, place)),
            (lower, "translate", functools.partial(_translate, lower.translate)),
            (builder, "find_chat_format", functools.partial(_format, builder.find_chat_format)),
        ):
            patches.enter_context(mock.patch.object(module, name, remembered))
        yield


def _trace(real: Callable[..., Any], place: Path, model: Any, contract: Any) -> Any:
    config = place / "config.json"
    says = config.read_bytes() if place.is_dir() else b""
    shapes = [(weight.name, tuple(weight.shape)) for weight in model.weights]
    key = says, model.family, model.processor, repr(contract), repr(shapes)
    return _traces.of(key, lambda: real(model, contract))


def _translate(real: Callable[..., Any], program: Any) -> Any:
    """Each build changes its own copy."""
    _, graph = _graphs.of(id(program), lambda: (program, real(program)))
    return graph.clone()


def _format(real: Callable[..., Any], tokenizer: Any) -> Any:
    if tokenizer is None:
        return real(tokenizer)
    own = (tokenizer.chat_template, tokenizer.special_tokens, tokenizer.thought_markers)
    return _formats.of((tokenizer.size, repr(own)), lambda: real(tokenizer))
