"""Compare pleexport with llama.cpp and transformers on one checkpoint; JSON and an HTML page.

    pip install -r benchmarks/requirements.txt
    python benchmarks/compare.py gemma4-small          # a minute a round; inputs are made once
    python benchmarks/compare.py gemma4-e2b            # true size: 20 GB of disk
    python benchmarks/compare.py gemma4-small --quick

The checkpoint has random weights, which cost as much to multiply by as trained ones. Every engine
runs in a process of its own, one after the other, in rounds; what counts are the ratios of the
medians. Run nothing else meanwhile: the threads of all engines spin while they wait.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, select_autoescape
from machine import cached_share, describe
from make_checkpoint import write_checkpoint
from matplotlib.figure import Figure
from shapes import SHAPES
from tqdm import tqdm

import pleexport

HERE = Path(__file__).parent
# Larger checkpoints do not fit into this machine's memory in float32.
TRANSFORMERS_SHAPES = ("gemma4-small", "gemma4-narrow")


def make_inputs(shape: str, folder: Path) -> dict[str, Path]:
    """The checkpoint, the bundles and the GGUF file; those that are there are kept."""
    paths = {
        "checkpoint": folder / "checkpoint",
        "pleexport": folder / "android",
        "pleexport, int4 head": folder / "android-int4-head",
        "llama.cpp Q4_0": folder / "q4_0.gguf",
        "llama.cpp Q4_0, Q8_0 head": folder / "q4_0-q8_0-head.gguf",
    }
    if not (paths["checkpoint"] / "config.json").exists():
        write_checkpoint(shape, paths["checkpoint"])
    for name, head_dtype in (("pleexport", None), ("pleexport, int4 head", "int4")):
        if not paths[name].exists():
            pleexport.build(
                paths["checkpoint"],
                paths[name],
                target="android",
                head_dtype=head_dtype,
                verify=False,
            )
    # llama.cpp's own quantizer gives a tied head 6 bits, which the package `gguf` cannot write.
    for name, embedding_dtype in (
        ("llama.cpp Q4_0", "q4_0"),
        ("llama.cpp Q4_0, Q8_0 head", "q8_0"),
    ):
        if not paths[name].exists():
            _run(
                "write_gguf.py", paths["checkpoint"], paths[name],
                "--dtype", "q4_0", "--embedding-dtype", embedding_dtype,
            )  # fmt: skip
    return paths


def run_pleexport(bundle: Path, arguments: argparse.Namespace, *options: object) -> dict[str, Any]:
    """One round of `pleexport bench`."""
    result = json.loads(
        _output(
            "-m", "pleexport.cli", "bench", bundle,
            "--prompt-tokens", arguments.prompt_tokens, "--decode-tokens", arguments.decode_tokens,
            "--repeat", 1, "--threads", arguments.threads, "--json", *options,
        )
    )  # fmt: skip
    longest = str(arguments.prompt_tokens).rpartition(",")[2]
    cold = json.loads(
        _output(
            "-m", "pleexport.cli", "bench", bundle, "--prompt-tokens", longest, "--cold",
            "--decode-tokens", 1, "--repeat", 1, "--threads", arguments.threads, "--json", *options,
        )
    )  # fmt: skip
    first, last = result["timings"][0], result["timings"][-1]
    return {
        "load": result["load_seconds"],
        "load to first token": result["load_to_first_token_seconds"],
        f"first token of {longest}": last["first_token_seconds"],
        f"first token of {longest}, cold rows": cold["timings"][0]["first_token_seconds"],
        "decode": first["decode_tokens_per_second"],
        "anonymous": result["anonymous_bytes"],
        "file-backed": result["file_backed_bytes"],
    } | {f"prefill {t['prompt_tokens']}": t["prefill_tokens_per_second"] for t in result["timings"]}


def run_llamacpp(gguf: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """One round of llama.cpp."""
    result = json.loads(
        _output(
            HERE / "peer_llamacpp.py", gguf, "--json",
            "--prompt-tokens", arguments.prompt_tokens, "--decode-tokens", arguments.decode_tokens,
            "--context", arguments.prompt_tokens.split(",")[0],
            "--threads", arguments.threads, "--repeat", 1,
        )
    )  # fmt: skip
    return {
        "load": result["load_seconds"],
        "load to first token": result["load_to_first_token_seconds"],
        "decode": result["decode"]["tokens_per_second"][0],
        "anonymous": result["resident_bytes"]["RssAnon"],
        "file-backed": result["resident_bytes"]["RssFile"],
    } | {f"prefill {p['prompt_tokens']}": p["tokens_per_second"][0] for p in result["prefill"]}


def run_transformers(checkpoint: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """One round of transformers in float32."""
    result = json.loads(
        _output(
            HERE / "peer_transformers.py", checkpoint,
            "--prompt-tokens", arguments.prompt_tokens, "--threads", arguments.threads,
        )
    )  # fmt: skip
    first = result["timings"][0]
    return {
        "load": result["load_seconds"],
        "decode": first["decode_tokens_per_second"],
    } | {f"prefill {t['prompt_tokens']}": t["prefill_tokens_per_second"] for t in result["timings"]}


def compare(shape: str, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Make the inputs, run all engines in rounds, and collect what they say."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = make_inputs(shape, folder)
    engines: dict[str, Callable[[], dict[str, Any]]] = {
        "pleexport": lambda: run_pleexport(paths["pleexport"], arguments),
        "pleexport, packed weights": lambda: run_pleexport(
            paths["pleexport"], arguments, "--packed-weights", folder / "packed"
        ),
        "pleexport, int4 head": lambda: run_pleexport(paths["pleexport, int4 head"], arguments),
        "llama.cpp Q4_0": lambda: run_llamacpp(paths["llama.cpp Q4_0"], arguments),
        "llama.cpp Q4_0, Q8_0 head": lambda: run_llamacpp(
            paths["llama.cpp Q4_0, Q8_0 head"], arguments
        ),
    }
    if shape in TRANSFORMERS_SHAPES:
        engines["transformers fp32"] = lambda: run_transformers(paths["checkpoint"], arguments)
    blob = paths["pleexport"] / "embeddings.safetensors"
    weights = {name: _weight_bytes(paths[name]) for name in paths if name.startswith("pleexport")}
    result: dict[str, Any] = {
        "shape": shape,
        "machine": describe(folder, arguments.threads),
        "arguments": {k: v for k, v in vars(arguments).items() if k not in ("out", "shape")},
        "weight_bytes_per_token": weights,
        "blob_in_page_cache_before": cached_share(blob),
        "rounds": {name: [] for name in engines},
    }
    with tqdm(total=arguments.rounds * len(engines), unit=" runs") as bar:
        for _ in range(arguments.rounds):
            for name, run in engines.items():
                result["rounds"][name].append(run())
                bar.update()
    result["blob_in_page_cache_after"] = cached_share(blob)
    return result


def summary(result: dict[str, Any]) -> list[dict[str, Any]]:
    """By quantity: median, least and largest of each engine, and the ratio to llama.cpp."""
    rows = []
    engines = result["rounds"]
    for quantity in engines["pleexport"][0]:
        row: dict[str, Any] = {"quantity": quantity, "engines": {}}
        for name, rounds in engines.items():
            values = [r[quantity] for r in rounds if r.get(quantity) is not None]
            if values:
                row["engines"][name] = (statistics.median(values), min(values), max(values))
        base = row["engines"].get("llama.cpp Q4_0")
        row["ratios"] = {n: values[0] / base[0] for n, values in row["engines"].items() if base}
        rows.append(row)
    return rows


def render(result: dict[str, Any]) -> str:
    """The result as one self-contained HTML page."""
    rows = summary(result)
    decode = next(row for row in rows if row["quantity"] == "decode")
    bandwidth = result["machine"]["memory_read_gb_per_second"] * 1e9
    bounds = {name: bandwidth / n for name, n in result["weight_bytes_per_token"].items()}
    environment = Environment(loader=FileSystemLoader(HERE), autoescape=select_autoescape(["html"]))
    return environment.get_template("compare.html").render(
        result=result,
        rows=rows,
        bounds={n: (bound, decode["engines"][n][0] / bound) for n, bound in bounds.items()},
        plots=[_plot(row) for row in rows if row["quantity"].startswith(("decode", "prefill"))],
        engines=list(result["rounds"]),
        units=_unit,
    )


def _unit(quantity: str, value: float) -> str:
    if quantity in ("anonymous", "file-backed"):
        return f"{value / 1e6:,.0f} MB"
    if quantity.startswith(("load", "first token")):
        return f"{value:.2f} s"
    return f"{value:,.1f} tokens/s"


def _plot(row: dict[str, Any]) -> str:
    """Medians with the spread of the rounds, as SVG."""
    figure = Figure(figsize=(7.5, 0.45 * len(row["engines"]) + 0.8), layout="constrained")
    axes = figure.subplots()
    names = list(row["engines"])[::-1]
    medians = [row["engines"][name][0] for name in names]
    spread = [
        [row["engines"][n][0] - row["engines"][n][1] for n in names],
        [row["engines"][n][2] - row["engines"][n][0] for n in names],
    ]
    axes.barh(names, medians, xerr=spread, capsize=3)
    axes.set_xlabel(f"{row['quantity']}, tokens/s")
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _weight_bytes(bundle: Path) -> int:
    return (bundle / "model.onnx.data").stat().st_size


def _run(script: str, *arguments: object) -> None:
    subprocess.run([sys.executable, HERE / script, *map(str, arguments)], check=True)


def _output(*arguments: object) -> str:
    time.sleep(1)  # the threads of the last engine are gone
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"error: {' '.join(command)} failed\n{done.stderr}")
    return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--out", type=Path, help="folder; build/benchmarks/SHAPE by default")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt-tokens", default="128,512")
    parser.add_argument("--decode-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="one round, short prompts")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.rounds, arguments.prompt_tokens, arguments.decode_tokens = 1, "32,64", 8
    folder = arguments.out or Path("build/benchmarks") / arguments.shape
    result = compare(arguments.shape, folder, arguments)
    (folder / "result.json").write_text(json.dumps(result, indent=2))
    (folder / "result.html").write_text(render(result), encoding="utf-8")
    for row in summary(result):
        cells = (f"{n} {_unit(row['quantity'], v[0])}" for n, v in row["engines"].items())
        print(f"{row['quantity']}: {'; '.join(cells)}")
    print(f"written: {folder / 'result.html'}")


if __name__ == "__main__":
    main()
