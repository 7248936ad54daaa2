"""What the original makes of text: its tokenizer as one file, and its answers to hard cases.

transformers reads a folder by rules of its own: tokens that stand in five files, classes that build
the tokenizer anew, templates in four places. So its tokenizer is asked what it has become, and the
bundle stores that. What it answers is what the bundle is compared with.

`read_original_text` runs this module as a process of its own, without torch: half a million merges
as Python objects would stay in the memory of a build, and a template that hangs would hang it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from pleexport.checkpoint.text_files import MORE_TEMPLATES
from pleexport.errors import PleexportError
from pleexport.parity.text_cases import CONVERSATIONS, TEXTS, id_sequences, texts_around
from pleexport.runtime.template_limit import within_limits
from pleexport.runtime.tokenizer import CHAT_TEMPLATE, TOKENIZER, TOKENIZER_CONFIG
from pleexport.whole_file import read_whole

# What templates take for the present, here and there.
NOW = datetime(2026, 2, 3, 14, 5, 6)
_WITNESS, _PROBLEM = "witness.json", "problem.txt"
_SECONDS = 300
# Source: sysexits.h, EX_IOERR.
_DISK_FAILED = 74
_MEMORY_BYTES = 6 << 30
# Where a processor keeps a chat template, the first first; transformers reads them in this order.
PROCESSOR_TEMPLATES = ("processor_config.json", "chat_template.json")
_PASSED_ON = (
    "clean_up_tokenization_spaces",
    "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output",
    "split_special_tokens",
    "response_template",
)


class Encoded(msgspec.Struct, frozen=True):
    """A text and its ids."""

    text: str
    ids: list[int]


class Rendered(msgspec.Struct, frozen=True):
    """A conversation by its name in `CONVERSATIONS`: its text and ids, or why there are none."""

    name: str
    text: str | None
    ids: list[int]
    refusal: str | None


class Decoded(msgspec.Struct, frozen=True):
    """Ids and their texts: special tokens left out, and with them."""

    ids: list[int]
    text: str
    with_specials: str


class Witness(msgspec.Struct, frozen=True, kw_only=True):
    """What the original says.

    Attributes:
        name: of the original.
        template: where its chat template stands; None where there is none.
        notes: sentences about what a user should know.
    """

    name: str
    template: str | None
    notes: list[str]
    texts: list[Encoded]
    conversations: list[Rendered]
    decoded: list[Decoded]


class OriginalText(msgspec.Struct, frozen=True):
    """The original's tokenizer as files for a bundle, and what it says.

    Attributes:
        files: by the names that a bundle gives them; empty where it cannot be opened.
        witness: None where it cannot be opened.
        problem: why it cannot be opened, as a clause.
    """

    files: dict[str, Path]
    witness: Witness | None
    problem: str | None


def read_original_text(source: Path, folder: Path) -> OriginalText:
    """Open the original's tokenizer in a process of its own.

    Args:
        source: a folder as transformers reads it, or a tokenizer.json.
        folder: where files are written.
    Raises:
        PleexportError: they cannot be written.
    """
    above = Path(__file__).parents[2]  # where this package is found
    paths = [str(above), *filter(None, [os.environ.get("PYTHONPATH")])]
    command = [sys.executable, "-P", "-m", __name__, str(source.resolve()), str(folder.resolve())]
    try:
        done = subprocess.run(
            command,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return OriginalText({}, None, f"it takes longer than {_SECONDS} s")
    if done.returncode == _DISK_FAILED:
        raise PleexportError(
            f"`{folder}` cannot be written: {done.stderr.splitlines()[-1].lower()}",
            hint="free some space or check the disk, or set `TMPDIR` to another folder",
        )
    return _collect(folder, done.stderr.strip() or f"exit code {done.returncode}")


def _collect(folder: Path, last_words: str) -> OriginalText:
    """What `_write` has left in a folder."""
    if (folder / _PROBLEM).is_file():
        return OriginalText({}, None, (folder / _PROBLEM).read_text(encoding="utf-8"))
    if not (folder / _WITNESS).is_file():
        return OriginalText({}, None, last_words.splitlines()[-1])
    witness = msgspec.json.decode((folder / _WITNESS).read_bytes(), type=Witness)
    names = (TOKENIZER, TOKENIZER_CONFIG, CHAT_TEMPLATE)
    files = {name: folder / name for name in names if (folder / name).is_file()}
    return OriginalText(files, witness, None)


def _write(source: Path, folder: Path) -> None:
    """Write the tokenizer's files and the witness, or the problem."""
    for name, content in _made_of(source).items():
        (folder / name).write_bytes(content)


def _made_of(source: Path) -> dict[str, bytes]:
    """By name, the tokenizer's files and the witness, or the problem."""
    try:
        tokenizer = _open(source)
        notes: list[str] = []
        place, templates = _templates(tokenizer, source, notes)
        made = _files(tokenizer, templates)
        witness = Witness(
            name=f"transformers {_version('transformers')}, {type(tokenizer).__name__}",
            template=place,
            notes=notes,
            texts=list(_encoded(tokenizer)),
            conversations=list(_rendered(tokenizer, templates)) if templates else [],
            decoded=list(_decoded(tokenizer)),
        )
        return made | {_WITNESS: msgspec.json.encode(witness)}
    except Exception as err:  # whatever transformers raises is a sentence for a user
        lines = [line for line in str(err).splitlines() if line.strip()]
        problem = f"{type(err).__name__}: {lines[0].strip()}" if lines else type(err).__name__
        return {_PROBLEM: problem.encode()}


