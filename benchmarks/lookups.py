"""Time lookups alone: rows per second, warm and cold, against other ways to look rows up.

    python benchmarks/lookups.py build/benchmarks/gemma4-small

The folder holds `checkpoint`, as `compare.py` makes it. Blobs of every dtype are written beside it.
A lookup gives float32 vectors of all layers of random token ids. Cold means that the file was
dropped from the page cache before each batch. The others look up the per-layer table alone, held
in memory as float32 (`numpy.take`, `torch.nn.Embedding`, a graph with one `Gather`) or read from
the int8 blob as bytes, without decoding them (`pread`).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from numpy.typing import NDArray

from pleexport import families
from pleexport.binding import Binding
from pleexport.blob import Blob, write_blob
from pleexport.blob.layout import TABLE_DTYPES
from pleexport.checkpoint import Checkpoint

BATCHES = (1, 16, 512)
Lookup = Callable[[NDArray[np.int64]], object]


def rate(lookup: Lookup, ids: NDArray[np.int64], *, before: Callable[[], None] | None) -> float:
    """Rows per second: the median of the batches that `ids` `[repetitions, batch]` hold."""
    seconds = []
    for batch in ids:
        if before:
            before()
        started = time.perf_counter()
        lookup(batch)
        seconds.append(time.perf_counter() - started)
    return ids.shape[1] / statistics.median(seconds)


def open_blobs(binding: Binding, folder: Path) -> dict[str, Blob]:
    """A blob for each dtype, written if it is not there."""
    blobs = {}
    for dtype in TABLE_DTYPES:
        path = folder / f"lookups-{dtype}.safetensors"
        if not path.exists():
            write_blob(binding, path, table_dtype=dtype, page_size=16_384)
        blobs[dtype] = Blob(path)
    return blobs


def gather_session(table: NDArray[np.float32], folder: Path) -> ort.InferenceSession:
    """A graph with the table as external data and one Gather."""
    helper, kinds = onnx.helper, onnx.TensorProto
    table.tofile(folder / "lookups-gather.bin")
    tensor = onnx.TensorProto(
        name="table", data_type=kinds.FLOAT, dims=table.shape, data_location=kinds.EXTERNAL
    )
    tensor.external_data.add(key="location", value="lookups-gather.bin")
    graph = helper.make_graph(
        [helper.make_node("Gather", ["table", "ids"], ["rows"])],
        "gather",
        [helper.make_tensor_value_info("ids", kinds.INT64, ["batch"])],
        [helper.make_tensor_value_info("rows", kinds.FLOAT, None)],
        [tensor],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    path = folder / "lookups-gather.onnx"
    path.write_bytes(model.SerializeToString())
    return ort.InferenceSession(path, providers=["CPUExecutionProvider"])


def measure(folder: Path, repeat: int) -> list[dict[str, Any]]:
    """One record for each way, state and batch."""
    checkpoint = Checkpoint(folder / "checkpoint")
    binding = Binding(families.resolve(checkpoint), checkpoint)
    blobs = open_blobs(binding, folder)
    table = next(t for t in binding.model.tables if t.layers is not None)
    in_memory = binding.rows(table, slice(None)).astype(np.float32)
    embedding = torch.nn.Embedding.from_pretrained(torch.from_numpy(in_memory))
    session = gather_session(in_memory, folder)
    descriptor = os.open(blobs["int8"].path, os.O_RDONLY)

    def from_blob(blob: Blob) -> Lookup:
        def lookup(ids: NDArray[np.int64]) -> None:
            blob.prefetch(ids)
            blob.lookup(ids)

        return lookup

    def pread(ids: NDArray[np.int64]) -> None:
        stride, begin = blobs["int8"].row_stride, blobs["int8"].rows_offset
        for row in ids.tolist():
            os.pread(descriptor, stride, begin + row * stride)

    ways: dict[str, tuple[Lookup, Callable[[], None] | None]] = {
        f"blob {dtype}": (from_blob(blob), blob.forget_pages) for dtype, blob in blobs.items()
    }
    ways["pread"] = (pread, blobs["int8"].forget_pages)
    ways["numpy.take"] = (lambda ids: in_memory.take(ids, axis=0), None)
    ways["torch.nn.Embedding"] = (lambda ids: embedding(torch.from_numpy(ids)), None)
    ways["ONNX Runtime Gather"] = (lambda ids: session.run(None, {"ids": ids}), None)
    generator = np.random.default_rng(0)
    records = []
    for batch in BATCHES:
        for name, (lookup, forget) in ways.items():
            ids = generator.integers(0, table.rows, (repeat, batch))
            for row in ids:
                lookup(row)  # the pages are in the cache now
            records.append(
                {
                    "way": name,
                    "batch": batch,
                    "state": "warm",
                    "rows": rate(lookup, ids, before=None),
                }
            )
            if forget:
                cold = rate(lookup, ids[: max(5, repeat // 10)], before=forget)
                records.append({"way": name, "batch": batch, "state": "cold", "rows": cold})
    os.close(descriptor)
    return records


def markdown(records: list[dict[str, Any]]) -> str:
    """Rows per second, one line for each way."""
    cells = {(r["way"], r["state"], r["batch"]): r["rows"] for r in records}
    lines = [
        "| rows per second | " + " | ".join(f"{s} {b}" for s in ("warm", "cold") for b in BATCHES),
        "|---" * (1 + 2 * len(BATCHES)) + "|",
    ]
    lines[0] += " |"
    for way in dict.fromkeys(r["way"] for r in records):
        values = [cells.get((way, s, b)) for s in ("warm", "cold") for b in BATCHES]
        lines.append(f"| {way} | " + " | ".join(f"{v:,.0f}" if v else "" for v in values) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--repeat", type=int, default=200)
    parser.add_argument("--json", action="store_true", help="print JSON instead of Markdown")
    arguments = parser.parse_args()
    records = measure(arguments.folder, arguments.repeat)
    print(json.dumps(records, indent=2) if arguments.json else markdown(records))


if __name__ == "__main__":
    main()
