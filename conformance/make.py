"""Make the tiny bundles of this folder, and what every runtime must answer about them.

    python conformance/make.py [NAME ...]

The same versions of the packages in a manifest give the same bytes. Random checkpoints come from
the tests. See docs/conformance.md.
"""

from __future__ import annotations

import base64
import json
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests"))

from answers import ID_SEQUENCES, STOPS, TALKS, TEXTS, WORDS
from chat_templates import CHANNELS, MERGED, NO_FORMATS, OWN_TURNS, THINKING
from checkpoints import FULL, SLIDING, gemma3n, gemma4
from family_checkpoints import embformer, lckv, llama_value_embeddings
from malformed import malformed
from quantized_checkpoints import mobile_gemma4
from rwkv_checkpoints import rwkv
from tokenizers_in_code import byte_fallback, byte_level, save
from unrounded import unrounded

import pleexport
from pleexport.checkpoint.matching import MatchedModel
from pleexport.errors import InputError
from pleexport.families.opening import open_model
from pleexport.parity.oracle import open_oracle
from pleexport.runtime.chat_format import ChatFormat
from pleexport.runtime.stopping import AnswerText
from pleexport.runtime.tokenizer import Tokenizer
from pleexport.runtime.world_tokenizer import VOCABULARY

FORMAT, VERSION = "pleexport-conformance", 1
# Largest difference of a logit as a share of the range of the logits, by what is rounded at run
# time: nothing, halves, or inputs of matrices to codes. See docs/conformance.md.
EXACT, HALVES, CODES = 1e-4, 1e-3, 0.02
_FOUR = {
    "num_hidden_layers": 4,
    "layer_types": [SLIDING, FULL, SLIDING, FULL],
    "num_kv_shared_layers": 2,
}
_SMALL = _FOUR | {"intermediate_size": 16, "vocab_size": 300, "vocab_size_per_layer_input": 300}
_GEMMA4 = _SMALL | {"num_attention_heads": 2, "intermediate_size": 8}
_RWKV = {
    **{"vocab": 64, "width": 64, "ffn": 16, "de_rank": 8, "dea_width": 64, "dea_rank": 8},
    **{"decay_rank": 8, "rate_rank": 8, "value_rank": 8, "gate_rank": 8},
}
_SPECIALS = {"bos_token": "<bos>", "eos_token": "<eos>"}
_PROMPT, _POSITIONS = 40, (0, 7, 8, 23, 39)
_GREEDY_PROMPT, _GREEDY = 5, 8


def _with_tokenizer(make: Callable[..., Any], template: str | None) -> Callable[[Path], Any]:
    config = _SPECIALS | ({"chat_template": template} if template else {})
    return lambda folder: save(make(), folder, **config)


def _world(folder: Path) -> None:
    """A vocabulary of RWKV's World tokenizer: pieces of bytes, some no whole characters."""
    words = ["é", "€", "th", "the", " the", "he", " a", "in", "ing", "an", "and", " and", "  "]
    pieces: list[str | bytes] = [chr(i) for i in range(128)]
    pieces += [bytes([i]) for i in range(128, 256)]
    pieces += [*words, "\n\n", b"\xe2\x82", b"\xa9 "]
    lines = []
    for i, piece in enumerate(pieces, 1):
        size = len(piece.encode() if isinstance(piece, str) else piece)
        lines.append(f"{i} {piece!r} {size}\n")
    (folder / VOCABULARY).write_text("".join(lines), encoding="utf-8")


@dataclass(frozen=True)
class Case:
    """A bundle: what makes its checkpoint and tokenizer, and the options of its build."""

    checkpoint: Callable[[Path], Path]
    options: dict[str, Any]
    tokenizer: Callable[[Path], Any] | None = None
    malformed: bool = False


def _exact(table_dtype: str = "source", **options: Any) -> dict[str, Any]:
    return {"table_dtype": table_dtype, "weight_dtype": "fp32", "cache_dtype": "fp32"} | options


