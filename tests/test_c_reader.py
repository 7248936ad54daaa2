"""docs/examples/blob.c is held to the conformance vectors and to the rules of docs/blob-format.md.

PLEEXPORT_C_READER names a program that was built elsewhere: `make arm64` gives one for another
processor.
"""

from __future__ import annotations

import base64
import json
import os
import random
import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import need
from resealed import CHUNK, checksum, header_of
from test_blob import raw_header, write_zeros
from test_blob_format_doc import HASHES, VECTORS, hashed_bytes
from test_conformance import FOLDER, MALFORMED, apply
from test_conformance import VECTORS as ASKED

from pleexport.export.shards import write_shard
from pleexport.runtime.blob import Blob

SOURCE = Path(__file__).parents[1] / "docs" / "examples" / "blob.c"
SPECIFICATION = Path(__file__).parents[1] / "docs" / "blob-format.md"
ELSEWHERE = os.environ.get("PLEEXPORT_C_READER")
BLOB, TIED = "embeddings.safetensors", "tied.safetensors"
# What the manifest says, or another file of the bundle: a reader of blobs sees none of it.
OF_BLOBS = [case for _, case in MALFORMED if re.fullmatch(r"[BT]-\d\d", case["rule"])]
# The Python reader takes NaN for a number; JSON, and this reader, do not.
OTHER_RULES = {"blob: a multiplier that is no number": "B-05"}


