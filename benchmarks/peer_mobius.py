"""Time onnxruntime-genai on a folder of mobius: load, prefill, decode, memory; one JSON object.

    python benchmarks/peer_mobius.py build/small-mobius --prompt-tokens 128,512 --threads 2

Needs an environment of its own, `pip install -r benchmarks/requirements-mobius.txt`, and a folder
of `write_mobius.py`. Prompts are random token ids and generation is greedy, past the end token;
prefill ends with the first token, which is not part of decoding.

Loading is timed with the page cache as it was found; the first token is that of the first prompt.
Every other measurement is repeated, after one that is not counted. Imports stay few: the memory
that is reported is the whole process's.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai as genai
import peer

SEED = 7


class Peer:
    """A loaded model and the random prompts that it is given."""

    def __init__(self, folder: Path, *, threads: int) -> None:
        config = genai.Config(str(folder))
        options = {"intra_op_num_threads": threads}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        self.model = genai.Model(config)
        self.vocab_size = json.loads((folder / "genai_config.json").read_text())["model"][
            "vocab_size"
        ]
        self.random = random.Random(SEED)

    def generate(self, prompt_tokens: int, *, decode_tokens: int = 0) -> tuple[float, float]:
        """Complete a random prompt; seconds to the first token and of those after it."""
        ids = [self.random.randrange(self.vocab_size) for _ in range(prompt_tokens)]
        total = prompt_tokens + 1 + decode_tokens
        params = genai.GeneratorParams(self.model)
        params.set_search_options(max_length=total, min_length=total, do_sample=False)
        generator = genai.Generator(self.model, params)
        started = time.perf_counter()
        generator.append_tokens(np.array(ids, np.int32))
        generator.generate_next_token()
        first = time.perf_counter()
        for _ in range(decode_tokens):
            generator.generate_next_token()
        last = time.perf_counter()
        if (done := len(generator.get_sequence(0))) != total:
            raise SystemExit(f"error: onnxruntime-genai made {done} tokens of {total}")
        return first - started, last - first


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Load the model and time it."""
    repeat, decode_tokens = arguments.repeat, arguments.decode_tokens
    started = time.perf_counter()
    engine = Peer(arguments.model, threads=arguments.threads)
    load_seconds = time.perf_counter() - started
    engine.generate(arguments.prompt_tokens[0])
    first_token_seconds = time.perf_counter() - started
    prefill = {
        n: [engine.generate(n)[0] for _ in range(repeat + 1)][1:] for n in arguments.prompt_tokens
    }
    decode = [
        engine.generate(arguments.context, decode_tokens=decode_tokens)[1]
        for _ in range(repeat + 1)
    ][1:]
    return {
        "file": arguments.model.name,
        "file_bytes": sum(p.stat().st_size for p in arguments.model.glob("model.onnx*")),
        "package": ", ".join(
            f"{name} {version(name)}"
            for name in ("mobius-onnx", "onnxruntime-genai", "onnxruntime")
        ),
        "threads": arguments.threads,
        "load_seconds": load_seconds,
        "load_to_first_token_seconds": first_token_seconds,
        "prefill": [
            {
                "prompt_tokens": n,
                "tokens_per_second": [n / seconds for seconds in runs],
                "first_token_seconds": runs,
            }
            for n, runs in prefill.items()
        ],
        "decode": {
            "context_tokens": arguments.context,
            "decode_tokens": decode_tokens,
            "tokens_per_second": [decode_tokens / seconds for seconds in decode],
        },
        "resident_bytes": peer.resident_bytes(),
    }


def main() -> None:
    peer.run(peer.parser(__doc__).parse_args(), measure)


if __name__ == "__main__":
    main()