CASES: dict[str, Case] = {
    "gemma4-fp32": Case(
        lambda folder: gemma4(folder, **_GEMMA4),
        _exact(),
        _with_tokenizer(byte_fallback, CHANNELS),
    ),
    "gemma4-int4": Case(
        lambda folder: gemma4(folder, **_GEMMA4),
        {"table_dtype": "int8", "weight_dtype": "int4", "block_size": 32, "cache_dtype": "int8"},
        _with_tokenizer(byte_level, OWN_TURNS),
        malformed=True,
    ),
    "gemma4-quantized": Case(
        mobile_gemma4,
        {"table_dtype": "source", "weight_dtype": "source", "cache_dtype": "fp32"},
    ),
    "gemma3n-int8": Case(
        lambda folder: gemma3n(
            folder,
            **_SMALL | {"vocab_size_per_layer_input": 290},
            activation_sparsity_pattern=[0.95, 0.0, 0.5, 0.0],
        ),
        {"table_dtype": "int4", "weight_dtype": "int8", "block_size": 32, "cache_dtype": "fp16"},
        _with_tokenizer(lambda: byte_fallback(strip=True), MERGED),
    ),
    "rwkv7a-int8": Case(
        lambda folder: rwkv(folder / "model.pth", "7a", layers=2, **_RWKV | {"vocab": 280}),
        {"table_dtype": "int8", "weight_dtype": "int8", "block_size": 32},
        _world,
    ),
    "rwkv7b-fp16": Case(
        lambda folder: rwkv(folder / "model.pth", "7b", layers=1, **_RWKV),
        {"table_dtype": "fp16", "weight_dtype": "fp16", "cache_dtype": "fp32"},
    ),
    "rwkv8-fp32": Case(
        lambda folder: rwkv(folder / "model.pth", "8", layers=1, **_RWKV),
        _exact("fp32"),
    ),
    "embformer-bf16": Case(
        lambda folder: embformer(folder, torch.bfloat16, num_hidden_layers=2, vocab_size=262),
        _exact(cache_dtype="none"),
        _with_tokenizer(byte_level, NO_FORMATS["date"][0]),
    ),
    "lckv-fp16": Case(
        lambda folder: lckv(
            folder,
            num_hidden_layers=3,
            layer_types="0_2_2",
            vocab_size=300,
            hidden_size=32,
            intermediate_size=16,
        ),
        {"table_dtype": "fp16", "weight_dtype": "fp16", "cache_dtype": "fp16"},
        _with_tokenizer(byte_fallback, THINKING),
    ),
    "llama-value-embeddings-bf16": Case(
        lambda folder: llama_value_embeddings(
            folder,
            torch.bfloat16,
            num_hidden_layers=2,
            value_embedding_layers=[1],
            hidden_size=32,
            intermediate_size=16,
        ),
        _exact("bf16"),
    ),
}


@dataclass(frozen=True)
class Made:
    """A bundle, and who is asked about it."""

    name: str
    runner: pleexport.Runner
    original: Any
    exact: bool
    expected: dict[str, Any] = field(default_factory=dict)


def make_bundle(name: str, out: Path, scratch: Path) -> tuple[pleexport.Bundle, Path]:
    """Build a bundle of `CASES` at a place that is empty; the bundle, and its checkpoint."""
    case = CASES[name]
    torch.set_num_threads(1)
    place = case.checkpoint(scratch / "checkpoint")
    folder = place.parent if place.is_file() else place
    if case.tokenizer:
        case.tokenizer(folder)
    return pleexport.build(place, out, verify=False, **case.options), place


def main(names: Sequence[str]) -> None:
    """Make bundles again, and what is expected of them."""
    for name in names or CASES:
        out = HERE / name
        shutil.rmtree(out, ignore_errors=True)
        with TemporaryDirectory() as scratch:
            bundle, place = make_bundle(name, out, Path(scratch))
            report = pleexport.verify(bundle, checkpoint=place)
            assert report is not None
            assert report.passed, report.failures
            checkpoint, model = open_model(place)
            matched = MatchedModel(model.with_cache(bundle.manifest.cache_dtype), checkpoint)
            made = Made(
                name, pleexport.Runner(bundle, threads=1), open_oracle(matched), report.exact
            )
            write(HERE / f"{name}.json", answers(made))
        size = sum(p.stat().st_size for p in out.iterdir())
        print(f"{name}: {size:,} bytes, expected {(HERE / f'{name}.json').stat().st_size:,}")


