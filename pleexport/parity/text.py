"""Does text become the same ids, and a conversation the same prompt, as in the original?

This is the level below rows and logits: these can be right, and a model still read another text
than it was given. Every text and id sequence is also streamed, and compared with its decoding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from pleexport.errors import InputError
from pleexport.parity.chat_format import first_difference, template_of
from pleexport.parity.original_text import (
    NOW,
    OriginalText,
    Rendered,
    Witness,
    read_original_text,
)
from pleexport.parity.report import TextCheck
from pleexport.parity.text_cases import CONVERSATIONS, TEXTS, id_sequences
from pleexport.runtime.chat_format import ChatFormat
from pleexport.runtime.tokenizer import TOKENIZER, Tokenizer
from pleexport.staging import scratch_folder

# Any of these makes a folder one that transformers may open a tokenizer from.
_SOURCES = (
    TOKENIZER,
    "tokenizer.model",
    "spiece.model",
    "tiktoken.model",
    "tekken.json",
    "vocab.json",
    "vocab.txt",
)
# All that a tokenizer and its chat templates are made from.
READ_FOR_TEXT = (
    *_SOURCES,
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt"),
    *("chat_template.jinja", "additional_chat_templates"),
    *("chat_template.json", "processor_config.json"),
)
_NONE_OF_ITS_KIND = "transformers has no tokenizer of this kind"
_NONE_AT_ALL = "the checkpoint has no tokenizer"
_SHOWN = 60  # characters of a text in a sentence
_SHOWN_IDS = 12


def find_original_text(place: Path, scratch: Path) -> OriginalText | None:
    """The original's tokenizer of a place; None where it is RWKV's, or none at all.

    Args:
        place: a folder, or a tokenizer's file.
        scratch: where its files are written.
    """
    if place.is_file():
        if place.suffix == ".txt":
            return None
        source = place.parent if place.name == TOKENIZER else place
    elif any((place / name).is_file() for name in _SOURCES):
        source = place
    else:
        return None
    return read_original_text(source, scratch)


def check_text_of(
    tokenizer: Tokenizer | None, place: Path, chat_format: ChatFormat | None = None
) -> TextCheck | None:
    """Compare a bundle's tokenizer with the one of a place; see `check_text`."""
    with scratch_folder() as scratch:
        return check_text(tokenizer, find_original_text(place, scratch), chat_format)


def check_text(
    tokenizer: Tokenizer | None,
    original: OriginalText | None,
    chat_format: ChatFormat | None = None,
) -> TextCheck | None:
    """Compare a bundle's tokenizer with the original's; None where the bundle has none.

    Args:
        original: None where there is none to compare with.
        chat_format: what is to render as the tokenizer's own template does; None for nothing.
    """
    if tokenizer is None:
        return None
    witness = original.witness if original else None
    formatted, unlike = _chat_format(tokenizer, chat_format)
    if witness is None:
        none = _NONE_OF_ITS_KIND if tokenizer.is_lossless else _NONE_AT_ALL
        problem = original.problem if original else none
        streams = [*map(tokenizer.encode, TEXTS), *id_sequences(tokenizer.size, [])]
        return TextCheck(
            original=None,
            not_compared=problem,
            template=None,
            texts=len(TEXTS),
            conversations=0,
            refused=0,
            formatted=formatted,
            streams=len(streams),
            differences=_first_of(
                [*_round_trips(tokenizer)], unlike, [*_streams(tokenizer, streams)]
            ),
        )
    streams = [*(case.ids for case in witness.texts), *(case.ids for case in witness.decoded)]
    return TextCheck(
        original=witness.name,
        not_compared=None,
        template=witness.template,
        texts=len(witness.texts),
        conversations=len(witness.conversations),
        refused=sum(case.refusal is not None for case in witness.conversations),
        formatted=formatted,
        streams=len(streams),
        differences=_first_of(
            [*_texts(tokenizer, witness)],
            [*_decodings(tokenizer, witness)],
            [*_conversations(tokenizer, witness)],
            unlike,
            [*_streams(tokenizer, streams)],
        ),
    )


