"""What is mutated: the smallest checkpoint and bundle of each family, and files of other kinds."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

TESTS = Path(__file__).parents[1]
TARGETS = TESTS.parent / "targets"
# A module of the tests imports its neighbours by their names alone.
if str(TESTS) not in sys.path:
    sys.path.append(str(TESTS))

# By name: what kind of thing it is, and how often it is taken, of a thousand.
BASES = {
    "gemma4-bundle": ("bundle", 100),
    "gemma3n-bundle": ("bundle", 40),
    "embformer-bundle": ("bundle", 20),
    "lckv-bundle": ("bundle", 30),
    "values-bundle": ("bundle", 30),
    "rwkv-bundle": ("bundle", 40),
    "gemma4": ("checkpoint", 90),
    "gemma4-shards": ("checkpoint", 50),
    "gemma4-packed": ("checkpoint", 50),
    "gemma4-text": ("checkpoint", 20),
    "gemma3n": ("checkpoint", 50),
    "embformer": ("checkpoint", 40),
    "lckv": ("checkpoint", 40),
    "values": ("checkpoint", 40),
    "rwkv": ("checkpoint", 50),
    "adapter": ("adapter", 60),
    "tokenizer": ("tokenizer", 90),
    "world": ("tokenizer", 30),
    "targets": ("targets", 40),
    "shards-bundle": ("bundle", 40),
    "executorch-bundle": ("program", 30),
    "web-package": ("package", 20),
}
# Beside the bases: a target whose packs hold less than the blob of a bundle, and a text.
SMALL_PACKS, WORDS = "small.toml", "words.txt"
_PACK_BYTES = 27_000
_SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "max_position_embeddings": 256,
}
# Of the families that transformers lacks.
_FEW: dict[str, Any] = {
    "hidden_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "num_hidden_layers": 2,
}
_RWKV = {"vocab": 40, "width": 32, "layers": 2, "head_size": 16, "ffn": 32, "decay_rank": 8}
_RWKV |= {"rate_rank": 8, "value_rank": 8, "gate_rank": 8, "de_rank": 8}


@dataclass(frozen=True)
class Base:
    """A folder to mutate.

    Attributes:
        kind: `bundle`, `program` (a bundle of ExecuTorch), `package`, `checkpoint`, `adapter`,
            `tokenizer` or `targets`.
        content: of its files, by name.
        inside: the name of the file that is opened, where that is not the folder.
    """

    name: str
    kind: str
    folder: Path
    content: dict[str, bytes]

    @property
    def inside(self) -> str:
        """What is opened in the folder; "" for the folder itself."""
        return "model.pth" if "model.pth" in self.content else ""


def open_bases(folder: Path) -> dict[str, Base]:
    """The bases of a folder by name; those that could not be made are left out."""
    found = {}
    for name, (kind, _) in BASES.items():
        own = folder / name
        if own.is_dir():
            content = {p.name: p.read_bytes() for p in sorted(own.iterdir())}
            found[name] = Base(name, kind, own, content)
    return found


def make_bases(
    folder: Path, *, torch: bool = True, only: Collection[str] = BASES.keys()
) -> list[str]:
    """Write the bases that are not there yet.

    Args:
        torch: False to make only what needs none.
        only: names of bases; what they are made of has to be among them.
    Returns:
        why some were not made, as sentences.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _write_beside(folder)
    problems = []
    for name, make in _MAKERS.items():
        if name not in only or (folder / name).exists():
            continue
        if name not in _LIGHT and not torch:
            problems.append(f"{name} is left out: it needs torch")
            continue
        staging = folder / f".{name}"
        shutil.rmtree(staging, ignore_errors=True)
        try:
            with contextlib.redirect_stdout(sys.stderr):
                make(staging, folder)
            staging.rename(folder / name)
        except Exception as err:
            problems.append(f"{name} is left out: {type(err).__name__}: {str(err)[:200]}")
            shutil.rmtree(staging, ignore_errors=True)
    return problems


def _write_beside(folder: Path) -> None:
    text = (TARGETS / "android.toml").read_text(encoding="utf-8")
    limit = f"largest_pack_bytes = {_PACK_BYTES}"
    text = re.sub(r"largest_pack_bytes = \S+", limit, text)
    (folder / SMALL_PACKS).write_text(text, encoding="utf-8")
    (folder / WORDS).write_text("the cab a bed", encoding="utf-8")


def _gemma4(folder: Path, _all: Path) -> None:
    from checkpoints import gemma4

    gemma4(folder, **_SMALL, final_logit_softcapping=None, vocab_size=96)


def _gemma4_text(folder: Path, _all: Path) -> None:
    from checkpoints import gemma4

    gemma4(folder, **_SMALL, vocab_size=300, vocab_size_per_layer_input=300)
    _tokenizer(folder, _all)