def compiled(out: Path, *options: str) -> Path:
    need("cc", why="the C reader needs a compiler: `apt-get install gcc libc6-dev`")
    command = ["cc", "-std=c11", "-Wall", "-Wextra", "-Werror", *options, "-o", out, SOURCE]
    subprocess.run(list(map(str, command)), check=True)
    return out


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(ELSEWHERE) if ELSEWHERE else compiled(tmp_path_factory.mktemp("c") / "blob", "-O2")


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that ends with another code at the first byte beyond what it may touch."""
    if ELSEWHERE:
        return Path(ELSEWHERE)
    checks = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    return compiled(tmp_path_factory.mktemp("c") / "sanitized", "-O1", "-g", *checks)


def run(reader: Path, *words: Any) -> subprocess.CompletedProcess[str]:
    command = [str(word) for word in (reader, *words)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def refusal(reader: Path, *words: Any) -> str:
    """The one sentence by which something is refused."""
    done = run(reader, *words)
    assert (done.returncode, done.stdout) == (2, ""), done
    (sentence,) = done.stderr.splitlines()
    assert sentence.startswith("error: ")
    return sentence


Found = dict[tuple[int, str], tuple[list[int], bytes]]


def look_up(reader: Path, files: Iterable[Path], ids: Iterable[int], *options: Any) -> Found:
    """By token id and table, the shape and the bytes of the vectors."""
    done = run(reader, *files, "--ids", ",".join(map(str, ids)), *options)
    assert (done.returncode, done.stderr) == (0, "")
    lines = map(json.loads, done.stdout.splitlines())
    return {(x["id"], x["table"]): (x["shape"], bytes.fromhex(x["vectors"])) for x in lines}


def tied_of(bundle: Path) -> list[Any]:
    return ["--tied", bundle / TIED] if (bundle / TIED).exists() else []


def wrong_rows(reader: Path, bundle: Path, asked: dict[str, Any]) -> list[Any]:
    ids = [case["id"] for case in asked["rows"]]
    found = look_up(reader, [bundle / BLOB], ids, *tied_of(bundle), "--verify")
    expected = {
        (case["id"], table): (shape, base64.b64decode(case["vectors"][table]))
        for case in asked["rows"]
        for table, shape in asked["tables"].items()
    }
    assert found.keys() == expected.keys()
    return [key for key in expected if found[key] != expected[key]]


def test_hashes_are_those_of_xxh3(reader: Path, tmp_path: Path) -> None:
    expected = json.loads(HASHES.read_text())["hashes"]
    for length, _ in expected:
        (tmp_path / f"{length}").write_bytes(hashed_bytes(length))
    done = run(reader, "--xxh3", *(tmp_path / f"{length}" for length, _ in expected))
    assert done.stdout.split() == [digest for _, digest in expected]


@pytest.mark.parametrize("name", ASKED)
def test_rows_of_the_conformance_vectors_are_equal_in_every_bit(name: str, reader: Path) -> None:
    bundle, asked = FOLDER / name, ASKED[name]
    assert wrong_rows(reader, bundle, asked) == []
    for token_id in asked["refused_ids"]:
        sentence = refusal(reader, bundle / BLOB, "--ids", token_id, *tied_of(bundle))
        assert f"token id {token_id} has no row" in sentence
        assert "(B-14)" in sentence


def test_a_changed_bit_of_a_vector_is_found(reader: Path) -> None:
    asked = json.loads((FOLDER / "gemma4-int4.json").read_text())
    for table in asked["tables"]:
        vectors = asked["rows"][1]["vectors"]
        data = bytearray(base64.b64decode(vectors[table]))
        data[-4] ^= 1  # the last bit of the last number
        changed = base64.b64encode(data).decode()
        rows = [*asked["rows"][:1], {"id": 1, "vectors": vectors | {table: changed}}]
        found = wrong_rows(reader, FOLDER / "gemma4-int4", asked | {"rows": rows})
        assert found == [(1, table)]


@pytest.mark.parametrize("path", sorted(VECTORS.glob("*.safetensors")), ids=lambda path: path.stem)
def test_rows_of_the_formats_vectors_are_equal_in_every_bit(path: Path, reader: Path) -> None:
    tables = json.loads(path.with_suffix(".json").read_text())["tables"]
    ids = range(len(next(iter(tables.values()))))
    found = look_up(reader, [path], ids, "--verify")
    for table, rows in tables.items():
        for i, row in enumerate(np.array(rows, "<f4")):
            assert found[i, table] == ([*row.shape], row.tobytes())


@pytest.mark.parametrize("path", sorted(VECTORS.glob("tied/*.safetensors")), ids=lambda p: p.stem)
def test_rows_of_tied_vectors_are_equal_in_every_bit(
    path: Path, reader: Path, tmp_path: Path
) -> None:
    expected = json.loads(path.with_suffix(".json").read_text())
    rows = np.array(expected["vectors"], "<f4")
    write_zeros(tmp_path / "blob", num_rows=len(rows))
    files, ids = [tmp_path / "blob"], range(len(rows))
    found = look_up(reader, files, ids, "--tied", path, "--verify")
    for i, row in enumerate(rows):
        assert found[i, expected["table"]] == ([len(row)], row.tobytes())
    write_zeros(tmp_path / "blob", num_rows=len(rows) + 1)
    assert "(T-07)" in refusal(reader, *files, "--tied", path)


def test_malformed_files_are_refused_by_the_rule_that_they_break(
    sanitized: Path, tmp_path: Path
) -> None:
    others = []
    for case in OF_BLOBS:
        bundle = Path(shutil.copytree(FOLDER / "gemma4-int4", tmp_path / "b", dirs_exist_ok=True))
        manifest = json.loads((bundle / "manifest.json").read_text())
        digest = manifest["graphs"]["decoder"]["weights_digest"]
        apply(bundle, case["changes"])
        words = [bundle / BLOB, *tied_of(bundle), "--weights-digest", digest]
        if case["when"] == "lookup":
            beside = [case["id"] - 1, case["id"] + 1]
            assert len(look_up(sanitized, words[:1], beside, *words[1:])) == 4
            words += ["--ids", case["id"]]
        rule = OTHER_RULES.get(case["name"], case["rule"])
        if f"({rule})" not in refusal(sanitized, *words):
            others.append((case["name"], rule, refusal(sanitized, *words)))
    assert others == []
    assert {case["rule"] for case in OF_BLOBS} >= {f"B-{n:02}" for n in (*range(1, 13), 16)}


def test_mutated_headers_never_reach_beyond_the_file(sanitized: Path, tmp_path: Path) -> None:
    """Whatever a header says, under a sound checksum: rows are read, or one sentence is said."""
    path, chance = tmp_path / "blob", random.Random(5)
    whole = (VECTORS / "int8-int2-kept.safetensors").read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    text = len(whole[:start].rstrip(b" "))
    pieces = [b"0", b"9", b"-1", b"9007199254740991", b"1e9", b'"', b"\\u0000", b"\\ud800", b"["]
    pieces += [b"{}", b"null", b"\xff", b"\xf4\x8f\xbf\xbf", b"", b"]", b",", b"}" * 40, b"[" * 40]
    codes = []
    for _ in range(100):
        at = chance.randrange(8, text)
        head = whole[:at] + chance.choice(pieces) + whole[at + chance.choice((0, 1, 1, 4)) : start]
        head = head.rstrip(b" ").ljust(start)[:start]
        path.write_bytes(head + checksum(head) + whole[start + 8 :])
        done = run(sanitized, path, "--ids", "0,1,2", "--verify")
        codes.append(done.returncode)
        assert codes[-1] in (0, 2), done.stderr
        assert len(done.stderr.splitlines()) == (codes[-1] > 0)
    assert {*codes} == {0, 2}


@pytest.mark.parametrize("kept", [0, 7, 8, 9, 20, 16_383, 16_384, 16_400, -1])
def test_a_file_that_is_cut_is_refused(kept: int, sanitized: Path, tmp_path: Path) -> None:
    path = tmp_path / "blob"
    path.write_bytes((VECTORS / "int8.safetensors").read_bytes()[:kept])
    refusal(sanitized, path, "--ids", "0")


def test_what_is_no_file_of_tensors_is_refused(sanitized: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("version https://git-lfs.github.com/spec/v1\n")
    for path in (tmp_path / "text", SOURCE):
        assert "is not a safetensors file" in refusal(sanitized, path)
    assert "No such file" in refusal(sanitized, tmp_path / "nowhere")
    assert "is not a safetensors file" in refusal(sanitized, tmp_path)
    for ids in ("", "1,", "x", "1;2", "99999999999999999999"):
        told = refusal(sanitized, VECTORS / "int8.safetensors", "--ids", ids)
        assert "takes integers with commas" in told


def test_rows_beyond_4_gib_are_reached(reader: Path, tmp_path: Path) -> None:
    stride, num_rows = 4160, 1_300_000  # 5.4 GB, sparse on disk
    head = raw_header(num_rows=num_rows, stride=stride, width=1024)
    last = np.arange(1024, dtype="<f4")
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.write(head + checksum(head))
        file.seek(16384 + (num_rows - 1) * stride)
        body = last.tobytes().ljust(stride - 8, b"\0")
        file.write(body + checksum(body))
        file.truncate(16384 + num_rows * stride + 8 * -(-num_rows * stride // CHUNK))
    found = look_up(reader, [path], [num_rows - 1])
    assert found[num_rows - 1, "t"] == ([1024], (2 * last).tobytes())


def test_rows_in_other_places_are_found(reader: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(VECTORS / "int8.safetensors", tmp_path / "blob"))
    raw, stride = bytearray(path.read_bytes()), header_of(path)["rows"]["shape"][1]
    first, second = slice(16384, 16384 + stride), slice(16384 + stride, 16384 + 2 * stride)
    raw[first], raw[second] = raw[second], raw[first]
    path.write_bytes(raw)
    assert run(reader, path, "--ids", "0,1").returncode == 0
    assert "(B-19)" in refusal(reader, path, "--verify")


def cut(blob: Path, into: Path, cuts: Sequence[int]) -> list[Path]:
    """Shards of a blob as docs/blob-format.md has them, with the rows between two cuts each."""
    raw, header = blob.read_bytes(), header_of(blob)
    start = 8 + int.from_bytes(raw[:8], "little")
    stride, shards = header["rows"]["shape"][1], []
    for first, end in pairwise(cuts):
        rows = raw[start + 8 + first * stride : start + 8 + end * stride]
        sums = b"".join(checksum(rows[i : i + CHUNK]) for i in range(0, len(rows), CHUNK))
        behind = 8 + len(rows)
        header["__metadata__"]["first_row"] = str(first)
        header["rows"].update(shape=[end - first, stride], data_offsets=[8, behind])
        header["checksums"].update(
            shape=[len(sums) // 8], data_offsets=[behind, behind + len(sums)]
        )
        head = raw[:8] + json.dumps(header, separators=(",", ":")).encode().ljust(start - 8)
        shards.append(into / f"{first}.safetensors")
        shards[-1].write_bytes(head + checksum(head) + rows + sums)
    return shards


def test_shards_of_one_blob_are_read_together(reader: Path, tmp_path: Path) -> None:
    bundle = FOLDER / "gemma4-int4"
    cuts = [0, 1, 100, 299, 300]
    shards = cut(bundle / BLOB, tmp_path, cuts)
    # They are what `pleexport package` writes, byte by byte.
    for shard, (first, end) in zip(shards, pairwise(cuts), strict=True):
        own = tmp_path / "own"
        write_shard(Blob(bundle / BLOB), range(first, end), own, lambda _: None)
        assert own.read_bytes() == shard.read_bytes()
    ids = [0, 1, 99, 100, 298, 299]
    whole = look_up(reader, [bundle / BLOB], ids, *tied_of(bundle))
    assert look_up(reader, shards[::-1], ids, *tied_of(bundle), "--verify") == whole
    # Aliases are those of the blob: id 3 selects row 0, which lies in another shard.
    aliased = VECTORS / "int8.safetensors"
    (tmp_path / "aliased").mkdir()
    parts = cut(aliased, tmp_path / "aliased", [0, 2, json.loads(rows_of(aliased))])
    assert look_up(reader, parts, [3]) == look_up(reader, [aliased], [3])
    assert (
        look_up(reader, parts, [3])[3, "embed_tokens"]
        == look_up(reader, parts, [0])[0, "embed_tokens"]
    )


def rows_of(blob: Path) -> str:
    total: str = header_of(blob)["__metadata__"]["num_rows_total"]
    return total


def test_shards_that_make_no_blob_are_refused(reader: Path, tmp_path: Path) -> None:
    blob = FOLDER / "gemma4-int4" / BLOB
    (a, b, c), one = cut(blob, tmp_path, [0, 100, 200, 300]), "(B-12)"
    assert "is a shard, rows 0 to 99 of 300" in refusal(reader, a)
    assert "the other shards have 200 rows of 300" in refusal(reader, a, b)
    for files in ([b, c], [a, c], [a, b, b, c], [a, b, c, blob]):
        assert "end at row" in refusal(reader, *files)
        assert one in refusal(reader, *files)
    raw = c.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    head = re.sub(rb"xxh3-128:.", b"xxh3-128:x", raw[:start])
    c.write_bytes(head + checksum(head) + raw[start + 8 :])
    assert "are not shards of one blob (B-12)" in refusal(reader, a, b, c)


def test_each_rule_for_readers_is_named_where_it_is_checked() -> None:
    page = SPECIFICATION.read_text(encoding="utf-8")
    readers = page[page.index("### Readers") : page.index("### Writers")]
    rules = re.findall(
        r"^- \*\*([BT]-\d\d)\*\*", readers + page[page.index("### Its rules") :], re.M
    )
    assert len(rules) == 19 + 11
    source = SOURCE.read_text(encoding="utf-8")
    assert [rule for rule in rules if rule not in source] == []
    assert [n for n, line in enumerate(source.splitlines(), 1) if len(line) > 100] == []