def _texts(tokenizer: Tokenizer, witness: Witness) -> Iterator[str]:
    for case in witness.texts:
        ids = tokenizer.encode(case.text)
        if ids != case.ids:
            yield f"the text {_quoted(case.text)} {_become(ids, case.ids)}"


def _decodings(tokenizer: Tokenizer, witness: Witness) -> Iterator[str]:
    for case in witness.decoded:
        for expected, with_specials in ((case.text, False), (case.with_specials, True)):
            text = tokenizer.decode(case.ids, with_specials=with_specials)
            if text != expected:
                yield (
                    f"the ids {_cut(case.ids)} become {_quoted(text)}, and {_quoted(expected)} in "
                    "the original"
                )


def _conversations(tokenizer: Tokenizer, witness: Witness) -> Iterator[str]:
    for case in witness.conversations:
        if difference := _conversation(tokenizer, case):
            yield f"the conversation `{case.name}` {difference}"


def _conversation(tokenizer: Tokenizer, case: Rendered) -> str | None:
    """How our prompt differs; where both refuse to make one, it does not."""
    messages, arguments = next((m, a) for name, m, a in CONVERSATIONS if name == case.name)
    try:
        text = tokenizer.render_chat(messages, arguments, now=NOW)
    except InputError as err:
        return None if case.refusal is not None else f"is refused ({err.message})"
    if case.text is None:
        return f"becomes a prompt, and the original refuses it ({case.refusal})"
    if text != case.text:
        at = next(
            (i for i, pair in enumerate(zip(text, case.text, strict=False)) if pair[0] != pair[1]),
            min(len(text), len(case.text)),
        )
        return (
            f"becomes another prompt from character {at} on: {_quoted(text[at:])}, and "
            f"{_quoted(case.text[at:])} in the original"
        )
    ids = tokenizer.encode_prompt(text)
    return None if ids == case.ids else _become(ids, case.ids)


def _chat_format(tokenizer: Tokenizer, form: ChatFormat | None) -> tuple[int | None, list[str]]:
    """How many conversations a chat format renders as the template does, and what differs."""
    if form is None:
        return None, []
    template = tokenizer.chat_template
    if template is None:
        return 0, ["there is a chat format, and no chat template"]
    count, problem = first_difference(form, template_of(tokenizer), template)
    return count, [f"the chat format differs from the template: {problem}"] if problem else []


def _round_trips(tokenizer: Tokenizer) -> Iterator[str]:
    """What a tokenizer without an original can be held to: nothing of a text is lost."""
    for text in TEXTS:
        back = tokenizer.decode(tokenizer.encode(text))
        if tokenizer.is_lossless and back != text:
            yield f"the text {_quoted(text)} comes back as {_quoted(back)}"


def _streams(tokenizer: Tokenizer, sequences: Sequence[list[int]]) -> Iterator[str]:
    for ids in sequences:
        stream = tokenizer.stream([])
        text = "".join([*map(stream.push, ids), stream.flush()])
        if text != (decoded := tokenizer.decode(ids)):
            yield f"the ids {_cut(ids)} stream as {_quoted(text)}, not as {_quoted(decoded)}"


def _first_of(*kinds: list[str]) -> tuple[str, ...]:
    """The first difference of each kind, and how many more there are."""
    more = [f" ({len(found) - 1} more)" if len(found) > 1 else "" for found in kinds]
    return tuple(f"{found[0]}{end}" for found, end in zip(kinds, more, strict=True) if found)


def _become(ids: list[int], expected: list[int]) -> str:
    return f"becomes the ids {_cut(ids)}, and {_cut(expected)} in the original"


def _cut(ids: list[int]) -> str:
    more = f" and {len(ids) - _SHOWN_IDS} more" if len(ids) > _SHOWN_IDS else ""
    return f"{ids[:_SHOWN_IDS]}{more}"


def _quoted(text: str) -> str:
    return repr(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…")
