"""What the Kotlin library's tests compare with: the answers of the Python library, as JSON."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers_in_code
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

import pleexport
from pleexport.parity.text_cases import TEXTS
from pleexport.runtime.drafting import PromptLookup
from pleexport.runtime.generation_config import GenerationConfig
from pleexport.runtime.json_tokenizer import JsonTokenizer
from pleexport.runtime.logit_rules import LogitRules
from pleexport.runtime.sampling import Sampling
from pleexport.runtime.world_tokenizer import VOCABULARY, WorldTokenizer

CONFORMANCE = Path(__file__).parents[1] / "conformance"
SAMPLES = Path(__file__).parents[1] / "samples"
FORCED = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"
MORE_TEXTS = (
    "a  ab\t\n\n\nab <tool> <wide> ab<bos>",
    "  <wide>  c<|channel>ca<channel|>",
    "'S 's '\u017f don'T we'LL 12345 x²",
    "isn't it ? Yes , it 's .",
)


def llama_like() -> Tokenizer:
    """As Llama 3's: a pattern of its own, composed characters, words before merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*alphabet, "Ġt", "he", "Ġthe", "in", "Ġa", "12", "123"]
    merges = [("Ġ", "t"), ("h", "e"), ("Ġt", "he"), ("i", "n"), ("Ġ", "a"), ("1", "2"), ("12", "3")]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
        r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|begin|>", "<|end|>"])
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single="<|begin|> $A <|end|>",
                special_tokens=[("<|begin|>", len(pieces)), ("<|end|>", len(pieces) + 1)],
            ),
        ]
    )
    return tokenizer


def spaced() -> Tokenizer:
    """As Llama 2's in newer files: a mark for each space, and one before the text."""
    tokenizer = tokenizers_in_code.byte_fallback()
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace("q", "c")])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(prepend_scheme="first", split=True),
            pre_tokenizers.Digits(individual_digits=True),
        ]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")]
    )
    return tokenizer


def write_tokenizers(folder: Path) -> None:
    """A folder for each tokenizer that the Kotlin library reads, with its cases."""
    made = {
        "byte-level": (tokenizers_in_code.byte_level(), {}),
        "byte-fallback": (tokenizers_in_code.byte_fallback(), {}),
        "stripped": (tokenizers_in_code.byte_fallback(strip=True), {}),
        "split-specials": (tokenizers_in_code.byte_fallback(), {"split_special_tokens": True}),
        "cleaned": (
            tokenizers_in_code.byte_fallback(),
            {"clean_up_tokenization_spaces": True, FORCED: True},
        ),
        "llama-like": (llama_like(), {}),
        "spaced": (spaced(), {}),
    }
    for name, (tokenizer, config) in made.items():
        tokenizers_in_code.save(tokenizer, folder / name, **config)
    for name in ("gemma4", "rwkv7a"):
        (folder / name).mkdir()
        shutil.copy(SAMPLES / f"{name}-kjv" / "tokenizer.json", folder / name)
    for own in folder.iterdir():
        config_path = own / "tokenizer_config.json"
        config = json.loads(config_path.read_text()) if config_path.exists() else {}
        _write_cases(own, JsonTokenizer(own / "tokenizer.json", config))
    (folder / "world").mkdir()
    from test_world_tokenizer import published_vocabulary

    shutil.copy(published_vocabulary(), folder / "world" / VOCABULARY)
    _write_cases(folder / "world", WorldTokenizer(published_vocabulary()))


def _write_cases(folder: Path, tokenizer: JsonTokenizer | WorldTokenizer) -> None:
    texts, streams, chosen = [], [], np.random.default_rng(5)
    for text in (*TEXTS, *MORE_TEXTS):
        plain = tokenizer.encode(text, add_special_tokens=False)
        case = {"text": text, "ids": tokenizer.encode(text), "plain": plain}
        kept = tokenizer.decode(plain, with_specials=True)
        texts.append(case | {"decoded": tokenizer.decode(plain), "kept": kept})
        streams.append(_stream(tokenizer, plain[:2], plain[2:]))
    for i in range(40):
        ids = chosen.integers(0, tokenizer.size, 40).tolist()
        streams.append(_stream(tokenizer, ids[: i % 9], ids[i % 9 :]))
    cases = {"size": tokenizer.size, "texts": texts, "streams": streams}
    (folder / "cases.json").write_text(json.dumps(cases))


def _stream(
    tokenizer: JsonTokenizer | WorldTokenizer, prompt: list[int], ids: list[int]
) -> dict[str, Any]:
    stream = tokenizer.stream(prompt)
    pieces = [*map(stream.push, ids), stream.flush()]
    return {"prompt": prompt, "ids": ids, "pieces": pieces, "decoded": tokenizer.decode(ids)}


