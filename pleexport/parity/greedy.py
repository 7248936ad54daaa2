"""Does a bundle write what the original would write, taking the best token each time?"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from pleexport.errors import InputError
from pleexport.parity.metrics import NEAR_TIE
from pleexport.parity.oracle import Oracle
from pleexport.parity.report import GreedyCheck
from pleexport.runtime.runner import Runner

_GREEDY_TOKENS = 32


def check_greedy(
    runner: Runner, *, oracle: Oracle, prompt: Sequence[int], logit_range: float
) -> GreedyCheck | None:
    """Compare the greedy continuation of a prompt with what the original would write.

    Args:
        prompt: token ids.
        logit_range: of the original's logits, to tell a near tie.
    Returns:
        None where the context has no place behind the prompt.
    """
    count = min(_GREEDY_TOKENS, runner.context - len(prompt))
    if count < 1:
        return None
    runner.reset()
    got = []
    with contextlib.suppress(InputError):  # logits that are no numbers choose no token
        for token in runner.generate(prompt, max_new_tokens=count, ignore_eos=True):
            got.append(token.id)
    # The original knows ids that have no row to go on with: its text ends here for us.
    if got and got[-1] >= runner.blob.num_rows:
        count = len(got)
    # Up to the first difference, both have read the same tokens: one call tells what the original
    # would have chosen.
    logits = oracle.logits([*prompt, *got[:-1]], keep=len(got))
    expected = logits.argmax(-1)
    equal = next((i for i, id_ in enumerate(got) if id_ != expected[i]), len(got))
    near_tie = False
    if equal < len(got):
        gap = logits[equal, expected[equal]] - logits[equal, got[equal]]
        near_tie = bool(gap <= NEAR_TIE * logit_range)
    return GreedyCheck(tokens=count, equal_tokens=equal, near_tie=near_tie)
