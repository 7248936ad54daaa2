"""The Python runner answers the conformance vectors, and what is wrong does not."""

from __future__ import annotations

import base64
import importlib.metadata
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import pleexport
from pleexport.errors import InputError, PleexportError
from pleexport.runtime.blob import Blob
from pleexport.runtime.json_tokenizer import JsonTokenizer
from pleexport.runtime.stopping import AnswerText
from pleexport.runtime.tokenizer import Tokenizer

FOLDER = Path(__file__).parents[1] / "conformance"
VECTORS = {path.stem: json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))}
WITH_TOKENIZER = [name for name, asked in VECTORS.items() if "texts" in asked]
MALFORMED = [(n, case) for n, asked in VECTORS.items() for case in asked.get("malformed", [])]
# Ways to feed 40 tokens: at once, in uneven pieces, one by one.
CUTS = ([0, 40], [0, 1, 8, 9, 31, 40], [*range(41)])
LOGITS = (("logits", "tolerance"), ("unrounded", "unrounded_tolerance"))
_LARGEST_FOLDER = 2_000_000


@lru_cache(maxsize=1)
def runner_of(name: str) -> pleexport.Runner:
    return pleexport.Runner(FOLDER / name, threads=1)


def floats(text: str, *shape: int) -> NDArray[np.float32]:
    return np.frombuffer(base64.b64decode(text), "<f4").reshape(shape)


# Each check yields a sentence for what differs.


def wrong_rows(runner: pleexport.Runner, asked: dict[str, Any]) -> Iterator[str]:
    for case in asked["rows"]:
        found = runner.blob.lookup(runner.blob.row_ids([case["id"]]))
        assert found.keys() == asked["tables"].keys()
        for table, shape in asked["tables"].items():
            expected = floats(case["vectors"][table], *shape)
            if not np.array_equal(found[table][0].view(np.uint32), expected.view(np.uint32)):
                yield f"row {case['id']} of {table}"
    for token_id in asked["refused_ids"]:
        with pytest.raises(InputError, match=f"token id {token_id} has no row"):
            runner.blob.row_ids([token_id])


def wrong_logits(
    runner: pleexport.Runner, asked: dict[str, Any], *, cuts: Any = CUTS
) -> Iterator[str]:
    for case in asked["logits"]:
        ids, positions = case["ids"], case["positions"]
        # Where inputs of matrices are not rounded, logits are right too.
        right = [
            (floats(case[logits], len(positions), -1), case[tolerance])
            for logits, tolerance in LOGITS
            if logits in case
        ]
        for cut in cuts:
            runner.reset()
            # A contract may take fewer tokens in a call.
            pieces = [
                runner.feed(ids[at : min(at + runner.chunk, end)], keep=0).copy()
                for begin, end in pairwise(cut)
                for at in range(begin, end, runner.chunk)
            ]
            found = np.concatenate(pieces)[positions]
            errors = [float(np.abs(found - logits).max()) for logits, _ in right]
            if not any(error <= most for error, (_, most) in zip(errors, right, strict=True)):
                yield f"logits are off by {errors}, fed as {cut[:4]}"


def wrong_greedy(runner: pleexport.Runner, asked: dict[str, Any]) -> Iterator[str]:
    for case in asked["greedy"]:
        count = len(case["ids"])
        tokens = runner.generate(
            case["prompt_ids"], max_new_tokens=count, greedy=True, ignore_eos=True
        )
        ids = [token.id for token in tokens]
        if ids != case["ids"]:
            yield f"after {case['prompt_ids']} come {ids}"


def wrong_text(tokenizer: Tokenizer, asked: dict[str, Any]) -> Iterator[str]:
    for case in asked["texts"]:
        if tokenizer.encode(case["text"]) != case["ids"]:
            yield f"ids of {case['text']!r}"
    for case in asked["decodings"]:
        if tokenizer.decode(case["ids"]) != case["text"]:
            yield f"the text of {case['ids']}"
        if tokenizer.decode(case["ids"], with_specials=True) != case["with_specials"]:
            yield f"the text with specials of {case['ids']}"
    for case in asked["streams"]:
        stream = tokenizer.stream(case["prompt_ids"])
        if [*map(stream.push, case["ids"]), stream.flush()] != case["pieces"]:
            yield f"the stream of {case['ids']} behind {case['prompt_ids']}"
        if not case["prompt_ids"] and "".join(case["pieces"]) != tokenizer.decode(case["ids"]):
            yield f"the pieces of {case['ids']} are not its text"
    yield from wrong_stops(tokenizer, asked)


def wrong_stops(tokenizer: Tokenizer, asked: dict[str, Any]) -> Iterator[str]:
    for case in asked["stops"]:
        answer, pieces = AnswerText(tokenizer.stream([]), case["stop"]), []
        for token_id in case["ids"]:
            pieces.append(answer.push(token_id))
            if answer.stopped:
                break
        else:
            pieces.append(answer.flush())
        if (pieces, answer.stopped) != (case["pieces"], case["stopped"]):
            yield f"the stop strings {case['stop']} in {case['ids']}"


