"""One integer, one input: which base, what is changed in it, and what is done with it."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import xxhash

from .bases import BASES, Base
from .byte_edits import edit_bytes
from .graph_edits import edit_protobuf
from .header_edits import edit_safetensors, split
from .json_edits import edit_json
from .pickle_edits import edit_pth
from .text_edits import edit_template, edit_toml, edit_vocabulary

CHUNK = 1 << 20
# What is done with a base of a kind, and how often, of a thousand.
OPERATIONS = {
    "bundle": {
        **{"open": 405, "run": 280, "verify": 190, "unchecked": 35, "packed": 10, "command": 40},
        "package": 40,
    },
    "program": {"open": 300, "run": 460, "verify": 200, "command": 40},
    "package": {"replace": 700, "open": 300},
    "checkpoint": {"match": 560, "inspect": 220, "rows": 195, "build": 3, "command": 22},
    "adapter": {"match": 560, "inspect": 220, "rows": 195, "build": 3, "command": 22},
    "tokenizer": {"tokenizer": 1000},
    "targets": {"target": 960, "command": 40},
}
# Names and values that some config somewhere has.
ODD_FIELDS: list[tuple[str, Any]] = [
    ("quantization_config", {"quant_method": "gptq", "bits": 4, "group_size": 128}),
    ("quantization_config", {"quant_method": "compressed-tensors", "config_groups": {}}),
    ("auto_map", {"AutoConfig": "evil.EvilConfig"}),
    ("transformers_weights", "../outside.bin"),
    ("text_config", {"model_type": "gemma4_text"}),
    ("rope_parameters", {"rope_type": "yarn", "factor": 0}),
    ("rope_scaling", {"type": "linear", "factor": float("nan")}),
    ("dtype", "float64"),
    ("torch_dtype", "int8"),
    ("model_type", "gemma3n_text"),
    ("layer_types", []),
    ("tie_word_embeddings", False),
    ("attention_bias", True),
    ("hidden_act", "swish"),
    ("sliding_window", 0),
    ("num_experts", 8),
]


@dataclass(frozen=True)
class Case:
    """An input.

    Attributes:
        edits: what was changed, as sentences for people.
        sealed: the checksums of a bundle fit what was changed.
        operation: what is done with it.
        changed: content by name; None for a file that is gone.
    """

    seed: int
    base: str
    operation: str
    sealed: bool
    edits: list[str]
    changed: dict[str, bytes | None]
    links: dict[str, str]


@functools.cache
def _corpus() -> dict[int, list[str]]:
    """By seed: its base, its operation, and what is of interest in it.

    Both are named, so that the inputs stay what they are when others are to come more often.
    """
    corpus = json.loads(Path(__file__).with_name("corpus.json").read_bytes())
    return {int(seed): entry for seed, entry in corpus.items()}


def corpus_seeds() -> list[int]:
    """Seeds whose inputs were findings once, or are of a kind of their own."""
    return list(_corpus())


def base_and_operation(seed: int) -> tuple[str, str, Random]:
    """What a seed is about, which depends on nothing else; and the chances for the rest."""
    random = Random(seed)
    name = random.choices(list(BASES), [often for _, often in BASES.values()])[0]
    mix = OPERATIONS[BASES[name][0]]
    operation = random.choices(list(mix), list(mix.values()))[0]
    if seed in _corpus():
        name, operation, _ = _corpus()[seed]
    return name, operation, random


def make_case(seed: int, bases: Mapping[str, Base]) -> Case | None:
    """The input of a seed; None where its base could not be made."""
    name, operation, random = base_and_operation(seed)
    if name not in bases:
        return None
    base = bases[name]
    sealed = base.kind in {"bundle", "program"} and random.random() < 0.6
    pool = _pool(bases)
    changed: dict[str, bytes | None] = {}
    links: dict[str, str] = {}
    edits: list[str] = []
    for _ in range(random.choice((1, 1, 1, 1, 2))):
        file = _choose(base, random, sealed=sealed)
        old = changed.get(file, base.content[file])
        if old is None:
            continue
        if random.random() < 0.04:
            edits.append(_edit_folder(base, file, changed, links, random))
            continue
        edit = _editor(file, random)
        try:
            changed[file] = edit(old, random, pool)
        except RecursionError:  # an edit before this one made it too deep
            changed[file] = edit_bytes(old, random)
        edits.append(f"{file}: {edit.__name__}")
    if sealed:
        _seal(base, changed)
    return Case(seed, name, operation, sealed, edits, changed, links)


def write_case(case: Case, base: Base, folder: Path) -> None:
    """Put the files of an input into an empty folder."""
    for name, content in (base.content | case.changed).items():
        if name in case.links:
            (folder / name).symlink_to(case.links[name])
        elif content is not None:
            (folder / name).write_bytes(content)


def _choose(base: Base, random: Random, *, sealed: bool) -> str:
    """A file; one without a grammar less often.

    No program whose checksum fits: ExecuTorch ends the process over some. docs/security.md, Limits.
    """
    names = [name for name in base.content if not (sealed and name.endswith(".pte"))]
    weights = [1.0 if name.endswith(".data") else 3.0 for name in names]
    return random.choices(names, weights)[0]


def _edit_folder(
    base: Base,
    file: str,
    changed: dict[str, bytes | None],
    links: dict[str, str],
    random: Random,
) -> str:
    """Another file in a file's place, a link, or none."""
    other = random.choice(list(base.content))
    match random.randrange(5):
        case 0:
            changed[file] = None
            return f"{file} is gone"
        case 1:
            changed[file] = base.content[other]
            return f"{file} is {other}"
        case 2:
            place = random.choice(("../outside.bin", "/dev/zero", file, ".", "gone", "/dev/stdin"))
            changed[file], links[file] = b"", place
            return f"{file} is a link to {place}"
        case 3:
            changed[file] = b""
            return f"{file} is empty"
        case _:
            changed[f"{file}.x"] = base.content[file]
            return f"{file}.x is there too"


