"""Train a sample for Q4_0, and measure what each way of rounding costs the result.

    python benchmarks/q4_0.py train        # 120 steps from samples/gemma4-kjv; minutes
    python benchmarks/q4_0.py measure

Training rounds matrices and tables in each forward pass as llama.cpp's Q4_0 does, and passes
gradients straight through. Two checkpoints are saved in bfloat16: `grid` has what the last forward
pass would have computed with, which lies on the grid as published checkpoints do; `latent` has the
numbers that gradients changed, and that a forward pass rounds first.

Measuring rounds a checkpoint's matrices and tables as a build would store them, and compares the
PyTorch model that computes with them to the one that computes with the checkpoint's own numbers.
Activations are not rounded.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrize
from tqdm import tqdm

from pleexport import families
from pleexport.backends.executorch.rounding import round_matrix
from pleexport.backends.executorch.storage import ExecutorchStorage
from pleexport.backends.onnx.blocks import quantize_blocks
from pleexport.backends.onnx.storage import OnnxStorage
from pleexport.checkpoint.checkpoint import Checkpoint
from pleexport.checkpoint.matching import MatchedModel
from pleexport.checkpoint.trained_grid import grid_distance, mark_grids
from pleexport.codes import dequantize_rows
from pleexport.dtypes import bits
from pleexport.model import Weight
from pleexport.quantize import quantize_rows
from pleexport.weights import WeightRequest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "samples" / "gemma4-kjv"
NAMES = ("grid", "latent")
GROUP = 32
# As in published files: gates and projections of per-layer vectors are left as they are.
PLAIN = ("per_layer_input_gate", "per_layer_projection", "per_layer_model_projection")
WINDOWS = 16  # of 256 tokens
STORAGES: dict[str, OnnxStorage | ExecutorchStorage] = {
    "its grid (the default)": OnnxStorage(WeightRequest("int4")),
    "its grid, head in 8 bits": OnnxStorage(WeightRequest("int4", head_dtype="int8")),
    "blocks of 32": OnnxStorage(WeightRequest("int4", 32, trained_grid=False)),
    "blocks of 32, head too": OnnxStorage(
        WeightRequest("int4", 32, head_dtype="int4", trained_grid=False)
    ),
    "blocks of up to 64": OnnxStorage(WeightRequest("int4", 64, trained_grid=False)),
    "blocks of up to 256": OnnxStorage(WeightRequest("int4", 256, trained_grid=False)),
    "blocks of up to 256, head too": OnnxStorage(
        WeightRequest("int4", 256, head_dtype="int4", trained_grid=False)
    ),
    "8 bits, blocks of up to 256": OnnxStorage(WeightRequest("int8", trained_grid=False)),
    "ExecuTorch (the default)": ExecutorchStorage(WeightRequest("int4")),
    "ExecuTorch, groups of up to 256": ExecutorchStorage(WeightRequest("int4", trained_grid=False)),
}
TABLES: dict[str, Callable[[NDArray[np.float32]], NDArray[np.float32]]] = {
    "int4, their grid (the default)": lambda rows: _rounded_rows(rows, 4, 32, "grid"),
    "int4, scales searched": lambda rows: _rounded_rows(rows, 4, 32, "searched"),
    "int8": lambda rows: _rounded_rows(rows, 8, 128, "searched"),
}


class Q40(nn.Module):
    """Rounds groups of 32 along the last axis; the gradient passes as if nothing was rounded.

    Source: ggml `quantize_row_q4_0_ref`: the largest value by magnitude gets the code -8, and the
    scale is a float16.
    """

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        groups = values.detach().unflatten(-1, (-1, GROUP))
        top, bottom = groups.amax(-1, keepdim=True), groups.amin(-1, keepdim=True)
        scales = (torch.where(top > -bottom, top, bottom) / -8).half().float()
        inverse = torch.where(scales == 0, 0, 1 / scales)
        rounded = (groups * inverse).round().clamp(-8, 7) * scales
        return values + (rounded.flatten(-2) - values.detach())


def train(out: Path, *, steps: int, learning_rate: float) -> None:
    """Fine-tune the sample, and save what it became, as `grid` and as `latent`."""
    import train as recipe
    from corpus import read_chapters, split_chapters
    from models import FAMILIES
    from tokenizer import encode_documents
    from tokenizers import Tokenizer

    settings = recipe.Settings(
        "gemma4",
        steps,
        batch_size=2,
        learning_rate=learning_rate,
        warmup_steps=20,
        final_learning_rate=0,
    )
    family = FAMILIES["gemma4"]
    tokenizer = Tokenizer.from_file(str(SOURCE / "tokenizer.json"))
    texts, _ = split_chapters(read_chapters())
    stream = recipe.join_documents(encode_documents(tokenizer, texts, family.vocabulary))
    model = family.build()
    model.load_state_dict(family.load(SOURCE).state_dict())
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding) and not name.endswith(PLAIN):
            parametrize.register_parametrization(module, "weight", Q40())
    optimizer = recipe.build_optimizer(model, settings)
    model.train()
    losses = []
    for step in tqdm(range(steps), unit="step", mininterval=10):
        losses.append(
            recipe.train_step(
                family,
                model,
                optimizer,
                # Other windows than those that the sample saw last.
                recipe.cut_batch(stream, step + 10_000, settings),
                learning_rate=recipe.learning_rate_at(step, settings),
                gradient_clip=settings.gradient_clip,
            )
        )
    for name in NAMES:
        folder = out / f"gemma4-kjv-{name}"
        family.save(_trained(model, rounded=name == "grid"), folder)
        tokenizer.save(str(folder / "tokenizer.json"))
    first, last = (sum(part) / len(part) for part in (losses[:20], losses[-20:]))
    print(f"mean training loss of the first and last 20 steps: {first:.3f}, {last:.3f}")


def _trained(model: nn.Module, *, rounded: bool) -> dict[str, torch.Tensor]:
    """The trained tensors under their own names, as forward passes take them or as they are."""
    found = {}
    for name, value in model.named_parameters():
        owner, parametrized, _ = name.partition(".parametrizations.")
        key = f"{owner}.weight" if parametrized else name
        taken = model.get_submodule(owner).weight if parametrized and rounded else value
        found[key] = taken.detach().clone()
    return found


def measure(folder: Path) -> None:
    """Print what every way of rounding costs a checkpoint, as tables."""
    from evaluate import cut_windows
    from models import FAMILIES
    from tokenizers import Tokenizer

    checkpoint = Checkpoint(folder)
    matched = mark_grids(MatchedModel(families.resolve(checkpoint), checkpoint))
    text = (ROOT / "samples" / "heldout.txt").read_text(encoding="utf-8")
    ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids
    windows = list(cut_windows(ids, stride=256))[:WINDOWS]
    inputs, targets = torch.tensor(windows).unbind(1)
    model = FAMILIES["gemma4"].load(folder)
    original, perplexity = _score(model, inputs, targets)
    distances = [
        grid_distance(matched.values(weight))
        for weight in matched.model.weights
        if weight.precision != "full" and not weight.name.removesuffix(".weight").endswith(PLAIN)
    ]
    print(
        f"\n{folder.name}: perplexity {perplexity:.3f}; distance from the grid "
        f"{min(distances):.3f} to {max(distances):.3f}"
    )
    print("\n| matrices | bytes | KL | perplexity |\n|---|---|---|---|")
    for name, storage in STORAGES.items():
        rounded = FAMILIES["gemma4"].load(folder)
        rounded.lm_head.weight = nn.Parameter(rounded.lm_head.weight.clone())
        parameters = dict(rounded.named_parameters(remove_duplicate=False))
        nbytes = 0
        for weight in matched.model.weights:
            if weight.precision == "full":
                continue
            key = weight.name if weight.precision == "head" else f"model.{weight.name}"
            parameters[key].data = torch.from_numpy(_stored(matched, weight, storage))
            nbytes += storage.file_bytes(weight)
        _print(name, nbytes, original, *_score(rounded, inputs, targets))
    print("\n| tables | bytes | KL | perplexity |\n|---|---|---|---|")
    for name, round_rows in TABLES.items():
        rounded = FAMILIES["gemma4"].load(folder)
        rounded.lm_head.weight = nn.Parameter(rounded.lm_head.weight.clone())
        nbytes = 0
        for table in matched.model.tables:
            rows = matched.row_values(table, slice(None)).reshape(-1, table.width)
            module = rounded.get_submodule(f"model.{table.name}")
            module.weight.data = torch.from_numpy(round_rows(rows)).reshape(module.weight.shape)
            share = 1 + 2 / 128 if name == "int8" else 0.5 + 2 / 32
            nbytes += round(rows.size * share)
        _print(name, nbytes, original, *_score(rounded, inputs, targets))


def _print(
    name: str, nbytes: int, original: torch.Tensor, scores: torch.Tensor, perplexity: float
) -> None:
    kl = functional.kl_div(scores, original, log_target=True, reduction="sum") / len(scores)
    print(f"| {name} | {nbytes / 1e6:.2f} MB | {kl:.1e} | {perplexity:.3f} |", flush=True)


@torch.no_grad()
def _score(
    model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, float]:
    """Log-probabilities `[tokens, vocab]`, and the perplexity."""
    scores = torch.cat([model(ids[None], use_cache=False).logits[0] for ids in inputs])
    scores = scores.log_softmax(-1)
    loss = functional.nll_loss(scores, targets.flatten(), ignore_index=-100)
    return scores, float(loss.exp())


def _stored(
    matched: MatchedModel, weight: Weight, storage: OnnxStorage | ExecutorchStorage
) -> NDArray[np.float32]:
    """The values `[N, K]` that a build stores of a matrix."""
    values, code_bits = matched.values(weight), bits(storage.dtype_of(weight))
    if isinstance(storage, ExecutorchStorage):
        group = storage.group_of(weight)
        found = round_matrix(values, bits=code_bits, group=group)
        return found.codes * found.scales.repeat(group, axis=-1)
    size = storage.block_size_of(weight)
    blocks = quantize_blocks(
        values, bits=code_bits, block_size=size, rounding=storage.rounding_of(weight)
    )
    codes = blocks.codes.astype(np.int16)
    if code_bits == 4:
        codes = np.stack((codes & 15, codes >> 4), axis=-1)
    steps = blocks.scales.repeat(size, axis=-1)
    whole = (codes.reshape(steps.shape) - (1 << code_bits - 1)) * steps
    return np.ascontiguousarray(whole[:, : values.shape[1]], dtype=np.float32)


def _rounded_rows(
    rows: NDArray[np.float32], code_bits: int, group: int, rounding: str
) -> NDArray[np.float32]:
    codes, scales = quantize_rows(rows, bits=code_bits, group_size=group, rounding=rounding)
    return dequantize_rows(codes, scales, group_size=group)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=["train", "measure"])
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "q4_0")
    arguments = parser.parse_args()
    sys.path.append(str(ROOT / "samples"))
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    if arguments.what == "train":
        train(arguments.out, steps=arguments.steps, learning_rate=arguments.learning_rate)
        return
    for name in NAMES:
        measure(arguments.out / f"gemma4-kjv-{name}")


if __name__ == "__main__":
    main()
