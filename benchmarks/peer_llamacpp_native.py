"""Time llama.cpp as it is built for this processor: the same measures as `peer_llamacpp.py`.

    CMAKE_ARGS="-DGGML_NATIVE=ON" pip install --no-binary llama-cpp-python llama-cpp-python
    python benchmarks/peer_llamacpp_native.py build/e2b-q4_0.gguf --threads 2

The published wheels of other packages stop at AVX2, which is no fair rival on a processor that has
more. The build takes a quarter of an hour, so it has an environment of its own, and the package is
not in requirements.txt. Prompts and the tokens that are decoded are random ids: nothing is sampled.

Loading is timed with the page cache as it was found; the first token is that of the first prompt.
Every other measurement is repeated, after one that is not counted.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from importlib.metadata import version
from typing import Any

import llama_cpp
import peer

SEED = 7


class Peer:
    """A loaded model and the random prompts that it is given."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        longest = max(*arguments.prompt_tokens, arguments.context + arguments.decode_tokens) + 1
        self.model = llama_cpp.Llama(
            str(arguments.model),
            n_ctx=longest,
            n_batch=512,
            n_ubatch=512,
            n_threads=arguments.threads,
            n_threads_batch=arguments.threads,
            verbose=False,
        )
        self.random = random.Random(SEED)

    def seconds(self, count: int, *, fresh: bool = False) -> float:
        """Time of reading so many more tokens.

        Args:
            fresh: forget the text so far first.
        """
        if fresh:
            self.model.reset()
            self.model._ctx.kv_cache_clear()
        ids = [self.random.randrange(self.model.n_vocab()) for _ in range(count)]
        started = time.perf_counter()
        self.model.eval(ids)
        return time.perf_counter() - started


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Load the model and time it."""
    repeat = arguments.repeat
    started = time.perf_counter()
    engine = Peer(arguments)
    load_seconds = time.perf_counter() - started
    engine.seconds(arguments.prompt_tokens[0], fresh=True)
    first_token_seconds = time.perf_counter() - started
    prefill = {
        n: [n / engine.seconds(n, fresh=True) for _ in range(repeat + 1)][1:]
        for n in arguments.prompt_tokens
    }
    decode = []
    for _ in range(repeat + 1):
        engine.seconds(arguments.context, fresh=True)
        steps = [engine.seconds(1) for _ in range(arguments.decode_tokens)]
        decode.append(1 / statistics.mean(steps))
    return {
        "file": arguments.model.name,
        "file_bytes": arguments.model.stat().st_size,
        "package": f"llama-cpp-python {version('llama-cpp-python')}",
        "system_info": llama_cpp.llama_print_system_info().decode().strip(" |"),
        "threads": arguments.threads,
        "load_seconds": load_seconds,
        "load_to_first_token_seconds": first_token_seconds,
        "prefill": [{"prompt_tokens": n, "tokens_per_second": v} for n, v in prefill.items()],
        "decode": {
            "context_tokens": arguments.context,
            "decode_tokens": arguments.decode_tokens,
            "tokens_per_second": decode[1:],
        },
        "resident_bytes": peer.resident_bytes(),
    }


if __name__ == "__main__":
    peer.run(peer.parser(__doc__).parse_args(), measure)
