"""Measures a checkpoint on the held-out text: perplexity, baselines and ablations.

Of a bundle, the perplexity alone.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import torch
from corpus import read_chapters, read_heldout, split_chapters
from models import FAMILIES, Family, QuantizedGemmaFamily, Rows
from tokenizer import encode_documents
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional

from pleexport import Runner, families
from pleexport.checkpoint.checkpoint import Checkpoint
from pleexport.checkpoint.matching import MatchedModel
from pleexport.parity.oracle import open_oracle

CONTEXT = 256
STRIDE = 128
PROMPT = "In the beginning"
NOT_SCORED = -100
COMPARED_TOKENS = 64
CALIBRATING_WINDOWS = 16
SAMPLED_FROM = 50  # the most likely tokens, as in `transformers`

# Logits of windows of ids.
Scorer = Callable[[Tensor], Tensor]


def make_scorer(
    family: Family, model: nn.Module, change: Callable[[Rows, Tensor], Rows] | None = None
) -> Scorer:
    """Return what scores windows, with what they look up changed by `change(rows, ids)`."""

    def score(ids_BT: Tensor) -> Tensor:
        rows = family.look_up(model, ids_BT)
        return family.compute_logits(model, rows if change is None else change(rows, ids_BT))

    return score


def cut_windows(document: Sequence[int], *, stride: int = STRIDE) -> Iterator[list[list[int]]]:
    """Yield [inputs, targets] of `CONTEXT` ids each; every id after the first is scored once.

    The first id of each window is the document's first, which starts a text, as in training.
    """
    scored = 0
    for start in range(0, len(document) - 1, stride):
        inputs = [document[0], *document[start + 1 : start + CONTEXT]]
        targets = list(document[start + 1 : start + CONTEXT + 1])
        inputs = inputs[: len(targets)]
        already_scored = max(0, scored - start)
        targets[:already_scored] = [NOT_SCORED] * already_scored
        scored = start + len(targets)
        padding = CONTEXT - len(targets)
        yield [inputs + [0] * padding, targets + [NOT_SCORED] * padding]
        if scored >= len(document) - 1:
            return


@torch.no_grad()
def measure_loss(
    score: Scorer,
    documents: Sequence[Sequence[int]],
    *,
    stride: int = STRIDE,
    batch_size: int = 16,
    device: torch.device | None = None,
) -> float:
    """Return the mean negative log-likelihood per token, in nats."""
    windows = torch.tensor([w for d in documents for w in cut_windows(d, stride=stride)])
    windows = windows.to(device)
    total, count = 0.0, 0
    for inputs, targets in (batch.unbind(1) for batch in windows.split(batch_size)):
        logits = score(inputs).float()
        loss = functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=NOT_SCORED, reduction="sum"
        )
        total += loss.item()
        count += int((targets != NOT_SCORED).sum())
    return total / count


def measure_unigram_loss(
    training: Sequence[Sequence[int]], heldout: Sequence[Sequence[int]], *, vocab_size: int
) -> float:
    """Return the loss of add-one smoothed token frequencies of the training text."""
    ids = torch.tensor([token for document in training for token in document[1:]])
    counts = torch.bincount(ids, minlength=vocab_size).double() + 1
    log_probability = (counts / counts.sum()).log()
    scored = torch.tensor([token for document in heldout for token in document[1:]])
    return -log_probability[scored].mean().item()


def measure_ablations(
    family: Family, model: nn.Module, heldout: Sequence[Sequence[int]]
) -> dict[str, float]:
    """Return the losses with changed rows, by what is changed."""

    def zero(rows: Rows, _: Tensor) -> Rows:
        return {n: r if n == "inputs_embeds" else torch.zeros_like(r) for n, r in rows.items()}

    def zero_all(rows: Rows, _: Tensor) -> Rows:
        return {name: torch.zeros_like(row) for name, row in rows.items()}

    def shift(rows: Rows, ids: Tensor) -> Rows:
        others = family.look_up(model, (ids - 1) % family.vocabulary.size)
        return others | {"inputs_embeds": rows["inputs_embeds"]}

    changes = {"ple_zeroed": zero, "ple_shifted": shift, "rows_zeroed": zero_all}
    return {
        name: measure_loss(make_scorer(family, model, change), heldout)
        for name, change in changes.items()
    }


def family_name(folder: Path) -> str:
    """Return by what name `FAMILIES` has the family of a checkpoint."""
    model = families.resolve(Checkpoint(folder))
    quantized = any(weight.codes for weight in model.weights)
    return f"{model.family}-qat" if quantized else model.family


@torch.no_grad()
def measure_plain_rounding(
    family: QuantizedGemmaFamily,
    training: Sequence[Sequence[int]],
    heldout: Sequence[Sequence[int]],
) -> dict[str, float]:
    """Return the losses of what training started from: as it was, and rounded to the same bits.

    Scales of weights have the least squared error, those of activations fit a training batch.
    """
    losses = {"start": measure_loss(make_scorer(family, family.load_start()), heldout)}
    model = family.build().eval()
    losses["start_weights_rounded"] = measure_loss(make_scorer(family, model), heldout)
    windows = (window for document in training for window in cut_windows(document, stride=CONTEXT))
    whole = (inputs for inputs, targets in windows if NOT_SCORED not in targets)
    make_scorer(family, model.train())(torch.tensor(list(islice(whole, CALIBRATING_WINDOWS))))
    losses["start_rounded"] = measure_loss(make_scorer(family, model.eval()), heldout)
    return losses


@torch.no_grad()
def measure_difference(folder: Path, score: Scorer, ids: Sequence[int]) -> float:
    """Return the largest difference to the logits of the original that bundles are checked with."""
    checkpoint = Checkpoint(folder)
    oracle = open_oracle(MatchedModel(families.resolve(checkpoint), checkpoint))
    original = torch.from_numpy(oracle.logits(ids))
    return (score(torch.tensor([ids]))[0] - original).abs().max().item()


@torch.no_grad()
def generate_text(
    score: Scorer,
    tokenizer: Tokenizer,
    *,
    prompt: str,
    tokens: int,
    temperature: float,
    end_id: int,
) -> str:
    """Return the prompt with its continuation; temperature 0 is greedy."""
    torch.manual_seed(0)
    ids = tokenizer.encode(prompt).ids
    for _ in range(tokens):
        logits = score(torch.tensor([ids]))[0, -1]
        if temperature:
            least = logits.topk(SAMPLED_FROM).values[-1]
            likely = logits.masked_fill(logits < least, -math.inf)
            chosen = torch.multinomial((likely / temperature).softmax(-1), 1)
        else:
            chosen = logits.argmax()
        ids.append(int(chosen))
        if ids[-1] == end_id:
            break
    return tokenizer.decode(ids)


def evaluate_checkpoint(folder: Path) -> dict[str, object]:
    """Return every metric of the checkpoint in `folder`, computed on the CPU in fp32."""
    family = FAMILIES[family_name(folder)]
    vocabulary = family.vocabulary
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    training = encode_documents(tokenizer, split_chapters(read_chapters())[0], vocabulary)
    texts = read_heldout()
    heldout = encode_documents(tokenizer, texts, vocabulary)
    tokens = sum(len(document) - 1 for document in heldout)
    size = sum(len(text.encode()) for text in texts)
    model = family.load(folder)
    score = make_scorer(family, model)
    loss = measure_loss(score, heldout)
    unigram_loss = measure_unigram_loss(training, heldout, vocab_size=vocabulary.size)
    others = measure_ablations(family, model, heldout)
    if isinstance(family, QuantizedGemmaFamily):
        others |= measure_plain_rounding(family, training, heldout)

    def write(tokens: int, temperature: float) -> str:
        return generate_text(
            score,
            tokenizer,
            prompt=PROMPT,
            tokens=tokens,
            temperature=temperature,
            end_id=vocabulary.end_id,
        )

    return {
        "heldout_tokens": tokens,
        "heldout_bytes": size,
        "context": CONTEXT,
        "stride": STRIDE,
        "loss": round(loss, 4),
        "bits_per_byte": round(loss * tokens / size / math.log(2), 3),
        "perplexity": round(math.exp(loss), 2),
        "perplexity_unigram": round(math.exp(unigram_loss), 2),
        **{f"perplexity_{name}": round(math.exp(value), 2) for name, value in others.items()},
        "difference_to_original": measure_difference(folder, score, heldout[0][:COMPARED_TOKENS]),
        "greedy_text": write(64, 0.0),
        "sampled_text": write(120, 0.7),
    }


def evaluate_bundle(folder: Path) -> dict[str, object]:
    """Return loss and perplexity of a bundle, as it runs on a device."""
    runner = Runner(folder)
    vocabulary = FAMILIES[runner.bundle.manifest.family].vocabulary
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    heldout = encode_documents(tokenizer, read_heldout(), vocabulary)

    def score(ids_BT: Tensor) -> Tensor:
        return torch.stack([torch.from_numpy(runner.logits(ids)) for ids in ids_BT.tolist()])

    loss = measure_loss(score, heldout)
    return {"loss": round(loss, 4), "perplexity": round(math.exp(loss), 2)}


def main() -> None:
    """Print the metrics of one folder as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="a checkpoint, or a bundle of one")
    folder = parser.parse_args().folder
    is_bundle = (folder / "manifest.json").is_file()
    measured = evaluate_bundle(folder) if is_bundle else evaluate_checkpoint(folder)
    print(json.dumps(measured, indent=2))


if __name__ == "__main__":
    main()
