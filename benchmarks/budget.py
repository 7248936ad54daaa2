"""Measure what a budget of bytes costs: KL divergence of the samples, against other choices.

    python benchmarks/budget.py              # gemma4-kjv and gemma3n-kjv; ten minutes on two cores
    python benchmarks/budget.py CHECKPOINT   # a model of yours, of the samples' tokenizer

Bundles are built with `--max-bytes` and compared with the PyTorch original on the same 4,096 tokens
of held-out text as in `fidelity.py`; with `--calibrate`, dtypes are chosen and weights rounded by
the end of that text, which is not measured on. Beside them stand the same dtype for everything,
what a target would take by itself, and for Gemma 4 two mixtures of llama.cpp: Q4_0 as
`fidelity.py` has it, and one like Q4_K_M.

That mixture is an approximation. The package `gguf` does not write its formats, so matrices are
rounded to 4 bits in blocks of 32 with a zero point each, scales searched as ours are, and the value
and down matrices of every second layer to 6 bits in blocks of 16. Its scales and zero points are
not rounded, which is kinder than Q4_K_M. Bytes are those of llama.cpp's formats.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fidelity import (
    SAMPLES,
    calibration_text,
    is_rounded,
    measure_bundle,
    rounded_by_llamacpp,
    rounded_checkpoint,
)
from matplotlib.figure import Figure
from numpy.typing import NDArray
from page import Section, Table, svg
from safetensors.torch import load_file
from tqdm import tqdm

from pleexport.errors import PleexportError

UNIFORM: dict[str, dict[str, Any]] = {
    "int8 everywhere": {"weight_dtype": "int8", "table_dtype": "int8"},
    "int4, head and tables int8 (android)": {"weight_dtype": "int4", "table_dtype": "int8"},
    "int4 everywhere": {"weight_dtype": "int4", "head_dtype": "int4", "table_dtype": "int4"},
}
# Of the bundle in int8.
SHARES = (0.69, 0.74, 0.82, 0.91)
BUDGET, BUDGET_TEXT = "--max-bytes", "--max-bytes and --calibrate"
Q4_0, Q4_K_M = "llama.cpp's Q4_0, head Q8_0, int8 tables", "like Q4_K_M, head Q8_0, int8 tables"
_LLAMACPP_BITS = {Q4_0: (4.5, 4.5), Q4_K_M: (4.5, 6.5625)}
_HEAD_BITS, _PLAIN_BITS = 8.5, 32


def like_q4_k_m(name: str, matrix: torch.Tensor) -> torch.Tensor:
    """A matrix rounded about as Q4_K_M does, and back."""
    bits, block = (6, 16) if has_6_bits(name) else (4, 32)
    values = matrix.float().numpy()
    blocks = values.reshape(len(values), -1, block)
    if bits == 6:
        widest = np.abs(blocks).max(-1, keepdims=True) / 32
        rounded = _searched(blocks, widest, np.zeros_like(widest), -32, 31)
    else:
        low = np.minimum(blocks.min(-1, keepdims=True), 0)
        widest = (np.maximum(blocks.max(-1, keepdims=True), 0) - low) / 15
        rounded = _searched(blocks, widest, low, 0, 15)
    return torch.from_numpy(rounded.reshape(values.shape)).to(matrix.dtype)


def has_6_bits(name: str) -> bool:
    """Whether Q4_K_M's mixture gives a matrix more: half of those that it finds to matter."""
    layer = re.search(r"layers\.(\d+)\.", name)
    kind = "v_proj" in name or "down_proj" in name
    return layer is not None and kind and int(layer[1]) % 2 == 0


def _searched(
    blocks: NDArray[np.float32],
    widest: NDArray[np.float32],
    low: NDArray[np.float32],
    first: int,
    last: int,
) -> NDArray[np.float32]:
    """Values of the scale with the least squared error, of five shares of the widest."""
    best = np.zeros_like(blocks)
    least = np.full(widest.shape, np.inf, dtype=np.float32)
    for share in (1.0, 0.93, 0.86, 0.79, 0.72):
        scale, offset = np.maximum(widest * share, 1e-12), low * share
        codes = np.clip(np.rint((blocks - offset) / scale), first, last)
        values = (codes * scale + offset).astype(np.float32)
        error = ((values - blocks) ** 2).sum(-1, keepdims=True)
        best = np.where(error < least, values, best)
        least = np.minimum(error, least)
    return best


def llamacpp_bytes(checkpoint: Path, name: str) -> int:
    """Bytes of the weights in llama.cpp's formats; what it does not round is float32."""
    bits, more_bits = _LLAMACPP_BITS[name]
    total = 0.0
    for key, tensor in load_file(checkpoint / "model.safetensors").items():
        own = more_bits if has_6_bits(key) else bits
        if "embed_tokens_per_layer" in key:
            continue
        if "embed_tokens" in key:
            own = _HEAD_BITS
        elif not is_rounded(key, tensor.shape):
            own = _PLAIN_BITS
        total += tensor.numel() * own / 8
    return round(total)


