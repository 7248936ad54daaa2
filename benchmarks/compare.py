"""Compare pleexport with other engines on one checkpoint; JSON and an HTML page.

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
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from machine import cached_share, describe, memory_read
from make_checkpoint import made_checkpoint
from page import Section, Table, bars, machine_section, write_page
from shapes import SHAPES
from tqdm import tqdm

import pleexport

HERE = Path(__file__).parent
# Larger checkpoints do not fit into this machine's memory in float32.
FLOAT32_SHAPES = ("gemma4-small", "gemma4-narrow")
# Engines whose requirements contradict ours have environments of their own.
ENVIRONMENTS = Path("build/benchmarks")
LITERT_RECIPES = {"LiteRT-LM int4": "gemma4_mixed48", "LiteRT-LM int8": "dynamic_wi8_afp32"}


EXECUTORCH = "pleexport, ExecuTorch"
MOBILE = "pleexport, mobile checkpoint"
_FOLDERS = {
    "pleexport": "android",
    "pleexport, int4 head": "android-int4-head",
    EXECUTORCH: "android-executorch",
}


@dataclass(frozen=True)
class Peer:
    """Another engine: what it loads, and the script that times it, with its interpreter."""

    script: str
    model: Path
    python: Path


def make_bundles(shape: str, folder: Path) -> dict[str, Path]:
    """The checkpoint, and bundles by name; those that are there are kept."""
    checkpoint = made_checkpoint(shape, folder)
    options: dict[str, pleexport.BuildOptions] = {
        "pleexport": {},
        "pleexport, int4 head": {"head_dtype": "int4"},
        EXECUTORCH: {"backend": "executorch"},
    }
    if importlib.util.find_spec("executorch") is None:
        tqdm.write(f"left out: {EXECUTORCH}; `pip install 'pleexport[executorch]'`")
        del options[EXECUTORCH]
    bundles = {name: folder / _FOLDERS[name] for name in options}
    for name, bundle in bundles.items():
        if not bundle.exists():
            pleexport.build(checkpoint, bundle, target="android", verify=False, **options[name])
    if (mobile := f"{shape}-mobile") in SHAPES:
        bundles[MOBILE] = folder / "android-mobile"
        if not bundles[MOBILE].exists():
            codes = made_checkpoint(mobile, folder / "mobile")
            pleexport.build(codes, bundles[MOBILE], target="android", verify=False)
    return bundles


def make_peers(shape: str, folder: Path, arguments: argparse.Namespace) -> dict[str, Peer]:
    """The other engines by name, their files converted; those that are there are kept."""
    peers = {}

    def convert(name: str, engine: str, python: Path, file: str, *options: object) -> None:
        peers[name] = Peer(f"peer_{engine}.py", folder / file, python)
        if not peers[name].model.exists():
            writer = "write_gguf.py" if engine == "llamacpp" else f"write_{engine}.py"
            _run(python, HERE / writer, folder / "checkpoint", folder / file, *options)

    # llama.cpp's own quantizer gives a tied head 6 bits, which the package `gguf` cannot write.
    for name, file, head_dtype in (
        ("llama.cpp Q4_0", "q4_0.gguf", "q4_0"),
        ("llama.cpp Q4_0, Q8_0 head", "q4_0-q8_0-head.gguf", "q8_0"),
    ):
        options = ("--dtype", "q4_0", "--embedding-dtype", head_dtype)
        convert(name, "llamacpp", Path(sys.executable), file, *options)
    if python := _environment("llamacpp_native"):
        convert("llama.cpp Q4_0, built here", "llamacpp_native", python, "q4_0.gguf")
    if shape in FLOAT32_SHAPES:  # their converters go by float32
        if python := _environment("litertlm"):
            for name, recipe in LITERT_RECIPES.items():
                lengths = arguments.prompt_tokens
                options = ("--recipe", recipe, "--prefill-lengths", lengths)
                convert(name, "litertlm", python, f"{recipe}-{lengths}.litertlm", *options)
        if python := _environment("mobius"):
            convert("mobius int4", "mobius", python, "mobius", "--last-logits")
    return peers


def _environment(name: str) -> Path | None:
    """The interpreter of an engine that has an environment of its own, if it was made."""
    python = (ENVIRONMENTS / f"venv-{name}" / "bin" / "python").absolute()
    if python.exists():
        return python
    tqdm.write(f"left out: {name}, for which there is no {python}; see benchmarks/README.md")
    return None


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


def run_peer(peer: Peer, arguments: argparse.Namespace) -> dict[str, Any]:
    """One round of another engine."""
    result = json.loads(
        _output(
            HERE / peer.script, peer.model, "--json",
            "--prompt-tokens", arguments.prompt_tokens, "--decode-tokens", arguments.decode_tokens,
            "--context", arguments.prompt_tokens.split(",")[0],
            "--threads", arguments.threads, "--repeat", 1, python=peer.python,
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


def run_steps(bundle: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """One round of decode steps with warm, cold and constant rows."""
    steps: dict[str, float] = json.loads(
        _output(HERE / "steps.py", bundle, "--threads", arguments.threads, "--json")
    )
    return steps


def measure(shape: str, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Make the inputs, run all engines in rounds, and collect what they say."""
    bundles, peers = make_bundles(shape, folder), make_peers(shape, folder, arguments)
    engines: dict[str, Callable[[], dict[str, Any]]] = {
        name: partial(run_pleexport, bundle, arguments) for name, bundle in bundles.items()
    }
    bundle = bundles["pleexport"]
    engines["pleexport, packed weights"] = partial(
        run_pleexport, bundle, arguments, "--packed-weights", folder / "packed"
    )
    engines |= {name: partial(run_peer, peer, arguments) for name, peer in peers.items()}
    if shape in FLOAT32_SHAPES:
        engines["transformers fp32"] = partial(run_transformers, folder / "checkpoint", arguments)
    blob = bundle / "embeddings.safetensors"
    weights = {name: _weight_bytes(path) for name, path in bundles.items()}
    result: dict[str, Any] = {
        "shape": shape,
        "machine": describe(folder, arguments.threads),
        "arguments": {k: v for k, v in vars(arguments).items() if k not in ("out", "shape")},
        "weight_bytes_per_token": weights,
        "blob_in_page_cache_before": cached_share(blob),
        "rounds": {name: [] for name in engines},
        "memory_read_bytes_per_second": [],
        "steps": [],
    }
    with tqdm(total=arguments.rounds * len(engines), unit=" runs") as bar:
        for turn in range(arguments.rounds):
            # The machine is not alone: its bandwidth is measured beside what it bounds.
            result["memory_read_bytes_per_second"].append(memory_read(arguments.threads))
            result["steps"].append(run_steps(bundle, arguments))
            first = turn % len(engines)  # nobody always comes after the same one
            for name in [*engines, *engines][first : first + len(engines)]:
                result["rounds"][name].append(engines[name]())
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


