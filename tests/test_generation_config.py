"""A checkpoint's generation config is obeyed as the original obeys it, and can be overridden."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from checkpoints import gemma4
from conftest import exact_bundle
from hypothesis import given, settings
from hypothesis import strategies as st
from resealed import change_manifest
from transformers import AutoModelForCausalLM, GenerationConfig

import pleexport
from pleexport import cli
from pleexport.errors import BundleError, CheckpointError, InputError, PleexportError
from pleexport.export.generation import read_generation_config
from pleexport.progress import Progress
from pleexport.runtime.generation_config import GenerationConfig as Obeyed
from pleexport.runtime.logit_rules import LogitRules
from pleexport.runtime.sampling import Sampling
from pleexport.show.stats import describe_config

# A random model goes on with 18 thirteen times, and then with 27.
VOCAB, PROMPT = 120, [91, 98, 10, 118, 74, 18, 18]
EOS = [1, 27]
TOKENS = 24
# Each alone, then much at once; all change the text of a random model.
CONFIGS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "suppress": {"suppress_tokens": [*range(20, 70)]},
    "begin": {"begin_suppress_tokens": [*range(0, 119)]},
    "bad words": {"bad_words_ids": [[i] for i in range(0, 100, 2)] + [[1], [5, 9, 3], [119, 118]]},
    "repetition": {"repetition_penalty": 1.7},
    "prompt repetition": {"encoder_repetition_penalty": 3.0},
    "n-grams": {"no_repeat_ngram_size": 2},
    "single tokens": {"no_repeat_ngram_size": 1},
    "n-grams of the prompt": {"encoder_no_repeat_ngram_size": 2},
    "bias": {"sequence_bias": [[[44], 3.5], [[18, 45], 9.0], [[45, 18], -9.0]]},
    "shortest": {"min_new_tokens": 18},
    "shortest with the prompt": {"min_length": 26},
    "both shortest": {"min_length": 3, "min_new_tokens": 18},
    "longest": {"max_new_tokens": 5},
    "longest with the prompt": {"max_length": 13},
    "forced end": {"forced_eos_token_id": 27, "max_new_tokens": 6},
    "likelier end": {"exponential_decay_length_penalty": [3, 1.5]},
    "sampling's alone": {"temperature": 0.2, "top_k": 3, "top_p": 0.1},
    "all": {
        "suppress_tokens": [33, 34, 500],
        "begin_suppress_tokens": [60],
        "bad_words_ids": [[50, 51], [61]],
        "repetition_penalty": 1.3,
        "no_repeat_ngram_size": 3,
        "min_new_tokens": 3,
        "max_new_tokens": 20,
    },
}


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without a cap on logits, a random model's text varies."""
    folder = tmp_path_factory.mktemp("generation") / "checkpoint"
    return gemma4(folder, torch.float32, final_logit_softcapping=None)


@pytest.fixture(scope="session")
def bundle(checkpoint: Path) -> Path:
    return exact_bundle(checkpoint, checkpoint.parent / "bundle").path


