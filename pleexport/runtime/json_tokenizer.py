"""A tokenizer.json, as transformers uses one."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
from tokenizers import Tokenizer

from pleexport.errors import TokenizerError
from pleexport.runtime.text_stream import CleanedStream, Stream, TextStream, clean
from pleexport.whole_file import read_whole

# A token of a byte-fallback decoder that stands for one byte.
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_PREFIX = b'"continuing_subword_prefix"'
_NO_PREFIX = re.compile(_PREFIX + rb"\s*:\s*null")
_HINT = "fetch the file again; it is published with the model"
_CLEANS = "clean_up_tokenization_spaces"
_CLEANS_BPE = f"{_CLEANS}_for_bpe_even_though_it_will_corrupt_output"


class JsonTokenizer:
    """Text to token ids and back.

    Args:
        path: the file.
        config: its tokenizer_config.json.
    Raises:
        TokenizerError: the file is malformed.
    """

    def __init__(self, path: Path, config: Mapping[str, Any]) -> None:
        self._path = path
        _check_merges(path)
        with self._readable():
            self._tokenizer = Tokenizer.from_file(str(path))
        _check_template(path, self._tokenizer)
        # Limits of training, which transformers passes over too.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = bool(config.get("split_special_tokens"))
        added = self._tokenizer.get_added_tokens_decoder()
        self._special = {i: str(token.content) for i, token in added.items() if token.special}
        self._has_byte_fallback = "ByteFallback" in repr(self._tokenizer.decoder)
        # transformers does not clean what BPE decodes, if it is not forced to.
        is_bpe = type(self._tokenizer.model).__name__ == "BPE"
        self._cleans = bool(config.get(_CLEANS) and (not is_bpe or config.get(_CLEANS_BPE)))

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Ids of a text, with special tokens around it where they are asked for."""
        with self._readable():
            return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, ids: Sequence[int], *, with_specials: bool = False) -> str:
        """The text of ids."""
        text = self._decode(ids, skip_special_tokens=not with_specials)
        return clean(text) if self._cleans else text

    def stream(self, prompt_ids: Sequence[int]) -> Stream:
        """What makes text of the ids that follow a prompt, as they come."""
        raw = TextStream(
            self._decode,
            prompt_ids,
            is_byte=self._is_byte,
            is_silent=lambda token_id: self._text(token_id) is None,
        )
        return CleanedStream(raw) if self._cleans else raw

    def _decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        with self._readable():
            return str(self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens))

    @contextmanager
    def _readable(self) -> Iterator[None]:
        """Say in a sentence what the library says of a file in its own ways."""
        try:
            yield
        except BaseException as err:
            # Plain exceptions, and what ends its own code, which derives from nothing.
            if not isinstance(err, Exception) and type(err).__name__ != "PanicException":
                raise
            raise TokenizerError(f"`{self._path}` cannot be read: {err}", hint=_HINT) from err

    @property
    def size(self) -> int:
        """Ids are below it."""
        return max(self._tokenizer.get_vocab().values(), default=-1) + 1

    def special_text(self, token_id: int) -> str:
        """The text of a special token; "" of any other."""
        return self._special.get(token_id, "")

    def _text(self, token_id: int) -> str | None:
        """A token as the vocabulary has it; None where it stands for nothing in a text."""
        if token_id in self._special:
            return None
        text: str | None = self._tokenizer.id_to_token(token_id)
        return text

    def _is_byte(self, token_id: int) -> bool:
        return self._has_byte_fallback and bool(_BYTE.fullmatch(self._text(token_id) or ""))


class _Model(msgspec.Struct):
    continuing_subword_prefix: str | None = None
    merges: list[Any] = []


class _File(msgspec.Struct):
    model: _Model


def _check_merges(path: Path) -> None:
    """Refuse merges at which the library ends this process. Source: tokenizers, `BpeBuilder`.

    A large file is made into objects only where it has a prefix, or hides its names.
    """
    try:
        raw = read_whole(path)
        first = raw.find(_PREFIX)
        none = first < 0 or (_NO_PREFIX.match(raw, first) and first == raw.rfind(_PREFIX))
        if none and b"\\u" not in raw:
            return
        model = msgspec.json.decode(raw, type=_File).model
        problem = _problem_of_merges(model.merges, model.continuing_subword_prefix or "")
    except (OSError, ValueError, RecursionError, AttributeError, LookupError, TypeError):
        return  # the library says what it is
    if problem:
        raise TokenizerError(f"`{path}` {problem}", hint=_HINT)


def _check_template(path: Path, tokenizer: Tokenizer) -> None:
    """Refuse a template in which the library would look for something in vain."""
    processor = tokenizer.post_processor
    problem = processor and _problem_of_template(json.loads(processor.__getstate__()))
    if problem:
        raise TokenizerError(f"`{path}` {problem}", hint=_HINT)


def _problem_of_merges(merges: list[Any], prefix: str) -> str | None:
    """Second parts lose a prefix when they are merged, as bytes: it has to be there."""
    for merge in merges:
        second = merge.rpartition(" ")[2] if isinstance(merge, str) else merge[1]
        if not second.startswith(prefix):
            return f"merges `{second}`, which does not begin with the prefix `{prefix}`"
    return None


def _problem_of_template(processor: Any) -> str | None:
    """A special token in a template needs its ids, and one text has no second one."""
    if not isinstance(processor, dict):
        return None
    for part in processor.get("processors") or ():
        if problem := _problem_of_template(part):
            return problem
    known = processor.get("special_tokens") or {}
    for piece in [*(processor.get("single") or ()), *(processor.get("pair") or ())]:
        token = piece.get("SpecialToken", {}).get("id") if isinstance(piece, dict) else None
        if token is not None and token not in known:
            return f"puts `{token}` around a text, and does not say its ids"
    for piece in processor.get("single") or ():
        text = piece.get("Sequence", {}).get("id", "A") if isinstance(piece, dict) else "A"
        if text != "A":
            return f"puts a text `{text}` where there is only one, `A`"
    return None
