"""Measure what rounding costs: KL divergence and perplexity of the samples on held-out text.

    python benchmarks/fidelity.py            # all samples, all formats, as Markdown
    python benchmarks/fidelity.py --json

Each format is built, and compared with the PyTorch original on the same 4,096 tokens: with the
original's weights and the bundle's tables, the other way round, and with both from the bundle.
Calibration reads the end of the held-out text, which is not measured on.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import msgspec
from tqdm import tqdm

import pleexport

SAMPLES = Path(__file__).parents[1] / "samples"
FORMATS: dict[str, dict[str, Any]] = {
    "fp16 weights, fp16 tables": {"weight_dtype": "fp16", "table_dtype": "fp16"},
    "int8 weights, int8 tables": {"weight_dtype": "int8", "table_dtype": "int8"},
    "int4, blocks of 32": {"weight_dtype": "int4", "table_dtype": "int8", "block_size": 32},
    "int4, blocks of 64 (android)": {"weight_dtype": "int4", "table_dtype": "int8"},
    "int4, blocks of 64, asymmetric": {
        "weight_dtype": "int4",
        "table_dtype": "int8",
        "symmetric": False,
    },
    "int4, blocks of 64, calibrated": {
        "weight_dtype": "int4",
        "table_dtype": "int8",
        "calibrate": "calibration.txt",
    },
    "int4, blocks of 128": {"weight_dtype": "int4", "table_dtype": "int8", "block_size": 128},
    "int4, head too": {"weight_dtype": "int4", "table_dtype": "int8", "head_dtype": "int4"},
    "int4 weights, int4 tables": {"weight_dtype": "int4", "table_dtype": "int4"},
}


def measure(sample: Path, options: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Sizes in bytes, and the fidelity section of the parity report."""
    if "calibrate" in options:
        text = (SAMPLES / "heldout.txt").read_text(encoding="utf-8")
        calibration = folder / options["calibrate"]
        calibration.write_text(text[len(text) // 2 :], encoding="utf-8")
        options = options | {"calibrate": calibration}
    bundle = pleexport.build(sample, folder / "bundle", overwrite=True, verify=False, **options)
    report = pleexport.verify(bundle, checkpoint=sample, text=SAMPLES / "heldout.txt")
    assert report is not None
    sizes = {record.name: record.size for record in bundle.manifest.files}
    return {
        "weights_bytes": sizes["model.onnx.data"],
        "blob_bytes": sizes["embeddings.safetensors"],
        "original_perplexity": report.original_perplexity,
        "tokens": report.fidelity_tokens,
        "fidelity": {entry.what: msgspec.to_builtins(entry) for entry in report.fidelity},
    }


def markdown(sample: str, results: dict[str, dict[str, Any]]) -> str:
    """One table for a sample."""
    first = next(iter(results.values()))
    lines = [
        f"{sample}, {first['tokens']:,} tokens, perplexity of the original "
        f"{first['original_perplexity']:.2f}",
        "",
        "| format | weights | blob | KL tables | KL weights | KL both | perplexity | same best |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, result in results.items():
        tables, dense, both = (result["fidelity"][what] for what in ("tables", "dense", "both"))
        lines.append(
            f"| {name} | {result['weights_bytes'] / 1e6:.2f} MB "
            f"| {result['blob_bytes'] / 1e6:.2f} MB | {tables['kl']:.1e} | {dense['kl']:.1e} "
            f"| {both['kl']:.1e} | {both['perplexity']:.2f} | {both['top1_agreement']:.1%} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of Markdown")
    arguments = parser.parse_args()
    samples = sorted(SAMPLES.glob("*-kjv"))
    results: dict[str, dict[str, Any]] = {}
    with (
        tempfile.TemporaryDirectory() as folder,
        tqdm(total=len(samples) * len(FORMATS), unit=" formats") as bar,
    ):
        for sample in samples:
            for name, options in FORMATS.items():
                result = measure(sample, options, Path(folder))
                results.setdefault(sample.name, {})[name] = result
                bar.update()
    if arguments.json:
        print(json.dumps(results, indent=2))
    else:
        print("\n\n".join(markdown(name, own) for name, own in results.items()))


if __name__ == "__main__":
    main()