def wrong_conversations(runner: pleexport.Runner, asked: dict[str, Any]) -> Iterator[str]:
    form, tokenizer = runner.bundle.manifest.chat_format, runner.tokenizer
    assert tokenizer is not None
    assert form is not None
    for case in asked["conversations"]:
        try:
            text = form.render(case["messages"], thinking=case.get("thinking"))
        except InputError:
            text = None
        if text != case["text"]:
            yield f"the text of {case['messages']}"
        if text is not None and tokenizer.encode_prompt(text) != case["ids"]:
            yield f"the ids of {case['messages']}"


def wrong(name: str, asked: dict[str, Any]) -> list[str]:
    runner = runner_of(name)
    found = [*wrong_rows(runner, asked), *wrong_logits(runner, asked), *wrong_greedy(runner, asked)]
    if runner.tokenizer:
        found += wrong_text(runner.tokenizer, asked)
    if runner.bundle.manifest.no_chat_format != asked.get("no_chat_format"):
        found.append("why there is no chat format")
    return found + ([*wrong_conversations(runner, asked)] if "conversations" in asked else [])


@pytest.mark.parametrize("name", VECTORS)
def test_the_python_runner_answers_the_vectors(name: str) -> None:
    assert wrong(name, VECTORS[name]) == []


@pytest.mark.parametrize(("name", "case"), MALFORMED, ids=[c["name"] for _, c in MALFORMED])
def test_a_malformed_bundle_is_refused(name: str, case: dict[str, Any], tmp_path: Path) -> None:
    copy = Path(shutil.copytree(FOLDER / name, tmp_path / "bundle"))
    apply(copy, case["changes"])
    if case["when"] == "lookup":
        runner = pleexport.Runner(copy, threads=1)
        runner.logits([case["id"] - 1, case["id"] + 1])  # other rows are sound
        with pytest.raises(PleexportError) as caught:
            runner.logits([case["id"]])
    else:
        with pytest.raises(PleexportError) as caught:
            pleexport.Runner(copy, threads=1)
    assert caught.value.message == case["message"].replace("BUNDLE", str(copy))


def apply(bundle: Path, changes: list[dict[str, Any]]) -> None:
    """Change files as docs/conformance.md says."""
    for change in changes:
        path = bundle / change["file"]
        if change.get("delete"):
            path.unlink()
            continue
        data = path.read_bytes()
        for offset, removed, added in reversed(change["splices"]):
            data = data[:offset] + bytes.fromhex(added) + data[offset + removed :]
        path.write_bytes(data)