def answers(made: Made) -> dict[str, Any]:
    """What every runtime must answer, by kind."""
    tokenizer, manifest = made.runner.tokenizer, made.runner.bundle.manifest
    logits = [*_logits(made)]
    found: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "bundle": made.name,
        "made_with": manifest.versions
        | manifest.graphs["decoder"].versions
        | {"onnxruntime": onnxruntime.__version__, "original": made.original.name},
        "tables": {name: list(shape) for name, shape in made.runner.blob.shapes.items()},
        "rows": [*_rows(made)],
        "refused_ids": [-1, made.runner.blob.num_rows],
        "logits": logits,
        "greedy": [*_greedy(made, logits[0]["tolerance"])],
    }
    if tokenizer:
        found |= {
            "texts": [*_texts(tokenizer)],
            "decodings": [*_decodings(tokenizer)],
            "streams": [*_streams(tokenizer)],
            "stops": [*_stops(tokenizer)],
        }
        if form := manifest.chat_format:
            found["conversations"] = [*_conversations(tokenizer, form)]
        elif manifest.no_chat_format:
            found["no_chat_format"] = manifest.no_chat_format
    if CASES[made.name].malformed:
        found["malformed"] = malformed(made.runner.bundle.path)
    return found


def _rows(made: Made) -> Iterator[dict[str, Any]]:
    last = made.runner.blob.num_rows - 1
    for i in (0, 1, 17, last - 6, last):
        found = made.runner.blob.lookup(made.runner.blob.row_ids([i]))
        yield {"id": i, "vectors": {name: _base64(v) for name, v in found.items()}}


def _logits(made: Made) -> Iterator[dict[str, Any]]:
    chosen = np.random.default_rng(0)
    ids = chosen.integers(0, made.runner.blob.num_rows, _PROMPT).tolist()
    ids[20:30] = [ids[20]] * 10  # rounding errors add up where tokens are alike
    original, ours = made.original.logits(ids), made.runner.logits(ids)
    spread = float(original.max() - original.min())
    expected = original if made.exact else ours
    positions = [p for p in _POSITIONS if p < len(ids)]
    floats = _unrounded(made, ids)
    more = (
        {}
        if floats is None
        else {
            "unrounded": _base64(floats[positions]),
            "unrounded_tolerance": _rounded(EXACT * spread),
        }
    )
    yield more | {
        "ids": ids,
        "positions": positions,
        "logits": _base64(expected[positions]),
        "from": "original" if made.exact else "runner",
        "tolerance": _rounded(_share(made) * spread),
        "range": _rounded(spread),
        "from_the_original": _rounded(float(np.abs(ours - original).max())),
    }


def _unrounded(made: Made, ids: list[int]) -> NDArray[np.float32] | None:
    """Logits where inputs of matrices are not rounded to codes; None where they never are."""
    with TemporaryDirectory() as scratch:
        copy = unrounded(made.runner.bundle.path, Path(scratch) / "copy")
        return copy and pleexport.Runner(copy, threads=1).logits(ids)


def _share(made: Made) -> float:
    """The tolerance, as a share of the range of the logits."""
    manifest = made.runner.bundle.manifest
    if made.exact:
        return EXACT
    floats = {manifest.weight_dtype, manifest.cache_dtype} <= {"fp32", "fp16", "none"}
    return HALVES if floats else CODES