def sections(result: dict[str, Any]) -> list[Section]:
    """The result as parts of a page."""
    rows = summary(result)
    engines, arguments = list(result["rounds"]), result["arguments"]
    speed = Section(
        f"{result['shape']}: speed and memory",
        f"Random weights. {arguments['rounds']} rounds, all engines one after the other in each, "
        f"{arguments['threads']} threads. Medians; below them the least and the largest round, and "
        "the ratio to llama.cpp's Q4_0. Decode is measured behind a prompt of the first length.",
        [Table(["", *engines], [[_label(row), *_cells(row, engines)] for row in rows])],
        [
            bars(row["engines"], _label(row))
            for row in rows
            if row["quantity"].startswith(("decode", "prefill"))
        ],
    )
    return [speed, _bound_section(result, rows), _steps_section(result)]


def _label(row: dict[str, Any]) -> str:
    return f"{row['quantity']}, {_unit(row['quantity'])[0]}"


def _cells(row: dict[str, Any], engines: list[str]) -> list[str]:
    cells = []
    for engine in engines:
        if engine not in row["engines"]:
            cells.append("")
            continue
        median, least, largest = (_number(row["quantity"], v) for v in row["engines"][engine])
        ratio = f"\nx {row['ratios'][engine]:.2f}" if row["ratios"] else ""
        cells.append(f"{median}\n{least} to {largest}{ratio}")
    return cells