def _open(source: Path) -> Any:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if source.is_file():
        return PreTrainedTokenizerFast(tokenizer_file=str(source))
    tokenizer = AutoTokenizer.from_pretrained(
        str(source), local_files_only=True, trust_remote_code=False
    )
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise TypeError(f"{type(tokenizer).__name__} cannot be written as a tokenizer.json")
    return tokenizer


def _templates(tokenizer: Any, source: Path, notes: list[str]) -> tuple[str | None, dict[str, str]]:
    """Where the chat templates stand, and these by name: the tokenizer's, or else a processor's."""
    own = tokenizer.chat_template
    named = own if isinstance(own, dict) else {"default": own} if own else {}
    place = None
    if named:
        place = TOKENIZER_CONFIG
        if (source / CHAT_TEMPLATE).is_file() or (source / MORE_TEMPLATES).is_dir():
            place = CHAT_TEMPLATE
    for name in PROCESSOR_TEMPLATES:
        try:
            found = json.loads(read_whole(source / name)).get("chat_template")
        except (OSError, ValueError, AttributeError):
            continue
        if isinstance(found, list):
            found = {t["name"]: t["template"] for t in found}
        processors = found if isinstance(found, dict) else {"default": found} if found else {}
        if processors and not named:
            named, place = processors, name
        elif processors and processors != named:
            notes.append(f"`{name}` has another chat template than `{place}`, which is used")
    return place, {str(k): str(v) for k, v in named.items()}


def _files(tokenizer: Any, templates: Mapping[str, str]) -> dict[str, bytes]:
    """By name, the tokenizer as one file, and what else a runner has to know."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    made = {TOKENIZER: backend.to_str(pretty=False).encode()}
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    named = tokenizer.special_tokens_map
    config |= {name: text for name, text in named.items() if name.endswith("_token")}
    if others := {k: v for k, v in named.items() if not k.endswith("_token")}:
        config["model_specific_special_tokens"] = others
    if extra := [str(token) for token in tokenizer.extra_special_tokens]:
        config["extra_special_tokens"] = extra
    config |= {k: v for k in _PASSED_ON if (v := getattr(tokenizer, k, None))}
    if set(templates) == {"default"}:
        made[CHAT_TEMPLATE] = templates["default"].encode()
    elif templates:
        config["chat_template"] = [{"name": k, "template": v} for k, v in templates.items()]
    text = json.dumps(config, indent=2, ensure_ascii=False)
    return made | {TOKENIZER_CONFIG: (text + "\n").encode()}


def _encoded(tokenizer: Any) -> Iterator[Encoded]:
    added = [token.content for token in tokenizer.added_tokens_decoder.values()]
    for text in (*TEXTS, *texts_around(added)):
        yield Encoded(text, tokenizer(text)["input_ids"])


def _rendered(tokenizer: Any, templates: dict[str, str]) -> Iterator[Rendered]:
    from transformers.utils import chat_template_utils

    tokenizer.chat_template = templates
    chat_template_utils.datetime = _Clock
    for name, messages, arguments in CONVERSATIONS:
        try:
            text = within_limits(
                partial(tokenizer.apply_chat_template, messages, tokenize=False, **arguments)
            )
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        except Exception as err:  # templates refuse with whatever they like
            yield Rendered(name, None, [], str(err))
        else:
            yield Rendered(name, text, ids, None)


def _decoded(tokenizer: Any) -> Iterator[Decoded]:
    vocabulary = tokenizer.get_vocab()
    added = list(tokenizer.added_tokens_decoder)
    pieces = [i for token, i in vocabulary.items() if token.startswith("<0x")]
    short = [i for token, i in vocabulary.items() if len(token) == 1]
    # Sorted, as a vocabulary has no order that is always the same.
    for ids in id_sequences(
        max(vocabulary.values()) + 1, [sorted(p) for p in (added, pieces, short)]
    ):
        text, with_specials = (
            tokenizer.decode(ids, skip_special_tokens=skip) for skip in (True, False)
        )
        yield Decoded(ids, text, with_specials)


class _Clock:
    @staticmethod
    def now() -> datetime:
        return NOW


def _version(package: str) -> str:
    import importlib.metadata

    return importlib.metadata.version(package)


def _main() -> None:
    # Tokenizers need none of them, and they take most of the time and memory.
    for library in ("torch", "tensorflow", "jax"):
        sys.modules[library] = None  # type: ignore[assignment]
    with suppress(ImportError, ValueError, OSError):  # not on Windows
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (_MEMORY_BYTES, _MEMORY_BYTES))
    try:
        _write(Path(sys.argv[1]), Path(sys.argv[2]))
    except OSError as err:
        print(err.strerror, file=sys.stderr)
        raise SystemExit(_DISK_FAILED) from None


if __name__ == "__main__":
    _main()
