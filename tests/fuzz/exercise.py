"""What is done with an input: everything that a user may do with a folder from a stranger."""

from __future__ import annotations

import hashlib
import shutil
import sys
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any
from unittest import mock

from pleexport.errors import InputError, PleexportError

from .bases import SMALL_PACKS, WORDS, in_two_shards

TEXT = "ab a é\n中 <tool><eos>\ufffd c"
MESSAGES = [
    {"role": "user", "content": "a b"},
    {"role": "assistant", "content": "<think>b</think>c", "reasoning_content": "b"},
    {"role": "user", "content": TEXT},
]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
IDS = [1, 2, 3, 5, 8, 13, 21, 34]


class Exit(PleexportError):
    """How the command line ended: its exit code."""

    def __init__(self, code: object) -> None:
        super().__init__(f"exit code {code}")
        self.code = code


class _Traced(PleexportError):
    """Rows and all checks of a build are done; the rest would take a second."""


def open_all(folder: Path) -> Any:
    """Open all of a bundle but its graph, and look up every row; what it said."""
    from pleexport import Bundle
    from pleexport.runtime.tokenizer import open_tokenizer

    bundle = Bundle(folder)
    blob = bundle.open_blob()
    ids = blob.row_ids(range(blob.num_rows))
    said: list[Any] = [[name, _digest(rows)] for name, rows in blob.lookup(ids).items()]
    tokenizer = open_tokenizer(bundle.tokenizer_files)
    if tokenizer:
        said.append(read_text(tokenizer))
    return said


def run(folder: Path, *, verify: bool = True, packed: Path | None = None) -> Any:
    """Open a bundle, ask it for logits, tokens and text; what it said."""
    from pleexport import Runner

    runner = Runner(folder, threads=1, verify=verify, packed_weights=packed)
    said: list[Any] = [_digest(runner.logits(IDS))]
    said.append([t.id for t in runner.generate(IDS[:3], max_new_tokens=4, greedy=True)])
    said.append([t.id for t in runner.generate(IDS[:2], max_new_tokens=3, seed=1)])
    if runner.tokenizer:
        said.append(read_text(runner.tokenizer))
        if runner.tokenizer.has_chat_template:
            said.append(runner.encode(MESSAGES))
    return said


def read_text(tokenizer: Any) -> Any:
    """Encode, decode, stream and render with a tokenizer; what it said."""
    ids = tokenizer.encode(TEXT)
    stream = tokenizer.stream(ids)
    pieces = [stream.push(i) for i in [*ids, 0, 7, max(0, tokenizer.size - 1)]]
    said = [ids, tokenizer.decode(ids), tokenizer.decode(ids, with_specials=True), pieces]
    said += [stream.flush(), tokenizer.size, tokenizer.special_tokens, tokenizer.thought_markers]
    said += [tokenizer.special_text(3)]
    if tokenizer.has_chat_template:
        said.append(tokenizer.encode_chat(MESSAGES))
        said.append(tokenizer.render_chat(MESSAGES[:1], {"tools": TOOLS, "enable_thinking": False}))
    return said


def open_text(folder: Path) -> Any:
    """Open the tokenizer of a folder, and use it."""
    from pleexport.runtime.tokenizer import open_tokenizer, tokenizer_files

    tokenizer = open_tokenizer(tokenizer_files(folder))
    return tokenizer and read_text(tokenizer)


def verify(folder: Path) -> Any:
    """Verify a bundle's files."""
    import pleexport

    return pleexport.verify(folder)


def package(folder: Path, seed: int, slot: Path) -> None:
    """Write a bundle as a package, and open the bundle that it holds."""
    import pleexport

    target = "android" if seed % 2 else str(slot / "bases" / SMALL_PACKS)
    with in_two_shards():
        made = pleexport.package(folder, slot / "out", target=target)
    joined = slot / "packed"
    joined.mkdir()
    for file in made.index.files:
        (joined / file.name).symlink_to(made.path / file.path)
    with suppress(PleexportError):  # the tokenizer may be none
        open_all(joined)


def replace(folder: Path, slot: Path) -> None:
    """Write a package of a bundle that nobody changed over one from a stranger."""
    import pleexport

    out, bases = slot / "out", slot / "bases"
    shutil.copytree(folder, out, symlinks=True)
    before = _listed(out)
    try:
        bundle = bases / "gemma4-bundle"
        pleexport.package(bundle, out, target="web", texts=[bases / WORDS], overwrite=True)
    except BaseException:
        if _listed(out) == before:
            shutil.rmtree(out)  # else what is left there is noticed
        raise


def _listed(folder: Path) -> list[tuple[str, int, int]]:
    found = [(path, path.lstat()) for path in folder.rglob("*")]
    return sorted((str(path), status.st_size, status.st_mtime_ns) for path, status in found)


