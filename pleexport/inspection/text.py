"""What a checkpoint's folder says of text: its tokenizer, its chat template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pleexport.inspection.info import TextInfo
from pleexport.parity.original_text import PROCESSOR_TEMPLATES
from pleexport.runtime.tokenizer import CHAT_TEMPLATE, TOKENIZER, TOKENIZER_CONFIG, tokenizer_files
from pleexport.runtime.world_tokenizer import VOCABULARY
from pleexport.whole_file import read_whole

# In the order in which transformers looks for a template.
_TEMPLATES = (CHAT_TEMPLATE, TOKENIZER_CONFIG, *PROCESSOR_TEMPLATES)


def describe_text(folder: Path) -> TextInfo:
    """The tokenizer and the chat template of a folder, from its JSON files alone."""
    files = tokenizer_files(folder)
    name = next((n for n in (TOKENIZER, VOCABULARY) if n in files), None)
    tokenizer = _object(folder / TOKENIZER) if name == TOKENIZER else {}
    model = tokenizer.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    known = len(vocabulary) if isinstance(vocabulary, dict | list) else 0
    own = vocabulary if isinstance(vocabulary, dict) else {}
    listed = [*_tokens(tokenizer.get("added_tokens")), *_decoder(folder)]
    added = [text for text in dict.fromkeys(listed) if text not in own]
    template = next((n for n in _TEMPLATES if _has_template(folder / n)), None)
    return TextInfo(tokenizer=name, tokens=known, added_tokens=added, chat_template=template)


def _tokens(found: Any) -> list[str]:
    entries = found if isinstance(found, list) else []
    texts = (entry.get("content") for entry in entries if isinstance(entry, dict))
    return [text for text in texts if isinstance(text, str)]


def _decoder(folder: Path) -> list[str]:
    """Tokens that stand only in the tokenizer's config."""
    found = _object(folder / TOKENIZER_CONFIG).get("added_tokens_decoder")
    return _tokens(list(found.values())) if isinstance(found, dict) else []


def _has_template(path: Path) -> bool:
    if path.suffix == ".jinja":
        return path.is_file()
    return bool(_object(path).get("chat_template"))


def _object(path: Path) -> dict[str, Any]:
    """A JSON object; empty for what is none, which a build refuses with the reason."""
    try:
        value = json.loads(read_whole(path))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
