"""Measures a checkpoint on the held-out text: perplexity, baselines and ablations."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from corpus import read_chapters, read_heldout, split_chapters
from tokenizer import BOS_ID, PAD_ID, VOCAB_SIZE, encode_documents
from tokenizers import Tokenizer
from torch.nn import functional
from transformers import AutoModelForCausalLM, PreTrainedModel

CONTEXT = 256
STRIDE = 128
PROMPT = "In the beginning"
NOT_SCORED = -100


def load_checkpoint(folder: Path) -> PreTrainedModel:
    """Load in the checkpoint's own dtype, then compute in fp32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").float().eval()


def cut_windows(document: Sequence[int], *, stride: int = STRIDE) -> Iterator[list[list[int]]]:
    """Yield [inputs, targets] of `CONTEXT` ids each; every id after `<bos>` is scored once.

    The first id of each window is `<bos>`, as in training.
    """
    scored = 0
    for start in range(0, len(document) - 1, stride):
        inputs = [BOS_ID, *document[start + 1 : start + CONTEXT]]
        targets = list(document[start + 1 : start + CONTEXT + 1])
        inputs = inputs[: len(targets)]
        already_scored = max(0, scored - start)
        targets[:already_scored] = [NOT_SCORED] * already_scored
        scored = start + len(targets)
        padding = CONTEXT - len(targets)
        yield [inputs + [PAD_ID] * padding, targets + [NOT_SCORED] * padding]
        if scored >= len(document) - 1:
            return


@torch.no_grad()
def measure_loss(
    model: PreTrainedModel,
    documents: Sequence[Sequence[int]],
    *,
    stride: int = STRIDE,
    batch_size: int = 16,
) -> float:
    """Return the mean negative log-likelihood per token, in nats."""
    windows = torch.tensor([w for d in documents for w in cut_windows(d, stride=stride)])
    windows = windows.to(model.device)
    total, count = 0.0, 0
    for inputs, targets in (batch.unbind(1) for batch in windows.split(batch_size)):
        logits = model(input_ids=inputs, use_cache=False).logits.float()
        loss = functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=NOT_SCORED, reduction="sum"
        )
        total += loss.item()
        count += int((targets != NOT_SCORED).sum())
    return total / count


def measure_unigram_loss(
    training: Sequence[Sequence[int]], heldout: Sequence[Sequence[int]]
) -> float:
    """Return the loss of add-one smoothed token frequencies of the training text."""
    ids = torch.tensor([token for document in training for token in document[1:]])
    counts = torch.bincount(ids, minlength=VOCAB_SIZE).double() + 1
    log_probability = (counts / counts.sum()).log()
    scored = torch.tensor([token for document in heldout for token in document[1:]])
    return -log_probability[scored].mean().item()


def measure_ablations(model: PreTrainedModel, heldout: Sequence[Sequence[int]]) -> dict[str, float]:
    """Return the losses with changed per-layer tables; the model is left as it was."""
    table = model.model.embed_tokens_per_layer.weight
    original = table.detach().clone()
    changed = {"zeroed": torch.zeros_like(original), "shifted": original.roll(1, dims=0)}
    losses = {}
    for name, rows in changed.items():
        table.data.copy_(rows)
        losses[name] = measure_loss(model, heldout)
    table.data.copy_(original)
    return losses


def generate_text(
    model: PreTrainedModel, tokenizer: Tokenizer, *, prompt: str, tokens: int, temperature: float
) -> str:
    """Return the prompt with its continuation; temperature 0 is greedy."""
    torch.manual_seed(0)
    ids = torch.tensor([tokenizer.encode(prompt).ids], device=model.device)
    options = {"do_sample": True, "temperature": temperature} if temperature else {}
    if not temperature:
        options["do_sample"] = False
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, **options
    )
    return tokenizer.decode(output[0].tolist())


def evaluate_checkpoint(folder: Path) -> dict[str, object]:
    """Return every metric of the checkpoint in `folder`, computed on the CPU in fp32."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    training = encode_documents(tokenizer, split_chapters(read_chapters())[0])
    heldout = encode_documents(tokenizer, read_heldout())
    model = load_checkpoint(folder)
    loss = measure_loss(model, heldout)
    ablations = measure_ablations(model, heldout)
    return {
        "heldout_tokens": sum(len(document) - 1 for document in heldout),
        "context": CONTEXT,
        "stride": STRIDE,
        "loss": round(loss, 4),
        "perplexity": round(math.exp(loss), 2),
        "perplexity_unigram": round(math.exp(measure_unigram_loss(training, heldout)), 2),
        "perplexity_ple_zeroed": round(math.exp(ablations["zeroed"]), 2),
        "perplexity_ple_shifted": round(math.exp(ablations["shifted"]), 2),
        "greedy_text": generate_text(model, tokenizer, prompt=PROMPT, tokens=64, temperature=0.0),
        "sampled_text": generate_text(model, tokenizer, prompt=PROMPT, tokens=120, temperature=0.7),
    }


def main() -> None:
    """Print the metrics of one checkpoint folder as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    print(json.dumps(evaluate_checkpoint(parser.parse_args().checkpoint), indent=2))


if __name__ == "__main__":
    main()