def match(place: Path, **options: Any) -> Any:
    """Find the tensors of a checkpoint's model, as a build does and `inspect` tries to."""
    from pleexport.checkpoint.matching import MatchedModel
    from pleexport.checkpoint.trained_grid import mark_grids
    from pleexport.families.opening import open_model

    opened, model = open_model(place, offline=True, **options)
    return mark_grids(MatchedModel(model, opened)).checkpoint.notes


def inspect(place: Path, seed: int, **options: Any) -> Any:
    """Inspect a checkpoint; for one seed in four, make the text that a person reads of it."""
    import pleexport
    from pleexport.show.inspection import describe_model

    info = pleexport.inspect(place, offline=True, **options)
    return describe_model(info) if seed % 4 == 0 else None


def build(place: Path, out: Path, seed: int, **options: Any) -> None:
    """Build a bundle, and run it."""
    import pleexport

    dtypes = ("int4", "int8", "fp16", "fp32")
    pleexport.build(
        place,
        out,
        context=(256, 160, 200)[seed % 3],
        weight_dtype=dtypes[seed % 4],
        table_dtype=("source", *dtypes)[seed % 5],
        verify=seed % 7 == 0,
        offline=True,
        **options,
    )
    with suppress(InputError):  # a conversation may not fit what the input says of its length
        run(out)


def rows(place: Path, out: Path, seed: int, **options: Any) -> None:
    """Build a bundle as far as its rows are written and its graph would be traced."""

    def stop(*_: Any, **__: Any) -> None:
        raise _Traced("traced")

    with ExitStack() as patches:
        patches.enter_context(mock.patch("pleexport.families.trace.trace", stop))
        # A process of its own, which takes a second.
        if (place / "tokenizer.json").is_file():
            patches.enter_context(mock.patch("pleexport.parity.text.read_original_text", _unread))
        try:
            build(place, out, seed, **options)
        except _Traced:
            return


def _unread(_source: Path, _folder: Path) -> Any:
    from pleexport.parity.original_text import OriginalText

    return OriginalText({}, None, "it was not asked")


def target(folder: Path, name: str) -> Any:
    """Read a target, and make the text that a person reads of it."""
    from pleexport import targets
    from pleexport.show.targets import describe_target

    return describe_target(targets.load(str(folder / name)).with_backend("executorch"))


def command(arguments: list[str]) -> None:
    """Call the command line in this process.

    Raises:
        Exit: the exit code, where it is not 0.
    """
    from pleexport import cli

    with mock.patch.object(sys, "argv", ["pleexport", *arguments]):
        try:
            cli.main()
        except SystemExit as err:
            if err.code not in (0, None):
                raise Exit(err.code) from None


def exercise(operation: str, kind: str, folder: Path, inside: str, seed: int, slot: Path) -> Any:
    """Do with a folder what an operation says; what came of it.

    Args:
        inside: the file of the folder that is opened; "" for the folder.
        slot: what is written goes into its `out` and `packed`.
    """
    place, options = folder / inside, {}
    if kind == "adapter":
        options = {"base": slot / "bases" / "gemma4"}
    does: dict[str, Callable[[], Any]] = {
        "open": lambda: open_all(folder),
        "run": lambda: run(folder),
        "unchecked": lambda: run(folder, verify=False),
        "packed": lambda: run(folder, packed=slot / "packed"),
        "verify": lambda: verify(folder),
        "package": lambda: package(folder, seed, slot),
        "replace": lambda: replace(folder, slot),
        "match": lambda: match(place, **options),
        "inspect": lambda: inspect(place, seed, **options),
        "rows": lambda: rows(place, slot / "out", seed, **options),
        "build": lambda: build(place, slot / "out", seed, **options),
        "tokenizer": lambda: open_text(folder),
        "target": lambda: target(folder, inside or "laptop.toml"),
        "command": lambda: command(_arguments(kind, place, inside, seed, options)),
    }
    return does[operation]()


def _arguments(
    kind: str, place: Path, inside: str, seed: int, options: dict[str, Any]
) -> list[str]:
    if kind == "targets":
        name = place if inside else place / "laptop.toml"
        return ["targets", str(name), *(["--json"] if seed % 2 else [])]
    if kind in {"bundle", "program"}:
        run_it = ["run", str(place), "--ids", "1,2,3", "--max-new-tokens", "3", "--threads", "1"]
        return run_it if seed % 3 else ["verify", str(place)]
    base = ["--base", str(options["base"])] if options else []
    return ["inspect", str(place), "--offline", *base, *(["--json"] if seed % 2 else [])]


def _digest(array: Any) -> str:
    return hashlib.sha256(array.tobytes()).hexdigest()
