"""Trains the byte-level BPE tokenizers of the samples."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers


@dataclass(frozen=True)
class Vocabulary:
    """What a tokenizer is made to be.

    Attributes:
        size: number of ids, special tokens and the 256 bytes included.
        special_tokens: in the order of their ids, from 0 on.
        start, end: those of them that a text starts and ends with.
    """

    size: int
    special_tokens: tuple[str, ...]
    start: str
    end: str

    @property
    def start_id(self) -> int:
        return self.special_tokens.index(self.start)

    @property
    def end_id(self) -> int:
        return self.special_tokens.index(self.end)


SHARED_VOCABULARY = Vocabulary(
    size=4096,
    special_tokens=("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"),
    start="<bos>",
    end="<eos>",
)
# As in RWKV's own vocabularies, id 0 ends a text, and so is ahead of the next.
RWKV_VOCABULARY = Vocabulary(
    size=1024, special_tokens=("<|endoftext|>",), start="<|endoftext|>", end="<|endoftext|>"
)


def train_tokenizer(texts: Sequence[str], vocabulary: Vocabulary) -> Tokenizer:
    """Return a byte-level BPE tokenizer of these chapters: every UTF-8 string round-trips."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary.size,
        special_tokens=list(vocabulary.special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    start = vocabulary.start
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A",
        pair=f"{start} $A {start}:1 $B:1",
        special_tokens=[(start, vocabulary.start_id)],
    )
    return tokenizer


def save_tokenizer_config(folder: Path, *, max_length: int) -> None:
    """Write the tokenizer_config.json that `AutoTokenizer` reads, for the shared vocabulary."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "additional_special_tokens": ["<start_of_turn>", "<end_of_turn>"],
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
    }
    text = json.dumps(config, indent=2) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")


def encode_documents(
    tokenizer: Tokenizer, texts: Sequence[str], vocabulary: Vocabulary
) -> list[list[int]]:
    """Return the token ids of each text: the start, the text, the end."""
    return [[*encoding.ids, vocabulary.end_id] for encoding in tokenizer.encode_batch(list(texts))]
