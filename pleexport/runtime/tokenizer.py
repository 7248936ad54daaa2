"""Text to token ids and back, from the files that a checkpoint ships."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from pleexport.errors import InputError, TokenizerError
from pleexport.runtime.chat import THOUGHTS, Message, render_chat
from pleexport.runtime.json_tokenizer import JsonTokenizer
from pleexport.runtime.text_stream import Stream
from pleexport.runtime.world_tokenizer import VOCABULARY, WorldTokenizer

_AS_PUBLISHED = "fetch the file again; it is published with the model"
_CHECK = "check the file and its permissions"
TOKENIZER = "tokenizer.json"
# Either makes text out of ids; the first that is there does.
TOKENIZERS = (TOKENIZER, VOCABULARY)
TOKENIZER_CONFIG = "tokenizer_config.json"
CHAT_TEMPLATE = "chat_template.jinja"
TOKENIZER_FILES = (*TOKENIZERS, TOKENIZER_CONFIG, CHAT_TEMPLATE)


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
        self._config = _read_object(files.get(TOKENIZER_CONFIG))
        self._tokenizer: JsonTokenizer | WorldTokenizer
        if path := files.get(TOKENIZER):
            self._tokenizer = JsonTokenizer(path, self._config)
        else:
            self._tokenizer = WorldTokenizer(files[VOCABULARY])
        self._templates = _read_templates(files.get(CHAT_TEMPLATE), self._config)

    @property
    def has_chat_template(self) -> bool:
        """Whether conversations have a form."""
        return bool(self._templates)

    @property
    def chat_template(self) -> str | None:
        """The template of conversations without tools; None where there is none."""
        return self._templates.get("default")

    @property
    def size(self) -> int:
        """Ids are below it."""
        return self._tokenizer.size

    @property
    def is_lossless(self) -> bool:
        """Whether every text comes back as it was."""
        return isinstance(self._tokenizer, WorldTokenizer)

    @property
    def special_tokens(self) -> dict[str, str]:
        """Texts of special tokens by the names that chat templates have for them."""
        own = self._config.get("model_specific_special_tokens")
        named = {k: v for k, v in self._config.items() if k.endswith("_token")}
        texts = {
            k: _content(v) for k, v in (named | (own if isinstance(own, dict) else {})).items()
        }
        return {name: text for name, text in texts.items() if text is not None}

    @property
    def thought_markers(self) -> list[tuple[str, str]]:
        """What stands before and after thoughts, where the config says it in plain texts."""
        template = self._config.get("response_template")
        fields = template.get("fields") if isinstance(template, dict) else None
        found = [fields.get(name) for name in THOUGHTS] if isinstance(fields, dict) else []
        pairs = [(f.get("open"), f.get("close")) for f in found if isinstance(f, dict)]
        return [(a, b) for a, b in pairs if a and b and isinstance(a, str) and isinstance(b, str)]

    def special_text(self, token_id: int) -> str:
        """The text of a special token; "" of any other."""
        return self._tokenizer.special_text(token_id)

    def encode(self, text: str) -> list[int]:
        """Ids of a text, with the special tokens that the tokenizer puts around it.

        Raises:
            InputError: the text is not Unicode.
        """
        return self._encode(text, add_special_tokens=True)

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

    def decode(self, ids: Sequence[int], *, with_specials: bool = False) -> str:
        """The text of ids; special tokens are left out where nobody asks for them."""
        return self._tokenizer.decode(ids, with_specials=with_specials)

    def render_chat(
        self,
        messages: Sequence[Message],
        arguments: Mapping[str, Any],
        *,
        now: datetime | None = None,
    ) -> str:
        """The text of a conversation; see `chat.render_chat`.

        Raises:
            InputError: the tokenizer has no chat template, or the template refuses.
        """
        template = self._template(with_tools=arguments.get("tools") is not None)
        return render_chat(template, messages, {**self.special_tokens, **arguments}, now=now)

    def encode_chat(
        self, messages: Sequence[Message], arguments: Mapping[str, Any] | None = None
    ) -> list[int]:
        """Ids of a conversation, ready for the model's answer.

        Where the last message is the assistant's, the answer goes on from there.

        Args:
            messages: objects with `role` ("user", "assistant", "system") and `content`.
            arguments: see `chat.render_chat`.
        Raises:
            InputError: the tokenizer has no chat template, or the template refuses.
        """
        given = dict(arguments or {})
        by_assistant = bool(messages) and messages[-1].get("role") == "assistant"
        goes_on = by_assistant and not given.get("add_generation_prompt")
        given.setdefault("continue_final_message", goes_on)
        given.setdefault("add_generation_prompt", not given["continue_final_message"])
        return self.encode_prompt(self.render_chat(messages, given))

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a text that has its special tokens already, as a rendered conversation has.

        Raises:
            InputError: the text is not Unicode.
        """
        return self._encode(text, add_special_tokens=False)

    def stream(self, prompt_ids: Sequence[int]) -> Stream:
        """What makes text of the ids that follow a prompt, as they come."""
        return self._tokenizer.stream(prompt_ids)

    def _encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as err:
            raise InputError(
                "the text is not UTF-8", hint="it holds half a surrogate pair; replace it"
            ) from err
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens)

    def _template(self, *, with_tools: bool) -> str:
        """The template for a conversation: the one for tools where there are tools, and one."""
        for name in ("tool_use", "default") if with_tools else ("default",):
            if name in self._templates:
                return self._templates[name]
        if self._templates:
            raise InputError(
                f"this bundle's tokenizer has the chat templates {', '.join(self._templates)}, and "
                "none is the default",
                hint="pass plain text instead",
            )
        raise InputError(
            "this bundle's tokenizer has no chat template", hint="pass plain text instead"
        )


def read_text_file(path: Path) -> str:
    """The content of a text file.

    Raises:
        InputError: it cannot be read, is not UTF-8, or is empty.
    """
    try:
        content = path.read_text(encoding="utf-8")
    except OSError as err:
        raise InputError(f"`{path}` cannot be read: {err.strerror}", hint=_CHECK) from err
    except UnicodeDecodeError as err:
        raise InputError(f"`{path}` is not a UTF-8 text", hint="save it as UTF-8") from err
    if not content.strip():
        raise InputError(f"`{path}` holds no text", hint="give a file with some words in it")
    return content


def _read_templates(path: Path | None, config: Mapping[str, Any]) -> dict[str, str]:
    """Chat templates by name: the file's, or else those of the config."""
    if path:
        try:
            return {"default": path.read_text(encoding="utf-8")}
        except (OSError, UnicodeDecodeError) as err:
            raise TokenizerError(f"`{path}` cannot be read: {err}", hint=_AS_PUBLISHED) from err
    found = config.get("chat_template")
    if isinstance(found, list):
        found = {t.get("name"): t.get("template") for t in found if isinstance(t, dict)}
    named = found if isinstance(found, dict) else {"default": found}
    return {str(name): text for name, text in named.items() if isinstance(text, str)}


def _content(token: Any) -> str | None:
    """The text of a token, which may be written out with its properties."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def _read_object(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        value = json.loads(path.read_bytes())
    except OSError as err:
        raise TokenizerError(f"`{path}` cannot be read: {err.strerror}", hint=_CHECK) from err
    except (ValueError, RecursionError) as err:
        raise TokenizerError(f"`{path}` is not valid JSON ({err})", hint=_AS_PUBLISHED) from err
    return value if isinstance(value, dict) else {}
