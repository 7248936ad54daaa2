"""Time llama.cpp on a GGUF file: load, first token, prefill, decode, memory; one JSON object.

    python benchmarks/peer_llamacpp.py build/e2b-q4_0.gguf --prompt-tokens 128,512 --threads 2

Needs `pip install xllamacpp`, which holds llama.cpp's server; nothing listens beyond 127.0.0.1.
Prompts are random token ids, generation is greedy, and speeds are those that llama.cpp reports; the
first token, which the prefill computes, is not part of decoding.

Loading is timed without llama.cpp's warm-up run and with the page cache as it was found; the first
token is that of the first prompt. Every other measurement is repeated, after one that is not
counted. Imports stay few: the memory that is reported is the whole process's. `system_info` says
which instructions the build uses: the published wheel stops at AVX2, whatever the machine has.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import time
from importlib.metadata import version
from typing import Any

import peer
import xllamacpp

SEED = 7
BLOCK = 256  # llama.cpp rounds contexts up to this
LAZY = {
    "auto": xllamacpp.llama_lazy_mode.LLAMA_LAZY_MODE_AUTO,
    "on": xllamacpp.llama_lazy_mode.LLAMA_LAZY_MODE_ON,
    "off": xllamacpp.llama_lazy_mode.LLAMA_LAZY_MODE_OFF,
}


class Peer:
    """A loaded model and the random prompts that it is given."""

    def __init__(self, params: xllamacpp.CommonParams) -> None:
        self.server = xllamacpp.Server(params)
        self.random = random.Random(SEED)
        self.meta: dict[str, Any] = self._models()[0]["meta"]

    def generate(self, prompt_tokens: int, *, decode_tokens: int = 1) -> dict[str, Any]:
        """Complete a random prompt; llama.cpp's own timings."""
        request = {
            "prompt": [self.random.randrange(self.meta["n_vocab"]) for _ in range(prompt_tokens)],
            "max_tokens": decode_tokens,
            "temperature": 0,
            "samplers": ["top_k"],
            "top_k": 1,
            "ignore_eos": True,
            "cache_prompt": False,
        }
        timings: dict[str, Any] = self.server.handle_completions(request)["timings"]
        if (timings["prompt_n"], timings["predicted_n"]) != (prompt_tokens, decode_tokens):
            raise SystemExit(f"error: llama.cpp did not process what was asked for: {timings}")
        return timings

    def _models(self) -> list[dict[str, Any]]:
        address = self.server.listening_address.removeprefix("http://")
        connection = http.client.HTTPConnection(address)
        connection.request("GET", "/v1/models")
        models: list[dict[str, Any]] = json.load(connection.getresponse())["data"]
        connection.close()
        return models


def parameters(arguments: argparse.Namespace) -> xllamacpp.CommonParams:
    """llama.cpp's parameters: one slot, no caches across requests, as few surprises as possible."""
    params = xllamacpp.CommonParams()
    params.model.path = str(arguments.model)
    longest = max(*arguments.prompt_tokens, arguments.context + arguments.decode_tokens) + 1
    params.n_ctx = -(-longest // BLOCK) * BLOCK
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = arguments.threads
    params.n_parallel = 1
    params.warmup = False
    params.fit_params = False
    params.cache_ram_mib = 0
    params.n_ctx_checkpoints = 0
    params.use_jinja = False
    params.ui = False
    params.verbosity = 0
    params.lazy_mode = LAZY[arguments.lazy]
    params.no_extra_bufts = arguments.no_repack
    return params


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Load the model and time it."""
    repeat, decode_tokens = arguments.repeat, arguments.decode_tokens
    params = parameters(arguments)
    started = time.perf_counter()
    engine = Peer(params)
    load_seconds = time.perf_counter() - started
    engine.generate(arguments.prompt_tokens[0])
    first_token_seconds = time.perf_counter() - started
    prefill = {
        n: [engine.generate(n)["prompt_per_second"] for _ in range(repeat + 1)][1:]
        for n in arguments.prompt_tokens
    }
    decode = [
        engine.generate(arguments.context, decode_tokens=decode_tokens) for _ in range(repeat + 1)
    ][1:]
    info = xllamacpp.get_system_info()
    return {
        "file": arguments.model.name,
        "file_bytes": arguments.model.stat().st_size,
        "model": engine.meta,
        "package": f"xllamacpp {version('xllamacpp')}",
        "build": xllamacpp.BUILD_INFO,
        "system_info": info.strip(" |"),
        "instructions": {
            n: f"{n} = 1" in info for n in ("AVX2", "AVX_VNNI", "AVX512", "AVX512_VNNI")
        },
        "threads": arguments.threads,
        "repack": not arguments.no_repack,
        "lazy": arguments.lazy,
        "n_ctx": params.n_ctx,
        "load_seconds": load_seconds,
        "load_to_first_token_seconds": first_token_seconds,
        "prefill": [{"prompt_tokens": n, "tokens_per_second": v} for n, v in prefill.items()],
        "decode": {
            "context_tokens": arguments.context,
            "decode_tokens": decode_tokens,
            "tokens_per_second": [t["predicted_per_second"] for t in decode],
        },
        "resident_bytes": peer.resident_bytes(),
    }


def main() -> None:
    parser = peer.parser(__doc__)
    parser.add_argument("--no-repack", action="store_true", help="keep weights as in the file")
    parser.add_argument(
        "--lazy", choices=LAZY, default="auto", help="map tables and read rows when used"
    )
    peer.run(parser.parse_args(), measure)


if __name__ == "__main__":
    main()