def _bound_section(result: dict[str, Any], rows: list[dict[str, Any]]) -> Section:
    bandwidth = statistics.median(result["memory_read_bytes_per_second"])
    decode = next(row for row in rows if row["quantity"] == "decode")["engines"]
    cells = []
    for name, nbytes in result["weight_bytes_per_token"].items():
        bound = bandwidth / nbytes
        share = f"{decode[name][0] / bound:.0%}"
        cells.append([name, f"{nbytes / 1e9:.2f} GB", f"{bound:.1f} tokens/s", share])
    return Section(
        f"{result['shape']}: how near to the bound",
        "A decode step reads all dense weights once. At the memory bandwidth measured in the same "
        f"rounds, {bandwidth / 1e9:.1f} GB/s in the median, that allows:",
        [Table(["", "weights", "bound", "reached"], cells)],
    )


def _steps_section(result: dict[str, Any]) -> Section:
    before, after = (f"{result[f'blob_in_page_cache_{when}']:.0%}" for when in ("before", "after"))
    cells = []
    for i, steps in enumerate(result["steps"]):
        constant = steps["constant"]
        more = [
            f"{steps[k] * 1e3:.2f} ms, {steps[k] / constant - 1:+.2%}" for k in ("warm", "cold")
        ]
        cells.append([str(i + 1), f"{constant * 1e3:.2f} ms", *more])
    return Section(
        f"{result['shape']}: what the rows cost",
        "Decode steps of one process in turn: with constant rows, with rows whose pages are in "
        "memory, and with rows on the disk. The page cache held "
        f"{before} of the blob before all rounds, and {after} after.",
        [Table(["round", "constant", "warm", "cold"], cells)],
    )


def _unit(quantity: str) -> tuple[str, float, int]:
    """Unit of a quantity, what to divide by, and digits behind the point."""
    if quantity in ("anonymous", "file-backed"):
        return "MB", 1e6, 0
    if quantity.startswith(("load", "first token")):
        return "s", 1, 2
    return "tokens/s", 1, 1


def _number(quantity: str, value: float) -> str:
    _, divisor, digits = _unit(quantity)
    return f"{value / divisor:,.{digits}f}"


def _weight_bytes(bundle: Path) -> int:
    files = pleexport.Bundle(bundle).decoder.files
    return max((bundle / name).stat().st_size for name in files)


def _run(python: Path, *arguments: object) -> None:
    subprocess.run([python, *map(str, arguments)], check=True)


def _output(*arguments: object, python: Path | str = sys.executable) -> str:
    time.sleep(1)  # the threads of the last engine are gone
    command = [str(python), *map(str, arguments)]
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
    parser.add_argument("--quick", action="store_true", help="one round, few decode steps")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.rounds, arguments.decode_tokens = 1, 8
    folder = arguments.out or Path("build/benchmarks") / arguments.shape
    result = measure(arguments.shape, folder, arguments)
    (folder / "compare.json").write_text(json.dumps(result, indent=2))
    page = folder / "compare.html"
    write_page(page, arguments.shape, [*sections(result), machine_section(result["machine"])])
    for row in summary(result):
        cells = (f"{n} {_number(row['quantity'], v[0])}" for n, v in row["engines"].items())
        print(f"{_label(row)}: {'; '.join(cells)}")
    print(f"written: {page}")


if __name__ == "__main__":
    main()
