"""Count the tokens that a call of the graph writes with drafts, on the samples.

    python benchmarks/drafts.py                  # gemma4-kjv and rwkv7a-kjv, built for android
    python benchmarks/drafts.py gemma3n-kjv

Prompts are passages of the held-out text. `new` is a passage to continue. `copy` has a passage, and
its first words once more. `edit` is the same with some words of the second one exchanged, so that
the text has to leave the passage now and then. Greedy text of so small models repeats itself, which
drafts find too. So there are rows that ask no model, `as asked`: how many tokens a call would write
if the answer were the rest of the passage, with its words exchanged in `edit`.

Tokens per call do not depend on what else the machine does. Times do.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

import pleexport
from pleexport.runtime.drafting import TOKENS_PER_CALL, PromptLookup
from pleexport.runtime.tokenizer import Tokenizer

SAMPLES = Path(__file__).parents[1] / "samples"
PASSAGES = 8
PASSAGE_TOKENS, BEGUN_TOKENS, NEW_TOKENS = 220, 12, 160
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "temperature 0.8": {"temperature": 0.8, "seed": 3},
}
# Words of the passages and what an editor makes of them.
EDITS = {"LORD": "king", "Israel": "Judah", "said": "spake", "sons": "daughters", "came": "went"}


@dataclass
class Counts:
    """What texts of one kind took, added up; `faster` is the time without drafts over that with."""

    kind: str
    way: str
    texts: int = 0
    same_texts: int = 0
    tokens: int = 0
    calls: int = 0
    drafted: int = 0
    accepted: int = 0
    seconds: float = 0.0
    seconds_without: float = 0.0


def prompts(tokenizer: Tokenizer) -> Iterator[tuple[str, list[int], list[int]]]:
    """By kind, a prompt and what an answer as asked would be."""
    chapters = (SAMPLES / "heldout.txt").read_text(encoding="utf-8").split("\n\n")
    for chapter in chapters[:PASSAGES]:
        passage = tokenizer.encode(chapter.strip())[:PASSAGE_TOKENS]
        edited = re.sub(r"\w+", lambda word: EDITS.get(word[0], word[0]), tokenizer.decode(passage))
        again = tokenizer.encode("\n" + edited)
        plain = tokenizer.encode("\n" + tokenizer.decode(passage))
        yield "new", passage, []
        for kind, asked in (("copy", plain), ("edit", again)):
            begun = asked[1 if asked[0] == passage[0] else 0 :]
            yield kind, [*passage, *begun[:BEGUN_TOKENS]], begun[BEGUN_TOKENS:]


def as_asked(prompt: list[int], answer: list[int], counts: Counts) -> None:
    """Count the calls for an answer that is known."""
    drafter, written = PromptLookup(), 1  # the prompt's call gives the first token
    while written < len(answer):
        left = answer[written:]
        most = min(TOKENS_PER_CALL, len(left)) - 1
        ids = [*prompt, *answer[:written]]
        drafted = list(drafter.propose(ids, most)) if most else []
        right = 0
        while right < len(drafted) and drafted[right] == left[right]:
            right += 1
        counts.calls += 1
        counts.drafted += len(drafted)
        counts.accepted += right
        written += right + 1
    counts.tokens += len(answer) - 1


def generated(runner: pleexport.Runner, prompt: list[int], counts: Counts, **options: Any) -> None:
    """Count what a model writes, with and without drafts."""
    texts = []
    for draft in (None, "lookup"):
        runner.reset()
        tokens = runner.generate(
            prompt, max_new_tokens=NEW_TOKENS, ignore_eos=True, draft=draft, **options
        )
        texts.append([token.id for token in tokens])
        if draft is None:
            counts.seconds_without += runner.stats.decode_seconds
    counts.texts += 1
    counts.same_texts += texts[0] == texts[1]
    counts.tokens += runner.stats.generated_tokens - 1
    counts.calls += runner.stats.decode_calls
    counts.drafted += runner.stats.drafted_tokens
    counts.accepted += runner.stats.accepted_tokens
    counts.seconds += runner.stats.decode_seconds


def measure(sample: str, folder: Path, options: dict[str, str]) -> list[Counts]:
    """Counts of one sample, by kind and way."""
    bundle = pleexport.build(
        SAMPLES / sample, folder, target="android", overwrite=True, verify=False, **options
    )
    runner = pleexport.Runner(bundle)
    assert runner.tokenizer is not None
    found: dict[tuple[str, str], Counts] = {}

    def counts(kind: str, way: str) -> Counts:
        return found.setdefault((kind, way), Counts(kind, way))

    for kind, prompt, answer in tqdm(list(prompts(runner.tokenizer)), unit=" prompts"):
        for way, sampling in WAYS.items():
            generated(runner, prompt, counts(kind, way), **sampling)
        if answer:
            as_asked(prompt, answer, counts(kind, "as asked"))
    return sorted(found.values(), key=lambda c: (c.kind, c.way))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("samples", nargs="*", default=["gemma4-kjv", "rwkv7a-kjv"])
    parser.add_argument("--out", type=Path, default=Path("build/benchmarks/drafts"))
    parser.add_argument("--exact", action="store_true", help="fp32 weights, tables as they are")
    arguments = parser.parse_args()
    exact = {"weight_dtype": "fp32", "table_dtype": "source"} if arguments.exact else {}
    results = {}
    for sample in arguments.samples:
        found = results[sample] = measure(sample, arguments.out / sample, exact)
        print(f"\n{sample}")
        print(
            "prompt  text             tokens/call  drafted/call  accepted  same text  times as fast"
        )
        for c in found:
            same = f"{c.same_texts} of {c.texts}" if c.texts else ""
            faster = f"{c.seconds_without / c.seconds:.2f}" if c.seconds else ""
            print(
                f"{c.kind:<7} {c.way:<16} {c.tokens / c.calls:>11.2f} {c.drafted / c.calls:>13.2f} "
                f"{c.accepted / max(c.drafted, 1):>9.0%} {same:>10} {faster:>14}"
            )
    path = arguments.out / "drafts.json"
    path.write_text(json.dumps({k: [asdict(c) for c in v] for k, v in results.items()}, indent=2))


if __name__ == "__main__":
    main()
