"""Drafts: what is proposed, that the text stays the same, and that nothing of a wrong one stays."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from conftest import SAMPLES, TOLERANCE, check_going_back, exact_bundle, relative_error
from family_checkpoints import embformer, lckv
from hypothesis import given, settings
from hypothesis import strategies as st
from rwkv_checkpoints import rwkv

import pleexport
from pleexport.backends.onnx import session
from pleexport.backends.onnx.session import OnnxSession
from pleexport.errors import InputError
from pleexport.runtime.drafting import PromptLookup
from pleexport.runtime.generation_config import GenerationConfig
from pleexport.show.stats import describe_stats

PROMPT = [5, 17, 40, 3]
SAMPLED = {"temperature": 1.0, "seed": 4}


class Guesses:
    """Drafts the text that is about to come, with every `wrong`-th token another."""

    def __init__(self, text: Sequence[int], *, wrong: int = 0) -> None:
        self._text, self._wrong = list(text), wrong

    def propose(self, ids: Sequence[int], most: int) -> Sequence[int]:
        assert most >= 1
        return [
            (self._text[i] + 1) % 2 if self._wrong and i % self._wrong == 0 else self._text[i]
            for i in range(len(ids), min(len(ids) + most, len(self._text)))
        ]


def opened(bundle: Path) -> pleexport.Runner:
    """A runner with one thread, since threads that wait for each other slow small models down."""
    return pleexport.Runner(bundle, threads=1)


def written(bundle: Path, prompt: Any = PROMPT, **options: Any) -> tuple[list[Any], Any]:
    """The tokens that a fresh runner writes, and its statistics."""
    runner = opened(bundle)
    return list(runner.generate(prompt, **options)), runner.stats


# What is proposed.


def longest_agreement(ids: list[int], end: int) -> int:
    """How many tokens up to position `end` are the last ones of the text."""
    pairs = zip(ids[: end + 1][::-1], ids[::-1], strict=False)
    return len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)))


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.integers(1, 15), st.integers(1, 4))
def test_lookup_drafts_what_followed_the_longest_piece_that_agrees(
    ids: list[int], most: int, fewest: int
) -> None:
    enough = max(most, fewest)
    agreed = [min(longest_agreement(ids, end), enough) for end in range(len(ids) - 1)]
    longest = max(agreed, default=0)
    expected: list[int] = []
    if longest >= fewest:
        begin = len(agreed) - agreed[::-1].index(longest)  # behind the last of these
        expected = ids[begin : begin + min(longest, most)]
    drafter = PromptLookup(fewest=fewest, most=fewest)
    for known in range(1, len(ids)):
        drafter.propose(ids[:known], most)
    assert drafter.propose(ids, most) == expected


def test_lookup_doubles_its_drafts_while_they_come_true() -> None:
    passage = list(range(100, 140))
    drafter, ids = PromptLookup(), [*passage, 7, *passage[:2]]
    lengths = []
    while len(ids) < 80:
        drafted = drafter.propose(ids, 15)
        lengths.append(len(drafted))
        ids += [*drafted, passage[len(ids) + len(drafted) - 41]]
    assert lengths[:4] == [2, 5, 11, 15]
    ids[-1] = 8
    assert drafter.propose(ids, 15) == []


def test_lookup_asks_for_more_agreement_after_drafts_that_are_wrong() -> None:
    # Pairs that come again and again, each time with something else behind them.
    drafter, ids, drafts = PromptLookup(), [], 0
    for i in range(200):
        ids += [1, 2]
        drafts += bool(drafter.propose(ids, 15))
        ids += [100 + i]
        drafts += bool(drafter.propose(ids, 15))
    assert drafts == 1
    passage = [*range(1000, 1040)]
    ids += [*passage, 7, *passage[:3]]
    assert drafter.propose(ids, 15) == []
    ids += passage[3:4]
    assert drafter.propose(ids, 15) == passage[4:8]
    ids += [*passage[4:8], 7, *passage[:2]]
    assert drafter.propose(ids, 15) == passage[2:5]  # one that came true needs less


# That the text stays the same.


@pytest.mark.parametrize("wrong", [0, 1, 5])
@pytest.mark.parametrize(
    "options",
    [
        {},
        SAMPLED,
        {"temperature": 0.7, "seed": 1, "top_k": 9, "top_p": 0.9, "min_p": 0.01},
        {"repetition_penalty": 1.3},
        SAMPLED | {"repetition_penalty": 3.0},
    ],
    ids=["greedy", "sampled", "filtered", "penalty", "sampled with penalty"],
)
def test_drafts_change_no_text(gemma4_bundle: Path, options: dict[str, Any], wrong: int) -> None:
    options = options | {"max_new_tokens": 120, "ignore_eos": True}
    expected, without = written(gemma4_bundle, **options)
    text = [*PROMPT, *(token.id for token in expected)]
    got, stats = written(gemma4_bundle, **options, draft=Guesses(text, wrong=wrong))
    assert got == expected
    assert without.decode_calls == 119
    assert without.drafted_tokens == without.accepted_tokens == 0
    assert stats.decode_calls + stats.accepted_tokens == 119
    if wrong == 0:
        assert stats.decode_calls == 8  # 119 tokens, 16 a call
        assert stats.acceptance == 1.0
    elif wrong == 1:
        assert stats.accepted_tokens == 0
    else:
        assert 0 < stats.accepted_tokens < stats.drafted_tokens


def test_a_wrong_draft_that_is_not_taken_back_changes_the_text(
    gemma4_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"max_new_tokens": 60, "ignore_eos": True}
    expected, _ = written(gemma4_bundle, **options)
    text = [*PROMPT, *(token.id for token in expected)]
    monkeypatch.setattr(OnnxSession, "rewind", lambda self, count: count)
    got, _ = written(gemma4_bundle, **options, draft=Guesses(text, wrong=5))
    assert got != expected


def test_a_repetition_penalty_sees_the_text_before_each_token(gemma4_bundle: Path) -> None:
    options = {"max_new_tokens": 60, "ignore_eos": True, "repetition_penalty": 1.3}
    expected, _ = written(gemma4_bundle, **options)
    plain, _ = written(gemma4_bundle, max_new_tokens=60, ignore_eos=True)
    assert expected != plain
    got, _ = written(gemma4_bundle, **options, draft="lookup")
    assert got == expected


@pytest.mark.parametrize("place", [1, 8, 17])
def test_an_end_of_text_inside_an_accepted_draft_ends_the_text(
    gemma4_bundle: Path, place: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, _ = written(gemma4_bundle, max_new_tokens=40, ignore_eos=True, **SAMPLED)
    runner = opened(gemma4_bundle)
    manifest = msgspec.structs.replace(runner.bundle.manifest, eos_token_ids=[plain[place].id])
    monkeypatch.setattr(runner.bundle, "manifest", manifest)
    expected = list(runner.generate(PROMPT, max_new_tokens=40, **SAMPLED))
    text = [*PROMPT, *(token.id for token in plain)]
    runner.reset()
    got = list(runner.generate(PROMPT, max_new_tokens=40, **SAMPLED, draft=Guesses(text)))
    assert got == expected
    assert len(got) <= place
    assert runner.stats.finish_reason == "eos"


@pytest.mark.parametrize("most", [1, 2, 15, 16, 17, 18])
def test_no_more_is_drafted_than_may_come(gemma4_bundle: Path, most: int) -> None:
    plain, _ = written(gemma4_bundle, max_new_tokens=40, ignore_eos=True)
    text = [*PROMPT, *(token.id for token in plain)]
    got, stats = written(gemma4_bundle, max_new_tokens=most, ignore_eos=True, draft=Guesses(text))
    assert got == plain[:most]
    assert stats.rows == len(PROMPT) + most - 1
    assert stats.finish_reason == "length"


def test_the_context_ends_a_text_inside_a_draft(gemma4_checkpoint: Path, tmp_path: Path) -> None:
    bundle = pleexport.build(gemma4_checkpoint, tmp_path / "b", context=24, verify=False).path
    expected, stats = written(bundle, max_new_tokens=50, ignore_eos=True)
    assert (len(expected), stats.finish_reason) == (20, "context")
    text = [*PROMPT, *(token.id for token in expected), 1, 1, 1, 1]
    got, stats = written(bundle, max_new_tokens=50, ignore_eos=True, draft=Guesses(text))
    assert got == expected
    assert stats.finish_reason == "context"


def test_the_sample_writes_the_same_stream_with_drafts(tmp_path: Path) -> None:
    sample = SAMPLES / "gemma4-kjv"
    bundle = pleexport.build(
        sample, tmp_path / "b", weight_dtype="fp32", table_dtype="source", verify=False
    ).path
    passage = (SAMPLES / "heldout.txt").read_text(encoding="utf-8")[:600]
    prompt = f"{passage}\n{passage[:40]}"
    for options in ({}, SAMPLED | {"temperature": 0.6}):
        expected, _ = written(bundle, prompt, max_new_tokens=80, **options)
        got, stats = written(bundle, prompt, max_new_tokens=80, **options, draft="lookup")
        assert got == expected
        assert stats.accepted_tokens > 0
        full = "".join(token.text for token in expected)
        for stop in (full[20:24], full[37:40]):
            cut, stats = written(
                bundle, prompt, max_new_tokens=80, **options, stop=[stop], draft="lookup"
            )
            assert "".join(token.text for token in cut) == full[: full.index(stop)]
            assert stats.finish_reason == "stop"


def test_a_text_that_is_left_inside_a_draft_goes_on_from_there(gemma4_bundle: Path) -> None:
    options = {"max_new_tokens": 40, "ignore_eos": True}
    plain, _ = written(gemma4_bundle, **options)
    text = [*PROMPT, *(token.id for token in plain)]
    for taken in (1, 2, 5, 16, 18):
        runner = opened(gemma4_bundle)
        generated = runner.generate(PROMPT, **options, draft=Guesses(text))
        left = [token.id for token in itertools.islice(generated, taken)]
        assert left == text[len(PROMPT) :][:taken]
        longer = [*PROMPT, *left, 11, 12]
        got = list(runner.generate(longer, **options))
        assert runner.stats.prompt_tokens == 3
        assert got == written(gemma4_bundle, longer, **options)[0]


def test_a_call_by_hand_after_a_draft_goes_on_from_what_is_certain(gemma4_bundle: Path) -> None:
    options = {"max_new_tokens": 9, "ignore_eos": True}
    plain, _ = written(gemma4_bundle, **options)
    text = [*PROMPT, *(token.id for token in plain)]
    drafted, fresh = opened(gemma4_bundle), opened(gemma4_bundle)
    for runner, draft in ((drafted, Guesses(text)), (fresh, None)):
        list(itertools.islice(runner.generate(PROMPT, **options, draft=draft), 4))
    assert relative_error(fresh.feed([3, 1], keep=0), drafted.feed([3, 1], keep=0)) < TOLERANCE


# That nothing of a wrong draft stays.

WAYS: dict[str, Callable[[Path], Path]] = {
    "gemma4, fp16 caches": lambda p: exact(gemma4_of(p), p, cache_dtype="fp16"),
    "gemma4, int8 caches": lambda p: exact(gemma4_of(p), p, cache_dtype="int8"),
    "embformer, no cache": lambda p: exact(embformer(p / "c"), p, cache_dtype="none"),
    "rwkv 7b, states and a cache": lambda p: exact(rwkv(p / "c.pth", "7b"), p),
}


def gemma4_of(folder: Path) -> Path:
    from checkpoints import gemma4

    return gemma4(folder / "c")


def exact(checkpoint: Path, folder: Path, *, cache_dtype: str | None = None) -> Path:
    return exact_bundle(checkpoint, folder / "bundle", cache_dtype=cache_dtype).path


@pytest.mark.parametrize("way", WAYS)
def test_what_is_taken_back_leaves_no_trace(way: str, tmp_path: Path) -> None:
    runner = opened(WAYS[way](tmp_path))
    ids = np.random.default_rng(5).integers(0, runner.blob.num_rows, 300).tolist()
    check_going_back(runner, ids, runner.logits(ids))


@pytest.fixture
def short_rings(
    gemma4_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[pleexport.Runner, Any]:
    """A runner whose rings have 8 - 1 + 16 slots, and one that never goes back."""
    monkeypatch.setattr(session, "PREFILL_CHUNK", 16)
    return opened(gemma4_bundle), opened(gemma4_bundle)


def test_rings_mask_what_was_taken_back(short_rings: tuple[pleexport.Runner, Any]) -> None:
    runner, fresh = short_rings
    calls = st.lists(st.tuples(st.integers(1, 15), st.integers(0, 15)), min_size=1, max_size=12)

    @settings(max_examples=20)
    @given(calls, st.integers(0, 2**32 - 1))
    def check(calls: list[tuple[int, int]], seed: int) -> None:
        chosen = np.random.default_rng(seed)
        runner.reset()
        ids: list[int] = []
        for new, wanted in calls:
            guessed = min(wanted, 16 - new)
            fed = chosen.integers(0, 120, new + guessed).tolist()
            got = runner._reader.read(fed, keep=0, guessed=guessed)[:new]
            ids += fed[:new]
        expected = fresh.logits(ids)[-len(got) :]
        assert relative_error(expected, got) < TOLERANCE

    check()


@pytest.mark.parametrize(("back", "shows"), [(16, False), (22, True)])
def test_going_back_further_than_a_piece_shows_what_is_stale(
    back: int, shows: bool, short_rings: tuple[pleexport.Runner, Any]
) -> None:
    runner, fresh = short_rings
    ids = np.random.default_rng(6).integers(0, 120, 80).tolist()
    runner.reset()
    for begin in range(0, 80, 16):
        runner._reader.read(ids[begin : begin + 16], keep=1)
    runner._reader._session.rewind(back)
    runner._reader.ids = ids[:-back]
    error = relative_error(fresh.logits([*ids[:-back], 7])[-1], runner.feed([7])[-1])
    assert (error > TOLERANCE) == shows


# What is refused and shown.


def test_drafts_of_a_model_that_takes_one_token_a_call_are_refused(tmp_path: Path) -> None:
    bundle = exact_bundle(lckv(tmp_path / "checkpoint"), tmp_path / "bundle").path
    runner = opened(bundle)
    with pytest.raises(InputError) as raised:
        runner.generate([1, 2], draft="lookup")
    assert raised.value.message == (
        "drafts are checked several tokens a call, and this bundle's graph takes one"
    )
    assert "leave `--draft` out" in str(raised.value.hint)


def test_an_unknown_draft_is_refused(gemma4_bundle: Path) -> None:
    with pytest.raises(InputError, match="draft `model` is not known; there is `lookup`"):
        opened(gemma4_bundle).generate([1], draft="model")


def test_statistics_say_what_drafts_brought(gemma4_bundle: Path) -> None:
    plain, without = written(gemma4_bundle, max_new_tokens=33, ignore_eos=True)
    text = [*PROMPT, *(token.id for token in plain)]
    _, stats = written(gemma4_bundle, max_new_tokens=33, ignore_eos=True, draft=Guesses(text))
    assert "drafts" not in describe_stats(without, GenerationConfig())
    assert "drafts       30 of 30 tokens accepted (100%), 16.0 tokens a call" in describe_stats(
        stats, GenerationConfig()
    )
    assert without.tokens_per_call == 1.0
