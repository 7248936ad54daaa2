"""Time transformers on a checkpoint, in float32 on the CPU; one JSON object.

python benchmarks/peer_transformers.py build/benchmarks/gemma4-small/checkpoint
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument(
        "--prompt-tokens",
        type=lambda text: [int(n) for n in text.split(",")],
        default=[128, 512],
    )
    parser.add_argument("--decode-tokens", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    started = time.perf_counter()
    config = AutoConfig.from_pretrained(arguments.checkpoint)
    model = AutoModelForCausalLM.from_pretrained(
        arguments.checkpoint,
        config=config.get_text_config(),
        key_mapping={r"^model\.language_model\.": "model."},
        dtype="float32",
    ).eval()
    load_seconds = time.perf_counter() - started
    generator = torch.Generator().manual_seed(7)
    timings = []
    for count in arguments.prompt_tokens:
        prefill, decode = [], []
        for attempt in range(arguments.repeat + 1):  # the first warms up and is not counted
            ids = torch.randint(
                0, config.get_text_config().vocab_size, (1, count), generator=generator
            )
            with torch.no_grad():
                begun = time.perf_counter()
                out = model(ids, use_cache=True, logits_to_keep=1)
                first = time.perf_counter()
                for _ in range(arguments.decode_tokens):
                    token = out.logits[:, -1:].argmax(-1)
                    out = model(token, past_key_values=out.past_key_values, use_cache=True)
                last = time.perf_counter()
            if attempt:
                prefill.append(count / (first - begun))
                decode.append(arguments.decode_tokens / (last - first))
        timings.append(
            {
                "prompt_tokens": count,
                "prefill_tokens_per_second": statistics.median(prefill),
                "decode_tokens_per_second": statistics.median(decode),
            }
        )
    print(json.dumps({"load_seconds": load_seconds, "timings": timings}))


if __name__ == "__main__":
    main()
