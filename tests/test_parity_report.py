"""The verdict follows from what was measured, sentence by sentence, and cannot be changed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pleexport.parity.report import (
    Fidelity,
    GreedyCheck,
    LogitsCheck,
    ParityReport,
    TableCheck,
    TextCheck,
    find_failures,
    write_report,
)
from pleexport.show.parity import describe_parity

TABLE = TableCheck(
    table="embed_tokens",
    dtype="bf16",
    lossless=True,
    rows=120,
    max_error=0.0,
    max_steps=None,
    first_bad_row=None,
    first_bad_layer=None,
)
LOGITS = LogitsCheck(
    mode="prefill",
    tokens=64,
    max_error=1e-5,
    mean_error=1e-6,
    logit_range=10.0,
    kl=0.0,
    correlation=1.0,
    top1_agreement=1.0,
    near_ties=0,
)
GREEDY = GreedyCheck(tokens=32, equal_tokens=32, near_tie=False)
COST = Fidelity(what="both", kl=0.1, perplexity=20.0, top1_agreement=0.9)
TEXT = TextCheck(
    original="transformers 5, GemmaTokenizer",
    not_compared=None,
    template="chat_template.jinja",
    texts=1051,
    conversations=21,
    refused=2,
    streams=1451,
    differences=(),
)
REPORT = ParityReport(
    oracle="transformers 5",
    exact=True,
    tables=(TABLE,),
    logits=(LOGITS,),
    text=GREEDY,
    layer_errors=(1e-6, 2e-6),
    first_diverging_layer=None,
    original_perplexity=None,
    fidelity=(COST,),
    fidelity_tokens=64,
    failures=(),
)
EXACT: dict[str, Any] = {
    "exact": True,
    "tables": (TABLE,),
    "logits": (LOGITS,),
    "greedy": GREEDY,
    "first_diverging_layer": None,
    "computing_dtypes": {"fp32"},
}
ROUNDED: dict[str, Any] = EXACT | {"exact": False, "computing_dtypes": {"int8", "fp16"}}


def with_(struct: Any, **changes: object) -> Any:
    return msgspec.structs.replace(struct, **changes)


def table(**changes: object) -> tuple[TableCheck, ...]:
    return (with_(TABLE, **changes),)


def logits(**changes: object) -> tuple[LogitsCheck, ...]:
    return (with_(LOGITS, **changes),)


@pytest.mark.parametrize("struct", [REPORT, TABLE, LOGITS, GREEDY, COST], ids=type)
def test_what_was_found_cannot_be_changed(struct: Any) -> None:
    for name in struct.__struct_fields__:
        with pytest.raises(AttributeError, match="immutable"):
            setattr(struct, name, getattr(struct, name))
    hash(struct)  # nothing in it can be changed either
    with pytest.raises(TypeError):
        type(struct)(*msgspec.structs.astuple(struct))


def test_a_report_passes_where_nothing_failed() -> None:
    assert REPORT.passed
    assert REPORT.max_logit_error == pytest.approx(1e-6)
    assert REPORT.summary().passed
    failed = with_(REPORT, failures=("rows differ",))
    assert not failed.passed
    assert not failed.summary().passed


def test_the_file_has_every_field_and_the_verdict(tmp_path: Path) -> None:
    write_report(with_(REPORT, failures=("rows differ",)), tmp_path / "parity.json")
    written = json.loads((tmp_path / "parity.json").read_text(encoding="utf-8"))
    assert list(written) == [
        "oracle",
        "exact",
        "tokenizer",
        "tables",
        "logits",
        "text",
        "layer_errors",
        "first_diverging_layer",
        "original_perplexity",
        "fidelity",
        "fidelity_tokens",
        "failures",
        "passed",
    ]
    assert written["failures"] == ["rows differ"]
    assert written["passed"] is False
    assert written["text"] == {"tokens": 32, "equal_tokens": 32, "near_tie": False}
    assert list(written["tables"][0]) == [
        "table",
        "dtype",
        "lossless",
        "rows",
        "max_error",
        "max_steps",
        "first_bad_row",
        "first_bad_layer",
        "tied",
    ]
    assert list(written["logits"][0]) == [
        "mode",
        "tokens",
        "max_error",
        "mean_error",
        "logit_range",
        "kl",
        "correlation",
        "top1_agreement",
        "near_ties",
    ]
    assert list(written["fidelity"][0]) == ["what", "kl", "perplexity", "top1_agreement"]


# What was measured, what the verdict says of it, and the same one step back, which passes.
FAILURES: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "a row": (
        EXACT | {"tables": table(first_bad_row=7, max_error=0.25)},
        "table `embed_tokens`: the row of token id 7 is not the source (largest error 0.25)",
        EXACT | {"tables": table(max_error=0.25)},
    ),
    "a row of a layer": (
        EXACT | {"tables": table(first_bad_row=0, first_bad_layer=3, max_error=math.nan)},
        "table `embed_tokens`: the row of token id 0, layer 3 is not the source "
        "(largest error nan)",
        EXACT,
    ),
    "a rounded row": (
        ROUNDED | {"tables": table(lossless=False, dtype="int8", first_bad_row=7, max_error=2.0)},
        "table `embed_tokens`: the row of token id 7 is not as close to the source as it should "
        "be (largest error 2)",
        ROUNDED | {"tables": table(lossless=False, dtype="int8", max_error=2.0)},
    ),
    "logits": (
        EXACT | {"logits": logits(max_error=1.1e-3)},
        "logits, prefill: largest error 1.10e-04 of the range exceeds 1e-04",
        EXACT | {"logits": logits(max_error=1e-3)},
    ),
    "logits that are no numbers": (
        EXACT | {"logits": logits(mode="step", max_error=math.nan)},
        "logits, step: largest error nan of the range exceeds 1e-04",
        EXACT,
    ),
    "logits of a layer": (
        EXACT | {"logits": logits(max_error=1.0), "first_diverging_layer": 2},
        "logits, prefill: largest error 1.00e-01 of the range exceeds 1e-04; layer 2 is the first "
        "that diverges",
        EXACT,
    ),
    "divergence": (
        ROUNDED | {"logits": logits(kl=0.051)},
        "logits, prefill: KL divergence 0.051 nats exceeds 0.05",
        ROUNDED | {"logits": logits(kl=0.05, max_error=1.0)},
    ),
    "divergence that is no number": (
        ROUNDED | {"logits": logits(kl=math.nan)},
        "logits, prefill: KL divergence nan nats exceeds 0.05",
        ROUNDED,
    ),
    "divergence of fp16": (
        ROUNDED | {"logits": logits(kl=0.011), "computing_dtypes": {"fp16"}},
        "logits, prefill: KL divergence 0.011 nats exceeds 0.01",
        ROUNDED | {"logits": logits(kl=0.011)},
    ),
    "divergence of fp32 weights and rounded tables": (
        ROUNDED | {"logits": logits(kl=0.6), "tables": table(dtype="int4"), "computing_dtypes": ()},
        "logits, prefill: KL divergence 0.6 nats exceeds 0.5",
        ROUNDED | {"logits": logits(kl=0.5), "tables": table(dtype="int4"), "computing_dtypes": ()},
    ),
    "correlation": (
        ROUNDED | {"logits": logits(correlation=0.9494), "first_diverging_layer": 0},
        "logits, prefill: correlation 0.949 with the original's is below 0.95; layer 0 is the "
        "first that diverges",
        # A layer alone is no failure of a rounded bundle.
        ROUNDED | {"logits": logits(correlation=0.95), "first_diverging_layer": 0},
    ),
    "correlation that is no number": (
        ROUNDED | {"logits": logits(correlation=math.nan), "computing_dtypes": {"int4"}},
        "logits, prefill: correlation nan with the original's is below 0.7",
        ROUNDED | {"logits": logits(correlation=0.7), "computing_dtypes": {"int4"}},
    ),
    "greedy text": (
        EXACT | {"greedy": with_(GREEDY, equal_tokens=5)},
        "greedy text differs from the original's at token 5",
        EXACT | {"greedy": with_(GREEDY, equal_tokens=5, near_tie=True)},
    ),
    "greedy text of a layer": (
        EXACT | {"greedy": with_(GREEDY, equal_tokens=0), "first_diverging_layer": 1},
        "greedy text differs from the original's at token 0; layer 1 is the first that diverges",
        ROUNDED | {"greedy": with_(GREEDY, equal_tokens=0), "first_diverging_layer": 1},
    ),
    "a layer": (
        EXACT | {"first_diverging_layer": 4},
        "hidden states differ; layer 4 is the first that diverges",
        EXACT,
    ),
    "a layer, without greedy text": (
        EXACT | {"first_diverging_layer": 4, "greedy": None},
        "hidden states differ; layer 4 is the first that diverges",
        EXACT | {"greedy": None},
    ),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_is_told(name: str) -> None:
    measured, sentence, control = FAILURES[name]
    assert find_failures(**measured) == (sentence,)
    assert find_failures(**control) == ()


def test_every_failure_is_told_and_a_layer_only_where_nothing_else_is() -> None:
    measured = EXACT | {
        "tables": table(first_bad_row=1, first_bad_layer=0, max_error=1.0),
        "logits": (*logits(max_error=1.0), *logits(mode="step", max_error=2.0)),
        "greedy": with_(GREEDY, equal_tokens=3),
        "first_diverging_layer": 0,
    }
    where = "; layer 0 is the first that diverges"
    assert find_failures(**measured) == (
        "table `embed_tokens`: the row of token id 1, layer 0 is not the source (largest error 1)",
        f"logits, prefill: largest error 1.00e-01 of the range exceeds 1e-04{where}",
        f"logits, step: largest error 2.00e-01 of the range exceeds 1e-04{where}",
        f"greedy text differs from the original's at token 3{where}",
    )


@pytest.mark.parametrize(
    ("check", "lines"),
    [
        (
            TEXT,
            [
                "Text and ids (1,051 texts, 1,451 streams, 21 conversations by "
                "chat_template.jinja, 2 of them refused by both):",
                "  equal to those of transformers 5, GemmaTokenizer",
            ],
        ),
        (
            msgspec.structs.replace(TEXT, original=None, template=None, not_compared="it is odd"),
            [
                "Text and ids (1,051 texts, 1,451 streams, no chat template):",
                "  not compared with an original: it is odd",
            ],
        ),
        (msgspec.structs.replace(TEXT, differences=("x",)), ["  DIFFER, see below"]),
    ],
)
def test_text_and_ids_are_shown(check: TextCheck, lines: list[str]) -> None:
    shown = describe_parity(with_(REPORT, tokenizer=check)).splitlines()
    assert [line for line in lines if line not in shown] == []


def test_text_that_differs_fails() -> None:
    wrong = msgspec.structs.replace(TEXT, differences=("the text 'a' becomes the ids [1]",))
    measured = EXACT | {"tokenizer": wrong}
    assert find_failures(**measured) == ("text: the text 'a' becomes the ids [1]",)
    assert find_failures(**(EXACT | {"tokenizer": TEXT})) == ()
