"""The plain RWKV reference against its authors' package, and against changes to each tensor."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from rwkv_checkpoints import VARIANTS, Variant, rwkv, rwkv_tensors, unused
from torch import Tensor

from pleexport.errors import UnsupportedError
from pleexport.references.rwkv import RwkvReference

TOLERANCE = 1e-4  # of the range of the logits
VISIBLE = 10 * TOLERANCE  # what a changed tensor must exceed
VOCAB = 96
TOKEN_IDS: list[int] = torch.randint(
    VOCAB, (64,), generator=torch.Generator().manual_seed(1)
).tolist()
NAMES = {
    "7a": "plain RWKV-7a reference",
    "7b": "plain RWKV-7b reference",
    "8": "plain RWKV-8 rc00 reference",
    "8-hybrid": "plain RWKV-8 rc00 hybrid reference",
}


def logits(tensors: Mapping[str, Tensor], token_ids: list[int] = TOKEN_IDS) -> Tensor:
    """`[T, vocab]` of the reference."""
    reference = RwkvReference(tensors)
    state = reference.start()
    return torch.stack([reference.step(reference.vectors(i), state)[0] for i in token_ids])


def difference(got: Tensor, expected: Tensor) -> float:
    """The largest difference, as a share of the range of the logits."""
    return ((got - expected).abs().max() / (expected.max() - expected.min())).item()


def kinds(variant: Variant) -> list[str]:
    """One key of each kind that matters, of block 1 where the kind has one."""
    names = rwkv_tensors(variant)
    used = names.keys() - unused(variant, names)
    return sorted({key for key in used if not re.match(r"blocks\.[02]\.(?!ln0)", key)})


def changed(tensors: Mapping[str, Tensor], key: str) -> dict[str, Tensor]:
    """The tensors with one of them changed, at each element by up to the spread of its own."""
    tensor = tensors[key]
    share = torch.rand(tensor.shape, generator=torch.Generator().manual_seed(2))
    return {**tensors, key: tensor + share * tensor.std()}


@pytest.fixture(scope="module")
def package_model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The 7a checkpoint in the authors' package; it reads its switches when it is imported."""
    path = rwkv(tmp_path_factory.mktemp("rwkv") / "7a.pth", "7a")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RWKV_V7_ON", "1")
        patch.setenv("RWKV_DE_VERSION", "1")
        patch.setenv("RWKV_CUDA_ON", "0")
        patch.setenv("RWKV_JIT_ON", "1")  # it would set this itself, for good
        from rwkv.model import RWKV

        yield RWKV(str(path.with_suffix("")), "cpu fp32")


@pytest.fixture(scope="module")
def package_logits(package_model: Any) -> Tensor:
    """Logits `[T, vocab]` of the package, token by token."""
    rows, state = [], None
    for token_id in TOKEN_IDS:
        row, state = package_model.forward(token_id, state)
        rows.append(row)
    return torch.stack(rows)


def test_rwkv_reference_agrees_with_the_package(package_model: Any, package_logits: Tensor) -> None:
    got = logits(rwkv_tensors("7a"))
    assert difference(got, package_logits) < TOLERANCE
    sequence, _ = package_model.forward(TOKEN_IDS, None, full_output=True)
    assert difference(got, sequence) < TOLERANCE


@pytest.mark.parametrize("key", kinds("7a"))
def test_rwkv_reference_with_a_changed_tensor_disagrees_with_the_package(
    key: str, package_logits: Tensor
) -> None:
    got = logits(changed(rwkv_tensors("7a"), key), TOKEN_IDS[:16])
    assert difference(got, package_logits[:16]) > VISIBLE


@pytest.mark.parametrize("variant", VARIANTS)
def test_rwkv_reference_depends_on_each_tensor_that_the_original_reads(variant: Variant) -> None:
    tensors = rwkv_tensors(variant)
    idle = unused(variant, tensors)
    expected = logits(tensors, TOKEN_IDS[:8])
    found = {
        key: difference(logits(changed(tensors, key), TOKEN_IDS[:8]), expected)
        for key in [*kinds(variant), *idle]
    }
    assert {key for key, size in found.items() if size == 0} == idle
    assert {key for key, size in found.items() if size < VISIBLE} == idle


@pytest.mark.parametrize("variant", VARIANTS)
def test_rwkv_reference_takes_sizes_from_the_tensors(variant: Variant) -> None:
    tensors = rwkv_tensors(
        variant,
        vocab=11,
        width=24,
        layers=2,
        head_size=8,
        ffn=40,
        de_rank=5,
        dea_width=20,
        dea_rank=7,
    )
    reference = RwkvReference(tensors)
    vectors = reference.vectors(3)
    expected = {"inputs_embeds": (24,), "deep_embeds": (2, 25 if variant in {"7a", "7b"} else 24)}
    if variant in {"7b", "8-hybrid"}:
        expected |= {"key_embeds": (2, 20), "value_embeds": (2, 24)}
    assert {name: tuple(vector.shape) for name, vector in vectors.items()} == expected
    logits_V, hidden = reference.step(vectors, reference.start())
    assert logits_V.shape == (11,)
    assert [tuple(x.shape) for x in hidden] == [(24,), (24,)]
    assert reference.name == NAMES[variant]


@pytest.mark.parametrize("variant", VARIANTS)
def test_rwkv_reference_keeps_texts_apart(variant: Variant) -> None:
    tensors = rwkv_tensors(variant)
    reference = RwkvReference(tensors)
    texts = (TOKEN_IDS[:6], TOKEN_IDS[6:12])
    states = (reference.start(), reference.start())
    found: tuple[list[Tensor], list[Tensor]] = ([], [])
    for pair in zip(*texts, strict=True):
        for token_id, state, rows in zip(pair, states, found, strict=True):
            rows.append(reference.step(reference.vectors(token_id), state)[0])
    for text, rows in zip(texts, found, strict=True):
        assert torch.equal(torch.stack(rows), logits(tensors, text))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_rwkv_reference_computes_in_float32(variant: Variant, dtype: torch.dtype) -> None:
    tensors = rwkv_tensors(variant, dtype=dtype)
    widened = {key: tensor.float() for key, tensor in tensors.items()}
    assert torch.equal(logits(tensors, TOKEN_IDS[:4]), logits(widened, TOKEN_IDS[:4]))


def test_rwkv_reference_of_the_hybrid_does_not_need_ln0() -> None:
    tensors = rwkv_tensors("8-hybrid")
    without = {key: tensor for key, tensor in tensors.items() if ".ln0." not in key}
    assert torch.equal(logits(without, TOKEN_IDS[:4]), logits(tensors, TOKEN_IDS[:4]))


def test_rwkv_reference_refuses_rwkv_without_tables() -> None:
    tensors = {k: t for k, t in rwkv_tensors("8").items() if not k.endswith("enn.weight")}
    with pytest.raises(UnsupportedError) as error:
        RwkvReference(tensors)
    assert error.value.message == (
        "the checkpoint is no RWKV with DeepEmbed tables: it has neither "
        "`blocks.0.ffn.s_emb.weight` (7a, 7b) nor `blocks.0.ffn.enn.weight` (8 rc00, hybrid)"
    )