def measured(checkpoint: Path, folder: Path, update: Callable[[], object]) -> list[dict[str, Any]]:
    """All points of one checkpoint: what it is, budget, bytes of weights and rows, KL."""
    text = calibration_text(folder / "calibration.txt")
    points = []

    def measure(what: str, source: Path, options: dict[str, Any]) -> dict[str, Any]:
        found = measure_bundle(source, checkpoint, options, folder / "bundle")
        both = found["fidelity"]["both"]
        point = {
            "what": what,
            "max_bytes": options.get("max_bytes"),
            "bundle_bytes": found["bundle_bytes"],
            "large_bytes": found["weights_bytes"] + found["blob_bytes"],
            "kl": both["kl"],
        }
        points.append(point)
        update()
        return found

    whole = measure("int8 everywhere", checkpoint, UNIFORM["int8 everywhere"])["bundle_bytes"]
    for what, options in list(UNIFORM.items())[1:]:
        measure(what, checkpoint, options)
    for share in SHARES:
        budget = {"target": "android", "max_bytes": round(share * whole)}
        measure(BUDGET, checkpoint, budget)
        measure(BUDGET_TEXT, checkpoint, budget | {"calibrate": text})
    if _is_gemma4(checkpoint):
        for what in (Q4_0, Q4_K_M):
            if what == Q4_0:
                source = rounded_by_llamacpp(checkpoint, folder)
            else:
                source = rounded_checkpoint(checkpoint, folder, like_q4_k_m)
            plain = {"weight_dtype": "fp32", "table_dtype": "int8"}
            blob = measure(what, source, plain)["blob_bytes"]
            points[-1]["bundle_bytes"] = None
            points[-1]["large_bytes"] = blob + llamacpp_bytes(checkpoint, what)
    return points


def count(checkpoint: Path) -> int:
    """How many points a checkpoint has."""
    return len(UNIFORM) + 2 * len(SHARES) + (2 if _is_gemma4(checkpoint) else 0)


def _is_gemma4(checkpoint: Path) -> bool:
    config = checkpoint / "config.json"
    if not config.exists():  # RWKV has none
        return False
    known: bool = json.loads(config.read_text())["model_type"].startswith("gemma4")
    return known


def table(name: str, points: list[dict[str, Any]]) -> Table:
    """The table of one checkpoint, the smallest first."""
    header = [name, "weights and rows", "bundle", "KL"]
    rows = [
        [
            point["what"],
            f"{point['large_bytes'] / 1e6:.2f} MB",
            f"{point['bundle_bytes'] / 1e6:.2f} MB" if point["bundle_bytes"] else "",
            f"{point['kl']:.1e}",
        ]
        for point in sorted(points, key=lambda point: point["large_bytes"])
    ]
    return Table(header, rows)


def plot(name: str, points: list[dict[str, Any]]) -> Figure:
    """Bytes against KL, a curve for each way to spend a budget."""
    figure = Figure(figsize=(7.5, 4), layout="constrained")
    axes = figure.subplots()
    for what in dict.fromkeys(point["what"] for point in points):
        own = sorted((p["large_bytes"] / 1e6, p["kl"]) for p in points if p["what"] == what)
        line = "-" if what in (BUDGET, BUDGET_TEXT) else ""
        axes.plot(*zip(*own, strict=True), marker="o", linestyle=line, label=what)
    axes.set_yscale("log")
    axes.set_xlabel(f"{name}: weights and rows, MB")
    axes.set_ylabel("KL divergence, nats per token")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    return figure


def sections(result: dict[str, Any]) -> list[Section]:
    """The result as parts of a page."""
    text = (
        "KL divergence from the original in nats per token on held-out text, by the bytes of "
        "weights and rows: dtypes chosen for a budget, and chosen otherwise."
    )
    found = result["checkpoints"].items()
    tables = [table(name, points) for name, points in found]
    return [Section("Bytes as a budget", text, tables, [svg(plot(*own)) for own in found])]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("checkpoints", nargs="*", type=Path, help="two samples by default")
    parser.add_argument("--out", type=Path, default=Path("build/benchmarks/budget"))
    parser.add_argument("--plot", type=Path, help="write a plot of the first one here too")
    arguments = parser.parse_args()
    samples = [SAMPLES / "gemma4-kjv", SAMPLES / "gemma3n-kjv"]
    checkpoints = arguments.checkpoints or samples
    found = {}
    arguments.out.mkdir(parents=True, exist_ok=True)
    with tqdm(total=sum(map(count, checkpoints)), unit=" bundles") as bar:
        for checkpoint in checkpoints:
            with tempfile.TemporaryDirectory() as folder:
                try:
                    found[checkpoint.name] = measured(checkpoint, Path(folder), bar.update)
                except PleexportError as err:
                    raise SystemExit(f"error: {err.message}") from None
            (arguments.out / "budget.json").write_text(json.dumps({"checkpoints": found}, indent=2))
    if arguments.plot:
        plot(*next(iter(found.items()))).savefig(arguments.plot)
    for cells in sections({"checkpoints": found})[0].tables:
        for line in (cells.header, ["---"] * len(cells.header), *cells.rows):
            print(f"| {' | '.join(line)} |")
        print()


if __name__ == "__main__":
    main()