@pytest.fixture(scope="session")
def original(checkpoint: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(checkpoint).eval()


def runner_with(bundle: Path, fields: dict[str, Any]) -> pleexport.Runner:
    """A runner whose manifest has what a build stores of such a generation config."""
    opened = pleexport.Bundle(bundle)
    config, _ = read_generation_config(fields)
    opened.manifest = msgspec.structs.replace(opened.manifest, generation=config, eos_token_ids=EOS)
    return pleexport.Runner(opened, threads=1)


def original_text(original: Any, fields: dict[str, Any], **options: Any) -> list[int]:
    """Greedy text of the original with such a generation config; an end is not part of it."""
    config = GenerationConfig(**{"max_new_tokens": TOKENS, "eos_token_id": EOS} | fields)
    config.pad_token_id = 0
    if "max_length" in fields:
        config.max_new_tokens = None
    ids = torch.tensor([PROMPT])
    mask = torch.ones_like(ids)
    found = original.generate(
        ids, attention_mask=mask, generation_config=config, do_sample=False, **options
    )
    text: list[int] = found[0, len(PROMPT) :].tolist()
    return text[:-1] if text[-1] in EOS else text


def our_text(runner: pleexport.Runner, **options: Any) -> list[int]:
    return [token.id for token in runner.generate(PROMPT, **options)]


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_text_is_the_originals_token_for_token(
    name: str, bundle: Path, original: Any
) -> None:
    fields = CONFIGS[name]
    runner = runner_with(bundle, {"max_new_tokens": TOKENS} | fields)
    if "max_length" in fields:
        runner = runner_with(bundle, fields)
    got = our_text(runner)
    assert got == original_text(original, fields)
    # The control: without the config it is another text, unless only sampling was asked for.
    plain = our_text(runner, greedy=True, max_new_tokens=TOKENS)
    assert plain == original_text(original, {})
    assert (got == plain) == (name in ("nothing", "sampling's alone"))


@pytest.mark.parametrize("name", ["forced_bos_token_id", "forced_eos_token_id"])
def test_the_id_that_is_forced_may_be_the_first_of_all(name: str) -> None:
    rules = LogitRules(Obeyed(**{name: 0}), prompt_ids=[5], eos=frozenset(), max_length=2)
    logits = np.arange(8, dtype=np.float32)
    assert rules.apply(logits, [5]).argmax() == 0
    assert logits.argmax() == 7


def test_the_first_token_is_forced_after_a_prompt_of_one(bundle: Path) -> None:
    fields = {"forced_bos_token_id": 77, "begin_suppress_tokens": [*range(2, 119)]}
    tokens = [t.id for t in runner_with(bundle, fields).generate([5], max_new_tokens=2)]
    assert tokens[0] == 77
    assert tokens[1] not in fields["begin_suppress_tokens"]  # type: ignore[operator]


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    """Any number of fields with values that transformers takes."""
    ids = st.lists(st.integers(0, 29), min_size=1, max_size=6)
    share = st.floats(0.05, 1.0)
    every: dict[str, Any] = {
        "temperature": st.floats(0.2, 3.0),
        "top_k": st.integers(0, 40),
        "top_p": share,
        "min_p": st.floats(0.0, 0.5),
        "top_h": share,
        "typical_p": share,
        "epsilon_cutoff": st.floats(0.0, 0.2),
        "eta_cutoff": st.floats(0.0, 0.3),
        "repetition_penalty": st.floats(0.5, 3.0),
        "encoder_repetition_penalty": st.floats(0.5, 3.0),
        "no_repeat_ngram_size": st.integers(0, 3),
        "encoder_no_repeat_ngram_size": st.integers(0, 3),
        "bad_words_ids": st.lists(ids, min_size=1, max_size=4),
        "sequence_bias": st.lists(
            st.tuples(ids, st.floats(-5, 5)).map(list), min_size=1, max_size=4
        ),
        "min_length": st.integers(0, 12),
        "min_new_tokens": st.integers(0, 5),
        "exponential_decay_length_penalty": st.tuples(st.integers(0, 4), st.floats(1.01, 2.0)),
        "suppress_tokens": ids,
        "begin_suppress_tokens": ids,
    }
    names = draw(st.sets(st.sampled_from(sorted(every)), max_size=7))
    return {name: draw(every[name]) for name in sorted(names)}


def original_scores(
    original: Any, fields: dict[str, Any], logits: torch.Tensor, ids: list[int], prompt: list[int]
) -> np.ndarray:
    """What transformers makes of logits before it draws a token."""
    config = GenerationConfig(**fields, eos_token_id=EOS, pad_token_id=0, do_sample=True)
    config, _ = original._prepare_generation_config(config)
    if config.min_new_tokens is not None:  # as `_prepare_generated_length`, which goes first
        config.min_length = config.min_new_tokens + len(prompt)
    original._prepare_special_tokens(config, True, device="cpu")
    processors = original._get_logits_processor(
        config, len(prompt), torch.tensor([prompt]), device="cpu", model_kwargs={}
    )
    scores: np.ndarray = processors(torch.tensor([ids]), logits[None].clone())[0].numpy()
    return scores


@settings(max_examples=300, deadline=None)
@given(fields=configs(), seed=st.integers(0, 1 << 16), new=st.integers(0, 6))
def test_the_distribution_before_the_draw_is_the_originals(
    fields: dict[str, Any], seed: int, new: int, original: Any
) -> None:
    generator = np.random.default_rng(seed)
    logits = (3 * generator.standard_normal(VOCAB)).astype(np.float32)
    prompt = generator.integers(0, 30, 6).tolist()
    ids = [*prompt, *generator.integers(0, 30, new).tolist()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scores = original_scores(original, fields, torch.tensor(logits), ids, prompt)
    expected = np.exp(scores.astype(np.float64) - scores.max())
    expected /= expected.sum()
    config, notes = read_generation_config(fields | {"do_sample": True})
    assert not notes
    rules = LogitRules(config, prompt_ids=prompt, eos=frozenset(EOS), max_length=64)
    kept, probabilities = Sampling.of(config).distribution(rules.apply(logits, ids))
    got = np.zeros(VOCAB)
    got[kept] = probabilities
    assert np.abs(got - expected).max() < 1e-5


def test_what_is_drawn_follows_the_distribution() -> None:
    sampling = Sampling(temperature=1.0, top_k=3)
    logits = np.log(np.array([0.4, 0.3, 0.2, 0.06, 0.04], dtype=np.float32))
    generator = np.random.default_rng(0)
    drawn = np.bincount([sampling.choose(logits, generator) for _ in range(4000)], minlength=5)
    assert np.abs(drawn / 4000 - np.array([4, 3, 2, 0, 0]) / 9).max() < 0.03


def test_a_config_that_samples_samples_and_a_call_overrides_it(bundle: Path) -> None:
    runner = runner_with(bundle, {"do_sample": True, "temperature": 5.0, "max_new_tokens": 12})
    greedy = our_text(runner, greedy=True, max_new_tokens=12)
    assert our_text(runner, seed=1) == our_text(runner, seed=1)
    assert our_text(runner, seed=1) != our_text(runner, seed=2)
    assert our_text(runner, temperature=0.0) == greedy
    assert runner.config.temperature == 0.0
    assert our_text(runner, top_k=1, seed=5) == greedy
    assert len(our_text(runner, max_new_tokens=3, seed=1)) == 3
    suppressed = our_text(runner, temperature=0.0, suppress_tokens=[greedy[0]])
    assert suppressed[0] != greedy[0]


def test_a_temperature_alone_samples_from_all_tokens(bundle: Path) -> None:
    runner = runner_with(bundle, {})
    assert our_text(runner, temperature=3.0, seed=1) != our_text(runner, temperature=3.0, seed=2)
    assert Sampling.of(runner.config) == Sampling(temperature=3.0)


def test_text_ends_when_its_time_is_over(bundle: Path) -> None:
    runner = runner_with(bundle, {"max_time": 1e-9})
    assert len(our_text(runner)) == 1
    assert runner.stats.finish_reason == "time"


def test_a_build_stores_what_is_obeyed_and_says_what_is_not(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(checkpoint, folder)
    fields = {"do_sample": True, "top_p": 0.9, "suppress_tokens": [3], "eos_token_id": [1, 106]}
    others = {"num_beams": 4, "penalty_alpha": 0.6, "use_cache": True, "temprature": 0.5}
    (folder / "generation_config.json").write_text(json.dumps(fields | others))
    pleexport.build(folder, tmp_path / "bundle", progress=Progress(), verify=False)
    said = " ".join(capsys.readouterr().err.split())
    assert "`num_beams` of generation_config.json is not obeyed: one text is written" in said
    assert "`penalty_alpha` of generation_config.json is not obeyed" in said
    assert "`temprature` of generation_config.json is not obeyed: no such field is known" in said
    assert "use_cache" not in said
    manifest = json.loads((tmp_path / "bundle" / "manifest.json").read_text())
    assert manifest["generation"] == {
        "do_sample": True,
        "temperature": 1.0,
        "top_k": 50,  # what transformers takes where nothing is said
        "top_p": 0.9,
        "suppress_tokens": [3],
    }
    assert manifest["eos_token_ids"] == [1, 106]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": "hot"}, "Expected `float | null`, got `str` - at `temperature`"),
        ({"temperature": -1.0}, "temperature is -1.0; it must be 0 or more"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"suppress_tokens": [1 << 70]}, "it must be a list of token ids"),
        ({"bad_words_ids": [[]]}, "lists of one or more token ids"),
        ({"sequence_bias": [[[3], float("inf")]]}, "and a finite number"),
        ({"exponential_decay_length_penalty": [-1, 1.0]}, "a number of tokens, 0 or more"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0; it must be 1 or more"),
        ({"stop_strings": ["\ud800"]}, "surrogates not allowed"),
    ],
)
def test_an_impossible_config_is_refused_before_the_work(
    fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError) as caught:
        read_generation_config(fields)
    assert "`generation_config.json` cannot be obeyed" in caught.value.message
    assert message in caught.value.message
    assert "correct the file" in (caught.value.hint or "")


def test_a_manifest_with_impossible_defaults_is_refused(bundle: Path, tmp_path: Path) -> None:
    shutil.copytree(bundle, tmp_path / "bundle")
    change_manifest(tmp_path / "bundle", lambda m: m.update(generation={"top_p": 7}))
    with pytest.raises(BundleError, match="impossible defaults for generation: top_p is 7"):
        pleexport.Bundle(tmp_path / "bundle")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": -1}, "top_k is -1; it must be 0 or more"),
        ({"min_p": 2.0}, "min_p is 2.0; it must be from 0 to 1"),
        ({"top_k": "x"}, "an option of generation cannot be used: Expected `int"),
        ({"greedy": True, "temperature": 0.5}, "greedy text has no temperature, and 0.5"),
        ({"suppress_tokens": [*range(VOCAB)]}, "leave no token that may come next"),
    ],
)
def test_options_that_cannot_be_used_are_refused(
    options: dict[str, Any], message: str, bundle: Path
) -> None:
    with pytest.raises(InputError) as caught:
        our_text(runner_with(bundle, {}), **options)
    assert message in caught.value.message


