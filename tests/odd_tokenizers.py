"""Folders whose tokenizer is more than a tokenizer.json, as trainers leave them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import normalizers
from tokenizers_in_code import byte_fallback, byte_level, metaspace, save, word_pieces


def write(folder: Path, name: str, value: Any) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    text = value if isinstance(value, str) else json.dumps(value)
    (folder / name).write_text(text, encoding="utf-8")


def truncated(folder: Path) -> None:
    tokenizer = byte_fallback()
    tokenizer.enable_truncation(max_length=8)
    save(tokenizer, folder)


def padded(folder: Path) -> None:
    tokenizer = byte_fallback()
    tokenizer.enable_padding(length=32, pad_token="<pad>")
    save(tokenizer, folder)


def added_tokens_file(folder: Path) -> None:
    save(byte_fallback(), folder, bos_token="<bos>")
    write(folder, "added_tokens.json", {"<a1>": 290, "<a2>": 291})


def added_tokens_that_are_special(folder: Path) -> None:
    save(byte_level(), folder, extra_special_tokens=["<a2>"])
    write(folder, "added_tokens.json", {"<a1>": 290, "<a2>": 291})


def special_tokens_map(folder: Path) -> None:
    save(byte_fallback(), folder)
    token = {"content": "<end2>", "lstrip": True, "rstrip": False, "normalized": False}
    specials = {"eos_token": token, "additional_special_tokens": ["<x1>", "<x2>"]}
    write(folder, "special_tokens_map.json", {**specials, "pad_token": "<pad>"})


def added_tokens_decoder(folder: Path) -> None:
    token = {"lstrip": False, "rstrip": True, "normalized": False, "single_word": False}
    tokens = {
        "290": {"content": "<d1>", "special": True, **token},
        "300": {"content": "<d2>", "special": False, **token},
    }
    save(byte_fallback(), folder, added_tokens_decoder=tokens, bos_token="<bos>")


def additional_special_tokens(folder: Path) -> None:
    save(byte_level(), folder, additional_special_tokens=["<s1>", "<s2>"], eos_token="<stop>")


def extra_special_tokens(folder: Path) -> None:
    save(byte_level(), folder, extra_special_tokens={"call": "<call>", "image_token": "<img>"})


def model_specific_tokens(folder: Path) -> None:
    save(byte_fallback(), folder, boi_token="<img>", audio_token="<sound>", bos_token="<bos>")


def gemma_class(folder: Path) -> None:
    # The class builds normalizer and decoder anew, and passes over those of the file.
    tokenizer = byte_fallback(strip=True)
    tokenizer.normalizer = normalizers.Lowercase()
    save(tokenizer, folder, tokenizer_class="GemmaTokenizer", bos_token="<bos>")


def llama_class(folder: Path) -> None:
    save(byte_fallback(), folder, tokenizer_class="LlamaTokenizer", bos_token="<bos>", legacy=False)


def asks_for_bos_and_eos(folder: Path) -> None:
    save(
        byte_level(),
        folder,
        **{
            "bos_token": "<bos>",
            "eos_token": "<end>",
            "add_bos_token": True,
            "add_eos_token": True,
        },
    )


def splits_special_tokens(folder: Path) -> None:
    save(byte_fallback(), folder, split_special_tokens=True, bos_token="<bos>")


def cleans(folder: Path) -> None:
    save(word_pieces(), folder, clean_up_tokenization_spaces=True)


def cleans_pieces(folder: Path) -> None:
    save(metaspace(), folder, clean_up_tokenization_spaces=True, unk_token="<unk>")


def would_clean(folder: Path) -> None:
    save(byte_fallback(), folder, clean_up_tokenization_spaces=True)


def cleans_all_the_same(folder: Path) -> None:
    forced = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"
    save(byte_fallback(), folder, clean_up_tokenization_spaces=True, **{forced: True})


def no_config(folder: Path) -> None:
    save(byte_fallback(), folder)
    (folder / "tokenizer_config.json").unlink()


def words_and_merges(folder: Path) -> None:
    model = json.loads(byte_level().to_str())["model"]
    folder.mkdir()
    vocab = model["vocab"] | {"he": 256, "ll": 257, "<|endoftext|>": 258}
    write(folder, "vocab.json", vocab)
    write(folder, "merges.txt", "#version: 0.2\nh e\nl l\n")
    write(folder, "tokenizer_config.json", {"tokenizer_class": "GPT2Tokenizer"})


FOLDERS: dict[str, Callable[[Path], None]] = {
    make.__name__: make
    for make in (
        truncated,
        padded,
        added_tokens_file,
        added_tokens_that_are_special,
        special_tokens_map,
        added_tokens_decoder,
        additional_special_tokens,
        extra_special_tokens,
        model_specific_tokens,
        gemma_class,
        llama_class,
        asks_for_bos_and_eos,
        splits_special_tokens,
        cleans,
        cleans_pieces,
        would_clean,
        cleans_all_the_same,
        no_config,
        words_and_merges,
    )
}