def _greedy(made: Made, tolerance: float) -> Iterator[dict[str, Any]]:
    """Prompts after which the likeliest token is so by more than both sides may be off."""
    chosen, found = np.random.default_rng(1), []
    for _ in range(400):
        prompt = chosen.integers(0, made.runner.blob.num_rows, _GREEDY_PROMPT).tolist()
        ids, margins = list(prompt), []
        logits = made.runner.logits(ids)[-1]
        for _ in range(_GREEDY):
            second, first = np.partition(logits, -2)[-2:]
            if first - second <= 2 * tolerance or int(logits.argmax()) >= made.runner.blob.num_rows:
                break
            margins.append(float(first - second))
            ids.append(int(logits.argmax()))
            logits = made.runner.feed(ids[-1:])[-1]
        found.append((len(margins), len(set(ids)), ids, margins, prompt))
    for _, _, ids, margins, prompt in sorted(found, key=lambda f: f[:2], reverse=True)[:2]:
        assert margins, made.name
        yield {
            "prompt_ids": prompt,
            "ids": ids[len(prompt) :],
            "least_margin": _rounded(min(margins)),
        }


def _texts(tokenizer: Tokenizer) -> Iterator[dict[str, Any]]:
    for text in TEXTS if not tokenizer.is_lossless else WORDS:
        yield {"text": text, "ids": tokenizer.encode(text)}


def _sequences(tokenizer: Tokenizer) -> Iterator[tuple[list[int], list[int]]]:
    """Ids of a prompt, and those that follow: whole characters, broken ones, special tokens."""
    for prompt, text, cut in ID_SEQUENCES:
        before, ids = tokenizer.encode_prompt(prompt), tokenizer.encode_prompt(text)
        # A prompt may end inside of the text's first character.
        yield [*before, *ids[:cut]], ids[cut:]
    chosen = np.random.default_rng(2)
    for _ in range(12):
        yield [], chosen.integers(0, tokenizer.size, 9).tolist()


def _decodings(tokenizer: Tokenizer) -> Iterator[dict[str, Any]]:
    for before, ids in _sequences(tokenizer):
        yield {
            "ids": [*before, *ids],
            "text": tokenizer.decode([*before, *ids]),
            "with_specials": tokenizer.decode([*before, *ids], with_specials=True),
        }


def _streams(tokenizer: Tokenizer) -> Iterator[dict[str, Any]]:
    for prompt, ids in _sequences(tokenizer):
        stream = tokenizer.stream(prompt)
        pieces = [*map(stream.push, ids), stream.flush()]
        yield {"prompt_ids": prompt, "ids": ids, "pieces": pieces}


def _stops(tokenizer: Tokenizer) -> Iterator[dict[str, Any]]:
    for text, stops in STOPS:
        ids, answer = tokenizer.encode_prompt(text), AnswerText(tokenizer.stream([]), stops)
        pieces: list[str] = []
        for token_id in ids:
            pieces.append(answer.push(token_id))
            if answer.stopped:
                break
        else:
            pieces.append(answer.flush())
        yield {"ids": ids, "stop": stops, "pieces": pieces, "stopped": answer.stopped}


def _conversations(tokenizer: Tokenizer, form: ChatFormat) -> Iterator[dict[str, Any]]:
    for messages in TALKS:
        for thinking in (None, *([True, False] if form.thinking_on or form.thinking_off else [])):
            case: dict[str, Any] = {"messages": messages}
            asked = {"add_generation_prompt": True}
            if thinking is not None:
                case["thinking"] = asked["enable_thinking"] = thinking
            try:
                text = form.render(messages, thinking=thinking)
            except InputError:
                yield case | {"text": None, "ids": None}
                continue
            assert text == tokenizer.render_chat(messages, asked)
            yield case | {"text": text, "ids": tokenizer.encode_prompt(text)}


def _base64(values: Any) -> str:
    return base64.b64encode(np.ascontiguousarray(values, "<f4").tobytes()).decode()


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def write(path: Path, found: dict[str, Any]) -> None:
    """One line a case, so that changes can be read."""
    lines = []
    for key, value in found.items():
        text = json.dumps(value, ensure_ascii=True)
        if isinstance(value, list) and value and isinstance(value[0], dict):
            cases = ",\n  ".join(json.dumps(case, ensure_ascii=True) for case in value)
            text = f"[\n  {cases}\n ]"
        lines.append(f" {json.dumps(key)}: {text}")
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="ascii")


if __name__ == "__main__":
    main(sys.argv[1:])