def test_any_field_can_be_given_on_the_command_line() -> None:
    given = cli._parse_options(["no_repeat_ngram_size=3", "suppress_tokens=[1, 2]"])
    assert given == {"no_repeat_ngram_size": 3, "suppress_tokens": [1, 2]}


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ("top_k", "`--option` has `top_k`; expected NAME=VALUE with a value in JSON"),
        ("top_k=many", "expected NAME=VALUE with a value in JSON"),
        ("top_k=" + "[" * 100_000, "expected NAME=VALUE with a value in JSON"),
        ("prompt=1", "`--option` has `prompt`, which is no option of generation"),
    ],
    ids=lambda text: text[:12],
)
def test_an_option_that_is_no_field_is_refused(pair: str, message: str) -> None:
    with pytest.raises(PleexportError) as caught:
        cli._parse_options([pair])
    assert message in caught.value.message
    assert caught.value.hint


def test_a_prompt_as_long_as_all_may_be_is_refused(bundle: Path) -> None:
    with pytest.raises(InputError, match=r"the prompt has 7 tokens, and by the checkpoint's"):
        our_text(runner_with(bundle, {"max_length": 7}))


def test_what_generated_a_text_is_described_in_a_line() -> None:
    config, _ = read_generation_config({"do_sample": True, "top_k": 64, "top_p": 0.95})
    assert describe_config(config) == "sampling, temperature 1.0, top_k 64, top_p 0.95"
    config, _ = read_generation_config({"top_k": 64, "suppress_tokens": [*range(9)]})
    assert describe_config(config) == "the likeliest token, suppress_tokens of 9 entries"
    assert describe_config(Obeyed()) == "the likeliest token"
