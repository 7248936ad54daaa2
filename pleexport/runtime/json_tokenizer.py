"""A tokenizer.json, as transformers uses one."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from pleexport.errors import TokenizerError
from pleexport.runtime.text_stream import CleanedStream, Stream, TextStream, clean

# A token of a byte-fallback decoder that stands for one byte.
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
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
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as err:  # the library raises plain Exception
            raise TokenizerError(
                f"`{path}` cannot be read: {err}",
                hint="fetch the file again; it is published with the model",
            ) from err
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
        return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, ids: Sequence[int], *, with_specials: bool = False) -> str:
        """The text of ids."""
        text = str(self._tokenizer.decode(list(ids), skip_special_tokens=not with_specials))
        return clean(text) if self._cleans else text

    def stream(self, prompt_ids: Sequence[int]) -> Stream:
        """What makes text of the ids that follow a prompt, as they come."""
        raw = TextStream(
            lambda ids: str(self._tokenizer.decode(list(ids))),
            prompt_ids,
            is_byte=self._is_byte,
            is_silent=lambda token_id: self._text(token_id) is None,
        )
        return CleanedStream(raw) if self._cleans else raw

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
