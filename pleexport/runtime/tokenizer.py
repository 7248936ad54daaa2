"""Text to token ids and back, from the files that a checkpoint ships."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers.decoders import DecodeStream

from pleexport.errors import InputError, TokenizerError
from pleexport.runtime.chat import render_chat
from pleexport.runtime.world_tokenizer import VOCABULARY, WorldStream, WorldTokenizer

_AS_PUBLISHED = "fetch the file again; it is published with the model"
TOKENIZER = "tokenizer.json"
# Either makes text out of ids; the first that is there does.
TOKENIZERS = (TOKENIZER, VOCABULARY)
TOKENIZER_FILES = (
    *TOKENIZERS,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)


def tokenizer_files(path: Path) -> dict[str, Path]:
    """The files of a tokenizer by the names that a bundle gives them; empty where there are none.

    Args:
        path: a folder, or a file: a tokenizer.json, or a vocabulary of RWKV's World tokenizer.
    """
    if path.is_file() and path.name != TOKENIZER:
        return {VOCABULARY if path.suffix == ".txt" else TOKENIZER: path}
    path = path.parent if path.is_file() else path
    return {name: path / name for name in TOKENIZER_FILES if (path / name).is_file()}


def open_tokenizer(files: Mapping[str, Path]) -> Tokenizer | None:
    """The tokenizer that files make; None where they make none.

    Raises:
        TokenizerError: a tokenizer file is malformed.
    """
    return Tokenizer(files) if files.keys() & set(TOKENIZERS) else None


class Tokenizer:
    """The tokenizer of a bundle, with its chat template if it has one.

    Args:
        files: see `tokenizer_files`.
    Raises:
        TokenizerError: a tokenizer file is malformed.
    """

    def __init__(self, files: Mapping[str, Path]) -> None:
        self._tokenizer: tokenizers.Tokenizer | WorldTokenizer
        if path := files.get(TOKENIZER):
            try:
                self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
            except Exception as err:  # the library raises plain Exception
                raise TokenizerError(f"`{path}` cannot be read: {err}", hint=_AS_PUBLISHED) from err
        else:
            self._tokenizer = WorldTokenizer(files[VOCABULARY])
        self._config = _read_object(files.get("tokenizer_config.json"))
        self.chat_template = self._read_template(files.get("chat_template.jinja"))

    def encode(self, text: str) -> list[int]:
        """Ids of a text, with the special tokens that the tokenizer puts around it.

        Raises:
            InputError: the text is not Unicode.
        """
        try:
            text.encode()
        except UnicodeEncodeError as err:
            raise InputError(
                "the text is not UTF-8", hint="it holds half a surrogate pair; replace it"
            ) from err
        if isinstance(self._tokenizer, WorldTokenizer):
            return self._tokenizer.encode(text)
        ids = list(self._tokenizer.encode(text).ids)
        bos = self._special("bos_token")
        if self._config.get("add_bos_token") and bos:
            bos_id = self._tokenizer.token_to_id(bos)
            if bos_id is not None and ids[:1] != [bos_id]:
                ids.insert(0, bos_id)
        return ids

    def encode_file(self, path: Path, *, num_rows: int) -> list[int]:
        """Ids of a text file.

        Args:
            num_rows: the model's token ids are below it.
        Raises:
            InputError: the file cannot be read, or has ids that the model does not know.
        """
        ids = self.encode(read_text_file(path))
        if max(ids, default=0) >= num_rows:
            raise InputError(
                f"the tokenizer gives `{path}` the id {max(ids)}, and the model knows 0 to "
                f"{num_rows - 1}",
                hint="it belongs to another model; pass the right one with `--tokenizer PATH`",
            )
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens left out."""
        return str(self._tokenizer.decode(list(ids)))

    def encode_chat(self, messages: Iterable[dict[str, str]]) -> list[int]:
        """Ids of a conversation, ready for the model's answer.

        Args:
            messages: objects with `role` ("user", "assistant", "system") and `content`.
        Raises:
            InputError: the tokenizer has no chat template, or the template refuses.
        """
        if self.chat_template is None:
            raise InputError(
                "this bundle's tokenizer has no chat template", hint="pass plain text instead"
            )
        specials = {
            name: self._special(name) or ""
            for name in ("bos_token", "eos_token", "pad_token", "unk_token")
        }
        text = render_chat(self.chat_template, messages, specials)
        if isinstance(self._tokenizer, WorldTokenizer):
            return self._tokenizer.encode(text)
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def stream(self, prompt_ids: Sequence[int]) -> TextStream | WorldStream:
        """A decoder of the ids that follow a prompt."""
        if isinstance(self._tokenizer, WorldTokenizer):
            return self._tokenizer.stream(prompt_ids)
        return TextStream(self._tokenizer, prompt_ids)

    def _special(self, name: str) -> str | None:
        value = self._config.get(name)
        content = value.get("content") if isinstance(value, dict) else value
        return content if isinstance(content, str) else None

    def _read_template(self, path: Path | None) -> str | None:
        if path:
            try:
                return path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as err:
                raise TokenizerError(f"`{path}` cannot be read: {err}", hint=_AS_PUBLISHED) from err
        template = self._config.get("chat_template")
        if isinstance(template, list):  # several named templates
            named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
            template = named.get("default")
        return template if isinstance(template, str) else None


class TextStream:
    """Turns ids into text as they come: whole characters only, "" while one is incomplete."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, prompt_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        # The last ids of the prompt tell whether the next word begins with a space.
        self._stream = DecodeStream(ids=list(prompt_ids[-8:]), skip_special_tokens=True)

    def push(self, token_id: int) -> str:
        """The text that this id completes."""
        return self._stream.step(self._tokenizer, token_id) or ""


def read_text_file(path: Path) -> str:
    """The content of a text file.

    Raises:
        InputError: it cannot be read, is not UTF-8, or is empty.
    """
    try:
        content = path.read_text(encoding="utf-8")
    except OSError as err:
        raise InputError(
            f"`{path}` cannot be read: {err.strerror}", hint="check the file and its permissions"
        ) from err
    except UnicodeDecodeError as err:
        raise InputError(f"`{path}` is not a UTF-8 text", hint="save it as UTF-8") from err
    if not content.strip():
        raise InputError(f"`{path}` holds no text", hint="give a file with some words in it")
    return content


def _read_object(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as err:
        raise TokenizerError(f"`{path}` is not valid JSON ({err})", hint=_AS_PUBLISHED) from err
    return value if isinstance(value, dict) else {}