def write_sampling(path: Path) -> None:
    """Distributions of logits as options leave them."""
    chosen, cases = np.random.default_rng(3), []
    for options in (
        {},
        {"top_k": 5},
        {"top_p": 0.7},
        {"min_p": 0.1},
        {"top_h": 0.4},
        {"top_h": 0.6, "top_k": 3},
        {"typical_p": 0.5},
        {"epsilon_cutoff": 0.03},
        {"eta_cutoff": 0.05},
        {"temperature": 1e-8},
        {"temperature": 1.7, "top_k": 20, "top_p": 0.9, "min_p": 0.02, "typical_p": 0.95},
    ):
        scores = (chosen.standard_normal(150) * 3).astype(np.float32)
        scores[[3, 9]] = scores.max()  # a tie
        config = {"do_sample": True, "temperature": 0.8} | options
        ids, probabilities = Sampling.of(GenerationConfig(**config)).distribution(scores)
        cases.append(
            {
                "config": config,
                "scores": scores.tolist(),
                "ids": ids.tolist(),
                "probabilities": probabilities.tolist(),
            }
        )
    path.write_text(json.dumps(cases))


def write_rules(path: Path) -> None:
    """Logits as rules leave them."""
    chosen, cases = np.random.default_rng(4), []
    prompt = [5, 6, 7, 5, 6]
    for config, ids in (
        ({}, prompt),
        ({"repetition_penalty": 1.3}, [*prompt, 8]),
        ({"encoder_repetition_penalty": 1.5}, [*prompt, 8]),
        ({"no_repeat_ngram_size": 2}, [*prompt, 5]),
        ({"encoder_no_repeat_ngram_size": 3}, [*prompt, 5, 6]),
        ({"sequence_bias": [[[5, 6, 9], 4.0], [[3], -2.5], [[3], 1.0], [[99], 1.0]]}, prompt),
        ({"bad_words_ids": [[6, 2], [1], [4]]}, prompt),
        ({"min_length": 9}, prompt),
        ({"min_new_tokens": 2, "min_length": 1}, [*prompt, 3]),
        ({"forced_bos_token_id": 4, "begin_suppress_tokens": [2]}, [5]),
        ({"forced_eos_token_id": [1, 3]}, [*prompt, 2, 2, 2, 2]),
        ({"exponential_decay_length_penalty": [1, 1.2]}, [*prompt, 2, 2, 2]),
        ({"suppress_tokens": [0, 7, 500], "begin_suppress_tokens": [9]}, prompt),
        ({"begin_suppress_tokens": [9]}, [*prompt, 1]),
    ):
        scores = (chosen.standard_normal(12) * 3).astype(np.float32)
        started = prompt if len(ids) >= len(prompt) else ids
        parsed = GenerationConfig(
            **{k: [tuple(x) for x in v] if k == "sequence_bias" else v for k, v in config.items()}
        )
        rules = LogitRules(parsed, prompt_ids=started, eos=frozenset([1]), max_length=10)
        expected = rules.apply(scores.copy(), ids)
        cases.append(
            {
                "config": config,
                "prompt_ids": started,
                "ids": ids,
                "eos": [1],
                "max_length": 10,
                "scores": scores.tolist(),
                "expected": [float(x) if np.isfinite(x) else None for x in expected],
            }
        )
    path.write_text(json.dumps(cases))


def write_drafting(path: Path) -> None:
    """What is drafted as a text grows, and texts with the calls, drafts and hits that they took."""
    chosen, proposals, texts = np.random.default_rng(6), [], []
    for most in (1, 4, 15):
        passage = chosen.integers(0, 9, 30).tolist()
        noise = chosen.integers(0, 4, 60).tolist()
        ids = [*passage, *noise, *passage, 1, *passage[:20], 2, *noise[:30], *passage]
        drafter = PromptLookup()
        proposed = [list(drafter.propose(ids[: i + 1], most)) for i in range(len(ids))]
        proposals.append({"ids": ids, "most": most, "proposed": proposed})
    for bundle in ("gemma4-fp32", "rwkv7b-fp16", "embformer-bf16"):
        runner = pleexport.Runner(CONFORMANCE / bundle, threads=1)
        passage = chosen.integers(0, runner.blob.num_rows, 30).tolist()
        prompt = [*passage, *passage[:9]]
        tokens = runner.generate(
            prompt, temperature=0.0, max_new_tokens=120, ignore_eos=True, draft="lookup"
        )
        ids = [token.id for token in tokens]
        stats = runner.stats
        counts = [stats.decode_calls, stats.drafted_tokens, stats.accepted_tokens]
        texts.append({"bundle": bundle, "prompt_ids": prompt, "ids": ids, "counts": counts})
    path.write_text(json.dumps({"proposals": proposals, "texts": texts}))