def _gemma4_shards(folder: Path, _all: Path) -> None:
    from checkpoints import gemma4
    from safetensors.torch import load_file, save_file

    gemma4(folder, **_SMALL)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2]}
    parts["model-00002-of-00002.safetensors"] = names[1::2]
    for file, own in parts.items():
        save_file({n: tensors[n] for n in own}, folder / file, metadata={"format": "pt"})
    weight_map = {n: file for file, own in parts.items() for n in own}
    size = sum(t.nbytes for t in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _gemma4_packed(folder: Path, _all: Path) -> None:
    from packed_checkpoints import packed_gemma4

    packed_gemma4(folder, **{k: v for k, v in _SMALL.items() if "size" not in k})


def _gemma3n(folder: Path, _all: Path) -> None:
    from checkpoints import gemma3n

    gemma3n(folder, **_SMALL, activation_sparsity_pattern=[0.95, 0.0, 0.5, 0.0])


def _embformer(folder: Path, _all: Path) -> None:
    from family_checkpoints import embformer

    embformer(folder, **_FEW)


def _lckv(folder: Path, _all: Path) -> None:
    from family_checkpoints import lckv

    lckv(folder, **_FEW | {"num_hidden_layers": 3}, layer_types="0_2_2", intermediate_size=32)


def _values(folder: Path, _all: Path) -> None:
    from family_checkpoints import llama_value_embeddings

    llama_value_embeddings(folder, **_FEW, value_embedding_layers=[1], intermediate_size=32)


def _rwkv(folder: Path, _all: Path) -> None:
    from rwkv_checkpoints import rwkv

    rwkv(folder / "model.pth", "7a", **_RWKV)


def _bundle(name: str, **options: Any) -> Callable[[Path, Path], None]:
    def make(folder: Path, others: Path) -> None:
        import pleexport

        source = others / name
        if (source / "model.pth").is_file():
            source = source / "model.pth"
        pleexport.build(source, folder, context=64, verify=False, **options)

    return make


def _adapter(folder: Path, others: Path) -> None:
    """By hand, as peft writes it: it need not be there."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": str(others / "gemma4"),
        "task_type": "CAUSAL_LM",
        "r": 2,
        "lora_alpha": 4,
        "lora_dropout": 0.0,
        "target_modules": ["q_proj", "up_proj"],
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(0)
    # Rows of the matrix, and what it takes, by layer: global layers have wider heads.
    inner = {0: 32, 1: 32, 2: 64, 3: 64}
    tensors = {}
    for i in range(4):
        for module, rows in (
            ("self_attn.q_proj", 32 if i % 2 == 0 else 64),
            ("mlp.up_proj", inner[i]),
        ):
            prefix = f"base_model.model.model.layers.{i}.{module}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(2, 16, generator=generator)
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(rows, 2, generator=generator)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def _tokenizer(folder: Path, _all: Path) -> None:
    from chat_templates import THINKING
    from tokenizers_in_code import byte_fallback, save

    save(byte_fallback(), folder, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")
    (folder / "chat_template.jinja").write_text(THINKING, encoding="utf-8")


def _world(folder: Path, _all: Path) -> None:
    """A vocabulary as RWKV's: every byte, and a few words."""
    folder.mkdir()
    pieces: list[str | bytes] = [bytes([i]) if i > 126 else chr(i) for i in range(256)]
    pieces += ["ab", "the", " the", "é", "中", "中文", b"\xe4\xb8"]
    lines = []
    for i, piece in enumerate(pieces, 1):
        size = len(piece.encode() if isinstance(piece, str) else piece)
        lines.append(f"{i} {piece!r} {size}\n")
    (folder / "rwkv_vocab_v20230424.txt").write_text("".join(lines), encoding="utf-8")


def _targets(folder: Path, _all: Path) -> None:
    shutil.copytree(TARGETS, folder)


def in_two_shards() -> AbstractContextManager[Any]:
    """Let a blob that is larger than a pack be cut once; packs are too small for their rules."""
    from pleexport.export import packaging

    def ranges(blob: Any, _most: int) -> list[range]:
        return [range(0, blob.num_rows // 3), range(blob.num_rows // 3, blob.num_rows)]

    return mock.patch.object(packaging, "shard_ranges", ranges)


def _shards(folder: Path, others: Path) -> None:
    """What an app makes of a package: all files of all packs in one folder."""
    import pleexport

    with tempfile.TemporaryDirectory() as scratch:
        target = str(others / SMALL_PACKS)
        with in_two_shards():
            made = pleexport.package(others / "embformer-bundle", f"{scratch}/out", target=target)
        folder.mkdir()
        for file in made.index.files:
            shutil.copy(made.path / file.path, folder / file.name)


def _package(folder: Path, others: Path) -> None:
    import pleexport

    pleexport.package(others / "gemma4-bundle", folder, target="web", texts=[others / WORDS])


_LIGHT = {"tokenizer", "world", "targets"}
# In an order in which each finds what it is made of.
_MAKERS: dict[str, Callable[[Path, Path], None]] = {
    "targets": _targets,
    "tokenizer": _tokenizer,
    "world": _world,
    "gemma4": _gemma4,
    "gemma4-text": _gemma4_text,
    "gemma4-shards": _gemma4_shards,
    "gemma4-packed": _gemma4_packed,
    "gemma3n": _gemma3n,
    "embformer": _embformer,
    "lckv": _lckv,
    "values": _values,
    "rwkv": _rwkv,
    "adapter": _adapter,
    "gemma4-bundle": _bundle("gemma4-text", weight_dtype="int4", table_dtype="int4"),
    "gemma3n-bundle": _bundle("gemma3n", weight_dtype="fp16", table_dtype="source"),
    "embformer-bundle": _bundle("embformer", weight_dtype="fp32", cache_dtype="none"),
    "lckv-bundle": _bundle("lckv", weight_dtype="int8", cache_dtype="int8"),
    "values-bundle": _bundle("values", weight_dtype="int8", table_dtype="fp16"),
    "rwkv-bundle": _bundle("rwkv", weight_dtype="int8"),
    "shards-bundle": _shards,
    "executorch-bundle": _bundle("values", backend="executorch", weight_dtype="int8"),
    "web-package": _package,
}