Editor = Callable[[bytes, Random, list[tuple[str, Any]]], bytes]


def _editor(name: str, random: Random) -> Editor:
    """How a file is changed: by its grammar, mostly."""
    by_ending: dict[str, Callable[[bytes, Random], bytes]] = {
        ".safetensors": edit_safetensors,
        ".onnx": edit_protobuf,
        ".pth": edit_pth,
        ".jinja": edit_template,
        ".toml": edit_toml,
        ".txt": edit_vocabulary,
    }
    ending = name[name.rfind(".") :]
    if random.random() < 0.12:
        return _plainly(edit_bytes)
    if ending == ".json":
        return edit_json
    return _plainly(by_ending.get(ending, edit_bytes))


def _plainly(edit: Callable[[bytes, Random], bytes]) -> Editor:
    def plain(data: bytes, random: Random, _pool: list[tuple[str, Any]]) -> bytes:
        return edit(data, random)

    plain.__name__ = edit.__name__
    return plain


_POOLS: dict[int, list[tuple[str, Any]]] = {}


def _pool(bases: Mapping[str, Base]) -> list[tuple[str, Any]]:
    """Names and values of all configs, and odd ones; the same for the same bases."""
    if id(bases) not in _POOLS:
        found = list(ODD_FIELDS)
        for base in bases.values():
            if base.kind in {"program", "package"}:
                continue  # which have copies of others'
            for name in ("config.json", "generation_config.json", "adapter_config.json"):
                if name in base.content:
                    found += sorted(json.loads(base.content[name]).items())
        _POOLS[id(bases)] = found
    return _POOLS[id(bases)]


def _seal(base: Base, changed: dict[str, bytes | None]) -> None:
    """Make the checksums of a bundle fit, where what is changed still has a place for them."""
    for name, content in changed.items():
        if name.endswith(".safetensors") and content is not None:
            changed[name] = _sealed_head(content)
    whole = base.content | changed
    files = {n: c for n, c in whole.items() if c is not None and n != "checksums.json"}
    if "manifest.json" not in changed:
        manifest = json.loads(base.content["manifest.json"])
        for record in manifest["files"]:
            data = files.get(record["name"])
            if data is not None:
                record |= {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        changed["manifest.json"] = files["manifest.json"] = json.dumps(manifest).encode()
    if "checksums.json" not in changed:
        sums = {name: _checksums(data) for name, data in files.items()}
        head = {"format": "pleexport-checksums", "version": 1, "chunk_bytes": CHUNK}
        changed["checksums.json"] = json.dumps(head | {"files": sums}).encode()


def _checksums(data: bytes) -> list[str]:
    pieces = [data[i : i + CHUNK] for i in range(0, len(data), CHUNK)]
    return [f"{xxhash.xxh3_64_intdigest(piece):016x}" for piece in pieces]


def _sealed_head(data: bytes) -> bytes:
    """The file with the checksum of its header, and those of the rows of a blob, made right."""
    with contextlib.suppress(ValueError, KeyError, TypeError, IndexError, RecursionError):
        header, tensors = split(data)
        size = int.from_bytes(data[:8], "little")
        head = data[: 8 + size]
        tensors = xxhash.xxh3_64_intdigest(head).to_bytes(8, "little") + tensors[8:]
        data = head + tensors
        begin, end = header["rows"]["data_offsets"]
        count, stride = header["rows"]["shape"]
        if stride > 8 and 0 <= begin <= end == begin + count * stride <= len(tensors):
            rows = [tensors[i : i + stride] for i in range(begin, end, stride)]
            fitted = b"".join(r[:-8] + _raw_checksum(r[:-8]) for r in rows)
            sums = b"".join(
                _raw_checksum(fitted[i : i + CHUNK]) for i in range(0, len(fitted), CHUNK)
            )
            data = head + tensors[:begin] + fitted + sums + tensors[end + len(sums) :]
    return data


def _raw_checksum(data: bytes) -> bytes:
    return xxhash.xxh3_64_intdigest(data).to_bytes(8, "little")
