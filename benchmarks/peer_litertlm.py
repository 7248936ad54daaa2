"""Time LiteRT-LM on a `.litertlm` file: load, prefill, decode, memory; one JSON object.

    python benchmarks/peer_litertlm.py build/small-int4.litertlm --prompt-tokens 128,512 --threads 2

Needs an environment of its own, `pip install -r benchmarks/requirements-litertlm.txt`, and a file
of `write_litertlm.py`, whose made-up vocabulary turns random token ids into a prompt.

LiteRT-LM leaves a prompt's last token, and with it the output head, to the first step of decoding,
which takes as long as two others. So that it compares with engines whose prefill ends with a token,
prefill speed is the prompt's length over the time to the first token; what LiteRT-LM itself calls
prefill speed stands beside it. Decoding speed is the one that it reports, of all steps.

Weights packed for this processor are kept in a file beside the model, as LiteRT-LM does when it is
not asked, and mapped from the second load on: `weight_cache` says whether this load found them.
`--no-weight-cache` packs them into memory. Every measurement is repeated, after one that is not
counted; a request takes a session of its own, so nothing is cached across them. Imports stay few:
the memory that is reported is the whole process's.
"""

from __future__ import annotations

import argparse
import bisect
import random
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import litert_lm
import peer

SEED = 7
GREEDY = litert_lm.SamplerConfig(top_k=1, top_p=1.0, temperature=1.0)


class Peer:
    """A loaded model and the random prompts that it is given."""

    def __init__(self, model: Path, *, threads: int, context: int, cache: bool) -> None:
        self.engine = litert_lm.Engine(
            str(model),
            backend=litert_lm.Backend.CPU(thread_count=threads),
            max_num_tokens=context,
            cache_dir=None if cache else ":nocache",
            enable_benchmark=True,
        )
        # The vocabulary ends where a word is no longer its own id.
        self.vocab_size = bisect.bisect_left(
            range(1 << 20), True, key=lambda i: self.engine.tokenize(f"t{i}") != [i]
        )
        self.random = random.Random(SEED)

    def generate(self, prompt_tokens: int, *, decode_tokens: int = 1) -> dict[str, float]:
        """Complete a random prompt; seconds by the clock, and LiteRT-LM's own speeds."""
        ids = [self.random.randrange(self.vocab_size) for _ in range(prompt_tokens)]
        session = self.engine.create_session(
            apply_prompt_template=False, sampler_config=GREEDY, max_output_tokens=decode_tokens
        )
        with session:
            started = time.perf_counter()
            session.run_prefill([" ".join(f"t{i}" for i in ids)])
            session.run_decode()
            seconds = time.perf_counter() - started
            info = session.get_benchmark_info()
        done = (info.last_prefill_token_count, info.last_decode_token_count)
        if done != (prompt_tokens, decode_tokens):
            raise SystemExit(f"error: LiteRT-LM did not process what was asked for: {info}")
        return {
            "seconds": seconds,
            "prefill_per_second": info.last_prefill_tokens_per_second,
            "decode_per_second": info.last_decode_tokens_per_second,
        }


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Load the model and time it."""
    repeat, decode_tokens, model = arguments.repeat, arguments.decode_tokens, arguments.model
    found = any(model.parent.glob(f"{model.name}_*.xnnpack_cache"))
    cache = not arguments.no_weight_cache
    litert_lm.set_min_log_severity(litert_lm.LogSeverity.ERROR)
    started = time.perf_counter()
    engine = Peer(model, threads=arguments.threads, context=arguments.max_context, cache=cache)
    load_seconds = time.perf_counter() - started
    engine.generate(arguments.prompt_tokens[0])
    first_token_seconds = time.perf_counter() - started
    prefill = {
        n: [engine.generate(n) for _ in range(repeat + 1)][1:] for n in arguments.prompt_tokens
    }
    decode = [
        engine.generate(arguments.context, decode_tokens=decode_tokens) for _ in range(repeat + 1)
    ][1:]
    return {
        "file": model.name,
        "file_bytes": model.stat().st_size,
        "package": f"litert-lm-api {version('litert-lm-api')}",
        "threads": arguments.threads,
        "n_ctx": arguments.max_context,
        "weight_cache": ("found" if found else "written") if cache else "off",
        "load_seconds": load_seconds,
        "load_to_first_token_seconds": first_token_seconds,
        "prefill": [
            {
                "prompt_tokens": n,
                "tokens_per_second": [n / run["seconds"] for run in runs],
                "first_token_seconds": [run["seconds"] for run in runs],
                "reported_tokens_per_second": [run["prefill_per_second"] for run in runs],
            }
            for n, runs in prefill.items()
        ],
        "decode": {
            "context_tokens": arguments.context,
            "decode_tokens": decode_tokens,
            "tokens_per_second": [run["decode_per_second"] for run in decode],
        },
        "resident_bytes": peer.resident_bytes(),
    }


def main() -> None:
    parser = peer.parser(__doc__)
    parser.add_argument("--max-context", type=int, default=1024, help="that of write_litertlm.py")
    parser.add_argument("--no-weight-cache", action="store_true", help="pack weights into memory")
    peer.run(parser.parse_args(), measure)


if __name__ == "__main__":
    main()
