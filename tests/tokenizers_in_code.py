"""Small tokenizers of every kind that checkpoints have, made in code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

SPECIALS = ["<pad>", "<eos>", "<bos>", "<unk>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
WORDS = ["▁", "a", "b", "é", "▁a", "ab", "▁ab", "\n", "n't", "'", ".", "▁▁", "�", "\ufffd"]


def byte_level() -> Tokenizer:
    """Every byte is a token of its own, as in GPT-2."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<bos>", "<end>"])
    tokenizer.add_tokens(["<think>", "</think>", "é!"])
    return tokenizer


def byte_fallback(*, strip: bool = False) -> Tokenizer:
    """As Gemma's: what has no token of its own is spelled in bytes.

    Args:
        strip: drop a space at the beginning of a text, as Llama's first one does.
    """
    pieces = list(dict.fromkeys([*SPECIALS, *BYTES, *WORDS, "c", "▁c", "ca"]))
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = [("▁", "a"), ("a", "b"), ("▁a", "b"), ("▁", "▁"), ("▁", "c"), ("c", "a")]
    model = models.BPE(
        vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps + [decoders.Strip(" ", 1, 0)] * strip)
    tokenizer.add_special_tokens([*SPECIALS, "<turn>", "<|channel>", "<channel|>"])
    tokenizer.add_tokens(["<tool>", AddedToken("<wide>", lstrip=True, rstrip=True)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", vocab["<bos>"])]
    )
    return tokenizer


def metaspace() -> Tokenizer:
    """Unigram with a space in front of every text, as T5's."""
    pieces = [("<unk>", 0.0), *((word, -float(i)) for i, word in enumerate(dict.fromkeys(WORDS)))]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["<eos>"])
    return tokenizer


def word_pieces() -> Tokenizer:
    """Words with `##` endings, as BERT's."""
    words = ["[UNK]", "don", "##n", "'", "t", "s", ".", ",", "!", "##ab", "is", "n", "'t", "##."]
    tokenizer = Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    tokenizer.add_special_tokens(["[SEP]"])
    return tokenizer


def suffixes() -> Tokenizer:
    """Words that end with `</w>`, as OpenAI's first GPT had them."""
    pieces = ["a", "b", "a</w>", "b</w>", "é</w>"]
    model = models.BPE(
        vocab={p: i for i, p in enumerate(pieces)}, merges=[], end_of_word_suffix="</w>"
    )
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.BPEDecoder("</w>")
    return tokenizer


KINDS = {
    "byte level": byte_level,
    "byte fallback": byte_fallback,
    "byte fallback, stripped": lambda: byte_fallback(strip=True),
    "metaspace": metaspace,
    "word pieces": word_pieces,
    "suffixes": suffixes,
}


def save(tokenizer: Tokenizer, folder: Path, **config: Any) -> Path:
    """Write a tokenizer as a checkpoint has it; the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast"} | config
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder
