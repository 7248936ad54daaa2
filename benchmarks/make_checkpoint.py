"""Write a checkpoint of a published shape with random weights: sharded safetensors.

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
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from shapes import SHAPES, TENSORS
from tqdm import tqdm

from pleexport import families
from pleexport.checkpoint.checkpoint import Checkpoint
from pleexport.dtypes import BY_SAFETENSORS, packed_bytes
from pleexport.model import Codes

INDEX = "model.safetensors.index.json"
SHARD_BYTES = 4_000_000_000
BATCH_VALUES = 8 << 20
# Beside each matrix of the mobile format, for what activations are rounded by.
_SCALES = ("input_activation_scale", "output_activation_scale")


@dataclass(frozen=True)
class Tensor:
    """One tensor of a checkpoint; dtypes by their names in safetensors."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * _NUMPY[self.dtype].itemsize


_NUMPY = {
    row.safetensors: row.numpy for row in map(BY_SAFETENSORS.get, ("BF16", "F32", "U8", "I8"))
}


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the text model by name, those of sharing layers included, as published.

    Args:
        folder: holds the config.
    """
    checkpoint = Checkpoint(folder)
    model = families.resolve(checkpoint)
    found: dict[str, Tensor] = {}
    for table in model.tables:
        if table.codes:
            found |= _codes(table.codes, table.rows, table.row_width)
        else:
            found |= {key: Tensor("BF16", shape) for key, shape in table.sources.items()}
    for weight in model.weights:
        if weight.codes:
            found |= _codes(weight.codes, *weight.shape)
            module = weight.source_key.removesuffix("weight")
            found |= {module + name: Tensor("F32", ()) for name in _SCALES}
        elif weight.constant is None:
            found[weight.source_key] = Tensor("BF16", weight.source_shape)
    for key, unused in model.unused.items():
        if key != "lm_head.weight":
            found[key] = Tensor("F32" if key.endswith("_scale") else "BF16", unused.shape)
    prefix = next(iter(model.text_prefixes))
    return {key if key.startswith("lm_head.") else prefix + key: t for key, t in found.items()}


def _codes(how: Codes, rows: int, width: int) -> dict[str, Tensor]:
    """Codes and scales as the mobile format stores them."""
    codes, scales = how.keys
    packed = packed_bytes(width, how.dtype)
    return {
        codes: Tensor("I8" if how.dtype == "int8" else "U8", (rows, packed)),
        scales: Tensor("F32", (rows, width // how.group_size)),
    }


def shards(tensors: dict[str, Tensor]) -> list[list[str]]:
    """Tensor names, grouped into files of about `SHARD_BYTES`; a large tensor is not cut."""
    result: list[list[str]] = [[]]
    filled = 0
    for name, tensor in tensors.items():
        if result[-1] and filled + tensor.nbytes > SHARD_BYTES:
            result.append([])
            filled = 0
        result[-1].append(name)
        filled += tensor.nbytes
    return result


def values(name: str, tensor: Tensor) -> Iterator[NDArray[np.generic]]:
    """Random values of one tensor, in parts; the same for the same name."""
    generator = np.random.default_rng(zlib.crc32(name.encode()))
    count, dtype = math.prod(tensor.shape), _NUMPY[tensor.dtype]
    centre, spread = _distribution(name, tensor)
    for begin in range(0, count, BATCH_VALUES):
        part_count = min(BATCH_VALUES, count - begin)
        if dtype.kind in "iu":
            yield np.frombuffer(generator.bytes(part_count), dtype)
            continue
        part = generator.standard_normal(part_count, dtype=np.float32)
        part *= np.float32(spread)
        part += np.float32(centre)
        yield part.astype(dtype)


def _distribution(name: str, tensor: Tensor) -> tuple[float, float]:
    """Mean and deviation of a tensor's values, so that those of a layer stay about as large."""
    if name.endswith("activation_scale") or name.endswith("cache_scale"):
        return 0.03, 0.001
    if name.endswith("embed_tokens_per_layer.embedding_scale"):
        return 0.014, 0.001  # codes of 4 bits have a deviation of 4.6
    if name.endswith("_scale"):
        return 0.0056, 0.0005
    if max(tensor.shape, default=1) == math.prod(tensor.shape):
        return 1.0, 0.05
    return 0.0, 1 / 16 if "embed_tokens_per_layer" in name else tensor.shape[1] ** -0.5


def write_checkpoint(shape: str, out: Path) -> None:
    """Write config, if the family has one, shards and index."""
    out.mkdir(parents=True, exist_ok=True)
    if shape in SHAPES:
        (out / "config.json").write_text(json.dumps(SHAPES[shape], indent=2))
        tensors = tensors_of(out)
    else:
        tensors = {name: Tensor("BF16", size) for name, size in TENSORS[shape].items()}
    files = shards(tensors)
    total = sum(tensor.nbytes for tensor in tensors.values())
    weight_map = {}
    with tqdm(total=total, unit="B", unit_scale=True, desc=out.name) as bar:
        for i, names in enumerate(files):
            path = out / f"model-{i + 1:05}-of-{len(files):05}.safetensors"
            weight_map |= dict.fromkeys(names, path.name)
            _write_shard(path, {name: tensors[name] for name in names}, bar)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (out / INDEX).write_text(json.dumps(index))


def made_checkpoint(shape: str, folder: Path) -> Path:
    """`folder/checkpoint`, written if it is not there."""
    checkpoint = folder / "checkpoint"
    if not (checkpoint / INDEX).exists():  # it is written last
        write_checkpoint(shape, checkpoint)
    return checkpoint


def _write_shard(path: Path, tensors: dict[str, Tensor], bar: tqdm) -> None:
    header, position = {}, 0
    for name, tensor in tensors.items():
        end = position + tensor.nbytes
        header[name] = {
            "dtype": tensor.dtype,
            "shape": tensor.shape,
            "data_offsets": [position, end],
        }
        position = end
    raw = json.dumps(header).encode()
    parts: queue.Queue[NDArray[np.generic] | None] = queue.Queue(maxsize=2)

    def produce() -> None:  # random numbers are made while the last ones are written
        for name, tensor in tensors.items():
            for part in values(name, tensor):
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