def test_a_bundle_that_is_refused_is_exit_code_2(tmp_path: Path) -> None:
    name, case = next((n, c) for n, c in MALFORMED if c["when"] == "lookup")
    copy = Path(shutil.copytree(FOLDER / name, tmp_path / "bundle"))
    apply(copy, case["changes"])
    command = [sys.executable, "-m", "pleexport", "run", str(copy), "--ids", str(case["id"])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (case["exit_code"], "")
    assert {c["exit_code"] for _, c in MALFORMED} == {2}


# Controls: a changed answer is found, and so is a reader that is wrong.


@pytest.mark.parametrize("kind", ["rows", "logits", "greedy", "texts", "decodings", "streams"])
def test_a_changed_answer_is_found(kind: str) -> None:
    name = "gemma4-fp32"
    asked = json.loads((FOLDER / f"{name}.json").read_text())
    case = asked[kind][-1]
    if kind == "rows":
        table, (text, *_) = next(iter(asked["tables"])), case["vectors"].values()
        values = floats(text, -1).copy()
        values.view(np.uint32)[3] ^= 1  # the last bit of one number
        case["vectors"][table] = base64.b64encode(values.tobytes()).decode()
    elif kind == "logits":
        values = floats(case["logits"], len(case["positions"]), -1).copy()
        values[-1, 5] += 3 * case["tolerance"]
        case["logits"] = base64.b64encode(values.tobytes()).decode()
    else:
        field = {"decodings": "text", "streams": "pieces"}.get(kind, "ids")
        case[field] = case[field] + ("x" if field == "text" else ["x"])
    assert wrong(name, asked) != []


@pytest.mark.parametrize("kind", ["stops", "conversations"])
def test_a_changed_text_is_found(kind: str) -> None:
    name = "gemma4-fp32"
    asked = json.loads((FOLDER / f"{name}.json").read_text())
    field = "pieces" if kind == "stops" else "ids"
    asked[kind][0][field] = asked[kind][0][field][:-1]
    assert wrong(name, asked) != []


def other_row(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Blob.row_ids
    monkeypatch.setattr(Blob, "row_ids", lambda self, ids: real(self, ids) ^ 1)


def no_multiplier(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Blob.lookup
    monkeypatch.setattr(
        Blob,
        "lookup",
        lambda *a, **k: {t: np.float32(1.001) * v for t, v in real(*a, **k).items()},
    )


def no_holding_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(JsonTokenizer, "_is_byte", lambda *_: False)


def specials_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Tokenizer.decode
    monkeypatch.setattr(Tokenizer, "decode", lambda *a, **_: real(*a, with_specials=True))


@pytest.mark.parametrize("mutate", [other_row, no_multiplier, no_holding_back, specials_stay])
def test_a_wrong_reader_is_found(mutate: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    mutate(monkeypatch)
    runner = pleexport.Runner(FOLDER / "gemma4-fp32", threads=1)
    assert runner.tokenizer is not None
    asked = VECTORS["gemma4-fp32"]
    assert [*wrong_rows(runner, asked), *wrong_text(runner.tokenizer, asked)]


@pytest.mark.parametrize("name", VECTORS)
def test_tolerances_tell_wrong_logits(name: str) -> None:
    """One wrong token far back, or one position too few, is beyond the tolerance."""
    runner, asked = runner_of(name), VECTORS[name]
    (case,) = asked["logits"]
    for ids in ([*case["ids"][1:], case["ids"][0]], [*case["ids"][:-3], 2, 2, 2]):
        assert [*wrong_logits(runner, {"logits": [case | {"ids": ids}]}, cuts=CUTS[:1])] != []
    assert case["range"] > 20 * case["tolerance"]
    least = min(greedy["least_margin"] for greedy in asked["greedy"])
    assert least > 2 * case["tolerance"]


ROUNDED = [name for name, asked in VECTORS.items() if "unrounded" in asked["logits"][0]]


@pytest.mark.parametrize("name", ROUNDED)
def test_logits_without_rounding_are_those_of_such_a_graph(name: str, tmp_path: Path) -> None:
    from unrounded import unrounded  # which needs onnx, and a runner does not

    copy = unrounded(FOLDER / name, tmp_path / "copy")
    assert copy is not None
    (case,) = VECTORS[name]["logits"]
    asked = {"logits": [_without_rounding(case)]}
    runner = pleexport.Runner(copy, threads=1)
    assert [*wrong_logits(runner, asked)] == []
    assert [*wrong_logits(runner_of(name), asked, cuts=CUTS[:1])] != []  # it rounds


def _without_rounding(case: dict[str, Any]) -> dict[str, Any]:
    return case | {"logits": case["unrounded"], "tolerance": case["unrounded_tolerance"]}


def test_vectors_are_of_every_family_and_dtype() -> None:
    manifests = [pleexport.Bundle(FOLDER / name).manifest for name in VECTORS]
    families = {manifest.family for manifest in manifests}
    assert families >= {"gemma4", "gemma3n", "rwkv7a", "embformer", "lckv"}
    blobs = [runner_of(name).blob.segments for name in VECTORS]
    assert {s.dtype for listed in blobs for s in listed} == {
        *("fp32", "fp16", "bf16", "int8", "int4", "int2")
    }
    assert {m.weight_dtype for m in manifests} == {"fp32", "fp16", "int8", "int4", "source"}
    assert {m.cache_dtype for m in manifests} == {"fp32", "fp16", "int8", "none"}
    assert any("tied.safetensors" in m.graphs["decoder"].files for m in manifests)


def test_vectors_are_small_and_listed() -> None:
    page = (FOLDER.parent / "docs" / "conformance.md").read_text(encoding="utf-8")
    sizes = [p.stat().st_size for name in VECTORS for p in (FOLDER / name).iterdir()]
    assert sum(sizes) < _LARGEST_FOLDER
    assert {path.name for path in FOLDER.iterdir() if path.is_dir()} - {"__pycache__"} == {*VECTORS}
    kinds = {key for asked in VECTORS.values() for key in asked}
    fields = {
        field
        for asked in VECTORS.values()
        for cases in asked.values()
        if isinstance(cases, list) and isinstance(cases[0], dict)
        for case in cases
        for field in case
    }
    assert [word for word in (*VECTORS, *kinds, *fields) if f"`{word}`" not in page] == []


SMALLEST = "llama-value-embeddings-bf16"


@pytest.mark.parametrize(
    "name",
    [SMALLEST, *(pytest.param(n, marks=pytest.mark.slow) for n in VECTORS if n != SMALLEST)],
)
def test_bundles_are_made_again_byte_by_byte(name: str, tmp_path: Path) -> None:
    manifest = pleexport.Bundle(FOLDER / name).manifest
    made_with = manifest.versions | manifest.graphs["decoder"].versions
    here = {p: importlib.metadata.version(p) for p in made_with if p != "python"}
    if any(here[p].partition("+")[0] != made_with[p].partition("+")[0] for p in here):
        pytest.skip("made with other versions")
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import make; from pathlib import Path;"
        "make.make_bundle(sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]))"
    )
    again, scratch = tmp_path / "again", tmp_path / "scratch"
    scratch.mkdir()
    command = [sys.executable, "-c", code, str(FOLDER), name, str(again), str(scratch)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    stored = FOLDER / name
    names = sorted(path.name for path in stored.iterdir())
    assert sorted(path.name for path in again.iterdir()) == names
    differing = [n for n in names if (stored / n).read_bytes() != (again / n).read_bytes()]
    assert differing == [], "run `python conformance/make.py`, and look at what has changed"
