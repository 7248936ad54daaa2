"""Time lookups alone: rows per second, warm and cold, against other ways to look rows up.

    python benchmarks/lookups.py gemma4-small

The checkpoint, and blobs of every dtype beside it, are made once. A lookup gives float32 vectors of
all layers of random token ids. Cold means that the file was dropped from the page cache before each
batch. The others look up the per-layer table alone, held in memory as float32 (`numpy.take`,
`torch.nn.Embedding`, a graph with one `Gather`) or read from the int8 blob as bytes, without
decoding them (`pread`).
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
from machine import describe
from make_checkpoint import made_checkpoint
from matplotlib.figure import Figure
from numpy.typing import NDArray
from page import Section, Table, machine_section, svg, write_page
from shapes import SHAPES

from pleexport import families
from pleexport.checkpoint.checkpoint import Checkpoint
from pleexport.checkpoint.matching import MatchedModel
from pleexport.dtypes import TABLE_DTYPES
from pleexport.export.blob_writer import write_blob
from pleexport.export.segments import plan_segments
from pleexport.runtime.blob import Blob
from pleexport.runtime.blob_layout import VERSION

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


def open_blobs(matched: MatchedModel, folder: Path) -> dict[str, Blob]:
    """A blob for each dtype, written if it is not there."""
    blobs = {}
    for dtype in TABLE_DTYPES:
        path = folder / f"lookups-{dtype}-v{VERSION}.safetensors"
        if not path.exists():
            segments = plan_segments(matched.model.tables, dtype, matched.dtype)
            write_blob(matched, path, segments=segments, page_size=16_384)
        blobs[dtype] = Blob(path)
    return blobs


def gather_session(values: NDArray[np.float32], folder: Path) -> ort.InferenceSession:
    """A graph with the table as external data and one Gather."""
    helper, kinds = onnx.helper, onnx.TensorProto
    values.tofile(folder / "lookups-gather.bin")
    tensor = onnx.TensorProto(
        name="table", data_type=kinds.FLOAT, dims=values.shape, data_location=kinds.EXTERNAL
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
    matched = MatchedModel(families.resolve(checkpoint), checkpoint)
    blobs = open_blobs(matched, folder)
    per_layer = next(t for t in matched.model.tables if t.layers is not None)
    in_memory = matched.rows(per_layer, slice(None)).astype(np.float32)
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
            ids = generator.integers(0, per_layer.rows, (repeat, batch))
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


def table(records: list[dict[str, Any]]) -> Table:
    """Rows per second, one line for each way."""
    cells = {(r["way"], r["state"], r["batch"]): r["rows"] for r in records}
    columns = [(state, batch) for state in ("warm", "cold") for batch in BATCHES]
    lines = []
    for way in dict.fromkeys(r["way"] for r in records):
        values = [cells.get((way, *column)) for column in columns]
        lines.append([way, *(f"{value:,.0f}" if value else "" for value in values)])
    return Table(["rows per second", *(f"{state} {batch}" for state, batch in columns)], lines)


def sections(result: dict[str, Any]) -> list[Section]:
    """The result as parts of a page."""
    records = result["lookups"]
    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    for axes, state in zip(figure.subplots(1, 2, sharey=True), ("warm", "cold"), strict=True):
        for way in dict.fromkeys(r["way"] for r in records if r["state"] == state):
            own = [r for r in records if (r["way"], r["state"]) == (way, state)]
            axes.loglog([r["batch"] for r in own], [r["rows"] for r in own], "o-", label=way)
        axes.set_title(state)
        axes.set_xlabel("rows in a batch")
        axes.set_xticks(BATCHES, map(str, BATCHES))
        axes.legend(fontsize="x-small")
        if state == "warm":
            axes.set_ylabel("rows per second")
    return [
        Section(
            f"{result['shape']}: lookups alone",
            "Float32 vectors of all layers, of random tokens; cold means that the file was dropped "
            "from the page cache before each batch. `pread` reads the bytes of the int8 blob and "
            "decodes nothing; the others hold the table in memory as float32.",
            [table(records)],
            [svg(figure)],
        )
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--out", type=Path, help="folder; build/benchmarks/SHAPE by default")
    parser.add_argument("--repeat", type=int, default=200)
    parser.add_argument("--quick", action="store_true", help="few repetitions")
    arguments = parser.parse_args()
    folder: Path = arguments.out or Path("build/benchmarks") / arguments.shape
    made_checkpoint(arguments.shape, folder)
    result = {
        "shape": arguments.shape,
        "machine": describe(folder, threads=1),
        "lookups": measure(folder, 20 if arguments.quick else arguments.repeat),
    }
    (folder / "lookups.json").write_text(json.dumps(result, indent=2))
    page, cells = folder / "lookups.html", table(result["lookups"])
    write_page(page, "Lookups", [*sections(result), machine_section(result["machine"])])
    for line in (cells.header, ["---"] * len(cells.header), *cells.rows):
        print(f"| {' | '.join(line)} |")
    print(f"\nwritten: {page}")


if __name__ == "__main__":
    main()
