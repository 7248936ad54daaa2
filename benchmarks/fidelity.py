"""Measure what rounding costs: KL divergence and perplexity of the samples on held-out text.

    python benchmarks/fidelity.py              # all samples, all formats; half an hour
    python benchmarks/fidelity.py CHECKPOINT   # a model of yours, of the samples' tokenizer

Each format is built, and compared with the PyTorch original on the same 4,096 tokens: with the
original's weights and the bundle's tables, the other way round, and with both from the bundle.
Calibration reads the end of the held-out text, which is not measured on. For Gemma 4, llama.cpp's
Q4_0 is measured too: the original with every matrix rounded by the package `gguf`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gguf
import msgspec
import torch
from page import Section, Table
from safetensors.torch import load_file, save_file
from tqdm import tqdm

import pleexport
from pleexport.errors import PleexportError

SAMPLES = Path(__file__).parents[1] / "samples"
_INT4 = {"weight_dtype": "int4", "table_dtype": "int8"}
FORMATS: dict[str, dict[str, Any]] = {
    "fp16 weights, fp16 tables": {"weight_dtype": "fp16", "table_dtype": "fp16"},
    "int8 weights, int8 tables": {"weight_dtype": "int8", "table_dtype": "int8"},
    "int4 (android)": _INT4,
    "int4, blocks of up to 32": _INT4 | {"block_size": 32},
    "int4, blocks of up to 64": _INT4 | {"block_size": 64},
    "int4, blocks of up to 128": _INT4 | {"block_size": 128},
    "int4, asymmetric": _INT4 | {"symmetric": False},
    "int4, calibrated": _INT4 | {"calibrate": "calibration.txt"},
    "int4, head too": _INT4 | {"head_dtype": "int4"},
    "int4 weights, int4 tables": {"weight_dtype": "int4", "table_dtype": "int4"},
}
# Of a checkpoint that is quantized: as it is, and rounded a second time.
QUANTIZED_FORMATS: dict[str, dict[str, Any]] = {
    "its own codes (android)": {"weight_dtype": "source", "table_dtype": "source"},
    "int8 weights, int8 tables": FORMATS["int8 weights, int8 tables"],
    "int4 weights, int8 tables": _INT4,
}
LLAMACPP = "llama.cpp's Q4_0, head Q8_0"


def formats(checkpoint: Path) -> dict[str, dict[str, Any]]:
    """The formats that a checkpoint is measured in, and their options."""
    config = checkpoint / "config.json"
    if config.is_file() and "quantization_config" in json.loads(config.read_text()):
        return QUANTIZED_FORMATS
    in_one_file = (checkpoint / "model.safetensors").is_file() and config.is_file()
    known = in_one_file and json.loads(config.read_text())["model_type"].startswith("gemma4")
    return FORMATS | ({LLAMACPP: {}} if known else {})


def rounded_by_llamacpp(checkpoint: Path, folder: Path) -> Path:
    """A Gemma 4 with every matrix rounded to Q4_0 and back, and its head to Q8_0.

    The projection of all layers' vectors stays as it is, as in the files of `llama-quantize`; that
    gives the head 6 bits, and Q8_0 is kinder. The embedding table stays too: heads are compared.
    """

    def q4_0(_: str, matrix: torch.Tensor) -> torch.Tensor:
        return _rounded(matrix, gguf.GGMLQuantizationType.Q4_0)

    return rounded_checkpoint(checkpoint, folder, q4_0)


def rounded_checkpoint(
    checkpoint: Path, folder: Path, rounded: Callable[[str, torch.Tensor], torch.Tensor]
) -> Path:
    """A Gemma 4 whose matrices of blocks of 32 are rounded and widened, its head by Q8_0."""
    out = folder / "rounded"
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(checkpoint, out)
    tensors = load_file(checkpoint / "model.safetensors")
    found = {n: rounded(n, t) if is_rounded(n, t.shape) else t for n, t in tensors.items()}
    head = tensors["model.embed_tokens.weight"]
    found["lm_head.weight"] = _rounded(head, gguf.GGMLQuantizationType.Q8_0)
    save_file(found, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((out / "config.json").read_text()) | {"tie_word_embeddings": False}
    (out / "config.json").write_text(json.dumps(config))
    return out


def is_rounded(name: str, shape: Sequence[int]) -> bool:
    """Whether `llama-quantize` rounds a tensor of a Gemma 4; tables and the head go apart."""
    left = "embed_tokens" in name or "per_layer_model_projection" in name
    return len(shape) == 2 and shape[1] % 32 == 0 and not left


def _rounded(tensor: torch.Tensor, qtype: gguf.GGMLQuantizationType) -> torch.Tensor:
    stored = gguf.quants.quantize(tensor.float().numpy(), qtype)
    return torch.from_numpy(gguf.quants.dequantize(stored, qtype)).to(tensor.dtype)


def measure(checkpoint: Path, name: str, folder: Path) -> dict[str, Any]:
    """Sizes in bytes, and the fidelity section of the parity report."""
    source, options = checkpoint, formats(checkpoint)[name]
    if name == LLAMACPP:
        source = rounded_by_llamacpp(checkpoint, folder)
        options = {"weight_dtype": "fp32", "table_dtype": "int8"}
    if "calibrate" in options:
        options = options | {"calibrate": calibration_text(folder / options["calibrate"])}
    found = measure_bundle(source, checkpoint, options, folder / "bundle")
    return found | ({"weights_bytes": None} if name == LLAMACPP else {})


def calibration_text(path: Path) -> Path:
    """The end of the held-out text, which is not measured on, in a file."""
    text = (SAMPLES / "heldout.txt").read_text(encoding="utf-8")
    path.write_text(text[len(text) // 2 :], encoding="utf-8")
    return path


def measure_bundle(
    source: Path, checkpoint: Path, options: dict[str, Any], out: Path
) -> dict[str, Any]:
    """Build a bundle of `source`, and compare it with the original `checkpoint`."""
    bundle = pleexport.build(source, out, overwrite=True, verify=False, **options)
    report = pleexport.verify(bundle, checkpoint=checkpoint, text=SAMPLES / "heldout.txt")
    assert report is not None
    sizes = {record.name: record.size for record in bundle.manifest.files}
    data = sum(size for name, size in sizes.items() if name.startswith("model.onnx.data"))
    weights = data + sizes.get("tied.safetensors", 0)
    return {
        "weights_bytes": weights,
        "blob_bytes": sizes["embeddings.safetensors"],
        "bundle_bytes": bundle.nbytes,
        "original_perplexity": report.original_perplexity,
        "tokens": report.fidelity_tokens,
        "fidelity": {entry.what: msgspec.to_builtins(entry) for entry in report.fidelity},
    }


def table(name: str, results: dict[str, dict[str, Any]]) -> Table:
    """The table of one checkpoint."""
    first = next(iter(results.values()))
    header = [
        f"{name}, perplexity of the original {first['original_perplexity']:.2f}",
        "weights", "blob", "KL tables", "KL weights", "KL both", "perplexity", "same best",
    ]  # fmt: skip
    rows = []
    for label, result in results.items():
        tables, dense, both = (result["fidelity"][what] for what in ("tables", "dense", "both"))
        rows.append(
            [
                label,
                f"{result['weights_bytes'] / 1e6:.2f} MB" if result["weights_bytes"] else "",
                f"{result['blob_bytes'] / 1e6:.2f} MB",
                f"{tables['kl']:.1e}",
                f"{dense['kl']:.1e}",
                f"{both['kl']:.1e}",
                f"{both['perplexity']:.2f}",
                f"{both['top1_agreement']:.1%}",
            ]
        )
    return Table(header, rows)


def sections(result: dict[str, Any]) -> list[Section]:
    """The result as parts of a page."""
    text = (
        "KL divergence from the original in nats per token on held-out text, with the tables, the "
        "weights, and both as the bundle stores them; perplexity, and how often the best token is "
        "the same, with both."
    )
    tables = [table(name, own) for name, own in result["checkpoints"].items()]
    return [Section("What rounding costs", text, tables)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("checkpoints", nargs="*", type=Path, help="the samples by default")
    parser.add_argument("--out", type=Path, default=Path("build/benchmarks/fidelity"))
    parser.add_argument("--quick", action="store_true", help="one checkpoint, two formats")
    arguments = parser.parse_args()
    samples = [SAMPLES / "gemma4-kjv"] if arguments.quick else sorted(SAMPLES.glob("*-kjv"))
    checkpoints = arguments.checkpoints or samples
    work = [(checkpoint, name) for checkpoint in checkpoints for name in formats(checkpoint)]
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for checkpoint, name in tqdm(work[:2] if arguments.quick else work, unit=" formats"):
            try:
                measured = measure(checkpoint, name, Path(folder))
            except PleexportError as err:
                raise SystemExit(f"error: {err.message}") from None
            found.setdefault(checkpoint.name, {})[name] = measured
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "fidelity.json").write_text(json.dumps({"checkpoints": found}, indent=2))
    for cells in sections({"checkpoints": found})[0].tables:
        for line in (cells.header, ["---"] * len(cells.header), *cells.rows):
            print(f"| {' | '.join(line)} |")
        print()


if __name__ == "__main__":
    main()
