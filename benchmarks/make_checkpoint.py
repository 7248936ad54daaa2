"""Write a checkpoint of a published shape with random weights: sharded bf16 safetensors.

    python benchmarks/make_checkpoint.py gemma4-e2b build/checkpoints/gemma4-e2b

It is written in a stream, a few million values at a time, with the key prefix of the published
checkpoints; vision and audio towers are not there. RWKV goes without a config, as published.
"""

from __future__ import annotations

import argparse
import json
import math
import queue
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from shapes import SHAPES, TENSORS
from tqdm import tqdm

from pleexport import families

SHARD_BYTES = 4_000_000_000
BATCH_VALUES = 8 << 20


def tensor_shapes(config: dict[str, object]) -> dict[str, tuple[int, ...]]:
    """Every tensor of the text model by name, those of sharing layers included, as published."""
    model = families.from_config(config, dtype="bf16")
    shapes = {k: shape for table in model.tables for k, shape in table.sources.items()}
    shapes |= {w.source_key: w.source_shape for w in model.weights if w.constant is None}
    shapes |= {key: unused.shape for key, unused in model.unused.items() if key != "lm_head.weight"}
    return {next(iter(model.text_prefixes)) + key: shape for key, shape in shapes.items()}


def shards(shapes: dict[str, tuple[int, ...]]) -> list[list[str]]:
    """Tensor names, grouped into files of about `SHARD_BYTES`; a large tensor is not cut."""
    result: list[list[str]] = [[]]
    filled = 0
    for name, shape in shapes.items():
        nbytes = 2 * math.prod(shape)
        if result[-1] and filled + nbytes > SHARD_BYTES:
            result.append([])
            filled = 0
        result[-1].append(name)
        filled += nbytes
    return result


def values(name: str, shape: tuple[int, ...]) -> Iterator[NDArray[np.generic]]:
    """Random bf16 values of one tensor, in parts; the same for the same name."""
    generator = np.random.default_rng(zlib.crc32(name.encode()))
    if max(shape) == math.prod(shape):
        centre, spread = 1.0, 0.05
    elif "embed_tokens_per_layer" in name:
        centre, spread = 0.0, 1 / 16
    else:
        centre, spread = 0.0, shape[1] ** -0.5
    count = math.prod(shape)
    for begin in range(0, count, BATCH_VALUES):
        part = generator.standard_normal(min(BATCH_VALUES, count - begin), dtype=np.float32)
        part *= np.float32(spread)
        part += np.float32(centre)
        yield part.astype(ml_dtypes.bfloat16)


def write_checkpoint(shape: str, out: Path) -> None:
    """Write config, if the family has one, shards and index."""
    out.mkdir(parents=True, exist_ok=True)
    shapes = TENSORS[shape] if shape in TENSORS else tensor_shapes(SHAPES[shape])
    files = shards(shapes)
    total = sum(2 * math.prod(shape) for shape in shapes.values())
    weight_map = {}
    with tqdm(total=total, unit="B", unit_scale=True, desc=out.name) as bar:
        for i, names in enumerate(files):
            path = out / f"model-{i + 1:05}-of-{len(files):05}.safetensors"
            weight_map |= dict.fromkeys(names, path.name)
            _write_shard(path, {name: shapes[name] for name in names}, bar)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    if shape in SHAPES:
        (out / "config.json").write_text(json.dumps(SHAPES[shape], indent=2))


def made_checkpoint(shape: str, folder: Path) -> Path:
    """`folder/checkpoint`, written if it is not there."""
    checkpoint = folder / "checkpoint"
    if not (checkpoint / "config.json").exists():  # it is written last
        write_checkpoint(shape, checkpoint)
    return checkpoint


def _write_shard(path: Path, shapes: dict[str, tuple[int, ...]], bar: tqdm) -> None:
    header, position = {}, 0
    for name, shape in shapes.items():
        end = position + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [position, end]}
        position = end
    raw = json.dumps(header).encode()
    parts: queue.Queue[NDArray[np.generic] | None] = queue.Queue(maxsize=2)

    def produce() -> None:  # random numbers are made while the last ones are written
        for name, shape in shapes.items():
            for part in values(name, shape):
                parts.put(part)
        parts.put(None)

    threading.Thread(target=produce, daemon=True).start()
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        while (part := parts.get()) is not None:
            file.write(part.view(np.uint8).data)
            bar.update(part.nbytes)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("shape", choices=[*SHAPES, *TENSORS])
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    write_checkpoint(arguments.shape, arguments.out)


if __name__ == "__main__":
    main()
