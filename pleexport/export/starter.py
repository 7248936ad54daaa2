"""The rows that texts use most, as one file: what a page needs before it can speak.

Token ids say nothing about how often a token is used. So tokens are counted, in a text or in the
words of a language.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from pleexport.checked_header import checked_head
from pleexport.errors import BundleError, InputError, MissingDependencyError
from pleexport.runtime.blob import Blob
from pleexport.runtime.blob_layout import ROWS
from pleexport.runtime.bundle import Bundle
from pleexport.runtime.tokenizer import Tokenizer, open_tokenizer

STARTER: Final = "starter.safetensors"
TOKEN_IDS: Final = "token_ids"
DEFAULT_LANGUAGES: Final = ("en",)
# Rarer words share their pieces with these, and add next to nothing to the counts.
_MOST_WORDS = 20_000
# How a word stands in a text, and how often: behind a space, at the start of a sentence, behind a
# mark, at the start of a line. By hand: other shares of a half to twice these change the coverage
# of English texts by less than 2 %.
_FORMS = ((" {word}", 0.76), (" {name}", 0.12), ("{word}", 0.06), ("{name}", 0.06))
# In these, words follow each other without a space.
_WITHOUT_SPACES = ("zh", "ja")
# Lists of words have no marks. The most common are as frequent as the most frequent words, others
# as a word of rank 1,000.
_COMMON_MARKS, _COMMON_SHARE = (".", ",", "\n", "\n\n", "'", '"'), 2e-2
_MARK_SHARE = 1e-4
_ASCII = [chr(code) for code in range(0x20, 0x7F) if not chr(code).isalpha()]
# Quotation marks, alone and with what stands beside them, dashes and dots.
_TYPOGRAPHIC = (
    "\u2018 \u2019 \u201c \u201d .\u201d ,\u201d ?\u201d "
    "\u2019s \u2019t \u2019re \u2019ll \u2019ve \u2013 \u2014 \u2026"
)
# What stands side by side so often that vocabularies have it as one token: in speech, at brackets,
# in Markdown.
_TOGETHER = '." ," !" ?" ", ". ..." .) ,) ), ). ): ); ... -- --- ** :** **: .** ## ### ``` ("'
# The same in code, markup and tables, by hand. So are words of code, which lists of words count as
# prose has them.
_TOGETHER_IN_CODE = """
() (); (): )) ))) ")) ')) )); ); ): ), (" (' ") ') "), '), ", ', ": ': ]( [] ] ]: ], [" [' "] ']
{} { } }; }, == != <= >= => -> += -= && || :: // /* */ <!-- --> </ /> =" "> '> ._ .__ __ __(
`, `. `: `) (` \"\"\" \'\'\' :// ```python #### ---- ---------- ---------------- | \u2022
\u2192 1. 2. 3. #!/ \\n
"""
_WORDS_OF_CODE = """
def return import from class self None True False if elif else for while in not and or is with as
try except raise finally lambda yield pass break continue global assert async await print len range
str int float list dict set tuple open function const let var new this null undefined true false
typeof export default require console log string number boolean void static public private char
struct include main value name key data type index item items result error args array object file
path node id url http https www com org html div span href src style script body head json select
where insert update delete table user test config get add init run start end size length count git
npm pip install sudo apt
"""
_MARKS = [
    *(form for mark in _ASCII for form in (mark, f" {mark}", mark * 2, f"{mark}\n")),
    *_TYPOGRAPHIC.split(),
    *(
        form
        for part in (_TOGETHER, _TOGETHER_IN_CODE, _WORDS_OF_CODE)
        for together in part.split()
        for form in (together, f" {together}")
    ),
    *(" " * count for count in range(2, 33)),
    *("\t" * count for count in range(1, 4)),
    *("\n" * count for count in range(3, 5)),
]
_BATCH_ROWS = 1024
# Of a blob, what a page reads before it knows where rows lie.
_BLOB_START_BYTES = 16_384
# Of a starter, about what stands before its rows.
_HEAD_BYTES = 1024
_ID_BYTES = 8


def choose_rows(
    bundle: Bundle,
    blob: Blob,
    *,
    count: int,
    texts: Sequence[Path] = (),
    languages: Sequence[str] = DEFAULT_LANGUAGES,
) -> tuple[NDArray[np.int64], float | None]:
    """Token ids of the rows that are used most, the most used first, and what they cover.

    What every text has, special tokens and what stands around a message, comes before all others.

    Args:
        count: most rows.
        texts: files to count; the words of the languages are taken where there are none.
        languages: codes such as "en"; all count alike.
    Returns:
        `[n]`, and the share of the tokens of the texts that these are; None without texts.
    Raises:
        InputError: a text cannot be read, or a language is not known.
        BundleError: the bundle has no tokenizer.
        MissingDependencyError: words are asked for, and `wordfreq` is not installed.
    """
    tokenizer = open_tokenizer(bundle.tokenizer_files)
    if tokenizer is None:
        raise BundleError(
            f"`{bundle.path}` has no tokenizer, so nothing tells which rows texts use",
            hint="build it with `--tokenizer PATH`",
        )
    if texts:
        ids = [tokenizer.encode_file(path, num_rows=blob.num_rows) for path in texts]
        counts: Mapping[int, float] = Counter(i for found in ids for i in found)
    else:
        counts = _count_words(tokenizer, languages)
    by_count = sorted(counts, key=lambda i: (-counts[i], i))
    order = [*_always(bundle, tokenizer), *by_count]
    known = [i for i in dict.fromkeys(order) if i < blob.num_rows]
    chosen = known[:count]
    held = set(chosen)
    total = sum(counts.values()) if texts else 0
    covered = sum(n for i, n in counts.items() if i in held) / total if total else None
    return np.array(chosen, dtype=np.int64), covered


def row_count(blob: Blob, *, share: float) -> int:
    """How many rows a starter may have: with what else a page reads first, a share of the table."""
    table = blob.num_rows * blob.row_stride
    room = share * table - _BLOB_START_BYTES - _HEAD_BYTES
    return max(1, int(room / (blob.row_stride + _ID_BYTES)))


def write_starter(blob: Blob, token_ids: NDArray[np.int64], path: Path) -> None:
    """Write rows of a blob, each compared with its checksum, in the order of the ids.

    The form is in docs/packaging.md.

    Raises:
        CheckFailed: a row does not match its checksum.
    """
    metadata = {
        "format": "pleexport-starter",
        "version": "1",
        "source_digest": blob.metadata["source_digest"],
    }
    tensors = {
        TOKEN_IDS: ("I64", [len(token_ids)]),
        ROWS: ("U8", [len(token_ids), blob.row_stride]),
    }
    row_ids = blob.row_ids(token_ids)
    with path.open("wb") as file:
        file.write(checked_head(metadata, tensors, page_size=8))
        file.write(token_ids.astype("<i8").tobytes())
        for begin in range(0, len(row_ids), _BATCH_ROWS):
            file.write(blob.stored_rows(row_ids[begin : begin + _BATCH_ROWS]).tobytes())


def _always(bundle: Bundle, tokenizer: Tokenizer) -> list[int]:
    """What every text has."""
    ids = [*bundle.manifest.eos_token_ids, *tokenizer.encode("")]
    chat = bundle.manifest.chat_format
    if chat is not None:
        message = [{"role": "user", "content": "a"}]
        ids += tokenizer.encode_prompt(chat.render(message))
    elif tokenizer.has_chat_template:
        ids += tokenizer.encode_chat([{"role": "user", "content": "a"}])
    return ids


def _count_words(tokenizer: Tokenizer, languages: Iterable[str]) -> dict[int, float]:
    """How often tokens stand in ordinary text, by the words of some languages."""
    try:
        import wordfreq
    except ImportError as err:
        raise MissingDependencyError(
            "how often words are used is told by wordfreq, which is not installed",
            hint="pip install 'pleexport[web]', or count a text of yours with `--text FILE`",
        ) from err
    counts: dict[int, float] = defaultdict(float)
    for language in languages:
        known = wordfreq.available_languages("best")
        if language not in known:
            raise InputError(
                f"there are no words of language `{language}`; known: {', '.join(sorted(known))}",
                hint="choose some of them, or count a text of yours with `--text FILE`",
            )
        words = wordfreq.get_frequency_dict(language, "best")
        forms = (("{word}", 1.0),) if language in _WITHOUT_SPACES else _FORMS
        for word in list(words)[:_MOST_WORDS]:
            name = word[:1].upper() + word[1:]
            for form, share in forms:
                for token_id in tokenizer.encode_prompt(form.format(word=word, name=name)):
                    counts[token_id] += share * words[word]
    for marks, share in ((_COMMON_MARKS, _COMMON_SHARE), (_MARKS, _MARK_SHARE)):
        for mark in marks:
            for token_id in tokenizer.encode_prompt(mark):
                counts[token_id] += share
    return counts
